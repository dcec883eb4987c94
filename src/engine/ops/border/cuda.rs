//! Fills on a GPU: `kernels/border.cu`.

use std::sync::Arc;

use crate::engine::device::cuda::{Device, DeviceError, FastDivisor, Launch, Precision, Stream, Tensor};
use crate::engine::ops::lanes::{Forms, THREADS, Walk, sweep, vectors};

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct BorderArgs {
    z: Tensor,
    groups: FastDivisor,
    per_image: FastDivisor,
    row: FastDivisor,
    sides: FastDivisor,
    count: u32,
    reserved: [u32; 3],
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct InsideArgs {
    z: Tensor,
    walk: Walk,
}

/// The kernels for one storage type.
pub struct BorderKernels {
    precision: Precision,
    zero: Forms,
    zero_inside: Forms,
}

impl BorderKernels {
    /// Compiles or finds the kernels.
    ///
    /// # Errors
    /// They do not compile, or the device refuses.
    pub fn load(device: &Arc<Device>, precision: Precision) -> Result<BorderKernels, DeviceError> {
        let module = device.module("border")?;
        Ok(BorderKernels {
            precision,
            zero: Forms::load(&module, "border_zero", precision)?,
            zero_inside: Forms::load(&module, "border_zero_inside", precision)?,
        })
    }

    /// Writes zeros into the border of `z` (its own channels only).
    ///
    /// # Safety
    /// `z` and its border lie in a live allocation of this device; nothing unordered touches them.
    ///
    /// # Errors
    /// The device refuses.
    pub unsafe fn zero(&self, stream: &Stream, z: Tensor) -> Result<(), DeviceError> {
        if z.pad == 0 {
            return Ok(());
        }
        let vector = vectors(self.precision, &[z]);
        let groups = if vector { z.c / 8 } else { z.c };
        let row = z.w + 2 * z.pad;
        let per_image = 2 * z.pad * (row + z.h);
        let count = u64::from(z.n) * u64::from(per_image) * u64::from(groups);
        assert!(count < 1 << 31, "a border of {z:?}");
        let args = BorderArgs {
            z,
            groups: FastDivisor::new(groups),
            per_image: FastDivisor::new(per_image),
            row: FastDivisor::new(row),
            sides: FastDivisor::new(2 * z.pad),
            count: count as u32,
            reserved: [0; 3],
        };
        // SAFETY: by contract.
        unsafe { stream.launch(self.zero.pick(vector), Launch::cover(count, THREADS), &args) }
    }

    /// Writes zeros into every pixel of `z`, not its border.
    ///
    /// # Safety
    /// `z` lies in a live allocation of this device; nothing unordered touches it.
    ///
    /// # Errors
    /// The device refuses.
    pub unsafe fn zero_inside(&self, stream: &Stream, z: Tensor) -> Result<(), DeviceError> {
        let vector = vectors(self.precision, &[z]);
        let walk = Walk::new(&z, 0, vector);
        // SAFETY: by contract.
        unsafe { sweep(stream, self.zero_inside.pick(vector), &walk, &InsideArgs { z, walk }) }
    }
}
