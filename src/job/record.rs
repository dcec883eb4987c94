//! The journal's view of one job.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::delivery::QueueEntry;
use super::ids::TaskId;
use super::spec::{JobSpec, Priority};
use super::state::{FailureClass, JobState};
use crate::train::args::Device;

/// One run of one task id. Running a finished task id again makes a new record with the next generation; the old one
/// stays as it ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    /// Order of acceptance over all jobs.
    pub seq: i64,
    /// Identity.
    pub task_id: TaskId,
    /// From 1; counts the records of this task id.
    pub generation: u32,
    /// The file it came from, or `command line`.
    pub source: String,
    /// SHA-256 of the bytes it was read from, in hexadecimal.
    pub content_sha256: String,
    /// What is to be done. Never changes, and is shared by the copies of the record.
    #[serde(serialize_with = "spec_as_itself", deserialize_with = "spec_to_share")]
    pub spec: Arc<JobSpec>,
    /// The run folder.
    pub run_dir: PathBuf,
    /// Where it is.
    pub state: JobState,
    /// Why it is there, in a sentence: a waiting job always has one.
    pub reason: String,
    /// Class when it failed, or of the failure that it is being tried again after.
    pub class: Option<FailureClass>,
    /// Processes started for it so far.
    pub attempts: u32,
    /// Retries used, by class.
    pub retries: BTreeMap<FailureClass, u32>,
    /// How often its process went away through no fault of its own.
    pub interruptions: u32,
    /// Not to be started before this time; 0 for at once.
    pub not_before_unix_ms: i64,
    /// When it was accepted.
    pub accepted_unix_ms: i64,
    /// When its first process started.
    pub started_unix_ms: Option<i64>,
    /// When it ended.
    pub finished_unix_ms: Option<i64>,
    /// Its process, while it has one.
    pub process: Option<ProcessId>,
    /// What came out: metrics, fitness, checkpoints.
    pub result: Option<serde_json::Value>,
    /// The last sign of progress.
    pub progress: Option<serde_json::Value>,
    /// This submission of the task id; the same on every machine that works on it.
    pub instance: String,
    /// The entry of the shared queue that it came from.
    pub entry: Option<QueueEntry>,
    /// Fencing number under which this machine owns it, greater than that of every earlier run of the task id here. For a job
    /// that no other machine can take it is the time of acceptance, Unix milliseconds (0 in old records).
    pub fence: u64,
    /// Attempts that other machines made before this one took it.
    pub attempts_before: u32,
    /// What side services gave back: name to value (`mlflow_run_id`, say).
    pub notes: BTreeMap<String, String>,
}

fn spec_as_itself<S: Serializer>(spec: &Arc<JobSpec>, serializer: S) -> Result<S::Ok, S::Error> {
    spec.as_ref().serialize(serializer)
}

fn spec_to_share<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<JobSpec>, D::Error> {
    JobSpec::deserialize(deserializer).map(Arc::new)
}

impl JobRecord {
    /// Attempts on all machines.
    pub fn attempts_all(&self) -> u32 {
        self.attempts_before + self.attempts
    }

    /// What it goes on from; `None` for a job that was submitted.
    pub fn continued(&self) -> Option<Continued> {
        serde_json::from_str(self.notes.get(CONTINUES)?).ok()
    }

    /// True when a checkpoint was made under this very record, on this machine.
    pub fn has_made_checkpoint(&self) -> bool {
        self.progress.as_ref().is_some_and(|progress| progress["last_checkpoint"].is_object())
    }
}

/// The note of a record that holds [`Continued`], as JSON.
pub const CONTINUES: &str = "continues";
/// Earlier submissions that are remembered.
const CONTINUED_MAX: usize = 8;

/// The run that a resumed job goes on from: a submission of its own, with a result of its own, in the same run folder and
/// over the same stored files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Continued {
    /// The earlier submissions, newest first. The last of them that stored something is the one that the store knows.
    pub instances: Vec<String>,
    /// True when a checkpoint of it was made on this machine.
    pub has_checkpoint: bool,
    /// True when other machines worked on it, which may have made one.
    pub was_elsewhere: bool,
}

impl Continued {
    /// What goes on from this record.
    pub fn from(record: &JobRecord) -> Self {
        let earlier = record.continued();
        let (had_checkpoint, was_elsewhere) = earlier
            .as_ref()
            .map_or((false, false), |earlier| (earlier.has_checkpoint, earlier.was_elsewhere));
        let earlier = earlier.map(|earlier| earlier.instances).unwrap_or_default();
        let instances = std::iter::once(record.instance.clone()).chain(earlier).take(CONTINUED_MAX);
        Self {
            instances: instances.collect(),
            has_checkpoint: had_checkpoint || record.has_made_checkpoint(),
            was_elsewhere: was_elsewhere || record.attempts_before > 0,
        }
    }
}

/// Where a job can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// The device that it names.
    pub device: Device,
    /// Any GPU, and nothing but a GPU.
    #[serde(default)]
    pub requires_gpu: bool,
}

/// What scheduling needs to know of a job that waits.
#[derive(Debug, Clone, PartialEq)]
pub struct WaitingJob {
    /// Number of the record.
    pub seq: i64,
    /// The job.
    pub task_id: TaskId,
    /// How urgent it is.
    pub priority: Priority,
    /// When it was accepted, Unix milliseconds.
    pub accepted_unix_ms: i64,
    /// Not to be started before this time.
    pub not_before_unix_ms: i64,
    /// Where it can run.
    pub wanted: Wanted,
    /// The sentence that says why it waits.
    pub reason: String,
    /// It came from a queue that machines share.
    pub is_shared: bool,
}

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process number, also of its group.
    pub pid: u32,
    /// Start time in clock ticks since boot, as the kernel gives it.
    pub started_ticks: u64,
}

/// A job to be accepted.
#[derive(Debug, Clone, PartialEq)]
pub struct NewJob {
    /// What is to be done.
    pub spec: JobSpec,
    /// The file it came from, or `command line`.
    pub source: String,
    /// SHA-256 of the bytes it was read from, in hexadecimal.
    pub content_sha256: String,
    /// The run folder.
    pub run_dir: PathBuf,
    /// Why it waits.
    pub reason: String,
    /// How it is known to other machines; `None` for a job of this machine alone.
    pub shared: Option<SharedJob>,
    /// What it goes on from; `None` for one that begins.
    pub continues: Option<Continued>,
}

#[cfg(test)]
impl NewJob {
    /// A job of this machine alone by the text of its file, for tests.
    pub(crate) fn sample(text: &str, context: &super::spec::SpecContext) -> Self {
        let spec = JobSpec::load(text.as_bytes(), "t", context).expect("valid").spec;
        Self {
            run_dir: spec.run_dir(),
            spec,
            source: "t".into(),
            content_sha256: "0".into(),
            reason: "waits".into(),
            shared: None,
            continues: None,
        }
    }
}

/// A job that came from a queue that machines share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedJob {
    /// This submission; the same on every machine.
    pub instance: String,
    /// The entry.
    pub entry: QueueEntry,
    /// Fencing number under which this machine owns it.
    pub fence: u64,
    /// Attempts that other machines made before.
    pub attempts_before: u32,
}

/// A change of state and what goes with it.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// The new state.
    pub state: JobState,
    /// Why, in a sentence.
    pub reason: String,
    /// Failure class, for a failure or a retry.
    pub class: Option<FailureClass>,
    /// Not to be started before this time.
    pub not_before_unix_ms: i64,
    /// What came out, when something did.
    pub result: Option<serde_json::Value>,
}

impl Change {
    /// A change with a reason and nothing else.
    pub fn to(state: JobState, reason: impl Into<String>) -> Self {
        Self { state, reason: reason.into(), class: None, not_before_unix_ms: 0, result: None }
    }

    /// The same with a failure class.
    pub fn with_class(mut self, class: FailureClass) -> Self {
        self.class = Some(class);
        self
    }

    /// The same with a result.
    pub fn with_result(mut self, result: Option<serde_json::Value>) -> Self {
        self.result = result;
        self
    }
}

/// What was decided about the content of a dropped file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct IntakeEntry {
    /// The file.
    pub path: String,
    /// SHA-256 of its bytes.
    pub content_sha256: String,
    /// Its modification time when it was read, in Unix milliseconds.
    pub modified_unix_ms: i64,
    /// True when it became a job.
    pub accepted: bool,
    /// The job, when it became one.
    pub task_id: Option<TaskId>,
    /// The text of the verdict: JSON of the acceptance, or the faults.
    pub verdict: String,
    /// When it was decided.
    pub at_unix_ms: i64,
}

/// What a person asked for from the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CommandKind {
    /// Stop the job.
    Stop,
}

/// A request that waits for the service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CommandEntry {
    /// Position in the journal.
    pub id: i64,
    /// The job.
    pub task_id: TaskId,
    /// What is asked.
    pub kind: CommandKind,
    /// When it was asked.
    pub at_unix_ms: i64,
}
