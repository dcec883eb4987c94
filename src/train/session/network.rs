//! The network in training: parameters, plans for every input shape met, the loss.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::data::Batch;
use crate::detect::decode::HeadLevel;
use crate::detect::losses::detection::{DetectionLoss, HeadLevelGrad, LossConfig, LossItems};
use crate::detect::models::{Detector, ModelError};
use crate::detect::targets::Target;
use crate::engine::device::cpu::{Executor, Profile};
use crate::engine::error::EngineError;
use crate::engine::params::ParamSet;
use crate::engine::plan::{Mode, Plan};
use crate::train::error::TrainError;

/// Plans kept at a time; shapes beyond that are planned anew.
const PLANS_MAX: usize = 64;

/// One input shape: its graph and the plan of it.
pub(super) struct Shaped {
    pub detector: Detector,
    pub plan: Plan,
}

/// Key of a plan: images, height, width, whether it trains.
type Shape = (usize, usize, usize, bool);

/// A detector with its parameters and everything needed to run it on the CPU.
pub struct Network {
    /// Parameters, gradients, running statistics.
    pub params: ParamSet,
    executor: Executor,
    name: String,
    nc: usize,
    loss_config: LossConfig,
    loss: DetectionLoss,
    loss_capacity: (usize, usize),
    plans: HashMap<Shape, Shaped>,
    loss_time: Duration,
}

/// Raw outputs of a batch, one entry per level.
pub struct RawOutput<'a> {
    /// The levels.
    pub levels: Vec<HeadLevel<'a>>,
    /// Loss items, in the units of training.
    pub losses: LossItems,
}

impl Network {
    /// The named network for `nc` classes with parameters that are not yet set.
    ///
    /// # Errors
    /// An unknown name; memory or threads refused.
    pub fn new(name: &str, nc: usize, loss: LossConfig, threads: usize) -> Result<Network, TrainError> {
        // Parameters do not depend on the input size; the smallest legal one is cheap to build.
        let detector = build(name, nc, 64, 64)?;
        let params = ParamSet::new(&detector.graph);
        let executor = Executor::new(&[], threads).map_err(engine("start"))?;
        let loss_config = LossConfig { reg_max: detector.reg_max, ..loss };
        let (name, loss) = (detector.name, DetectionLoss::new(loss_config.clone(), 0, 0, 0));
        let plans = HashMap::new();
        Ok(Network {
            params,
            executor,
            name,
            nc,
            loss_config,
            loss,
            loss_capacity: (0, 0),
            plans,
            loss_time: Duration::ZERO,
        })
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.executor.threads()
    }

    /// Bins of a side's distance distribution.
    pub fn reg_max(&self) -> usize {
        self.loss_config.reg_max
    }

    /// Name of the model table.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the engine's time went, and seconds of the loss when training, since the last call.
    pub fn take_profile(&mut self) -> (Profile, f64) {
        (self.executor.take_profile(), std::mem::take(&mut self.loss_time).as_secs_f64())
    }

    /// Runs `work` on the parameters, on the compute threads.
    pub fn with_params<R: Send>(&mut self, work: impl FnOnce(&mut ParamSet) -> R + Send) -> R {
        let Network { executor, params, .. } = self;
        executor.install(|| work(params))
    }

    /// Makes sure that a batch of this shape can run, growing memory and workspaces if needed.
    ///
    /// # Errors
    /// Memory refused, or a size that the network cannot take.
    pub fn prepare(&mut self, n: usize, h: usize, w: usize, mode: Mode) -> Result<(), TrainError> {
        let key = (n, h, w, mode == Mode::Train);
        if !self.plans.contains_key(&key) {
            if self.plans.len() >= PLANS_MAX {
                self.plans.clear();
            }
            let detector = build(&self.name, self.nc, h, w)?;
            let plan = Plan::with_params(&detector.graph, &self.params, n, mode);
            self.executor.reserve(&plan).map_err(engine("reserve memory"))?;
            self.plans.insert(key, Shaped { detector, plan });
        }
        let anchors = self.plans[&key].detector.anchor_count();
        if n > self.loss_capacity.0 || anchors > self.loss_capacity.1 {
            let capacity = (self.loss_capacity.0.max(n), self.loss_capacity.1.max(anchors));
            self.loss = DetectionLoss::new(self.loss_config.clone(), capacity.0, capacity.1, 64);
            self.loss_capacity = capacity;
        }
        Ok(())
    }

    /// The graph and plan of a shape that was prepared.
    pub(super) fn shaped(&self, n: usize, h: usize, w: usize, mode: Mode) -> &Shaped {
        self.plans.get(&(n, h, w, mode == Mode::Train)).expect("the shape was prepared")
    }

    /// Forward, loss, backward: adds the gradient of the batch to `params.grads`. When the loss is not
    /// finite the backward pass is left out.
    ///
    /// # Errors
    /// As [`Network::prepare`].
    pub fn train(&mut self, batch: &Batch) -> Result<LossItems, TrainError> {
        let (n, h, w) = (batch.n, batch.h, batch.w);
        self.prepare(n, h, w, Mode::Train)?;
        let shaped = &self.plans[&(n, h, w, true)];
        let (graph, plan) = (&shaped.detector.graph, &shaped.plan);
        self.executor.input_mut(plan).copy_from_slice(&batch.images[..n * h * w * 3]);
        self.executor.forward(graph, plan, &mut self.params);
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
            self.executor.backward(graph, plan, &mut self.params);
        }
        Ok(items)
    }

    /// Forward in evaluation mode, with the loss of the outputs.
    ///
    /// # Errors
    /// As [`Network::prepare`].
    pub fn evaluate(&mut self, batch: &Batch, spare: &mut Spare) -> Result<RawOutput<'_>, TrainError> {
        let losses_wanted = Some(batch.targets.as_slice());
        self.infer(&batch.images, (batch.n, batch.h, batch.w), losses_wanted, spare)
    }

    /// Forward in evaluation mode of `[n, h, w, 3]` RGB bytes; the loss is left out without targets.
    ///
    /// # Errors
    /// As [`Network::prepare`].
    pub fn infer(
        &mut self,
        images: &[u8],
        (n, h, w): (usize, usize, usize),
        targets: Option<&[Target]>,
        spare: &mut Spare,
    ) -> Result<RawOutput<'_>, TrainError> {
        self.prepare(n, h, w, Mode::Eval)?;
        let shaped = &self.plans[&(n, h, w, false)];
        let (graph, plan) = (&shaped.detector.graph, &shaped.plan);
        self.executor.input_mut(plan).copy_from_slice(&images[..n * h * w * 3]);
        self.executor.forward(graph, plan, &mut self.params);
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
            let mut grads = spare.grads(&levels);
            let loss = &mut self.loss;
            losses = pool.install(|| loss.compute(&levels, &mut grads, targets, n, 1.0));
        }
        Ok(RawOutput { levels, losses })
    }
}

/// Room for the gradients that the loss writes and validation does not want.
#[derive(Default)]
pub struct Spare {
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

/// Builds the named detector; its refusals are faults of the configuration.
pub(super) fn build(name: &str, nc: usize, h: usize, w: usize) -> Result<Detector, TrainError> {
    Detector::build(name, nc, h, w).map_err(|error| {
        let key = match error {
            ModelError::InputSize { .. } => "imgsz",
            _ => "model",
        };
        TrainError::Config { key: key.into(), message: error.to_string() }
    })
}

/// Wraps an error of the engine with what was tried.
pub(super) fn engine(action: &'static str) -> impl Fn(EngineError) -> TrainError {
    move |source| TrainError::Engine { action, source }
}
