//! The loop: batches, steps, the end of an epoch.

use std::time::Instant;

use serde_json::Value;

use super::feed::Fed;
use super::{Flow, Run, metric_map};
use crate::data::{Batch, DataError, resize_batch};
use crate::detect::losses::detection::LossItems;
use crate::engine::rng::{Rng, Use};
use crate::train::early_stop::fitness;
use crate::train::error::TrainError;
use crate::train::event::{Command, SessionEvent};
use crate::train::run_folder::{columns, format_g6, round5};

/// Largest global norm of the gradients of a step.
const GRADIENT_NORM_MAX: f64 = 10.0;
/// Returns to the last checkpoint because of a loss that is not finite.
const ROLLBACKS_MAX: u32 = 1;

/// Why an epoch ended before its end.
enum Interruption {
    Stopped,
    Diverged(TrainError),
}

impl Run<'_, '_> {
    /// All epochs from where the run is.
    pub(super) fn train(&mut self) -> Result<Flow, TrainError> {
        if self.progress.step == 0 && self.progress.batch == 0 {
            self.save()?;
        }
        while !self.progress.is_stopping && self.progress.epoch < self.progress.epochs {
            match self.batches_of_epoch()? {
                None => {}
                Some(Interruption::Stopped) => return Ok(Flow::Stopped),
                Some(Interruption::Diverged(error)) => {
                    self.roll_back(error)?;
                    continue;
                }
            }
            if self.end_epoch()? == Flow::Stopped {
                return Ok(Flow::Stopped);
            }
        }
        Ok(Flow::Done)
    }

    /// The batches of the epoch in hand, from the cursor on.
    fn batches_of_epoch(&mut self) -> Result<Option<Interruption>, TrainError> {
        let (epoch, epochs, batches) = (self.progress.epoch, self.progress.epochs, self.batches);
        if self.progress.batch >= batches {
            return Ok(None);
        }
        let close = self.args.close_mosaic;
        let mosaic_closed = close > 0 && epoch >= epochs.saturating_sub(close);
        let batch = self.progress.batch + 1;
        self.reporter.emit(SessionEvent::EpochStarted {
            epoch: epoch + 1,
            epochs,
            batch,
            batches,
            mosaic_closed,
        });
        self.loader.start_epoch(epoch, self.progress.batch, mosaic_closed);
        let started = Instant::now();
        let mut waited = 0.0;
        while self.progress.batch < batches {
            match self.reporter.command() {
                Command::Continue => {}
                Command::CheckpointNow => self.save()?,
                Command::Stop => return Ok(Some(Interruption::Stopped)),
            }
            if self.is_out_of_time() {
                break;
            }
            let began = Instant::now();
            let next = self.loader.next();
            let Some(mut fed) = next.map_err(|e| self.data_error(e))? else {
                let message = format!("the loader ended after {} of {batches} batches", self.progress.batch);
                return Err(TrainError::Internal { message });
            };
            self.choose_size(&mut fed.batch);
            self.picture_of_batch(&mut fed)?;
            if let Some(error) = self.one_batch(&fed)? {
                return Ok(Some(Interruption::Diverged(error)));
            }
            let seconds = began.elapsed().as_secs_f64();
            waited += self.loader.wait_seconds();
            let wait_share = (waited / started.elapsed().as_secs_f64().max(1e-9)).clamp(0.0, 1.0);
            self.report_step(&fed.batch, seconds, wait_share);
            self.loader.recycle(fed, &self.network)?;
            self.save_if_due()?;
        }
        Ok(None)
    }

    /// Forward, backward, and a step when enough batches are summed. Returns the error of a loss or
    /// gradient that is not finite; nothing was stepped on it.
    fn one_batch(&mut self, fed: &Fed) -> Result<Option<TrainError>, TrainError> {
        let batch = &fed.batch;
        let (epoch, index) = (self.progress.epoch, self.progress.batch);
        let iteration = self.iteration();
        let has_momentum = self.optimizer.algorithm().has_momentum();
        self.schedule.apply(epoch, index, &mut self.optimizer.groups, has_momentum);
        let items = self.network.train(batch, fed.on_device.as_ref())?;
        if !items.total.is_finite() {
            return Ok(Some(self.diverged("the loss", f64::from(items.total), batch)));
        }
        self.add_losses(items);
        let accumulate = self.schedule.accumulate_at(iteration) as i64;
        if iteration as i64 - self.progress.last_step >= accumulate {
            match self.step()? {
                Some(norm) if !norm.is_finite() => {
                    return Ok(Some(self.diverged("the gradient norm", norm, batch)));
                }
                // An overflow of half precision passes by with a smaller loss scale.
                _ => {}
            }
            self.progress.last_step = iteration as i64;
            self.progress.step += 1;
        }
        self.progress.batch += 1;
        Ok(None)
    }

    /// Clips, moves the parameters and their average, clears the gradients; returns the gradient norm.
    /// A norm that is not finite moves nothing.
    fn step(&mut self) -> Result<Option<f64>, TrainError> {
        let Run { network, optimizer, ema, .. } = self;
        network.update(optimizer, ema, GRADIENT_NORM_MAX)
    }

    fn add_losses(&mut self, items: LossItems) {
        let items = [items.box_, items.cls, items.dfl].map(f64::from);
        self.progress.loss_sums.iter_mut().zip(items).for_each(|(sum, item)| *sum += item);
    }

    /// Mean loss items of the epoch so far.
    fn mean_losses(&self) -> [f64; 3] {
        self.progress.loss_sums.map(|sum| sum / self.progress.batch.max(1) as f64)
    }

    fn report_step(&mut self, batch: &Batch, seconds: f64, data_wait_ratio: f64) {
        let [box_loss, cls_loss, dfl_loss] = self.mean_losses();
        self.reporter.emit(SessionEvent::Step {
            epoch: self.progress.epoch + 1,
            batch: self.progress.batch,
            batches: self.batches,
            step: self.progress.step,
            box_loss,
            cls_loss,
            dfl_loss,
            lr: self.optimizer.groups[0].lr,
            boxes: batch.targets.len(),
            imgsz: batch.h.max(batch.w),
            images_per_second: batch.n as f64 / seconds.max(1e-9),
            data_wait_ratio,
        });
    }

    /// With `multi_scale`, resizes the batch to a size drawn for it.
    fn choose_size(&self, batch: &mut Batch) {
        let share = self.args.multi_scale;
        if share <= 0.0 {
            return;
        }
        let stride = self.validation.stride;
        let size = self.validation.imgsz as f64;
        let low = stride.max((size * (1.0 - share)) as usize);
        let high = (size * (1.0 + share) + stride as f64) as usize;
        let seed = self.args.seed;
        let mut rng = Rng::new(seed, Use::MultiScale, self.progress.epoch, self.progress.batch as u32);
        let drawn = (low + rng.below(high.saturating_sub(low).max(1))) / stride * stride;
        let factor = drawn as f64 / batch.h.max(batch.w) as f64;
        let side = |length: usize| (length as f64 * factor / stride as f64).ceil() as usize * stride;
        let (h, w) = (side(batch.h), side(batch.w));
        if (h, w) != (batch.h, batch.w) {
            resize_batch(batch, h, w);
        }
    }

    /// True when a time budget is spent.
    fn is_out_of_time(&self) -> bool {
        self.args.time.is_some_and(|hours| self.elapsed_s() > hours * 3600.0)
    }

    /// Validation, fitness, the row, the early stop, weights, a checkpoint.
    fn end_epoch(&mut self) -> Result<Flow, TrainError> {
        let epoch = self.progress.epoch;
        let is_last = epoch + 1 >= self.progress.epochs || self.is_out_of_time();
        let can_stop = self.progress.stopper.best_epoch > 0 && self.progress.stopper.would_stop(epoch + 1);
        let mut found = None;
        if self.args.val || is_last || can_stop {
            match self.validate_average()? {
                None => return Ok(Flow::Stopped),
                Some(fitness) => found = Some(fitness),
            }
        }
        let best = self.progress.best_fitness;
        let is_best = found.is_some_and(|f| best.is_none_or(|best| f >= best));
        if is_best {
            self.progress.best_fitness = found;
        }
        // A session that resumed right here has computed no batch of this epoch itself.
        let has_momentum = self.optimizer.algorithm().has_momentum();
        let last_batch = self.progress.batch.saturating_sub(1);
        self.schedule.apply(epoch, last_batch, &mut self.optimizer.groups, has_momentum);
        let row = self.row();
        self.progress.rows.push(row.iter().map(|&v| format_g6(v)).collect::<Vec<_>>().join(","));
        if let Some(fitness) = found {
            self.progress.is_stopping |= self.progress.stopper.observe(epoch + 1, fitness);
        }
        self.progress.is_stopping |= self.is_out_of_time();
        self.write_epoch_files(is_best, is_last || self.progress.is_stopping)?;
        let names = columns(self.optimizer.groups.len());
        self.reporter.emit(SessionEvent::Epoch {
            epoch: epoch + 1,
            epochs: self.progress.epochs,
            columns: names.into_iter().zip(row).map(|(n, v)| (n, number(v))).collect(),
            fitness: found,
            is_best,
        });
        self.progress.epoch += 1;
        self.progress.batch = 0;
        self.progress.loss_sums = [0.0; 3];
        self.reestimate_epochs();
        self.save()?;
        Ok(Flow::Done)
    }

    /// With a time budget the number of epochs follows the mean time of an epoch.
    fn reestimate_epochs(&mut self) {
        let Some(hours) = self.args.time else { return };
        let mean = self.elapsed_s() / f64::from(self.progress.epoch.max(1));
        let epochs = (hours * 3600.0 / mean.max(1e-6)).ceil().min(1e6) as u32;
        self.progress.epochs = epochs.max(self.progress.epoch);
        self.schedule = self.schedule.clone().with_epochs(self.progress.epochs.max(1));
    }

    /// Validates the averaged model; its fitness, or `None` when told to stop.
    fn validate_average(&mut self) -> Result<Option<f64>, TrainError> {
        self.network.swap_average(&mut self.ema)?;
        let outcome = self.validate_network(false);
        self.network.swap_average(&mut self.ema)?;
        let Some(validation) = outcome? else { return Ok(None) };
        let metrics = &validation.metrics;
        let fitness = fitness(metrics.map50_95);
        self.progress.metrics =
            [metrics.precision, metrics.recall, metrics.map50, metrics.map50_95].map(round5);
        self.progress.val_losses = validation.losses.map(round5);
        self.report_validation(&validation, self.progress.epoch + 1, false);
        Ok(Some(fitness))
    }

    /// The row of `results.csv` of the epoch in hand.
    fn row(&self) -> Vec<f64> {
        let progress = &self.progress;
        let mut row = vec![f64::from(progress.epoch + 1), self.elapsed_s()];
        row.extend(self.mean_losses().map(round5));
        row.extend(progress.metrics);
        row.extend(progress.val_losses);
        row.extend(self.optimizer.groups.iter().map(|g| g.lr));
        row
    }

    /// Goes back to the newest checkpoint, with the averaged weights as the live ones so that the run does
    /// not meet the same numbers again; `error` when that was done before.
    fn roll_back(&mut self, error: TrainError) -> Result<(), TrainError> {
        if self.progress.rollbacks >= ROLLBACKS_MAX {
            return Err(error);
        }
        let found = self.store.newest()?;
        let Some((path, checkpoint)) = found.newest else { return Err(error) };
        self.reporter.warn(format!("{}; going back to {}", error.chain(), path.display()));
        let rollbacks = self.progress.rollbacks + 1;
        self.restore(&path, checkpoint)?;
        self.progress.rollbacks = rollbacks;
        self.network.params.values.copy_from_slice(&self.ema.values);
        self.network.params.buffers.copy_from_slice(&self.ema.buffers);
        self.network.push(&self.optimizer, &self.ema)?;
        self.save()
    }

    fn diverged(&self, what: &'static str, value: f64, batch: &Batch) -> TrainError {
        let names = self.image_names(batch);
        TrainError::Diverged {
            what,
            value,
            epoch: self.progress.epoch + 1,
            batch: self.progress.batch + 1,
            step: self.progress.step,
            lr: self.optimizer.groups[0].lr,
            images: names,
        }
    }

    pub(super) fn data_error(&self, error: DataError) -> TrainError {
        super::feeding::data_error(&self.args.data, error)
    }

    /// Reports a validation.
    pub(super) fn report_validation(
        &mut self,
        validation: &super::Validation,
        epoch: u32,
        with_classes: bool,
    ) {
        let classes = if with_classes { validation.class_figures(&self.dataset.names) } else { Vec::new() };
        let m = &validation.metrics;
        self.reporter.emit(SessionEvent::Validated {
            epoch,
            images: m.images,
            boxes: m.targets,
            metrics: metric_map(&[m.precision, m.recall, m.map50, m.map50_95].map(round5)),
            seconds: validation.seconds,
            speed_ms: validation.speed_ms,
            classes,
        });
    }
}

/// A JSON number; one that is not finite cannot be written and becomes null.
fn number(value: f64) -> Value {
    serde_json::Number::from_f64(value).map_or(Value::Null, Value::Number)
}
