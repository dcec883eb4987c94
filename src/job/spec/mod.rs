//! The job: from a YAML file to an immutable specification.
//!
//! [`JobSpec::load`] merges the service's base configuration under the file, checks every key, and says of each one
//! whether it was understood, ignored (with the reason) or overridden. Everything that is wrong is reported at once.
//! Well-formed values that ask for what this build does not do are kept apart ([`LoadedSpec::refused`]): the file is no
//! mistake, but it cannot run here.

mod blocks;
mod evaluation;
mod mask;
mod overlay;
mod paths;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ids::{NAME_ALLOWED, TaskId};
use crate::train::args::TrainArgs;
use crate::yaml::{self, Faults, MapReader, Node, Value, YamlError};

pub use crate::train::child::JobMode;
pub use mask::masked;
pub use overlay::Overlay;

/// Values of `fitness` that this build reports.
pub const FITNESS_NAMES: &[&str] =
    &["fitness", "metrics/mAP50-95(B)", "metrics/mAP50(B)", "metrics/precision(B)", "metrics/recall(B)"];

/// How urgent a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// After the others.
    Low,
    /// The usual.
    #[default]
    Medium,
    /// Before the others.
    High,
}

/// A key and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyNote {
    /// Dotted path.
    pub key: String,
    /// The reason, in a sentence.
    pub reason: String,
}

/// Everything that a job is. It never changes once accepted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Identity; random when the file gives none.
    pub task_id: TaskId,
    /// Whether it trains or evaluates.
    #[serde(default)]
    pub mode: JobMode,
    /// `yolo`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The training arguments, `model` and `data` included.
    pub args: TrainArgs,
    /// Root of the result tree.
    pub tempfile: PathBuf,
    /// Study, a component of the run folder.
    pub study_name: String,
    /// Version of the study.
    pub version: Option<i64>,
    /// Index inside the study, a component of the run folder.
    pub trial_number: u32,
    /// How urgent it is.
    pub priority: Priority,
    /// Which result is reported as the score.
    pub fitness: String,
    /// Validate only.
    pub dry_run: bool,
    /// Retries of each class, when the job sets them.
    pub retries_max: Option<u32>,
    /// Delay before the first retry in milliseconds, when the job sets it.
    pub retry_delay_ms: Option<u64>,
    /// Least level of the job's log, when the job sets it.
    pub log_level: Option<String>,
    /// Format of the job's log, when the job sets it.
    pub log_format: Option<String>,
    /// Share of a GPU's memory that the job may take, when the job sets it.
    #[serde(default)]
    pub gpu_share_max: Option<f64>,
    /// It waits for a GPU, any of them, where it could otherwise go to the CPU.
    #[serde(default)]
    pub requires_gpu: bool,
    /// Bookkeeping of the submitter, kept with the job and shown, never acted on.
    pub bookkeeping: serde_json::Map<String, serde_json::Value>,
    /// Keys that were given and do what they say.
    pub understood: Vec<String>,
    /// Keys that were given and have no effect.
    pub ignored: Vec<KeyNote>,
    /// Keys that were given and whose value was replaced.
    pub overridden: Vec<KeyNote>,
    /// The merged configuration with secrets masked, as written to `config.effective.yaml`.
    pub effective: serde_json::Value,
}

/// What a service adds to every job.
#[derive(Debug, Clone, PartialEq)]
pub struct SpecContext {
    /// Merged under every job.
    pub base: Option<Node>,
    /// Make a fault of every ignored key.
    pub strict: bool,
    /// `tempfile` when the job gives none.
    pub runs_dir: PathBuf,
    /// Folder that relative paths start from.
    pub working_dir: PathBuf,
    /// Prefixes of paths (data, weights, files of messages) and what they become here.
    pub data_path_map: Vec<(String, String)>,
}

/// A specification that was read, and what it asks for that this build does not do.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadedSpec {
    /// The specification.
    pub spec: JobSpec,
    /// Reasons why it cannot run here.
    pub refused: Faults,
}

/// Why a text is no job.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// It is no YAML.
    #[error(transparent)]
    Yaml(#[from] YamlError),
    /// Its keys or values are wrong.
    #[error("{0}")]
    Faults(Faults),
}

impl LoadedSpec {
    /// The specification when it can run here.
    ///
    /// # Errors
    /// The refusals, all of them.
    pub fn runnable(self) -> Result<JobSpec, SpecError> {
        self.refused.into_result(self.spec).map_err(SpecError::Faults)
    }
}

impl JobSpec {
    /// Reads a job from the bytes of a file called `source`.
    ///
    /// # Errors
    /// Everything that is wrong with it, with file, line and key; refusals are listed along when there are faults.
    pub fn load(text: &[u8], source: &str, context: &SpecContext) -> Result<LoadedSpec, SpecError> {
        Self::load_over(text, source, context, &Overlay::default())
    }

    /// The same for a text that came with a message, whose values win over it.
    ///
    /// # Errors
    /// As [`JobSpec::load`]; a value of the message that is wrong has no line.
    pub fn load_over(
        text: &[u8],
        source: &str,
        context: &SpecContext,
        overlay: &Overlay,
    ) -> Result<LoadedSpec, SpecError> {
        let file = yaml::parse(text, source)?;
        let mut merged = match &context.base {
            Some(base) => base.merged_with(&file),
            None => file,
        };
        let mut loader = Loader::new(source, context);
        loader.lay_over(&mut merged, overlay);
        loader.mode = evaluation::mode_of(&merged);
        loader.spare_id = overlay.task_id.clone();
        let spec = loader.job(&merged);
        let Loader { mut faults, refused, .. } = loader;
        match spec {
            Some(spec) if faults.is_empty() => Ok(LoadedSpec { spec, refused }),
            _ => {
                faults.extend(refused.list().iter().cloned());
                Err(SpecError::Faults(faults))
            }
        }
    }

    /// The run folder: `{tempfile}/models/{study_name}/{type}/{task_id}/{trial}/train_{task_id}`.
    pub fn run_dir(&self) -> PathBuf {
        self.tempfile
            .join("models")
            .join(&self.study_name)
            .join(&self.kind)
            .join(self.task_id.as_str())
            .join(self.trial_number.to_string())
            .join(format!("train_{}", self.task_id))
    }
}

/// Collects while a job is read.
struct Loader<'a> {
    context: &'a SpecContext,
    mode: JobMode,
    /// The task id when nothing names one.
    spare_id: Option<TaskId>,
    faults: Faults,
    refused: Faults,
    understood: Vec<String>,
    ignored: Vec<KeyNote>,
    overridden: Vec<KeyNote>,
    bookkeeping: serde_json::Map<String, serde_json::Value>,
}

impl<'a> Loader<'a> {
    fn new(source: &str, context: &'a SpecContext) -> Self {
        Self {
            context,
            mode: JobMode::Train,
            spare_id: None,
            faults: Faults::new(source),
            refused: Faults::new(source),
            understood: Vec::new(),
            ignored: Vec::new(),
            overridden: Vec::new(),
            bookkeeping: serde_json::Map::new(),
        }
    }

    fn understand(&mut self, key: impl Into<String>) {
        self.understood.push(key.into());
    }

    fn ignore(&mut self, key: impl Into<String>, reason: impl Into<String>) {
        self.ignored.push(KeyNote { key: key.into(), reason: reason.into() });
    }

    fn override_(&mut self, key: impl Into<String>, reason: impl Into<String>) {
        self.overridden.push(KeyNote { key: key.into(), reason: reason.into() });
    }

    fn refuse(&mut self, line: usize, key: &str, message: impl Into<String>) {
        self.refused.add(line, key, message);
    }

    /// Reads the whole document; `None` when a fault left nothing to use.
    fn job(&mut self, root: &Node) -> Option<JobSpec> {
        let mut reader = MapReader::new(root, "", &mut self.faults)?;
        let model = self.model(&mut reader);
        let kind = self.kind(&mut reader);
        let task_id = self.task_id(&mut reader);
        let tempfile = self.tempfile(&mut reader);
        let train =
            reader.required("train", "the training arguments (`train.data` at least)", &mut self.faults);
        let mut args = train.and_then(|train| self.train(train, model.as_deref()));
        let sweeper = self.sweeper(reader.set("sweeper"));
        let trial_number = match reader.set("trial_number") {
            Some(node) => self.faults.int(node, "trial_number", 0, 1_000_000).map(|number| {
                self.understand("trial_number");
                number as u32
            }),
            None => Some(1),
        };
        let priority = match reader.set("priority") {
            Some(node) => self.priority(node, "priority"),
            None => sweeper.priority,
        };
        let fitness = match reader.set("fitness") {
            Some(node) => self.fitness(node, "fitness"),
            None => sweeper.fitness,
        };
        let flag = |loader: &mut Self, reader: &mut MapReader<'_>, key: &str| {
            let node = reader.set(key)?;
            let flag = loader.faults.boolean(node, key)?;
            loader.understand(key);
            Some(flag)
        };
        let dry_run = flag(self, &mut reader, "dry_run").unwrap_or(false);
        let strict = flag(self, &mut reader, "strict").unwrap_or(false) || self.context.strict;
        let (retries_max, retry_delay_ms) = self.default_block(reader.set("default"));
        let (log_level, log_format) = self.logging(reader.set("logging"));
        let requires_gpu = flag(self, &mut reader, "requires_gpu").unwrap_or(false);
        let extras = self.extras(reader.set("extras"), args.as_ref().map(|args| args.device), requires_gpu);
        self.bookkeeping(&mut reader);
        self.ignored_blocks(&mut reader);
        reader.finish(&mut self.faults);
        if strict {
            for note in &self.ignored {
                let message = format!("has no effect ({}), which `strict` does not allow", note.reason);
                self.faults.add(0, &note.key, message);
            }
        }
        if let Some(args) = &mut args {
            self.device(args, extras.device, requires_gpu);
        }
        let effective = masked(&root.to_json());
        Some(JobSpec {
            task_id: task_id?,
            mode: self.mode,
            kind: kind?,
            args: args?,
            tempfile: tempfile?,
            study_name: sweeper.study_name,
            version: sweeper.version,
            trial_number: trial_number?,
            priority,
            fitness,
            dry_run,
            retries_max,
            retry_delay_ms,
            log_level,
            log_format,
            gpu_share_max: extras.gpu_share_max,
            requires_gpu,
            bookkeeping: std::mem::take(&mut self.bookkeeping),
            understood: std::mem::take(&mut self.understood),
            ignored: std::mem::take(&mut self.ignored),
            overridden: std::mem::take(&mut self.overridden),
            effective,
        })
    }

    fn model(&mut self, reader: &mut MapReader<'_>) -> Option<String> {
        let node = reader.required("model", "the model, e.g. yolov8n", &mut self.faults)?;
        let model = self.faults.text(node, "model")?;
        let lower = model.to_ascii_lowercase();
        let is_weights = lower.ends_with(".safetensors") || lower.ends_with(".pt");
        let model = if is_weights { self.place("model", &model) } else { model };
        let given = self.context.working_dir.join(&model);
        let is_file = is_weights && given.is_file();
        if self.mode == JobMode::Evaluate {
            self.evaluated_model(node, is_file);
            return is_file.then(|| given.to_string_lossy().into_owned());
        }
        match TrainArgs::model_refusal(&model) {
            // A weights file that is there says itself what it is for, whatever its name.
            Some(reason) if !is_file => {
                self.refuse(node.line, "model", format!("got {model:?}; not supported: {reason}"))
            }
            None if lower.ends_with(".pt") && !is_file => {
                let note =
                    "there is no such file: its name chooses the network, which starts from random weights";
                self.override_("model", note);
            }
            _ => {}
        }
        self.understand("model");
        Some(if is_file { given.to_string_lossy().into_owned() } else { model })
    }

    fn kind(&mut self, reader: &mut MapReader<'_>) -> Option<String> {
        let node = reader.required("type", "the kind of model: yolo or rtdetr", &mut self.faults)?;
        let kind = self.faults.choice(node, "type", &["yolo", "rtdetr"])?;
        if kind == "rtdetr" {
            self.refuse(node.line, "type", "got \"rtdetr\"; not supported: this build trains the type yolo");
        }
        self.understand("type");
        Some(kind.to_owned())
    }

    fn task_id(&mut self, reader: &mut MapReader<'_>) -> Option<TaskId> {
        let Some(node) = reader.set("task_id") else {
            return Some(self.spare_id.clone().unwrap_or_else(TaskId::random));
        };
        let text = self.faults.text(node, "task_id")?;
        match TaskId::try_from(text) {
            Ok(id) => {
                self.understand("task_id");
                Some(id)
            }
            Err(_) => {
                self.faults.refuse(node, "task_id", NAME_ALLOWED);
                None
            }
        }
    }

    fn tempfile(&mut self, reader: &mut MapReader<'_>) -> Option<PathBuf> {
        let Some(node) = reader.set("tempfile") else {
            return Some(self.context.working_dir.join(&self.context.runs_dir));
        };
        let text = self.faults.text(node, "tempfile")?;
        self.understand("tempfile");
        Some(self.context.working_dir.join(text))
    }

    /// Reads the training arguments and sets what the service decides itself.
    fn train(&mut self, node: &Node, model: Option<&str>) -> Option<TrainArgs> {
        let (args, report) = TrainArgs::read(node, "train", &mut self.faults);
        self.refused.extend(report.refused);
        for (key, reason) in report.no_effect {
            self.ignore(key, reason);
        }
        for key in report.honoured {
            match key.as_str() {
                "train.project" | "train.name" | "train.exist_ok" => {
                    self.override_(key, "the service gives every job its own run folder");
                }
                "train.model" => self.override_(key, "the job's `model` counts"),
                given if !evaluation::acts(self.mode, given) => {
                    self.ignore(key, "it acts on training; this job evaluates");
                }
                _ => self.understand(key),
            }
        }
        if node.get("data").is_none_or(Node::is_null) {
            self.faults.add(node.line, "train.data", "missing; it gives the dataset");
        }
        let mut args = args?;
        if self.mode == JobMode::Evaluate {
            evaluation::settle(&mut args, node);
        }
        args.model = model.unwrap_or_default().to_owned();
        (args.project, args.name, args.exist_ok) = (None, None, false);
        self.place_args(&mut args);
        Some(args)
    }

    fn priority(&mut self, node: &Node, key: &str) -> Priority {
        let word = self.faults.choice(node, key, &["high", "medium", "low"]);
        self.understand(key);
        match word {
            Some("high") => Priority::High,
            Some("low") => Priority::Low,
            _ => Priority::Medium,
        }
    }

    /// A fitness must be one of the reported names, exactly; names of other tasks are refused, not guessed.
    fn fitness(&mut self, node: &Node, key: &str) -> String {
        let name = self.faults.text(node, key).unwrap_or_default();
        let detection = FITNESS_NAMES.contains(&name.as_str());
        if detection {
            self.understand(key);
        } else if name.ends_with("(M)") || name.ends_with("(P)") || name.starts_with("metrics/accuracy") {
            self.refuse(
                node.line,
                key,
                format!("got {name:?}; not supported: this build reports detection metrics"),
            );
        } else if !name.is_empty() {
            self.faults.refuse(node, key, &format!("one of {}", FITNESS_NAMES.join(", ")));
        }
        name
    }

    /// Keeps what is only bookkeeping of the submitter.
    fn bookkeeping(&mut self, reader: &mut MapReader<'_>) {
        for key in blocks::BOOKKEEPING {
            if let Some(node) = reader.set(key) {
                self.bookkeeping.insert((*key).to_owned(), masked(&node.to_json()));
                self.understand(*key);
            }
        }
    }

    fn ignored_blocks(&mut self, reader: &mut MapReader<'_>) {
        for (key, reason) in blocks::IGNORED {
            if let Some(node) = reader.get(key) {
                let empty = matches!(&node.value, Value::Mapping(entries) if entries.is_empty());
                if !node.is_null() && !empty {
                    self.ignore(*key, *reason);
                }
            }
        }
    }
}
