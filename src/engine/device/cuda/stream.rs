//! What the GPU is told to do, in order.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use cudarc::driver::{DriverError, result, sys};

use super::context::{Buffer, Device, PinnedBuffer};
use super::error::{DeviceError, driver_error};
use super::module::Kernel;

/// Names of launches that an error mentions.
const QUEUED_MAX: usize = 4;

/// Blocks and threads of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block; the number in the kernel's `KERNEL` line.
    pub threads: u32,
    /// Dynamic shared memory of a block, bytes.
    pub shared_bytes: u32,
}

impl Launch {
    /// A row of blocks without dynamic shared memory.
    pub fn row(blocks: u32, threads: u32) -> Launch {
        Launch { grid: [blocks, 1, 1], threads, shared_bytes: 0 }
    }

    /// Enough blocks of `threads` for `items`.
    pub fn cover(items: u64, threads: u32) -> Launch {
        Launch::row(items.div_ceil(u64::from(threads)).max(1) as u32, threads)
    }
}

/// A queue of work on one device.
pub struct Stream {
    device: Arc<Device>,
    handle: sys::CUstream,
    queued: Mutex<VecDeque<Arc<str>>>,
    timing: Mutex<Option<Timing>>,
}

// SAFETY: the driver takes calls on a stream from any thread.
unsafe impl Send for Stream {}
unsafe impl Sync for Stream {}

/// Events around each launch, while a profile is taken.
struct Timing {
    part: u32,
    events: Vec<(u32, Arc<str>, Event, Event)>,
}

/// Time of one launch.
#[derive(Clone, Debug)]
pub struct LaunchTime {
    /// What [`Stream::set_part`] said last.
    pub part: u32,
    /// The kernel.
    pub kernel: Arc<str>,
    /// How long it ran.
    pub milliseconds: f32,
}

impl Device {
    /// A new queue.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn stream(self: &Arc<Device>) -> Result<Stream, DeviceError> {
        self.bind()?;
        let handle = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(super::error::driver("making a stream"))?;
        Ok(Stream { device: Arc::clone(self), handle, queued: Mutex::default(), timing: Mutex::default() })
    }

    /// A point in time of a stream.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn event(self: &Arc<Device>) -> Result<Event, DeviceError> {
        self.bind()?;
        let handle = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
            .map_err(super::error::driver("making an event"))?;
        Ok(Event { device: Arc::clone(self), handle })
    }
}

impl Stream {
    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    fn failed(&self, operation: &str) -> impl Fn(DriverError) -> DeviceError {
        let queued = self.queued.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let queued: Vec<String> = queued.iter().map(|name| name.to_string()).collect();
        let operation = operation.to_owned();
        move |error| driver_error(&operation, error.0, queued.clone())
    }

    /// Queues a kernel with its one argument structure.
    ///
    /// # Safety
    /// Every address in `args` is that of live device memory for as long as the kernel may run, as long as the
    /// kernel takes it to be, and no other queued work that is not ordered with this stream touches it.
    ///
    /// # Errors
    /// The argument's size differs from the kernel's, or the driver refuses.
    pub unsafe fn launch<A: bytemuck::Pod>(
        &self,
        kernel: &Kernel,
        launch: Launch,
        args: &A,
    ) -> Result<(), DeviceError> {
        let got = std::mem::size_of::<A>();
        if let Some(expected) = kernel.argument_bytes.filter(|&expected| expected != got) {
            return Err(DeviceError::Arguments { kernel: kernel.name().into(), expected, got });
        }
        self.device.bind()?;
        let mut timing = self.timing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let begin = timing.is_some().then(|| self.mark()).transpose()?;
        let [x, y, z] = launch.grid;
        let mut params = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
        // SAFETY: the kernel is loaded; it takes one argument of this size, which the driver copies before it
        // returns; the addresses in it are the caller's promise.
        let outcome = unsafe {
            result::launch_kernel(
                kernel.handle,
                (x, y, z),
                (launch.threads, 1, 1),
                launch.shared_bytes,
                self.handle,
                &mut params,
            )
        };
        outcome.map_err(self.failed(&format!("launching {} as {launch:?}", kernel.name)))?;
        let mut queued = self.queued.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        queued.truncate(QUEUED_MAX - 1);
        queued.push_front(Arc::clone(&kernel.name));
        drop(queued);
        if let (Some(timing), Some(begin)) = (timing.as_mut(), begin) {
            let end = self.mark()?;
            timing.events.push((timing.part, Arc::clone(&kernel.name), begin, end));
        }
        Ok(())
    }

    /// From now on every launch is timed by events, until [`Stream::take_times`].
    pub fn start_timing(&self) {
        let timing = Timing { part: u32::MAX, events: Vec::new() };
        *self.timing.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(timing);
    }

    /// Says to which part of the work the next launches belong, for a profile.
    pub fn set_part(&self, part: u32) {
        if let Some(timing) = self.timing.lock().unwrap_or_else(std::sync::PoisonError::into_inner).as_mut() {
            timing.part = part;
        }
    }

    /// Times of each launch since [`Stream::start_timing`], in order; stops timing and waits.
    ///
    /// # Errors
    /// A launch failed.
    pub fn take_times(&self) -> Result<Vec<LaunchTime>, DeviceError> {
        let taken = self.timing.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        self.synchronize()?;
        let time = |(part, kernel, begin, end): (u32, Arc<str>, Event, Event)| {
            Ok(LaunchTime { part, kernel, milliseconds: end.milliseconds_since(&begin)? })
        };
        taken.map_or_else(|| Ok(Vec::new()), |timing| timing.events.into_iter().map(time).collect())
    }

    /// Sets `bytes` bytes at a device address.
    ///
    /// # Safety
    /// The address is that of live device memory of that length, untouched by work not ordered with this stream.
    ///
    /// # Errors
    /// The driver refuses.
    pub unsafe fn fill(&self, pointer: u64, byte: u8, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: the caller's promise.
        unsafe { result::memset_d8_async(pointer, byte, bytes, self.handle) }
            .map_err(self.failed("filling memory"))
    }

    /// Copies numbers into a buffer at `offset` bytes; returns when they have been read.
    ///
    /// # Errors
    /// The driver refuses, or earlier work failed.
    pub fn upload<T: bytemuck::Pod>(
        &self,
        to: &Buffer,
        offset: usize,
        from: &[T],
    ) -> Result<(), DeviceError> {
        let bytes = std::mem::size_of_val(from);
        assert!(offset + bytes <= to.bytes(), "{bytes} bytes at {offset} of {}", to.bytes());
        self.device.bind()?;
        // SAFETY: inside the buffer by the assertion; the source is alive until the synchronisation below.
        unsafe { result::memcpy_htod_async(to.pointer() + offset as u64, from, self.handle) }
            .map_err(self.failed("copying to the GPU"))?;
        self.synchronize()
    }

    /// Queues a copy of the first `bytes` of pinned memory into a buffer.
    ///
    /// # Safety
    /// The pinned memory is not written before the copy has run.
    ///
    /// # Errors
    /// The driver refuses.
    pub unsafe fn upload_pinned(
        &self,
        to: &Buffer,
        offset: usize,
        from: &PinnedBuffer,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        assert!(offset + bytes <= to.bytes(), "{bytes} bytes at {offset} of {}", to.bytes());
        self.device.bind()?;
        // SAFETY: inside both; the rest is the caller's promise.
        unsafe {
            result::memcpy_htod_async(
                to.pointer() + offset as u64,
                &from.as_slice::<u8>()[..bytes],
                self.handle,
            )
        }
        .map_err(self.failed("copying to the GPU"))
    }

    /// Copies numbers out of a buffer from `offset` bytes on; waits for everything queued before.
    ///
    /// # Errors
    /// The driver refuses, or earlier work failed.
    pub fn download<T: bytemuck::Pod>(
        &self,
        from: &Buffer,
        offset: usize,
        to: &mut [T],
    ) -> Result<(), DeviceError> {
        let bytes = std::mem::size_of_val(to);
        assert!(offset + bytes <= from.bytes(), "{bytes} bytes at {offset} of {}", from.bytes());
        self.device.bind()?;
        // SAFETY: inside the buffer by the assertion; the target is borrowed until the synchronisation below.
        unsafe { result::memcpy_dtoh_async(to, from.pointer() + offset as u64, self.handle) }
            .map_err(self.failed("copying from the GPU"))?;
        self.synchronize()
    }

    /// Queues a copy from a buffer into pinned memory.
    ///
    /// # Safety
    /// The pinned memory is not read or written before the copy has run.
    ///
    /// # Errors
    /// The driver refuses.
    pub unsafe fn download_pinned(
        &self,
        from: &Buffer,
        offset: usize,
        to: &mut PinnedBuffer,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        assert!(offset + bytes <= from.bytes(), "{bytes} bytes at {offset} of {}", from.bytes());
        self.device.bind()?;
        let target = &mut to.as_mut_slice::<u8>()[..bytes];
        // SAFETY: inside both; the rest is the caller's promise.
        unsafe { result::memcpy_dtoh_async(target, from.pointer() + offset as u64, self.handle) }
            .map_err(self.failed("copying from the GPU"))
    }

    /// Queues a copy within the device.
    ///
    /// # Safety
    /// Both addresses are those of live device memory of that length that does not overlap.
    ///
    /// # Errors
    /// The driver refuses.
    pub unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.handle) }
            .map_err(self.failed("copying within the GPU"))
    }

    /// Waits for everything queued.
    ///
    /// # Errors
    /// Some of it failed.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.device.bind()?;
        // SAFETY: the stream is alive.
        unsafe { result::stream::synchronize(self.handle) }.map_err(self.failed("waiting for the GPU"))
    }

    /// A mark behind everything queued so far.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn mark(&self) -> Result<Event, DeviceError> {
        let event = self.device.event()?;
        self.record(&event)?;
        Ok(event)
    }

    /// Puts an event behind everything queued so far.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn record(&self, event: &Event) -> Result<(), DeviceError> {
        self.device.bind()?;
        // SAFETY: both are alive and of one device.
        unsafe { result::event::record(event.handle, self.handle) }
            .map_err(self.failed("marking a point in time"))
    }

    /// Makes later work of this stream wait for an event of another.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn wait(&self, event: &Event) -> Result<(), DeviceError> {
        self.device.bind()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are alive and of one device.
        unsafe { result::stream::wait_event(self.handle, event.handle, flags) }
            .map_err(self.failed("waiting for another stream"))
    }

    /// Records what `queue` queues instead of running it, as one thing to run again and again.
    ///
    /// # Errors
    /// The driver cannot record it, or `queue` fails; nothing has run then.
    pub fn capture(
        &self,
        queue: impl FnOnce(&Stream) -> Result<(), DeviceError>,
    ) -> Result<CapturedGraph, DeviceError> {
        self.device.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and not being captured (`queue` gets no way to nest).
        unsafe { result::stream::begin_capture(self.handle, mode) }
            .map_err(self.failed("starting a capture"))?;
        let queued = queue(self);
        // SAFETY: begun above; must end in every case.
        let graph = unsafe { result::stream::end_capture(self.handle) };
        queued?;
        let graph = graph.map_err(self.failed("ending a capture"))?;
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        // SAFETY: the graph was just made; it is destroyed once, here.
        let made = unsafe { result::graph::instantiate(graph, flags) };
        unsafe { result::graph::destroy(graph) }.ok();
        let handle = made.map_err(self.failed("preparing a captured step"))?;
        Ok(CapturedGraph { device: Arc::clone(&self.device), handle })
    }

    /// Queues a captured piece of work.
    ///
    /// # Safety
    /// The memory it was captured with is still alive.
    ///
    /// # Errors
    /// The driver refuses.
    pub unsafe fn run(&self, graph: &CapturedGraph) -> Result<(), DeviceError> {
        self.device.bind()?;
        // SAFETY: the graph is alive; its memory is the caller's promise.
        unsafe { result::graph::launch(graph.handle, self.handle) }
            .map_err(self.failed("running a captured step"))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made once, destroyed once; queued work still runs to its end.
            unsafe { result::stream::destroy(self.handle) }.ok();
        }
    }
}

/// A point in time of a stream.
pub struct Event {
    device: Arc<Device>,
    handle: sys::CUevent,
}

// SAFETY: the driver takes calls on an event from any thread.
unsafe impl Send for Event {}
unsafe impl Sync for Event {}

impl Event {
    /// Waits until everything queued before the event was recorded has run. Returns at once for one never recorded.
    ///
    /// # Errors
    /// Some of it failed.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.device.bind()?;
        // SAFETY: the event is alive.
        let code = unsafe { sys::cuEventSynchronize(self.handle) };
        code.result().map_err(super::error::driver("waiting for an event"))
    }

    /// Milliseconds from `earlier` to this event; both must have happened.
    ///
    /// # Errors
    /// One of them has not.
    pub fn milliseconds_since(&self, earlier: &Event) -> Result<f32, DeviceError> {
        type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;
        self.device.bind()?;
        let mut milliseconds = 0.0;
        // The plain symbol exists in every driver; newer ones also have a second version of it.
        // SAFETY: the library is loaded, the symbol has this signature, both events are alive.
        let code = unsafe {
            match sys::culib().get::<Elapsed>(b"cuEventElapsedTime") {
                Ok(elapsed) => elapsed(&mut milliseconds, earlier.handle, self.handle),
                Err(_) => sys::CUresult::CUDA_ERROR_NOT_FOUND,
            }
        };
        if code != sys::CUresult::CUDA_SUCCESS {
            return Err(driver_error("reading a time", code, Vec::new()));
        }
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made once, destroyed once.
            unsafe { result::event::destroy(self.handle) }.ok();
        }
    }
}

/// Work that was captured, ready to run again and again.
pub struct CapturedGraph {
    device: Arc<Device>,
    handle: sys::CUgraphExec,
}

// SAFETY: the driver takes calls on it from any thread, one at a time by `&mut` or the stream's order.
unsafe impl Send for CapturedGraph {}
unsafe impl Sync for CapturedGraph {}

impl Drop for CapturedGraph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made once, destroyed once.
            unsafe { result::graph::exec_destroy(self.handle) }.ok();
        }
    }
}
