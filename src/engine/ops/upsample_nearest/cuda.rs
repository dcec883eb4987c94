//! Nearest-neighbour enlargement on a GPU: `kernels/upsample_nearest.cu`.

use std::sync::Arc;

use crate::engine::device::cuda::{Device, DeviceError, FastDivisor, Precision, Stream, Tensor};
use crate::engine::ops::lanes::{Forms, Walk, sweep, vectors};

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct UpsampleArgs {
    x: Tensor,
    z: Tensor,
    walk: Walk,
    factor: FastDivisor,
    accumulate: u32,
    reserved: u32,
}

/// The kernels for one storage type.
pub struct UpsampleNearestKernels {
    precision: Precision,
    forward: Forms,
    backward: Forms,
}

impl UpsampleNearestKernels {
    /// Compiles or finds the kernels.
    ///
    /// # Errors
    /// They do not compile, or the device refuses.
    pub fn load(device: &Arc<Device>, precision: Precision) -> Result<UpsampleNearestKernels, DeviceError> {
        let module = device.module("upsample_nearest")?;
        Ok(UpsampleNearestKernels {
            precision,
            forward: Forms::load(&module, "upsample_nearest_forward", precision)?,
            backward: Forms::load(&module, "upsample_nearest_backward", precision)?,
        })
    }

    /// `z[n, y, x] = x[n, y / factor, x / factor]`, zeros in the border of `z`.
    ///
    /// # Safety
    /// Both views lie in live allocations of this device; nothing unordered touches them.
    ///
    /// # Errors
    /// The device refuses.
    pub unsafe fn forward(
        &self,
        stream: &Stream,
        x: Tensor,
        z: Tensor,
        factor: usize,
    ) -> Result<(), DeviceError> {
        let args = self.args(x, z, factor, None);
        // SAFETY: by contract.
        unsafe { sweep(stream, self.forward.pick(vectors(self.precision, &[x, z])), &args.walk, &args) }
    }

    /// `dx (+)= ` the sum of `dz` over each `factor * factor` square.
    ///
    /// # Safety
    /// As for [`UpsampleNearestKernels::forward`].
    ///
    /// # Errors
    /// The device refuses.
    pub unsafe fn backward(
        &self,
        stream: &Stream,
        dz: Tensor,
        dx: Tensor,
        factor: usize,
        accumulate: bool,
    ) -> Result<(), DeviceError> {
        let args = self.args(dx, dz, factor, Some(accumulate));
        // SAFETY: by contract.
        unsafe { sweep(stream, self.backward.pick(vectors(self.precision, &[dx, dz])), &args.walk, &args) }
    }

    fn args(&self, x: Tensor, z: Tensor, factor: usize, backward: Option<bool>) -> UpsampleArgs {
        let f = factor as u32;
        assert_eq!((z.n, z.h, z.w, z.c), (x.n, x.h * f, x.w * f, x.c), "upsample shapes");
        let vector = vectors(self.precision, &[x, z]);
        let walk = if backward.is_some() { Walk::new(&x, 0, vector) } else { Walk::new(&z, z.pad, vector) };
        let accumulate = u32::from(backward == Some(true));
        UpsampleArgs { x, z, walk, factor: FastDivisor::new(f), accumulate, reserved: 0 }
    }
}
