//! Tensor maps: what Hopper's copy engine is told about a tensor in memory.

use cudarc::driver::sys;

use super::error::{DeviceError, driver_error};
use super::{Device, Precision};

/// A tensor map: `struct TensorMap` of `kernels/ptx_sm90.cuh`, given to kernels inside their arguments.
///
/// Boxes of it land in shared memory as rows of at most 128 bytes, swizzled by 128 bytes; what lies outside of the
/// tensor arrives as zeros.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(128))]
pub struct TensorMap {
    words: [u64; 16],
}

/// A tensor of up to four dimensions, the fastest first.
#[derive(Clone, Copy, Debug)]
pub struct MappedTensor<'a> {
    /// What its numbers are.
    pub precision: Precision,
    /// Address of the first element, a multiple of 16.
    pub data: u64,
    /// Elements of each dimension.
    pub sizes: &'a [u64],
    /// Elements from one index of a dimension to the next, of all dimensions but the first; multiples of 16 bytes.
    pub pitches: &'a [u64],
}

impl MappedTensor<'_> {
    fn kind(&self) -> sys::CUtensorMapDataType {
        match self.precision {
            Precision::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            Precision::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Precision::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        }
    }

    fn strides(&self) -> [u64; 4] {
        let mut strides = [0; 4];
        for (stride, pitch) in strides.iter_mut().zip(self.pitches) {
            *stride = pitch * self.precision.bytes() as u64;
        }
        strides
    }

    fn checked_rank(&self) -> usize {
        let rank = self.sizes.len();
        assert!((2..=4).contains(&rank) && self.pitches.len() == rank - 1, "a tensor map of {self:?}");
        rank
    }
}

/// The pixels that an im2col map goes through: those of a grid, and then those of the next image.
#[derive(Clone, Copy, Debug)]
pub struct PixelGrid {
    /// Column and row of the first pixel, which may lie outside.
    pub first: [i32; 2],
    /// Columns and rows of the grid.
    pub count: [u32; 2],
    /// Pixels from one of the grid to the next.
    pub stride: u32,
}

impl TensorMap {
    /// A map whose boxes have `box_sizes` elements.
    ///
    /// # Errors
    /// The driver refuses: alignment, a box of more than 256 elements in a dimension.
    pub fn tiled(
        device: &Device,
        tensor: &MappedTensor,
        box_sizes: &[u32],
    ) -> Result<TensorMap, DeviceError> {
        let rank = tensor.checked_rank();
        assert_eq!(box_sizes.len(), rank, "a box of {tensor:?}");
        device.bind()?;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let strides = tensor.strides();
        // SAFETY: all arrays have at least `rank` elements; the address is only written into the map.
        let code = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                tensor.kind(),
                rank as u32,
                tensor.data as *mut std::ffi::c_void,
                tensor.sizes.as_ptr(),
                strides.as_ptr(),
                box_sizes.as_ptr(),
                [1u32; 4].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        TensorMap::encoded(code, map, tensor)
    }

    /// A map of images `(c, x, y, n)` whose boxes are `channels` of `pixels` consecutive pixels of `grid`.
    ///
    /// # Errors
    /// The driver refuses: alignment, a grid that ends more than 128 pixels outside of the map.
    pub fn pixels(
        device: &Device,
        tensor: &MappedTensor,
        grid: &PixelGrid,
        channels: u32,
        pixels: u32,
    ) -> Result<TensorMap, DeviceError> {
        assert_eq!(tensor.checked_rank(), 4, "images have four dimensions");
        device.bind()?;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let strides = tensor.strides();
        let steps = [1, grid.stride, grid.stride, 1];
        // The last pixel of the grid, counted from the last one of the map.
        let last = |side: usize| {
            let size = tensor.sizes[side + 1] as i32;
            grid.first[side] + ((grid.count[side] - 1) * grid.stride) as i32 - (size - 1)
        };
        let upper = [last(0), last(1)];
        // SAFETY: the arrays have four, three and two elements, as the driver expects for four dimensions; the
        // address is only written into the map.
        let code = unsafe {
            sys::cuTensorMapEncodeIm2col(
                &mut map,
                tensor.kind(),
                4,
                tensor.data as *mut std::ffi::c_void,
                tensor.sizes.as_ptr(),
                strides.as_ptr(),
                grid.first.as_ptr(),
                upper.as_ptr(),
                channels,
                pixels,
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        TensorMap::encoded(code, map, tensor)
    }

    fn encoded(
        code: sys::CUresult,
        map: sys::CUtensorMap,
        tensor: &MappedTensor,
    ) -> Result<TensorMap, DeviceError> {
        if code == sys::CUresult::CUDA_SUCCESS {
            return Ok(TensorMap { words: map.opaque });
        }
        Err(driver_error(&format!("making a tensor map of {tensor:?}"), code, Vec::new()))
    }
}
