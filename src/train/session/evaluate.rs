//! A job that evaluates: a weights file is measured on a dataset, with the reports and the run folder of a session.

use std::time::{Duration, Instant};

use super::reporter::Reporter;
use super::validate_file::Measurement;
use super::{Outcome, SessionSpec, ValidateFileArgs, reported};
use crate::detect::nms::NmsArgs;
use crate::train::args::{Batch, TrainArgs};
use crate::train::device;
use crate::train::error::TrainError;
use crate::train::event::{Command, Observer, OutcomeKind, SessionEvent};
use crate::train::run_folder::round5;

/// Images per batch when the choice is left to the program; what is measured does not depend on it.
const BATCH_DEFAULT: usize = 16;
/// Between two reports of progress.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// Measures `spec.args.model` on `spec.args.data` to the end, or until told to stop between two batches. Every failure is
/// also reported as an event. There is nothing to resume: it begins at the first image.
///
/// # Errors
/// [`TrainError`]: weights, data, device or sizes that cannot be used.
pub fn evaluate(spec: &SessionSpec, observer: &mut dyn Observer) -> Result<Outcome, TrainError> {
    reported(spec, observer, run)
}

fn run(spec: &SessionSpec, reporter: &mut Reporter) -> Result<Outcome, TrainError> {
    let began = Instant::now();
    let args = file_args(spec, reporter);
    let mut measurement = Measurement::open(&args)?;
    device::remark(args.device, &measurement.compute).into_iter().for_each(|note| reporter.warn(note));
    measurement.loader.notes().iter().for_each(|note| reporter.warn(note.clone()));
    let imgsz = measurement.validation.imgsz;
    let written = TrainArgs {
        imgsz: imgsz as u32,
        batch: Batch::Images(args.batch as u32),
        rect: args.rect,
        ..spec.args.clone()
    };
    reporter.folder.write_args(&written)?;
    reporter.emit(plan(&mut measurement)?);
    let outcome = |kind, metrics, fitness| Outcome {
        kind,
        metrics,
        fitness,
        best: None,
        last: None,
        epochs: 0,
        step: 0,
        seconds: began.elapsed().as_secs_f64(),
    };
    let mut watch = Watch::new(measurement.loader.batches(), measurement.split.len(), args.batch);
    let found = measurement.run(&mut || watch.should_stop(reporter))?;
    let Some(found) = found else {
        return Ok(outcome(OutcomeKind::Stopped, serde_json::Map::new(), None));
    };
    let mut metrics = found.metric_map();
    reporter.emit(SessionEvent::Validated {
        epoch: 0,
        images: found.metrics.images,
        boxes: found.metrics.targets,
        metrics: metrics.clone(),
        seconds: found.seconds,
        speed_ms: found.speed_ms,
        classes: if spec.args.verbose { found.class_figures(&measurement.names) } else { Vec::new() },
    });
    // The figures stand whether or not a picture can be drawn.
    if let Err(error) = measurement.draw(&found) {
        reporter.warn(error.chain());
    }
    let fitness = round5(found.metrics.fitness);
    metrics.insert("fitness".into(), fitness.into());
    Ok(outcome(OutcomeKind::Completed, metrics, Some(fitness)))
}

/// The arguments of a job as those of a validation.
fn file_args(spec: &SessionSpec, reporter: &mut Reporter) -> ValidateFileArgs {
    let args = &spec.args;
    let batch = match args.batch {
        Batch::Images(images) => images as usize,
        Batch::Auto | Batch::Fraction(_) => {
            reporter.warn(format!("the automatic batch is for training; {BATCH_DEFAULT} images at a time"));
            BATCH_DEFAULT
        }
    };
    let usual = NmsArgs::validation();
    ValidateFileArgs {
        weights: args.model.clone().into(),
        data: args.data.clone().into(),
        split: args.split.clone(),
        imgsz: (args.imgsz > 0).then_some(args.imgsz as usize),
        batch,
        conf: args.conf.map_or(usual.conf, |conf| conf as f32),
        iou: args.iou,
        max_det: args.max_det as usize,
        agnostic: args.agnostic_nms,
        rect: args.rect,
        plots: args.plots.then(|| reporter.folder.path().to_owned()),
        json: args.save_json.then(|| reporter.folder.file("predictions.json")),
        workers: args.workers as usize,
        threads: spec.threads,
        device: args.device,
        amp: args.amp,
    }
}

/// The plan of the largest batch, so that memory is refused before the first image.
fn plan(measurement: &mut Measurement) -> Result<SessionEvent, TrainError> {
    let (h, w) = measurement.loader.input_max();
    let batch = measurement.loader.batch_size();
    let network = &mut measurement.network;
    Ok(SessionEvent::Plan {
        parameters: network.params.trainable_count(),
        macs: network.macs(h, w)?,
        arena_bytes: network.plan_bytes(batch, h, w)?,
        batch,
        imgsz: measurement.validation.imgsz,
        accumulate: 1,
        device: measurement.compute.describe(),
        threads: network.threads(),
        images: 0,
        val_images: measurement.split.len(),
        batches: measurement.loader.batches(),
        epochs: 0,
        optimizer: "none".into(),
        lr0: 0.0,
        resumed_step: None,
        resumed_from: None,
    })
}

/// Counts batches, tells of them now and then, and hears whether to stop.
struct Watch {
    done: Option<usize>,
    batches: usize,
    images: usize,
    batch: usize,
    began: Instant,
    reported: Instant,
}

impl Watch {
    fn new(batches: usize, images: usize, batch: usize) -> Watch {
        Watch { done: None, batches, images, batch, began: Instant::now(), reported: Instant::now() }
    }

    /// Called before every batch, and once after the last.
    fn should_stop(&mut self, reporter: &mut Reporter) -> bool {
        let done = self.done.map_or(0, |done| done + 1);
        self.done = Some(done);
        if done == 0 {
            self.began = Instant::now();
        } else if done == self.batches || self.reported.elapsed() >= REPORT_INTERVAL {
            self.reported = Instant::now();
            let images = (done * self.batch).min(self.images);
            let seconds = self.began.elapsed().as_secs_f64().max(1e-9);
            reporter.emit(SessionEvent::Validating {
                batch: done,
                batches: self.batches,
                images_per_second: images as f64 / seconds,
            });
        }
        reporter.command() == Command::Stop
    }
}
