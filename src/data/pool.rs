//! Threads that make batches ahead of their use and hand them over in order.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Batch, DataError};

/// Longest wait for one batch.
const STALL_LIMIT: Duration = Duration::from_secs(600);

/// Something that can make batch `index` of an epoch; the epoch says what that means.
pub(super) trait Build: Send + Sync + 'static {
    /// What is fixed for an epoch.
    type Epoch: Send + Sync + 'static;
    /// Buffers of one thread.
    type Scratch: Default + Send;

    /// Makes a batch in `out`, whose memory is reused.
    fn build(
        &self,
        epoch: &Self::Epoch,
        index: usize,
        scratch: &mut Self::Scratch,
        out: &mut Batch,
    ) -> Result<(), DataError>;

    /// Number of the epoch, for messages.
    fn number(epoch: &Self::Epoch) -> u32;
}

/// Batches of one epoch after the other, made by `workers` threads, or by the caller when there are none.
pub(super) struct Pool<B: Build> {
    shared: Arc<Shared<B>>,
    threads: Vec<JoinHandle<()>>,
    scratch: B::Scratch,
}

struct Shared<B: Build> {
    build: B,
    in_flight_max: usize,
    state: Mutex<State<B::Epoch>>,
    /// Signalled when there may be work.
    work: Condvar,
    /// Signalled when a batch is ready.
    ready: Condvar,
}

struct State<E> {
    epoch: Option<Arc<E>>,
    generation: u64,
    /// Next batch to be made, next to be handed over, one past the last.
    next: usize,
    delivered: usize,
    end: usize,
    done: BTreeMap<usize, Result<Batch, DataError>>,
    spare: Vec<Batch>,
    stop: bool,
}

impl<B: Build> Pool<B> {
    /// Starts the threads. At most `in_flight_max` batches are being made or waiting at any time.
    pub fn new(build: B, workers: usize, in_flight_max: usize) -> Pool<B> {
        let shared = Arc::new(Shared {
            build,
            in_flight_max: in_flight_max.max(1),
            state: Mutex::new(State {
                epoch: None,
                generation: 0,
                next: 0,
                delivered: 0,
                end: 0,
                done: BTreeMap::new(),
                spare: Vec::new(),
                stop: false,
            }),
            work: Condvar::new(),
            ready: Condvar::new(),
        });
        let threads = (0..workers)
            .filter_map(|i| {
                let shared = Arc::clone(&shared);
                // A thread that cannot be had is no fault: the others, or the caller, do its work.
                std::thread::Builder::new()
                    .name(format!("loader-{i}"))
                    .spawn(move || shared.run())
                    .inspect_err(|error| tracing::warn!(%error, "a loader thread could not be started"))
                    .ok()
            })
            .collect();
        Pool { shared, threads, scratch: B::Scratch::default() }
    }

    /// What makes the batches.
    pub fn build(&self) -> &B {
        &self.shared.build
    }

    /// Begins an epoch at batch `first` of `end`; what was in the making is dropped.
    pub fn start(&mut self, epoch: B::Epoch, first: usize, end: usize) {
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        state.epoch = Some(Arc::new(epoch));
        state.generation += 1;
        (state.next, state.delivered, state.end) = (first, first, end);
        let stale = std::mem::take(&mut state.done);
        state.spare.extend(stale.into_values().filter_map(Result::ok));
        drop(guard);
        self.shared.work.notify_all();
    }

    /// The next batch of the epoch and the time waited for it; `None` at its end. After an error the epoch is over.
    pub fn next(&mut self) -> (Result<Option<Batch>, DataError>, Duration) {
        let begun = Instant::now();
        let result = if self.threads.is_empty() { self.make_here() } else { self.wait() };
        if result.is_err() {
            let mut state = self.shared.lock();
            state.end = state.delivered;
        }
        (result, begun.elapsed())
    }

    /// Takes a batch back, for its memory.
    pub fn recycle(&self, batch: Batch) {
        let mut state = self.shared.lock();
        if state.spare.len() < self.shared.in_flight_max + 2 {
            state.spare.push(batch);
        }
    }

    fn make_here(&mut self) -> Result<Option<Batch>, DataError> {
        let (epoch, index, mut batch) = {
            let mut state = self.shared.lock();
            let Some(epoch) = state.epoch.clone().filter(|_| state.delivered < state.end) else {
                return Ok(None);
            };
            state.delivered += 1;
            (epoch, state.delivered - 1, state.spare.pop().unwrap_or_default())
        };
        self.shared.build.build(&epoch, index, &mut self.scratch, &mut batch)?;
        Ok(Some(batch))
    }

    fn wait(&mut self) -> Result<Option<Batch>, DataError> {
        let deadline = Instant::now() + STALL_LIMIT;
        let mut state = self.shared.lock();
        loop {
            if state.delivered >= state.end {
                return Ok(None);
            }
            let index = state.delivered;
            if let Some(result) = state.done.remove(&index) {
                state.delivered += 1;
                drop(state);
                self.shared.work.notify_all();
                return result.map(Some);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.threads.iter().all(JoinHandle::is_finished) {
                let epoch = state.epoch.as_ref().map_or(0, |epoch| B::number(epoch));
                return Err(DataError::Stalled { epoch, batch: index, seconds: STALL_LIMIT.as_secs() });
            }
            state = self.shared.ready.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl<B: Build> Shared<B> {
    fn lock(&self) -> MutexGuard<'_, State<B::Epoch>> {
        // Nothing that can panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One thread: takes the next batch number, makes the batch, puts it down.
    fn run(&self) {
        let mut scratch = B::Scratch::default();
        let mut state = self.lock();
        while !state.stop {
            let free = state.next < state.end && state.next < state.delivered + self.in_flight_max;
            let Some(epoch) = state.epoch.clone().filter(|_| free) else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let (index, generation) = (state.next, state.generation);
            state.next += 1;
            let mut batch = state.spare.pop().unwrap_or_default();
            drop(state);
            let made =
                catch_unwind(AssertUnwindSafe(|| self.build.build(&epoch, index, &mut scratch, &mut batch)));
            let result = match made {
                Ok(result) => result.map(|()| batch),
                Err(panic) => {
                    scratch = B::Scratch::default();
                    Err(DataError::Worker {
                        epoch: B::number(&epoch),
                        batch: index,
                        message: message_of(&*panic),
                    })
                }
            };
            state = self.lock();
            if state.generation == generation {
                state.done.insert(index, result);
                self.ready.notify_all();
            } else if let Ok(batch) = result {
                state.spare.push(batch);
            }
        }
    }
}

impl<B: Build> Drop for Pool<B> {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked outside of a batch has nothing left to say.
            let _ = thread.join();
        }
    }
}

pub(super) fn message_of(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}
