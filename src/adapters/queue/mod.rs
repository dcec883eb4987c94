//! The queue's port: what a store of jobs promises, and the error it answers with.
//!
//! The one implementation is [`journal::Journal`]; the contract suite in `contract.rs` runs over every form of it.
//! [`redis`] is the queue that machines share.

#[cfg(test)]
mod contract;
mod due;
pub mod journal;
pub mod lock;
pub mod outbox;
pub mod prune;
pub mod redis;
mod rows;
mod schema;
pub mod session;
mod shared;
mod statements;

use std::path::PathBuf;

use crate::job::event::JobEvent;
use crate::job::ids::TaskId;
use crate::job::record::{
    Change, CommandEntry, CommandKind, IntakeEntry, JobRecord, NewJob, ProcessId, WaitingJob,
};
use crate::job::slot::SlotBoard;
use crate::job::state::{FailureClass, JobState};

/// A store of jobs. Every method is one transaction: done and durable, or not done.
///
/// Terminal states are never left; at most one record of a task id is active (not terminal) at a time, and no two
/// active records share a run folder.
pub trait JobStore {
    /// Makes a job of `job`, with the next generation of its task id, and notes where it came from in the same
    /// transaction.
    ///
    /// # Errors
    /// [`QueueError::Busy`] while another record of the task id is active; [`QueueError::FolderBusy`] while another
    /// active job writes to the run folder.
    fn accept(&mut self, job: NewJob, intake: Option<IntakeEntry>) -> Result<JobRecord, QueueError>;

    /// Notes a verdict without a job.
    ///
    /// # Errors
    /// When it cannot be stored.
    fn record_intake(&mut self, entry: &IntakeEntry) -> Result<(), QueueError>;

    /// The verdict on this content of this file.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn intake(&self, path: &str, content_sha256: &str) -> Result<Option<IntakeEntry>, QueueError>;

    /// The newest acceptance that came from this file.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn last_accepted(&self, path: &str) -> Result<Option<IntakeEntry>, QueueError>;

    /// The newest record of a task id.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn job(&self, task_id: &TaskId) -> Result<Option<JobRecord>, QueueError>;

    /// All records that are not terminal, in order of acceptance.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn active(&self) -> Result<Vec<JobRecord>, QueueError>;

    /// What scheduling needs of every record that waits (queued or interrupted), in order of acceptance. Cheap: no
    /// specification is read.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn waiting(&self) -> Result<Vec<WaitingJob>, QueueError>;

    /// The record of this number.
    ///
    /// # Errors
    /// [`QueueError::Unknown`] when there is none.
    fn record(&self, seq: i64) -> Result<JobRecord, QueueError>;

    /// True when any record is not terminal.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn has_active(&self) -> Result<bool, QueueError>;

    /// The newest `limit` records, newest first.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn recent(&self, limit: u32) -> Result<Vec<JobRecord>, QueueError>;

    /// Moves a record to another state along the legal moves, and notes it in the job's history.
    ///
    /// # Errors
    /// [`QueueError::Illegal`] when the move is not legal, [`QueueError::Unknown`] for an unknown record.
    fn change(&mut self, seq: i64, change: Change) -> Result<JobRecord, QueueError>;

    /// Moves a record to `preparing` and counts the attempt.
    ///
    /// # Errors
    /// As [`JobStore::change`].
    fn begin_attempt(&mut self, seq: i64, reason: &str) -> Result<JobRecord, QueueError>;

    /// Moves a record back to `queued` after a failure and counts the retry of that class.
    ///
    /// # Errors
    /// As [`JobStore::change`].
    fn retry(
        &mut self,
        seq: i64,
        class: FailureClass,
        reason: &str,
        not_before_unix_ms: i64,
    ) -> Result<JobRecord, QueueError>;

    /// Notes the process of a record, or that it has none.
    ///
    /// # Errors
    /// When it cannot be stored.
    fn set_process(&mut self, seq: i64, process: Option<ProcessId>) -> Result<(), QueueError>;

    /// Replaces the sentences that say why records are where they are, all in one transaction.
    ///
    /// # Errors
    /// When they cannot be stored.
    fn set_reasons(&mut self, reasons: &[(i64, String)]) -> Result<(), QueueError>;

    /// Replaces the last sign of progress. It may be lost with the machine's power: it is a display, not a fact.
    ///
    /// # Errors
    /// When it cannot be stored.
    fn set_progress(&mut self, seq: i64, progress: &serde_json::Value) -> Result<(), QueueError>;

    /// Replaces what is known of the slots. It may be lost with the machine's power: it is a display, not a fact.
    ///
    /// # Errors
    /// When it cannot be stored.
    fn set_board(&mut self, board: &SlotBoard) -> Result<(), QueueError>;

    /// The slots as the last service left them.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn board(&self) -> Result<Option<SlotBoard>, QueueError>;

    /// Adds to the history of a record; the oldest entries go beyond the limit.
    ///
    /// # Errors
    /// When it cannot be stored.
    fn add_event(&mut self, seq: i64, kind: &str, detail: &serde_json::Value) -> Result<(), QueueError>;

    /// The history of a record after event `after_id`, oldest first.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn events(&self, seq: i64, after_id: i64, limit: u32) -> Result<Vec<JobEvent>, QueueError>;

    /// Leaves a request for the service; the same request twice is one.
    ///
    /// # Errors
    /// When it cannot be stored.
    fn push_command(&mut self, task_id: &TaskId, kind: CommandKind) -> Result<(), QueueError>;

    /// The requests that wait, oldest first.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn commands(&self) -> Result<Vec<CommandEntry>, QueueError>;

    /// Removes a request that was dealt with.
    ///
    /// # Errors
    /// When it cannot be stored.
    fn finish_command(&mut self, id: i64) -> Result<(), QueueError>;
}

/// When to try again after a [`QueueError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// It would fail again.
    Never,
    /// After a while: a full disk, a busy database.
    After,
}

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The journal cannot be opened.
    #[error("cannot open the journal {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// A folder of it cannot be made.
    #[error("cannot make the folder {path}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is damaged.
    #[error("the journal {path} is damaged: {found}; move it away to start afresh")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the check found.
        found: String,
    },
    /// Written by another version of the program.
    #[error("the journal {path} has schema version {found}; this program knows up to {known}")]
    Version {
        /// The file.
        path: PathBuf,
        /// Version found.
        found: i64,
        /// Newest version known.
        known: i64,
    },
    /// The thread that owns the journal is gone, or the work on it panicked.
    #[error("the journal's thread did not answer")]
    NoAnswer,
    /// A statement failed.
    #[error("the journal could not {what}")]
    Sql {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        #[source]
        source: rusqlite::Error,
    },
    /// A row holds what no version of the program writes.
    #[error("the journal holds an unreadable {what}")]
    Decode {
        /// Which column.
        what: &'static str,
        /// Why, when a parser said so.
        #[source]
        source: Option<serde_json::Error>,
    },
    /// The task id has an active record.
    #[error("task id {task_id} is taken by a job that is {state} (from {source_name})")]
    Busy {
        /// The task id.
        task_id: TaskId,
        /// State of the record.
        state: JobState,
        /// Where it came from.
        source_name: String,
    },
    /// Another active job writes to the run folder.
    #[error("the run folder {run_dir} is in use by job {task_id}")]
    FolderBusy {
        /// The folder.
        run_dir: PathBuf,
        /// The job.
        task_id: TaskId,
    },
    /// There is no such record.
    #[error("there is no job record {seq}")]
    Unknown {
        /// Its number.
        seq: i64,
    },
    /// The move is not legal.
    #[error("job {task_id} is {from} and cannot become {to}")]
    Illegal {
        /// The job.
        task_id: TaskId,
        /// Where it is.
        from: JobState,
        /// Where it was to go.
        to: JobState,
    },
}

impl QueueError {
    /// Whether trying again can help.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Sql { .. } | Self::Open { .. } | Self::Folder { .. } | Self::NoAnswer => Retry::After,
            Self::Damaged { .. }
            | Self::Version { .. }
            | Self::Decode { .. }
            | Self::Busy { .. }
            | Self::FolderBusy { .. }
            | Self::Unknown { .. }
            | Self::Illegal { .. } => Retry::Never,
        }
    }
}
