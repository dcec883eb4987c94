//! Validation of a weights file, outside any run.

use std::path::PathBuf;

use super::network::{Compute, Network};
use super::pretrained::load_model;
use super::{Validation, ValidationArgs, feeding, pictures, validate};
use crate::data::cache::CacheArgs;
use crate::data::{Dataset, DatasetOptions, LoaderArgs, Split, SplitName, ValLoader};
use crate::detect::losses::detection::LossConfig;
use crate::detect::nms::NmsArgs;
use crate::train::args::{Amp, Device};
use crate::train::device;
use crate::train::error::TrainError;
use crate::train::files;

/// Input size when neither the caller nor the file says one.
const IMGSZ_DEFAULT: usize = 640;

/// What to validate, on what.
#[derive(Clone, Debug)]
pub struct ValidateFileArgs {
    /// Weights file.
    pub weights: PathBuf,
    /// Dataset YAML or folder.
    pub data: PathBuf,
    /// Split: train, val, test or minival.
    pub split: String,
    /// Input size, pixels; that of the training when not given.
    pub imgsz: Option<usize>,
    /// Images per batch.
    pub batch: usize,
    /// Score threshold.
    pub conf: f32,
    /// IoU threshold of the suppression.
    pub iou: f64,
    /// Detections kept per image.
    pub max_det: usize,
    /// Boxes suppress each other across classes.
    pub agnostic: bool,
    /// Rectangular batches.
    pub rect: bool,
    /// Folder for plots.
    pub plots: Option<PathBuf>,
    /// File for the detections in the COCO results format.
    pub json: Option<PathBuf>,
    /// Loader threads.
    pub workers: usize,
    /// Compute threads; 0 takes all cores.
    pub threads: usize,
    /// The device.
    pub device: Device,
    /// Precision of the network on it.
    pub amp: Amp,
}

/// Validates a weights file; `None` when told to stop. Also gives the class names.
///
/// # Errors
/// Weights, data or sizes that cannot be used.
pub fn validate_file(
    args: &ValidateFileArgs,
    should_stop: &mut dyn FnMut() -> bool,
) -> Result<Option<(Validation, Vec<String>)>, TrainError> {
    let mut measurement = Measurement::open(args)?;
    let Some(found) = measurement.run(should_stop)? else { return Ok(None) };
    measurement.draw(&found)?;
    Ok(Some((found, measurement.names)))
}

/// A weights file and a split, ready to be measured.
pub(super) struct Measurement {
    /// The device.
    pub compute: Compute,
    /// The network with the weights of the file.
    pub network: Network,
    /// The split.
    pub split: Split,
    /// Its loader.
    pub loader: ValLoader,
    /// Class names.
    pub names: Vec<String>,
    /// How to validate.
    pub validation: ValidationArgs,
}

impl Measurement {
    /// Opens everything.
    ///
    /// # Errors
    /// Weights, data, device or sizes that cannot be used.
    pub fn open(args: &ValidateFileArgs) -> Result<Measurement, TrainError> {
        let compute = device::open(args.device, args.amp, args.threads)?;
        let model = load_model(&args.weights)?;
        let (split, names) = open_split(args, &model.names())?;
        let imgsz = args.imgsz.or(model.weights.imgsz).unwrap_or(IMGSZ_DEFAULT);
        let imgsz = feeding::next_stride(imgsz);
        let loss = LossConfig::new(names.len());
        let mut network = Network::new(&model.architecture, names.len(), loss, &compute)?;
        model.load_into(&args.weights, &mut network.params)?;
        network.push_params()?;
        let loader = LoaderArgs {
            imgsz,
            batch: args.batch,
            workers: args.workers.min(crate::data::loader::WORKERS_MAX),
            prefetch: None,
            cache: CacheArgs::default(),
            seed: 0,
            rect: args.rect,
            stride: feeding::STRIDE_MAX,
            decode_always: false,
        };
        let data_error = |e| feeding::data_error(&args.data.to_string_lossy(), e);
        let loader = ValLoader::new(&split, loader).map_err(data_error)?;
        if let Some(folder) = &args.plots {
            files::create_folder(folder)?;
        }
        let nms = NmsArgs {
            conf: args.conf,
            iou: args.iou,
            max_det: args.max_det,
            agnostic: args.agnostic,
            ..NmsArgs::validation()
        };
        let validation = ValidationArgs {
            nms,
            batch: args.batch,
            imgsz,
            stride: feeding::STRIDE_MAX,
            workers: args.workers,
            rect: args.rect,
            pictures: args.plots.clone(),
            json: args.json.clone(),
        };
        Ok(Measurement { compute, network, split, loader, names, validation })
    }

    /// One pass over the split; `None` when `should_stop` said so between two batches.
    ///
    /// # Errors
    /// Data, memory, device or storage errors.
    pub fn run(&mut self, should_stop: &mut dyn FnMut() -> bool) -> Result<Option<Validation>, TrainError> {
        let Measurement { network, split, loader, names, validation, .. } = self;
        validate(network, (split, loader), names, validation, should_stop)
    }

    /// Draws curves and confusion matrices where pictures are wanted.
    ///
    /// # Errors
    /// [`TrainError::Storage`] for the first that cannot be written.
    pub fn draw(&self, found: &Validation) -> Result<(), TrainError> {
        let Some(folder) = &self.validation.pictures else { return Ok(()) };
        for drawn in pictures::of_validation_run(folder, found, &self.names) {
            let error = |e: crate::train::plots::PlotError| {
                TrainError::storage("draw into", folder, std::io::Error::other(e.to_string()))
            };
            drawn.map_err(error)?;
        }
        Ok(())
    }
}

/// Opens the split; its classes must be those of the model.
fn open_split(args: &ValidateFileArgs, model_names: &[String]) -> Result<(Split, Vec<String>), TrainError> {
    let name = SplitName::from_key(&args.split).ok_or_else(|| TrainError::Config {
        key: "split".into(),
        message: format!("got {:?}; allowed: train, val, test, minival", args.split),
    })?;
    let data = args.data.to_string_lossy();
    let options = DatasetOptions { splits: vec![name], ..DatasetOptions::default() };
    let dataset = Dataset::open(&args.data, &options).map_err(|e| feeding::data_error(&data, e))?;
    if dataset.names.len() != model_names.len() {
        let message = format!(
            "it has {} classes, the model was trained for {}: {}",
            dataset.names.len(),
            model_names.len(),
            model_names.join(", ")
        );
        return Err(TrainError::Data { path: args.data.clone(), message, source: None });
    }
    let split = dataset.split(name).map_err(|e| feeding::data_error(&data, e))?.clone();
    Ok((split, dataset.names))
}
