//! Non-maximum suppression of anchor-point predictions.

use rayon::prelude::*;

use super::boxes::cxcywh_to_xyxy;

/// Boxes of different classes are moved this far apart, so that one pass serves all classes.
const CLASS_OFFSET_PX: f32 = 7680.0;

/// Parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct NmsArgs {
    /// A candidate's probability must lie above this.
    pub conf: f32,
    /// A box is dropped when its IoU with a better one of its class lies above this.
    pub iou: f64,
    /// Boxes kept per image.
    pub max_det: usize,
    /// Every class above `conf` makes a candidate; otherwise only an anchor's best class.
    pub multi_label: bool,
    /// Boxes suppress each other across classes.
    pub agnostic: bool,
    /// Only these classes.
    pub classes: Option<Vec<usize>>,
    /// Best candidates that are considered at all.
    pub max_nms: usize,
}

impl NmsArgs {
    /// What validation uses: threshold 0.001, IoU 0.7, several labels per anchor, 300 boxes.
    pub fn validation() -> NmsArgs {
        NmsArgs {
            conf: 0.001,
            iou: 0.7,
            max_det: 300,
            multi_label: true,
            agnostic: false,
            classes: None,
            max_nms: 30_000,
        }
    }

    /// What prediction uses: threshold 0.25, IoU 0.7, one label per anchor, 300 boxes.
    pub fn prediction() -> NmsArgs {
        NmsArgs { conf: 0.25, multi_label: false, ..NmsArgs::validation() }
    }
}

/// One detected object.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Detection {
    /// Corners in pixels of the network input.
    pub xyxy: [f32; 4],
    /// Class probability.
    pub score: f32,
    /// Class index.
    pub class: u32,
}

/// A box that passed the score threshold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate(Detection);

impl Candidate {
    /// Appends the candidates of one anchor; `cxcywh` is asked only if there are any.
    pub(super) fn collect(
        probabilities: &[f32],
        cxcywh: impl FnOnce() -> [f32; 4],
        args: &NmsArgs,
        out: &mut Vec<Candidate>,
    ) {
        let wanted = |class: usize| args.classes.as_ref().is_none_or(|classes| classes.contains(&class));
        let (mut best, mut best_score) = (0usize, f32::NEG_INFINITY);
        for (class, &p) in probabilities.iter().enumerate() {
            if p > best_score {
                (best, best_score) = (class, p);
            }
        }
        // (Also false when every probability is NaN.)
        if best_score <= args.conf || best_score == f32::NEG_INFINITY {
            return;
        }
        let xyxy = cxcywh_to_xyxy(cxcywh());
        let candidate = |class: usize, score: f32| Candidate(Detection { xyxy, score, class: class as u32 });
        if args.multi_label && probabilities.len() > 1 {
            for (class, &p) in probabilities.iter().enumerate() {
                if p > args.conf && wanted(class) {
                    out.push(candidate(class, p));
                }
            }
        } else if wanted(best) {
            out.push(candidate(best, best_score));
        }
    }
}

/// Suppresses the decoded predictions of one image; the survivors come in descending score order.
///
/// 1. keep anchors whose best probability lies above `conf`, one candidate per class above it or for the best;
/// 2. of more than `max_nms` candidates keep the best; 3. greedily, by descending score (earlier candidate first
///    on ties), drop boxes with IoU above `iou` to a kept box of their class; 4. stop at `max_det`.
///
/// # Shapes
/// `predictions` is `[anchors][4 + nc]`: cxcywh in pixels, then probabilities.
pub fn nms(predictions: &[f32], nc: usize, args: &NmsArgs) -> Vec<Detection> {
    let mut candidates = Vec::new();
    for row in predictions.chunks_exact(4 + nc) {
        Candidate::collect(&row[4..], || [row[0], row[1], row[2], row[3]], args, &mut candidates);
    }
    suppress(candidates, nc, args)
}

/// [`nms`] for a batch, in parallel: `predictions` is `[n][anchors][4 + nc]`.
pub fn nms_batch(predictions: &[f32], n: usize, nc: usize, args: &NmsArgs) -> Vec<Vec<Detection>> {
    if n == 0 {
        return Vec::new();
    }
    let per_image = predictions.len() / n;
    (0..n)
        .into_par_iter()
        .map(|image| nms(&predictions[image * per_image..][..per_image], nc, args))
        .collect()
}

/// A kept box as the test reads it: shifted corners and area.
#[derive(Clone, Copy)]
struct Kept {
    xyxy: [f32; 4],
    area: f32,
}

/// The greedy pass over collected candidates.
pub(super) fn suppress(candidates: Vec<Candidate>, nc: usize, args: &NmsArgs) -> Vec<Detection> {
    // Scores are positive, so their bits order like the numbers; inverted, ascending means best first.
    let mut order: Vec<u64> = candidates
        .iter()
        .enumerate()
        .map(|(index, candidate)| ((!candidate.0.score.to_bits() as u64) << 32) | index as u64)
        .collect();
    if order.len() > args.max_nms && args.max_nms > 0 {
        order.select_nth_unstable(args.max_nms - 1);
    }
    order.truncate(args.max_nms);
    order.sort_unstable();
    // Shifted boxes of different classes cannot meet unless a box is wider than the shift: then compare all.
    let apart = !args.agnostic && extent(&candidates) < CLASS_OFFSET_PX - 8.0;
    let mut kept: Vec<Vec<Kept>> = vec![Vec::new(); if apart { nc } else { 1 }];
    let mut out = Vec::with_capacity(args.max_det.min(order.len()));
    for key in order {
        if out.len() >= args.max_det {
            break;
        }
        let detection = candidates[(key & u32::MAX as u64) as usize].0;
        // The shift rounds, and that rounding is part of the result for high class indices.
        let shift = if args.agnostic { 0.0 } else { detection.class as f32 * CLASS_OFFSET_PX };
        let b = detection.xyxy.map(|v| v + shift);
        let area = (b[2] - b[0]) * (b[3] - b[1]);
        let rivals = &mut kept[if apart { detection.class as usize } else { 0 }];
        if rivals.iter().any(|rival| overlap(rival, b, area) as f64 > args.iou) {
            continue;
        }
        rivals.push(Kept { xyxy: b, area });
        out.push(detection);
    }
    out
}

/// Intersection over union without a guard in the denominator.
#[inline(always)]
fn overlap(kept: &Kept, b: [f32; 4], area: f32) -> f32 {
    let k = kept.xyxy;
    let w = (k[2].min(b[2]) - k[0].max(b[0])).max(0.0);
    let h = (k[3].min(b[3]) - k[1].max(b[1])).max(0.0);
    let intersection = w * h;
    intersection / (kept.area + area - intersection)
}

/// Largest difference between any two coordinates.
fn extent(candidates: &[Candidate]) -> f32 {
    let (mut low, mut high) = (f32::INFINITY, f32::NEG_INFINITY);
    for v in candidates.iter().flat_map(|candidate| candidate.0.xyxy) {
        if !v.is_finite() {
            return f32::INFINITY;
        }
        low = low.min(v);
        high = high.max(v);
    }
    if candidates.is_empty() { 0.0 } else { high - low }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rows(nc: usize) -> impl Strategy<Value = Vec<f32>> {
        let anchor = (
            0.0f32..640.0,
            0.0f32..480.0,
            1.0f32..200.0,
            1.0f32..200.0,
            proptest::collection::vec(0.0f32..1.0, nc),
        );
        proptest::collection::vec(anchor, 0..60).prop_map(|anchors| {
            let mut out = Vec::new();
            for (cx, cy, w, h, scores) in anchors {
                out.extend([cx, cy, w, h]);
                // A coarse grid makes ties.
                out.extend(scores.iter().map(|s| (s * 20.0).round() / 20.0));
            }
            out
        })
    }

    /// The definition: shift, sort stably, test against every kept box.
    fn naive(predictions: &[f32], nc: usize, args: &NmsArgs) -> Vec<Detection> {
        let mut all: Vec<Detection> = Vec::new();
        for row in predictions.chunks_exact(4 + nc) {
            let xyxy = cxcywh_to_xyxy([row[0], row[1], row[2], row[3]]);
            let best = (0..nc).fold(0, |b, c| if row[4 + c] > row[4 + b] { c } else { b });
            for class in 0..nc {
                let chosen = if args.multi_label { true } else { class == best };
                if chosen && row[4 + class] > args.conf {
                    all.push(Detection { xyxy, score: row[4 + class], class: class as u32 });
                }
            }
        }
        all.sort_by(|a, b| b.score.total_cmp(&a.score));
        all.truncate(args.max_nms);
        let shifted = |d: &Detection| {
            let xyxy = d.xyxy.map(|v| v + if args.agnostic { 0.0 } else { d.class as f32 * CLASS_OFFSET_PX });
            Kept { xyxy, area: (xyxy[2] - xyxy[0]) * (xyxy[3] - xyxy[1]) }
        };
        let mut kept: Vec<Detection> = Vec::new();
        for d in all {
            let box_ = shifted(&d);
            if !kept.iter().any(|k| overlap(&shifted(k), box_.xyxy, box_.area) as f64 > args.iou) {
                kept.push(d);
            }
        }
        kept.truncate(args.max_det);
        kept
    }

    proptest! {
        #[test]
        fn suppression_equals_its_definition_and_is_idempotent(
            predictions in rows(3),
            multi_label in any::<bool>(),
            agnostic in any::<bool>(),
            huge in any::<bool>(),
            max_det in 1usize..80,
            max_nms in 1usize..200,
        ) {
            let mut predictions = predictions;
            if huge && predictions.len() >= 7 {
                predictions[2] = 20_000.0;
                predictions[3] = 20_000.0;
            }
            let args = NmsArgs { conf: 0.3, iou: 0.5, max_det, multi_label, agnostic, classes: None, max_nms };
            let found = nms(&predictions, 3, &args);
            prop_assert_eq!(&found, &naive(&predictions, 3, &args));
            prop_assert!(found.is_sorted_by(|a, b| a.score >= b.score));
            prop_assert!(found.len() <= max_det);
            prop_assert!(found.iter().all(|d| d.score > 0.3));
            let again = suppress(found.iter().map(|d| Candidate(*d)).collect(), 3, &args);
            if max_nms >= found.len() {
                prop_assert_eq!(again, found);
            }
        }

        #[test]
        fn class_filter_gives_only_those_classes(predictions in rows(4)) {
            let all = nms(&predictions, 4, &NmsArgs { max_det: 10_000, ..NmsArgs::validation() });
            let args = NmsArgs { max_det: 10_000, classes: Some(vec![1, 3]), ..NmsArgs::validation() };
            let some = nms(&predictions, 4, &args);
            let expected: Vec<_> = all.into_iter().filter(|d| d.class % 2 == 1).collect();
            prop_assert_eq!(some, expected);
        }
    }

    #[test]
    fn nothing_in_gives_nothing_out() {
        assert!(nms(&[], 3, &NmsArgs::validation()).is_empty());
        assert!(nms(&[1.0, 1.0, 2.0, 2.0, f32::NAN], 1, &NmsArgs::prediction()).is_empty());
        assert!(nms_batch(&[], 0, 3, &NmsArgs::validation()).is_empty());
    }
}
