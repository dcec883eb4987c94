//! Everything before the first batch: dataset, network, batch, weights, optimiser, checkpoint.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::network::{Network, Spare, build};
use super::reporter::Reporter;
use super::{Run, SessionSpec, ValidationArgs, auto_batch, initial, pretrained, save};
use crate::data::augment::{AugmentArgs, CopyPasteMode, Scale};
use crate::data::cache::{CacheArgs, CacheMode};
use crate::data::dataset::Fraction;
use crate::data::{DataError, Dataset, DatasetOptions, LoaderArgs, Split, SplitName, TrainLoader, ValLoader};
use crate::detect::losses::detection::LossConfig;
use crate::detect::models::Detector;
use crate::detect::nms::NmsArgs;
use crate::engine::optim::{Algorithm, Ema, Form, Hyper, Optimizer, Role, Tensor, groups};
use crate::engine::params::{ParamKind, ParamSet};
use crate::train::args::{
    Batch, Cache, OptimizerChoice as Choice, Scale as ScaleArg, Share, Source, TrainArgs,
};
use crate::train::checkpoint::{self, Checkpoint, Progress, Resolved, Store};
use crate::train::early_stop::EarlyStop;
use crate::train::error::TrainError;
use crate::train::event::SessionEvent;
use crate::train::schedule::{self, Schedule, ScheduleSpec};

/// Detections kept per image when nothing else is said.
const MAX_DET_DEFAULT: u32 = 300;

/// Gets a run ready: the next thing it does is a batch.
pub(super) fn prepare<'r, 'o>(
    spec: &SessionSpec,
    reporter: &'r mut Reporter<'o>,
) -> Result<Run<'r, 'o>, TrainError> {
    let mut args = spec.args.clone();
    let store = Store::new(reporter.folder.state(), spec.checkpoints_kept);
    let found = find_checkpoint(spec, &store, reporter)?;
    let dataset = open_dataset(&args, reporter)?;
    let train = dataset.split(SplitName::Train).map_err(|e| data_error(&args.data, e))?.clone();
    let source = pretrained::choose(&args, reporter)?;
    let nc = dataset.names.len();
    let largest_stride = 32;
    let imgsz = (args.imgsz as usize).next_multiple_of(largest_stride);
    if imgsz != args.imgsz as usize {
        reporter
            .warn(format!("imgsz {} is rounded up to {imgsz}, a multiple of {largest_stride}", args.imgsz));
    }
    let detector = build(&source.architecture, nc, imgsz, imgsz)?;
    let mut network = Network::new(&source.architecture, nc, loss_config(&args, &train, nc), spec.threads)?;
    initial::freeze(&mut network.params, &args.freeze, detector.head_row)?;
    let resolved = match &found {
        Some((_, checkpoint)) => keep_choices(&checkpoint.progress, &args, reporter),
        None => resolve(&args, &detector, &network.params, train.len(), nc)?,
    };
    check_batch(&args, &resolved, train.len(), reporter);
    let mut optimizer = optimizer(&args, &resolved, &network.params)?;
    let fingerprint = save::fingerprint(&detector.name, nc, network.params.trainable_count(), &optimizer);
    let batches = train.len().div_ceil(resolved.batch);
    let epochs = found
        .as_ref()
        .map_or(args.epochs, |(_, c)| if args.time.is_some() { c.progress.epochs } else { args.epochs });
    let schedule = Schedule::new(schedule_spec(&args, &resolved, batches, epochs));
    let has_momentum = optimizer.algorithm().has_momentum();
    schedule.apply(0, 0, &mut optimizer.groups, has_momentum);
    if found.is_none() {
        initial::initialise(&mut network.params, &detector, args.seed);
        pretrained::apply(&source, &mut network.params, &dataset.names, &args, reporter)?;
    }
    let ema = Ema::new(&network.params.values, &network.params.buffers, Ema::DECAY, Ema::TAU);
    let loader = train_loader(&args, &train, &resolved, imgsz, largest_stride)?;
    let validation = validation_args(&args, &dataset, &detector, &resolved, imgsz, largest_stride);
    let val_split = validation_split(&dataset, &args)?.clone();
    let val_loader = open_val_loader(&val_split, &validation, &args)?;
    for note in loader.notes().iter().chain(val_loader.notes()) {
        reporter.warn(note.clone());
    }
    args.epochs = epochs;
    reporter.folder.write_args(&resolved_args(&args, &resolved))?;
    let progress = fresh_progress(fingerprint.clone(), resolved, epochs, args.patience);
    let mut run = Run {
        args,
        reporter,
        store,
        dataset,
        network,
        detector,
        optimizer,
        ema,
        schedule,
        progress,
        loader,
        val_split,
        val_loader,
        validation,
        spare: Spare::default(),
        batches,
        checkpoint_interval_s: spec.checkpoint_interval_s,
        last_saved: Instant::now(),
        save_seconds: 0.0,
        session_started: Instant::now(),
        elapsed_before_s: 0.0,
    };
    run.first_plans()?;
    let resumed = found.map(|(path, checkpoint)| run.resume(path, checkpoint, &fingerprint, epochs));
    let resumed = resumed.transpose()?;
    if resumed.is_none() {
        // What an earlier run left in this folder must not be taken for this run's.
        run.store.clear()?;
        if run.args.plots {
            run.picture_of_labels();
        }
    }
    run.report_plan(resumed);
    Ok(run)
}

impl Run<'_, '_> {
    /// Plans the full training batch and the largest validation batch, so that memory is refused now or never.
    fn first_plans(&mut self) -> Result<(), TrainError> {
        use crate::engine::plan::Mode;
        let (h, w) = self.loader.input_max();
        self.network.prepare(self.progress.resolved.batch, h, w, Mode::Train)?;
        let largest = self.val_loader.shapes().iter().copied().max_by_key(|&(h, w)| h * w);
        if let Some((h, w)) = largest {
            self.network.prepare(self.val_loader.batch_size(), h, w, Mode::Eval)?;
        }
        Ok(())
    }

    /// Takes up a checkpoint; what was changed since and cannot be continued exactly is said.
    fn resume(
        &mut self,
        path: PathBuf,
        checkpoint: Checkpoint,
        fingerprint: &str,
        epochs: u32,
    ) -> Result<PathBuf, TrainError> {
        let saved = checkpoint.progress.fingerprint.clone();
        if saved != fingerprint {
            let message = format!("it belongs to {saved:?}, this run is {fingerprint:?}");
            return Err(TrainError::Resume { path, message });
        }
        let patience = self.args.patience;
        let batch = self.progress.resolved.batch;
        self.restore(&path, checkpoint)?;
        self.progress.stopper.patience = patience;
        self.elapsed_before_s = self.progress.elapsed_s;
        if self.args.time.is_none() && self.progress.epochs != epochs {
            self.progress.epochs = epochs;
            self.progress.is_stopping = false;
            self.schedule = self.schedule.clone().with_epochs(epochs);
        }
        let is_cursor_lost = batch != self.progress.resolved.batch || self.progress.batch > self.batches;
        if is_cursor_lost {
            self.progress.resolved.batch = batch;
            let epoch = self.progress.epoch + 1;
            self.reporter.warn(format!("the batches differ from before: epoch {epoch} begins anew"));
            self.progress.batch = 0;
            self.progress.loss_sums = [0.0; 3];
            self.progress.last_step = self.iteration() as i64 - 1;
            self.network.params.clear_grads();
        }
        Ok(path)
    }

    fn report_plan(&mut self, resumed_from: Option<PathBuf>) {
        let resolved = &self.progress.resolved;
        let (h, w) = self.loader.input_max();
        let shaped = self.network.shaped(resolved.batch, h, w, crate::engine::plan::Mode::Train);
        let event = SessionEvent::Plan {
            parameters: self.network.params.trainable_count(),
            macs: self.detector.graph.macs(),
            arena_bytes: shaped.plan.bytes().total(),
            batch: resolved.batch,
            imgsz: self.validation.imgsz,
            accumulate: self.schedule.accumulate_at(u64::MAX),
            threads: self.network.threads(),
            images: self.dataset.split(SplitName::Train).map_or(0, Split::len),
            val_images: self.val_split.len(),
            batches: self.batches,
            epochs: self.progress.epochs,
            optimizer: resolved.optimizer.clone(),
            lr0: resolved.lr0,
            resumed_step: resumed_from.is_some().then_some(self.progress.step),
            resumed_from,
        };
        self.reporter.emit(event);
    }
}

fn fresh_progress(fingerprint: String, resolved: Resolved, epochs: u32, patience: u32) -> Progress {
    Progress {
        fingerprint,
        resolved,
        epoch: 0,
        batch: 0,
        epochs,
        step: 0,
        last_step: -1,
        ema_updates: 0,
        loss_sums: [0.0; 3],
        best_fitness: None,
        stopper: EarlyStop::new(patience),
        is_stopping: false,
        metrics: [0.0; 4],
        val_losses: [0.0; 3],
        rows: Vec::new(),
        elapsed_s: 0.0,
        rollbacks: 0,
    }
}

/// The checkpoint to go on from, if a resume was asked for.
fn find_checkpoint(
    spec: &SessionSpec,
    store: &Store,
    reporter: &mut Reporter,
) -> Result<Option<(PathBuf, Checkpoint)>, TrainError> {
    if !spec.resume && spec.args.resume == Source::Off {
        return Ok(None);
    }
    let found = store.newest()?;
    for damaged in &found.damaged {
        reporter.warn(format!("{damaged}; an older one is used"));
    }
    if found.newest.is_some() {
        return Ok(found.newest);
    }
    let Source::Path(path) = &spec.args.resume else { return Ok(None) };
    let path = Path::new(path);
    let fault = |message: String| TrainError::Config { key: "resume".into(), message };
    if path.extension().is_some_and(|e| e == "ckpt") {
        let loaded = checkpoint::load(path).map_err(|e| fault(e.to_string()))?;
        return Ok(Some((path.to_owned(), loaded)));
    }
    // A run folder, or a weights file inside one.
    let folder = path.ancestors().map(|p| p.join("state")).take(3).find(|p| p.is_dir());
    let folder = folder.ok_or_else(|| {
        fault(format!("{} is neither a checkpoint nor in a run folder with checkpoints", path.display()))
    })?;
    let found = Store::new(&folder, 2).newest()?;
    let none = || fault(format!("{} holds no checkpoint that verifies", folder.display()));
    found.newest.ok_or_else(none).map(Some)
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

fn open_dataset(args: &TrainArgs, reporter: &mut Reporter) -> Result<Dataset, TrainError> {
    let mut splits = vec![SplitName::Train];
    let validation = split_name(args)?;
    if validation != SplitName::Train {
        splits.push(validation);
    }
    let share = |s: Share| match s {
        Share::Part(part) => Fraction::Share(part),
        Share::Images(count) => Fraction::Count(count as usize),
    };
    let options = DatasetOptions {
        splits,
        single_cls: args.single_cls,
        classes: args.classes.0.clone(),
        fraction: [share(args.fraction.train), share(args.fraction.val), share(args.fraction.test)],
        ..DatasetOptions::default()
    };
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

fn split_name(args: &TrainArgs) -> Result<SplitName, TrainError> {
    SplitName::from_key(&args.split).ok_or_else(|| TrainError::Config {
        key: "split".into(),
        message: format!("got {:?}; allowed: train, val, test, minival", args.split),
    })
}

/// The split that validation uses.
pub(super) fn validation_split<'d>(dataset: &'d Dataset, args: &TrainArgs) -> Result<&'d Split, TrainError> {
    dataset.split(split_name(args)?).map_err(|e| data_error(&args.data, e))
}

/// Class weights (1 / count)^power of mean 1; classes without boxes get the mean of the others.
fn class_weights(counts: &[usize], power: f64) -> Option<Vec<f32>> {
    let present: Vec<f64> =
        counts.iter().filter(|&&n| n > 0).map(|&n| (1.0 / n as f64).powf(power)).collect();
    if power == 0.0 || present.is_empty() {
        return None;
    }
    let mean = present.iter().sum::<f64>() / present.len() as f64;
    let raw = counts.iter().map(|&n| if n > 0 { (1.0 / n as f64).powf(power) } else { mean });
    let raw: Vec<f64> = raw.collect();
    let mean = raw.iter().sum::<f64>() / raw.len() as f64;
    Some(raw.iter().map(|w| (w / mean) as f32).collect())
}

fn loss_config(args: &TrainArgs, train: &Split, nc: usize) -> LossConfig {
    LossConfig {
        gain_box: args.box_ as f32,
        gain_cls: args.cls as f32,
        gain_dfl: args.dfl as f32,
        class_weights: class_weights(&train.class_counts(nc), args.cls_pw),
        ..LossConfig::new(nc)
    }
}

/// The choices of a first start.
fn resolve(
    args: &TrainArgs,
    detector: &Detector,
    params: &ParamSet,
    images: usize,
    nc: usize,
) -> Result<Resolved, TrainError> {
    let batch = auto_batch::choose(args.batch, detector, params, images, auto_batch::available_bytes())?;
    let choice = match args.optimizer {
        Choice::Auto => schedule::auto_optimizer(images, batch, args.nbs as usize, args.epochs, nc),
        named => schedule::OptimizerChoice {
            algorithm: algorithm(&format!("{named:?}"))?,
            lr0: args.lr0,
            momentum: args.momentum,
            warmup_bias_lr: args.warmup_bias_lr,
        },
    };
    let asked_batch = match args.batch {
        Batch::Images(batch) => batch as usize,
        Batch::Auto | Batch::Fraction(_) => 0,
    };
    Ok(Resolved {
        batch,
        asked_batch,
        optimizer: choice.algorithm.name().to_owned(),
        lr0: choice.lr0,
        momentum: choice.momentum,
        warmup_bias_lr: choice.warmup_bias_lr,
    })
}

fn algorithm(name: &str) -> Result<Algorithm, TrainError> {
    Algorithm::parse(name).ok_or_else(|| TrainError::Config {
        key: "optimizer".into(),
        message: format!("no optimiser is called {name:?}"),
    })
}

/// The choices of the run's first start, with an explicit new batch taken over.
fn keep_choices(saved: &Progress, args: &TrainArgs, reporter: &mut Reporter) -> Resolved {
    let mut resolved = saved.resolved.clone();
    if let Batch::Images(batch) = args.batch
        && batch as usize != resolved.batch
        && batch as usize != resolved.asked_batch
    {
        reporter.warn(format!("batch is {batch} now, it was {}", resolved.batch));
        (resolved.batch, resolved.asked_batch) = (batch as usize, batch as usize);
    }
    resolved
}

fn check_batch(args: &TrainArgs, resolved: &Resolved, images: usize, reporter: &mut Reporter) {
    if let Batch::Images(batch) = args.batch
        && batch as usize > images
    {
        reporter.warn(format!("batch {batch} is capped at the {images} images of the dataset"));
    }
    assert!(resolved.batch > 0, "a batch holds at least one image");
}

/// The tensors as optimisers see them.
fn tensors(params: &ParamSet) -> Vec<Tensor> {
    let mut tensors = Vec::with_capacity(params.infos.len());
    for info in &params.infos {
        let (role, form) = match info.kind {
            ParamKind::ConvWeight { kernel, c_in, c_out } => {
                (Role::Weight, Form::Matrix { rows: kernel * kernel * c_in, cols: c_out, aspect: 1.0 })
            }
            ParamKind::Bias { .. } | ParamKind::NormBias { .. } => (Role::Bias, Form::Vector),
            ParamKind::NormWeight { .. } => (Role::Norm, Form::Vector),
            ParamKind::RunningMean { .. } | ParamKind::RunningVar { .. } => continue,
        };
        let (name, range, frozen) = (info.name.clone(), info.range.clone(), info.frozen);
        tensors.push(Tensor { name, range, role, form, frozen });
    }
    tensors.sort_by_key(|t| t.range.start);
    tensors
}

fn optimizer(args: &TrainArgs, resolved: &Resolved, params: &ParamSet) -> Result<Optimizer, TrainError> {
    let algorithm = algorithm(&resolved.optimizer)?;
    let decay = schedule::effective_weight_decay(args.weight_decay, resolved.batch, args.nbs as usize);
    let tensors = tensors(params);
    let is_class_branch = |name: &str| name.contains(".cv3.") || name.contains(".one2one_cv3.");
    let groups = groups::build(algorithm, &tensors, resolved.lr0, resolved.momentum, decay, is_class_branch);
    let hyper = Hyper { beta1: resolved.momentum, ..Hyper::default() };
    Ok(Optimizer::new(algorithm, hyper, tensors, groups, params.values.len()))
}

fn schedule_spec(args: &TrainArgs, resolved: &Resolved, batches: usize, epochs: u32) -> ScheduleSpec {
    let accumulate = schedule::accumulate_for(args.nbs as usize, resolved.batch);
    let cap = if args.time.is_some() { usize::MAX } else { batches * epochs as usize };
    ScheduleSpec {
        epochs,
        batches,
        lrf: args.lrf,
        cosine: args.cos_lr,
        warmup_epochs: args.warmup_epochs,
        warmup_bias_lr: resolved.warmup_bias_lr,
        warmup_momentum: args.warmup_momentum,
        momentum: args.momentum,
        accumulate: accumulate.min(cap.max(1)),
    }
}

/// The arguments with what `auto` became, for `args.yaml`.
fn resolved_args(args: &TrainArgs, resolved: &Resolved) -> TrainArgs {
    let mut args = args.clone();
    args.batch = Batch::Images(resolved.batch as u32);
    args
}

fn augment_args(args: &TrainArgs) -> AugmentArgs {
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

fn loader_args(args: &TrainArgs, batch: usize, imgsz: usize, stride: usize, rect: bool) -> LoaderArgs {
    LoaderArgs {
        imgsz,
        batch,
        workers: (args.workers as usize).min(crate::data::loader::WORKERS_MAX),
        prefetch: None,
        cache: cache_args(args.cache),
        seed: args.seed,
        rect,
        stride,
        decode_always: false,
    }
}

fn train_loader(
    args: &TrainArgs,
    train: &Split,
    resolved: &Resolved,
    imgsz: usize,
    stride: usize,
) -> Result<TrainLoader, TrainError> {
    let loader = loader_args(args, resolved.batch, imgsz, stride, args.rect);
    TrainLoader::new(train, loader, augment_args(args)).map_err(|e| data_error(&args.data, e))
}

fn validation_args(
    args: &TrainArgs,
    dataset: &Dataset,
    detector: &Detector,
    resolved: &Resolved,
    imgsz: usize,
    stride: usize,
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
        stride,
        workers: args.workers as usize,
        reg_max: detector.reg_max,
        rect: true,
        pictures: None,
        json: None,
    }
}

/// A loader for validation; on the CPU it shares the cores with the network, so it is kept.
fn open_val_loader(
    split: &Split,
    validation: &ValidationArgs,
    args: &TrainArgs,
) -> Result<ValLoader, TrainError> {
    let (batch, imgsz, stride) = (validation.batch, validation.imgsz, validation.stride);
    let loader = loader_args(args, batch, imgsz, stride, validation.rect);
    ValLoader::new(split, loader).map_err(|e| data_error(&args.data, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn class_weights_have_mean_one() {
        assert_eq!(class_weights(&[10, 5], 0.0), None);
        assert_eq!(class_weights(&[0, 0], 1.0), None);
        let weights = class_weights(&[10, 40, 0], 1.0).expect("two classes have boxes");
        let mean = weights.iter().sum::<f32>() / 3.0;
        assert!((mean - 1.0).abs() < 1e-6);
        assert!((weights[0] / weights[1] - 4.0).abs() < 1e-5);
        assert!((weights[2] - (weights[0] + weights[1]) / 2.0).abs() < 1e-6);
    }

    #[test]
    fn every_trainable_tensor_is_in_one_group() {
        let detector = Detector::build("yolov8n", 80, 64, 64).expect("a shipped model");
        let params = ParamSet::new(&detector.graph);
        let tensors = tensors(&params);
        let groups = groups::build(Algorithm::Sgd, &tensors, 0.01, 0.9, 5e-4, |_| false);
        let sizes: Vec<_> = groups.iter().map(|g| g.members.len()).collect();
        // 64 weights in the reference, of which one is the constant of the distance decoder.
        assert_eq!(sizes, [63, 57, 63]);
    }
}
