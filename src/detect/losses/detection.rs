//! The anchor-point detection loss: task-aligned assignment, class loss, box loss, distribution focal loss.
//!
//! [`DetectionLoss::compute`] takes the raw head outputs of a batch and overwrites the gradients of the head. All
//! work is split by image or by fixed stretches of rows and summed in a fixed order, so the bits do not depend
//! on the number of threads.

use rayon::prelude::*;

use super::{bce, dfl};
use crate::detect::anchors::GridLevel;
use crate::detect::assigners::task_aligned::{
    AssignTarget, AssignerConfig, ImagePredictions, ImageWorkspace, Positive, TaskAlignedAssigner,
};
use crate::detect::boxes::{IouKind, cxcywh_to_xyxy, iou_xyxy_gradient};
use crate::detect::decode::{HeadLevel, corners_of, decode_corners};
use crate::detect::targets::Target;

/// Rows of class logits that one task handles; fixed, because it fixes the order of the sum.
const CLASS_ROWS_PER_TASK: usize = 256;

/// Gradients of one head level; overwritten. Shapes as in [`HeadLevel`].
pub struct HeadLevelGrad<'a> {
    /// Gradient of the box logits.
    pub boxes: &'a mut [f32],
    /// Gradient of the class logits.
    pub scores: &'a mut [f32],
}

/// Parameters of the loss.
#[derive(Clone, Debug)]
pub struct LossConfig {
    /// Number of classes.
    pub nc: usize,
    /// Bins per side; 1 means that the head gives distances directly and the third term is an L1 distance.
    pub reg_max: usize,
    /// Gain of the box term.
    pub gain_box: f32,
    /// Gain of the class term.
    pub gain_cls: f32,
    /// Gain of the third term.
    pub gain_dfl: f32,
    /// Weight of each class's column in the class term, if any.
    pub class_weights: Option<Vec<f32>>,
    /// Parameters of the assigner.
    pub assigner: AssignerConfig,
}

impl LossConfig {
    /// The usual parameters for `nc` classes: 16 bins, gains 7.5 / 0.5 / 1.5, no class weights.
    pub fn new(nc: usize) -> LossConfig {
        LossConfig {
            nc,
            reg_max: 16,
            gain_box: 7.5,
            gain_cls: 0.5,
            gain_dfl: 1.5,
            class_weights: None,
            assigner: AssignerConfig::default(),
        }
    }
}

/// The terms of one batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossItems {
    /// Box term times its gain.
    pub box_: f32,
    /// Class term times its gain.
    pub cls: f32,
    /// Distribution focal term (or L1 term) times its gain.
    pub dfl: f32,
    /// What is differentiated: images in the batch times the sum of the three terms.
    pub total: f32,
}

/// The loss with all its buffers.
pub struct DetectionLoss {
    config: LossConfig,
    assigner: TaskAlignedAssigner,
    max_anchors: usize,
    max_boxes: usize,
    images: Vec<ImageWorkspace>,
    /// Predicted corners in pixels, `[max_batch][max_anchors]`.
    boxes: Vec<[f32; 4]>,
    /// Sums of the class term, one per task.
    class_sums: Vec<f64>,
    /// Sums of the box and third term, one per image.
    box_sums: Vec<(f64, f64)>,
}

impl DetectionLoss {
    /// Buffers for up to `max_batch` images of up to `max_anchors` anchor points (the largest input size used) and
    /// `max_boxes` targets per image. A batch with more targets in an image grows them once
    /// ([`DetectionLoss::reserve_boxes`]).
    pub fn new(config: LossConfig, max_batch: usize, max_anchors: usize, max_boxes: usize) -> DetectionLoss {
        assert!(config.nc >= 1, "at least one class");
        assert!((1..=dfl::BINS_MAX).contains(&config.reg_max), "reg_max is {} bins", config.reg_max);
        if let Some(weights) = &config.class_weights {
            assert_eq!(weights.len(), config.nc, "one class weight per class");
        }
        let tasks = max_batch * max_anchors / CLASS_ROWS_PER_TASK + 8;
        DetectionLoss {
            assigner: TaskAlignedAssigner::new(config.assigner, Vec::with_capacity(8)),
            max_anchors,
            max_boxes,
            images: (0..max_batch)
                .map(|_| ImageWorkspace::new(max_anchors, max_boxes, config.assigner.topk))
                .collect(),
            boxes: vec![[0.0; 4]; max_batch * max_anchors],
            class_sums: vec![0.0; tasks],
            box_sums: vec![(0.0, 0.0); max_batch],
            config,
        }
    }

    /// Grows the buffers to `boxes` targets per image; never shrinks.
    pub fn reserve_boxes(&mut self, boxes: usize) {
        if boxes > self.max_boxes {
            self.max_boxes = boxes;
            self.images.iter_mut().for_each(|image| image.reserve(boxes, self.config.assigner.topk));
        }
    }

    /// Bytes held in buffers.
    pub fn bytes(&self) -> usize {
        self.images.iter().map(ImageWorkspace::bytes).sum::<usize>()
            + size_of_val(&self.boxes[..])
            + size_of_val(&self.class_sums[..])
            + size_of_val(&self.box_sums[..])
    }

    /// The parameters.
    pub fn config(&self) -> &LossConfig {
        &self.config
    }

    /// The assignment of image `image` in the last call: its targets and its foreground anchors.
    pub fn assignment(&self, image: usize) -> (&[AssignTarget], &[Positive]) {
        (self.images[image].targets(), self.images[image].positives())
    }

    /// Predicted boxes (corners, pixels) of image `image` in the last call.
    pub fn predicted_xyxy(&self, image: usize) -> &[[f32; 4]] {
        let anchors = self.assigner.levels().iter().map(GridLevel::cells).sum::<usize>();
        &self.boxes[image * anchors..][..anchors]
    }

    /// Loss of `n` images and `d(total * scale)` by every head output.
    ///
    /// `total = n (box + cls + dfl)` with, N = max(sum of soft class targets, 1) over the batch:
    /// * `cls` = gain / N * sum of binary cross-entropies over images, anchors and classes;
    /// * `box` = gain / N * sum over foreground anchors of score * (1 - CIoU), grid units;
    /// * `dfl` = gain / N * sum over foreground anchors of score * distribution focal loss (mean of four sides), or
    ///   with one bin the mean absolute difference of the distances as fractions of the input's sides.
    ///
    /// `targets` lists the boxes grouped by image, images ascending; without any only the class term is left.
    ///
    /// # Gradient
    /// The assignment is a constant; see [`iou_xyxy_gradient`] for CIoU.
    pub fn compute(
        &mut self,
        levels: &[HeadLevel<'_>],
        grads: &mut [HeadLevelGrad<'_>],
        targets: &[Target],
        n: usize,
        scale: f32,
    ) -> LossItems {
        self.check(levels, grads, targets, n);
        self.assigner.set_levels(levels.iter().map(HeadLevel::grid));
        self.take_targets(levels, targets, n);
        self.assign(levels, n);
        let score_sum: f64 = self.images[..n]
            .iter()
            .flat_map(|image| image.positives().iter().map(|positive| positive.score as f64))
            .sum();
        let norm = score_sum.max(1.0);
        let to_total = n as f64 * scale as f64 / norm;
        let cls = self.class_term(levels, grads, n, (to_total * self.config.gain_cls as f64) as f32);
        let (box_, third) = self.box_term(levels, grads, n, to_total);
        let item = |sum: f64, gain: f32| (sum * gain as f64 / norm) as f32;
        let items = [
            item(box_, self.config.gain_box),
            item(cls, self.config.gain_cls),
            item(third, self.config.gain_dfl),
        ];
        LossItems {
            box_: items[0],
            cls: items[1],
            dfl: items[2],
            total: n as f32 * (items[0] + items[1] + items[2]),
        }
    }

    fn check(&self, levels: &[HeadLevel<'_>], grads: &[HeadLevelGrad<'_>], targets: &[Target], n: usize) {
        let LossConfig { nc, reg_max, .. } = self.config;
        assert!(!levels.is_empty() && levels.len() == grads.len(), "one gradient per head level");
        for (level, grad) in levels.iter().zip(grads) {
            let cells = n * level.h * level.w;
            assert_eq!(level.boxes.len(), cells * 4 * reg_max, "box logits of stride {}", level.stride);
            assert_eq!(level.scores.len(), cells * nc, "class logits of stride {}", level.stride);
            assert_eq!(grad.boxes.len(), level.boxes.len(), "box gradients of stride {}", level.stride);
            assert_eq!(grad.scores.len(), level.scores.len(), "class gradients of stride {}", level.stride);
        }
        let anchors: usize = levels.iter().map(|level| level.h * level.w).sum();
        assert!(n <= self.images.len(), "{n} images, room for {}", self.images.len());
        assert!(anchors <= self.max_anchors, "{anchors} anchor points, room for {}", self.max_anchors);
        assert!(targets.is_sorted_by_key(|target| target.image), "targets are not grouped by image");
        assert!(
            targets.last().is_none_or(|target| (target.image as usize) < n),
            "a target of an image beyond the batch"
        );
        assert!(
            targets.iter().all(|target| (target.class as usize) < nc),
            "a target's class is not below {nc}"
        );
    }

    /// Puts each image's targets, as pixels of the network input, into its workspace.
    fn take_targets(&mut self, levels: &[HeadLevel<'_>], targets: &[Target], n: usize) {
        let (w, h) = ((levels[0].w * levels[0].stride) as f32, (levels[0].h * levels[0].stride) as f32);
        let of_image = |image: usize| {
            let start = targets.partition_point(|target| (target.image as usize) < image);
            let end = targets.partition_point(|target| (target.image as usize) <= image);
            &targets[start..end]
        };
        self.reserve_boxes((0..n).map(|image| of_image(image).len()).max().unwrap_or(0));
        for (image, workspace) in self.images[..n].iter_mut().enumerate() {
            let rows = workspace.targets_mut();
            rows.clear();
            rows.extend(of_image(image).iter().map(|target| {
                let [cx, cy, bw, bh] = target.cxcywh;
                AssignTarget { xyxy: cxcywh_to_xyxy([cx * w, cy * h, bw * w, bh * h]), class: target.class }
            }));
        }
    }

    /// Decodes the boxes and assigns, image by image.
    fn assign(&mut self, levels: &[HeadLevel<'_>], n: usize) {
        let LossConfig { nc, reg_max, .. } = self.config;
        let anchors: usize = levels.iter().map(|level| level.h * level.w).sum();
        let assigner = &self.assigner;
        self.images[..n].par_iter_mut().zip(self.boxes.par_chunks_mut(anchors.max(1))).enumerate().for_each(
            |(image, (workspace, boxes))| {
                if workspace.targets().is_empty() && boxes.is_empty() {
                    return;
                }
                decode_corners(levels, reg_max, image, boxes);
                let probability = |anchor: usize, class: usize| {
                    let (level, cell) = locate(levels, anchor);
                    let row = image * level.h * level.w + cell;
                    bce::sigmoid(level.scores[row * nc + class])
                };
                assigner.assign_image(&ImagePredictions { xyxy: boxes, probability }, workspace);
            },
        );
    }

    /// Unscaled sum of the class term; writes the class gradients.
    fn class_term(
        &mut self,
        levels: &[HeadLevel<'_>],
        grads: &mut [HeadLevelGrad<'_>],
        n: usize,
        coefficient: f32,
    ) -> f64 {
        let nc = self.config.nc;
        let weights = self.config.class_weights.as_deref();
        let stretch = CLASS_ROWS_PER_TASK * nc;
        let tasks: usize = levels.iter().map(|level| level.scores.len().div_ceil(stretch)).sum();
        if self.class_sums.len() < tasks {
            self.class_sums.resize(tasks, 0.0);
        }
        let mut first = 0;
        for (level, grad) in levels.iter().zip(grads.iter_mut()) {
            let count = level.scores.len().div_ceil(stretch);
            level
                .scores
                .par_chunks(stretch)
                .zip(grad.scores.par_chunks_mut(stretch))
                .zip(&mut self.class_sums[first..first + count])
                .for_each(|((logits, gradient), sum)| {
                    *sum = bce::background_loss(logits, gradient, coefficient, weights);
                });
            first += count;
        }
        let mut total: f64 = self.class_sums[..tasks].iter().sum();
        // The few foreground anchors: what their soft target changes against background.
        for (image, workspace) in self.images[..n].iter().enumerate() {
            for positive in workspace.positives() {
                let (index, cell) = locate_index(levels, positive.anchor as usize);
                let level = &levels[index];
                let class = workspace.targets()[positive.target as usize].class as usize;
                let at = (image * level.h * level.w + cell) * nc + class;
                let weight = weights.map_or(1.0, |weights| weights[class]);
                total -= weight as f64 * level.scores[at] as f64 * positive.score as f64;
                grads[index].scores[at] -= coefficient * weight * positive.score;
            }
        }
        total
    }

    /// Unscaled sums of the box and third term; writes the box gradients.
    fn box_term(
        &mut self,
        levels: &[HeadLevel<'_>],
        grads: &mut [HeadLevelGrad<'_>],
        n: usize,
        to_total: f64,
    ) -> (f64, f64) {
        let reg_max = self.config.reg_max;
        let gains = (
            (to_total * self.config.gain_box as f64) as f32,
            (to_total * self.config.gain_dfl as f64) as f32,
        );
        let input = [levels[0].w * levels[0].stride, levels[0].h * levels[0].stride].map(|side| side as f32);
        self.box_sums[..n].fill((0.0, 0.0));
        let mut first = 0usize;
        for (level, grad) in levels.iter().zip(grads.iter_mut()) {
            let cells = level.h * level.w;
            let width = 4 * reg_max;
            if cells == 0 {
                continue;
            }
            grad.boxes
                .par_chunks_mut(cells * width)
                .zip(level.boxes.par_chunks(cells * width))
                .zip(&self.images[..n])
                .zip(&mut self.box_sums[..n])
                .for_each(|(((gradient, logits), workspace), sums)| {
                    gradient.fill(0.0);
                    let positives = workspace.positives();
                    let start = positives.partition_point(|p| (p.anchor as usize) < first);
                    let end = positives.partition_point(|p| (p.anchor as usize) < first + cells);
                    for positive in &positives[start..end] {
                        let cell = positive.anchor as usize - first;
                        let foreground = Foreground {
                            point: [(cell % level.w) as f32 + 0.5, (cell / level.w) as f32 + 0.5],
                            target: workspace.targets()[positive.target as usize]
                                .xyxy
                                .map(|v| v / level.stride as f32),
                            score: positive.score,
                            stride: level.stride as f32,
                            input,
                        };
                        let at = cell * width;
                        let (box_, third) = foreground.loss(
                            &logits[at..at + width],
                            &mut gradient[at..at + width],
                            reg_max,
                            gains,
                        );
                        sums.0 += box_ as f64;
                        sums.1 += third as f64;
                    }
                });
            first += cells;
        }
        self.box_sums[..n].iter().fold((0.0, 0.0), |total, sums| (total.0 + sums.0, total.1 + sums.1))
    }
}

fn locate_index(levels: &[HeadLevel<'_>], anchor: usize) -> (usize, usize) {
    let mut rest = anchor;
    for (index, level) in levels.iter().enumerate() {
        if rest < level.h * level.w {
            return (index, rest);
        }
        rest -= level.h * level.w;
    }
    unreachable!("anchor {anchor} lies beyond the last level")
}

#[inline]
fn locate<'a, 'b>(levels: &'a [HeadLevel<'b>], anchor: usize) -> (&'a HeadLevel<'b>, usize) {
    let (index, cell) = locate_index(levels, anchor);
    (&levels[index], cell)
}

/// One foreground anchor, grid units.
struct Foreground {
    point: [f32; 2],
    target: [f32; 4],
    score: f32,
    stride: f32,
    /// Width and height of the network input, pixels.
    input: [f32; 2],
}

impl Foreground {
    /// Weighted box and third loss of the anchor; writes its gradient times the gains `(box, third)`.
    fn loss(&self, logits: &[f32], gradient: &mut [f32], reg_max: usize, gains: (f32, f32)) -> (f32, f32) {
        let mut probabilities = [0.0f32; 4 * dfl::BINS_MAX];
        let mut log_denominators = [0.0f32; 4];
        let distances: [f32; 4] = std::array::from_fn(|side| {
            if reg_max == 1 {
                return logits[side];
            }
            let row = side * reg_max..(side + 1) * reg_max;
            let (d, log_denominator) =
                dfl::softmax_expectation(&logits[row.clone()], &mut probabilities[row]);
            log_denominators[side] = log_denominator;
            d
        });
        let predicted = corners_of(self.point, distances);
        let (ciou, d_ciou) = iou_xyxy_gradient(IouKind::Ciou, predicted, self.target);
        let wanted = [
            self.point[0] - self.target[0],
            self.point[1] - self.target[1],
            self.target[2] - self.point[0],
            self.target[3] - self.point[1],
        ];
        let mut third = 0.0f32;
        for side in 0..4 {
            // The left and top distances are subtracted from the point.
            let sign = if side < 2 { -1.0 } else { 1.0 };
            let d_distance = -gains.0 * self.score * sign * d_ciou[side];
            if reg_max == 1 {
                let unit = self.stride / self.input[side % 2];
                let difference = (distances[side] - wanted[side]) * unit;
                third += difference.abs();
                let direction = if difference == 0.0 { 0.0 } else { difference.signum() };
                gradient[side] = d_distance + gains.1 * self.score / 4.0 * direction * unit;
                continue;
            }
            let row = side * reg_max..(side + 1) * reg_max;
            let p = &probabilities[row.clone()];
            let out = &mut gradient[row.clone()];
            for (bin, (d, p)) in out.iter_mut().zip(p).enumerate() {
                *d = d_distance * p * (bin as f32 - distances[side]);
            }
            let g = dfl::clamp_target(wanted[side], reg_max);
            third += dfl::side_loss(&logits[row], log_denominators[side], g);
            dfl::add_side_gradient(p, g, out, gains.1 * self.score / 4.0);
        }
        (self.score * (1.0 - ciou), self.score * third / 4.0)
    }
}
