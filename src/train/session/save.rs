//! Checkpoints, weights files and the table of results.

use std::path::Path;
use std::time::Instant;

use super::{Outcome, Run, metric_map};
use crate::engine::optim::Optimizer;
use crate::train::checkpoint::{Checkpoint, CheckpointRef};
use crate::train::error::TrainError;
use crate::train::event::{OutcomeKind, SessionEvent};
use crate::train::run_folder::columns;
use crate::train::weights_file::{self, Metadata};

/// Saving within an epoch takes at most one part in this many of the time.
const SAVE_TIME_SHARE: f64 = 20.0;

impl Run<'_, '_> {
    /// Writes a checkpoint of where the run is.
    pub(super) fn save(&mut self) -> Result<(), TrainError> {
        let began = Instant::now();
        self.network.fetch(&mut self.optimizer, &mut self.ema)?;
        self.progress.elapsed_s = self.elapsed_s();
        self.progress.ema_updates = self.ema.updates;
        self.progress.loss_scale = self.network.loss_scale()?;
        self.progress.tuning = self.network.tuning().clone();
        // Between two steps the gradients are zero; within a window they are part of the state.
        let is_pending = self.iteration() as i64 - 1 != self.progress.last_step;
        let params = &self.network.params;
        let saved = self.store.save(
            self.iteration(),
            &CheckpointRef {
                progress: &self.progress,
                values: &params.values,
                buffers: &params.buffers,
                ema_values: &self.ema.values,
                ema_buffers: &self.ema.buffers,
                grads: is_pending.then_some(params.grads.as_slice()),
                optimizer: self.optimizer.state(),
            },
        )?;
        self.last_saved = Instant::now();
        self.save_seconds = began.elapsed().as_secs_f64();
        self.reporter.emit(SessionEvent::Checkpoint {
            path: saved.path,
            sha256: saved.sha256,
            epoch: self.progress.epoch,
            step: self.progress.step,
            milliseconds: (self.save_seconds * 1e3) as u64,
        });
        Ok(())
    }

    /// Writes a checkpoint when the interval has passed; a slow disk stretches the interval.
    pub(super) fn save_if_due(&mut self) -> Result<(), TrainError> {
        let interval = (self.checkpoint_interval_s as f64).max(self.save_seconds * SAVE_TIME_SHARE);
        if self.args.save && self.last_saved.elapsed().as_secs_f64() >= interval {
            self.save()?;
        }
        Ok(())
    }

    /// Takes up a checkpoint.
    pub(super) fn restore(&mut self, path: &Path, checkpoint: Checkpoint) -> Result<(), TrainError> {
        let fault = |message: String| TrainError::Resume { path: path.to_owned(), message };
        let params = &mut self.network.params;
        let lengths = [
            ("parameters", params.values.len(), checkpoint.values.len()),
            ("running statistics", params.buffers.len(), checkpoint.buffers.len()),
            ("averaged parameters", params.values.len(), checkpoint.ema_values.len()),
            ("averaged statistics", params.buffers.len(), checkpoint.ema_buffers.len()),
            ("gradients", params.grads.len(), checkpoint.grads.as_ref().map_or(params.grads.len(), Vec::len)),
        ];
        for (what, expected, found) in lengths {
            if expected != found {
                return Err(fault(format!("it holds {found} {what}, the network has {expected}")));
            }
        }
        self.optimizer.import(&checkpoint.optimizer).map_err(|e| fault(e.to_string()))?;
        params.values = checkpoint.values;
        params.buffers = checkpoint.buffers;
        match checkpoint.grads {
            Some(grads) => params.grads = grads,
            None => params.clear_grads(),
        }
        self.ema.values = checkpoint.ema_values;
        self.ema.buffers = checkpoint.ema_buffers;
        self.ema.updates = checkpoint.progress.ema_updates;
        self.progress = checkpoint.progress;
        if let Some(scale) = self.progress.loss_scale {
            self.network.set_loss_scale(scale)?;
        }
        self.schedule = self.schedule.clone().with_epochs(self.progress.epochs.max(1));
        Ok(())
    }

    /// The table of results and the weights files of an epoch.
    pub(super) fn write_epoch_files(&mut self, is_best: bool, is_last: bool) -> Result<(), TrainError> {
        let names = columns(self.optimizer.groups.len());
        self.reporter.folder.write_results(&names, &self.progress.rows)?;
        if !(self.args.save || is_last) {
            return Ok(());
        }
        self.network.fetch(&mut self.optimizer, &mut self.ema)?;
        self.write_weights("last")?;
        if is_best {
            self.write_weights("best")?;
        }
        let period = self.args.save_period;
        if period >= 1 && self.progress.epoch.is_multiple_of(period as u32) {
            self.write_weights(&format!("epoch{}", self.progress.epoch))?;
        }
        Ok(())
    }

    fn write_weights(&self, name: &str) -> Result<(), TrainError> {
        let path = self.reporter.folder.weights(name);
        let (params, ema) = (&self.network.params, &self.ema);
        weights_file::write(&path, &self.detector, params, &ema.values, &ema.buffers, &self.metadata()?)
    }

    /// What the weights say about themselves. Nothing in it depends on the clock or the machine.
    fn metadata(&self) -> Result<Metadata, TrainError> {
        let fault = |e: serde_json::Error| TrainError::Internal { message: format!("metadata: {e}") };
        let json = |value: serde_json::Value| value.to_string();
        let entries = [
            ("format", "boxwright".to_owned()),
            ("task", "detect".to_owned()),
            ("model", self.detector.name.clone()),
            ("nc", self.detector.nc.to_string()),
            ("names", serde_json::to_string(&self.dataset.names).map_err(fault)?),
            ("imgsz", self.validation.imgsz.to_string()),
            ("strides", serde_json::to_string(&self.detector.strides).map_err(fault)?),
            ("reg_max", self.detector.reg_max.to_string()),
            ("epoch", (self.progress.epoch + 1).to_string()),
            ("step", self.progress.step.to_string()),
            ("fitness", json(self.progress.best_fitness.into())),
            ("metrics", json(metric_map(&self.progress.metrics).into())),
            ("train_args", serde_json::to_string(&self.args).map_err(fault)?),
        ];
        Ok(entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
    }

    /// The end of a session that was told to stop: everything is saved.
    pub(super) fn stopped(&mut self) -> Result<Outcome, TrainError> {
        self.save()?;
        Ok(self.outcome(OutcomeKind::Stopped, metric_map(&self.progress.metrics)))
    }

    /// What the session gives back.
    pub(super) fn outcome(
        &self,
        kind: OutcomeKind,
        metrics: serde_json::Map<String, serde_json::Value>,
    ) -> Outcome {
        let existing = |name: &str| Some(self.reporter.folder.weights(name)).filter(|path| path.is_file());
        Outcome {
            kind,
            metrics,
            fitness: self.progress.best_fitness,
            best: existing("best"),
            last: existing("last"),
            epochs: self.progress.epoch,
            step: self.progress.step,
            seconds: self.elapsed_s(),
        }
    }
}

/// What must be equal for a checkpoint to fit: the network and the order of its parameters, the rule of the
/// optimiser.
pub(super) fn fingerprint(model: &str, nc: usize, parameters: usize, optimizer: &Optimizer) -> String {
    format!("{model} nc={nc} parameters={parameters} optimizer={}", optimizer.algorithm().name())
}
