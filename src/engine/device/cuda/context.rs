//! An opened GPU and its memory.

use std::sync::{Arc, Mutex};

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{result, sys};

use super::Chip;
use super::error::{DeviceError, driver};
use super::libraries;
use super::module::{Module, Modules};
use super::sources;

/// An opened GPU. Shared; every call makes its context current first.
pub struct Device {
    ordinal: usize,
    handle: sys::CUdevice,
    context: sys::CUcontext,
    chip: Chip,
    modules: Mutex<Modules>,
}

// SAFETY: the context may be current on any number of threads; the driver locks what it must.
unsafe impl Send for Device {}
unsafe impl Sync for Device {}

/// Memory of a device as the driver reports it, other processes counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes that nobody has.
    pub free_bytes: u64,
    /// All bytes.
    pub total_bytes: u64,
}

impl Device {
    /// Opens GPU `ordinal`.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] with a sentence that says what is missing.
    pub fn open(ordinal: usize) -> Result<Arc<Device>, DeviceError> {
        super::probe::initialise()?;
        let handle = result::device::get(ordinal as i32).map_err(driver("finding the GPU"))?;
        let chip = describe(handle)?;
        super::probe::check_chip(&chip)?;
        // SAFETY: the handle is one that the driver gave.
        let context = unsafe { result::primary_ctx::retain(handle) }.map_err(driver("opening the GPU"))?;
        let device = Device { ordinal, handle, context, chip, modules: Mutex::default() };
        device.bind()?;
        Ok(Arc::new(device))
    }

    /// Number of the GPU.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// What it offers.
    pub fn chip(&self) -> &Chip {
        &self.chip
    }

    /// Makes this device the one that the calling thread talks to.
    pub(super) fn bind(&self) -> Result<(), DeviceError> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.map_err(driver("choosing the GPU"))
    }

    /// Memory free now.
    ///
    /// # Errors
    /// The device is gone.
    pub fn memory(&self) -> Result<Memory, DeviceError> {
        self.bind()?;
        let (free, total) = result::mem_get_info().map_err(driver("asking for free memory"))?;
        Ok(Memory { free_bytes: free as u64, total_bytes: total as u64 })
    }

    /// The kernel file `kernels/<stem>.cu`, compiled for this chip if it is not in the cache, loaded once.
    ///
    /// # Errors
    /// It does not compile or load.
    pub fn module(self: &Arc<Device>, stem: &'static str) -> Result<Arc<Module>, DeviceError> {
        let lock = || self.modules.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(module) = lock().get(stem) {
            return Ok(module);
        }
        let missing = || DeviceError::NoKernel { stem: stem.into(), kernel: "any".into() };
        let source = sources::find(stem).ok_or_else(missing)?;
        // Not under the lock: files compile side by side. Twice the same one is wasted work, not an error.
        let module = Arc::new(Module::load(self, source)?);
        lock().put(&module);
        Ok(module)
    }

    /// Compiles and loads several kernel files on all cores; `progress` is called after each with the number done.
    ///
    /// # Errors
    /// The first that fails.
    pub fn load_modules(
        self: &Arc<Device>,
        stems: &[&'static str],
        progress: &(dyn Fn(usize, &Module) + Sync),
    ) -> Result<Vec<Arc<Module>>, DeviceError> {
        use rayon::prelude::*;
        let done = std::sync::atomic::AtomicUsize::new(0);
        stems
            .par_iter()
            .map(|stem| {
                let module = self.module(stem)?;
                let count = 1 + done.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                progress(count, &module);
                Ok(module)
            })
            .collect()
    }

    /// Memory of `bytes`, its contents arbitrary.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] with what is free.
    pub fn allocate(self: &Arc<Device>, bytes: usize) -> Result<Buffer, DeviceError> {
        self.bind()?;
        // SAFETY: a context is current; the memory is freed by `Buffer`.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Ok(pointer) => Ok(Buffer { device: Arc::clone(self), pointer, bytes }),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let memory = self.memory()?;
                let (free_bytes, total_bytes) = (memory.free_bytes, memory.total_bytes);
                Err(DeviceError::OutOfMemory { needed_bytes: bytes as u64, free_bytes, total_bytes })
            }
            Err(error) => Err(driver("allocating memory")(error)),
        }
    }

    /// Memory of the host that the GPU reads and writes by itself, zeroed.
    ///
    /// # Errors
    /// The system refuses to pin it.
    pub fn allocate_pinned(self: &Arc<Device>, bytes: usize) -> Result<PinnedBuffer, DeviceError> {
        self.bind()?;
        // SAFETY: a context is current; the memory is freed by `PinnedBuffer`.
        let pointer = unsafe { result::malloc_host(bytes.max(1), 0) }.map_err(driver("pinning memory"))?;
        // SAFETY: just allocated, that long.
        unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, bytes) };
        Ok(PinnedBuffer { device: Arc::clone(self), pointer: pointer.cast(), bytes })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`; everything made from the device holds it, so nothing is left.
        unsafe { result::primary_ctx::release(self.handle) }.ok();
    }
}

/// Reads the facts of a device.
pub(super) fn describe(handle: sys::CUdevice) -> Result<Chip, DeviceError> {
    let attribute = |attribute: Attribute| {
        // SAFETY: the handle is one that the driver gave.
        unsafe { result::device::get_attribute(handle, attribute) }
            .map(|v| v.max(0) as u32)
            .map_err(driver("asking what the GPU offers"))
    };
    let uuid = result::device::get_uuid(handle).map_err(driver("asking for the GPU's identity"))?;
    Ok(Chip {
        name: result::device::get_name(handle).map_err(driver("asking for the GPU's name"))?,
        uuid: uuid.bytes.iter().map(|b| format!("{:02x}", *b as u8)).collect(),
        major: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        minor: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes_max: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
        // SAFETY: as above.
        memory_bytes: unsafe { result::device::total_mem(handle) }
            .map_err(driver("asking for the GPU's memory"))? as u64,
    })
}

/// Number of devices. The driver must be initialised.
pub(super) fn count() -> Result<usize, DeviceError> {
    let _ = libraries::driver_present();
    result::device::get_count().map(|n| n.max(0) as usize).map_err(driver("counting GPUs"))
}

/// Device memory; freed when dropped.
pub struct Buffer {
    device: Arc<Device>,
    pointer: u64,
    bytes: usize,
}

impl Buffer {
    /// Address of the first byte.
    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Length.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated once, freed once. Freeing waits for queued work that may use it.
            unsafe { result::free_sync(self.pointer) }.ok();
        }
    }
}

/// Pinned host memory; freed when dropped.
pub struct PinnedBuffer {
    device: Arc<Device>,
    pointer: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory, owned.
unsafe impl Send for PinnedBuffer {}
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// The memory as numbers.
    pub fn as_slice<T: bytemuck::Pod>(&self) -> &[T] {
        // SAFETY: allocated with that many bytes, page-aligned, initialised; any bytes are a `T`. The GPU writes it
        // only between a queued copy and the synchronisation that the caller waits for.
        unsafe { std::slice::from_raw_parts(self.pointer.cast(), self.bytes / std::mem::size_of::<T>()) }
    }

    /// The memory as numbers, to write.
    pub fn as_mut_slice<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), self.bytes / std::mem::size_of::<T>()) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated once, freed once.
            unsafe { result::free_host(self.pointer.cast()) }.ok();
        }
    }
}
