//! The network in training: parameters, plans for every input shape met, the loss, on the CPU or a GPU.
//!
//! [`Network`] knows plans and parameters; the backend (`cpu`, `cuda`) runs them. On a GPU the numbers that training
//! moves live there: [`Network::push`] sends those of the host, [`Network::fetch`] brings them back for a checkpoint.

mod cpu;
mod cuda;
mod tuning;

use std::collections::HashMap;
use std::sync::Arc;

use crate::data::Batch;
use crate::data::device_loader::DeviceBatch;
use crate::detect::losses::detection::{LossConfig, LossItems};
use crate::detect::models::{Detector, ModelError};
use crate::detect::nms::{Detection, NmsArgs};
use crate::detect::targets::Target;
use crate::engine::device::cpu::Profile;
use crate::engine::device::cuda::{Device, DeviceError, Event, Precision};
use crate::engine::error::EngineError;
use crate::engine::ops::conv2d::cuda::Tuning;
use crate::engine::optim::{Ema, LossScale, Optimizer};
use crate::engine::params::ParamSet;
use crate::engine::plan::{Mode, Plan, StepCost, Target as PlanTarget};
use crate::train::error::TrainError;

use cpu::CpuBackend;
use cuda::CudaBackend;
pub use cuda::TimedLaunch;

/// Plans kept at a time; shapes beyond that are planned anew.
const PLANS_MAX: usize = 64;

/// What computes.
#[derive(Clone)]
pub enum Compute {
    /// The processor, on so many threads; 0 takes all cores.
    Cpu {
        /// Threads.
        threads: usize,
    },
    /// A GPU.
    Cuda {
        /// The opened device.
        device: Arc<Device>,
        /// Storage of activations.
        precision: Precision,
    },
}

impl Compute {
    /// For reports: `cpu`, or the GPU's number, name and precision.
    pub fn describe(&self) -> String {
        match self {
            Compute::Cpu { .. } => "cpu".into(),
            Compute::Cuda { device, precision } => {
                format!("cuda:{} {} {}", device.ordinal(), device.chip().name, precision.suffix())
            }
        }
    }
}

/// One input shape: its graph and the plan of it.
pub(in crate::train) struct Shaped {
    pub detector: Detector,
    pub plan: Plan,
}

/// Key of a plan: images, height, width, whether it trains.
type Shape = (usize, usize, usize, bool);

enum Backend {
    Cpu(Box<CpuBackend>),
    Cuda(Box<CudaBackend>),
}

/// A detector with its parameters and everything needed to run it.
pub struct Network {
    /// Parameters, gradients, running statistics. On a GPU: as they were last pushed or fetched.
    pub params: ParamSet,
    name: String,
    nc: usize,
    reg_max: usize,
    plans: HashMap<Shape, Shaped>,
    backend: Backend,
    /// What convolutions on a GPU are cut by.
    tuning: Arc<Tuning>,
}

/// What was found in a batch.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Objects of each image, the best first.
    pub detections: Vec<Vec<Detection>>,
    /// Loss items, in the units of training; zero without targets.
    pub losses: LossItems,
    /// Seconds of the network (and the loss), and of decoding and suppression.
    pub seconds: [f64; 2],
}

impl Network {
    /// The named network for `nc` classes with parameters that are not yet set.
    ///
    /// # Errors
    /// An unknown name; memory, threads or kernels refused.
    pub fn new(name: &str, nc: usize, loss: LossConfig, compute: &Compute) -> Result<Network, TrainError> {
        // Parameters do not depend on the input size; the smallest legal one is cheap to build.
        let detector = build(name, nc, 64, 64)?;
        let params = ParamSet::new(&detector.graph);
        let loss = LossConfig { reg_max: detector.reg_max, ..loss };
        let backend = match compute {
            Compute::Cpu { threads } => Backend::Cpu(Box::new(CpuBackend::new(loss, *threads)?)),
            Compute::Cuda { device, precision } => {
                Backend::Cuda(Box::new(CudaBackend::new(device, *precision, loss, &params)?))
            }
        };
        let (name, reg_max) = (detector.name, detector.reg_max);
        Ok(Network { params, name, nc, reg_max, plans: HashMap::new(), backend, tuning: Arc::default() })
    }

    /// Threads that compute on the CPU.
    pub fn threads(&self) -> usize {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.threads(),
            Backend::Cuda(_) => 1,
        }
    }

    /// Bins of a side's distance distribution.
    pub fn reg_max(&self) -> usize {
        self.reg_max
    }

    /// Name of the model table.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device and precision that plans are made for.
    pub fn target(&self) -> PlanTarget {
        match &self.backend {
            Backend::Cpu(_) => PlanTarget::Cpu,
            Backend::Cuda(cuda) => cuda.target(),
        }
    }

    /// Where the engine's time went on the CPU, and seconds of the loss when training, since the last call.
    pub fn take_profile(&mut self) -> (Profile, f64) {
        match &mut self.backend {
            Backend::Cpu(cpu) => cpu.take_profile(),
            Backend::Cuda(_) => (Profile::default(), 0.0),
        }
    }

    /// Bytes of GPU memory held; 0 on the CPU.
    pub fn device_bytes(&self) -> usize {
        match &self.backend {
            Backend::Cpu(_) => 0,
            Backend::Cuda(cuda) => cuda.bytes(&self.params),
        }
    }

    /// Multiply-adds of one image of that size, forward.
    ///
    /// # Errors
    /// A size that the network cannot take.
    pub fn macs(&self, h: usize, w: usize) -> Result<u64, TrainError> {
        Ok(build(&self.name, self.nc, h, w)?.graph.macs())
    }

    /// Times every launch of forward, loss and backward of a batch, the median of `repeats`, and what each step of
    /// the plan must do. On a GPU only.
    ///
    /// # Errors
    /// No GPU; a fault of the device.
    pub fn timed_step(
        &mut self,
        batch: &Batch,
        repeats: usize,
    ) -> Result<(Vec<TimedLaunch>, Vec<StepCost>), TrainError> {
        let (n, h, w) = (batch.n, batch.h, batch.w);
        self.prepare(n, h, w, Mode::Train)?;
        let shaped = &self.plans[&(n, h, w, true)];
        let Backend::Cuda(cuda) = &mut self.backend else {
            return Err(TrainError::Internal { message: "launches are timed on a GPU only".into() });
        };
        let launches = cuda.timed_step(shaped, repeats).map_err(device("time its launches"))?;
        Ok((launches, shaped.plan.costs(&shaped.detector.graph)))
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
            let plan = Plan::for_target(&detector.graph, &self.params, n, mode, &self.target());
            self.plans.insert(key, Shaped { detector, plan });
        }
        let shaped = &self.plans[&key];
        match &mut self.backend {
            Backend::Cpu(cpu) => cpu.reserve(shaped),
            Backend::Cuda(cuda) => cuda.reserve(shaped),
        }
    }

    /// Bytes of activations and workspaces that a validation batch of this shape needs; it is made ready to run.
    ///
    /// # Errors
    /// Memory refused, or a size that the network cannot take.
    pub(in crate::train) fn plan_bytes(&mut self, n: usize, h: usize, w: usize) -> Result<usize, TrainError> {
        self.prepare(n, h, w, Mode::Eval)?;
        Ok(self.shaped(n, h, w, Mode::Eval).plan.bytes().total())
    }

    /// The graph and plan of a shape that was prepared.
    pub(in crate::train) fn shaped(&self, n: usize, h: usize, w: usize, mode: Mode) -> &Shaped {
        self.plans.get(&(n, h, w, mode == Mode::Train)).expect("the shape was prepared")
    }

    /// Sends parameters, the optimiser's state and the average to the device; the CPU needs no sending.
    ///
    /// # Errors
    /// The device failed or has no room.
    pub fn push(&mut self, optimizer: &Optimizer, ema: &Ema) -> Result<(), TrainError> {
        match &mut self.backend {
            Backend::Cpu(_) => Ok(()),
            Backend::Cuda(cuda) => cuda.push(&self.params, optimizer, ema),
        }
    }

    /// Sends the parameters alone, for a network that is not trained.
    ///
    /// # Errors
    /// The device failed.
    pub fn push_params(&mut self) -> Result<(), TrainError> {
        match &mut self.backend {
            Backend::Cpu(_) => Ok(()),
            Backend::Cuda(cuda) => cuda.push_params(&self.params),
        }
    }

    /// Brings parameters, gradients, the optimiser's state and the average back from the device.
    ///
    /// # Errors
    /// The device failed.
    pub fn fetch(&mut self, optimizer: &mut Optimizer, ema: &mut Ema) -> Result<(), TrainError> {
        match &mut self.backend {
            Backend::Cpu(_) => Ok(()),
            Backend::Cuda(cuda) => cuda.fetch(&mut self.params, optimizer, ema),
        }
    }

    /// Exchanges the live parameters and running statistics with their average.
    ///
    /// # Errors
    /// Nothing was pushed.
    pub fn swap_average(&mut self, ema: &mut Ema) -> Result<(), TrainError> {
        match &mut self.backend {
            Backend::Cpu(_) => {
                std::mem::swap(&mut self.params.values, &mut ema.values);
                std::mem::swap(&mut self.params.buffers, &mut ema.buffers);
                Ok(())
            }
            Backend::Cuda(cuda) => cuda.swap_average(),
        }
    }

    /// Forward, loss, backward: adds the gradient of the batch to the gradients. Pixels that were made on the device
    /// come as `made`, and the batch holds the rest. When the loss is not finite,
    /// the gradients are worthless and nothing may be stepped on them.
    ///
    /// # Errors
    /// As [`Network::prepare`]; a fault of the device.
    pub fn train(&mut self, batch: &Batch, made: Option<&DeviceBatch>) -> Result<LossItems, TrainError> {
        let (n, h, w) = (batch.n, batch.h, batch.w);
        self.prepare(n, h, w, Mode::Train)?;
        let shaped = &self.plans[&(n, h, w, true)];
        match &mut self.backend {
            Backend::Cpu(cpu) => Ok(cpu.train(shaped, &mut self.params, batch)),
            Backend::Cuda(cuda) => cuda.train(shaped, batch, made),
        }
    }

    /// A mark behind everything that was queued on the GPU.
    ///
    /// # Errors
    /// A fault of the device, or there is none.
    pub fn mark(&self) -> Result<Event, TrainError> {
        self.cuda()?.mark().map_err(device("mark a point in time"))
    }

    /// A copy of the pixels of a batch that was made on the GPU.
    ///
    /// # Errors
    /// A fault of the device, or there is none.
    pub fn read_images(&self, made: &DeviceBatch) -> Result<Vec<u8>, TrainError> {
        self.cuda()?.read_images(made).map_err(device("give back images"))
    }

    fn cuda(&self) -> Result<&CudaBackend, TrainError> {
        match &self.backend {
            Backend::Cuda(cuda) => Ok(cuda),
            Backend::Cpu(_) => {
                Err(TrainError::Internal { message: "asked of a GPU, computed on the CPU".into() })
            }
        }
    }

    /// Clips the gradients to `norm_max`, moves the parameters and their average, clears the gradients; returns
    /// the norm before clipping. A norm that is not finite moves nothing; `None` when the gradients merely overflowed half
    /// precision, which changed the loss scale and moved nothing.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn update(
        &mut self,
        optimizer: &mut Optimizer,
        ema: &mut Ema,
        norm_max: f64,
    ) -> Result<Option<f64>, TrainError> {
        match &mut self.backend {
            Backend::Cpu(cpu) => Ok(Some(cpu.update(&mut self.params, optimizer, ema, norm_max))),
            Backend::Cuda(cuda) => cuda.update(optimizer, ema, norm_max),
        }
    }

    /// The loss scale and the steps since it last changed, in half precision.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn loss_scale(&self) -> Result<Option<(f32, u32)>, TrainError> {
        match &self.backend {
            Backend::Cpu(_) => Ok(None),
            Backend::Cuda(cuda) => Ok(cuda.loss_scale()?.map(|s| (s.scale, s.good_steps))),
        }
    }

    /// Sets the loss scale; ignored where there is none.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn set_loss_scale(&mut self, (scale, good_steps): (f32, u32)) -> Result<(), TrainError> {
        match &mut self.backend {
            Backend::Cpu(_) => Ok(()),
            Backend::Cuda(cuda) => cuda.set_loss_scale(LossScale { scale, good_steps }),
        }
    }

    /// Objects in the images `[n, h, w, 3]`, RGB bytes, in pixels of the input; with targets also the loss.
    ///
    /// # Errors
    /// As [`Network::prepare`]; a fault of the device.
    pub fn detect(
        &mut self,
        images: &[u8],
        (n, h, w): (usize, usize, usize),
        targets: Option<&[Target]>,
        nms: &NmsArgs,
    ) -> Result<Found, TrainError> {
        self.prepare(n, h, w, Mode::Eval)?;
        let shaped = &self.plans[&(n, h, w, false)];
        let images = &images[..n * h * w * 3];
        match &mut self.backend {
            Backend::Cpu(cpu) => Ok(cpu.detect(shaped, &mut self.params, images, targets, nms)),
            Backend::Cuda(cuda) => cuda.detect(shaped, images, targets, nms),
        }
    }
}

/// Builds the named detector; its refusals are faults of the configuration.
pub(in crate::train) fn build(name: &str, nc: usize, h: usize, w: usize) -> Result<Detector, TrainError> {
    Detector::build(name, nc, h, w).map_err(|error| {
        let key = match error {
            ModelError::InputSize { .. } => "imgsz",
            _ => "model",
        };
        TrainError::Config { key: key.into(), message: error.to_string() }
    })
}

/// Wraps an error of the engine with what was tried.
pub(in crate::train) fn engine(action: &'static str) -> impl Fn(EngineError) -> TrainError {
    move |source| TrainError::Engine { action, source }
}

/// Wraps an error of the GPU with what was tried.
pub(in crate::train) fn device(action: &'static str) -> impl Fn(DeviceError) -> TrainError {
    move |source| TrainError::Device { action, source }
}
