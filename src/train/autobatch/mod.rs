//! The batch size: the one asked for if it fits, the largest that does, or one that is cut into parts that do.
//!
//! [`choose`] is a pure function of a wish, a memory ([`DeviceMemory`]) and the bytes that a batch needs
//! ([`Footprint`] on a GPU, [`host_bytes`] on the CPU).

#[cfg(test)]
mod tests;

use std::sync::Arc;

use super::args::{Batch, BatchPolicy};
use super::error::TrainError;
use crate::detect::models::Detector;
use crate::engine::device::cuda::{Buffer, Device, DeviceError};
use crate::engine::params::ParamSet;
use crate::engine::plan::{Mode, Plan};

/// Largest batch that automatic choice takes.
const AUTO_BATCH_MAX: usize = 1024;
/// Share of the free memory that `batch: -1` takes on the CPU, where other programs need the rest.
pub const AUTO_SHARE_HOST: f64 = 0.6;
/// Share of the free memory that `batch: -1` takes on a GPU, whose plan is exact.
pub const AUTO_SHARE_GPU: f64 = 0.9;
/// Choices made when other processes take memory in between.
const ATTEMPTS_MAX: usize = 5;
/// Copies of the parameters in training: values, gradients, average, two states of the optimiser.
const PARAMETER_COPIES: usize = 5;
/// Batches of pixels that the loader keeps ready or in the making.
const LOADER_BATCHES: usize = 4;
/// Bytes of assignment and decoded boxes per image and anchor point, for targets in the usual number.
const LOSS_BYTES_PER_ANCHOR: usize = 64;

/// An allocation was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom;

/// The memory of a device, shared with other processes.
pub trait DeviceMemory {
    /// Bytes that nobody has now.
    fn free(&mut self) -> u64;

    /// All bytes.
    fn total(&self) -> u64;

    /// Takes so many bytes, so that nobody else can; what was taken before is given back first.
    ///
    /// # Errors
    /// [`NoRoom`].
    fn try_allocate(&mut self, bytes: u64) -> Result<(), NoRoom>;
}

/// What the batch is chosen by.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// The key `batch`.
    pub batch: Batch,
    /// The key `batch_policy`.
    pub policy: BatchPolicy,
    /// Training images; no batch is larger.
    pub images: usize,
    /// Share of the free memory that `batch: -1` takes.
    pub auto_share: f64,
    /// Share of all memory that the run may take (`MAX_GPU`, `extras.gpu.limit`); 1 is no cap.
    pub share_max: f64,
}

/// What was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Images of a pass.
    pub batch: usize,
    /// Passes whose gradients make up one batch; 1 unless a batch was cut.
    pub passes: usize,
    /// Bytes that it needs and that were allocated.
    pub bytes: u64,
}

/// No batch can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Images asked for; 1 where the choice was automatic.
    pub batch: usize,
    /// Bytes that they need.
    pub needed: u64,
    /// Bytes that were free.
    pub free: u64,
    /// Bytes that could be taken: what is free, cut by the share asked for and the cap.
    pub limit: u64,
    /// Largest batch that fits; 0 when none does.
    pub largest: usize,
}

impl Refusal {
    /// As an error of the run at an input of `imgsz` pixels.
    pub fn error(&self, imgsz: usize) -> TrainError {
        TrainError::Memory {
            batch: self.batch,
            imgsz,
            needed_mib: self.needed >> 20,
            available_mib: self.limit >> 20,
            largest: self.largest,
        }
    }
}

/// Chooses the batch and allocates what it needs.
///
/// An explicit batch is taken as it is, at most the number of images; where it does not fit it is refused, or with
/// `batch_policy: accumulate` cut into equal passes. `-1` is the largest batch that fits the usual share of the free
/// memory, a number between 0 and 1 the largest that fits that share, both at most the number of images and 1024. When
/// an allocation fails because another process was faster, free memory is read and the batch chosen again.
///
/// # Errors
/// [`Refusal`] with the figures.
pub fn choose(
    wish: &Wish,
    memory: &mut dyn DeviceMemory,
    bytes_needed: &dyn Fn(usize) -> u64,
) -> Result<Choice, Refusal> {
    let mut refused = u64::MAX;
    let mut attempt = 0;
    loop {
        attempt += 1;
        let free = memory.free();
        let capped = (memory.total() as f64 * wish.share_max) as u64;
        let limit = (free.min(capped), capped);
        let choice = fit(wish, free, limit, refused, bytes_needed)?;
        if memory.try_allocate(choice.bytes).is_ok() {
            return Ok(choice);
        }
        if attempt >= ATTEMPTS_MAX {
            let free = memory.free();
            let limit = free.min(capped).min(choice.bytes.saturating_sub(1));
            return Err(refusal(choice.batch, free, limit, bytes_needed));
        }
        // Where the driver still reports enough, its memory is in pieces: only a smaller request can do.
        let is_enough = memory.free() >= choice.bytes;
        refused = if is_enough { choice.bytes } else { u64::MAX };
    }
}

/// The choice for so much memory; `refused` bytes were free and yet not given.
fn fit(
    wish: &Wish,
    free: u64,
    (limit, capped): (u64, u64),
    refused: u64,
    bytes_needed: &dyn Fn(usize) -> u64,
) -> Result<Choice, Refusal> {
    let images = wish.images.max(1);
    let share = match wish.batch {
        Batch::Auto => wish.auto_share,
        Batch::Fraction(share) => share,
        Batch::Images(batch) => {
            let batch = (batch as usize).min(images).max(1);
            let bytes = bytes_needed(batch);
            let may_cut = wish.policy == BatchPolicy::Accumulate;
            if bytes <= limit && (bytes < refused || !may_cut) {
                return Ok(Choice { batch, passes: 1, bytes });
            }
            return match cut(
                batch,
                largest(|n| bytes_needed(n) <= limit.min(refused.saturating_sub(1)), batch),
            ) {
                Some((part, passes)) if may_cut => {
                    Ok(Choice { batch: part, passes, bytes: bytes_needed(part) })
                }
                _ => Err(refusal(batch, free, limit, bytes_needed)),
            };
        }
    };
    let limit = ((free as f64 * share) as u64).min(capped).min(refused.saturating_sub(1));
    match largest(|batch| bytes_needed(batch) <= limit, images.min(AUTO_BATCH_MAX)) {
        0 => Err(refusal(1, free, limit, bytes_needed)),
        batch => Ok(Choice { batch, passes: 1, bytes: bytes_needed(batch) }),
    }
}

fn refusal(batch: usize, free: u64, limit: u64, bytes_needed: &dyn Fn(usize) -> u64) -> Refusal {
    let largest = largest(|n| bytes_needed(n) <= limit, batch);
    Refusal { batch, needed: bytes_needed(batch), free, limit, largest }
}

/// Cuts a batch into passes of at most `largest` images: by a divisor of the batch unless that would make the passes
/// less than half as large as they could be. `None` when nothing fits.
fn cut(batch: usize, largest: usize) -> Option<(usize, usize)> {
    if largest == 0 {
        return None;
    }
    let passes = batch.div_ceil(largest);
    let even = (passes..=batch).find(|passes| batch.is_multiple_of(*passes)).unwrap_or(batch);
    let passes = if 2 * (batch / even) >= largest { even } else { passes };
    Some((batch.div_ceil(passes), passes))
}

/// The largest number in `1..=max` that fits, by bisection; 0 when not even 1 does.
fn largest(fits: impl Fn(usize) -> bool, max: usize) -> usize {
    let (mut low, mut high) = (0, max + 1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    low
}

/// Side of the largest square that `multi_scale` draws around `imgsz`, in pixels.
pub fn largest_side(imgsz: usize, multi_scale: f64, stride: usize) -> usize {
    if multi_scale <= 0.0 {
        return imgsz;
    }
    let high = (imgsz as f64 * (1.0 + multi_scale) + stride as f64) as usize;
    ((high - 1) / stride * stride).max(imgsz)
}

/// Everything that lies in a GPU's memory while a run trains, as a function of the batch.
pub struct Footprint<'a> {
    /// Bytes of the training plan of so many images, at the largest size that is drawn.
    pub training: &'a dyn Fn(usize) -> u64,
    /// Bytes of the evaluation plan of so many images, at the largest validation size. It takes turns with training.
    pub validation: &'a dyn Fn(usize) -> u64,
    /// Bytes of the loss for so many images that have so many boxes together.
    pub loss: &'a dyn Fn(usize, usize) -> u64,
    /// Most boxes of one image, as it can come out of the augmentation.
    pub boxes_max: usize,
    /// Parameters, their storage copies, gradients, average, states of the optimiser.
    pub parameter_bytes: u64,
    /// Pixels of one image as the network takes them.
    pub input_image_bytes: u64,
    /// Batches of pixels on the device at a time.
    pub ring: usize,
    /// What does not depend on the batch: the least image cache, loaded kernels.
    pub fixed_bytes: u64,
}

impl Footprint<'_> {
    /// Images of a validation batch for a training batch.
    pub const VALIDATION_FACTOR: usize = 2;

    /// Bytes at a batch.
    pub fn bytes(&self, batch: usize) -> u64 {
        let validated = Self::VALIDATION_FACTOR * batch;
        let plans = (self.training)(batch).max((self.validation)(validated));
        let loss = (self.loss)(validated, batch * self.boxes_max);
        let ring = (self.ring * validated) as u64 * self.input_image_bytes;
        plans + loss + ring + self.parameter_bytes + self.fixed_bytes
    }
}

/// Bytes that training at `batch` takes on the CPU: the exact plan, the parameters and their copies, the loss, the
/// loader.
pub fn host_bytes(detector: &Detector, params: &ParamSet, batch: usize) -> u64 {
    let plan = Plan::with_params(&detector.graph, params, batch, Mode::Train);
    let fixed = PARAMETER_COPIES * params.values.len() * 4;
    let loss = batch * detector.anchor_count() * LOSS_BYTES_PER_ANCHOR;
    let loader = LOADER_BATCHES * plan.bytes().input;
    (plan.bytes().total() + fixed + loss + loader) as u64
}

/// The memory of this machine. Nothing is held: the engine allocates right afterwards.
#[derive(Clone, Copy, Debug)]
pub struct HostMemory {
    available: u64,
    total: u64,
}

impl HostMemory {
    /// As the system reports it now.
    pub fn now() -> HostMemory {
        let mut system = sysinfo::System::new();
        system.refresh_memory();
        HostMemory { available: available_bytes(), total: system.total_memory() }
    }
}

impl DeviceMemory for HostMemory {
    fn free(&mut self) -> u64 {
        self.available
    }

    fn total(&self) -> u64 {
        self.total
    }

    fn try_allocate(&mut self, _bytes: u64) -> Result<(), NoRoom> {
        Ok(())
    }
}

/// A device that nothing else uses: what a run could have there at best, whatever is free at this moment.
#[derive(Clone, Copy, Debug)]
pub struct EmptyDevice {
    /// All of its memory, bytes.
    pub bytes: u64,
}

impl EmptyDevice {
    /// This machine, or the share of it that the control group may have.
    pub fn host() -> EmptyDevice {
        let mut system = sysinfo::System::new();
        system.refresh_memory();
        let total = system.total_memory();
        EmptyDevice { bytes: system.cgroup_limits().map_or(total, |limits| total.min(limits.total_memory)) }
    }
}

impl DeviceMemory for EmptyDevice {
    fn free(&mut self) -> u64 {
        self.bytes
    }

    fn total(&self) -> u64 {
        self.bytes
    }

    fn try_allocate(&mut self, _bytes: u64) -> Result<(), NoRoom> {
        Ok(())
    }
}

/// Bytes of memory that a process could still take: what the system says, or the limit of its control
/// group where that is lower.
pub fn available_bytes() -> u64 {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let free = system.available_memory();
    system.cgroup_limits().map_or(free, |limits| free.min(limits.free_memory))
}

/// The memory of a GPU, as its driver reports it.
pub struct CudaMemory {
    device: Arc<Device>,
    held: Option<Buffer>,
    /// Why the driver failed otherwise than for want of memory.
    pub fault: Option<DeviceError>,
}

impl CudaMemory {
    /// The memory of that GPU; nothing of it is held yet.
    pub fn new(device: &Arc<Device>) -> CudaMemory {
        CudaMemory { device: Arc::clone(device), held: None, fault: None }
    }

    /// What was allocated last.
    pub fn take(&mut self) -> Option<Buffer> {
        self.held.take()
    }
}

impl DeviceMemory for CudaMemory {
    fn free(&mut self) -> u64 {
        match self.device.memory() {
            Ok(memory) => memory.free_bytes,
            Err(error) => {
                self.fault = Some(error);
                0
            }
        }
    }

    fn total(&self) -> u64 {
        self.device.chip().memory_bytes
    }

    fn try_allocate(&mut self, bytes: u64) -> Result<(), NoRoom> {
        self.held = None;
        match self.device.allocate(usize::try_from(bytes).map_err(|_| NoRoom)?) {
            Ok(buffer) => self.held = Some(buffer),
            Err(error) => {
                if !error.is_out_of_memory() {
                    self.fault = Some(error);
                }
                return Err(NoRoom);
            }
        }
        Ok(())
    }
}
