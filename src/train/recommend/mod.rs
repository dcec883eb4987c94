//! A recommendation for a first training run on a dataset: input size, network, batch, epochs, weights to start from.
//!
//! [`recommend`] is a pure function of what the data are like ([`Metadata`]), what the device can hold ([`Room`]), the
//! runs that were made before ([`EarlierRun`]) and a [`Goal`]. Every choice carries a sentence with the numbers that it
//! rests on; the rules and where they come from are in [`rules`]. Nothing is asked of anybody outside.

pub mod job;
pub mod machine;
pub mod rules;
#[cfg(test)]
mod tests;
mod warnings;
mod words;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::data::metadata::Metadata;
use crate::train::args::MODELS;
use crate::train::error::TrainError;

/// Part of the key that recommendations are cached under: changes whenever a rule changes.
pub const CODE: &str = concat!(env!("CARGO_PKG_VERSION"), "-rules1");
/// How long a recommendation is kept.
pub const LIFETIME: std::time::Duration = std::time::Duration::from_secs(30 * 60);

/// What matters most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Goal {
    /// A first result soon.
    Fast,
    /// The usual trade.
    Balanced,
    /// The best result, whatever the time.
    Accurate,
}

impl Goal {
    /// The word on the command line.
    pub fn word(self) -> &'static str {
        match self {
            Goal::Fast => "fast",
            Goal::Balanced => "balanced",
            Goal::Accurate => "accurate",
        }
    }

    /// The goal of a word.
    pub fn from_word(word: &str) -> Option<Goal> {
        [Goal::Fast, Goal::Balanced, Goal::Accurate].into_iter().find(|goal| goal.word() == word)
    }
}

/// One run that completed earlier.
#[derive(Clone, Debug, PartialEq)]
pub struct EarlierRun {
    /// The job.
    pub task_id: String,
    /// The network, for example `yolov8n`.
    pub model: String,
    /// Fingerprint of the data it was trained on.
    pub data_fingerprint: String,
    /// Class names of its weights.
    pub names: Vec<String>,
    /// Its mAP50-95 on the validation set.
    pub map: f64,
    /// Its best weights; the file is there.
    pub weights: PathBuf,
}

/// What the device that will train can hold, by the exact plan of the network.
pub trait Room {
    /// The device in words, for example `the CPU (2 threads)`.
    fn device(&self) -> String;

    /// Whether it is a GPU.
    fn is_gpu(&self) -> bool;

    /// The largest batch that automatic choice would take for a network at an input size when nothing else uses the device,
    /// at least 1.
    ///
    /// # Errors
    /// [`TrainError::Memory`] when not even one image fits; the device does not answer.
    fn largest(&self, model: &str, imgsz: usize) -> Result<usize, TrainError>;

    /// Bytes that training takes at a batch.
    ///
    /// # Errors
    /// The device does not answer, or it would not fit.
    fn bytes(&self, model: &str, imgsz: usize, batch: usize) -> Result<u64, TrainError>;
}

/// One choice and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// The key of the job, for example `imgsz`.
    pub key: String,
    /// What was chosen.
    pub value: String,
    /// Why, with the numbers.
    pub because: String,
}

/// Weights to start from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WarmStart {
    /// The job they come from.
    pub task_id: String,
    /// The file.
    pub weights: PathBuf,
    /// The mAP50-95 that they reached.
    pub map: f64,
}

/// What is recommended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recommendation {
    /// What for.
    pub goal: Goal,
    /// Side of the input, pixels.
    pub imgsz: usize,
    /// The network.
    pub model: String,
    /// Images of a batch.
    pub batch: usize,
    /// Passes over the data.
    pub epochs: u32,
    /// Weights to start from, when an earlier run left any.
    pub warm_start: Option<WarmStart>,
    /// What to look at before training, the gravest first.
    pub warnings: Vec<String>,
    /// Why everything is as it is, one line for each choice.
    pub lines: Vec<Reason>,
}

impl Recommendation {
    /// The answer for people: the data, a line for each choice, the warnings.
    pub fn text(&self, data: &Metadata) -> String {
        let mut out = format!(
            "data        {} + {}, {} ({:.1} an image), {}; fingerprint {}\n",
            words::count(data.train.images),
            words::counted(data.val.images, "image", "images"),
            words::counted(data.train.boxes + data.val.boxes, "box", "boxes"),
            data.train.boxes_per_image(),
            words::counted(data.names.len(), "class", "classes"),
            data.fingerprint.get(..12).unwrap_or_default()
        );
        for line in &self.lines {
            out.push_str(&format!("{:<11} {}: {}\n", line.key, line.value, line.because));
        }
        for warning in &self.warnings {
            out.push_str(&format!("warning: {warning}\n"));
        }
        out
    }

    /// Whether this, which comes from a cache, can be an answer for this goal and history. What other machines share may
    /// be anything.
    pub fn is_sound(&self, goal: Goal, history: &[EarlierRun]) -> bool {
        let is_known = |warm: &WarmStart| {
            history.iter().any(|run| run.weights == warm.weights && run.task_id == warm.task_id)
        };
        let texts = self.lines.iter().flat_map(|line| [&line.key, &line.value, &line.because]);
        self.goal == goal
            && MODELS.contains(&self.model.as_str())
            && self.imgsz > 0
            && self.imgsz.is_multiple_of(32)
            && self.batch > 0
            && self.epochs > 0
            && self.warm_start.iter().all(is_known)
            && texts.chain(&self.warnings).all(|text| !text.chars().any(char::is_control))
    }
}

/// Recommends a run.
///
/// # Errors
/// [`TrainError`] of the device; [`TrainError::Memory`] when not even one image fits the smallest network.
pub fn recommend(
    data: &Metadata,
    room: &dyn Room,
    history: &[EarlierRun],
    goal: Goal,
) -> Result<Recommendation, TrainError> {
    let wanted = rules::input_size(data, goal);
    let rung = rules::network(data, room.is_gpu(), goal);
    let (model, imgsz, fitted) = rules::fit(data, room, (rung.value, wanted.value))?;
    let batch = rules::batch(data, room, (&model, imgsz), fitted.largest)?;
    let warm = rules::warm_start(data, history, &model);
    let epochs = rules::epochs(data, batch.value, warm.value.is_some(), goal);
    let line = |key: &str, value: String, because: String| Reason { key: key.into(), value, because };
    let join = |because: String, more: &Option<String>| match more {
        Some(more) => format!("{because}; {more}"),
        None => because,
    };
    let start = match &warm.value {
        Some(found) => found.weights.display().to_string(),
        None => "none".into(),
    };
    let lines = vec![
        line("imgsz", imgsz.to_string(), join(wanted.because, &fitted.smaller_input)),
        line("model", model.clone(), join(rung.because, &fitted.smaller_network)),
        line("batch", batch.value.to_string(), batch.because),
        line("epochs", epochs.value.to_string(), epochs.because),
        line("pretrained", start, warm.because),
    ];
    Ok(Recommendation {
        goal,
        imgsz,
        model,
        batch: batch.value,
        epochs: epochs.value,
        warm_start: warm.value,
        warnings: warnings::warnings(data, imgsz),
        lines,
    })
}
