//! What the kernels of batch normalisation are given, and how large their workspaces are.

use crate::engine::device::cuda::{Launch, Precision, Tensor};
use crate::engine::ops::lanes::{THREADS, Walk, even};

/// Blocks of a reduction at most: several waves on a large chip, so that the last one costs little. The number
/// depends on the shape alone, because the order of the sums does on it.
pub(super) const REDUCE_BLOCKS_MAX: u32 = 1584;
/// Steps of a reducing block at least, where the map has them.
pub(super) const REDUCE_STEPS: u32 = 4;
/// Blocks along the rows of partial sums at most.
pub(super) const RANGES_MAX: u32 = 256;
/// Rows of partial sums that a thread adds at least, where there are as many.
pub(super) const ROWS_PER_THREAD: u32 = 8;
/// Blocks along the channels at most: as many counters are kept.
pub(super) const CHANNEL_BLOCKS_MAX: u32 = 1024;

/// Pixels that a thread has in flight in a step; as `NormSteps` of the kernel file.
pub(super) fn pixels_per_step(precision: Precision) -> u32 {
    if precision == Precision::F32 { 1 } else { 2 }
}
/// The same of the bias reduction.
pub(super) const BIAS_PIXELS_PER_STEP: u32 = 4;

/// Twin of `struct Columns`: sums over rows of partial sums.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Columns {
    pub partials: u64,
    pub scratch: u64,
    pub counters: u64,
    pub rows: u32,
    pub rows_per_range: u32,
    pub channels: u32,
    pub lane_bits: u32,
    pub reserved: [u32; 2],
}

impl Columns {
    pub fn new(rows: u32, channels: u32) -> Columns {
        let lane_bits = channels.next_power_of_two().ilog2().min(5);
        let per_step = THREADS >> lane_bits;
        let ranges = (rows / (per_step * ROWS_PER_THREAD)).clamp(1, RANGES_MAX);
        Columns {
            partials: 0,
            scratch: 0,
            counters: 0,
            rows,
            rows_per_range: rows.div_ceil(ranges),
            channels,
            lane_bits,
            reserved: [0; 2],
        }
    }

    pub fn grid(&self) -> [u32; 3] {
        let ranges = self.rows.div_ceil(self.rows_per_range.max(1)).max(1);
        let channel_blocks = self.channels.div_ceil(1 << self.lane_bits);
        assert!(channel_blocks <= CHANNEL_BLOCKS_MAX, "{} channels", self.channels);
        [ranges, channel_blocks, 1]
    }

    /// Floats of the scratch for `sums` columns of doubles.
    pub fn scratch_len(&self, sums: usize) -> usize {
        let [ranges, channel_blocks, _] = self.grid();
        if ranges == 1 { 0 } else { (2 * sums * (ranges * channel_blocks) as usize) << self.lane_bits }
    }

    pub fn launch(&self) -> Launch {
        Launch { grid: self.grid(), threads: THREADS, shared_bytes: 0 }
    }
}

/// Floats of the scratch of [`BatchNormActKernels::finish_stats`](super::BatchNormActKernels::finish_stats).
pub fn finish_stats_scratch_len(pixels: usize, rows_per_partial: usize, channels: usize) -> usize {
    Columns::new(pixels.div_ceil(rows_per_partial) as u32, channels as u32).scratch_len(3)
}

/// Blocks of a reduction of so many steps.
pub(super) fn reduce_blocks(chunks: u32) -> u32 {
    even(chunks, (chunks / REDUCE_STEPS).clamp(1, REDUCE_BLOCKS_MAX))
}

/// Where the parts of a backward workspace begin, in floats: partial sums (after the coefficients), scratch, end.
pub(super) fn backward_layout(blocks: u32, channels: usize, sums: usize, coefficients: usize) -> [usize; 3] {
    let partials = (coefficients * channels).next_multiple_of(4);
    let scratch = (partials + sums * channels * blocks as usize).next_multiple_of(4);
    [partials, scratch, scratch + Columns::new(blocks, channels as u32).scratch_len(sums)]
}

/// Floats of a workspace that serves aligned and other views.
fn workspace_len(pixels: usize, channels: usize, per_thread: u32, sums: usize, coefficients: usize) -> usize {
    let len = |groups: usize| {
        let slots = THREADS / (groups as u32).clamp(1, THREADS);
        let chunks = (pixels as u32).div_ceil(per_thread * slots);
        backward_layout(reduce_blocks(chunks), channels, sums, coefficients)[2]
    };
    if channels.is_multiple_of(8) { len(channels / 8).max(len(channels)) } else { len(channels) }
}

/// Floats of the workspace of [`BatchNormActKernels::backward`](super::BatchNormActKernels::backward) for a map of
/// `pixels` in all images.
pub fn backward_workspace_len(precision: Precision, pixels: usize, channels: usize) -> usize {
    workspace_len(pixels, channels, pixels_per_step(precision), 2, 4)
}

/// Floats of the workspace of [`BatchNormActKernels::bias_gradient`](super::BatchNormActKernels::bias_gradient) for a
/// map of `pixels` in all images.
pub fn bias_gradient_workspace_len(pixels: usize, channels: usize) -> usize {
    workspace_len(pixels, channels, BIAS_PIXELS_PER_STEP, 1, 0)
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct ForwardArgs {
    pub y: Tensor,
    pub z: Tensor,
    pub residual: Tensor,
    pub walk: Walk,
    pub stats: u64,
    pub weight: u64,
    pub bias: u64,
    pub activation: u32,
    pub chunks: u32,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct ReduceArgs {
    pub y: Tensor,
    pub dz: Tensor,
    pub walk: Walk,
    pub stats: u64,
    pub weight: u64,
    pub bias: u64,
    pub partials: u64,
    pub activation: u32,
    pub chunks: u32,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct ApplyArgs {
    pub y: Tensor,
    pub dz: Tensor,
    pub dy: Tensor,
    pub residual_grad: Tensor,
    pub walk: Walk,
    pub coefficients: u64,
    pub activation: u32,
    pub chunks: u32,
    pub accumulate: u32,
    pub reserved: u32,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct FinishStatsArgs {
    pub columns: Columns,
    pub stats: u64,
    pub running_mean: u64,
    pub running_variance: u64,
    pub rows_per_partial: u32,
    pub pixels: u32,
    pub eps: f32,
    pub momentum: f32,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct BackwardFinishArgs {
    pub columns: Columns,
    pub stats: u64,
    pub weight: u64,
    pub bias: u64,
    pub dweight: u64,
    pub dbias: u64,
    pub coefficients: u64,
    pub pixels: u32,
    pub reserved: u32,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct BiasFinishArgs {
    pub columns: Columns,
    pub dbias: u64,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct RunningArgs {
    pub running_mean: u64,
    pub running_variance: u64,
    pub weight: u64,
    pub bias: u64,
    pub first: u64,
    pub second: u64,
    pub channels: u32,
    pub eps: f32,
}
