//! Messages of the shared queue: from the fields of a stream's entry, or the payload of a list's, to the text of a job and
//! the values that win over it.
//!
//! Nothing here reads a file or a network: what a message says of files is asked of the caller's [`MessageFiles`]. What
//! comes out goes through [`JobSpec::load_over`](super::spec::JobSpec::load_over), the one merge of every way in. Start
//! reading at [`from_stream`] and [`from_list`].

mod fields;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use serde_json::{Map, Value as Json, json};
use sha2::{Digest, Sha256};

use super::delivery::QueueEntry;
use super::ids::TaskId;
use super::spec::Overlay;
use crate::yaml::Faults;
use fields::Fields;

/// Bytes of a job's text that are read, the limit of every way in.
pub const CONFIG_BYTES_MAX: usize = 1 << 20;
/// Bytes of a whole message: a job's text, twice encoded, and its fields.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Fields of a message.
pub const FIELDS_MAX: usize = 64;

/// What a list carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ListKind {
    /// `training_queue`: a job's file.
    Training,
    /// `recreate`: a job's file and the weights to go on from.
    Recreate,
    /// `evaluate`: weights and a dataset.
    Evaluate,
}

/// What lies at the path of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightsFound {
    /// Nothing.
    Missing,
    /// A file to start from.
    Weights,
    /// A checkpoint, or a file of a run folder that holds checkpoints: the run can go on.
    Resumable,
}

/// What a message needs to know of files. Relative paths start from the service's working folder, as those of a job do.
pub trait MessageFiles {
    /// The content of a job's file; more than [`CONFIG_BYTES_MAX`] bytes are refused, so one byte more is enough.
    ///
    /// # Errors
    /// Whatever the file system says.
    fn read_config(&mut self, path: &str) -> std::io::Result<Vec<u8>>;

    /// What lies at the path of weights.
    fn weights(&mut self, path: &str) -> WeightsFound;
}

/// A message as a job's text and the values above it.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// The text of the job, as it stands in the file or the message.
    pub text: Vec<u8>,
    /// Where it came from, for people: the queue, the entry and the file.
    pub source_name: String,
    /// Dotted keys of the job and the values that win over its text.
    pub overrides: Vec<(String, Json)>,
    /// Whether the message asks for a GPU, for a machine that has none and may leave the entry to others.
    pub requires_gpu: Option<bool>,
    /// The id of the job when nothing names one: the same on every machine that reads the entry.
    pub stable_id: TaskId,
    /// Fields that had no effect, a sentence each.
    pub warnings: Vec<String>,
}

impl Message {
    /// What is laid over the text when the job is read.
    pub fn overlay(&self) -> Overlay {
        Overlay { overrides: self.overrides.clone(), task_id: Some(self.stable_id.clone()) }
    }

    /// See [`content_hash`].
    pub fn content_sha256(&self) -> String {
        content_hash(&self.text, &self.overrides)
    }
}

/// Why a message is no job.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Larger than is read.
    #[error("{source_name}: the message has {bytes} bytes; at most {bytes_max} are read")]
    TooLarge {
        /// The entry.
        source_name: String,
        /// Its size.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// Its payload is no JSON object.
    #[error("{source_name}: got {seen}; allowed: a JSON object, or a JSON text that holds one")]
    NotAnObject {
        /// The entry.
        source_name: String,
        /// The beginning of it.
        seen: String,
        /// What the JSON reader says, when it is no JSON at all.
        #[source]
        source: Option<serde_json::Error>,
    },
    /// Its fields are wrong, all of them named.
    #[error("{0}")]
    Fields(Faults),
    /// The file that it names cannot be read here and now.
    #[error("{source_name}: field `{field}`: cannot read {}", path.display())]
    Unreadable {
        /// The entry.
        source_name: String,
        /// The field.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The weights that it names are not there.
    #[error("{source_name}: field `{field}`: {} does not exist", path.display())]
    MissingWeights {
        /// The entry.
        source_name: String,
        /// The field.
        field: &'static str,
        /// The file.
        path: PathBuf,
    },
}

impl MessageError {
    /// True when another try, or another machine, may succeed: a share that is not mounted yet, say.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Unreadable { source, .. } => source.kind() != std::io::ErrorKind::InvalidInput,
            Self::MissingWeights { .. } => true,
            Self::TooLarge { .. } | Self::NotAnObject { .. } | Self::Fields(_) => false,
        }
    }
}

/// Reads an entry of a stream: `config_path` (or `config`), `trial_number`, `task_id`, `priority`, `user_code`,
/// `requires_gpu`, `fitness`.
///
/// # Errors
/// [`MessageError`]: everything that is wrong with the fields at once, or the file that cannot be read.
pub fn from_stream(
    given: &[(String, Vec<u8>)],
    entry: &QueueEntry,
    files: &mut dyn MessageFiles,
) -> Result<Message, MessageError> {
    let bytes = given.iter().map(|(name, value)| name.len() + value.len()).sum();
    let start = Start::new(entry, bytes)?;
    let mut faults = Faults::new(&start.source_name);
    let mut map = Map::new();
    for (name, value) in given.iter().take(FIELDS_MAX + 1) {
        match std::str::from_utf8(value) {
            Ok(text) if map.insert(name.clone(), text.into()).is_some() => {
                faults.add(0, &shown(name), "is given twice; allowed: once");
            }
            Ok(_) => {}
            Err(error) => {
                let at = error.valid_up_to();
                faults.add(0, &shown(name), format!("is not UTF-8 at byte {at}; allowed: UTF-8 text"));
            }
        }
    }
    training(&start, &Json::Object(map), faults, files)
}

/// Reads an element of a list: JSON, or a JSON text that holds JSON.
///
/// # Errors
/// As [`from_stream`].
pub fn from_list(
    kind: ListKind,
    payload: &[u8],
    entry: &QueueEntry,
    files: &mut dyn MessageFiles,
) -> Result<Message, MessageError> {
    let start = Start::new(entry, payload.len())?;
    let map = start.object(payload)?;
    let faults = Faults::new(&start.source_name);
    match kind {
        ListKind::Training => training(&start, &map, faults, files),
        ListKind::Recreate => recreate(&start, &map, faults, files),
        ListKind::Evaluate => evaluate(&start, &map, faults, files),
    }
}

/// What is known of an entry before its fields are read.
struct Start {
    source_name: String,
    stable_id: TaskId,
}

impl Start {
    fn new(entry: &QueueEntry, bytes: usize) -> Result<Start, MessageError> {
        let stable_id = stable_id(&entry.queue, &entry.id);
        // An element of a list is its own identity, and too long to be read out.
        let id = if entry.is_list { &stable_id.as_str()[..8] } else { entry.id.as_str() };
        let source_name = format!("{} {}", shown(&entry.queue), shown(id));
        if bytes > MESSAGE_BYTES_MAX {
            return Err(MessageError::TooLarge { source_name, bytes, bytes_max: MESSAGE_BYTES_MAX });
        }
        Ok(Start { source_name, stable_id })
    }

    /// The object of a payload, taken out of one JSON text that may hold it.
    fn object(&self, payload: &[u8]) -> Result<Json, MessageError> {
        let fault = |seen: &[u8], source| MessageError::NotAnObject {
            source_name: self.source_name.clone(),
            seen: format!("{:?}", shown(&String::from_utf8_lossy(&seen[..seen.len().min(240)]))),
            source,
        };
        let outer: Json = serde_json::from_slice(payload).map_err(|e| fault(payload, Some(e)))?;
        let inner = match &outer {
            Json::String(text) => serde_json::from_str(text).map_err(|e| fault(text.as_bytes(), Some(e)))?,
            _ => outer,
        };
        if inner.is_object() { Ok(inner) } else { Err(fault(payload, None)) }
    }

    /// The message, unless something is wrong.
    fn message(&self, mut fields: Fields<'_>, job: Job) -> Result<Message, MessageError> {
        let mut overrides = fields.overrides();
        overrides.extend(job.overrides);
        let requires_gpu = fields.requires_gpu;
        let warnings = fields.warnings();
        let source_name = match &job.path {
            Some(path) => format!("{} ({})", self.source_name, shown(path)),
            None => self.source_name.clone(),
        };
        let stable_id = self.stable_id.clone();
        Ok(Message { text: job.text, source_name, overrides, requires_gpu, stable_id, warnings })
    }

    /// Reads the file that a field names.
    fn read(
        &self,
        field: &'static str,
        path: String,
        files: &mut dyn MessageFiles,
    ) -> Result<Job, MessageError> {
        let text = files.read_config(&path).map_err(|source| MessageError::Unreadable {
            source_name: self.source_name.clone(),
            field,
            path: path.clone().into(),
            source,
        })?;
        if text.len() > CONFIG_BYTES_MAX {
            let mut faults = Faults::new(&self.source_name);
            let seen = format!("got {} with over {CONFIG_BYTES_MAX} bytes", shown(&path));
            faults.add(0, field, format!("{seen}; allowed: at most {CONFIG_BYTES_MAX}"));
            return Err(MessageError::Fields(faults));
        }
        Ok(Job { text, path: Some(path), overrides: Vec::new() })
    }

    /// What lies at the path of weights that must be there.
    fn weights(
        &self,
        field: &'static str,
        path: &str,
        files: &mut dyn MessageFiles,
    ) -> Result<WeightsFound, MessageError> {
        match files.weights(path) {
            WeightsFound::Missing => Err(MessageError::MissingWeights {
                source_name: self.source_name.clone(),
                field,
                path: path.into(),
            }),
            found => Ok(found),
        }
    }
}

/// The text of a job, the file it is from, and what its kind of message lays over it.
struct Job {
    text: Vec<u8>,
    path: Option<String>,
    overrides: Vec<(String, Json)>,
}

/// A job to train: `config`, or the file `config_path`.
fn training(
    start: &Start,
    map: &Json,
    faults: Faults,
    files: &mut dyn MessageFiles,
) -> Result<Message, MessageError> {
    let mut fields = Fields::read(map, faults);
    let inline = fields.config();
    let path = fields.path("config_path", inline.is_none());
    fields.no_effect("db_count", "jobs are counted by the journal");
    fields.finish().map_err(MessageError::Fields)?;
    let job = match (inline, path) {
        (Some(text), path) => {
            if path.is_some() {
                fields.warn("field `config_path` has no effect: `config` holds the job");
            }
            Job { text, path: None, overrides: Vec::new() }
        }
        (None, path) => start.read("config_path", path.unwrap_or_default(), files)?,
    };
    start.message(fields, job)
}

/// A job to train once more, from `last_model`. When a run can go on from it, it does, with its optimiser and at its
/// step; other weights are what the training starts from.
fn recreate(
    start: &Start,
    map: &Json,
    faults: Faults,
    files: &mut dyn MessageFiles,
) -> Result<Message, MessageError> {
    let mut fields = Fields::read(map, faults);
    let file = fields.path("file", true);
    let last_model = fields.path("last_model", true);
    fields.finish().map_err(MessageError::Fields)?;
    let (file, last_model) = (file.unwrap_or_default(), last_model.unwrap_or_default());
    let found = start.weights("last_model", &last_model, files)?;
    let mut job = start.read("file", file, files)?;
    let set = |key: &str, value: Json| (key.to_owned(), value);
    job.overrides = match found {
        WeightsFound::Resumable => vec![set("train.resume", last_model.into())],
        _ => vec![
            set("model", last_model.into()),
            set("train.pretrained", true.into()),
            set("train.resume", false.into()),
        ],
    };
    start.message(fields, job)
}

/// A job that evaluates `model_path` on `data_yaml`.
fn evaluate(
    start: &Start,
    map: &Json,
    faults: Faults,
    files: &mut dyn MessageFiles,
) -> Result<Message, MessageError> {
    let mut fields = Fields::read(map, faults);
    let data = fields.path("data_yaml", true);
    let model = fields.path("model_path", true);
    fields.finish().map_err(MessageError::Fields)?;
    let (data, model) = (data.unwrap_or_default(), model.unwrap_or_default());
    start.weights("model_path", &model, files)?;
    let job = json!({ "model": model, "type": "yolo", "train": { "mode": "val", "data": data } });
    // JSON is YAML; strings and objects always have a form.
    let text = format!("{job:#}\n").into_bytes();
    start.message(fields, Job { text, path: None, overrides: Vec::new() })
}

/// The id of an entry whose job has none: a UUID (version 8) from the SHA-256 of queue and entry, so that every machine
/// that gets the entry, the second one after a fault of the first too, gives it the same.
pub fn stable_id(queue: &str, entry_id: &str) -> TaskId {
    let mut hash = Sha256::new();
    hash.update(b"boxwright entry\0");
    hash.update((queue.len() as u64).to_le_bytes());
    hash.update(queue);
    hash.update(entry_id);
    let digest = hash.finalize();
    let mut bytes = [0u8; 16];
    bytes.copy_from_slice(&digest[..16]);
    bytes[6] = (bytes[6] & 0x0f) | 0x80;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    let text = uuid::Uuid::from_bytes(bytes).to_string();
    TaskId::try_from(text).expect("a UUID is a safe name")
}

/// SHA-256 of a job's text and the values above it, in hexadecimal, whatever their order; that of the text alone where
/// there are none, so that a file is the same job from the folder and from a queue.
pub fn content_hash(text: &[u8], overrides: &[(String, Json)]) -> String {
    let mut hash = Sha256::new();
    hash.update(text);
    if !overrides.is_empty() {
        let mut sorted: Vec<String> =
            overrides.iter().map(|(key, value)| json!([key, value]).to_string()).collect();
        sorted.sort_unstable();
        hash.update([0]);
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(sorted.join("\n"));
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A text of somebody else's in one short line.
fn shown(text: &str) -> String {
    let line: String = text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).take(200).collect();
    if text.chars().nth(200).is_some() { format!("{line}…") } else { line }
}
