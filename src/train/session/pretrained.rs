//! Which architecture a run trains and which weights it starts from.

use std::path::{Path, PathBuf};

use super::initial::{Branch, head_branch};
use super::reporter::Reporter;
use super::weights::{self, Weights};
use crate::detect::models::Detector;
use crate::engine::params::{ParamKind, ParamSet};
use crate::train::args::{Source, TrainArgs, model_stem};
use crate::train::error::TrainError;

/// Names that stand for nothing: rows of the class head are not copied by them.
fn is_placeholder(name: &str) -> bool {
    name.is_empty() || name.bytes().all(|b| b.is_ascii_digit())
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
    weights::read(path).map_err(|error| TrainError::Weights {
        path: path.to_owned(),
        message: "the file cannot be read as weights".into(),
        source: Some(Box::new(error)),
    })
}

/// The model table of a weights file: what it says itself, or else its name.
fn architecture_of(path: &Path, weights: &Weights) -> Result<String, TrainError> {
    let said = weights.architecture().unwrap_or_else(|| model_stem(&path.to_string_lossy()));
    if crate::detect::models::available().contains(&said.as_str()) {
        return Ok(said);
    }
    let names = crate::detect::models::available().join(", ");
    let message = format!("it is for the model {said:?}; available: {names}");
    Err(TrainError::Weights { path: path.to_owned(), message, source: None })
}

/// Copies what fits: tensors of equal name and shape; with `cls_remap` the rows of the last class
/// convolutions by class name. What does not fit keeps its initial value and is counted in a warning.
pub(super) fn apply(
    start: &Start,
    params: &mut ParamSet,
    detector: &Detector,
    names: &[String],
    args: &TrainArgs,
    reporter: &mut Reporter,
) -> Result<(), TrainError> {
    let Some((path, weights)) = &start.weights else { return Ok(()) };
    let copied = copy(weights, params, detector, names, args.cls_remap);
    if copied.tensors == 0 {
        let message = "no tensor fits the network by name and shape".into();
        return Err(TrainError::Weights { path: path.clone(), message, source: None });
    }
    let total = params.infos.len();
    reporter.warn(format!(
        "{}: {} of {total} tensors copied, {} class rows copied by name",
        path.display(),
        copied.tensors,
        copied.rows
    ));
    Ok(())
}

struct Copied {
    tensors: usize,
    rows: usize,
}

fn copy(
    weights: &Weights,
    params: &mut ParamSet,
    detector: &Detector,
    names: &[String],
    remap: bool,
) -> Copied {
    let rows = if remap { class_rows(&weights.names, names) } else { Vec::new() };
    let is_same_classes = rows.len() == names.len() && rows.iter().all(|(to, from)| to == from);
    let mut copied = Copied { tensors: 0, rows: 0 };
    for index in 0..params.infos.len() {
        let (name, kind) = (params.infos[index].name.clone(), params.infos[index].kind);
        let Some(tensor) = weights.tensors.get(&name) else { continue };
        let is_class_output = matches!(head_branch(&name, detector.head_row), Some((Branch::Class, _)))
            && name.split('.').nth(4) == Some("2");
        if is_class_output && !rows.is_empty() && !is_same_classes {
            copied.rows += copy_rows(params, &name, kind, tensor, &rows);
        } else if params.import(&name, &tensor.shape, &tensor.data).is_ok() {
            copied.tensors += 1;
        }
    }
    copied
}

/// Pairs (row here, row there) of classes with the same name, case and outer blanks ignored.
fn class_rows(theirs: &[String], ours: &[String]) -> Vec<(usize, usize)> {
    let plain = |name: &String| name.trim().to_lowercase();
    let find = |name: &str| theirs.iter().position(|n| plain(n) == name);
    let pairs = ours.iter().enumerate().filter_map(|(row, name)| {
        let name = plain(name);
        if is_placeholder(&name) { None } else { Some((row, find(&name)?)) }
    });
    pairs.collect()
}

/// Copies rows of the first dimension of a class output; 1 when any was copied.
fn copy_rows(
    params: &mut ParamSet,
    name: &str,
    kind: ParamKind,
    tensor: &weights::Tensor,
    rows: &[(usize, usize)],
) -> usize {
    let shape = kind.shape();
    if tensor.shape.len() != shape.len() || tensor.shape[1..] != shape[1..] {
        return 0;
    }
    let Ok((_, mut own)) = params.export(name) else { return 0 };
    let width: usize = shape[1..].iter().product();
    for &(to, from) in rows {
        if (from + 1) * width <= tensor.data.len() {
            own[to * width..(to + 1) * width].copy_from_slice(&tensor.data[from * width..(from + 1) * width]);
        }
    }
    match params.import(name, &shape, &own) {
        Ok(()) => rows.len(),
        Err(_) => 0,
    }
}

/// A trained network, ready to validate or predict.
pub struct LoadedModel {
    /// Name of the model table.
    pub architecture: String,
    /// Class names.
    pub names: Vec<String>,
    /// The weights.
    pub weights: Weights,
    /// Input size it was trained with, if the file says so.
    pub imgsz: Option<usize>,
}

/// Reads a weights file of a trained detector.
///
/// # Errors
/// [`TrainError::Weights`].
pub fn load_model(path: &Path) -> Result<LoadedModel, TrainError> {
    if !path.is_file() {
        return Err(missing(path));
    }
    let weights = read(path)?;
    let architecture = architecture_of(path, &weights)?;
    let imgsz = weights.metadata.get("imgsz").and_then(|v| v.parse().ok());
    Ok(LoadedModel { architecture, names: weights.names.clone(), imgsz, weights })
}
