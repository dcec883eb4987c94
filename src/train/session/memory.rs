//! The batch of a run, chosen on the memory of the device that it computes on.

use super::choices;
use super::feeding::STRIDE_MAX;
use super::network::{Compute, Network, build};
use crate::detect::losses::detection::LossConfig;
use crate::detect::losses::detection_cuda::{DeviceDetectionLoss, LossCapacity};
use crate::detect::models::Detector;
use crate::detect::nms::NmsArgs;
use crate::detect::nms_cuda::{DeviceNms, NmsCapacity};
use crate::engine::optim::{Algorithm, DeviceOptimizer, Ema};
use crate::engine::plan::{Mode, Plan};
use crate::train::args::{OptimizerChoice, TrainArgs};
use crate::train::autobatch::{
    self, Choice, CudaMemory, DeviceMemory, EmptyDevice, Footprint, HostMemory, Wish,
};
use crate::train::error::TrainError;

/// Bytes for what a plan does not show: recorded graphs, kernels loaded later, the driver's rounding.
const DRIVER_BYTES: u64 = 96 << 20;

/// Batches of pixels on the device at a time: those of the loader, and the images they are made of.
const INPUT_BUFFERS: usize = 4;

/// What the choice depends on.
pub(super) struct Demand<'a> {
    pub args: &'a TrainArgs,
    pub compute: &'a Compute,
    /// Its parameters lie on the device already.
    pub network: &'a Network,
    /// The network at the largest size that training draws.
    pub largest: &'a Detector,
    pub loss: &'a LossConfig,
    /// Side of the training square, pixels.
    pub imgsz: usize,
    /// Training images.
    pub images: usize,
    /// Most boxes of one image.
    pub boxes_max: usize,
    /// Share of the device's memory that the run may take.
    pub gpu_share_max: f64,
}

/// The batch that a run with these arguments would be given on a device that nothing else uses, by the same choice that
/// the run itself makes with what is free then; `images` and `boxes_max` are those of its training split.
///
/// # Errors
/// [`TrainError::Memory`] with the figures, an unknown model, or the device does not answer.
pub fn batch_on(
    args: &TrainArgs,
    compute: &Compute,
    nc: usize,
    (images, boxes_max): (usize, usize),
) -> Result<Choice, TrainError> {
    let imgsz = args.imgsz as usize;
    let side = autobatch::largest_side(imgsz, args.multi_scale, STRIDE_MAX);
    let largest = build(&args.model, nc, side, side)?;
    let loss = LossConfig { reg_max: largest.reg_max, ..LossConfig::new(nc) };
    let network = &Network::new(&args.model, nc, loss.clone(), compute)?;
    let (largest, loss) = (&largest, &loss);
    let demand =
        Demand { args, compute, network, largest, loss, imgsz, images, boxes_max, gpu_share_max: 1.0 };
    match compute {
        Compute::Cpu { .. } => demand.choose_on_host(&mut EmptyDevice::host()),
        Compute::Cuda { device, .. } => {
            demand.choose_on(&mut EmptyDevice { bytes: device.chip().memory_bytes })
        }
    }
}

impl Demand<'_> {
    /// The batch that was asked for or the largest that fits.
    ///
    /// # Errors
    /// [`TrainError::Memory`] with the figures, or the device does not answer.
    pub fn choose(&self) -> Result<Choice, TrainError> {
        match self.compute {
            Compute::Cpu { .. } => self.choose_on_host(&mut HostMemory::now()),
            Compute::Cuda { device, .. } => {
                let mut memory = CudaMemory::new(device);
                let chosen = self.choose_on(&mut memory);
                if let Some(source) = memory.fault.take() {
                    return Err(TrainError::Device { action: "tell its free memory", source });
                }
                chosen
            }
        }
    }

    fn choose_on_host(&self, memory: &mut dyn DeviceMemory) -> Result<Choice, TrainError> {
        let wish = self.wish(autobatch::AUTO_SHARE_HOST, 1.0);
        let bytes = |batch| autobatch::host_bytes(self.largest, &self.network.params, batch);
        let chosen = autobatch::choose(&wish, memory, &bytes);
        chosen.map_err(|refusal| refusal.error(self.largest_side()))
    }

    fn wish(&self, auto_share: f64, share_max: f64) -> Wish {
        let (batch, policy) = (self.args.batch, self.args.batch_policy);
        Wish { batch, policy, images: self.images, auto_share, share_max }
    }

    fn largest_side(&self) -> usize {
        self.largest.graph.shape(self.largest.graph.outputs()[0])[0] * self.largest.strides[0]
    }

    fn choose_on(&self, memory: &mut dyn DeviceMemory) -> Result<Choice, TrainError> {
        let (params, target) = (&self.network.params, self.network.target());
        // Rectangular validation batches may be one stride longer than the square.
        let side = self.imgsz + STRIDE_MAX;
        let validated = build(self.network.name(), self.largest.nc, side, side)?;
        let plan_bytes = |detector: &Detector, batch: usize, mode: Mode| {
            Plan::for_target(&detector.graph, params, batch, mode, &target).bytes().total() as u64
        };
        let max_anchors = self.largest.anchor_count().max(validated.anchor_count());
        let (nc, reg_max) = (self.largest.nc, self.largest.reg_max);
        let footprint = Footprint {
            training: &|batch| plan_bytes(self.largest, batch, Mode::Train),
            validation: &|batch| plan_bytes(&validated, batch, Mode::Eval),
            loss: &|max_batch, max_boxes| {
                let loss = LossCapacity { max_batch, max_anchors, max_boxes };
                let nms = NmsCapacity { max_batch, max_anchors, nc, reg_max };
                let found = DeviceNms::bytes(&NmsArgs::validation(), &nms);
                (DeviceDetectionLoss::bytes(self.loss, &loss) + found) as u64
            },
            boxes_max: self.boxes_after_augmentation(),
            parameter_bytes: self.optimiser_bytes()?,
            input_image_bytes: (self.imgsz * self.imgsz * 3) as u64,
            ring: INPUT_BUFFERS,
            fixed_bytes: DRIVER_BYTES,
        };
        let wish = self.wish(autobatch::AUTO_SHARE_GPU, self.gpu_share_max);
        let chosen = autobatch::choose(&wish, memory, &|batch| footprint.bytes(batch));
        chosen.map_err(|refusal| refusal.error(self.largest_side()))
    }

    /// Most boxes of an image that comes out of mosaic, mixup and pasting.
    fn boxes_after_augmentation(&self) -> usize {
        let args = self.args;
        let tiles = if args.mosaic > 0.0 { 4 } else { 1 };
        let layers = if args.mixup + args.cutmix > 0.0 { 2 } else { 1 };
        let pasted = if args.copy_paste > 0.0 { 2 } else { 1 };
        self.boxes_max * tiles * layers * pasted
    }

    /// Bytes of the optimiser and the average on the device; of the larger one where the batch decides which.
    fn optimiser_bytes(&self) -> Result<u64, TrainError> {
        let params = &self.network.params;
        let algorithms = match self.args.optimizer {
            OptimizerChoice::Auto => vec![Algorithm::AdamW, Algorithm::MuSgd],
            named => vec![choices::algorithm(&format!("{named:?}"))?],
        };
        let ema = Ema::new(&params.values, &params.buffers, Ema::DECAY, Ema::TAU);
        let bytes = |algorithm| {
            let optimizer = choices::optimizer_of(algorithm, params);
            DeviceOptimizer::bytes(&optimizer, &ema) as u64
        };
        Ok(algorithms.into_iter().map(bytes).max().unwrap_or(0))
    }
}
