//! The service's configuration: one file, every key commented, the environment over it.
//!
//! The shipped file `configs/service/boxwright.yaml` is the reference of the keys; a test keeps it equal to the
//! defaults here.

mod fleet;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use fleet::{MlflowConfig, OutboxConfig, RedisConfig, RedisKind, StoreConfig};

use super::slot::{GPU_NUMBER_MAX, GpuChoice};
use super::spec::SpecContext;
use super::state::{FailureClass, RetryPolicy};
use crate::yaml::{self, Faults, MapReader, Node, YamlError};

/// Everything that a service can be told.
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceConfig {
    /// Folder of dropped jobs.
    pub configs_dir: PathBuf,
    /// Folder of stop files.
    pub stop_dir: Option<PathBuf>,
    /// Journal, lock, specifications of running jobs.
    pub state_dir: PathBuf,
    /// Root of the run folders.
    pub runs_dir: PathBuf,
    /// Name of this machine: as it was set, else the host name, which a service replaces by that of its first start.
    pub machine_id: String,
    /// The name was set, here or in the environment.
    pub is_machine_id_set: bool,
    /// Refuse jobs with keys without effect.
    pub strict: bool,
    /// Prefixes of data paths and what they become.
    pub data_path_map: Vec<(String, String)>,
    /// Merged under every job.
    pub base: Option<Node>,
    /// Cap on graphics memory, percent.
    pub max_gpu_percent: u32,
    /// When the folders are read and files are taken.
    pub watch: WatchConfig,
    /// Obey a stop file that is older than the job.
    pub stop_honour_stale: bool,
    /// Time for a trainer to save and leave after a stop.
    pub stop_grace_ms: u64,
    /// Jobs at the same time on the CPU.
    pub cpu_slots: usize,
    /// GPUs that train, one job each.
    pub gpus: GpuChoice,
    /// A waiting job rises one class after this time.
    pub ageing_ms: i64,
    /// The trainer's program; `None` is this program.
    pub trainer_program: Option<PathBuf>,
    /// Silence after which a trainer is taken as stuck.
    pub stall_timeout_ms: u64,
    /// Retries by class.
    pub retry: BTreeMap<FailureClass, RetryPolicy>,
    /// Limit of a shutdown.
    pub shutdown_limit_ms: u64,
    /// Logs.
    pub logging: LoggingConfig,
    /// The shared queue.
    pub redis: RedisConfig,
    /// The object store.
    pub store: StoreConfig,
    /// The tracking server.
    pub mlflow: MlflowConfig,
    /// What waits for delivery to them.
    pub outbox: OutboxConfig,
    /// What is remembered.
    pub journal: JournalConfig,
}

/// How long the journal remembers what has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalConfig {
    /// Days after its end that a job is kept; 0 for ever.
    pub keep_days: u32,
}

impl JournalConfig {
    /// The same in milliseconds.
    pub fn keep_ms(self) -> i64 {
        i64::from(self.keep_days) * 24 * 3_600_000
    }
}

/// When the watched folders are read and files are taken; all in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchConfig {
    /// Between two readings without an event.
    pub poll_interval_ms: u64,
    /// Rest of a file that was closed or renamed.
    pub closed_settle_ms: u64,
    /// Rest of a file of which only size and time are known.
    pub settle_ms: u64,
    /// Rest of a file that is still held open by its writer.
    pub open_settle_ms: u64,
}

/// What is logged and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoggingConfig {
    /// Least level: TRACE, DEBUG, INFO, WARNING, ERROR.
    pub level: String,
    /// simple, detailed or json.
    pub format: String,
    /// Folder.
    pub dir: PathBuf,
    /// Daily files kept.
    pub files_max: usize,
    /// Job logs kept.
    pub job_files_max: usize,
}

/// Why there is no service configuration.
#[derive(Debug, thiserror::Error)]
pub enum ServiceConfigError {
    /// The file cannot be read.
    #[error("cannot read the service configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is no YAML.
    #[error(transparent)]
    Yaml(#[from] YamlError),
    /// Its keys or values are wrong.
    #[error("{0}")]
    Faults(Faults),
}

impl Default for ServiceConfig {
    fn default() -> Self {
        let policy = |budget, delay_s: u64, delay_s_max: u64| RetryPolicy {
            budget,
            delay_ms: delay_s * 1000,
            delay_ms_max: delay_s_max * 1000,
        };
        Self {
            configs_dir: "configs".into(),
            stop_dir: None,
            state_dir: "state".into(),
            runs_dir: "runs".into(),
            machine_id: sysinfo::System::host_name().unwrap_or_else(|| "localhost".to_owned()),
            is_machine_id_set: false,
            strict: false,
            data_path_map: Vec::new(),
            base: None,
            max_gpu_percent: 100,
            watch: WatchConfig {
                poll_interval_ms: 2000,
                closed_settle_ms: 100,
                settle_ms: 1000,
                open_settle_ms: 10_000,
            },
            stop_honour_stale: false,
            stop_grace_ms: 120_000,
            cpu_slots: 1,
            gpus: GpuChoice::All,
            ageing_ms: 60 * 60_000,
            trainer_program: None,
            stall_timeout_ms: 3_600_000,
            retry: BTreeMap::from([
                (FailureClass::Memory, policy(2, 30, 600)),
                (FailureClass::Device, policy(3, 30, 600)),
                (FailureClass::Storage, policy(3, 60, 1800)),
                (FailureClass::Killed, policy(3, 5, 600)),
            ]),
            shutdown_limit_ms: 30_000,
            logging: LoggingConfig {
                level: "INFO".into(),
                format: "detailed".into(),
                dir: "logs".into(),
                files_max: 14,
                job_files_max: 200,
            },
            redis: RedisConfig::default(),
            store: StoreConfig::default(),
            mlflow: MlflowConfig::default(),
            outbox: OutboxConfig::default(),
            journal: JournalConfig { keep_days: 90 },
        }
    }
}

impl ServiceConfig {
    /// Reads the file when one is given, then the environment through `variable`.
    ///
    /// # Errors
    /// Everything that is wrong with either, at once.
    pub fn load(
        path: Option<&Path>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, ServiceConfigError> {
        let mut config = Self::default();
        if let Some(path) = path {
            let text = std::fs::read(path)
                .map_err(|source| ServiceConfigError::Read { path: path.to_owned(), source })?;
            let name = path.to_string_lossy();
            let root = yaml::parse(&text, &name)?;
            let mut faults = Faults::new(&name);
            config.read(&root, &mut faults);
            faults.into_result(()).map_err(ServiceConfigError::Faults)?;
        }
        let mut faults = Faults::new("environment");
        config.environment(variable, &mut faults);
        faults.into_result(config).map_err(ServiceConfigError::Faults)
    }

    /// The folder of stop files.
    pub fn stop_dir(&self) -> PathBuf {
        self.stop_dir.clone().unwrap_or_else(|| self.configs_dir.join("stop"))
    }

    /// What this service adds to every job; relative paths start at `working_dir`.
    pub fn spec_context(&self, working_dir: PathBuf) -> SpecContext {
        SpecContext {
            base: self.base.clone(),
            strict: self.strict,
            runs_dir: self.runs_dir.clone(),
            working_dir,
            data_path_map: self.data_path_map.clone(),
        }
    }

    fn environment(&mut self, variable: impl Fn(&str) -> Option<String>, faults: &mut Faults) {
        let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        for (name, target) in [
            ("CONFIGS_DIR", &mut self.configs_dir),
            ("STATE_DIR", &mut self.state_dir),
            ("RESULT_PATH", &mut self.runs_dir),
            ("LOG_DIR", &mut self.logging.dir),
        ] {
            if let Some(value) = set(name) {
                *target = value.into();
            }
        }
        if let Some(value) = set("STOP_DIR") {
            self.stop_dir = Some(value.into());
        }
        if let Some(value) = set("MACHINE_ID") {
            (self.machine_id, self.is_machine_id_set) = (value, true);
        }
        if let Some(value) = set("BOXWRIGHT_TRAINER") {
            self.trainer_program = Some(value.into());
        }
        if let Some(value) = set("MAX_GPU") {
            let node = Node::synthetic(yaml::Value::String(value));
            if let Some(percent) = faults.int(&node, "MAX_GPU", 1, 100) {
                self.max_gpu_percent = percent as u32;
            }
        }
        self.redis.environment(&set, faults);
        self.store.environment(&set, faults);
        self.mlflow.environment(&set, faults);
    }

    fn read(&mut self, root: &Node, faults: &mut Faults) {
        let Some(mut reader) = MapReader::new(root, "", faults) else { return };
        path(&mut reader, "configs_dir", &mut self.configs_dir, faults);
        path(&mut reader, "state_dir", &mut self.state_dir, faults);
        path(&mut reader, "runs_dir", &mut self.runs_dir, faults);
        optional_path(&mut reader, "stop_dir", &mut self.stop_dir, faults);
        if let Some(node) = reader.set("machine_id")
            && let Some(name) = faults.text(node, "machine_id")
        {
            (self.machine_id, self.is_machine_id_set) = (name, true);
        }
        flag(&mut reader, "strict", &mut self.strict, faults);
        if let Some(node) = reader.set("base") {
            match MapReader::new(node, "base", faults) {
                // Places inside the service's file would mislead in messages about a job.
                Some(_) if node.as_mapping().is_some_and(|entries| !entries.is_empty()) => {
                    self.base = Some(Node::from_json(&node.to_json()));
                }
                _ => {}
            }
        }
        if let Some(node) = reader.set("data_path_map") {
            self.read_data_path_map(node, faults);
        }
        let mut percent = u64::from(self.max_gpu_percent);
        whole(&mut reader, "max_gpu_percent", &mut percent, 1, 100, faults);
        self.max_gpu_percent = percent as u32;
        self.read_blocks(&mut reader, faults);
        self.redis.read(&mut reader, faults);
        self.store.read(&mut reader, faults);
        self.mlflow.read(&mut reader, faults);
        self.outbox.read(&mut reader, faults);
        reader.finish(faults);
    }

    fn read_data_path_map(&mut self, node: &Node, faults: &mut Faults) {
        if MapReader::new(node, "data_path_map", faults).is_none() {
            return;
        }
        for entry in node.as_mapping().unwrap_or_default() {
            if let Some(text) = faults.text(&entry.value, &format!("data_path_map.{}", entry.key)) {
                self.data_path_map.push((entry.key.clone(), text));
            }
        }
    }

    fn read_blocks(&mut self, reader: &mut MapReader<'_>, faults: &mut Faults) {
        if let Some(mut block) = block(reader, "watch", faults) {
            let watch = &mut self.watch;
            for (key, target, min) in [
                ("poll_interval_ms", &mut watch.poll_interval_ms, 50),
                ("closed_settle_ms", &mut watch.closed_settle_ms, 0),
                ("settle_ms", &mut watch.settle_ms, 10),
                ("open_settle_ms", &mut watch.open_settle_ms, 10),
            ] {
                whole(&mut block, key, target, min, 3_600_000, faults);
            }
            block.finish(faults);
        }
        if let Some(mut block) = block(reader, "stop", faults) {
            flag(&mut block, "honour_stale", &mut self.stop_honour_stale, faults);
            seconds(&mut block, "grace_seconds", &mut self.stop_grace_ms, faults);
            block.finish(faults);
        }
        if let Some(mut block) = block(reader, "slots", faults) {
            let mut slots = self.cpu_slots as u64;
            whole(&mut block, "cpu", &mut slots, 0, 64, faults);
            self.cpu_slots = slots as usize;
            if let Some(node) = block.set("gpus") {
                self.gpus = read_gpus(node, faults).unwrap_or_default();
            }
            block.finish(faults);
        }
        if let Some(mut block) = block(reader, "scheduling", faults) {
            if let Some(node) = block.set("ageing_minutes") {
                let minutes = faults.float(node, "scheduling.ageing_minutes", 0.001, 1e6);
                self.ageing_ms = minutes.map_or(self.ageing_ms, |minutes| (minutes * 60_000.0) as i64);
            }
            block.finish(faults);
        }
        if let Some(mut block) = block(reader, "trainer", faults) {
            optional_path(&mut block, "program", &mut self.trainer_program, faults);
            seconds(&mut block, "stall_timeout_seconds", &mut self.stall_timeout_ms, faults);
            block.finish(faults);
        }
        if let Some(mut block) = block(reader, "retry", faults) {
            for (class, policy) in &mut self.retry {
                read_policy(&mut block, class.as_str(), policy, faults);
            }
            block.finish(faults);
        }
        if let Some(mut block) = block(reader, "shutdown", faults) {
            seconds(&mut block, "limit_seconds", &mut self.shutdown_limit_ms, faults);
            block.finish(faults);
        }
        if let Some(mut block) = block(reader, "logging", faults) {
            self.logging.read(&mut block, faults);
            block.finish(faults);
        }
        if let Some(mut block) = block(reader, "journal", faults) {
            let mut days = u64::from(self.journal.keep_days);
            whole(&mut block, "keep_days", &mut days, 0, 36_500, faults);
            self.journal.keep_days = days as u32;
            block.finish(faults);
        }
    }
}

impl LoggingConfig {
    fn read(&mut self, block: &mut MapReader<'_>, faults: &mut Faults) {
        let levels = ["TRACE", "DEBUG", "INFO", "WARNING", "ERROR"];
        if let Some(word) = block.set("level").and_then(|node| faults.choice(node, "logging.level", &levels))
        {
            self.level = word.to_owned();
        }
        let formats = ["simple", "detailed", "json"];
        if let Some(word) =
            block.set("format").and_then(|node| faults.choice(node, "logging.format", &formats))
        {
            self.format = word.to_owned();
        }
        path(block, "dir", &mut self.dir, faults);
        for (key, target) in [("files_max", &mut self.files_max), ("job_files_max", &mut self.job_files_max)]
        {
            let mut number = *target as u64;
            whole(block, key, &mut number, 1, 100_000, faults);
            *target = number as usize;
        }
    }
}

fn block<'a>(reader: &mut MapReader<'a>, key: &str, faults: &mut Faults) -> Option<MapReader<'a>> {
    let node = reader.set(key)?;
    MapReader::new(node, &reader.path_of(key), faults)
}

fn path(reader: &mut MapReader<'_>, key: &str, target: &mut PathBuf, faults: &mut Faults) {
    if let Some(node) = reader.set(key)
        && let Some(text) = faults.text(node, &reader.path_of(key))
    {
        *target = text.into();
    }
}

fn text(reader: &mut MapReader<'_>, key: &str, target: &mut String, faults: &mut Faults) {
    if let Some(node) = reader.set(key)
        && let Some(text) = faults.text(node, &reader.path_of(key))
    {
        *target = text;
    }
}

fn optional_text(reader: &mut MapReader<'_>, key: &str, target: &mut Option<String>, faults: &mut Faults) {
    if let Some(node) = reader.set(key) {
        *target = faults.text(node, &reader.path_of(key));
    }
}

fn optional_path(reader: &mut MapReader<'_>, key: &str, target: &mut Option<PathBuf>, faults: &mut Faults) {
    if let Some(node) = reader.set(key) {
        *target = faults.text(node, &reader.path_of(key)).map(PathBuf::from);
    }
}

fn flag(reader: &mut MapReader<'_>, key: &str, target: &mut bool, faults: &mut Faults) {
    if let Some(node) = reader.set(key) {
        *target = faults.boolean(node, &reader.path_of(key)).unwrap_or(*target);
    }
}

fn whole(reader: &mut MapReader<'_>, key: &str, target: &mut u64, min: i64, max: i64, faults: &mut Faults) {
    if let Some(node) = reader.set(key)
        && let Some(number) = faults.int(node, &reader.path_of(key), min, max)
    {
        *target = number as u64;
    }
}

/// Reads seconds (fractions allowed, above 0) into milliseconds.
fn seconds(reader: &mut MapReader<'_>, key: &str, target_ms: &mut u64, faults: &mut Faults) {
    if let Some(node) = reader.set(key)
        && let Some(seconds) = faults.float(node, &reader.path_of(key), 0.001, 1e7)
    {
        *target_ms = (seconds * 1000.0) as u64;
    }
}

/// `all`, `none`, or a list of numbers.
fn read_gpus(node: &Node, faults: &mut Faults) -> Option<GpuChoice> {
    let key = "slots.gpus";
    if let Some(items) = node.as_sequence() {
        let numbers = items.iter().map(|item| faults.int(item, key, 0, GPU_NUMBER_MAX));
        let numbers: Option<Vec<usize>> = numbers.map(|number| number.map(|n| n as usize)).collect();
        return numbers.map(|n| if n.is_empty() { GpuChoice::None } else { GpuChoice::Only(n) });
    }
    match node.as_text().as_deref() {
        Some("all") => Some(GpuChoice::All),
        Some("none") => Some(GpuChoice::None),
        _ => {
            faults.refuse(node, key, "all, none, or a list of numbers such as [0, 2]");
            None
        }
    }
}

fn read_policy(reader: &mut MapReader<'_>, class: &str, policy: &mut RetryPolicy, faults: &mut Faults) {
    let Some(mut block) = block(reader, class, faults) else { return };
    let mut budget = u64::from(policy.budget);
    whole(&mut block, "budget", &mut budget, 0, 1000, faults);
    policy.budget = budget as u32;
    seconds(&mut block, "delay_seconds", &mut policy.delay_ms, faults);
    seconds(&mut block, "delay_seconds_max", &mut policy.delay_ms_max, faults);
    block.finish(faults);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shipped() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/service/boxwright.yaml")
    }

    #[test]
    fn the_shipped_file_is_the_defaults_and_names_every_key() {
        let config = ServiceConfig::load(Some(&shipped()), |_| None).expect("the shipped file is valid");
        assert_eq!(config, ServiceConfig::default());
        let text = std::fs::read_to_string(shipped()).expect("readable");
        let misspelt =
            text.replace("poll_interval_ms:", "pol_interval_ms:").replace("\nstrict:", "\nstricct:");
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("boxwright.yaml");
        std::fs::write(&path, misspelt).expect("writable");
        let error = ServiceConfig::load(Some(&path), |_| None).expect_err("two typos").to_string();
        assert!(
            error.contains("key `watch.pol_interval_ms`: unknown key; did you mean `poll_interval_ms`?"),
            "{error}"
        );
        assert!(error.contains("key `stricct`: unknown key; did you mean `strict`?"), "{error}");
    }

    #[test]
    fn every_key_is_read_and_checked() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s.yaml");
        std::fs::write(
            &path,
            "configs_dir: c\nslots: {cpu: 3}\nretry: {killed: {budget: 9, delay_seconds: 0.05}}\nbase: {train: {epochs: 2}}\n\
             data_path_map: {/d/: /e/}\nstop: {honour_stale: yes, grace_seconds: 1.5}\ntrainer: {program: /bin/x}\n\
             journal: {keep_days: 7}\n",
        )
        .expect("writable");
        let config = ServiceConfig::load(Some(&path), |_| None).expect("valid");
        assert_eq!((config.cpu_slots, config.stop_grace_ms, config.stop_honour_stale), (3, 1500, true));
        assert_eq!(
            (config.retry[&FailureClass::Killed].budget, config.retry[&FailureClass::Killed].delay_ms),
            (9, 50)
        );
        assert_eq!(config.stop_dir(), Path::new("c/stop"));
        assert_eq!(config.journal.keep_ms(), 7 * 24 * 3_600_000);
        assert_eq!(config.data_path_map, [("/d/".to_owned(), "/e/".to_owned())]);
        assert!(config.base.is_some() && config.trainer_program == Some("/bin/x".into()));
        assert_eq!(config.gpus, GpuChoice::All);
        for (text, gpus) in [
            ("all", GpuChoice::All),
            ("none", GpuChoice::None),
            ("[]", GpuChoice::None),
            ("[0, 2]", GpuChoice::Only(vec![0, 2])),
        ] {
            std::fs::write(&path, format!("slots: {{cpu: 0, gpus: {text}}}\n")).expect("writable");
            let config = ServiceConfig::load(Some(&path), |_| None).expect("valid");
            assert_eq!((config.cpu_slots, config.gpus), (0, gpus), "{text}");
        }
        std::fs::write(
            &path,
            "slots: {cpu: -1, gpus: some}\nwatch: 3\nretry: {config: {budget: 1}}\nlogging: {level: LOUD}\n",
        )
        .expect("writable");
        let error = ServiceConfig::load(Some(&path), |_| None).expect_err("five faults").to_string();
        assert_eq!(error.lines().count(), 5, "{error}");
    }

    #[test]
    fn the_environment_wins() {
        let variable = |name: &str| match name {
            "CONFIGS_DIR" => Some("/config_versions".to_owned()),
            "STOP_DIR" => Some("/config".to_owned()),
            "RESULT_PATH" => Some("/results".to_owned()),
            "MAX_GPU" => Some("60".to_owned()),
            "MACHINE_ID" => Some("box-7".to_owned()),
            _ => None,
        };
        let config = ServiceConfig::load(None, variable).expect("valid");
        assert_eq!(config.configs_dir, Path::new("/config_versions"));
        assert_eq!(config.stop_dir(), Path::new("/config"));
        assert_eq!(config.runs_dir, Path::new("/results"));
        assert_eq!((config.max_gpu_percent, config.machine_id.as_str()), (60, "box-7"));
        assert!(config.is_machine_id_set && !ServiceConfig::default().is_machine_id_set);
        let error = ServiceConfig::load(None, |name| (name == "MAX_GPU").then(|| "300".to_owned()));
        assert!(error.expect_err("300 percent").to_string().contains("key `MAX_GPU`: got \"300\""));
    }
}
