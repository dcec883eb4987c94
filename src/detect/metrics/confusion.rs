//! The confusion matrix of a detector.

use super::matching::LabelledBox;
use crate::detect::boxes::box_iou;
use crate::detect::nms::Detection;

/// Boxes must overlap more than this to be counted as the same object.
const IOU_THRESHOLD: f32 = 0.45;

/// Counts by predicted class (row) and true class (column); the last of each is background.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfusionMatrix {
    nc: usize,
    conf: f32,
    counts: Vec<u64>,
}

impl ConfusionMatrix {
    /// An empty matrix for `nc` classes; detections count when their score lies above `conf`.
    pub fn new(nc: usize, conf: f32) -> ConfusionMatrix {
        ConfusionMatrix { nc, conf, counts: vec![0; (nc + 1) * (nc + 1)] }
    }

    /// Number of classes, background excluded.
    pub fn nc(&self) -> usize {
        self.nc
    }

    /// Count of objects of class `truth` that were predicted as `predicted`; index `nc` is background.
    pub fn count(&self, predicted: usize, truth: usize) -> u64 {
        self.counts[predicted * (self.nc + 1) + truth]
    }

    /// All counts, row-major, row = predicted.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// The counts with each column divided by its sum (plus 1e-9), row-major.
    pub fn normalised(&self) -> Vec<f64> {
        let side = self.nc + 1;
        let column = |c: usize| (0..side).map(|r| self.counts[r * side + c] as f64).sum::<f64>() + 1e-9;
        let sums: Vec<f64> = (0..side).map(column).collect();
        self.counts.iter().enumerate().map(|(i, count)| *count as f64 / sums[i % side]).collect()
    }

    /// Adds one image. By descending score each detection takes the remaining target it overlaps most, whatever its
    /// class, if by more than 0.45; the rest on both sides pair with background.
    pub fn add(&mut self, detections: &[Detection], targets: &[LabelledBox]) {
        let (side, background) = (self.nc + 1, self.nc);
        let mut order: Vec<&Detection> = detections.iter().filter(|d| d.score > self.conf).collect();
        order.sort_by(|a, b| b.score.total_cmp(&a.score));
        let mut free = vec![true; targets.len()];
        for detection in order {
            let (mut best, mut best_iou) = (None, IOU_THRESHOLD);
            for (index, target) in targets.iter().enumerate().filter(|(index, _)| free[*index]) {
                let iou = box_iou(target.xyxy, detection.xyxy);
                if iou > best_iou {
                    (best, best_iou) = (Some(index), iou);
                }
            }
            let truth = match best {
                Some(index) => {
                    free[index] = false;
                    targets[index].class as usize
                }
                None => background,
            };
            self.counts[detection.class as usize * side + truth] += 1;
        }
        for (target, _) in targets.iter().zip(&free).filter(|(_, free)| **free) {
            self.counts[background * side + target.class as usize] += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_object_and_every_detection_is_counted_once() {
        let mut matrix = ConfusionMatrix::new(2, 0.25);
        let at = |x: f32, class: u32| LabelledBox { xyxy: [x, 0.0, x + 10.0, 10.0], class };
        let found =
            |x: f32, class: u32, score: f32| Detection { xyxy: [x, 0.0, x + 10.0, 10.0], class, score };
        matrix.add(
            &[found(0.0, 0, 0.9), found(100.0, 1, 0.8), found(300.0, 1, 0.7), found(0.0, 1, 0.2)],
            &[at(0.0, 0), at(101.0, 0), at(200.0, 1)],
        );
        assert_eq!(matrix.count(0, 0), 1);
        assert_eq!(matrix.count(1, 0), 1);
        assert_eq!(matrix.count(1, 2), 1);
        assert_eq!(matrix.count(2, 1), 1);
        assert_eq!(matrix.counts().iter().sum::<u64>(), 4);
        let normalised = matrix.normalised();
        assert!((normalised[0] - 0.5).abs() < 1e-6 && (normalised[3] - 0.5).abs() < 1e-6);
    }
}
