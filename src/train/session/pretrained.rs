//! Which architecture a run trains and which weights it starts from.

use std::path::{Path, PathBuf};

use super::reporter::Reporter;
use crate::detect::models::{Detector, available};
use crate::detect::weights::transfer::{class_branch_width, transfer};
use crate::detect::weights::{Tensor, TensorMap, pytorch, safetensors};
use crate::engine::params::ParamSet;
use crate::train::args::{Source, TrainArgs, model_stem};
use crate::train::error::TrainError;

/// A weights file in memory, whatever its format.
#[derive(Clone, Debug)]
pub struct Weights {
    /// Parameters and running statistics by name, convolutions as `[out][in][height][width]`.
    pub tensors: TensorMap,
    /// Class names; empty when the file has none.
    pub names: Vec<String>,
    /// The model table that the file names, if it does.
    pub architecture: Option<String>,
    /// Input size it was trained with, if the file says so.
    pub imgsz: Option<usize>,
}

/// What a run starts from.
pub(super) struct Start {
    /// Name of the model table.
    pub architecture: String,
    /// The file of the weights and what it holds; `None` starts from scratch.
    pub weights: Option<(PathBuf, Weights)>,
}

/// Reads `model` and `pretrained`.
///
/// A `model` that is a file gives the architecture and, unless `pretrained` is false, the weights. A name
/// gives the architecture; the weights come from `pretrained` if that is a path. A name that looks like a
/// weights file which is not there starts from scratch, and says so.
///
/// # Errors
/// [`TrainError::Weights`] for a file that is missing or cannot be read.
pub(super) fn choose(args: &TrainArgs, reporter: &mut Reporter) -> Result<Start, TrainError> {
    let model = Path::new(&args.model);
    let is_weights = model.extension().is_some_and(|e| e == "safetensors" || e == "pt");
    let of_model = if is_weights && model.is_file() { Some(read(model)?) } else { None };
    if of_model.is_none() && model.extension().is_some_and(|e| e == "safetensors") {
        return Err(missing(model));
    }
    let architecture = match &of_model {
        Some(weights) => architecture_of(model, weights)?,
        None => model_stem(&args.model),
    };
    let weights = match &args.pretrained {
        Source::Path(path) => {
            let path = Path::new(path);
            if !path.is_file() {
                return Err(missing(path));
            }
            Some((path.to_owned(), read(path)?))
        }
        Source::On => of_model.map(|weights| (model.to_owned(), weights)),
        Source::Off => None,
    };
    if weights.is_none() && is_weights && args.pretrained == Source::On {
        reporter.warn(format!(
            "{} is not there: training starts from scratch; its name chooses the architecture {architecture}",
            args.model
        ));
    }
    Ok(Start { architecture, weights })
}

fn missing(path: &Path) -> TrainError {
    TrainError::Weights { path: path.to_owned(), message: "the file does not exist".into(), source: None }
}

fn read(path: &Path) -> Result<Weights, TrainError> {
    let fault = |error| TrainError::Weights {
        path: path.to_owned(),
        message: "the file cannot be read as weights".into(),
        source: Some(Box::new(error)),
    };
    if path.extension().is_some_and(|e| e == "pt") {
        let file = pytorch::read_file(path).map_err(fault)?;
        let table = file.model_table.as_ref().map(|table| serde_json::json!(table));
        let said = table.as_ref().and_then(|t| t["yaml_file"].as_str().map(model_stem));
        let args = file.train_args.as_ref().map(|args| serde_json::json!(args));
        let imgsz = args.and_then(|args| args["imgsz"].as_u64()).map(|v| v as usize);
        return Ok(Weights { tensors: file.tensors, names: file.class_names, architecture: said, imgsz });
    }
    let tensors = safetensors::read_file(path).map_err(fault)?;
    let text = |key: &str| tensors.metadata.get(key);
    let names = text("names").and_then(|n| serde_json::from_str(n).ok()).unwrap_or_default();
    let architecture = text("model").cloned();
    let imgsz = text("imgsz").and_then(|v| v.parse().ok());
    Ok(Weights { tensors, names, architecture, imgsz })
}

/// The model table of a weights file: what it says itself, or else its name, or else its arrays.
fn architecture_of(path: &Path, weights: &Weights) -> Result<String, TrainError> {
    let by_name = model_stem(&path.to_string_lossy());
    let said = weights.architecture.clone().unwrap_or(by_name);
    if available().contains(&said.as_str()) {
        return Ok(said);
    }
    if weights.architecture.is_none()
        && let Some(name) = by_arrays(weights)
    {
        return Ok(name);
    }
    let message = format!("it is for the model {said:?}; available: {}", available().join(", "));
    Err(TrainError::Weights { path: path.to_owned(), message, source: None })
}

/// The model whose every parameter, but for those that depend on the number of classes, is among the arrays with
/// its name and shape: for files called `best.safetensors` that say nothing about themselves.
fn by_arrays(weights: &Weights) -> Option<String> {
    let arrays = &weights.tensors;
    let fits = |name: &&str| {
        Detector::build(name, 1, 64, 64).is_ok_and(|detector| {
            let class_branch = format!("model.{}.cv3.", detector.head_row);
            let mut fixed = detector.graph.params.iter().filter(|p| !p.name.starts_with(&class_branch));
            fixed.all(|p| arrays.get(&p.name).is_some_and(|array| array.shape() == p.kind.shape()))
        })
    };
    available().into_iter().find(fits).map(str::to_owned)
}

/// Copies what fits: tensors of equal name and shape; with `cls_remap` the rows of the last class
/// convolutions by class name. What does not fit keeps its initial value, and the warning says how much.
pub(super) fn apply(
    start: &Start,
    params: &mut ParamSet,
    names: &[String],
    args: &TrainArgs,
    reporter: &mut Reporter,
) -> Result<(), TrainError> {
    let Some((path, weights)) = &start.weights else { return Ok(()) };
    let fault = |message: String| TrainError::Weights { path: path.clone(), message, source: None };
    let mut target = TensorMap::new();
    for info in &params.infos {
        let (shape, numbers) = params.export(&info.name).map_err(|e| fault(e.to_string()))?;
        target.insert(info.name.clone(), Tensor::from_f32(shape, &numbers));
    }
    let report = transfer(&weights.tensors, &weights.names, &mut target, names, args.cls_remap);
    if report.copied.is_empty() {
        return Err(fault("no tensor fits the network by name and shape".into()));
    }
    for (name, tensor) in &target.tensors {
        params.import(name, tensor.shape(), &tensor.to_f32()).map_err(|e| fault(e.to_string()))?;
    }
    let (copied, remapped, total) = (report.copied.len(), report.remapped.len(), params.infos.len());
    let mut message = format!("{}: {copied} of {total} tensors copied", path.display());
    if remapped > 0 {
        message.push_str(&format!(", {remapped} more for {} classes by name", report.classes.len()));
    }
    if !report.mismatched.is_empty() {
        let width = class_branch_width(&weights.tensors)
            .map_or(String::new(), |w| format!("; the class branch of the file is {w} channels wide"));
        message.push_str(&format!(", {} of another shape left as drawn{width}", report.mismatched.len()));
    }
    reporter.warn(message);
    Ok(())
}

/// A trained network, ready to validate or predict.
#[derive(Clone, Debug)]
pub struct LoadedModel {
    /// Name of the model table.
    pub architecture: String,
    /// Its weights.
    pub weights: Weights,
}

/// Reads a weights file (`.safetensors` or `.pt`) of a trained detector.
///
/// # Errors
/// [`TrainError::Weights`].
pub fn load_model(path: &Path) -> Result<LoadedModel, TrainError> {
    if !path.is_file() {
        return Err(missing(path));
    }
    let weights = read(path)?;
    let architecture = architecture_of(path, &weights)?;
    Ok(LoadedModel { architecture, weights })
}

impl LoadedModel {
    /// Class names; `class_0` and so on when the file has none.
    pub fn names(&self) -> Vec<String> {
        let names = &self.weights.names;
        match self.nc() {
            Some(nc) if names.len() != nc => (0..nc).map(|i| format!("class_{i}")).collect(),
            _ => names.clone(),
        }
    }

    /// Number of classes: the rows of the class outputs, which the file cannot be wrong about.
    pub fn nc(&self) -> Option<usize> {
        let outputs = self.weights.tensors.tensors.iter();
        let mut rows = outputs.filter(|(name, _)| name.contains(".cv3.0.2.bias"));
        rows.next().and_then(|(_, tensor)| tensor.shape().first().copied())
    }

    /// Puts every tensor into `params`.
    ///
    /// # Errors
    /// [`TrainError::Weights`] when one is missing or has another shape.
    pub fn load_into(&self, path: &Path, params: &mut ParamSet) -> Result<(), TrainError> {
        let fault = |message: String| TrainError::Weights { path: path.to_owned(), message, source: None };
        for index in 0..params.infos.len() {
            let name = params.infos[index].name.clone();
            let tensor = self.weights.tensors.require(&name).map_err(|e| fault(e.to_string()))?;
            params.import(&name, tensor.shape(), &tensor.to_f32()).map_err(|e| fault(e.to_string()))?;
        }
        Ok(())
    }
}
