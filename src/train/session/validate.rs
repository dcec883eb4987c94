//! Validation: letterboxed batches, decoding, suppression, metrics, losses in the units of training.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;

use super::network::Network;
use super::{Run, pictures};
use crate::data::{Batch, DataError, Split, ValLoader};
use crate::detect::metrics::matching::LabelledBox;
use crate::detect::metrics::{Evaluator, Metrics};
use crate::detect::nms::{Detection, NmsArgs};
use crate::train::error::TrainError;
use crate::train::event::{ClassFigures, Command};
use crate::train::files;
use crate::train::run_folder::round5;

/// Batches of which pictures are drawn.
const PICTURES: usize = 3;

/// How to validate.
#[derive(Clone, Debug)]
pub struct ValidationArgs {
    /// Suppression.
    pub nms: NmsArgs,
    /// Images per batch.
    pub batch: usize,
    /// Input size, pixels.
    pub imgsz: usize,
    /// Largest stride of the network.
    pub stride: usize,
    /// Loader threads.
    pub workers: usize,
    /// Rectangular batches, each as small as its images allow; otherwise squares.
    pub rect: bool,
    /// Folder for pictures of the first batches.
    pub pictures: Option<PathBuf>,
    /// File for the detections as COCO results.
    pub json: Option<PathBuf>,
}

/// What a validation found.
#[derive(Clone, Debug)]
pub struct Validation {
    /// The metrics.
    pub metrics: Metrics,
    /// Mean box, class and distribution losses over the batches.
    pub losses: [f64; 3],
    /// Seconds it took.
    pub seconds: f64,
    /// Milliseconds per image: loading, network, decoding and suppression with matching.
    pub speed_ms: [f64; 3],
}

impl Validation {
    /// Precision, recall, mAP50 and mAP50-95 by name, rounded to five decimals.
    pub fn metric_map(&self) -> serde_json::Map<String, serde_json::Value> {
        let m = &self.metrics;
        super::metric_map(&[m.precision, m.recall, m.map50, m.map50_95].map(round5))
    }

    /// Figures of each class that has labels.
    pub fn class_figures(&self, names: &[String]) -> Vec<ClassFigures> {
        let figures = self.metrics.classes.iter().map(|c| ClassFigures {
            name: names.get(c.class as usize).cloned().unwrap_or_else(|| c.class.to_string()),
            images: c.images,
            boxes: c.targets,
            precision: c.precision,
            recall: c.recall,
            map50: c.ap50(),
            map50_95: c.ap50_95(),
        });
        figures.collect()
    }
}

/// Validates `network` on `split`; `None` when `should_stop` said so between two batches.
///
/// # Errors
/// Data, memory or storage errors.
pub fn validate(
    network: &mut Network,
    (split, loader): (&Split, &mut ValLoader),
    names: &[String],
    args: &ValidationArgs,
    should_stop: &mut dyn FnMut() -> bool,
) -> Result<Option<Validation>, TrainError> {
    let began = Instant::now();
    let data_error = |e: DataError| super::feeding::data_error(split.name.key(), e);
    loader.start();
    let mut evaluator = Evaluator::new(names.len(), args.nms.conf);
    let mut coco = args.json.is_some().then(Vec::new);
    let (mut losses, mut batches, mut times) = ([0.0; 3], 0, [0.0; 3]);
    loop {
        if should_stop() {
            return Ok(None);
        }
        let start = Instant::now();
        let Some(batch) = loader.next().map_err(data_error)? else { break };
        times[0] += start.elapsed().as_secs_f64();
        let shape = (batch.n, batch.h, batch.w);
        let output = network.detect(&batch.images, shape, Some(&batch.targets), &args.nms)?;
        times[1] += output.seconds[0];
        times[2] += output.seconds[1];
        let start = Instant::now();
        let items = [output.losses.box_, output.losses.cls, output.losses.dfl].map(f64::from);
        losses.iter_mut().zip(items).for_each(|(sum, item)| *sum += item);
        let found = output.detections;
        let targets = targets_in_pixels(&batch);
        for (detections, targets) in found.iter().zip(&targets) {
            evaluator.add_image(detections, targets);
        }
        times[2] += start.elapsed().as_secs_f64();
        if let Some(coco) = &mut coco {
            add_coco(coco, split, &batch, &found);
        }
        if let Some(folder) = args.pictures.as_ref().filter(|_| batches < PICTURES) {
            // A picture that cannot be written is not worth the run; the next ones will say so again.
            let _ = pictures::of_validation(folder, batches, split, &batch, &targets, &found, names);
        }
        batches += 1;
        loader.recycle(batch);
    }
    if let (Some(path), Some(rows)) = (&args.json, coco) {
        let text = serde_json::Value::Array(rows).to_string();
        files::write_atomically(path, |out| out.write_all(text.as_bytes()))?;
    }
    let metrics = evaluator.finish();
    let images = metrics.images.max(1) as f64;
    Ok(Some(Validation {
        losses: losses.map(|sum| sum / f64::from(batches.max(1) as u32)),
        seconds: began.elapsed().as_secs_f64(),
        speed_ms: times.map(|seconds| seconds * 1e3 / images),
        metrics,
    }))
}

/// The labelled boxes of each image of a batch, in pixels of the network's input.
pub(super) fn targets_in_pixels(batch: &Batch) -> Vec<Vec<LabelledBox>> {
    let (h, w) = (batch.h as f32, batch.w as f32);
    let mut boxes = vec![Vec::new(); batch.n];
    for target in &batch.targets {
        let [cx, cy, bw, bh] = target.cxcywh;
        let (cx, cy, half_w, half_h) = (cx * w, cy * h, bw * w / 2.0, bh * h / 2.0);
        let xyxy = [cx - half_w, cy - half_h, cx + half_w, cy + half_h];
        boxes[target.image as usize].push(LabelledBox { xyxy, class: target.class });
    }
    boxes
}

/// Adds rows of the COCO results format: boxes as left, top, width, height in pixels of the original image;
/// categories from 1; the image's number is its file stem where that is one.
fn add_coco(rows: &mut Vec<serde_json::Value>, split: &Split, batch: &Batch, found: &[Vec<Detection>]) {
    for ((detections, &sample), geometry) in found.iter().zip(&batch.samples).zip(&batch.geometry) {
        let path = &split.samples[sample as usize].path;
        let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let name = path.file_name().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let id = stem.parse::<u64>().map_or_else(|_| json!(stem), |number| json!(number));
        for d in detections {
            let [x1, y1, x2, y2] = geometry.to_original(d.xyxy);
            let round = |v: f32, by: f64| (f64::from(v) * by).round() / by;
            let bbox = [x1, y1, x2 - x1, y2 - y1].map(|v| round(v, 1e3));
            let score = round(d.score, 1e5);
            let category = d.class + 1;
            rows.push(json!({
                "image_id": id, "file_name": name, "category_id": category, "bbox": bbox, "score": score
            }));
        }
    }
}

impl Run<'_, '_> {
    /// Validates the parameters that are in the network now; `is_final` draws pictures and writes files.
    pub(super) fn validate_network(&mut self, is_final: bool) -> Result<Option<Validation>, TrainError> {
        let mut args = self.validation.clone();
        if is_final {
            args.pictures = self.args.plots.then(|| self.reporter.folder.path().to_owned());
            args.json = self.args.save_json.then(|| self.reporter.folder.file("predictions.json"));
        }
        let Run { network, dataset, reporter, val_split, val_loader, .. } = self;
        let mut should_stop = || reporter.command() == Command::Stop;
        validate(network, (val_split, val_loader), &dataset.names, &args, &mut should_stop)
    }
}
