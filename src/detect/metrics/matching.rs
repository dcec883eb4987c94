//! Which detections of an image are true positives at which IoU threshold.

use crate::detect::boxes::box_iou;
use crate::detect::nms::Detection;

/// Number of IoU thresholds.
pub const THRESHOLD_COUNT: usize = 10;

/// IoU thresholds 0.50, 0.55, ..., 0.95.
pub const IOU_THRESHOLDS: [f32; THRESHOLD_COUNT] = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95];

/// A labelled box of an image, in the same pixels as the detections.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LabelledBox {
    /// Corners in pixels.
    pub xyxy: [f32; 4],
    /// Class index.
    pub class: u32,
}

/// Bit `t` set: true positive at `IOU_THRESHOLDS[t]`.
pub type TruePositives = u16;

/// Matches the detections of one image, given in descending score order, with its targets.
///
/// For each threshold on its own: a detection takes the unclaimed target of its class with the largest IoU (the first
/// among equals) if that IoU reaches the threshold.
pub fn match_detections(detections: &[Detection], targets: &[LabelledBox]) -> Vec<TruePositives> {
    let mut out = vec![0; detections.len()];
    let mut claimed: Vec<TruePositives> = vec![0; targets.len()];
    for (bits, detection) in out.iter_mut().zip(detections) {
        // Per threshold the best unclaimed target so far.
        let mut best = [(0.0f32, usize::MAX); THRESHOLD_COUNT];
        for (index, target) in targets.iter().enumerate() {
            if target.class != detection.class {
                continue;
            }
            let iou = box_iou(target.xyxy, detection.xyxy);
            for (t, slot) in best.iter_mut().enumerate() {
                if iou >= IOU_THRESHOLDS[t] && claimed[index] & (1 << t) == 0 && iou > slot.0 {
                    *slot = (iou, index);
                }
            }
        }
        for (t, &(_, index)) in best.iter().enumerate() {
            if index != usize::MAX {
                claimed[index] |= 1 << t;
                *bits |= 1 << t;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn boxes() -> impl Strategy<Value = Vec<([f32; 4], u32)>> {
        let one = (0i32..6, 0i32..6, 1i32..6, 1i32..6, 0u32..2);
        proptest::collection::vec(one, 0..12).prop_map(|v| {
            v.into_iter()
                .map(|(x, y, w, h, c)| ([x as f32, y as f32, (x + w) as f32, (y + h) as f32], c))
                .collect()
        })
    }

    proptest! {
        #[test]
        fn matching_is_one_to_one_and_no_tighter_threshold_matches_more(found in boxes(), wanted in boxes()) {
            let detections: Vec<_> =
                found.iter().map(|&(xyxy, class)| Detection { xyxy, class, score: 0.5 }).collect();
            let targets: Vec<_> = wanted.iter().map(|&(xyxy, class)| LabelledBox { xyxy, class }).collect();
            let bits = match_detections(&detections, &targets);
            for (t, threshold) in IOU_THRESHOLDS.into_iter().enumerate() {
                for class in 0..2 {
                    let positives =
                        (0..bits.len()).filter(|&i| bits[i] >> t & 1 == 1 && detections[i].class == class).count();
                    prop_assert!(positives <= targets.iter().filter(|target| target.class == class).count());
                }
                // A detection counts only if some target of its class is close enough.
                for (i, d) in detections.iter().enumerate().filter(|(i, _)| bits[*i] >> t & 1 == 1) {
                    let close = targets.iter().any(|target| {
                        target.class == d.class && box_iou(target.xyxy, d.xyxy) >= threshold
                    });
                    prop_assert!(close, "{i}");
                }
            }
            // A detection equal to a target of its class, alone, is always found.
            if let Some(&target) = targets.first() {
                let exact = Detection { xyxy: target.xyxy, class: target.class, score: 1.0 };
                prop_assert_eq!(match_detections(&[exact], &targets), vec![0x3ff]);
            }
        }
    }
}
