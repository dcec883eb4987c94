//! Training batches made on the GPU.
//!
//! [`DeviceLoader`] is to the GPU what [`super::TrainLoader`] is to the CPU: the same order, the same draws, the same boxes,
//! the same pixels. Decoded images, scaled for the network input, stay in the device's memory within a budget
//! (`residency`); those that are missing are decoded by threads and copied (`uploads`). One thread (`director`)
//! plans batches ahead, makes their boxes, writes the tables of the kernel (`tables`) and queues it (`kernels`,
//! `kernels/augment.cu`) into one of several buffers, while the network works on another.

mod director;
mod kernels;
mod residency;
mod tables;
#[cfg(test)]
mod tests;
mod uploads;

use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use self::director::{Director, Exchange, Slot};
use self::kernels::{AugmentKernels, SPARE_BYTES};
use self::residency::{Residency, footprint};
use self::uploads::Uploads;
use super::DataError;
use super::augment::AugmentArgs;
use super::augment::plan::PARTNER_WINDOW;
use super::cache::CacheMode;
use super::dataset::Split;
use super::loader::{LoaderArgs, WORKERS_MAX};
use super::resize::loaded_size;
use super::training::TrainSet;
use crate::detect::targets::Target;
use crate::engine::device::cuda::{Device, DeviceError, Event};

pub use kernels::DeviceResizer;

/// Batches planned ahead when nothing is said: enough that decoding threads always have work.
const AHEAD: usize = 4;
/// Longest wait for one batch.
const STALL_LIMIT: Duration = Duration::from_secs(600);

/// What a loader may take of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLoaderArgs {
    /// Most bytes of decoded images; `None` for half of what is free. Never less than one batch needs.
    pub image_bytes_max: Option<u64>,
    /// Batches that lie ready or are in use at a time, two or more.
    pub buffers: usize,
}

impl Default for DeviceLoaderArgs {
    fn default() -> DeviceLoaderArgs {
        DeviceLoaderArgs { image_bytes_max: None, buffers: 3 }
    }
}

/// How images were found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageCounts {
    /// Images of batches that were on the device already.
    pub hits: u64,
    /// Images that were decoded and copied.
    pub misses: u64,
    /// Images that made room for others.
    pub evictions: u64,
    /// Bytes of the images on the device now.
    pub bytes: u64,
}

/// Images and targets of one step; the images are on the device.
pub struct DeviceBatch {
    /// Address of `n * h * w * 3` bytes, RGB, rows top to bottom, 16 more bytes behind them. To be read after `ready`.
    pub images: u64,
    /// Number of images.
    pub n: usize,
    /// Height of each, pixels.
    pub h: usize,
    /// Width of each, pixels.
    pub w: usize,
    /// Boxes, grouped by image, images ascending.
    pub targets: Vec<Target>,
    /// Which image of the split each one is built around.
    pub samples: Vec<u32>,
    /// Bytes changed order to blue, green, red for these images (`bgr`); usually none.
    pub swapped: Vec<u32>,
    /// When the images are made: let the stream that reads them wait for it.
    pub ready: Arc<Event>,
    slot: Arc<Slot>,
}

impl DeviceBatch {
    /// Which of the loader's buffers holds it, below [`DeviceLoaderArgs::buffers`]: the address of a buffer never
    /// changes.
    pub fn buffer(&self) -> usize {
        self.slot.index
    }
}

/// Augmented batches of the training split, shuffled anew each epoch, made on the device.
pub struct DeviceLoader {
    exchange: Arc<Exchange>,
    set: Arc<TrainSet>,
    director: Option<JoinHandle<()>>,
    buffers: Vec<u64>,
    notes: Vec<String>,
    waited: Duration,
}

impl DeviceLoader {
    /// A loader over a split; its batches equal those of [`super::TrainLoader::new`] with the same arguments, except
    /// that `decode_always` means nothing here and `prefetch` counts the batches planned ahead.
    ///
    /// # Errors
    /// [`DataError::Option`] when an argument is out of range; [`DataError::Device`] when the device has no room.
    pub fn new(
        device: &Arc<Device>,
        split: &Split,
        mut args: LoaderArgs,
        augment: AugmentArgs,
        device_args: DeviceLoaderArgs,
    ) -> Result<DeviceLoader, DataError> {
        if args.cache.mode == CacheMode::Recent {
            // The images last used are on the device.
            args.cache.ram_bytes_max.get_or_insert(0);
        }
        let (workers, ahead) = (args.workers.clamp(1, WORKERS_MAX), args.prefetch.unwrap_or(AHEAD));
        let (set, mut notes) = TrainSet::new(split, args, augment)?;
        let set = Arc::new(set);
        let kernels = AugmentKernels::load(device)?;
        let batch = set.args.batch;
        let slots = (0..device_args.buffers.max(2))
            .map(|index| Ok(Arc::new(Slot::new(device, index, batch, set.input_max())?)))
            .collect::<Result<Vec<_>, DeviceError>>()?;
        let (kept, ring) = share(device, &set, device_args.image_bytes_max, &mut notes)?;
        let memory = Arc::new(device.allocate((kept + ring) as usize + SPARE_BYTES)?);
        let uploads = Uploads::new(device, Arc::clone(&set), Arc::clone(&memory), workers)?;
        let exchange = Arc::new(Exchange::default());
        exchange.lock().free = (0..slots.len()).rev().collect();
        let buffers = slots.iter().map(|slot| slot.images.pointer()).collect();
        let director = Director::new(
            Arc::clone(&exchange),
            Arc::clone(&set),
            kernels,
            uploads,
            (memory, Residency::new(kept, ring)),
            slots,
            ahead,
        );
        let director = std::thread::Builder::new()
            .name("device-loader".to_owned())
            .spawn(move || director.run())
            .map_err(|error| DataError::Worker { epoch: 0, batch: 0, message: error.to_string() })?;
        Ok(DeviceLoader { exchange, set, director: Some(director), buffers, notes, waited: Duration::ZERO })
    }

    /// Things a user should know: keys without effect, budgets that do not do.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Batches per epoch; the last may be smaller.
    pub fn batches(&self) -> usize {
        self.set.batches()
    }

    /// Images per batch after the cap.
    pub fn batch_size(&self) -> usize {
        self.set.args.batch
    }

    /// An upper bound on the boxes of one sample.
    pub fn boxes_per_image_max(&self) -> usize {
        self.set.boxes_per_image_max()
    }

    /// The largest height and width of a batch.
    pub fn input_max(&self) -> (usize, usize) {
        self.set.input_max()
    }

    /// Addresses of the buffers that batches are handed over in.
    pub fn buffers(&self) -> &[u64] {
        &self.buffers
    }

    /// How images were found so far.
    pub fn counts(&self) -> ImageCounts {
        self.exchange.lock().counts
    }

    /// Begins epoch `epoch` (from 0) at batch `first_batch`. With `close_mosaic`, mosaic, mixup, cutmix and copy-paste
    /// are off for this epoch. Batches of an earlier epoch that were not taken are dropped.
    pub fn start_epoch(&mut self, epoch: u32, first_batch: usize, close_mosaic: bool) {
        let (epoch, batches) = (self.set.epoch(epoch, close_mosaic), self.set.batches());
        let first = first_batch.min(batches);
        let mut state = self.exchange.lock();
        state.epoch = Some(Arc::new(epoch));
        state.generation += 1;
        (state.range, state.delivered) = (first..batches, first);
        let stale = std::mem::take(&mut state.ready);
        state.free.extend(stale.into_iter().filter_map(Result::ok).map(|batch| batch.slot.index));
        drop(state);
        self.exchange.work.notify_all();
    }

    /// The next batch; `None` at the end of the epoch. Its images may still be in the making: see
    /// [`DeviceBatch::ready`].
    ///
    /// # Errors
    /// [`DataError`] naming the file that could not be read, or the device's fault. The epoch is then over.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<DeviceBatch>, DataError> {
        let begun = Instant::now();
        let result = self.wait(begun + STALL_LIMIT);
        self.waited += begun.elapsed();
        result
    }

    fn wait(&self, deadline: Instant) -> Result<Option<DeviceBatch>, DataError> {
        let mut state = self.exchange.lock();
        loop {
            if state.delivered >= state.range.end {
                return Ok(None);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let is_lost = left.is_zero() || self.director.as_ref().is_none_or(JoinHandle::is_finished);
            let result = match state.ready.pop_front() {
                Some(result) => result,
                None if is_lost => Err(DataError::Stalled {
                    epoch: state.epoch.as_ref().map_or(0, |epoch| epoch.number),
                    batch: state.delivered,
                    seconds: STALL_LIMIT.as_secs(),
                }),
                None => {
                    // Woken now and then, to see whether the other thread is alive.
                    let pause = left.min(Duration::from_secs(1));
                    let woken = self.exchange.ready.wait_timeout(state, pause);
                    state = woken.unwrap_or_else(PoisonError::into_inner).0;
                    continue;
                }
            };
            match result {
                Ok(_) => state.delivered += 1,
                Err(_) => state.range.end = state.delivered,
            }
            return result.map(Some);
        }
    }

    /// Gives a batch back so that its memory is used again, after `done`: the point in time of the caller's stream when
    /// nothing reads the images any more. Every batch must come back; the loader has no others.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn recycle(&self, batch: DeviceBatch, done: &Event) -> Result<(), DataError> {
        batch.slot.stream.wait(done)?;
        self.exchange.lock().free.push(batch.slot.index);
        self.exchange.work.notify_all();
        Ok(())
    }

    /// Time spent in [`DeviceLoader::next`] since the last call of this: what the step waited for data.
    pub fn wait_seconds(&mut self) -> f64 {
        std::mem::take(&mut self.waited).as_secs_f64()
    }
}

impl Drop for DeviceLoader {
    fn drop(&mut self) {
        self.exchange.lock().stop = true;
        self.exchange.work.notify_all();
        if let Some(director) = self.director.take() {
            // A thread that panicked has nothing left to say.
            let _ = director.join();
        }
    }
}

/// Bytes of images to keep for good, and bytes of the ring that the others take turns in.
fn share(
    device: &Device,
    set: &TrainSet,
    bytes_max: Option<u64>,
    notes: &mut Vec<String>,
) -> Result<(u64, u64), DeviceError> {
    let size = |i: usize| {
        let sample = &set.samples.store.samples()[i];
        let (h, w) = loaded_size(sample.height as usize, sample.width as usize, set.args.imgsz);
        footprint(h, w)
    };
    let all: u64 = (0..set.len()).map(size).sum();
    let largest = (0..set.len()).map(size).max().unwrap_or(0);
    let least = (set.args.batch * set.images_per_sample_max()).min(set.len()) as u64 * largest;
    let budget = match bytes_max {
        Some(bytes) => bytes,
        None => device.memory()?.free_bytes / 2,
    };
    if all <= budget.max(least) {
        return Ok((all, 0));
    }
    if budget < least {
        notes.push(format!(
            "a batch needs {} MiB of images on the GPU, more than the {} MiB allowed",
            least >> 20,
            budget >> 20
        ));
    }
    let budget = budget.max(least);
    // Partners come from a window of the images last seen, which must not be decoded twice.
    let ring = (2 * least + PARTNER_WINDOW as u64 * largest).min(budget);
    Ok((budget - ring, ring))
}
