//! The network on a GPU: one captured piece of work for each input shape, nothing allocated while stepping.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use super::{Found, Shaped, device};
use crate::data::Batch;
use crate::data::device_loader::DeviceBatch;
use crate::detect::head_cuda::DeviceHeadLevel;
use crate::detect::losses::detection::{LossConfig, LossItems};
use crate::detect::losses::detection_cuda::{DeviceDetectionLoss, LossCapacity};
use crate::detect::nms::NmsArgs;
use crate::detect::nms_cuda::{DeviceNms, NmsCapacity};
use crate::detect::targets::Target;
use crate::engine::device::cuda::cache::Origin;
use crate::engine::device::cuda::executor::{self, DeviceParams, Executor};
use crate::engine::device::cuda::{
    Buffer, CapturedGraph, Device, DeviceError, Event, LaunchTime, Module, PinnedBuffer, Precision,
};
use crate::engine::ops::conv2d::cuda::Tuning;
use crate::engine::optim::{DeviceOptimizer, Ema, LossScale, Optimizer, StepTargets};
use crate::engine::params::ParamSet;
use crate::engine::plan::{Plan, Target as PlanTarget};
use crate::train::error::TrainError;

/// Boxes of a batch that there is room for at first; more make the room grow.
const BOXES_AT_FIRST: usize = 1024;
/// Bytes that one thread copies into pinned memory at a time.
const COPY_BYTES: usize = 1 << 20;
/// An overflow at a smaller scale than this is no matter of scale.
const LOSS_SCALE_MIN: f32 = 1.0 / 1024.0;

/// One launch of a step and its time.
#[derive(Clone, Debug)]
pub struct TimedLaunch {
    /// Name of the kernel.
    pub kernel: String,
    /// Index of the plan's step, forward then backward; `u32::MAX` for the loss.
    pub part: u32,
    /// Milliseconds, median.
    pub ms: f64,
}

/// Executor, loss and optimiser on the device.
pub(super) struct CudaBackend {
    executor: Executor,
    params: DeviceParams,
    loss_config: LossConfig,
    loss: Option<DeviceDetectionLoss>,
    optimizer: Option<DeviceOptimizer>,
    /// Keeps the kernel files loaded that loss and optimiser look for later.
    _kernels: Vec<Arc<Module>>,
    /// The factor of the loss in half precision.
    loss_scale: Option<Buffer>,
    /// Forward, loss and backward by (images, height, width).
    captured: HashMap<(usize, usize, usize), CapturedGraph>,
    /// False once the driver refused to capture.
    can_capture: bool,
    pinned: PinnedBuffer,
    nms: Option<DeviceNms>,
}

/// Compiles or finds every kernel file that training needs, on all cores, and says how far it is.
fn load_kernels(gpu: &Arc<Device>, precision: Precision) -> Result<Vec<Arc<Module>>, DeviceError> {
    let mut stems = executor::stems(gpu, precision);
    stems.extend(["task_aligned", "detection_loss", "optim", "augment"]);
    let count = stems.len();
    let began = Instant::now();
    let loaded = gpu.load_modules(&stems, &|done, module| {
        if module.origin() != Origin::Cached {
            tracing::info!("kernels for {}: {done} of {count} compiled", gpu.chip().target());
        }
    })?;
    tracing::debug!("{count} kernel files loaded in {:.2} s", began.elapsed().as_secs_f64());
    Ok(loaded)
}

impl CudaBackend {
    pub fn new(
        gpu: &Arc<Device>,
        precision: Precision,
        loss_config: LossConfig,
        params: &ParamSet,
    ) -> Result<CudaBackend, TrainError> {
        // Held until everything has found its kernels: a file that nobody holds is unloaded.
        let loaded = load_kernels(gpu, precision).map_err(device("load its kernels"))?;
        let executor = Executor::new(gpu, precision).map_err(device("load its kernels"))?;
        let params = DeviceParams::new(executor.stream(), params, precision)
            .map_err(device("take memory for the parameters"))?;
        let scale = (precision == Precision::F16).then(|| gpu.allocate(std::mem::size_of::<LossScale>()));
        let loss_scale = scale.transpose().map_err(device("take memory for the loss scale"))?;
        if let Some(buffer) = &loss_scale {
            executor.stream().upload(buffer, 0, &[LossScale::START]).map_err(device("set the loss scale"))?;
        }
        Ok(CudaBackend {
            loss_scale,
            pinned: gpu.allocate_pinned(0).map_err(device("pin memory"))?,
            executor,
            params,
            loss_config,
            loss: None,
            optimizer: None,
            _kernels: loaded,
            captured: HashMap::new(),
            can_capture: true,
            nms: None,
        })
    }

    pub fn target(&self) -> PlanTarget {
        self.executor.target()
    }

    pub fn gpu(&self) -> (&Arc<Device>, Precision) {
        (self.executor.device(), self.executor.precision())
    }

    /// Plans made before are for another target from now on.
    pub fn set_tuning(&mut self, tuning: Arc<Tuning>) {
        self.captured.clear();
        self.executor.set_tuning(tuning);
    }

    /// Bytes of device memory that this backend holds.
    pub fn bytes(&self, params: &ParamSet) -> usize {
        let precision = self.executor.precision();
        let loss =
            self.loss.as_ref().map_or(0, |l| DeviceDetectionLoss::bytes(&self.loss_config, &l.capacity()));
        let optimizer = self.optimizer.as_ref().map_or(0, DeviceOptimizer::allocated_bytes);
        let nms = self.nms.as_ref().map_or(0, |n| DeviceNms::bytes(n.args(), &n.capacity()));
        self.executor.bytes()
            + DeviceParams::bytes(params.values.len(), params.buffers.len(), precision)
            + loss
            + optimizer
            + nms
    }

    pub fn reserve(&mut self, shaped: &Shaped) -> Result<(), TrainError> {
        let plan = &shaped.plan;
        let moved = self.executor.reserve(plan).map_err(device("take memory for the plan"))?;
        if moved {
            self.captured.clear();
        }
        let (n, anchors) = (plan.batch(), shaped.detector.anchor_count());
        self.reserve_loss(n, anchors)
    }

    fn reserve_loss(&mut self, n: usize, anchors: usize) -> Result<(), TrainError> {
        let held = self.loss.as_ref().map(DeviceDetectionLoss::capacity);
        if held.is_some_and(|held| n <= held.max_batch && anchors <= held.max_anchors) {
            return Ok(());
        }
        let held = held.unwrap_or(LossCapacity { max_batch: 0, max_anchors: 0, max_boxes: BOXES_AT_FIRST });
        let capacity = LossCapacity {
            max_batch: n.max(held.max_batch),
            max_anchors: anchors.max(held.max_anchors),
            max_boxes: held.max_boxes,
        };
        self.captured.clear();
        self.loss = None; // give back first: the two never need to exist together
        let (stream, precision) = (self.executor.stream(), self.executor.precision());
        let loss = DeviceDetectionLoss::new(stream, precision, self.loss_config.clone(), capacity);
        self.loss = Some(loss.map_err(device("take memory for the loss"))?);
        Ok(())
    }

    pub fn push(&mut self, params: &ParamSet, optimizer: &Optimizer, ema: &Ema) -> Result<(), TrainError> {
        self.push_params(params)?;
        let stream = self.executor.stream();
        if self.optimizer.is_none() {
            let made = DeviceOptimizer::new(stream, optimizer, ema);
            self.optimizer = Some(made.map_err(device("take memory for the optimiser"))?);
        }
        let on_device = self.optimizer.as_ref().expect("made above");
        on_device.upload(stream, optimizer, ema).map_err(device("take the optimiser's state"))
    }

    pub fn push_params(&mut self, params: &ParamSet) -> Result<(), TrainError> {
        self.params.upload(self.executor.stream(), params).map_err(device("take the parameters"))
    }

    pub fn fetch(
        &mut self,
        params: &mut ParamSet,
        optimizer: &mut Optimizer,
        ema: &mut Ema,
    ) -> Result<(), TrainError> {
        let stream = self.executor.stream();
        self.params.download(stream, params).map_err(device("give back the parameters"))?;
        match &self.optimizer {
            Some(o) => o.download(stream, optimizer, ema).map_err(device("give back the optimiser's state")),
            None => Ok(()),
        }
    }

    pub fn swap_average(&mut self) -> Result<(), TrainError> {
        let Some(optimizer) = &mut self.optimizer else {
            return Err(TrainError::Internal { message: "there is no average on the device yet".into() });
        };
        optimizer.swap_average(&mut self.params.values, &mut self.params.buffers);
        Ok(())
    }

    pub fn train(
        &mut self,
        shaped: &Shaped,
        batch: &Batch,
        made: Option<&DeviceBatch>,
    ) -> Result<LossItems, TrainError> {
        let plan = &shaped.plan;
        match made {
            Some(made) => self.take_images(plan, made).map_err(device("take the images"))?,
            None => self.send_images(plan, &batch.images[..plan.bytes().input])?,
        }
        let loss = self.loss.as_mut().expect("reserved with the plan");
        let stream = self.executor.stream();
        // SAFETY: every step ends with a synchronisation, so all earlier uploads have run.
        let moved = unsafe { loss.upload_targets(stream, &batch.targets, batch.n) };
        if moved.map_err(device("take the targets"))? {
            self.captured.clear();
        }
        self.run_step(shaped).map_err(device("train a batch"))?;
        let loss = self.loss.as_ref().expect("reserved with the plan");
        let items = loss.read(self.executor.stream()).map_err(device("train a batch"))?;
        Ok(LossItems { box_: items.box_, cls: items.cls, dfl: items.dfl, total: items.total })
    }

    /// Queues forward, loss and backward: captured once for a shape, then replayed.
    fn run_step(&mut self, shaped: &Shaped) -> Result<(), DeviceError> {
        let plan = &shaped.plan;
        let [h, w, _] = plan.input_shape();
        let key = (plan.batch(), h, w);
        if self.can_capture && !self.captured.contains_key(&key) {
            match self.executor.stream().capture(|_| self.queue_step(shaped)) {
                Ok(graph) => {
                    self.captured.insert(key, graph);
                }
                Err(error) => {
                    tracing::warn!(
                        "the step cannot be captured, its kernels are launched one by one: {error}"
                    );
                    self.can_capture = false;
                }
            }
        }
        match self.captured.get(&key) {
            // SAFETY: captured graphs are dropped whenever memory that they name is given back.
            Some(graph) => unsafe { self.executor.stream().run(graph) },
            None => self.queue_step(shaped),
        }
    }

    /// Queues forward, loss and backward one by one.
    pub fn queue_step(&self, shaped: &Shaped) -> Result<(), DeviceError> {
        let (graph, plan) = (&shaped.detector.graph, &shaped.plan);
        self.executor.forward(graph, plan, &self.params)?;
        let levels: Vec<DeviceHeadLevel> = (shaped.detector.strides.iter().enumerate())
            .map(|(level, &stride)| {
                let (boxes, box_gradient) = self.executor.output(plan, 2 * level);
                let (scores, score_gradient) = self.executor.output(plan, 2 * level + 1);
                DeviceHeadLevel {
                    stride: stride as u32,
                    boxes,
                    scores,
                    box_gradient: box_gradient.expect("a plan for training has gradients of its outputs"),
                    score_gradient: score_gradient.expect("a plan for training has gradients of its outputs"),
                }
            })
            .collect();
        let loss = self.loss.as_ref().expect("reserved with the plan");
        let scale = self.loss_scale.as_ref().map_or(0, Buffer::pointer);
        // SAFETY: the views lie in the executor's arena, where outputs and their gradients have places of their own;
        // the boxes of this batch were uploaded on the same stream.
        unsafe { loss.compute(self.executor.stream(), &levels, plan.batch(), scale) }?;
        self.executor.backward(graph, plan, &self.params)
    }

    /// Times every launch of a step, `repeats` times, and takes the median of each. Images and targets are those that
    /// were sent last.
    pub fn timed_step(&mut self, shaped: &Shaped, repeats: usize) -> Result<Vec<TimedLaunch>, DeviceError> {
        let stream = self.executor.stream();
        let mut runs = Vec::with_capacity(repeats);
        for _ in 0..repeats {
            stream.start_timing();
            let queued = self.queue_step(shaped);
            let times = stream.take_times();
            queued?;
            runs.push(times?);
        }
        let first = runs.first().map_or(&[][..], Vec::as_slice);
        let median = |i: usize| {
            let mut ms: Vec<f64> = runs.iter().map(|run| f64::from(run[i].milliseconds)).collect();
            ms.sort_by(f64::total_cmp);
            ms[ms.len() / 2]
        };
        let launch = |(i, l): (usize, &LaunchTime)| TimedLaunch {
            kernel: l.kernel.to_string(),
            part: l.part,
            ms: median(i),
        };
        Ok(first.iter().enumerate().map(launch).collect())
    }

    /// Queues the copy of images that were made on the device to where the recorded step reads them.
    fn take_images(&self, plan: &Plan, made: &DeviceBatch) -> Result<(), DeviceError> {
        let (stream, bytes) = (self.executor.stream(), plan.bytes().input);
        assert_eq!(bytes, made.n * made.h * made.w * 3, "a batch of the plan's shape");
        stream.wait(&made.ready)?;
        // SAFETY: the loader's buffer holds the batch until it is given back, which is after this step.
        unsafe { stream.copy(self.executor.input().pointer(), made.images, bytes) }
    }

    /// A mark behind everything that was queued.
    pub fn mark(&self) -> Result<Event, DeviceError> {
        self.executor.stream().mark()
    }

    /// A copy of the pixels of a batch that was made on the device.
    pub fn read_images(&self, made: &DeviceBatch) -> Result<Vec<u8>, DeviceError> {
        let stream = self.executor.stream();
        let mut images = vec![0; made.n * made.h * made.w * 3];
        let buffer = self.executor.device().allocate(images.len())?;
        stream.wait(&made.ready)?;
        // SAFETY: the loader's buffer holds the batch until it is given back; the copy is waited for here.
        unsafe { stream.copy(buffer.pointer(), made.images, images.len()) }?;
        stream.download(&buffer, 0, &mut images)?;
        Ok(images)
    }

    /// Copies images through pinned memory on all cores, and queues the copy to the device.
    fn send_images(&mut self, plan: &Plan, images: &[u8]) -> Result<(), TrainError> {
        use rayon::prelude::*;
        assert_eq!(images.len(), plan.bytes().input, "a batch of the plan's shape");
        let failed = device("take the images");
        if self.pinned.as_slice::<u8>().len() < images.len() {
            self.executor.stream().synchronize().map_err(&failed)?;
            self.pinned = self.executor.device().allocate_pinned(images.len()).map_err(&failed)?;
        }
        let to = &mut self.pinned.as_mut_slice::<u8>()[..images.len()];
        to.par_chunks_mut(COPY_BYTES)
            .zip(images.par_chunks(COPY_BYTES))
            .for_each(|(to, from)| to.copy_from_slice(from));
        let (stream, input) = (self.executor.stream(), self.executor.input());
        // SAFETY: every pass ends with a synchronisation, so the pinned memory is written next after this copy ran.
        unsafe { stream.upload_pinned(input, 0, &self.pinned, images.len()) }.map_err(failed)
    }

    /// The norm; `None` when the gradients overflowed half precision, which halved the scale and moved nothing.
    pub fn update(
        &mut self,
        optimizer: &mut Optimizer,
        ema: &mut Ema,
        norm_max: f64,
    ) -> Result<Option<f64>, TrainError> {
        let failed = device("move the parameters");
        let on_device = self.optimizer.as_mut().expect("pushed before the first batch");
        let stream = self.executor.stream();
        let targets = StepTargets {
            values: self.params.values.pointer(),
            grads: self.params.grads.pointer(),
            buffers: self.params.buffers.pointer(),
            copy: 0,
            precision: self.executor.precision(),
            scale: self.loss_scale.as_ref().map_or(0, Buffer::pointer),
        };
        // SAFETY: the result of every step is read, so all earlier uploads have run; the addresses are those of
        // parameters of the optimiser's network, on its stream.
        unsafe {
            let growth = LossScale::GROWTH_INTERVAL;
            on_device.upload_step(stream, optimizer, ema, norm_max, growth).map_err(&failed)?;
            on_device.step(stream, &targets).map_err(&failed)?;
        }
        let result = on_device.read(stream).map_err(&failed)?;
        DeviceOptimizer::commit(&result, optimizer, ema);
        let overflowed =
            result.is_finite == 0 && self.loss_scale()?.is_some_and(|s| s.scale > LOSS_SCALE_MIN);
        Ok((!overflowed).then_some(result.norm))
    }

    /// The factor of the loss in half precision.
    pub fn loss_scale(&self) -> Result<Option<LossScale>, TrainError> {
        let Some(buffer) = &self.loss_scale else { return Ok(None) };
        let mut scale = [LossScale::START];
        self.executor.stream().download(buffer, 0, &mut scale).map_err(device("tell the loss scale"))?;
        Ok(Some(scale[0]))
    }

    /// Sets the factor of the loss; ignored in other precisions.
    pub fn set_loss_scale(&mut self, scale: LossScale) -> Result<(), TrainError> {
        let Some(buffer) = &self.loss_scale else { return Ok(()) };
        self.executor.stream().upload(buffer, 0, &[scale]).map_err(device("take the loss scale"))
    }

    pub fn detect(
        &mut self,
        shaped: &Shaped,
        images: &[u8],
        targets: Option<&[Target]>,
        nms: &NmsArgs,
    ) -> Result<Found, TrainError> {
        let plan = &shaped.plan;
        let failed = device("evaluate a batch");
        let start = Instant::now();
        self.send_images(plan, images)?;
        self.reserve_nms(shaped, nms)?;
        self.executor.forward(&shaped.detector.graph, plan, &self.params).map_err(&failed)?;
        let levels: Vec<DeviceHeadLevel> = (shaped.detector.strides.iter().enumerate())
            .map(|(level, &stride)| {
                let (boxes, _) = self.executor.output(plan, 2 * level);
                let (scores, _) = self.executor.output(plan, 2 * level + 1);
                DeviceHeadLevel::without_gradients(stride as u32, boxes, scores)
            })
            .collect();
        let mut losses = LossItems::default();
        if let Some(targets) = targets {
            let loss = self.loss.as_mut().expect("reserved with the plan");
            let stream = self.executor.stream();
            // SAFETY: every pass ends with a synchronisation, so all earlier uploads have run; the views lie in the
            // executor's arena.
            let moved = unsafe { loss.upload_targets(stream, targets, plan.batch()) }.map_err(&failed)?;
            unsafe { loss.compute(stream, &levels, plan.batch(), 0) }.map_err(&failed)?;
            let items = loss.read(stream).map_err(&failed)?;
            losses = LossItems { box_: items.box_, cls: items.cls, dfl: items.dfl, total: items.total };
            if moved {
                self.captured.clear();
            }
        }
        let network_s = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let (stream, suppressor) = (self.executor.stream(), self.nms.as_ref().expect("reserved above"));
        // SAFETY: as above; nothing writes the outputs before the detections are read.
        unsafe { suppressor.detect(stream, &levels, plan.batch()) }.map_err(&failed)?;
        let detections = suppressor.read(stream, plan.batch()).map_err(failed)?;
        Ok(Found { detections, losses, seconds: [network_s, start.elapsed().as_secs_f64()] })
    }

    /// Makes room for decoding and suppression of a shape.
    fn reserve_nms(&mut self, shaped: &Shaped, args: &NmsArgs) -> Result<(), TrainError> {
        let held = self.nms.as_ref().filter(|nms| nms.args() == args).map(DeviceNms::capacity);
        let (n, anchors) = (shaped.plan.batch(), shaped.detector.anchor_count());
        if held.is_some_and(|held| n <= held.max_batch && anchors <= held.max_anchors) {
            return Ok(());
        }
        let capacity = NmsCapacity {
            max_batch: n.max(held.map_or(0, |h| h.max_batch)),
            max_anchors: anchors.max(held.map_or(0, |h| h.max_anchors)),
            nc: shaped.detector.nc,
            reg_max: shaped.detector.reg_max,
        };
        self.nms = None; // give back first: the two never need to exist together
        let made = DeviceNms::new(self.executor.stream(), args.clone(), capacity);
        self.nms = Some(made.map_err(device("take memory for suppression"))?);
        Ok(())
    }
}
