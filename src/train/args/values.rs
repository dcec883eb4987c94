//! The values of training keys that are more than a number, a truth value or a word.
//!
//! Each converts from and to JSON, so that a value means the same in YAML, in `args.yaml` and in a trainer's
//! specification; the error of the conversion is the sentence that says what is allowed.

use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use crate::yaml::Node;

/// A number, also when it stands as text.
fn number(json: &Json) -> Option<f64> {
    Node::from_json(json).as_float().filter(|number| number.is_finite())
}

/// A whole number of at least `min`, also when it stands as text.
fn count(json: &Json, min: i64) -> Option<u32> {
    Node::from_json(json)
        .as_int()
        .filter(|&number| number >= min)
        .and_then(|number| u32::try_from(number).ok())
}

/// `batch`: images per step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Json", into = "Json")]
pub enum Batch {
    /// `-1`: the largest batch whose plan fits the usual share of the free memory.
    Auto,
    /// Between 0 and 1: the largest batch whose plan fits this share of the free memory.
    Fraction(f64),
    /// So many images.
    Images(u32),
}

impl TryFrom<Json> for Batch {
    type Error = String;

    fn try_from(json: Json) -> Result<Self, String> {
        match number(&json) {
            Some(-1.0) => Ok(Self::Auto),
            Some(part) if part > 0.0 && part < 1.0 => Ok(Self::Fraction(part)),
            Some(images) if images.fract() == 0.0 && (1.0..=65_536.0).contains(&images) => {
                Ok(Self::Images(images as u32))
            }
            _ => Err("a whole number from 1 to 65536, -1 (automatic), or a share of the free memory \
                      between 0 and 1"
                .to_owned()),
        }
    }
}

impl From<Batch> for Json {
    fn from(batch: Batch) -> Json {
        match batch {
            Batch::Auto => json!(-1),
            Batch::Fraction(part) => json!(part),
            Batch::Images(images) => json!(images),
        }
    }
}

/// `batch_policy`: what becomes of a batch that does not fit the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BatchPolicy {
    /// The job fails and names the largest batch that fits.
    #[default]
    Refuse,
    /// The batch is cut into equal parts that fit; their gradients are summed before each step.
    Accumulate,
}

/// `scale`: range of the random scaling.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Json", into = "Json")]
pub enum Scale {
    /// `s`: factors from 1 - s to 1 + s.
    Symmetric(f64),
    /// `[min, max]`: factors in that range.
    Pair(f64, f64),
}

impl Scale {
    /// Smallest and largest factor.
    pub fn range(self) -> (f64, f64) {
        match self {
            Self::Symmetric(part) => (1.0 - part, 1.0 + part),
            Self::Pair(min, max) => (min, max),
        }
    }
}

impl TryFrom<Json> for Scale {
    type Error = String;

    fn try_from(json: Json) -> Result<Self, String> {
        let allowed = "a number from 0 to 1, or a pair [min, max] with 0 < min <= max <= 10";
        match &json {
            Json::Array(pair) if pair.len() == 2 => match (number(&pair[0]), number(&pair[1])) {
                (Some(min), Some(max)) if min > 0.0 && min <= max && max <= 10.0 => Ok(Self::Pair(min, max)),
                _ => Err(allowed.to_owned()),
            },
            _ => match number(&json) {
                Some(part) if (0.0..=1.0).contains(&part) => Ok(Self::Symmetric(part)),
                _ => Err(allowed.to_owned()),
            },
        }
    }
}

impl From<Scale> for Json {
    fn from(scale: Scale) -> Json {
        match scale {
            Scale::Symmetric(part) => json!(part),
            Scale::Pair(min, max) => json!([min, max]),
        }
    }
}

/// `cache`: where decoded images are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Json", into = "Json")]
pub enum Cache {
    /// Nowhere.
    Off,
    /// In memory.
    Ram,
    /// In files.
    Disk,
}

impl TryFrom<Json> for Cache {
    type Error = String;

    fn try_from(json: Json) -> Result<Self, String> {
        let node = Node::from_json(&json);
        match (node.as_bool(), node.as_str().map(str::to_ascii_lowercase).as_deref()) {
            (Some(false), _) => Ok(Self::Off),
            (Some(true), _) | (_, Some("ram")) => Ok(Self::Ram),
            (_, Some("disk")) => Ok(Self::Disk),
            _ => Err("false, true, ram or disk".to_owned()),
        }
    }
}

impl From<Cache> for Json {
    fn from(cache: Cache) -> Json {
        match cache {
            Cache::Off => json!(false),
            Cache::Ram => json!("ram"),
            Cache::Disk => json!("disk"),
        }
    }
}

/// `pretrained` and `resume`: no, yes, or from this file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Json", into = "Json")]
pub enum Source {
    /// `false`.
    Off,
    /// `true`: from where it is expected to lie.
    On,
    /// A path.
    Path(String),
}

impl TryFrom<Json> for Source {
    type Error = String;

    fn try_from(json: Json) -> Result<Self, String> {
        let node = Node::from_json(&json);
        match (node.as_bool(), node.as_str()) {
            (Some(false), _) => Ok(Self::Off),
            (Some(true), _) => Ok(Self::On),
            (_, Some(path)) if !path.trim().is_empty() => Ok(Self::Path(path.to_owned())),
            _ => Err("true, false or the path of a file".to_owned()),
        }
    }
}

impl From<Source> for Json {
    fn from(source: Source) -> Json {
        match source {
            Source::Off => json!(false),
            Source::On => json!(true),
            Source::Path(path) => json!(path),
        }
    }
}

/// How much of one split is used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Share {
    /// This part of it, in (0, 1].
    Part(f64),
    /// So many images, at least 2.
    Images(u32),
}

impl Share {
    /// How many of `images` are used: the first round(n * part), or the count, at least one when there is one.
    pub fn of(self, images: usize) -> usize {
        match self {
            Self::Part(part) => ((images as f64 * part).round_ties_even() as usize).max(1).min(images),
            Self::Images(count) => (count as usize).min(images),
        }
    }

    fn from_json(json: &Json) -> Option<Self> {
        match number(json) {
            Some(part) if part > 0.0 && part <= 1.0 => Some(Self::Part(part)),
            Some(_) => count(json, 2).map(Self::Images),
            None => None,
        }
    }

    fn to_json(self) -> Json {
        match self {
            Self::Part(part) => json!(part),
            Self::Images(count) => json!(count),
        }
    }
}

/// `fraction`: how much of the data is used; a single value is for the training split.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Json", into = "Json")]
pub struct Fraction {
    /// Of the training split.
    pub train: Share,
    /// Of the validation split.
    pub val: Share,
    /// Of the test split.
    pub test: Share,
}

impl TryFrom<Json> for Fraction {
    type Error = String;

    fn try_from(json: Json) -> Result<Self, String> {
        let allowed = "a share above 0 up to 1, a count of images of at least 2, or a list of up to three of them \
                       (train, val, test)";
        let whole = Share::Part(1.0);
        let parts = match &json {
            Json::Array(parts) if (1..=3).contains(&parts.len()) => parts.as_slice(),
            Json::Array(_) => return Err(allowed.to_owned()),
            single => std::slice::from_ref(single),
        };
        let shares: Option<Vec<Share>> = parts.iter().map(Share::from_json).collect();
        let shares = shares.ok_or_else(|| allowed.to_owned())?;
        let share = |index: usize| shares.get(index).copied().unwrap_or(whole);
        Ok(Self { train: share(0), val: share(1), test: share(2) })
    }
}

impl From<Fraction> for Json {
    fn from(fraction: Fraction) -> Json {
        let whole = Share::Part(1.0);
        if fraction.val == whole && fraction.test == whole {
            return fraction.train.to_json();
        }
        json!([fraction.train.to_json(), fraction.val.to_json(), fraction.test.to_json()])
    }
}

/// `freeze`: rows of the model table whose parameters stay as they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Json", into = "Json")]
pub enum Freeze {
    /// None.
    Nothing,
    /// The first so many rows.
    First(u32),
    /// These rows, and every parameter whose name holds one of these parts.
    Some {
        /// Indices of rows.
        rows: Vec<u32>,
        /// Parts of parameter names.
        names: Vec<String>,
    },
}

impl TryFrom<Json> for Freeze {
    type Error = String;

    fn try_from(json: Json) -> Result<Self, String> {
        let allowed = "a count of rows, or a list of row indices and parts of parameter names";
        match &json {
            Json::Null => Ok(Self::Nothing),
            Json::Array(items) => {
                let (mut rows, mut names) = (Vec::new(), Vec::new());
                for item in items {
                    match (count(item, 0), item.as_str()) {
                        (Some(row), _) => rows.push(row),
                        (None, Some(name)) if !name.is_empty() => names.push(name.to_owned()),
                        _ => return Err(allowed.to_owned()),
                    }
                }
                if rows.is_empty() && names.is_empty() {
                    return Ok(Self::Nothing);
                }
                Ok(Self::Some { rows, names })
            }
            single => match count(single, 0) {
                Some(0) => Ok(Self::Nothing),
                Some(rows) => Ok(Self::First(rows)),
                None => Err(allowed.to_owned()),
            },
        }
    }
}

impl From<Freeze> for Json {
    fn from(freeze: Freeze) -> Json {
        match freeze {
            Freeze::Nothing => Json::Null,
            Freeze::First(rows) => json!(rows),
            Freeze::Some { rows, names } => rows
                .into_iter()
                .map(|row| json!(row))
                .chain(names.into_iter().map(|name| json!(name)))
                .collect(),
        }
    }
}

/// `classes`: the class ids that are kept; none given keeps all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Json", into = "Json")]
pub struct Classes(pub Option<Vec<u32>>);

impl TryFrom<Json> for Classes {
    type Error = String;

    fn try_from(json: Json) -> Result<Self, String> {
        let ids = match &json {
            Json::Null => return Ok(Self(None)),
            Json::Array(items) => items.iter().map(|item| count(item, 0)).collect::<Option<Vec<u32>>>(),
            single => count(single, 0).map(|id| vec![id]),
        };
        match ids {
            Some(mut ids) if !ids.is_empty() => {
                ids.sort_unstable();
                ids.dedup();
                Ok(Self(Some(ids)))
            }
            _ => Err("a class id or a list of class ids".to_owned()),
        }
    }
}

impl From<Classes> for Json {
    fn from(classes: Classes) -> Json {
        classes.0.map_or(Json::Null, |ids| json!(ids))
    }
}

/// `optimizer`: the update rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum OptimizerChoice {
    /// By the number of steps: MuSGD for long runs, AdamW for short ones.
    #[serde(rename = "auto")]
    Auto,
    /// Stochastic gradient descent with Nesterov momentum.
    #[serde(rename = "SGD")]
    Sgd,
    /// Gradient descent with orthogonalised updates of the matrices.
    #[serde(rename = "MuSGD")]
    MuSgd,
    /// Adam.
    Adam,
    /// Adam with the infinity norm.
    Adamax,
    /// Adam with decoupled weight decay.
    AdamW,
    /// Adam with Nesterov momentum.
    NAdam,
    /// Rectified Adam.
    RAdam,
    /// Root mean square propagation.
    #[serde(rename = "RMSProp")]
    RmsProp,
}
