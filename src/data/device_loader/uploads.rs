//! Decoding of images that the device lacks, by several threads, and their way there.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::data::pool::message_of;
use crate::data::training::TrainSet;
use crate::data::{DataError, resize::loaded_size};
use crate::engine::device::cuda::{Buffer, Device, DeviceError, Event, PinnedBuffer, Stream};

/// Pinned buffers of a thread: one is filled while the other is on its way.
const STAGES: usize = 2;

/// One image to bring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Upload {
    /// Number of the batch that waits for it, over all epochs.
    pub batch: u64,
    /// Epoch and batch within it, for messages.
    pub place: (u32, usize),
    /// The image.
    pub image: u32,
    /// Where it goes.
    pub offset: u64,
}

/// The threads.
pub(super) struct Uploads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// For the thread that waits, which helps.
    stages: Stages,
}

struct Shared {
    set: Arc<TrainSet>,
    device: Arc<Device>,
    stream: Stream,
    memory: Arc<Buffer>,
    state: Mutex<State>,
    /// Signalled when there is work.
    work: Condvar,
    /// Signalled when an image is on its way.
    finished: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Upload>,
    /// Images of each batch that are not yet on their way.
    pending: BTreeMap<u64, usize>,
    failed: BTreeMap<u64, DataError>,
    stop: bool,
}

/// Pinned buffers and the copies out of them. They are made when first needed.
#[derive(Default)]
struct Stages {
    list: Vec<(PinnedBuffer, Event)>,
    next: usize,
}

impl Stages {
    /// The next buffer, free to be written.
    fn next(
        &mut self,
        device: &Arc<Device>,
        bytes: usize,
    ) -> Result<&mut (PinnedBuffer, Event), DeviceError> {
        if self.list.len() < STAGES {
            self.next = self.list.len();
            self.list.push((device.allocate_pinned(bytes)?, device.event()?));
        } else {
            self.next = (self.next + 1) % STAGES;
        }
        let stage = &mut self.list[self.next];
        stage.1.synchronize()?;
        Ok(stage)
    }
}

impl Drop for Stages {
    fn drop(&mut self) {
        for (_, copied) in &self.list {
            // A fault of the device has been reported where it belongs; here only the copies must have ended.
            copied.synchronize().ok();
        }
    }
}

impl Uploads {
    /// Starts `workers` threads that bring images of `set` to `memory`. A thread that cannot be had is no fault: the
    /// others, or the one that waits, do its work.
    pub fn new(
        device: &Arc<Device>,
        set: Arc<TrainSet>,
        memory: Arc<Buffer>,
        workers: usize,
    ) -> Result<Uploads, DeviceError> {
        let shared = Arc::new(Shared {
            set,
            device: Arc::clone(device),
            stream: device.stream()?,
            memory,
            state: Mutex::default(),
            work: Condvar::new(),
            finished: Condvar::new(),
        });
        let threads = (0..workers)
            .filter_map(|i| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("decoder-{i}"))
                    .spawn(move || shared.run())
                    .inspect_err(|error| tracing::warn!(%error, "a decoder thread could not be started"))
                    .ok()
            })
            .collect();
        Ok(Uploads { shared, threads, stages: Stages::default() })
    }

    /// The stream of the copies.
    pub fn stream(&self) -> &Stream {
        &self.shared.stream
    }

    /// Queues the images of a batch. What was in their places must not be needed by work that is not ordered with
    /// [`Uploads::stream`].
    pub fn submit(&self, batch: u64, uploads: Vec<Upload>) {
        if uploads.is_empty() {
            return;
        }
        let mut state = self.shared.lock();
        state.pending.insert(batch, uploads.len());
        state.queue.extend(uploads);
        drop(state);
        self.shared.work.notify_all();
    }

    /// Returns when all images of a batch are on their way; helps meanwhile.
    pub fn wait(&mut self, batch: u64) -> Result<(), DataError> {
        let mut state = self.shared.lock();
        while state.pending.contains_key(&batch) {
            if let Some(upload) = state.queue.pop_front() {
                drop(state);
                self.shared.bring_and_tell(&upload, &mut self.stages);
                state = self.shared.lock();
            } else {
                state = self.shared.finished.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        state.failed.remove(&batch).map_or(Ok(()), Err)
    }

    /// Drops what no thread has begun; returns those images.
    pub fn cancel(&self) -> Vec<u32> {
        let mut state = self.shared.lock();
        let dropped: Vec<Upload> = state.queue.drain(..).collect();
        for upload in &dropped {
            state.count_down(upload.batch);
        }
        dropped.iter().map(|upload| upload.image).collect()
    }
}

impl Drop for Uploads {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked outside of an image has nothing left to say.
            let _ = thread.join();
        }
        // The memory that copies go to may be freed after this.
        self.shared.stream.synchronize().ok();
    }
}

impl State {
    fn count_down(&mut self, batch: u64) {
        if let Some(left) = self.pending.get_mut(&batch) {
            *left -= 1;
            if *left == 0 {
                self.pending.remove(&batch);
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut stages = Stages::default();
        let mut state = self.lock();
        while !state.stop {
            match state.queue.pop_front() {
                Some(upload) => {
                    drop(state);
                    self.bring_and_tell(&upload, &mut stages);
                    state = self.lock();
                }
                None => state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn bring_and_tell(&self, upload: &Upload, stages: &mut Stages) {
        let brought = catch_unwind(AssertUnwindSafe(|| self.bring(upload, stages))).unwrap_or_else(|panic| {
            let (epoch, batch) = upload.place;
            Err(DataError::Worker { epoch, batch, message: message_of(&*panic) })
        });
        let mut state = self.lock();
        state.count_down(upload.batch);
        if let Err(error) = brought {
            state.failed.entry(upload.batch).or_insert(error);
        }
        self.finished.notify_all();
    }

    /// Decodes an image and queues its copy.
    fn bring(&self, upload: &Upload, stages: &mut Stages) -> Result<(), DataError> {
        let (set, sample) = (&self.set, &self.set.samples.store.samples()[upload.image as usize]);
        let imgsz = set.args.imgsz;
        let image = set.samples.store.get(upload.image)?;
        let expected = loaded_size(sample.height as usize, sample.width as usize, imgsz);
        if (image.height, image.width) != expected {
            let reason = format!("was {}x{} pixels and has changed", sample.width, sample.height);
            return Err(DataError::image(&sample.path, reason));
        }
        let (pinned, copied) = stages.next(&self.device, imgsz * imgsz * 3)?;
        pinned.as_mut_slice::<u8>()[..image.bytes()].copy_from_slice(&image.pixels);
        // SAFETY: the buffer is written again only after the event, which is recorded behind the copy.
        unsafe {
            self.stream.upload_pinned(&self.memory, upload.offset as usize, pinned, image.bytes())?;
        }
        self.stream.record(copied)?;
        Ok(())
    }
}
