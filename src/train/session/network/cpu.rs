//! The network on the processor.

use std::time::{Duration, Instant};

use super::{Found, Shaped, engine};
use crate::data::Batch;
use crate::detect::decode::{HeadLevel, detect};
use crate::detect::losses::detection::{DetectionLoss, HeadLevelGrad, LossConfig, LossItems};
use crate::detect::nms::NmsArgs;
use crate::detect::targets::Target;
use crate::engine::device::cpu::{Executor, Profile};
use crate::engine::optim::{Ema, Optimizer, clip_grad_norm};
use crate::engine::params::ParamSet;
use crate::train::error::TrainError;

/// Executor and loss.
pub(super) struct CpuBackend {
    executor: Executor,
    loss_config: LossConfig,
    loss: DetectionLoss,
    loss_capacity: (usize, usize),
    loss_time: Duration,
    spare: Spare,
}

impl CpuBackend {
    pub fn new(loss_config: LossConfig, threads: usize) -> Result<CpuBackend, TrainError> {
        let executor = Executor::new(&[], threads).map_err(engine("start"))?;
        let loss = DetectionLoss::new(loss_config.clone(), 0, 0, 0);
        Ok(CpuBackend {
            executor,
            loss_config,
            loss,
            loss_capacity: (0, 0),
            loss_time: Duration::ZERO,
            spare: Spare::default(),
        })
    }

    pub fn threads(&self) -> usize {
        self.executor.threads()
    }

    pub fn take_profile(&mut self) -> (Profile, f64) {
        (self.executor.take_profile(), std::mem::take(&mut self.loss_time).as_secs_f64())
    }

    pub fn reserve(&mut self, shaped: &Shaped) -> Result<(), TrainError> {
        self.executor.reserve(&shaped.plan).map_err(engine("reserve memory"))?;
        let (n, anchors) = (shaped.plan.batch(), shaped.detector.anchor_count());
        if n > self.loss_capacity.0 || anchors > self.loss_capacity.1 {
            let capacity = (self.loss_capacity.0.max(n), self.loss_capacity.1.max(anchors));
            self.loss = DetectionLoss::new(self.loss_config.clone(), capacity.0, capacity.1, 64);
            self.loss_capacity = capacity;
        }
        Ok(())
    }

    pub fn train(&mut self, shaped: &Shaped, params: &mut ParamSet, batch: &Batch) -> LossItems {
        let (n, h, w) = (batch.n, batch.h, batch.w);
        let (graph, plan) = (&shaped.detector.graph, &shaped.plan);
        self.executor.input_mut(plan).copy_from_slice(&batch.images[..n * h * w * 3]);
        self.executor.forward(graph, plan, params);
        let pool = self.executor.pool();
        let mut levels = Vec::with_capacity(4);
        let mut grads = Vec::with_capacity(4);
        let mut outputs = self.executor.outputs_and_grads(plan).into_iter();
        for (level, &stride) in shaped.detector.strides.iter().enumerate() {
            let [_, h, w, _] = plan.output_shape(2 * level);
            let (Some((boxes, boxes_grad)), Some((scores, scores_grad))) = (outputs.next(), outputs.next())
            else {
                unreachable!("a level has two outputs")
            };
            levels.push(HeadLevel { stride, h, w, boxes, scores });
            grads.push(HeadLevelGrad { boxes: boxes_grad, scores: scores_grad });
        }
        let start = Instant::now();
        let loss = &mut self.loss;
        let items = pool.install(|| loss.compute(&levels, &mut grads, &batch.targets, n, 1.0));
        self.loss_time += start.elapsed();
        if items.total.is_finite() {
            self.executor.backward(graph, plan, params);
        }
        items
    }

    pub fn update(
        &mut self,
        params: &mut ParamSet,
        optimizer: &mut Optimizer,
        ema: &mut Ema,
        norm_max: f64,
    ) -> f64 {
        self.executor.install(|| {
            optimizer.zero_frozen(&mut params.grads);
            let norm = clip_grad_norm(&mut params.grads, norm_max);
            if norm.is_finite() {
                optimizer.step(&mut params.values, &params.grads);
                ema.update(&params.values, &params.buffers);
            }
            params.clear_grads();
            norm
        })
    }

    pub fn detect(
        &mut self,
        shaped: &Shaped,
        params: &mut ParamSet,
        images: &[u8],
        targets: Option<&[Target]>,
        nms: &NmsArgs,
    ) -> Found {
        let start = Instant::now();
        let (graph, plan) = (&shaped.detector.graph, &shaped.plan);
        self.executor.input_mut(plan).copy_from_slice(images);
        self.executor.forward(graph, plan, params);
        let pool = self.executor.pool();
        let mut levels = Vec::with_capacity(4);
        for (level, &stride) in shaped.detector.strides.iter().enumerate() {
            let [_, h, w, _] = plan.output_shape(2 * level);
            let boxes = self.executor.output(plan, 2 * level);
            let scores = self.executor.output(plan, 2 * level + 1);
            levels.push(HeadLevel { stride, h, w, boxes, scores });
        }
        let mut losses = LossItems::default();
        if let Some(targets) = targets {
            let mut grads = self.spare.grads(&levels);
            let loss = &mut self.loss;
            losses = pool.install(|| loss.compute(&levels, &mut grads, targets, plan.batch(), 1.0));
        }
        let network_s = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let (nc, reg_max, n) = (shaped.detector.nc, shaped.detector.reg_max, plan.batch());
        let detections = pool.install(|| detect(&levels, nc, reg_max, n, nms));
        Found { detections, losses, seconds: [network_s, start.elapsed().as_secs_f64()] }
    }
}

/// Room for the gradients that the loss writes and validation does not want.
#[derive(Default)]
struct Spare {
    floats: Vec<f32>,
}

impl Spare {
    fn grads(&mut self, levels: &[HeadLevel]) -> Vec<HeadLevelGrad<'_>> {
        let len = levels.iter().map(|l| l.boxes.len() + l.scores.len()).sum();
        if self.floats.len() < len {
            self.floats.resize(len, 0.0);
        }
        let mut rest = self.floats.as_mut_slice();
        let mut grads = Vec::with_capacity(levels.len());
        for level in levels {
            let (boxes, after) = rest.split_at_mut(level.boxes.len());
            let (scores, after) = after.split_at_mut(level.scores.len());
            rest = after;
            grads.push(HeadLevelGrad { boxes, scores });
        }
        grads
    }
}
