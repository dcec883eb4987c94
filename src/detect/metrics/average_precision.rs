//! Precision, recall, F1 and average precision per class.

use super::matching::{THRESHOLD_COUNT, TruePositives};

/// Points of the confidence axis of the curves.
pub const CURVE_POINTS: usize = 1000;
/// Points of the recall axis over which precision is integrated.
const RECALL_POINTS: usize = 101;
/// Width of the box filter that smooths the mean F1 curve.
const SMOOTHING_POINTS: usize = 101;
const EPS: f64 = 1e-16;

/// One detection as the curves need it.
#[derive(Clone, Copy, Debug)]
pub struct ScoredMatch {
    /// Score.
    pub score: f32,
    /// Class index.
    pub class: u32,
    /// True positive at which thresholds.
    pub true_positives: TruePositives,
}

/// Figures of one class that has targets.
#[derive(Clone, Debug)]
pub struct ClassCurves {
    /// Class index.
    pub class: u32,
    /// Targets of the class.
    pub targets: usize,
    /// Average precision per IoU threshold.
    pub ap: [f64; THRESHOLD_COUNT],
    /// Precision at IoU 0.5 over confidence 0..1 ([`CURVE_POINTS`] values).
    pub precision: Vec<f64>,
    /// Recall at IoU 0.5 over confidence.
    pub recall: Vec<f64>,
    /// F1 at IoU 0.5 over confidence.
    pub f1: Vec<f64>,
    /// Precision at IoU 0.5 over recall 0..1 ([`CURVE_POINTS`] values).
    pub precision_by_recall: Vec<f64>,
}

/// Point `index` of an even grid of `count` points over 0..1, the last exactly 1.
fn grid(index: usize, count: usize) -> f64 {
    if index + 1 == count { 1.0 } else { index as f64 * (1.0 / (count - 1) as f64) }
}

/// Linear interpolation through points with ascending abscissae, constant beyond the ends.
///
/// Where abscissae repeat, the last of them counts.
fn interpolate(x: f64, xs: &[f64], ys: &[f64]) -> f64 {
    let after = xs.partition_point(|&v| v <= x);
    if after == 0 {
        return ys[0];
    }
    let j = after - 1;
    if after == xs.len() || xs[j] == x {
        return ys[j];
    }
    (ys[j + 1] - ys[j]) / (xs[j + 1] - xs[j]) * (x - xs[j]) + ys[j]
}

/// Area under the envelope of a precision-recall curve, and the curve's points with their end points.
///
/// Precision is made falling from the right, interpolated at 101 recalls and integrated by trapezoids.
pub fn average_precision(recall: &[f64], precision: &[f64]) -> (f64, Vec<f64>, Vec<f64>) {
    let last = recall.last().copied().unwrap_or(1.0);
    let xs: Vec<f64> = [0.0].into_iter().chain(recall.iter().copied()).chain([last, 1.0]).collect();
    let mut ys: Vec<f64> = [1.0].into_iter().chain(precision.iter().copied()).chain([0.0, 0.0]).collect();
    for i in (0..ys.len() - 1).rev() {
        ys[i] = ys[i].max(ys[i + 1]);
    }
    let mut area = 0.0;
    let mut previous = interpolate(0.0, &xs, &ys);
    for i in 1..RECALL_POINTS {
        let value = interpolate(grid(i, RECALL_POINTS), &xs, &ys);
        area += (grid(i, RECALL_POINTS) - grid(i - 1, RECALL_POINTS)) * (value + previous) / 2.0;
        previous = value;
    }
    (area, xs, ys)
}

/// Curves of every class that has targets, classes ascending.
///
/// `matches` in any order; equal scores keep their order. `target_counts[c]` is the number of targets of class c.
/// Recall is `TP / targets`, precision `TP / detections`; above the highest score precision counts as 1 and recall
/// as 0. A class with targets but no detection has zeros everywhere.
pub fn class_curves(matches: &[ScoredMatch], target_counts: &[usize]) -> Vec<ClassCurves> {
    let mut order: Vec<&ScoredMatch> = matches.iter().collect();
    order.sort_by(|a, b| b.score.total_cmp(&a.score));
    let mut by_class: Vec<Vec<&ScoredMatch>> = vec![Vec::new(); target_counts.len()];
    for found in order {
        if let Some(list) = by_class.get_mut(found.class as usize) {
            list.push(found);
        }
    }
    target_counts
        .iter()
        .enumerate()
        .filter(|(_, targets)| **targets > 0)
        .map(|(class, &targets)| curves_of_class(class as u32, targets, &by_class[class]))
        .collect()
}

fn curves_of_class(class: u32, targets: usize, found: &[&ScoredMatch]) -> ClassCurves {
    let zeros = || vec![0.0; CURVE_POINTS];
    let mut out = ClassCurves {
        class,
        targets,
        ap: [0.0; THRESHOLD_COUNT],
        precision: zeros(),
        recall: zeros(),
        f1: zeros(),
        precision_by_recall: zeros(),
    };
    let Some(best) = found.first() else { return out };
    // The axis is negated so that it ascends while scores fall.
    let falling: Vec<f64> = found.iter().map(|m| -(m.score as f64)).collect();
    let (mut recall, mut precision) = (vec![0.0; found.len()], vec![0.0; found.len()]);
    for t in 0..THRESHOLD_COUNT {
        let mut hits = 0.0;
        for (i, m) in found.iter().enumerate() {
            hits += f64::from(m.true_positives >> t & 1);
            recall[i] = hits / (targets as f64 + EPS);
            precision[i] = hits / (i + 1) as f64;
        }
        let (area, xs, ys) = average_precision(&recall, &precision);
        out.ap[t] = area;
        if t > 0 {
            continue;
        }
        for i in 0..CURVE_POINTS {
            let x = grid(i, CURVE_POINTS);
            let above_all = x > best.score as f64;
            out.recall[i] = if above_all { 0.0 } else { interpolate(-x, &falling, &recall) };
            out.precision[i] = if above_all { 1.0 } else { interpolate(-x, &falling, &precision) };
            out.f1[i] = 2.0 * out.precision[i] * out.recall[i] / (out.precision[i] + out.recall[i] + EPS);
            out.precision_by_recall[i] = interpolate(x, &xs, &ys);
        }
    }
    out
}

/// Index on the confidence axis where the smoothed mean F1 curve is highest (the first among equals).
pub fn best_confidence_index(curves: &[ClassCurves]) -> usize {
    if curves.is_empty() {
        return 0;
    }
    let mean: Vec<f64> = (0..CURVE_POINTS)
        .map(|i| curves.iter().map(|c| c.f1[i]).sum::<f64>() / curves.len() as f64)
        .collect();
    let half = SMOOTHING_POINTS / 2;
    let weight = 1.0 / SMOOTHING_POINTS as f64;
    let (mut best, mut best_value) = (0, f64::NEG_INFINITY);
    for i in 0..CURVE_POINTS {
        // Each window is summed afresh: windows of equal values must give equal sums, or plateaus would not tie.
        let value: f64 = (0..SMOOTHING_POINTS)
            .map(|k| mean[(i + k).saturating_sub(half).min(CURVE_POINTS - 1)] * weight)
            .sum();
        if value > best_value {
            (best, best_value) = (i, value);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perfect_detections_have_average_precision_one() {
        let found: Vec<_> = (0..4)
            .map(|i| ScoredMatch { score: 0.9 - 0.1 * i as f32, class: 0, true_positives: 0x3ff })
            .collect();
        let curves = class_curves(&found, &[4, 0]);
        assert_eq!(curves.len(), 1);
        for ap in curves[0].ap {
            assert!((ap - 0.995).abs() < 1e-9 || (ap - 1.0).abs() < 1e-9, "{ap}");
        }
        assert_eq!(curves[0].recall[0], 1.0);
        assert_eq!(curves[0].precision[0], 1.0);
        assert_eq!(curves[0].recall[CURVE_POINTS - 1], 0.0);
    }

    #[test]
    fn interpolation_follows_the_usual_convention() {
        let (xs, ys) = ([0.0, 1.0, 1.0, 2.0], [0.0, 1.0, 3.0, 5.0]);
        assert_eq!(interpolate(-1.0, &xs, &ys), 0.0);
        assert_eq!(interpolate(1.0, &xs, &ys), 3.0);
        assert_eq!(interpolate(1.5, &xs, &ys), 4.0);
        assert_eq!(interpolate(9.0, &xs, &ys), 5.0);
    }

    #[test]
    fn a_plateau_is_read_at_its_first_point() {
        let found = [ScoredMatch { score: 0.9, class: 0, true_positives: 0x3ff }];
        assert_eq!(best_confidence_index(&class_curves(&found, &[1])), 0);
    }
}
