//! What a session reports while it runs, and what it may be told between two steps.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Something happened in a session. On a pipe or in `events.jsonl` each is one JSON line; its name
/// stands under the key `event`. Epochs and batches count from 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum SessionEvent {
    /// The session exists; nothing is computed yet.
    Started {
        /// Name of the task.
        task_id: String,
        /// The run folder.
        run_dir: PathBuf,
        /// The network.
        model: String,
        /// The dataset.
        data: String,
        /// The process.
        pid: u32,
    },
    /// The plan of the training step is made; the first step follows. In an evaluation the plan of its largest batch: no
    /// training images, no epochs, no optimiser (`none`).
    Plan {
        /// Trainable numbers.
        parameters: usize,
        /// Multiply-accumulates of one image's forward pass.
        macs: u64,
        /// Bytes of activations and workspaces.
        arena_bytes: usize,
        /// Images per batch.
        batch: usize,
        /// Input size, pixels.
        imgsz: usize,
        /// Batches whose gradients make one step after the warm-up.
        accumulate: usize,
        /// What computes: `cpu`, or a GPU's number, name and precision.
        device: String,
        /// Compute threads.
        threads: usize,
        /// Training images.
        images: usize,
        /// Validation images.
        val_images: usize,
        /// Batches per epoch; those of the split in an evaluation.
        batches: usize,
        /// Epochs of the run.
        epochs: u32,
        /// Resolved optimiser.
        optimizer: String,
        /// Resolved initial learning rate.
        lr0: f64,
        /// Step from which the session goes on; `null` for a fresh start.
        resumed_step: Option<u64>,
        /// Checkpoint from which it goes on.
        resumed_from: Option<PathBuf>,
    },
    /// An epoch begins (or goes on after a resume).
    EpochStarted {
        /// The epoch.
        epoch: u32,
        /// Epochs of the run.
        epochs: u32,
        /// First batch that will be computed.
        batch: usize,
        /// Batches per epoch.
        batches: usize,
        /// Mosaic and its kin are switched off.
        mosaic_closed: bool,
    },
    /// A batch is computed.
    Step {
        /// The epoch.
        epoch: u32,
        /// The batch.
        batch: usize,
        /// Batches per epoch.
        batches: usize,
        /// Optimiser steps so far.
        step: u64,
        /// Mean box loss of the epoch so far.
        box_loss: f64,
        /// Mean class loss of the epoch so far.
        cls_loss: f64,
        /// Mean distribution loss of the epoch so far.
        dfl_loss: f64,
        /// Learning rate of the first group.
        lr: f64,
        /// Labelled boxes in the batch.
        boxes: usize,
        /// Input size, pixels.
        imgsz: usize,
        /// Images per second of this batch, waiting included.
        images_per_second: f64,
        /// Share of the epoch's time spent waiting for data, 0..1.
        data_wait_ratio: f64,
    },
    /// A batch of an evaluation is done; at most one a second, and the last.
    Validating {
        /// The batch.
        batch: usize,
        /// Batches of the split.
        batches: usize,
        /// Images per second so far, waiting included.
        images_per_second: f64,
    },
    /// The averaged model, or the weights file of an evaluation, is validated.
    Validated {
        /// The epoch; 0 in an evaluation.
        epoch: u32,
        /// Images.
        images: usize,
        /// Labelled boxes.
        boxes: usize,
        /// Metrics by the names of `results.csv`.
        metrics: Map<String, Value>,
        /// Seconds it took.
        seconds: f64,
        /// Milliseconds per image: loading, network, decoding and suppression with matching.
        speed_ms: [f64; 3],
        /// Figures of each class that has labels; empty unless asked for.
        classes: Vec<ClassFigures>,
    },
    /// An epoch is over; `columns` is its row of `results.csv`.
    Epoch {
        /// The epoch.
        epoch: u32,
        /// Epochs of the run.
        epochs: u32,
        /// The row.
        columns: Map<String, Value>,
        /// Fitness of the epoch.
        fitness: Option<f64>,
        /// True when it is the best so far.
        is_best: bool,
    },
    /// A checkpoint is durable.
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// SHA-256 of its content before the trailer, hexadecimal.
        sha256: String,
        /// Epochs finished.
        epoch: u32,
        /// Optimiser steps taken.
        step: u64,
        /// Milliseconds it took.
        milliseconds: u64,
    },
    /// Something a user should know.
    Warning {
        /// What.
        message: String,
    },
    /// The session is over and everything is on disk.
    Finished {
        /// `completed` or `stopped`.
        outcome: OutcomeKind,
        /// Metrics of the best weights.
        metrics: Map<String, Value>,
        /// Fitness of the best weights.
        fitness: Option<f64>,
        /// Best weights.
        best: Option<PathBuf>,
        /// Last weights.
        last: Option<PathBuf>,
        /// Epochs finished.
        epochs: u32,
        /// Optimiser steps taken.
        step: u64,
        /// Seconds of training over all sessions of the run.
        seconds: f64,
    },
    /// The session failed.
    Failed {
        /// Class of the failure.
        class: crate::train::error::FailureClass,
        /// What was seen, with all causes.
        message: String,
    },
}

/// Validation figures of one class.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassFigures {
    /// Name of the class.
    pub name: String,
    /// Images with the class.
    pub images: usize,
    /// Labelled boxes.
    pub boxes: usize,
    /// Precision at the common best confidence.
    pub precision: f64,
    /// Recall at the common best confidence.
    pub recall: f64,
    /// Average precision at IoU 0.5.
    pub map50: f64,
    /// Mean average precision over IoU 0.50 to 0.95.
    pub map50_95: f64,
}

/// How a session that did not fail ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutcomeKind {
    /// All epochs done, or early stop.
    Completed,
    /// Told to stop; saved, can be resumed.
    Stopped,
}

/// An event with its time, as it is written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stamped {
    /// Milliseconds since 1970.
    pub time_unix_ms: u64,
    /// What happened.
    #[serde(flatten)]
    pub event: SessionEvent,
}

impl Stamped {
    /// The event with the present time.
    pub fn now(event: SessionEvent) -> Stamped {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Stamped { time_unix_ms: since.map_or(0, |d| d.as_millis() as u64), event }
    }
}

/// What a session may be told between two steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Go on.
    Continue,
    /// Write a checkpoint now, then go on.
    CheckpointNow,
    /// Write a checkpoint and end.
    Stop,
}

/// Who watches a session. Both methods are called on the session's thread and must return quickly.
pub trait Observer {
    /// Something happened.
    fn event(&mut self, event: &SessionEvent);
    /// Polled before every batch, between validation batches and at the end of epochs.
    fn command(&mut self) -> Command {
        Command::Continue
    }
}

/// Watches nothing.
pub struct Silent;

impl Observer for Silent {
    fn event(&mut self, _event: &SessionEvent) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_flat_line_and_reads_back() {
        let event = Stamped::now(SessionEvent::Warning { message: "two\nlines".into() });
        let line = serde_json::to_string(&event).expect("plain data");
        assert!(line.contains("\"event\":\"warning\"") && !line.contains('\n'), "{line}");
        assert_eq!(serde_json::from_str::<Stamped>(&line).expect("the same form"), event);
    }
}
