//! Average precision and recall by the rules of the COCO evaluation, for comparison with published figures.
//!
//! Differences from [`average_precision`](super::average_precision): precision is read at the first recall that reaches
//! each of 101 points, areas are told apart, and detections are capped per image and class. No crowd regions.

use std::collections::BTreeMap;

use super::matching::{LabelledBox, THRESHOLD_COUNT};
use crate::detect::nms::Detection;

/// Caps on detections per image and class.
const DETECTION_CAPS: [usize; 3] = [1, 10, 100];
/// Area ranges in square pixels of the original image: all, small, medium, large.
const AREAS: [(f64, f64); 4] = [(0.0, 1e10), (0.0, 1024.0), (1024.0, 9216.0), (9216.0, 1e10)];

/// One image with boxes in pixels of the original image.
#[derive(Clone, Debug, Default)]
pub struct CocoImage {
    /// Detections in any order.
    pub detections: Vec<Detection>,
    /// Labelled boxes.
    pub targets: Vec<LabelledBox>,
}

/// The twelve figures of the COCO evaluation.
#[derive(Clone, Debug, PartialEq)]
pub struct CocoMetrics {
    /// AP, AP50, AP75, AP small / medium / large, AR with 1 / 10 / 100 detections, AR small / medium / large.
    /// -1 where nothing of that kind is labelled.
    pub stats: [f64; 12],
    /// AP per IoU threshold and class (all areas, 100 detections), `[10][nc]`; -1 without targets.
    pub ap_by_threshold_and_class: Vec<Vec<f64>>,
}

/// Detections of one class in one area range, over all images.
#[derive(Default)]
struct Tally {
    targets: usize,
    /// Score and, per threshold, hit / miss / ignored.
    rows: Vec<(f64, [Verdict; THRESHOLD_COUNT])>,
}

#[derive(Clone, Copy, PartialEq, Default)]
enum Verdict {
    Hit,
    #[default]
    Miss,
    Ignored,
}

/// Evaluates a set of images.
pub fn evaluate(images: &[CocoImage], nc: usize) -> CocoMetrics {
    // precision and recall by (area, cap): [threshold][class].
    let mut results = BTreeMap::new();
    for (a, area) in AREAS.iter().enumerate() {
        for (c, cap) in DETECTION_CAPS.iter().enumerate() {
            if a > 0 && c + 1 < DETECTION_CAPS.len() {
                continue;
            }
            let per_class: Vec<_> =
                (0..nc as u32).map(|class| summarise(&tally(images, class, *area, *cap))).collect();
            results.insert((a, c), per_class);
        }
    }
    let mean = |a: usize, c: usize, thresholds: std::ops::Range<usize>, precision: bool| -> f64 {
        let values: Vec<f64> = results[&(a, c)]
            .iter()
            .flat_map(|class| if precision { &class.0 } else { &class.1 }[thresholds.clone()].iter().copied())
            .filter(|v| *v >= 0.0)
            .collect();
        if values.is_empty() { -1.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
    };
    let stats = [
        mean(0, 2, 0..10, true),
        mean(0, 2, 0..1, true),
        mean(0, 2, 5..6, true),
        mean(1, 2, 0..10, true),
        mean(2, 2, 0..10, true),
        mean(3, 2, 0..10, true),
        mean(0, 0, 0..10, false),
        mean(0, 1, 0..10, false),
        mean(0, 2, 0..10, false),
        mean(1, 2, 0..10, false),
        mean(2, 2, 0..10, false),
        mean(3, 2, 0..10, false),
    ];
    let all = &results[&(0, 2)];
    let ap = (0..THRESHOLD_COUNT).map(|t| all.iter().map(|class| class.0[t]).collect()).collect();
    CocoMetrics { stats, ap_by_threshold_and_class: ap }
}

fn area(b: [f32; 4]) -> f64 {
    (b[2] as f64 - b[0] as f64) * (b[3] as f64 - b[1] as f64)
}

fn iou(a: [f32; 4], b: [f32; 4]) -> f64 {
    let (a, b) = (a.map(f64::from), b.map(f64::from));
    let w = (a[2].min(b[2]) - a[0].max(b[0])).max(0.0);
    let h = (a[3].min(b[3]) - a[1].max(b[1])).max(0.0);
    let intersection = w * h;
    let union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection;
    if intersection == 0.0 { 0.0 } else { intersection / union }
}

fn tally(images: &[CocoImage], class: u32, range: (f64, f64), cap: usize) -> Tally {
    let mut out = Tally::default();
    let outside = |b: [f32; 4]| !(range.0..=range.1).contains(&area(b));
    for image in images {
        let mut targets: Vec<&LabelledBox> = image.targets.iter().filter(|t| t.class == class).collect();
        // Targets that count stand first: a detection takes an ignored one only when no other is left.
        targets.sort_by_key(|t| outside(t.xyxy));
        let mut detections: Vec<&Detection> = image.detections.iter().filter(|d| d.class == class).collect();
        detections.sort_by(|a, b| b.score.total_cmp(&a.score));
        detections.truncate(cap);
        out.targets += targets.iter().filter(|t| !outside(t.xyxy)).count();
        let start = out.rows.len();
        out.rows.extend(detections.iter().map(|d| (d.score as f64, [Verdict::Miss; THRESHOLD_COUNT])));
        for t in 0..THRESHOLD_COUNT {
            let threshold = 0.5 + 0.05 * t as f64;
            let mut claimed = vec![false; targets.len()];
            for (d, row) in detections.iter().zip(&mut out.rows[start..]) {
                let mut best: Option<usize> = None;
                let mut best_iou = threshold.min(1.0 - 1e-10);
                for (index, target) in targets.iter().enumerate() {
                    if claimed[index] {
                        continue;
                    }
                    if best.is_some_and(|b| !outside(targets[b].xyxy)) && outside(target.xyxy) {
                        break;
                    }
                    let value = iou(d.xyxy, target.xyxy);
                    // `>=`: the last of equal targets is taken.
                    if value >= best_iou {
                        (best, best_iou) = (Some(index), value);
                    }
                }
                row.1[t] = match best {
                    Some(index) => {
                        claimed[index] = true;
                        if outside(targets[index].xyxy) { Verdict::Ignored } else { Verdict::Hit }
                    }
                    None if outside(d.xyxy) => Verdict::Ignored,
                    None => Verdict::Miss,
                };
            }
        }
    }
    out.rows.sort_by(|a, b| b.0.total_cmp(&a.0));
    out
}

/// Average precision and final recall per threshold; -1 without targets.
fn summarise(tally: &Tally) -> ([f64; THRESHOLD_COUNT], [f64; THRESHOLD_COUNT]) {
    let (mut precision, mut recall) = ([-1.0; THRESHOLD_COUNT], [-1.0; THRESHOLD_COUNT]);
    if tally.targets == 0 {
        return (precision, recall);
    }
    for t in 0..THRESHOLD_COUNT {
        let (mut hits, mut misses) = (0.0, 0.0);
        let mut points: Vec<(f64, f64)> = Vec::new();
        for (_, verdicts) in &tally.rows {
            match verdicts[t] {
                Verdict::Hit => hits += 1.0,
                Verdict::Miss => misses += 1.0,
                Verdict::Ignored => {}
            }
            let share = if hits + misses > 0.0 { hits / (hits + misses + f64::EPSILON) } else { 0.0 };
            points.push((hits / tally.targets as f64, share));
        }
        for i in (0..points.len().saturating_sub(1)).rev() {
            points[i].1 = points[i].1.max(points[i + 1].1);
        }
        recall[t] = points.last().map_or(0.0, |p| p.0);
        let at = |r: f64| points.get(points.partition_point(|p| p.0 < r)).map_or(0.0, |p| p.1);
        precision[t] = (0..=100).map(|i| at(i as f64 / 100.0)).sum::<f64>() / 101.0;
    }
    (precision, recall)
}
