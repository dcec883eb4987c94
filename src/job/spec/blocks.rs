//! The blocks of a job around `train`: study, retries, logs, extras, and those that have no effect here.

use super::{Loader, Priority};
use crate::job::ids::{NAME_ALLOWED, is_safe_name};
use crate::train::args::{Device, TrainArgs};
use crate::yaml::{MapReader, Node};

/// Top-level keys that are kept with the job and never acted on.
pub(super) const BOOKKEEPING: &[&str] = &[
    "metadata",
    "content",
    "documentation",
    "author",
    "user_id",
    "user_code",
    "study_id",
    "request_by",
    "experiment_name",
    "dvc_data_path",
];

/// Top-level keys without effect, and why.
pub(super) const IGNORED: &[(&str, &str)] = &[
    ("mlflow", "the service's own configuration names the tracking server"),
    ("minio", "the service's own configuration names the object store"),
    ("redis", "the service's own configuration names the Redis server"),
    ("dvc", "datasets are read from disk"),
    ("hydra", "this is no Hydra program"),
    ("defaults", "a job is one file"),
    ("genetic", "parameter search is not built; one run is made with the values under `train`"),
    ("val", "validation takes its keys from `train`"),
    ("test", "validation takes its keys from `train`"),
    ("debug", "there are no debug queues"),
    ("recreate", "use `boxwright resume` or `train.resume`"),
    ("config_path", "the service knows where the file lies"),
    ("path_results", "the service gives every job its own run folder"),
    ("timestamp", "the journal keeps its own times"),
];

/// Keys of `sweeper` without effect, and why.
const SWEEPER_IGNORED: &[&str] = &[
    "algorithm",
    "direction",
    "sampler",
    "pruner",
    "n_trials",
    "max_concurrent",
    "max_t",
    "cpu_per_trial",
    "gpu_per_trial",
    "grace_period",
    "tune",
    "storage",
    "search_space",
    "params",
];

/// What the study says.
pub(super) struct Sweeper {
    pub(super) study_name: String,
    pub(super) version: Option<i64>,
    pub(super) priority: Priority,
    pub(super) fitness: String,
}

/// What `extras` says.
#[derive(Default)]
pub(super) struct Extras {
    /// In place of `train.device`.
    pub(super) device: Option<Device>,
    /// Share of a GPU's memory that the job may take.
    pub(super) gpu_share_max: Option<f64>,
}

impl Loader<'_> {
    pub(super) fn sweeper(&mut self, node: Option<&Node>) -> Sweeper {
        let mut sweeper = Sweeper {
            study_name: "default".to_owned(),
            version: None,
            priority: Priority::default(),
            fitness: "fitness".to_owned(),
        };
        let Some(node) = node else { return sweeper };
        let Some(mut reader) = MapReader::new(node, "sweeper", &mut self.faults) else { return sweeper };
        if let Some(node) = reader.set("study_name")
            && let Some(name) = self.faults.text(node, "sweeper.study_name")
        {
            if is_safe_name(&name) {
                self.understand("sweeper.study_name");
                sweeper.study_name = name;
            } else {
                let allowed = format!("{NAME_ALLOWED} (it is part of the run folder's path)");
                self.faults.refuse(node, "sweeper.study_name", &allowed);
            }
        }
        if let Some(node) = reader.set("version") {
            sweeper.version = self.faults.int(node, "sweeper.version", 0, i64::MAX);
            self.understand("sweeper.version");
        }
        if let Some(node) = reader.set("priority") {
            sweeper.priority = self.priority(node, "sweeper.priority");
        }
        if let Some(node) = reader.set("fitness") {
            sweeper.fitness = self.fitness(node, "sweeper.fitness");
        }
        for key in SWEEPER_IGNORED {
            if reader.set(key).is_some() {
                let reason = "parameter search is not built; one run is made with the values under `train`";
                self.ignore(format!("sweeper.{key}"), reason);
            }
        }
        for (key, reason) in [
            ("debug", "there are no debug queues"),
            ("target_worker_queue", "there are no worker queues; the service that reads the file runs it"),
        ] {
            if reader.set(key).is_some() {
                self.ignore(format!("sweeper.{key}"), reason);
            }
        }
        reader.finish(&mut self.faults);
        sweeper
    }

    /// `default`: retries of this job. Older keys stand beside them without effect.
    pub(super) fn default_block(&mut self, node: Option<&Node>) -> (Option<u32>, Option<u64>) {
        let (mut retries_max, mut retry_delay_ms) = (None, None);
        let Some(node) = node else { return (None, None) };
        let Some(mut reader) = MapReader::new(node, "default", &mut self.faults) else { return (None, None) };
        if let Some(node) = reader.set("max_retries") {
            retries_max = self.faults.int(node, "default.max_retries", 0, 100).map(|number| number as u32);
            self.understand("default.max_retries");
        }
        if let Some(node) = reader.set("retry_delay") {
            let seconds = self.faults.float(node, "default.retry_delay", 0.0, 86_400.0);
            retry_delay_ms = seconds.map(|seconds| (seconds * 1000.0) as u64);
            self.understand("default.retry_delay");
        }
        for (key, reason) in [
            ("timeout", "a job has no time limit of its own; `train.time` is a budget in hours"),
            ("threshold", "the score threshold is `train.conf`"),
        ] {
            if reader.set(key).is_some() {
                self.ignore(format!("default.{key}"), reason);
            }
        }
        let rest: Vec<String> = reader.unknown().into_iter().map(|(entry, _)| entry.key.clone()).collect();
        for key in rest {
            self.ignore(format!("default.{key}"), "no setting of this name acts on a job");
        }
        (retries_max, retry_delay_ms)
    }

    pub(super) fn logging(&mut self, node: Option<&Node>) -> (Option<String>, Option<String>) {
        let (mut level, mut format) = (None, None);
        let Some(node) = node else { return (None, None) };
        let Some(mut reader) = MapReader::new(node, "logging", &mut self.faults) else { return (None, None) };
        if let Some(node) = reader.set("level") {
            let words = ["TRACE", "DEBUG", "INFO", "WARNING", "ERROR"];
            level = self.faults.choice(node, "logging.level", &words).map(str::to_owned);
            self.understand("logging.level");
        }
        if let Some(node) = reader.set("format") {
            let words = ["simple", "detailed", "json"];
            format = self.faults.choice(node, "logging.format", &words).map(str::to_owned);
            self.understand("logging.format");
        }
        reader.finish(&mut self.faults);
        (level, format)
    }

    /// `extras`: another way to say where the job computes; `train.device` is the `device` given. With `requires_gpu` a
    /// GPU that has no number is any GPU.
    pub(super) fn extras(
        &mut self,
        node: Option<&Node>,
        device: Option<Device>,
        requires_gpu: bool,
    ) -> Extras {
        let mut extras = Extras::default();
        let Some(node) = node else { return extras };
        let Some(mut reader) = MapReader::new(node, "extras", &mut self.faults) else { return extras };
        let mut flag = |key: &str| {
            let node = reader.set(key)?;
            self.faults.boolean(node, &format!("extras.{key}"))
        };
        let (force_cpu, force_gpu) = (flag("force_cpu"), flag("force_gpu"));
        let mut id = None;
        if let Some(node) = reader.set("gpu")
            && let Some(mut gpu) = MapReader::new(node, "extras.gpu", &mut self.faults)
        {
            id = gpu.set("id").and_then(|node| self.faults.int(node, "extras.gpu.id", 0, 1023));
            if let Some(node) = gpu.set("limit") {
                extras.gpu_share_max = self.gpu_limit(node);
            }
            gpu.finish(&mut self.faults);
        }
        reader.finish(&mut self.faults);
        let is_free = matches!(device, None | Some(Device::Default));
        if force_cpu.is_some() {
            self.understand("extras.force_cpu");
        }
        if force_cpu == Some(true) {
            extras.device = Some(Device::Cpu);
            if device.is_some_and(|device| matches!(device, Device::Cuda(_))) {
                self.override_("train.device", "`extras.force_cpu` wins");
            }
        }
        let wants_gpu = force_gpu == Some(true) && force_cpu != Some(true);
        match force_gpu {
            Some(true) if force_cpu == Some(true) => {
                self.ignore("extras.force_gpu", "`extras.force_cpu` wins");
            }
            Some(true) if device == Some(Device::Cpu) => {
                self.ignore("extras.force_gpu", "`train.device` says cpu");
            }
            Some(_) => self.understand("extras.force_gpu"),
            None => {}
        }
        if wants_gpu && is_free && (id.is_some() || !requires_gpu) {
            extras.device = Some(Device::Cuda(id.map_or(0, |id| id as usize)));
        }
        if id.is_some() {
            if wants_gpu && is_free {
                self.understand("extras.gpu.id");
            } else {
                let reason =
                    "it chooses the GPU of `extras.force_gpu`; `train.device: cuda:N` names one by itself";
                self.ignore("extras.gpu.id", reason);
            }
        }
        extras
    }

    /// Settles the device: what `extras` says, and never the CPU for a job that requires a GPU.
    pub(super) fn device(&mut self, args: &mut TrainArgs, extras: Option<Device>, requires_gpu: bool) {
        let asked = extras.unwrap_or(args.device);
        args.device = asked;
        if requires_gpu && asked == Device::Cpu {
            let key = if extras.is_some() { "extras.force_cpu" } else { "train.device" };
            self.override_(key, "`requires_gpu` wins");
            args.device = Device::Default;
        }
    }

    fn gpu_limit(&mut self, node: &Node) -> Option<f64> {
        let share = self.faults.float(node, "extras.gpu.limit", 0.01, 1.0)?;
        self.understand("extras.gpu.limit");
        Some(share)
    }
}
