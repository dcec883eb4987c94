//! Operations. One operation is one folder: `mod.rs` (parameters, shape rule), `cpu.rs` (forward and
//! gradient), `tests.rs` (a naive `f64` reference, finite differences, odd shapes).
//!
//! Conventions: activations are NHWC views ([`crate::engine::tensor::View`]); gradients of parameters are
//! added to what is there, gradients of activations overwrite unless a flag says to add; every sum has an
//! order that depends on the shape alone, so results have the same bits for any number of threads; nothing
//! is allocated. Work is split with rayon inside the pool that the caller is in.

pub mod batch_norm_act;
pub mod border;
pub mod conv2d;
#[cfg(test)]
pub(crate) mod cuda_testing;
pub mod image_input;
pub(crate) mod lanes;
pub mod max_pool2d;
pub mod upsample_nearest;

use super::tensor::{Dst, Src};

/// Rows of one task: about 16,384 numbers, at least one row. Depends on the shape alone.
pub(crate) fn rows_per_task(h: usize, w: usize, c: usize) -> usize {
    (16_384 / (w * c).max(1)).clamp(1, h)
}

impl<'a> Src<'a> {
    /// The channels of pixel `(n, y, x)`.
    ///
    /// # Safety
    /// The pixel lies in the map or its border, and nobody writes it meanwhile.
    pub(crate) unsafe fn pixel(&self, n: usize, y: isize, x: isize) -> &'a [f32] {
        // SAFETY: inside the allocation by the contract of `Src::new` and of this function.
        unsafe { std::slice::from_raw_parts(self.data.add(self.view.at(n, y, x)), self.view.c) }
    }
}

impl<'a> Dst<'a> {
    /// The channels of pixel `(n, y, x)`.
    ///
    /// # Safety
    /// The pixel lies in the map or its border, and nobody else reads or writes it meanwhile.
    pub(crate) unsafe fn pixel(&self, n: usize, y: isize, x: isize) -> &'a mut [f32] {
        // SAFETY: inside the allocation by the contract of `Dst::new` and of this function.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(self.view.at(n, y, x)), self.view.c) }
    }
}
