//! What a supervisor hands to the process that trains one job, and what that process says by its exit code.
//!
//! `boxwright train-child --spec FILE` reads a [`ChildSpec`] as JSON and trains, or evaluates. It writes one session event per line to standard
//! output, reads the lines `stop` and `checkpoint` from standard input, writes a [`ChildResult`] to
//! [`ChildSpec::result_path`] (temporary file, fsync, rename) before it leaves in a final state, and leaves with an
//! [`ExitCode`]. End of file on standard input means that the supervisor is gone: the child checkpoints and leaves
//! with [`ExitCode::Interrupted`].

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::args::TrainArgs;

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobMode {
    /// It trains a network.
    #[default]
    Train,
    /// It measures a weights file on a dataset (`train.mode: val`).
    Evaluate,
}

impl JobMode {
    /// What it does, for a sentence: `trains`, `evaluates`.
    pub fn verb(self) -> &'static str {
        match self {
            Self::Train => "trains",
            Self::Evaluate => "evaluates",
        }
    }
}

/// Variable in which the supervisor gives its process number: the child dies with that process, however it dies.
pub const SUPERVISOR_PID: &str = "BOXWRIGHT_SUPERVISOR_PID";

/// One job for one process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChildSpec {
    /// Identity of the job.
    pub task_id: String,
    /// Number of this attempt, from 1.
    pub attempt: u32,
    /// Whether it trains or evaluates.
    #[serde(default)]
    pub mode: JobMode,
    /// The run folder; it exists.
    pub run_dir: PathBuf,
    /// The training arguments; `project` and `name` do not count, `run_dir` does.
    pub args: TrainArgs,
    /// Continue from the newest checkpoint in `run_dir` that verifies; start afresh when there is none. An evaluation
    /// always starts afresh.
    pub resume: bool,
    /// Where the result goes, usually `result.json` in the run folder.
    pub result_path: PathBuf,
    /// Share of a GPU's memory that the job may take, above 0 up to 1.
    #[serde(default = "whole")]
    pub gpu_share_max: f64,
    /// Identity of the GPU that the job was given. It counts over `args.device`, whose number may have shifted.
    #[serde(default)]
    pub gpu_uuid: Option<String>,
}

fn whole() -> f64 {
    1.0
}

/// How a session ended, for a supervisor that may not have heard it. Written whole or not at all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChildResult {
    /// Identity of the job.
    pub task_id: String,
    /// Number of the attempt that ended.
    pub attempt: u32,
    /// `completed`, `cancelled` or `failed`.
    pub status: String,
    /// Failure class when `status` is `failed`, as in [`ExitCode::class`].
    #[serde(default)]
    pub class: Option<String>,
    /// The reason when `status` is `failed`.
    #[serde(default)]
    pub reason: Option<String>,
    /// Fitness of the best epoch.
    #[serde(default)]
    pub fitness: Option<f64>,
    /// Final metrics by name.
    #[serde(default)]
    pub metrics: serde_json::Map<String, serde_json::Value>,
    /// The best checkpoint.
    #[serde(default)]
    pub best: Option<PathBuf>,
    /// The last checkpoint.
    #[serde(default)]
    pub last: Option<PathBuf>,
    /// Epochs done.
    #[serde(default)]
    pub epochs: Option<u32>,
    /// Which training and validation data it was, see [`crate::data::metadata::fingerprint`].
    #[serde(default)]
    pub data_fingerprint: Option<String>,
    /// What it was measured on, equal on all machines, see [`crate::data::metadata::val_fingerprint`].
    #[serde(default)]
    pub val_fingerprint: Option<String>,
}

impl ChildResult {
    /// Writes the result atomically: temporary file beside it, fsync, rename, fsync of the folder.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(std::io::Error::other)?;
        let temporary = path.with_extension("json.tmp");
        let mut file = std::fs::File::create(&temporary)?;
        std::io::Write::write_all(&mut file, &text)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        if let Some(folder) = path.parent() {
            std::fs::File::open(folder)?.sync_all()?;
        }
        Ok(())
    }

    /// Reads a result; `None` when there is none or it is no result.
    pub fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }
}

/// What the child says by leaving.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum ExitCode {
    /// The run is complete.
    Completed = 0,
    /// The arguments cannot be run.
    Config = 10,
    /// The dataset cannot be used.
    Data = 11,
    /// Not enough memory.
    Memory = 12,
    /// The loss is not finite.
    Diverged = 13,
    /// The device failed.
    Device = 14,
    /// A file could not be written.
    Storage = 15,
    /// A fault of the program.
    Internal = 16,
    /// Stopped on request; a checkpoint is saved.
    Cancelled = 130,
    /// Left early; a checkpoint is saved and the run is to be continued.
    Interrupted = 131,
}

impl ExitCode {
    /// All codes.
    pub const ALL: [ExitCode; 10] = [
        Self::Completed,
        Self::Config,
        Self::Data,
        Self::Memory,
        Self::Diverged,
        Self::Device,
        Self::Storage,
        Self::Internal,
        Self::Cancelled,
        Self::Interrupted,
    ];

    /// The meaning of a number.
    pub fn from_number(number: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|code| *code as i32 == number)
    }

    /// The failure class this code stands for; `None` for an end that is no failure.
    pub fn class(self) -> Option<&'static str> {
        match self {
            Self::Config => Some("config"),
            Self::Data => Some("data"),
            Self::Memory => Some("memory"),
            Self::Diverged => Some("diverged"),
            Self::Device => Some("device"),
            Self::Storage => Some("storage"),
            Self::Internal => Some("internal"),
            Self::Completed | Self::Cancelled | Self::Interrupted => None,
        }
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code as u8)
    }
}
