//! From training arguments to datasets and loaders.

use std::path::Path;

use super::ValidationArgs;
use super::reporter::Reporter;
use crate::data::augment::{AugmentArgs, CopyPasteMode, Scale};
use crate::data::cache::{CacheArgs, CacheMode};
use crate::data::dataset::Fraction;
use crate::data::{DataError, Dataset, DatasetOptions, LoaderArgs, Split, SplitName, ValLoader};
use crate::detect::nms::NmsArgs;
use crate::train::args::{Cache, Scale as ScaleArg, Share, TrainArgs};
use crate::train::checkpoint::Resolved;
use crate::train::error::TrainError;

/// Detections kept per image when nothing else is said.
const MAX_DET_DEFAULT: u32 = 300;
/// Largest stride of the networks there are; input sizes are multiples of it.
pub(super) const STRIDE_MAX: usize = 32;

/// The size rounded up to a multiple of the largest stride.
pub(super) fn next_stride(size: usize) -> usize {
    size.next_multiple_of(STRIDE_MAX)
}

/// The class of an error of the data room.
pub(super) fn data_error(data: &str, error: DataError) -> TrainError {
    match error {
        DataError::Option { key, .. } => TrainError::Config { key: key.into(), message: error.to_string() },
        DataError::Write { path, source } => TrainError::storage("write", path, source),
        DataError::Worker { .. } => TrainError::Internal { message: error.to_string() },
        other => TrainError::Data {
            path: data.into(),
            message: other.to_string(),
            source: std::error::Error::source(&other).map(|cause| cause.to_string().into()),
        },
    }
}

/// How a run reads its dataset.
pub(super) fn dataset_options(args: &TrainArgs) -> Result<DatasetOptions, TrainError> {
    let mut splits = vec![SplitName::Train];
    let validation = split_name(args)?;
    if validation != SplitName::Train {
        splits.push(validation);
    }
    let share = |s: Share| match s {
        Share::Part(part) => Fraction::Share(part),
        Share::Images(count) => Fraction::Count(count as usize),
    };
    Ok(DatasetOptions {
        splits,
        single_cls: args.single_cls,
        classes: args.classes.0.clone(),
        fraction: [share(args.fraction.train), share(args.fraction.val), share(args.fraction.test)],
        ..DatasetOptions::default()
    })
}

pub(super) fn open_dataset(args: &TrainArgs, reporter: &mut Reporter) -> Result<Dataset, TrainError> {
    let options = dataset_options(args)?;
    let dataset = Dataset::open(Path::new(&args.data), &options).map_err(|e| data_error(&args.data, e))?;
    for note in &dataset.report.notes {
        reporter.warn(note.clone());
    }
    for split in &dataset.report.splits {
        let (dropped, boxes) = (split.images_dropped, split.boxes_dropped);
        if dropped + boxes > 0 {
            let first = split.findings.first().map(|f| format!("; first: {f}")).unwrap_or_default();
            let name = &split.split;
            reporter.warn(format!("split {name}: {dropped} images and {boxes} boxes are left out{first}"));
        }
    }
    Ok(dataset)
}

pub(super) fn split_name(args: &TrainArgs) -> Result<SplitName, TrainError> {
    SplitName::from_key(&args.split).ok_or_else(|| TrainError::Config {
        key: "split".into(),
        message: format!("got {:?}; allowed: train, val, test, minival", args.split),
    })
}

/// The split that validation uses.
pub(super) fn validation_split<'d>(dataset: &'d Dataset, args: &TrainArgs) -> Result<&'d Split, TrainError> {
    dataset.split(split_name(args)?).map_err(|e| data_error(&args.data, e))
}

pub(super) fn augment_args(args: &TrainArgs) -> AugmentArgs {
    AugmentArgs {
        hsv_h: args.hsv_h,
        hsv_s: args.hsv_s,
        hsv_v: args.hsv_v,
        degrees: args.degrees,
        translate: args.translate,
        scale: match args.scale {
            ScaleArg::Symmetric(gain) => Scale::Gain(gain),
            ScaleArg::Pair(low, high) => Scale::Range(low, high),
        },
        shear: args.shear,
        perspective: args.perspective,
        flipud: args.flipud,
        fliplr: args.fliplr,
        bgr: args.bgr,
        mosaic: args.mosaic,
        mixup: args.mixup,
        cutmix: args.cutmix,
        copy_paste: args.copy_paste,
        copy_paste_mode: match args.copy_paste_mode.as_str() {
            "mixup" => CopyPasteMode::Mixup,
            _ => CopyPasteMode::Flip,
        },
    }
}

fn cache_args(cache: Cache) -> CacheArgs {
    let mode = match cache {
        Cache::Off => CacheMode::Recent,
        Cache::Ram => CacheMode::Ram,
        Cache::Disk => CacheMode::Disk,
    };
    CacheArgs { mode, ..CacheArgs::default() }
}

pub(super) fn loader_args(args: &TrainArgs, batch: usize, imgsz: usize, rect: bool) -> LoaderArgs {
    LoaderArgs {
        imgsz,
        batch,
        workers: (args.workers as usize).min(crate::data::loader::WORKERS_MAX),
        prefetch: None,
        cache: cache_args(args.cache),
        seed: args.seed,
        rect,
        stride: STRIDE_MAX,
        decode_always: false,
    }
}

pub(super) fn validation_args(
    args: &TrainArgs,
    dataset: &Dataset,
    resolved: &Resolved,
    imgsz: usize,
) -> ValidationArgs {
    let most = dataset.splits.iter().map(Split::boxes_per_image_max).max().unwrap_or(0);
    let max_det = match args.max_det {
        MAX_DET_DEFAULT => most.max(MAX_DET_DEFAULT as usize),
        chosen => chosen as usize,
    };
    let usual = NmsArgs::validation();
    ValidationArgs {
        nms: NmsArgs {
            conf: args.conf.map_or(usual.conf, |conf| conf as f32),
            iou: args.iou,
            max_det,
            agnostic: args.single_cls || args.agnostic_nms,
            classes: args.classes.0.as_ref().map(|ids| ids.iter().map(|&id| id as usize).collect()),
            ..usual
        },
        batch: 2 * resolved.batch,
        imgsz,
        stride: STRIDE_MAX,
        workers: args.workers as usize,
        rect: true,
        pictures: None,
        json: None,
    }
}

/// A loader for validation; on the CPU it shares the cores with the network, so it is kept.
pub(super) fn open_val_loader(
    split: &Split,
    validation: &ValidationArgs,
    args: &TrainArgs,
) -> Result<ValLoader, TrainError> {
    let loader = loader_args(args, validation.batch, validation.imgsz, validation.rect);
    ValLoader::new(split, loader).map_err(|e| data_error(&args.data, e))
}
