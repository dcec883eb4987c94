//! Pictures of a run, from its data to the plain structs of the plots.

use std::path::Path;

use super::Run;
use super::Validation;
use super::feed::Fed;
use super::validate::targets_in_pixels;
use crate::data::draw::DrawBox;
use crate::data::{Batch, Split, SplitName};
use crate::detect::metrics::matching::LabelledBox;
use crate::detect::nms::Detection;
use crate::train::error::TrainError;
use crate::train::plots::{self, BatchPlot, ClassCurves, ConfusionPlot, CurvesPlot, LabelsPlot, PlotError};

/// Training batches drawn at the start, and again when the mosaic closes.
const TRAIN_PICTURES: usize = 3;
/// Score from which a detection is drawn.
const DRAWN_SCORE: f32 = 0.25;

impl Run<'_, '_> {
    /// Draws the batch if it is one of the first three of the run or of the last epochs without mosaic.
    pub(super) fn picture_of_batch(&mut self, fed: &mut Fed) -> Result<(), TrainError> {
        if !self.args.plots || self.progress.batch >= TRAIN_PICTURES {
            return Ok(());
        }
        let close = self.args.close_mosaic;
        let is_close = close > 0 && self.progress.epoch == self.progress.epochs.saturating_sub(close);
        if !(self.progress.epoch == 0 || is_close) {
            return Ok(());
        }
        let batch = &mut fed.batch;
        if let Some(made) = &fed.on_device {
            batch.images = self.network.read_images(made)?;
        }
        let path = self.reporter.folder.file(&format!("train_batch{}.png", self.iteration()));
        let plot = BatchPlot {
            images: &batch.images,
            h: batch.h,
            w: batch.w,
            boxes: targets_in_pixels(batch).iter().map(|boxes| labelled(boxes)).collect(),
            titles: self.image_names(batch),
        };
        if let Err(error) = plots::batch(&plot, &self.dataset.names, &path) {
            self.reporter.warn(error.to_string());
        }
        Ok(())
    }

    /// Draws the label statistics of the training split.
    pub(super) fn picture_of_labels(&mut self) {
        let Ok(split) = self.dataset.split(SplitName::Train) else { return };
        let labels = || split.samples.iter().flat_map(|s| &s.labels);
        let plot = LabelsPlot {
            names: self.dataset.names.clone(),
            classes: labels().map(|l| l.class as usize).collect(),
            boxes: labels().map(|l| l.cxcywh).collect(),
        };
        if let Err(error) = plots::labels(&plot, &self.reporter.folder.file("labels.png")) {
            self.reporter.warn(error.to_string());
        }
    }

    /// File names of the images of a training batch.
    pub(super) fn image_names(&self, batch: &Batch) -> Vec<String> {
        match self.dataset.split(SplitName::Train) {
            Ok(split) => names_of(split, batch),
            Err(_) => Vec::new(),
        }
    }
}

fn names_of(split: &Split, batch: &Batch) -> Vec<String> {
    let name = |&sample: &u32| {
        let path = &split.samples[sample as usize].path;
        path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
    };
    batch.samples.iter().map(name).collect()
}

fn labelled(boxes: &[LabelledBox]) -> Vec<DrawBox> {
    boxes.iter().map(|b| DrawBox { xyxy: b.xyxy, class: b.class as usize, score: None }).collect()
}

/// Draws a validation batch twice: with its labels and with what was found.
pub(super) fn of_validation(
    folder: &Path,
    index: usize,
    split: &Split,
    batch: &Batch,
    targets: &[Vec<LabelledBox>],
    found: &[Vec<Detection>],
    names: &[String],
) -> Result<(), PlotError> {
    let detected = |detections: &Vec<Detection>| -> Vec<DrawBox> {
        let drawn = detections.iter().filter(|d| d.score > DRAWN_SCORE);
        drawn.map(|d| DrawBox { xyxy: d.xyxy, class: d.class as usize, score: Some(d.score) }).collect()
    };
    let sides = [
        ("labels", targets.iter().map(|boxes| labelled(boxes)).collect::<Vec<_>>()),
        ("pred", found.iter().map(detected).collect()),
    ];
    for (side, boxes) in sides {
        let titles = names_of(split, batch);
        let plot = BatchPlot { images: &batch.images, h: batch.h, w: batch.w, boxes, titles };
        plots::batch(&plot, names, &folder.join(format!("val_batch{index}_{side}.png")))?;
    }
    Ok(())
}

/// Draws the curves, the confusion matrices and the results of a run; one result per picture or group.
pub(super) fn of_run(
    folder: &Path,
    title: &str,
    validation: &Validation,
    names: &[String],
) -> Vec<Result<(), PlotError>> {
    let results = plots::ResultsPlot::from_csv(&folder.join("results.csv"), title);
    let mut drawn = of_validation_run(folder, validation, names);
    drawn.push(results.and_then(|plot| plots::results(&plot, &folder.join("results.png"))));
    drawn
}

/// Draws the curves and the confusion matrices of a validation.
pub fn of_validation_run(
    folder: &Path,
    validation: &Validation,
    names: &[String],
) -> Vec<Result<(), PlotError>> {
    let metrics = &validation.metrics;
    let floats = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<f32>>();
    let classes = metrics.curves.iter().map(|c| ClassCurves {
        class: c.class as usize,
        name: names.get(c.class as usize).cloned().unwrap_or_default(),
        ap50: c.ap[0] as f32,
        precision_at_recall: floats(&c.precision_by_recall),
        precision: floats(&c.precision),
        recall: floats(&c.recall),
        f1: floats(&c.f1),
    });
    let curves = CurvesPlot {
        classes: classes.collect(),
        map50: metrics.map50 as f32,
        best_confidence: Some(metrics.best_confidence as f32),
    };
    let counts = metrics.confusion.counts().iter().map(|&n| n as f64).collect();
    let confusion = ConfusionPlot { names: names.to_vec(), counts };
    vec![
        plots::curves(&curves, folder),
        plots::confusion_matrix(&confusion, false, &folder.join("confusion_matrix.png")),
        plots::confusion_matrix(&confusion, true, &folder.join("confusion_matrix_normalized.png")),
    ]
}
