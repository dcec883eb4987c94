//! How good a detector is: matching, precision, recall, average precision, confusion.
//!
//! [`Evaluator`] takes one image after another and [`Evaluator::finish`] gives the figures of the whole set.

pub mod average_precision;
pub mod coco;
pub mod confusion;
pub mod matching;

use average_precision::{ClassCurves, ScoredMatch, best_confidence_index, class_curves};
use confusion::ConfusionMatrix;
use matching::{LabelledBox, THRESHOLD_COUNT, TruePositives, match_detections};

use super::nms::Detection;

/// Figures of one image at IoU 0.5.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ImageFigures {
    /// Detections that are true positives.
    pub true_positives: usize,
    /// Detections that are not.
    pub false_positives: usize,
    /// Targets that were not found.
    pub false_negatives: usize,
    /// Precision; 1 for an image without targets and detections.
    pub precision: f64,
    /// Recall; 1 for an image without targets and detections.
    pub recall: f64,
    /// F1; 1 for an image without targets and detections.
    pub f1: f64,
}

/// Figures of one class that has targets.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassMetrics {
    /// Class index.
    pub class: u32,
    /// Targets of the class.
    pub targets: usize,
    /// Images with the class.
    pub images: usize,
    /// Precision at the common best confidence, IoU 0.5.
    pub precision: f64,
    /// Recall at the common best confidence, IoU 0.5.
    pub recall: f64,
    /// F1 at the common best confidence, IoU 0.5.
    pub f1: f64,
    /// Average precision per IoU threshold 0.50, 0.55, ..., 0.95.
    pub ap: [f64; THRESHOLD_COUNT],
}

impl ClassMetrics {
    /// Average precision at IoU 0.5.
    pub fn ap50(&self) -> f64 {
        self.ap[0]
    }

    /// Mean average precision over the ten thresholds.
    pub fn ap50_95(&self) -> f64 {
        self.ap.iter().sum::<f64>() / THRESHOLD_COUNT as f64
    }
}

/// Figures of a whole set.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Mean precision over the classes that have targets.
    pub precision: f64,
    /// Mean recall.
    pub recall: f64,
    /// Mean average precision at IoU 0.5.
    pub map50: f64,
    /// Mean average precision at IoU 0.75.
    pub map75: f64,
    /// Mean average precision over the ten thresholds.
    pub map50_95: f64,
    /// What decides which checkpoint is best: `map50_95`.
    pub fitness: f64,
    /// Confidence at which precision and recall are read, 0..1.
    pub best_confidence: f64,
    /// Per-class average precision (ten thresholds) for all `nc` classes; those without targets get the mean.
    pub maps: Vec<f64>,
    /// The classes that have targets, ascending.
    pub classes: Vec<ClassMetrics>,
    /// Their curves, in the same order.
    pub curves: Vec<ClassCurves>,
    /// Confusion matrix.
    pub confusion: ConfusionMatrix,
    /// Images seen.
    pub images: usize,
    /// Targets seen.
    pub targets: usize,
}

/// Collects the detections and targets of a set, image by image.
#[derive(Clone, Debug)]
pub struct Evaluator {
    matches: Vec<ScoredMatch>,
    target_counts: Vec<usize>,
    image_counts: Vec<usize>,
    confusion: ConfusionMatrix,
    images: usize,
}

impl Evaluator {
    /// An empty evaluator for `nc` classes; the confusion matrix counts scores above `confusion_conf` (the validation
    /// threshold).
    pub fn new(nc: usize, confusion_conf: f32) -> Evaluator {
        Evaluator {
            matches: Vec::new(),
            target_counts: vec![0; nc],
            image_counts: vec![0; nc],
            confusion: ConfusionMatrix::new(nc, confusion_conf),
            images: 0,
        }
    }

    /// Adds one image: detections in descending score order (as suppression gives them) and targets, both in the
    /// same pixels, classes below `nc`. Also returns which detections were true positives at which threshold.
    pub fn add_image(
        &mut self,
        detections: &[Detection],
        targets: &[LabelledBox],
    ) -> (ImageFigures, Vec<TruePositives>) {
        let bits = match_detections(detections, targets);
        self.matches.extend(detections.iter().zip(&bits).map(|(d, &true_positives)| ScoredMatch {
            score: d.score,
            class: d.class,
            true_positives,
        }));
        for (index, target) in targets.iter().enumerate() {
            let class = target.class as usize;
            self.target_counts[class] += 1;
            if targets[..index].iter().all(|earlier| earlier.class != target.class) {
                self.image_counts[class] += 1;
            }
        }
        self.confusion.add(detections, targets);
        self.images += 1;
        let hits = bits.iter().filter(|bits| **bits & 1 == 1).count();
        (image_figures(hits, detections.len(), targets.len()), bits)
    }

    /// Targets per class so far.
    pub fn target_counts(&self) -> &[usize] {
        &self.target_counts
    }

    /// Images per class so far.
    pub fn image_counts(&self) -> &[usize] {
        &self.image_counts
    }

    /// The figures of everything added so far; zeros when no class has targets.
    pub fn finish(&self) -> Metrics {
        let curves = class_curves(&self.matches, &self.target_counts);
        let at = best_confidence_index(&curves);
        let classes: Vec<ClassMetrics> = curves
            .iter()
            .map(|c| ClassMetrics {
                class: c.class,
                targets: c.targets,
                images: self.image_counts[c.class as usize],
                precision: c.precision[at],
                recall: c.recall[at],
                f1: c.f1[at],
                ap: c.ap,
            })
            .collect();
        let mean = |value: &dyn Fn(&ClassMetrics) -> f64| match classes.len() {
            0 => 0.0,
            count => classes.iter().map(value).sum::<f64>() / count as f64,
        };
        let map50_95 = mean(&ClassMetrics::ap50_95);
        let mut maps = vec![map50_95; self.target_counts.len()];
        for class in &classes {
            maps[class.class as usize] = class.ap50_95();
        }
        Metrics {
            precision: mean(&|c| c.precision),
            recall: mean(&|c| c.recall),
            map50: mean(&|c| c.ap[0]),
            map75: mean(&|c| c.ap[5]),
            map50_95,
            fitness: map50_95,
            best_confidence: at as f64 / (average_precision::CURVE_POINTS - 1) as f64,
            maps,
            classes,
            curves,
            confusion: self.confusion.clone(),
            images: self.images,
            targets: self.target_counts.iter().sum(),
        }
    }
}

fn image_figures(hits: usize, detections: usize, targets: usize) -> ImageFigures {
    let ratio = |part: usize, whole: usize| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
    let (precision, recall) = if detections == 0 && targets == 0 {
        (1.0, 1.0)
    } else {
        (ratio(hits, detections), ratio(hits, targets))
    };
    let f1 = if precision + recall > 0.0 { 2.0 * precision * recall / (precision + recall) } else { 0.0 };
    ImageFigures {
        true_positives: hits,
        false_positives: detections - hits,
        false_negatives: targets - hits,
        precision,
        recall,
        f1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_to_find_gives_zeros_and_an_empty_image_counts_as_right() {
        let mut evaluator = Evaluator::new(3, 0.001);
        let (figures, _) = evaluator.add_image(&[], &[]);
        assert_eq!((figures.precision, figures.recall, figures.f1), (1.0, 1.0, 1.0));
        let stray = Detection { xyxy: [0.0, 0.0, 1.0, 1.0], score: 0.5, class: 1 };
        evaluator.add_image(&[stray], &[]);
        let metrics = evaluator.finish();
        assert_eq!((metrics.map50, metrics.map50_95, metrics.fitness), (0.0, 0.0, 0.0));
        assert_eq!(metrics.maps, vec![0.0; 3]);
        assert_eq!((metrics.images, metrics.targets), (2, 0));
        assert_eq!(metrics.confusion.count(1, 3), 1);
    }

    #[test]
    fn a_perfect_detector_scores_near_one() {
        let mut evaluator = Evaluator::new(2, 0.001);
        for i in 0..8 {
            let x = 20.0 * i as f32;
            let target = LabelledBox { xyxy: [x, 0.0, x + 10.0, 10.0], class: i % 2 };
            let found = Detection { xyxy: target.xyxy, score: 0.5 + 0.05 * i as f32, class: target.class };
            let (figures, bits) = evaluator.add_image(&[found], &[target]);
            assert_eq!((figures.true_positives, figures.f1), (1, 1.0));
            assert_eq!(bits, vec![0x3ff]);
        }
        let metrics = evaluator.finish();
        assert!(metrics.map50_95 > 0.99 && metrics.precision > 0.999 && metrics.recall > 0.999);
        assert_eq!(metrics.classes[1].images, 4);
    }
}
