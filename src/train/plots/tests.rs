use std::path::Path;

use proptest::prelude::*;

use super::axes::{Range, number, ticks};
use super::*;
use crate::data::draw::DrawBox;

fn size_of(path: &Path) -> (u32, u32) {
    image::open(path).expect("the plot decodes").to_rgb8().dimensions()
}

/// Pixels that are neither white nor grey: there is a curve in the picture.
fn coloured(path: &Path) -> usize {
    let image = image::open(path).expect("the plot decodes").to_rgb8();
    image.pixels().filter(|p| p.0.iter().max().unwrap() - p.0.iter().min().unwrap() > 90).count()
}

fn results_of(epochs: usize, value: impl Fn(usize) -> f64) -> ResultsPlot {
    let names = ["train/box_loss", "metrics/mAP50(B)", "metrics/recall(B)", "val/box_loss", "lr/pg0"];
    let column = |n: &&str| ResultsColumn { name: n.to_string(), values: (0..epochs).map(&value).collect() };
    ResultsPlot {
        title: "run".into(),
        epochs: (1..=epochs).map(|e| e as f64).collect(),
        columns: names.iter().map(column).collect(),
    }
}

#[test]
fn results_are_drawn_for_none_one_and_many_epochs_and_for_gaps() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.png");
    results(&ResultsPlot::default(), &path).unwrap();
    assert!(size_of(&path).0 > 100);
    for epochs in [0, 1, 2, 300] {
        results(&results_of(epochs, |e| 1.0 / (e + 1) as f64), &path).unwrap();
        assert_eq!(coloured(&path) > 50, epochs > 0, "{epochs} epochs");
    }
    results(&results_of(40, |_| f64::NAN), &path).unwrap();
    assert_eq!(coloured(&path), 0);
    results(&results_of(40, |e| [1.0, f64::NAN, f64::INFINITY, 1e30][e % 4]), &path).unwrap();
    results(&results_of(3, |_| 0.0), &path).unwrap();
}

#[test]
fn results_are_read_back_from_their_table() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.csv");
    std::fs::write(&path, "epoch,time,train/box_loss\n1,2.5,1.25\n2,5,nan\n").unwrap();
    let plot = ResultsPlot::from_csv(&path, "t").unwrap();
    assert_eq!(plot.epochs, [1.0, 2.0]);
    assert_eq!(plot.columns[1].name, "train/box_loss");
    assert_eq!(plot.columns[1].values[0], 1.25);
    assert!(plot.columns[1].values[1].is_nan());
    std::fs::write(&path, "epoch,time\n1,2\n3\n").unwrap();
    let error = ResultsPlot::from_csv(&path, "t").unwrap_err().to_string();
    assert!(error.contains("line 3: expected 2 fields, got 1"), "{error}");
}

fn class(index: usize, points: usize) -> ClassCurves {
    let ramp: Vec<f32> = (0..points).map(|i| i as f32 / points as f32).collect();
    ClassCurves {
        class: index,
        name: format!("class {index}"),
        ap50: 0.5,
        precision_at_recall: ramp.iter().rev().copied().collect(),
        precision: ramp.clone(),
        recall: ramp.iter().rev().copied().collect(),
        f1: ramp.iter().map(|v| v * (1.0 - v)).collect(),
    }
}

#[test]
fn curves_are_drawn_for_no_class_few_and_many() {
    let dir = tempfile::tempdir().unwrap();
    for classes in [0, 1, 20, 21, 80] {
        let plot = CurvesPlot {
            classes: (0..classes).map(|c| class(c, 1000)).collect(),
            map50: 0.5,
            best_confidence: None,
        };
        curves(&plot, dir.path()).unwrap();
        for kind in CurveKind::ALL {
            assert_eq!(size_of(&dir.path().join(kind.file_name())), (1800, 1100));
        }
    }
}

#[test]
fn curves_of_odd_lengths_and_values_are_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let mut odd = class(1, 7);
    odd.f1 = vec![f32::NAN; 3];
    odd.recall = vec![0.5];
    let plot = CurvesPlot {
        classes: vec![class(0, 0), odd, class(2, 1000)],
        map50: f32::NAN,
        best_confidence: Some(f32::NAN),
    };
    curves(&plot, dir.path()).unwrap();
}

#[test]
fn a_confusion_matrix_is_drawn_for_any_number_of_classes() {
    let dir = tempfile::tempdir().unwrap();
    for nc in [0usize, 1, 3, 80, 365] {
        let side = nc + 1;
        let plot = ConfusionPlot {
            names: (0..nc).map(|c| format!("class {c}")).collect(),
            counts: (0..side * side).map(|i| (i % 7) as f64 * 1e4).collect(),
        };
        for normalized in [false, true] {
            let path = dir.path().join("confusion.png");
            confusion_matrix(&plot, normalized, &path).unwrap();
            let (width, height) = size_of(&path);
            assert!(width < 3000 && height < 3000, "{nc} classes: {width} x {height}");
        }
    }
    // Too few counts, and counts that are no counts.
    let plot = ConfusionPlot { names: vec!["a".into()], counts: vec![f64::NAN, -3.0] };
    confusion_matrix(&plot, false, &dir.path().join("odd.png")).unwrap();
}

#[test]
fn labels_are_drawn_for_none_one_and_unnamed_classes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("labels.png");
    labels(&LabelsPlot::default(), &path).unwrap();
    let plot = LabelsPlot {
        names: vec!["only".into()],
        classes: vec![0, 3, 0],
        boxes: vec![[0.5, 0.5, 0.2, 0.3], [f32::NAN, 2.0, -1.0, 9.0], [0.1, 0.9, 0.01, 0.01]],
    };
    labels(&plot, &path).unwrap();
    assert!(coloured(&path) > 100);
}

#[test]
fn a_batch_is_drawn_with_its_boxes_up_to_sixteen_images() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("train_batch0.png");
    let images = vec![0u8; 20 * 32 * 64 * 3];
    let plot = BatchPlot {
        images: &images,
        h: 32,
        w: 64,
        boxes: vec![vec![DrawBox { xyxy: [8.0, 8.0, 40.0, 24.0], class: 0, score: None }]],
        titles: vec!["a.jpg".into()],
    };
    batch(&plot, &["thing".into()], &path).unwrap();
    // Four by four, enlarged to 480 pixels.
    assert_eq!(size_of(&path), (4 * 480 + 20, 4 * 240 + 20));
    assert!(coloured(&path) > 100);
    batch(&BatchPlot { images: &[], h: 0, w: 0, boxes: vec![], titles: vec![] }, &[], &path).unwrap();
}

#[test]
fn a_picture_that_cannot_be_written_is_a_typed_error_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let image = image::RgbImage::new(2, 2);
    let error = save_png(&image, &dir.path().join("missing/plot.png")).unwrap_err();
    assert!(matches!(&error, PlotError::Write { path, .. } if path.ends_with("missing/plot.png")));
    // A folder stands where the picture should go: the rename fails, the temporary file goes.
    std::fs::create_dir(dir.path().join("plot.png")).unwrap();
    assert!(save_png(&image, &dir.path().join("plot.png")).is_err());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn numbers_on_axes_are_short() {
    for (value, decimals, text) in [
        (-0.0, 1, "0.0"),
        (12_000.0, 0, "12k"),
        (2_500_000.0, 0, "2.5M"),
        (0.25, 2, "0.25"),
        (1e-7, 8, "1e-7"),
    ] {
        assert_eq!(number(value, decimals), text);
    }
    let texts: Vec<String> = ticks(Range::new(0.0, 1.0), 5, false).into_iter().map(|t| t.text).collect();
    assert_eq!(texts, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn ticks_lie_inside_their_range_and_are_few(min in -1e12f64..1e12, span in 1e-9f64..1e12, whole: bool) {
        let range = Range::new(min, min + span);
        let ticks = ticks(range, 5, whole);
        prop_assert!(ticks.len() <= 12);
        let room = span * 1e-3 + min.abs() * 1e-9;
        prop_assert!(ticks.iter().all(|t| t.value >= min - room && t.value <= min + span + room));
    }
}
