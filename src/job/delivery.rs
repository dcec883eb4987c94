//! What is to be delivered to side services: the entries of the outbox.
//!
//! The supervisor writes them in the same transaction as the change that they tell of; couriers deliver them in order,
//! one lane (usually one job) at a time, as often as it takes. Every delivery is idempotent: it can be made twice
//! and has the effect of one.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use super::ids::TaskId;

/// A side service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SinkName {
    /// Results and metrics in Redis.
    Redis,
    /// Checkpoints and run files in the object store.
    Store,
    /// Runs on the tracking server.
    Mlflow,
}

impl SinkName {
    /// All of them.
    pub const ALL: [SinkName; 3] = [Self::Redis, Self::Store, Self::Mlflow];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Store => "store",
            Self::Mlflow => "mlflow",
        }
    }
}

/// Which run a delivery is about. The same on every machine that works on the job, apart from the last three.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRef {
    /// The job.
    pub task_id: TaskId,
    /// This submission of it: two runs of one task id differ here, two machines on one run do not.
    pub instance: String,
    /// The study.
    pub study_name: String,
    /// Version of the study.
    pub version: Option<i64>,
    /// Index inside the study.
    pub trial_number: u32,
    /// Type of the model, `yolo`.
    pub kind: String,
    /// The run folder on this machine.
    pub run_dir: PathBuf,
    /// Fencing number of the owner: a delivery with a smaller one than the service has seen has no effect.
    pub fence: u64,
    /// The machine.
    pub machine_id: String,
}

#[cfg(test)]
impl RunRef {
    /// Some run of this instance, for tests.
    pub(crate) fn sample(instance: &str) -> Self {
        Self {
            task_id: "t".parse().expect("valid"),
            instance: instance.into(),
            study_name: "s".into(),
            version: None,
            trial_number: 1,
            kind: "yolo".into(),
            run_dir: "/r".into(),
            fence: 0,
            machine_id: "m".into(),
        }
    }
}

/// A delivery to make, before it is in the outbox.
#[derive(Debug, Clone, PartialEq)]
pub struct NewDelivery {
    /// Where to.
    pub sink: SinkName,
    /// Deliveries of one lane are made in order.
    pub lane: String,
    /// The same key again replaces a delivery that still waits (and goes to the end of its lane).
    pub key: String,
    /// May be dropped when the outbox is full.
    pub may_be_dropped: bool,
    /// Not to be made before this time has passed, milliseconds. A delivery that replaces another keeps the sooner time.
    pub hold_ms: u64,
    /// What.
    pub body: DeliveryBody,
}

/// A delivery in the outbox.
#[derive(Debug, Clone, PartialEq)]
pub struct Delivery {
    /// Position, growing.
    pub id: i64,
    /// Where to.
    pub sink: SinkName,
    /// Its lane.
    pub lane: String,
    /// Its key.
    pub key: String,
    /// What.
    pub body: DeliveryBody,
    /// Failed tries so far.
    pub attempts: u32,
    /// Since when it waits, Unix milliseconds.
    pub at_unix_ms: i64,
}

/// What is delivered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DeliveryBody {
    /// The end of a job, for whoever waits for it.
    Result(ResultBody),
    /// Metrics of an epoch.
    EpochMetrics(EpochBody),
    /// Files of a run, as they are when the delivery is made.
    Files(FilesBody),
    /// A run begins.
    RunStart(RunStartBody),
    /// Samples of metrics.
    RunMetrics(RunMetricsBody),
    /// A run ends.
    RunEnd(RunEndBody),
}

/// True when an instance came from a queue that machines share: it is named `queue/id`. Fencing numbers of such instances of
/// one task come from one clock.
pub fn is_shared_instance(instance: &str) -> bool {
    instance.contains('/')
}

impl DeliveryBody {
    /// The run that it is about.
    pub fn run(&self) -> &RunRef {
        match self {
            Self::Result(body) => &body.run,
            Self::EpochMetrics(body) => &body.run,
            Self::Files(body) => &body.run,
            Self::RunStart(body) => &body.run,
            Self::RunMetrics(body) => &body.run,
            Self::RunEnd(body) => &body.run,
        }
    }
}

impl DeliveryBody {
    /// The same, to be brought up to date.
    pub fn run_mut(&mut self) -> &mut RunRef {
        match self {
            Self::Result(body) => &mut body.run,
            Self::EpochMetrics(body) => &mut body.run,
            Self::Files(body) => &mut body.run,
            Self::RunStart(body) => &mut body.run,
            Self::RunMetrics(body) => &mut body.run,
            Self::RunEnd(body) => &mut body.run,
        }
    }
}

/// The end of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResultBody {
    /// The run.
    pub run: RunRef,
    /// The message, an object with `task_id`, `status`, `fitness` and the rest.
    pub message: Json,
    /// The queue entry to acknowledge with it, when the job came from one.
    pub entry: Option<QueueEntry>,
}

/// An entry of a shared queue.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct QueueEntry {
    /// Key of the stream or list.
    pub queue: String,
    /// Identity of the entry in it: the stream's, or the element itself of a list.
    pub id: String,
    /// True for a list.
    pub is_list: bool,
}

/// Metrics of an epoch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EpochBody {
    /// The run.
    pub run: RunRef,
    /// From 1.
    pub epoch: u32,
    /// By the names of `results.csv`.
    pub metrics: Map<String, Json>,
    /// When, Unix milliseconds.
    pub at_unix_ms: i64,
}

/// When files are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FilesMoment {
    /// A checkpoint was written: it, the weights and the small files that changed.
    Checkpoint,
    /// The job ended: everything.
    End,
}

/// Files of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FilesBody {
    /// The run.
    pub run: RunRef,
    /// Earlier submissions that it goes on from, newest first: what was stored of them is what was stored of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub continues: Vec<String>,
    /// When.
    pub moment: FilesMoment,
    /// `running`, `completed`, `failed` or `cancelled`.
    pub status: String,
    /// Epochs finished.
    pub epoch: u32,
    /// Optimiser steps taken.
    pub step: u64,
    /// The newest metrics by the names of `results.csv`.
    pub metrics: Map<String, Json>,
    /// The score and its name, when there is one.
    pub fitness: Option<f64>,
    /// See above.
    pub fitness_name: String,
    /// Identity of the validation images, when known: weights are compared on the same ones only.
    pub val_fingerprint: Option<String>,
}

impl FilesBody {
    /// True when what was stored under this instance is an earlier state of the same run.
    pub fn is_of(&self, instance: &str) -> bool {
        self.run.instance == instance || self.continues.iter().any(|earlier| earlier == instance)
    }
}

/// A run begins (or goes on: the same instance is the same run).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunStartBody {
    /// The run.
    pub run: RunRef,
    /// When, Unix milliseconds.
    pub at_unix_ms: i64,
    /// Parameters.
    pub params: Vec<(String, String)>,
    /// Tags.
    pub tags: Vec<(String, String)>,
}

/// One sample of a metric.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricPoint {
    /// Name.
    pub key: String,
    /// Value; not finite values are not sent.
    pub value: f64,
    /// When it was measured, Unix milliseconds.
    pub at_unix_ms: i64,
    /// Epoch or step.
    pub step: i64,
}

/// Samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunMetricsBody {
    /// The run.
    pub run: RunRef,
    /// The samples.
    pub points: Vec<MetricPoint>,
}

/// A run ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunEndBody {
    /// The run.
    pub run: RunRef,
    /// `completed`, `failed` or `cancelled`.
    pub status: String,
    /// Why, in a sentence.
    pub reason: String,
    /// When, Unix milliseconds.
    pub at_unix_ms: i64,
    /// The last metrics, by the names of `results.csv`.
    pub metrics: Map<String, Json>,
    /// Epochs trained; `None` for an evaluation, and in deliveries of earlier versions.
    #[serde(default)]
    pub epochs: Option<u32>,
    /// The score and its name, when there is one.
    pub fitness: Option<f64>,
    /// See above.
    pub fitness_name: String,
    /// Where the best weights lie in the object store, when there is one.
    pub best_url: Option<String>,
    /// Identity of the validation images, when known.
    pub val_fingerprint: Option<String>,
}
