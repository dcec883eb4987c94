//! Suppression and metrics against their vectors.

use boxwright::detect::metrics::Evaluator;
use boxwright::detect::metrics::average_precision::ClassCurves;
use boxwright::detect::metrics::coco::{CocoImage, evaluate};
use boxwright::detect::metrics::confusion::ConfusionMatrix;
use boxwright::detect::metrics::matching::{LabelledBox, THRESHOLD_COUNT};
use boxwright::detect::nms::{Detection, NmsArgs, nms_batch};

use crate::common::compare::assert_close_f64;
use crate::common::tolerances::{METRIC, METRIC_CURVE, NMS_BOXES_PX};
use crate::common::{Golden, assert_close, assert_exact, assert_scalar_close};

/// `(n, c, anchors)` to `(n, anchors, c)`.
pub fn anchors_first(values: &[f32], shape: &[usize]) -> Vec<f32> {
    let (n, channels, anchors) = (shape[0], shape[1], shape[2]);
    let mut out = Vec::with_capacity(values.len());
    for image in 0..n {
        for anchor in 0..anchors {
            out.extend((0..channels).map(|c| values[(image * channels + c) * anchors + anchor]));
        }
    }
    out
}

/// Checks rows, order and counts of a batch of detections.
pub fn check_detections(golden: &Golden, name: &str, found: &[Vec<Detection>]) {
    let counts: Vec<i64> = found.iter().map(|d| d.len() as i64).collect();
    assert_exact(&format!("{name}/n"), &counts, &golden.i64(&count_array(golden, name)));
    let rows =
        golden.f32(&format!("{name}{}", if golden.has(&format!("{name}.det")) { ".det" } else { "/det" }));
    let mut rows = rows.as_chunks::<6>().0.to_vec();
    let mut flat: Vec<[f32; 6]> = found
        .iter()
        .flatten()
        .map(|d| [d.xyxy[0], d.xyxy[1], d.xyxy[2], d.xyxy[3], d.score, d.class as f32])
        .collect();
    assert_eq!(flat.len(), rows.len(), "{name}: number of rows");
    // The reference sorts without keeping the order of equal scores: bring both into one order there.
    let mut first = 0;
    for count in counts {
        let image = first..first + count as usize;
        first = image.end;
        sort_ties(&mut flat[image.clone()]);
        sort_ties(&mut rows[image]);
    }
    for (i, (got, row)) in flat.iter().zip(&rows).enumerate() {
        assert_eq!(got[4..], row[4..], "{name}: score and class of row {i}");
        assert_close(&format!("{name} row {i}"), &got[..4], &row[..4], NMS_BOXES_PX);
    }
}

/// Orders rows of equal score by class and place; the scores themselves must already fall.
fn sort_ties(rows: &mut [[f32; 6]]) {
    for run in rows.chunk_by_mut(|a, b| a[4] == b[4]) {
        run.sort_by(|a, b| a[5].total_cmp(&b[5]).then(a[0].total_cmp(&b[0])).then(a[1].total_cmp(&b[1])));
    }
}

fn count_array(golden: &Golden, name: &str) -> String {
    let dotted = format!("{name}.n");
    if golden.has(&dotted) { dotted } else { format!("{name}/n") }
}

#[test]
fn golden_nms() {
    let golden = Golden::open("nms");
    let shape = golden.shape("pred");
    let (n, nc) = (shape[0], shape[1] - 4);
    let predictions = anchors_first(&golden.f32("pred"), &shape);
    let cases = golden.meta("cases").as_object().expect("cases by name");
    for name in golden.names() {
        let case = name.split('/').next().expect("a first part");
        assert!(case == "pred" || cases.contains_key(case), "no case reads {name}");
    }
    for (case, parameters) in cases {
        let number =
            |key: &str, default: f64| parameters.get(key).and_then(|v| v.as_f64()).unwrap_or(default);
        let flag = |key: &str| parameters.get(key).and_then(|v| v.as_bool()).unwrap_or(false);
        let classes = parameters
            .get("classes")
            .and_then(|v| v.as_array())
            .map(|list| list.iter().map(|c| c.as_u64().expect("a class") as usize).collect::<Vec<_>>());
        let args = NmsArgs {
            conf: number("conf_thres", 0.25) as f32,
            iou: number("iou_thres", 0.45),
            max_det: number("max_det", 300.0) as usize,
            multi_label: flag("multi_label"),
            agnostic: flag("agnostic"),
            classes,
            max_nms: number("max_nms", 30_000.0) as usize,
        };
        check_detections(&golden, case, &nms_batch(&predictions, n, nc, &args));
    }
}

/// Detections and targets per image.
fn images(golden: &Golden) -> Vec<CocoImage> {
    let count = golden.meta_usize("nimg");
    let mut images = vec![CocoImage::default(); count];
    for row in golden.f32("gt").as_chunks::<6>().0 {
        images[row[0] as usize]
            .targets
            .push(LabelledBox { xyxy: [row[2], row[3], row[4], row[5]], class: row[1] as u32 });
    }
    for row in golden.f32("det").as_chunks::<7>().0 {
        let detection =
            Detection { xyxy: [row[3], row[4], row[5], row[6]], score: row[2], class: row[1] as u32 };
        images[row[0] as usize].detections.push(detection);
    }
    images
}

#[test]
fn golden_map_matching_curves_and_means() {
    let golden = Golden::open("map");
    let nc = golden.meta_usize("nc");
    let mut evaluator = Evaluator::new(nc, 0.001);
    let mut bits = Vec::new();
    for image in images(&golden) {
        let (figures, matches) = evaluator.add_image(&image.detections, &image.targets);
        assert_eq!(figures.true_positives + figures.false_positives, image.detections.len());
        assert_eq!(figures.true_positives + figures.false_negatives, image.targets.len());
        for m in matches {
            bits.extend((0..THRESHOLD_COUNT).map(|t| (m >> t & 1) as u8));
        }
    }
    assert_exact("tp", &bits, &golden.u8("tp"));
    let metrics = evaluator.finish();
    let classes = &metrics.classes;
    let indices: Vec<i64> = classes.iter().map(|c| c.class as i64).collect();
    assert_exact("ul/classes", &indices, &golden.i64("ul/classes"));
    let check = |name: &str, got: Vec<f64>| assert_close_f64(name, &got, &golden.f64(name), METRIC);
    check("ul/p", classes.iter().map(|c| c.precision).collect());
    check("ul/r", classes.iter().map(|c| c.recall).collect());
    check("ul/f1", classes.iter().map(|c| c.f1).collect());
    check("ul/ap", classes.iter().flat_map(|c| c.ap).collect());
    check("ul/mean", vec![metrics.precision, metrics.recall, metrics.map50, metrics.map50_95]);
    assert_scalar_close("ul/fitness", metrics.fitness, golden.scalar("ul/fitness"), METRIC);
    assert_scalar_close("ul/map75", metrics.map75, golden.scalar("ul/map75"), METRIC);
    let curve = |name: &str, of: fn(&ClassCurves) -> &Vec<f64>| {
        let got: Vec<f32> = metrics.curves.iter().flat_map(|c| of(c).iter().map(|v| *v as f32)).collect();
        assert_close(name, &got, &golden.f32(name), METRIC_CURVE);
    };
    curve("ul/p_curve", |c| &c.precision);
    curve("ul/r_curve", |c| &c.recall);
    curve("ul/f1_curve", |c| &c.f1);
    let counts = |values: &[usize]| values.iter().map(|v| *v as i64).collect::<Vec<_>>();
    assert_exact("ul/nt_per_class", &counts(evaluator.target_counts()), &golden.i64("ul/nt_per_class"));
    assert_exact("ul/nt_per_image", &counts(evaluator.image_counts()), &golden.i64("ul/nt_per_image"));
}

#[test]
fn golden_map_confusion_matrices() {
    let golden = Golden::open("map");
    let nc = golden.meta_usize("nc");
    let names = golden.with_prefix("ul/confusion_");
    assert!(!names.is_empty());
    for name in names {
        let conf: f32 = name["ul/confusion_".len()..].parse().expect("a threshold in the name");
        let mut matrix = ConfusionMatrix::new(nc, conf);
        for image in images(&golden) {
            matrix.add(&image.detections, &image.targets);
        }
        let counts: Vec<i64> = matrix.counts().iter().map(|c| *c as i64).collect();
        assert_exact(&name, &counts, &golden.i64(&name));
    }
}

#[test]
fn golden_map_coco_rules() {
    let golden = Golden::open("map");
    let metrics = evaluate(&images(&golden), golden.meta_usize("nc"));
    assert_close_f64("coco/stats", &metrics.stats, &golden.f64("coco/stats"), METRIC);
    let ap = metrics.ap_by_threshold_and_class.concat();
    assert_close_f64("coco/ap_iou_class", &ap, &golden.f64("coco/ap_iou_class"), METRIC);
}
