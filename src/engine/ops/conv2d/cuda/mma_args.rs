//! What the tensor-core kernels are given: twins of the structures in `conv2d_mma*.cuh`.

use crate::engine::device::cuda::{FastDivisor, Precision, Tensor};

/// Twin of `struct ConvOutput`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct OutputArgs {
    pub data: u64,
    pub residual: u64,
    pub first: u64,
    pub second: u64,
    pub partial_tiles: u64,
    pub counters: u64,
    pub image_pitch: u32,
    pub row_pitch: u32,
    pub pixel_pitch: u32,
    pub residual_image_pitch: u32,
    pub residual_row_pitch: u32,
    pub residual_pixel_pitch: u32,
    pub columns: u32,
    pub kind: u32,
    pub activation: u32,
    pub accumulate: u32,
    pub splits: u32,
    pub reserved: u32,
}

/// Twin of `struct ConvGatherArgs`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct GatherArgs {
    pub out: OutputArgs,
    pub x: u64,
    pub weight: u64,
    pub map_h: FastDivisor,
    pub map_w: FastDivisor,
    pub column_tiles: FastDivisor,
    pub image_pitch: u32,
    pub row_pitch: u32,
    pub pixel_pitch: u32,
    pub border: u32,
    pub rows: u32,
    pub height: u32,
    pub width: u32,
    pub kernel: u32,
    pub stride: u32,
    pub pad: u32,
    pub channel_groups: u32,
    pub steps_per_split: u32,
}

/// Twin of `struct ConvPatchArgs`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct PatchArgs {
    pub out: OutputArgs,
    pub x: u64,
    pub weight: u64,
    pub map_h: FastDivisor,
    pub map_w: FastDivisor,
    pub tiles_y: FastDivisor,
    pub tiles_x: FastDivisor,
    pub tile_w: FastDivisor,
    pub patch_w: FastDivisor,
    pub column_tiles: FastDivisor,
    pub row_pitch: u32,
    pub pixel_pitch: u32,
    pub padded_h: u32,
    pub padded_w: u32,
    pub images: u32,
    pub first: u32,
    pub rows: u32,
    pub height: u32,
    pub width: u32,
    pub tile_h: u32,
    pub stride: u32,
    pub run: u32,
    pub patch_pixels: u32,
    pub channel_groups: u32,
    pub chunks: u32,
    pub chunks_per_split: u32,
}

/// Twin of `struct ConvWeightArgs`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct WeightArgs {
    pub x: u64,
    pub dy: u64,
    pub out: u64,
    pub map_h: FastDivisor,
    pub map_w: FastDivisor,
    pub tiles_y: FastDivisor,
    pub tiles_x: FastDivisor,
    pub tile_w: FastDivisor,
    pub patch_w: FastDivisor,
    pub co_tiles: FastDivisor,
    pub ci_tiles: FastDivisor,
    pub row_pitch: u32,
    pub pixel_pitch: u32,
    pub padded_h: u32,
    pub padded_w: u32,
    pub dy_image_pitch: u32,
    pub dy_row_pitch: u32,
    pub dy_pixel_pitch: u32,
    pub first: u32,
    pub height: u32,
    pub width: u32,
    pub tile_h: u32,
    pub patch_pixels: u32,
    pub kernel: u32,
    pub stride: u32,
    pub c_in: u32,
    pub c_out: u32,
    pub units: u32,
    pub units_per_split: u32,
    pub pixels: u32,
    pub add: u32,
}

/// Twin of `struct ConvWeightReduceArgs`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct ReduceArgs {
    pub partials: u64,
    pub out: u64,
    pub len: u32,
    pub splits: u32,
    pub lanes: u32,
    pub reserved: u32,
}

/// Pitches (image, row, pixel) in groups of 8 numbers.
pub(super) fn pitches(t: &Tensor) -> [u32; 3] {
    [(t.image_pitch / 8) as u32, t.row_pitch / 8, t.pixel_pitch / 8]
}

/// Address of the first pixel of the border.
pub(super) fn border_start(t: &Tensor, precision: Precision) -> u64 {
    let back = u64::from(t.pad) * (u64::from(t.row_pitch) + u64::from(t.pixel_pitch));
    t.data - back * precision.bytes() as u64
}

/// Whether rows of all images follow each other, and every offset in groups of 8 fits a `u32`.
pub(super) fn assert_layout(t: &Tensor) {
    let rows = u64::from(t.h + 2 * t.pad);
    assert!(t.image_pitch == rows * u64::from(t.row_pitch), "images of {t:?} do not follow each other");
    assert!(u64::from(t.n) * t.image_pitch / 8 < 1 << 32, "{t:?} is larger than 64 GiB");
    assert!(t.pixels() < 1 << 31, "{t:?} has more than 2^31 pixels");
}
