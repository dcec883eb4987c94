//! A training session from start to end. Read [`Session::run`], then `prepare` (everything before the
//! first batch), `epoch` (the loop), `validate`, `finish`.

mod choices;
mod epoch;
mod evaluate;
mod feed;
mod feeding;
mod finish;
mod identity;
mod initial;
mod memory;
mod network;
mod pictures;
mod prepare;
mod pretrained;
mod reporter;
mod save;
mod validate;
mod validate_file;

use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Map, Value};

use super::args::TrainArgs;
use super::checkpoint::{Progress, Store};
use super::error::TrainError;
use super::event::{Observer, OutcomeKind, SessionEvent};
use super::run_folder::{METRIC_NAMES, RunFolder};
use super::schedule::Schedule;
use crate::data::{Dataset, Split, ValLoader};
use crate::detect::models::Detector;
use crate::engine::optim::{Ema, Optimizer};

pub use evaluate::evaluate;
pub use identity::{DataIdentity, data_identity};
pub use initial::{Branch, freeze, head_branch, initialise};
pub use memory::batch_on;
pub use network::{Compute, Found, Network, TimedLaunch};
pub use pretrained::{LoadedModel, Weights, load_model};
pub use validate::{Validation, ValidationArgs, validate};
pub use validate_file::{ValidateFileArgs, validate_file};

/// What a session is to do.
#[derive(Clone, Debug)]
pub struct SessionSpec {
    /// The training arguments.
    pub args: TrainArgs,
    /// The run folder.
    pub run_dir: PathBuf,
    /// Name of the task, for reports.
    pub task_id: String,
    /// Go on from the newest checkpoint in the run folder that verifies; start afresh when there is none.
    pub resume: bool,
    /// Compute threads; 0 takes all cores.
    pub threads: usize,
    /// Seconds between checkpoints within an epoch.
    pub checkpoint_interval_s: u64,
    /// Checkpoints kept, at least two.
    pub checkpoints_kept: usize,
    /// Share of a GPU's memory that the session may take, above 0 up to 1.
    pub gpu_share_max: f64,
}

impl SessionSpec {
    /// A session with the usual intervals.
    pub fn new(args: TrainArgs, run_dir: impl Into<PathBuf>, task_id: impl Into<String>) -> SessionSpec {
        SessionSpec {
            args,
            run_dir: run_dir.into(),
            task_id: task_id.into(),
            resume: false,
            threads: 0,
            checkpoint_interval_s: 60,
            checkpoints_kept: 2,
            gpu_share_max: 1.0,
        }
    }
}

/// How a session ended that did not fail.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Completed or stopped.
    pub kind: OutcomeKind,
    /// Metrics of the best weights when completed, of the last validation when stopped.
    pub metrics: Map<String, Value>,
    /// Best fitness.
    pub fitness: Option<f64>,
    /// Best weights, if any were written.
    pub best: Option<PathBuf>,
    /// Last weights, if any were written.
    pub last: Option<PathBuf>,
    /// Epochs finished.
    pub epochs: u32,
    /// Optimiser steps taken.
    pub step: u64,
    /// Seconds of training over all sessions of the run.
    pub seconds: f64,
}

/// A training session.
pub struct Session<'a> {
    spec: SessionSpec,
    observer: &'a mut dyn Observer,
}

impl<'a> Session<'a> {
    /// A session that has not begun.
    pub fn new(spec: SessionSpec, observer: &'a mut dyn Observer) -> Session<'a> {
        Session { spec, observer }
    }

    /// Trains to the end, or until told to stop. Every failure is also reported as an event.
    ///
    /// # Errors
    /// [`TrainError`]; what was learnt until then is in the checkpoints.
    pub fn run(self) -> Result<Outcome, TrainError> {
        let Session { spec, observer } = self;
        reported(&spec, observer, run)
    }
}

/// Opens the run folder, says that the session exists, does `work`, and says how it ended.
fn reported(
    spec: &SessionSpec,
    observer: &mut dyn Observer,
    work: fn(&SessionSpec, &mut reporter::Reporter) -> Result<Outcome, TrainError>,
) -> Result<Outcome, TrainError> {
    let folder = match RunFolder::open(&spec.run_dir) {
        Ok(folder) => folder,
        Err(error) => {
            observer.event(&failed(&error));
            return Err(error);
        }
    };
    let mut reporter = reporter::Reporter::new(observer, folder);
    reporter.emit(SessionEvent::Started {
        task_id: spec.task_id.clone(),
        run_dir: spec.run_dir.clone(),
        model: spec.args.model.clone(),
        data: spec.args.data.clone(),
        pid: std::process::id(),
    });
    let outcome = work(spec, &mut reporter);
    match &outcome {
        Ok(outcome) => reporter.emit(finished(outcome)),
        Err(error) => reporter.emit(failed(error)),
    }
    outcome
}

fn run(spec: &SessionSpec, reporter: &mut reporter::Reporter) -> Result<Outcome, TrainError> {
    let mut run = prepare::prepare(spec, reporter)?;
    match run.train()? {
        Flow::Done => run.finish(),
        Flow::Stopped => run.stopped(),
    }
}

fn failed(error: &TrainError) -> SessionEvent {
    SessionEvent::Failed { class: error.class(), message: error.chain() }
}

fn finished(outcome: &Outcome) -> SessionEvent {
    SessionEvent::Finished {
        outcome: outcome.kind,
        metrics: outcome.metrics.clone(),
        fitness: outcome.fitness,
        best: outcome.best.clone(),
        last: outcome.last.clone(),
        epochs: outcome.epochs,
        step: outcome.step,
        seconds: outcome.seconds,
    }
}

/// Whether a part of the session ran to its end or was told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    Done,
    Stopped,
}

/// A session in progress.
struct Run<'r, 'o> {
    args: TrainArgs,
    reporter: &'r mut reporter::Reporter<'o>,
    store: Store,
    dataset: Dataset,
    network: Network,
    /// The network at the training size, for names, strides and the head's row.
    detector: Detector,
    optimizer: Optimizer,
    ema: Ema,
    schedule: Schedule,
    progress: Progress,
    loader: feed::Feed,
    val_split: Split,
    val_loader: ValLoader,
    validation: ValidationArgs,
    batches: usize,
    checkpoint_interval_s: u64,
    last_saved: Instant,
    save_seconds: f64,
    session_started: Instant,
    elapsed_before_s: f64,
}

impl Run<'_, '_> {
    /// Seconds of training, earlier sessions of the run included.
    fn elapsed_s(&self) -> f64 {
        self.elapsed_before_s + self.session_started.elapsed().as_secs_f64()
    }

    /// Batches since the start of the run.
    fn iteration(&self) -> u64 {
        u64::from(self.progress.epoch) * self.batches as u64 + self.progress.batch as u64
    }
}

/// The four metrics by name.
fn metric_map(metrics: &[f64; 4]) -> Map<String, Value> {
    METRIC_NAMES.iter().zip(metrics).map(|(name, &value)| ((*name).to_owned(), value.into())).collect()
}
