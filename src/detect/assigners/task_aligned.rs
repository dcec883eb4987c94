//! Task-aligned assignment of anchor points to targets.
//!
//! An anchor inside a target is scored by `m = c^alpha * u^beta` (class probability, complete IoU); each target takes
//! its best anchors; an anchor wanted by several goes to the one it overlaps most. Only the anchors inside a target's
//! box are visited, found from the geometry of the grids.
//!
//! Source: Feng et al., "TOOD: Task-aligned One-stage Object Detection", 2021.

use std::ops::Range;

use rayon::prelude::*;

use crate::detect::anchors::{GridLevel, anchor_count};
use crate::detect::boxes::{IouKind, cxcywh_to_xyxy, iou_xyxy, xyxy_to_cxcywh};

/// A point must lie deeper inside a box than this, pixels.
const INSIDE_EPS: f32 = 1e-9;
/// Guards the division by a target's best metric.
const SCORE_EPS: f32 = 1e-9;

/// Parameters of the assigner.
#[derive(Clone, Copy, Debug)]
pub struct AssignerConfig {
    /// Anchors that a target may choose.
    pub topk: usize,
    /// Anchors that a target keeps once conflicts are settled; equal to `topk` for one-to-many heads.
    pub topk2: usize,
    /// Exponent of the class probability.
    pub alpha: f32,
    /// Exponent of the overlap.
    pub beta: f32,
}

impl Default for AssignerConfig {
    fn default() -> Self {
        AssignerConfig { topk: 10, topk2: 10, alpha: 0.5, beta: 6.0 }
    }
}

/// One target of one image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AssignTarget {
    /// Corners in pixels of the network input.
    pub xyxy: [f32; 4],
    /// Class index.
    pub class: u32,
}

impl AssignTarget {
    /// Rows whose coordinates do not sum to more than zero are padding and take no anchors.
    fn is_valid(&self) -> bool {
        self.xyxy.iter().sum::<f32>() > 0.0
    }
}

/// A foreground anchor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Positive {
    /// Anchor index over all levels.
    pub anchor: u32,
    /// Index of the target within the image.
    pub target: u32,
    /// Soft class target of the anchor, in 0..1.
    pub score: f32,
    metric: f32,
    overlap: f32,
}

#[derive(Clone, Copy)]
struct Candidate {
    anchor: u32,
    metric: f32,
    overlap: f32,
}

const NOT_OWNED: u32 = u32::MAX;
const CONTESTED: u32 = u32::MAX - 1;

/// Buffers of one image, reused between calls.
pub struct ImageWorkspace {
    targets: Vec<AssignTarget>,
    enlarged: Vec<[f32; 4]>,
    /// Owner of each anchor: a target, [`NOT_OWNED`] or [`CONTESTED`].
    owner: Vec<u32>,
    /// Best candidates of the target at hand, best first.
    best: Vec<Candidate>,
    contested: Vec<u32>,
    positives: Vec<Positive>,
    /// Best metric and best overlap of each target.
    maxima: Vec<(f32, f32)>,
}

impl ImageWorkspace {
    /// Room for `anchors` anchor points and `boxes` targets choosing `topk` anchors each.
    pub fn new(anchors: usize, boxes: usize, topk: usize) -> ImageWorkspace {
        let mut workspace = ImageWorkspace {
            targets: Vec::new(),
            enlarged: Vec::new(),
            owner: vec![NOT_OWNED; anchors],
            best: Vec::with_capacity(topk + 1),
            contested: Vec::new(),
            positives: Vec::new(),
            maxima: Vec::new(),
        };
        workspace.reserve(boxes, topk);
        workspace
    }

    /// Grows the buffers to `boxes` targets; never shrinks.
    pub fn reserve(&mut self, boxes: usize, topk: usize) {
        fn grow<T>(buffer: &mut Vec<T>, size: usize) {
            buffer.reserve_exact(size.saturating_sub(buffer.len()));
        }
        self.targets.clear();
        self.positives.clear();
        self.contested.clear();
        self.enlarged.clear();
        self.maxima.clear();
        let choices = (boxes * topk).min(self.owner.len());
        grow(&mut self.targets, boxes);
        grow(&mut self.enlarged, boxes);
        grow(&mut self.maxima, boxes);
        grow(&mut self.contested, choices);
        grow(&mut self.positives, choices);
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        fn of<T>(buffer: &Vec<T>) -> usize {
            buffer.capacity() * size_of::<T>()
        }
        of(&self.targets)
            + of(&self.enlarged)
            + of(&self.owner)
            + of(&self.best)
            + of(&self.contested)
            + of(&self.positives)
            + of(&self.maxima)
    }

    /// The targets to assign: clear and fill before [`TaskAlignedAssigner::assign_image`].
    pub fn targets_mut(&mut self) -> &mut Vec<AssignTarget> {
        &mut self.targets
    }

    /// The targets of the last assignment.
    pub fn targets(&self) -> &[AssignTarget] {
        &self.targets
    }

    /// The foreground anchors of the last assignment, ascending by anchor.
    pub fn positives(&self) -> &[Positive] {
        &self.positives
    }
}

/// Predictions of one image as the assigner reads them.
pub struct ImagePredictions<'a, P: Fn(usize, usize) -> f32> {
    /// Predicted corners of every anchor, pixels.
    pub xyxy: &'a [[f32; 4]],
    /// Predicted probability of `(anchor, class)`.
    pub probability: P,
}

/// Assigns anchor points to targets.
#[derive(Clone, Debug)]
pub struct TaskAlignedAssigner {
    config: AssignerConfig,
    levels: Vec<GridLevel>,
}

impl TaskAlignedAssigner {
    /// An assigner for the given grids.
    pub fn new(config: AssignerConfig, levels: Vec<GridLevel>) -> TaskAlignedAssigner {
        TaskAlignedAssigner { config, levels }
    }

    /// The grids.
    pub fn levels(&self) -> &[GridLevel] {
        &self.levels
    }

    /// Replaces the grids (another input size); their anchors must fit the workspaces used from now on.
    pub fn set_levels(&mut self, levels: impl Iterator<Item = GridLevel>) {
        self.levels.clear();
        self.levels.extend(levels);
    }

    /// The parameters.
    pub fn config(&self) -> &AssignerConfig {
        &self.config
    }

    /// Assigns the targets in `workspace` to the anchors of one image; the result is left in the workspace.
    ///
    /// An anchor whose metric is zero is never chosen: its score would be zero and it would change no loss.
    /// Between equal metrics the lower anchor wins, between equal overlaps the lower target.
    pub fn assign_image<P>(&self, predictions: &ImagePredictions<'_, P>, workspace: &mut ImageWorkspace)
    where
        P: Fn(usize, usize) -> f32,
    {
        let anchors = anchor_count(&self.levels);
        assert_eq!(predictions.xyxy.len(), anchors, "one predicted box per anchor point");
        assert!(workspace.owner.len() >= anchors, "the workspace holds too few anchor points");
        workspace.positives.clear();
        workspace.contested.clear();
        workspace.enlarged.clear();
        let side_min = self.levels.get(1).or(self.levels.first()).map_or(0.0, |level| level.stride as f32);
        workspace.enlarged.extend(workspace.targets.iter().map(|target| enlarge(target, side_min)));
        for target in 0..workspace.targets.len() {
            self.choose(predictions, target as u32, workspace);
        }
        self.settle(predictions, workspace);
        self.score(workspace);
    }

    /// Assigns every image of a batch in parallel; `workspaces[i]` holds the targets of image `i`.
    pub fn assign_batch<'a, P>(
        &self,
        predictions: impl Fn(usize) -> ImagePredictions<'a, P> + Sync,
        workspaces: &mut [ImageWorkspace],
    ) where
        P: Fn(usize, usize) -> f32,
    {
        workspaces.par_iter_mut().enumerate().for_each(|(image, workspace)| {
            self.assign_image(&predictions(image), workspace);
        });
    }

    fn metric(&self, probability: f32, overlap: f32) -> f32 {
        let class_part =
            if self.config.alpha == 0.5 { probability.sqrt() } else { probability.powf(self.config.alpha) };
        let overlap_part = if self.config.beta == 6.0 {
            let cube = overlap * overlap * overlap;
            cube * cube
        } else {
            overlap.powf(self.config.beta)
        };
        class_part * overlap_part
    }

    /// The top-k anchors of one target claim their anchors.
    fn choose<P>(&self, predictions: &ImagePredictions<'_, P>, target: u32, workspace: &mut ImageWorkspace)
    where
        P: Fn(usize, usize) -> f32,
    {
        let ImageWorkspace { targets, enlarged, owner, best, contested, .. } = workspace;
        let row = targets[target as usize];
        if !row.is_valid() || self.config.topk == 0 {
            return;
        }
        best.clear();
        let bounds = enlarged[target as usize];
        let mut first = 0usize;
        for level in &self.levels {
            let columns = inside_range(bounds[0], bounds[2], level.stride, level.w);
            for y in inside_range(bounds[1], bounds[3], level.stride, level.h) {
                for x in columns.clone() {
                    let anchor = first + y * level.w + x;
                    let overlap = overlap(row.xyxy, predictions.xyxy[anchor]);
                    if overlap <= 0.0 {
                        continue;
                    }
                    let metric = self.metric((predictions.probability)(anchor, row.class as usize), overlap);
                    if metric > 0.0 {
                        let candidate = Candidate { anchor: anchor as u32, metric, overlap };
                        insert_best(best, candidate, self.config.topk);
                    }
                }
            }
            first += level.cells();
        }
        for candidate in best.iter() {
            let holder = &mut owner[candidate.anchor as usize];
            match *holder {
                NOT_OWNED => {
                    *holder = target;
                    workspace.positives.push(Positive {
                        anchor: candidate.anchor,
                        target,
                        score: 0.0,
                        metric: candidate.metric,
                        overlap: candidate.overlap,
                    });
                }
                CONTESTED => {}
                _ => {
                    *holder = CONTESTED;
                    contested.push(candidate.anchor);
                }
            }
        }
    }

    /// Gives each contested anchor to the target it overlaps most, among all targets of the image.
    fn settle<P>(&self, predictions: &ImagePredictions<'_, P>, workspace: &mut ImageWorkspace)
    where
        P: Fn(usize, usize) -> f32,
    {
        let ImageWorkspace { targets, enlarged, owner, contested, positives, .. } = workspace;
        if !contested.is_empty() {
            for positive in positives.iter_mut() {
                if owner[positive.anchor as usize] != CONTESTED {
                    continue;
                }
                let (px, py) = self.point(positive.anchor as usize);
                let predicted = predictions.xyxy[positive.anchor as usize];
                let (mut winner, mut best) = (0usize, 0.0f32);
                for (index, (row, bounds)) in targets.iter().zip(enlarged.iter()).enumerate() {
                    if !row.is_valid() || !is_inside(px, py, *bounds) {
                        continue;
                    }
                    let u = overlap(row.xyxy, predicted);
                    if u > best {
                        (winner, best) = (index, u);
                    }
                }
                let class = targets[winner].class as usize;
                positive.target = winner as u32;
                positive.overlap = best;
                positive.metric =
                    self.metric((predictions.probability)(positive.anchor as usize, class), best);
            }
        }
        for positive in positives.iter() {
            owner[positive.anchor as usize] = NOT_OWNED;
        }
        if self.config.topk2 < self.config.topk {
            positives.sort_unstable_by(|a, b| {
                a.target.cmp(&b.target).then(b.metric.total_cmp(&a.metric)).then(a.anchor.cmp(&b.anchor))
            });
            let (mut current, mut kept) = (u32::MAX, 0usize);
            positives.retain(|positive| {
                if positive.target != current {
                    (current, kept) = (positive.target, 0);
                }
                kept += 1;
                kept <= self.config.topk2
            });
        }
        positives.sort_unstable_by_key(|positive| positive.anchor);
    }

    /// Soft scores: the metric rescaled so that each target's best anchor scores the target's best overlap.
    fn score(&self, workspace: &mut ImageWorkspace) {
        let ImageWorkspace { targets, positives, maxima, .. } = workspace;
        maxima.clear();
        maxima.resize(targets.len(), (0.0, 0.0));
        for positive in positives.iter() {
            let maximum = &mut maxima[positive.target as usize];
            *maximum = (maximum.0.max(positive.metric), maximum.1.max(positive.overlap));
        }
        for positive in positives.iter_mut() {
            let (metric_max, overlap_max) = maxima[positive.target as usize];
            positive.score = positive.metric * overlap_max / (metric_max + SCORE_EPS);
        }
    }

    /// Anchor point in pixels.
    fn point(&self, anchor: usize) -> (f32, f32) {
        let mut rest = anchor;
        for level in &self.levels {
            if rest < level.cells() {
                return (centre(rest % level.w, level.stride), centre(rest / level.w, level.stride));
            }
            rest -= level.cells();
        }
        unreachable!("anchor {anchor} lies beyond the last level")
    }
}

/// Pixel coordinate of cell `index`'s centre.
#[inline(always)]
fn centre(index: usize, stride: usize) -> f32 {
    (index as f32 + 0.5) * stride as f32
}

/// Overlap as the metric uses it: complete IoU, not below zero.
#[inline]
fn overlap(target: [f32; 4], predicted: [f32; 4]) -> f32 {
    // Boxes that do not meet have a complete IoU of at most zero: spare them the arc tangents.
    let apart = predicted[0] >= target[2]
        || predicted[2] <= target[0]
        || predicted[1] >= target[3]
        || predicted[3] <= target[1];
    if apart { 0.0 } else { iou_xyxy(IouKind::Ciou, target, predicted).max(0.0) }
}

/// The box in which anchor points are sought: sides below `side_min` are set to it about the same centre.
///
/// The way through centre form is part of the result: it rounds, and a rounded edge decides about a point on it.
fn enlarge(target: &AssignTarget, side_min: f32) -> [f32; 4] {
    let mut cxcywh = xyxy_to_cxcywh(target.xyxy);
    if target.is_valid() {
        for side in &mut cxcywh[2..] {
            if *side < side_min {
                *side = side_min;
            }
        }
    }
    cxcywh_to_xyxy(cxcywh)
}

#[inline]
fn is_inside(px: f32, py: f32, bounds: [f32; 4]) -> bool {
    px - bounds[0] > INSIDE_EPS
        && py - bounds[1] > INSIDE_EPS
        && bounds[2] - px > INSIDE_EPS
        && bounds[3] - py > INSIDE_EPS
}

/// Cells of one axis whose centre lies strictly between `low` and `high`.
fn inside_range(low: f32, high: f32, stride: usize, cells: usize) -> Range<usize> {
    let inside = |index: usize| {
        let p = centre(index, stride);
        p - low > INSIDE_EPS && high - p > INSIDE_EPS
    };
    // Start from an estimate that is one cell too wide on each side, then apply the exact test.
    let guess = |edge: f32, offset: f32| ((edge / stride as f32 + offset).clamp(0.0, cells as f32)) as usize;
    let (mut first, mut last) = (guess(low, -1.5), guess(high, 1.5));
    while first < last && !inside(first) {
        first += 1;
    }
    while first < last && !inside(last - 1) {
        last -= 1;
    }
    first..last
}

/// Inserts into a list sorted by falling metric, keeping at most `limit`; earlier entries win ties.
#[inline]
fn insert_best(best: &mut Vec<Candidate>, candidate: Candidate, limit: usize) {
    if best.len() == limit {
        match best.last() {
            Some(worst) if candidate.metric > worst.metric => {
                best.pop();
            }
            _ => return,
        }
    }
    let position = best.iter().rposition(|other| other.metric >= candidate.metric).map_or(0, |p| p + 1);
    best.insert(position, candidate);
}

#[cfg(test)]
mod tests;
