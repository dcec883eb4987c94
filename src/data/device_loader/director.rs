//! The thread that plans batches ahead, brings their images and queues their making.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::kernels::{AugmentKernels, SPARE_BYTES};
use super::residency::{Found, Residency, footprint};
use super::tables::{Source, Tables};
use super::uploads::{Upload, Uploads};
use super::{DeviceBatch, ImageCounts};
use crate::data::DataError;
use crate::data::augment::{SampleLayout, SamplePlan};
use crate::data::resize::loaded_size;
use crate::data::training::{TrainEpoch, TrainSet, push_targets};
use crate::detect::targets::Target;
use crate::engine::device::cuda::{Buffer, Device, DeviceError, Event, PinnedBuffer, Stream};

/// Memory for one batch and the queue that fills it.
pub(super) struct Slot {
    pub index: usize,
    pub stream: Stream,
    pub images: Buffer,
    table: Buffer,
    pinned: Mutex<PinnedBuffer>,
}

impl Slot {
    /// For `n` images of up to `h` x `w`.
    pub fn new(
        device: &Arc<Device>,
        index: usize,
        n: usize,
        (h, w): (usize, usize),
    ) -> Result<Slot, DeviceError> {
        let table_bytes = Tables::bytes_max(n, h, w);
        Ok(Slot {
            index,
            stream: device.stream()?,
            images: device.allocate(n * h * w * 3 + SPARE_BYTES)?,
            table: device.allocate(table_bytes)?,
            pinned: Mutex::new(device.allocate_pinned(table_bytes)?),
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // The copy out of the pinned memory must have ended; a fault has been reported elsewhere.
        self.stream.synchronize().ok();
    }
}

/// What the consumer and the director share.
#[derive(Default)]
pub(super) struct Exchange {
    pub state: Mutex<State>,
    /// Signalled for the director: a new epoch, a free slot, the end.
    pub work: Condvar,
    /// Signalled for the consumer.
    pub ready: Condvar,
}

#[derive(Default)]
pub(super) struct State {
    pub epoch: Option<Arc<TrainEpoch>>,
    /// Counts the epochs begun.
    pub generation: u64,
    /// Batches of the epoch.
    pub range: Range<usize>,
    /// The batch handed over next.
    pub delivered: usize,
    pub ready: VecDeque<Result<DeviceBatch, DataError>>,
    /// Slots that nobody holds.
    pub free: Vec<usize>,
    pub counts: ImageCounts,
    pub stop: bool,
}

impl Exchange {
    pub fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A batch whose images have places and whose tables are made.
struct Planned {
    sequence: u64,
    hw: (usize, usize),
    tables: Tables,
    targets: Vec<Target>,
    samples: Vec<u32>,
    swapped: Vec<u32>,
}

/// See the module.
pub(super) struct Director {
    pub exchange: Arc<Exchange>,
    pub set: Arc<TrainSet>,
    pub kernels: AugmentKernels,
    pub uploads: Uploads,
    pub memory: Arc<Buffer>,
    pub residency: Residency,
    pub slots: Vec<Arc<Slot>>,
    /// Batches planned ahead of the one being made.
    pub ahead: usize,
    gathered: Vec<Option<Arc<Event>>>,
    outstanding: VecDeque<Planned>,
    planned: u64,
    launched: u64,
}

impl Director {
    pub fn new(
        exchange: Arc<Exchange>,
        set: Arc<TrainSet>,
        kernels: AugmentKernels,
        uploads: Uploads,
        (memory, residency): (Arc<Buffer>, Residency),
        slots: Vec<Arc<Slot>>,
        ahead: usize,
    ) -> Director {
        let gathered = slots.iter().map(|_| None).collect();
        Director {
            exchange,
            set,
            kernels,
            uploads,
            memory,
            residency,
            slots,
            ahead: ahead.max(1),
            gathered,
            outstanding: VecDeque::new(),
            planned: 0,
            launched: 0,
        }
    }

    /// Serves epoch after epoch until it is told to stop.
    pub fn run(mut self) {
        let mut generation = 0;
        loop {
            let mut state = self.exchange.lock();
            while !state.stop && state.generation == generation {
                state = self.exchange.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.stop {
                return;
            }
            generation = state.generation;
            let (epoch, range) = (state.epoch.clone(), state.range.clone());
            drop(state);
            let Some(epoch) = epoch else { continue };
            let outcome = self.serve(&epoch, range, generation);
            self.abandon();
            if let Err(error) = outcome {
                // Which images came is not known.
                self.residency.clear();
                let mut state = self.exchange.lock();
                if state.generation == generation {
                    state.ready.push_back(Err(error));
                    self.exchange.ready.notify_all();
                }
            }
        }
    }

    /// Makes the batches of an epoch, until it is over or no longer wanted.
    fn serve(&mut self, epoch: &TrainEpoch, range: Range<usize>, generation: u64) -> Result<(), DataError> {
        let mut next = range.start;
        loop {
            while self.outstanding.len() < self.ahead && next < range.end {
                if !self.plan(epoch, next, generation)? {
                    return Ok(());
                }
                next += 1;
            }
            if self.outstanding.is_empty() || !self.finish_oldest(generation)? {
                return Ok(());
            }
        }
    }

    /// Drops what is planned and not made.
    fn abandon(&mut self) {
        for image in self.uploads.cancel() {
            self.residency.forget(image);
        }
        while let Some(planned) = self.outstanding.pop_front() {
            if self.uploads.wait(planned.sequence).is_err() {
                self.residency.clear();
            }
        }
        self.launched = self.planned;
    }

    /// Draws a batch, lays it out, and has the missing images brought. False when the epoch is no longer wanted.
    fn plan(&mut self, epoch: &TrainEpoch, batch: usize, generation: u64) -> Result<bool, DataError> {
        let set = Arc::clone(&self.set);
        let hw = set.shape(batch);
        let sizes = |image: u32| {
            let sample = &set.samples.store.samples()[image as usize];
            loaded_size(sample.height as usize, sample.width as usize, set.args.imgsz)
        };
        let boxes = |image: u32, h: usize, w: usize| set.samples.boxes(image, h, w);
        let positions = set.positions(epoch, batch);
        let samples: Vec<u32> = epoch.order[positions.clone()].to_vec();
        let plans: Vec<SamplePlan> = positions.map(|position| set.draw(epoch, position, hw)).collect();
        let layouts: Vec<SampleLayout> =
            plans.iter().map(|plan| SampleLayout::new(plan, set.args.imgsz, hw, &sizes, &boxes)).collect();
        let images = images_of(&plans, &layouts);
        let Some(places) = self.place(&images, &sizes, (epoch.number, batch), generation)? else {
            return Ok(false);
        };
        let memory = self.memory.pointer();
        let offsets: HashMap<u32, u64> = images.into_iter().zip(places).collect();
        let source = |image: u32| Source { address: memory + offsets[&image], width: sizes(image).1 };
        let (mut tables, mut targets, mut swapped) = (Tables::default(), Vec::new(), Vec::new());
        for (i, (plan, layout)) in plans.iter().zip(&layouts).enumerate() {
            tables.push(plan, layout, hw, &source);
            push_targets(&mut targets, i, hw, &layout.boxes);
            if plan.swap_channels {
                swapped.push(i as u32);
            }
        }
        let sequence = self.planned;
        self.planned += 1;
        self.outstanding.push_back(Planned { sequence, hw, tables, targets, samples, swapped });
        Ok(true)
    }

    /// Gives every image of a batch a place and has the missing ones brought. `None` when the epoch is no longer wanted.
    fn place(
        &mut self,
        images: &[u32],
        sizes: &dyn Fn(u32) -> (usize, usize),
        place: (u32, usize),
        generation: u64,
    ) -> Result<Option<Vec<u64>>, DataError> {
        let (batch, evicted) = (self.planned, self.residency.evictions());
        let (mut places, mut missing) = (Vec::with_capacity(images.len()), Vec::new());
        while places.len() < images.len() {
            let image = images[places.len()];
            let (h, w) = sizes(image);
            match self.residency.place(image, footprint(h, w), batch, self.launched) {
                Some(found) => {
                    places.push(found.offset());
                    if let Found::Bring(offset) = found {
                        missing.push(Upload { batch, place, image, offset });
                    }
                }
                None if self.outstanding.is_empty() => {
                    // Only this batch is in hand, and its images lie scattered: the empty ring holds any batch.
                    self.residency.clear_ring();
                    missing.retain(|upload| self.residency.is_kept(upload.offset));
                    places.clear();
                }
                None => {
                    if !self.finish_oldest(generation)? {
                        for upload in missing {
                            self.residency.forget(upload.image);
                        }
                        return Ok(None);
                    }
                }
            }
        }
        let given_up = self.residency.evictions() - evicted;
        if given_up > 0 {
            for made in self.gathered.iter().flatten() {
                self.uploads.stream().wait(made)?;
            }
        }
        let mut state = self.exchange.lock();
        state.counts.misses += missing.len() as u64;
        state.counts.hits += (images.len() - missing.len()) as u64;
        state.counts.evictions += given_up;
        state.counts.bytes = self.residency.bytes();
        drop(state);
        self.uploads.submit(batch, missing);
        Ok(Some(places))
    }

    /// Queues the making of the batch planned first, once its images are on their way and there is room for it. False
    /// when the epoch is no longer wanted.
    fn finish_oldest(&mut self, generation: u64) -> Result<bool, DataError> {
        let Some(planned) = self.outstanding.pop_front() else { return Ok(true) };
        self.uploads.wait(planned.sequence)?;
        let Some(slot) = self.free_slot(generation) else { return Ok(false) };
        let slot = Arc::clone(&self.slots[slot]);
        if let Some(made) = &self.gathered[slot.index] {
            // Its table has then left the pinned memory.
            made.synchronize()?;
        }
        let mut pinned = slot.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        let offsets = planned.tables.write(pinned.as_mut_slice());
        // SAFETY: the pinned memory is written again only after the event below.
        unsafe { slot.stream.upload_pinned(&slot.table, 0, &pinned, offsets.end)? };
        drop(pinned);
        slot.stream.wait(&self.uploads.stream().mark()?)?;
        // SAFETY: the table was just queued on the same stream; the images it names are in the memory that the director
        // holds, came before the mark, and are overwritten only after the event below; the slot has room for a whole
        // batch of the largest input, and whoever held it before is done, since the stream waits for that.
        unsafe {
            self.kernels.launch(
                &slot.stream,
                &planned.tables,
                (slot.table.pointer(), offsets),
                slot.images.pointer(),
                planned.hw,
            )?;
        }
        let made = Arc::new(slot.stream.mark()?);
        self.gathered[slot.index] = Some(Arc::clone(&made));
        self.launched = planned.sequence + 1;
        let batch = DeviceBatch {
            images: slot.images.pointer(),
            n: planned.samples.len(),
            h: planned.hw.0,
            w: planned.hw.1,
            targets: planned.targets,
            samples: planned.samples,
            swapped: planned.swapped,
            ready: made,
            slot,
        };
        let mut state = self.exchange.lock();
        if state.generation != generation || state.stop {
            state.free.push(batch.slot.index);
            return Ok(false);
        }
        state.ready.push_back(Ok(batch));
        self.exchange.ready.notify_all();
        Ok(true)
    }

    /// Waits for a slot. `None` when the epoch is no longer wanted.
    fn free_slot(&self, generation: u64) -> Option<usize> {
        let mut state = self.exchange.lock();
        loop {
            if state.stop || state.generation != generation {
                return None;
            }
            if let Some(slot) = state.free.pop() {
                return Some(slot);
            }
            state = self.exchange.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Director {
    fn drop(&mut self) {
        self.uploads.cancel();
        for slot in &self.slots {
            // Kernels may still read the images.
            slot.stream.synchronize().ok();
        }
    }
}

/// The images that the samples show, each once, in the order of the samples. Partners of a cutmix that found no place
/// are not needed.
fn images_of(plans: &[SamplePlan], layouts: &[SampleLayout]) -> Vec<u32> {
    let mut seen = HashSet::new();
    plans
        .iter()
        .zip(layouts)
        .flat_map(|(plan, layout)| {
            let mixed = plan.mixup.iter().map(|(base, _)| base);
            let pasted = plan.cutmix.iter().filter(|_| layout.pasted.is_some()).map(|(base, _)| base);
            std::iter::once(&plan.base).chain(mixed).chain(pasted)
        })
        .flat_map(|base| base.images.iter().copied())
        .filter(|&image| seen.insert(image))
        .collect()
}
