//! Loaded kernel files and their kernels.

use std::collections::HashMap;
use std::ffi::CString;
use std::path::Path;
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::cache;
use super::context::Device;
use super::error::{DeviceError, driver, driver_error};
use super::sources::Source;

/// A kernel file loaded into a device.
pub struct Module {
    device: Arc<Device>,
    stem: &'static str,
    handle: sys::CUmodule,
    /// Figures of the compiler, where it ran in this process.
    origin: cache::Origin,
}

// SAFETY: the handle is an address that the driver may be given from any thread; the context is made current first.
unsafe impl Send for Module {}
unsafe impl Sync for Module {}

impl Module {
    pub(super) fn load(device: &Arc<Device>, source: &'static Source) -> Result<Module, DeviceError> {
        let mut folder = cache::folder();
        if device.chip().is_emulated() {
            // Its compiler gives no machine code, under the same names.
            folder.push("emulated");
        }
        Self::load_from(&folder, device, source)
    }

    /// The same with the cache in `folder`.
    pub(super) fn load_from(
        folder: &Path,
        device: &Arc<Device>,
        source: &'static Source,
    ) -> Result<Module, DeviceError> {
        let target = device.chip().target();
        let (mut code, mut origin) = cache::load(folder, source, &target)?;
        device.bind()?;
        let mut loaded = image(&code);
        if let Err(error) = &loaded
            && origin == cache::Origin::Cached
        {
            // Whole by its checksum, and yet of another driver, say.
            tracing::warn!(
                stem = source.stem,
                "the driver refuses a cached kernel ({error}); compiling it anew"
            );
            (code, origin) = cache::renew(folder, source, &target)?;
            loaded = image(&code);
        }
        let handle = loaded.map_err(driver("loading a compiled kernel file"))?;
        Ok(Module { device: Arc::clone(device), stem: source.stem, handle, origin })
    }

    /// Whether the code came from the cache.
    pub fn origin(&self) -> cache::Origin {
        self.origin
    }

    /// A kernel of the file by name.
    ///
    /// # Errors
    /// No kernel of that name.
    pub fn kernel(self: &Arc<Module>, name: &str) -> Result<Kernel, DeviceError> {
        self.device.bind()?;
        let missing = || DeviceError::NoKernel { stem: self.stem.into(), kernel: name.into() };
        let text = CString::new(name).map_err(|_| missing())?;
        // SAFETY: the module is loaded for as long as `self` lives, which the kernel keeps alive.
        let handle = unsafe { result::module::get_function(self.handle, text) }.map_err(|_| missing())?;
        Ok(Kernel {
            argument_bytes: argument_bytes(handle),
            name: name.into(),
            handle,
            module: Arc::clone(self),
        })
    }
}

/// Gives machine code to the driver. The device's context is current.
fn image(code: &[u8]) -> Result<sys::CUmodule, result::DriverError> {
    // SAFETY: `code` is a whole image that the compiler made; the driver copies it.
    unsafe { result::module::load_data(code.as_ptr().cast()) }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: loaded once, unloaded once; its kernels hold the module, so none is left.
            unsafe { result::module::unload(self.handle) }.ok();
        }
    }
}

/// A kernel, ready to launch.
#[derive(Clone)]
pub struct Kernel {
    pub(super) handle: sys::CUfunction,
    pub(super) name: Arc<str>,
    /// Bytes of its one argument, where the driver tells.
    pub(super) argument_bytes: Option<usize>,
    #[allow(dead_code)] // keeps the code loaded
    module: Arc<Module>,
}

// SAFETY: as for the module.
unsafe impl Send for Kernel {}
unsafe impl Sync for Kernel {}

impl Kernel {
    /// Name as in the kernel file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Lets blocks of this kernel ask for up to `bytes` of dynamic shared memory (48 KiB need no leave).
    ///
    /// # Errors
    /// More than the chip has.
    pub fn allow_shared(&self, bytes: u32) -> Result<(), DeviceError> {
        self.module.device.bind()?;
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the handle is alive; the call only sets a number.
        unsafe { result::function::set_function_attribute(self.handle, attribute, bytes as i32) }.map_err(
            |e| {
                driver_error(
                    &format!("asking for {bytes} bytes of shared memory for {}", self.name),
                    e.0,
                    Vec::new(),
                )
            },
        )
    }
}

/// Bytes of the first argument of a function; `None` with a driver that does not tell (before 12.4).
fn argument_bytes(function: sys::CUfunction) -> Option<usize> {
    type Ask = unsafe extern "C" fn(sys::CUfunction, usize, *mut usize, *mut usize) -> sys::CUresult;
    let (mut offset, mut bytes) = (0usize, 0usize);
    // SAFETY: the library is loaded, since a function was got from it; the symbol has this signature since 12.4.
    unsafe {
        let ask = sys::culib().get::<Ask>(b"cuFuncGetParamInfo").ok()?;
        (ask(function, 0, &mut offset, &mut bytes) == sys::CUresult::CUDA_SUCCESS).then_some(bytes)
    }
}

/// Loaded files of a device, by stem.
#[derive(Default)]
pub(super) struct Modules(HashMap<&'static str, std::sync::Weak<Module>>);

impl Modules {
    pub fn get(&self, stem: &str) -> Option<Arc<Module>> {
        self.0.get(stem)?.upgrade()
    }

    pub fn put(&mut self, module: &Arc<Module>) {
        self.0.insert(module.stem, Arc::downgrade(module));
    }
}
