//! What kernels are given: views of device memory, exact divisors.

use super::Precision;
use crate::engine::tensor::View;

/// A view `[n, h, w, c]` of device memory, as kernels see it: `struct Tensor` of `kernels/common.cuh`.
/// Pitches count elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Tensor {
    /// Address of element (0, 0, 0, 0).
    pub data: u64,
    /// From one image to the next.
    pub image_pitch: u64,
    /// Images.
    pub n: u32,
    /// Rows.
    pub h: u32,
    /// Columns.
    pub w: u32,
    /// Channels.
    pub c: u32,
    /// From one pixel to the next.
    pub pixel_pitch: u32,
    /// From one row to the next.
    pub row_pitch: u32,
    /// Zero pixels around each image.
    pub pad: u32,
    /// Keeps the size a multiple of 16.
    pub reserved: u32,
}

impl Tensor {
    /// The view of a buffer that begins at `base` and holds numbers of `bytes` bytes each.
    ///
    /// # Safety
    /// Every element of `view` and its border lies in one live allocation of the device for as long as work
    /// queued with this tensor may run.
    pub unsafe fn new(base: u64, bytes: usize, view: &View) -> Tensor {
        Tensor {
            data: base + (view.offset * bytes) as u64,
            image_pitch: view.image_pitch as u64,
            n: view.n as u32,
            h: view.h as u32,
            w: view.w as u32,
            c: view.c as u32,
            pixel_pitch: view.pixel_pitch as u32,
            row_pitch: view.row_pitch as u32,
            pad: view.pad as u32,
            reserved: 0,
        }
    }

    /// A tensor that stands for none; kernels test `data`.
    pub fn none() -> Tensor {
        bytemuck::Zeroable::zeroed()
    }

    /// True when every pixel starts at a multiple of 16 bytes, so that vectors of numbers can be moved.
    pub fn is_aligned(&self, precision: Precision) -> bool {
        let unit = 16 / precision.bytes() as u64;
        let pitches = [self.image_pitch, u64::from(self.pixel_pitch), u64::from(self.row_pitch)];
        self.data.is_multiple_of(16) && pitches.iter().all(|p| p.is_multiple_of(unit))
    }

    /// Pixels of all images.
    pub fn pixels(&self) -> u64 {
        u64::from(self.n) * u64::from(self.h) * u64::from(self.w)
    }
}

/// Division of numbers below 2^31 by a multiplication and a shift: `struct FastDivisor` of `kernels/common.cuh`.
///
/// Granlund and Montgomery, "Division by Invariant Integers using Multiplication", 1994.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct FastDivisor {
    divisor: u32,
    multiplier: u32,
    shift: u32,
    reserved: u32,
}

impl FastDivisor {
    /// For a divisor from 1 to 2^31 - 1.
    pub fn new(divisor: u32) -> FastDivisor {
        assert!((1..1 << 31).contains(&divisor), "a divisor of {divisor}");
        // quotient = v * multiplier >> (32 + shift), multiplier = ceil(2^(32 + shift) / divisor), 2^shift >= divisor / 2.
        let shift = divisor.ilog2().saturating_sub(u32::from(divisor.is_power_of_two()));
        let multiplier = ((1u64 << (32 + shift)).div_ceil(u64::from(divisor))) as u32;
        FastDivisor { divisor, multiplier, shift, reserved: 0 }
    }

    /// What the kernel computes.
    pub fn divide(&self, v: u32) -> u32 {
        if self.divisor == 1 {
            return v;
        }
        ((u64::from(v) * u64::from(self.multiplier)) >> 32) as u32 >> self.shift
    }
}
