//! The training arguments: every documented key, its default, its range, and what becomes of it.
//!
//! A key is honoured, accepted without effect (and named in a warning), or refused by name with the reason; none is
//! ignored in silence. The table is [`KEYS`]; the values that are more than a number are in this module too. Start
//! reading at [`TrainArgs::read`].

mod device;
mod keys;
#[cfg(test)]
mod tests;
mod values;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use super::child::JobMode;
use crate::yaml::{Fault, Faults, MapReader, Node};

pub use device::{Amp, Device, ResolvedDevice};
pub use keys::{Form, KEYS, KeyInfo, KeyKind, RENAMED, key_info, keys_markdown};
pub use values::{
    Batch, BatchPolicy, Cache, Classes, Fraction, Freeze, OptimizerChoice, Scale, Share, Source,
};

/// Model names that this build trains.
pub const MODELS: &[&str] = &["yolov8n", "yolov8s", "yolov8m", "yolov8l", "yolov8x"];

/// The arguments of one training run. Field names are the names of the keys; their meaning, default and range are the
/// rows of [`KEYS`]. Keys that only their default value is accepted for have no field.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct TrainArgs {
    pub task: String,
    pub mode: String,
    pub model: String,
    pub data: String,
    pub epochs: u32,
    /// Hours.
    pub time: Option<f64>,
    pub patience: u32,
    pub batch: Batch,
    #[serde(default)]
    pub batch_policy: BatchPolicy,
    /// Pixels. 0, in an evaluation only: the size that the weights were trained at.
    pub imgsz: u32,
    pub save: bool,
    pub save_period: i32,
    pub cache: Cache,
    pub device: Device,
    pub workers: u32,
    pub project: Option<String>,
    pub name: Option<String>,
    pub exist_ok: bool,
    pub pretrained: Source,
    pub cls_remap: bool,
    pub optimizer: OptimizerChoice,
    pub verbose: bool,
    pub seed: u64,
    pub deterministic: bool,
    pub single_cls: bool,
    pub rect: bool,
    pub cos_lr: bool,
    pub close_mosaic: u32,
    pub resume: Source,
    pub amp: Amp,
    pub fraction: Fraction,
    pub freeze: Freeze,
    pub multi_scale: f64,
    pub channels_last: Option<bool>,
    pub dropout: f64,
    pub val: bool,
    pub split: String,
    pub save_json: bool,
    pub conf: Option<f64>,
    pub iou: f64,
    pub max_det: u32,
    pub plots: bool,
    pub nms: Option<bool>,
    pub agnostic_nms: bool,
    pub classes: Classes,
    pub lr0: f64,
    pub lrf: f64,
    pub momentum: f64,
    pub weight_decay: f64,
    pub warmup_epochs: f64,
    pub warmup_momentum: f64,
    pub warmup_bias_lr: f64,
    #[serde(rename = "box")]
    pub box_: f64,
    pub cls: f64,
    pub dfl: f64,
    pub cls_pw: f64,
    pub nbs: u32,
    pub hsv_h: f64,
    pub hsv_s: f64,
    pub hsv_v: f64,
    /// Degrees.
    pub degrees: f64,
    pub translate: f64,
    pub scale: Scale,
    /// Degrees.
    pub shear: f64,
    pub perspective: f64,
    pub flipud: f64,
    pub fliplr: f64,
    pub bgr: f64,
    pub mosaic: f64,
    pub mixup: f64,
    pub cutmix: f64,
    pub copy_paste: f64,
    pub copy_paste_mode: String,
    pub auto_augment: String,
    pub erasing: f64,
}

/// What became of the keys that were given.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KeyReport {
    /// Keys that were given and do what they say.
    pub honoured: Vec<String>,
    /// Keys that were given and have no effect, with the reason.
    pub no_effect: Vec<(String, String)>,
    /// Values that ask for what this build does not do. They are no mistakes of spelling, but no run can start.
    pub refused: Vec<Fault>,
}

impl Default for TrainArgs {
    /// The documented defaults; `model` and `data` are empty.
    fn default() -> Self {
        let mut map = Map::new();
        for key in KEYS {
            map.insert(key.name.to_owned(), default_value(key));
        }
        Self::from_map(map).expect("the defaults of the key table fit the fields, which a test reads")
    }
}

impl TrainArgs {
    /// Reads the mapping `node` (dotted path `path`, usually `train`), adding everything that is wrong to `faults`.
    ///
    /// Values that are well formed but ask for what this build does not do are in [`KeyReport::refused`], so that a
    /// caller can tell the two apart; a run must start with neither. `None` when a fault left no value to use.
    pub fn read(node: &Node, path: &str, faults: &mut Faults) -> (Option<Self>, KeyReport) {
        let mut report = KeyReport::default();
        let before = faults.list().len();
        let Some(mut reader) = MapReader::new(node, path, faults) else { return (None, report) };
        let mut map = Map::new();
        for key in KEYS {
            let value = match reader.set(key.name) {
                Some(given) => read_value(key, given, &reader.path_of(key.name), faults, &mut report),
                None => default_value(key),
            };
            map.insert(key.name.to_owned(), value);
        }
        for (entry, hint) in reader.unknown() {
            let hint = RENAMED.iter().find(|(old, _)| *old == entry.key).map(|(_, new)| *new).or(hint);
            let message = match hint {
                Some(hint) => format!("unknown key; did you mean `{hint}`?"),
                None => "unknown key; the documentation lists all training keys".to_owned(),
            };
            faults.add(entry.line, &reader.path_of(&entry.key), message);
        }
        if faults.list().len() > before {
            return (None, report);
        }
        (Self::from_map(map).ok(), report)
    }

    /// What `mode` asks for.
    pub fn job_mode(&self) -> JobMode {
        if self.mode == "val" { JobMode::Evaluate } else { JobMode::Train }
    }

    /// The refusal of a model name that this build has no table for; `None` when it can be built.
    ///
    /// A name is taken from the file name without folder and ending (`weights/yolov8n.pt` is `yolov8n`); a
    /// `.safetensors` file carries its own table and is not judged by its name.
    pub fn model_refusal(model: &str) -> Option<String> {
        if model.to_ascii_lowercase().ends_with(".safetensors")
            || MODELS.contains(&model_stem(model).as_str())
        {
            return None;
        }
        let hint = crate::yaml::nearest(&model_stem(model), MODELS.iter().copied())
            .map_or(String::new(), |near| format!("; did you mean `{near}`?"));
        Some(format!("this build has no table for it; it trains {}{hint}", MODELS.join(", ")))
    }

    /// All keys with their values, as the text of `args.yaml`: the fields as they are, the other keys at their default.
    pub fn to_yaml(&self) -> String {
        let values = serde_json::to_value(self).unwrap_or_default();
        let mut map = Map::new();
        for key in KEYS {
            let value = values.get(key.name).cloned().unwrap_or_else(|| default_value(key));
            map.insert(key.name.to_owned(), value);
        }
        serde_yaml::to_string(&Json::Object(map)).expect("a mapping of plain values is YAML")
    }

    fn from_map(map: Map<String, Json>) -> Result<Self, serde_json::Error> {
        serde_json::from_value(Json::Object(map))
    }
}

/// Name of a model table from a name or path: `weights/YOLOv8n.pt` is `yolov8n`.
pub fn model_stem(model: &str) -> String {
    let name = model.rsplit(['/', '\\']).next().unwrap_or(model).to_ascii_lowercase();
    for ending in [".pt", ".yaml", ".yml", ".safetensors"] {
        if let Some(stem) = name.strip_suffix(ending) {
            return stem.to_owned();
        }
    }
    name
}

/// The default of a key as JSON, in the spelling of its form.
fn default_value(key: &KeyInfo) -> Json {
    let json = if key.default.is_empty() {
        Json::String(String::new())
    } else {
        crate::yaml::parse(format!("v: {}", key.default).as_bytes(), "default")
            .ok()
            .and_then(|root| root.get("v").map(Node::to_json))
            .unwrap_or(Json::Null)
    };
    match key.form {
        Form::Special(convert) => convert(json.clone()).unwrap_or(json),
        _ => json,
    }
}

/// Checks one given value and files the key under what becomes of it.
fn read_value(key: &KeyInfo, given: &Node, path: &str, faults: &mut Faults, report: &mut KeyReport) -> Json {
    let default = default_value(key);
    let value = match key.form {
        Form::Int(min, max) => faults.int(given, path, min, max).map(Json::from),
        Form::Float(min, max) => faults.float(given, path, min, max).map(Json::from),
        Form::Bool => faults.boolean(given, path).map(Json::from),
        Form::Text => faults.text(given, path).map(Json::from),
        Form::Choice(words) => faults.choice(given, path, words).map(Json::from),
        Form::Anything => Some(given.to_json()),
        Form::Special(convert) => {
            convert(given.to_json()).map_err(|allowed| faults.refuse(given, path, &allowed)).ok()
        }
    };
    let Some(value) = value else { return default };
    let refusal = match key.kind {
        KeyKind::Refused(reason) if !same(&value, &default) => Some(reason.to_owned()),
        _ => refused_value(key.name, &value),
    };
    if let Some(reason) = refusal {
        let message = format!("got {}; not supported: {reason}", given.describe());
        report.refused.push(Fault { line: given.line, key: path.to_owned(), message });
        return value;
    }
    match key.kind {
        KeyKind::AcceptedNoEffect(reason) => report.no_effect.push((path.to_owned(), reason.to_owned())),
        KeyKind::Honoured | KeyKind::Refused(_) => report.honoured.push(path.to_owned()),
    }
    value
}

/// Equal as values, whatever the spelling of the number.
fn same(a: &Json, b: &Json) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// Why a well-formed value of an otherwise honoured key cannot be honoured.
fn refused_value(name: &str, value: &Json) -> Option<String> {
    match (name, value) {
        ("task", Json::String(task)) if task != "detect" => {
            Some("this build trains the task detect".to_owned())
        }
        ("mode", Json::String(mode)) if mode != "train" && mode != "val" => {
            Some("a job does train or val; the other modes have their own commands".to_owned())
        }
        ("nms", Json::Bool(false)) => Some("YOLOv8 has no head that needs no suppression".to_owned()),
        _ => None,
    }
}
