//! Everything before the first batch: dataset, network, batch, weights, optimiser, checkpoint.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::choices::{
    check_batch, fresh_progress, keep_choices, loss_config, optimizer, resolve, resolved_args, schedule_spec,
};
use super::feed::Feed;
use super::feeding::{
    STRIDE_MAX, data_error, next_stride, open_dataset, open_val_loader, validation_args, validation_split,
};
use super::memory::Demand;
use super::network::{Compute, Network, build};
use super::reporter::Reporter;
use super::{Run, SessionSpec, initial, pretrained, save};
use crate::data::{Split, SplitName, ValLoader};
use crate::detect::losses::detection::LossConfig;
use crate::engine::optim::Ema;
use crate::engine::plan::Mode;
use crate::train::args::{Source, TrainArgs};
use crate::train::autobatch::largest_side;
use crate::train::checkpoint::{self, Checkpoint, Resolved, Store};
use crate::train::device;
use crate::train::error::TrainError;
use crate::train::event::SessionEvent;
use crate::train::schedule::Schedule;

/// Environment: `1` lets a new run measure the cuts of its convolutions before it begins.
const TUNE: &str = "BOXWRIGHT_TUNE";

/// Gets a run ready: the next thing it does is a batch.
pub(super) fn prepare<'r, 'o>(
    spec: &SessionSpec,
    reporter: &'r mut Reporter<'o>,
) -> Result<Run<'r, 'o>, TrainError> {
    let mut args = spec.args.clone();
    let compute = device::open(args.device, args.amp, spec.threads)?;
    device::remark(args.device, &compute).into_iter().for_each(|note| reporter.warn(note));
    let store = Store::new(reporter.folder.state(), spec.checkpoints_kept);
    let found = find_checkpoint(spec, &store, reporter)?;
    let dataset = open_dataset(&args, reporter)?;
    let train = dataset.split(SplitName::Train).map_err(|e| data_error(&args.data, e))?.clone();
    // A run that goes on needs no weights but its own.
    let start = match &found {
        Some(_) => None,
        None => Some(pretrained::choose(&args, reporter)?),
    };
    let architecture = match (&start, &found) {
        (Some(start), _) => start.architecture.clone(),
        (None, Some((_, checkpoint))) => checkpoint.progress.resolved.model.clone(),
        (None, None) => unreachable!("a run without a checkpoint has a start"),
    };
    let nc = dataset.names.len();
    let imgsz = next_stride(args.imgsz as usize);
    if imgsz != args.imgsz as usize {
        reporter.warn(format!("imgsz {} is rounded up to {imgsz}, a multiple of {STRIDE_MAX}", args.imgsz));
    }
    let detector = build(&architecture, nc, imgsz, imgsz)?;
    let loss = LossConfig { reg_max: detector.reg_max, ..loss_config(&args, &train, nc) };
    let mut network = Network::new(&architecture, nc, loss.clone(), &compute)?;
    initial::freeze(&mut network.params, &args.freeze, detector.head_row)?;
    match &found {
        // Whatever was measured since: the sums of a run keep their order.
        Some((_, checkpoint)) => network.use_tuning(&checkpoint.progress.tuning),
        None => network.use_stored_tuning(),
    }
    let resolved = match &found {
        Some((_, checkpoint)) => keep_choices(&checkpoint.progress, &args, reporter),
        None => {
            let sizes = (&train, imgsz);
            choose_batch(spec, &args, &compute, &network, &loss, sizes)?
        }
    };
    check_batch(&args, &resolved, train.len(), reporter);
    if found.is_none() && std::env::var_os(TUNE).is_some_and(|v| v == "1") {
        network.tune((resolved.batch, imgsz, imgsz), false)?;
    }
    let mut optimizer = optimizer(&args, &resolved, &network.params)?;
    let fingerprint = save::fingerprint(&detector.name, nc, network.params.trainable_count(), &optimizer);
    let batches = train.len().div_ceil(resolved.batch);
    let epochs = found
        .as_ref()
        .map_or(args.epochs, |(_, c)| if args.time.is_some() { c.progress.epochs } else { args.epochs });
    let schedule =
        Schedule::new(schedule_spec(&args, &resolved, batches, epochs)).with_passes(resolved.passes);
    let has_momentum = optimizer.algorithm().has_momentum();
    schedule.apply(0, 0, &mut optimizer.groups, has_momentum);
    if let Some(start) = &start {
        initial::initialise(&mut network.params, &detector, args.seed);
        pretrained::apply(start, &mut network.params, &dataset.names, &args, reporter)?;
    }
    let ema = Ema::new(&network.params.values, &network.params.buffers, Ema::DECAY, Ema::TAU);
    let validation = validation_args(&args, &dataset, &resolved, imgsz);
    let val_split = validation_split(&dataset, &args)?.clone();
    let val_loader = open_val_loader(&val_split, &validation, &args)?;
    if Feed::is_on_device(&compute, &args) {
        // Everything else has its memory before decoded images fill what is left.
        network.prepare(resolved.batch, imgsz, imgsz, Mode::Train)?;
        plan_validation(&mut network, &val_loader)?;
        network.push(&optimizer, &ema)?;
    }
    let loader = Feed::open(&compute, &args, &train, resolved.batch, imgsz)?;
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
    run.network.push(&run.optimizer, &run.ema)?;
    run.report_plan(resumed, compute.describe());
    Ok(run)
}

/// The batch and what follows from it, for a run that begins.
fn choose_batch(
    spec: &SessionSpec,
    args: &TrainArgs,
    compute: &Compute,
    network: &Network,
    loss: &LossConfig,
    (train, imgsz): (&Split, usize),
) -> Result<Resolved, TrainError> {
    // Memory must do for the largest size that `multi_scale` may draw.
    let side = largest_side(imgsz, args.multi_scale, STRIDE_MAX);
    let largest = build(network.name(), loss.nc, side, side)?;
    let demand = Demand {
        args,
        compute,
        network,
        largest: &largest,
        loss,
        imgsz,
        images: train.len(),
        boxes_max: train.boxes_per_image_max(),
        gpu_share_max: spec.gpu_share_max,
    };
    resolve(args, &largest, demand.choose()?, train.len(), loss.nc)
}

/// Plans the largest validation batch.
fn plan_validation(network: &mut Network, loader: &ValLoader) -> Result<(), TrainError> {
    let largest = loader.shapes().iter().copied().max_by_key(|&(h, w)| h * w);
    largest.map_or(Ok(()), |(h, w)| network.prepare(loader.batch_size(), h, w, Mode::Eval))
}

impl Run<'_, '_> {
    /// Plans the full training batch and the largest validation batch, so that memory is refused now or never.
    fn first_plans(&mut self) -> Result<(), TrainError> {
        let (h, w) = self.loader.input_max();
        self.network.prepare(self.progress.resolved.batch, h, w, Mode::Train)?;
        plan_validation(&mut self.network, &self.val_loader)
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

    fn report_plan(&mut self, resumed_from: Option<PathBuf>, device: String) {
        let resolved = &self.progress.resolved;
        let (h, w) = self.loader.input_max();
        let shaped = self.network.shaped(resolved.batch, h, w, Mode::Train);
        let event = SessionEvent::Plan {
            parameters: self.network.params.trainable_count(),
            macs: self.detector.graph.macs(),
            arena_bytes: shaped.plan.bytes().total(),
            batch: resolved.batch,
            imgsz: self.validation.imgsz,
            accumulate: self.schedule.accumulate_at(u64::MAX),
            device,
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
    let folder = checkpoint::folder_of(path).ok_or_else(|| {
        fault(format!("{} is neither a checkpoint nor in a run folder with checkpoints", path.display()))
    })?;
    let found = Store::new(&folder, 2).newest()?;
    let none = || fault(format!("{} holds no checkpoint that verifies", folder.display()));
    found.newest.ok_or_else(none).map(Some)
}
