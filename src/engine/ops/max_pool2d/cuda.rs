//! Max-pool on a GPU: `kernels/max_pool2d.cu`.

use std::sync::Arc;

use super::cpu::Window;
use crate::engine::device::cuda::{Device, DeviceError, Precision, Stream, Tensor};
use crate::engine::ops::lanes::{Forms, Walk, sweep, vectors};

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct PoolArgs {
    x: Tensor,
    z: Tensor,
    walk: Walk,
    indices: u64,
    kernel: u32,
    stride: u32,
    pad: u32,
    accumulate: u32,
}

/// The kernels for one storage type.
pub struct MaxPool2dKernels {
    precision: Precision,
    forward: Forms,
    backward: Forms,
}

impl MaxPool2dKernels {
    /// Compiles or finds the kernels.
    ///
    /// # Errors
    /// They do not compile, or the device refuses.
    pub fn load(device: &Arc<Device>, precision: Precision) -> Result<MaxPool2dKernels, DeviceError> {
        let module = device.module("max_pool2d")?;
        Ok(MaxPool2dKernels {
            precision,
            forward: Forms::load(&module, "max_pool2d_forward", precision)?,
            backward: Forms::load(&module, "max_pool2d_backward", precision)?,
        })
    }

    /// `z = max over the window`, zeros in the border of `z`; keeps the positions (`u8`, dense `[n, h, w, c]` as `z`,
    /// the address a multiple of 8) when `indices` is given.
    ///
    /// # Safety
    /// Views and positions lie in live allocations of this device; nothing unordered touches them.
    ///
    /// # Errors
    /// The device refuses.
    pub unsafe fn forward(
        &self,
        stream: &Stream,
        x: Tensor,
        z: Tensor,
        window: Window,
        indices: Option<u64>,
    ) -> Result<(), DeviceError> {
        assert_eq!((x.n, x.c), (z.n, z.c), "images and channels");
        let vector = vectors(self.precision, &[x, z]);
        let args = pool_args(x, z, Walk::new(&z, z.pad, vector), window, indices.unwrap_or(0), false);
        // SAFETY: by contract.
        unsafe { sweep(stream, self.forward.pick(vector), &args.walk, &args) }
    }

    /// `dx (+)= dz` at the kept positions.
    ///
    /// # Safety
    /// As for [`MaxPool2dKernels::forward`], which kept the positions.
    ///
    /// # Errors
    /// The device refuses.
    pub unsafe fn backward(
        &self,
        stream: &Stream,
        dz: Tensor,
        indices: u64,
        dx: Tensor,
        window: Window,
        accumulate: bool,
    ) -> Result<(), DeviceError> {
        assert_eq!((dx.n, dx.c), (dz.n, dz.c), "images and channels");
        let vector = vectors(self.precision, &[dx, dz]);
        let args = pool_args(dx, dz, Walk::new(&dx, 0, vector), window, indices, accumulate);
        // SAFETY: by contract.
        unsafe { sweep(stream, self.backward.pick(vector), &args.walk, &args) }
    }
}

fn pool_args(x: Tensor, z: Tensor, walk: Walk, window: Window, indices: u64, accumulate: bool) -> PoolArgs {
    let [kernel, stride, pad] = [window.kernel, window.stride, window.pad].map(|v| v as u32);
    PoolArgs { x, z, walk, indices, kernel, stride, pad, accumulate: u32::from(accumulate) }
}
