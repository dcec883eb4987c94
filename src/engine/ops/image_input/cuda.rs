//! Image input on a GPU: `kernels/image_input.cu`.

use std::sync::Arc;

use crate::engine::device::cuda::{Device, DeviceError, Kernel, Precision, Stream, Tensor};
use crate::engine::ops::lanes::{Walk, sweep};

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct InputArgs {
    x: Tensor,
    walk: Walk,
    source: u64,
}

/// The kernels for one storage type.
pub struct ImageInputKernels {
    u8: Kernel,
    f32: Kernel,
}

impl ImageInputKernels {
    /// Compiles or finds the kernels.
    ///
    /// # Errors
    /// They do not compile, or the device refuses.
    pub fn load(device: &Arc<Device>, precision: Precision) -> Result<ImageInputKernels, DeviceError> {
        let module = device.module("image_input")?;
        let kernel = |source: &str| module.kernel(&format!("image_input_{source}_{}", precision.suffix()));
        Ok(ImageInputKernels { u8: kernel("u8")?, f32: kernel("f32")? })
    }

    /// `x = bytes / 255`, `bytes` dense `[n, h, w, c]`; zeros in the border of `x`.
    ///
    /// # Safety
    /// The bytes and `x` with its border lie in live allocations of this device; nothing unordered touches them.
    ///
    /// # Errors
    /// The device refuses.
    pub unsafe fn forward_u8(&self, stream: &Stream, bytes: u64, x: Tensor) -> Result<(), DeviceError> {
        let args = InputArgs { x, walk: Walk::new(&x, x.pad, false), source: bytes };
        // SAFETY: by contract.
        unsafe { sweep(stream, &self.u8, &args.walk, &args) }
    }

    /// `x = floats`, `f32`, dense `[n, h, w, c]`; zeros in the border of `x`.
    ///
    /// # Safety
    /// As for [`ImageInputKernels::forward_u8`].
    ///
    /// # Errors
    /// The device refuses.
    pub unsafe fn forward_f32(&self, stream: &Stream, floats: u64, x: Tensor) -> Result<(), DeviceError> {
        let args = InputArgs { x, walk: Walk::new(&x, x.pad, false), source: floats };
        // SAFETY: by contract.
        unsafe { sweep(stream, &self.f32, &args.walk, &args) }
    }
}
