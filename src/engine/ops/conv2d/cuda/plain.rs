//! Convolution on ordinary cores: `kernels/conv2d.cu`. Any channels, any alignment, every chip, all precisions.

use std::sync::Arc;

use super::{Epilogue, Pass, Shape, StatsLayout};
use crate::engine::device::cuda::{
    Chip, Device, DeviceError, FastDivisor, Kernel, Launch, Precision, Stream, Tensor,
};
use crate::engine::ops::conv2d::Conv2dParams;

/// Rows and columns of a tile.
pub(super) const TILE: u32 = 64;
/// Pixels that a tile takes in a step of the weight gradient.
const DEPTH: u32 = 16;
/// Threads of a block.
pub(super) const THREADS: u32 = 128;
/// Blocks that the weight gradient is split into, about: several for each multiprocessor of a large chip.
const WEIGHT_BLOCKS: u32 = 528;
/// Pixels of a split at least.
const SPLIT_PIXELS_MIN: u32 = 128;
/// Floats of the workspace at most.
const WORKSPACE_MAX: usize = 4 << 20;

/// Kernel files.
pub(super) fn stems() -> &'static [&'static str] {
    &["conv2d"]
}

/// How the forward pass cuts its statistics.
pub(super) fn stats_layout(_: &Conv2dParams, shape: &Shape) -> StatsLayout {
    let tile = TILE as usize;
    let pixels = shape.n * shape.h_out * shape.w_out;
    StatsLayout { partials: pixels.div_ceil(tile), pixels_per_partial: tile }
}

/// Floats of the workspace of a pass.
pub(super) fn workspace_len(pass: Pass, p: &Conv2dParams, shape: &Shape, _: &Chip) -> usize {
    match pass {
        Pass::BackwardWeight => Split::new(p, (shape.n * shape.h_out * shape.w_out) as u32).workspace_len(p),
        _ => 0,
    }
}

/// How the pixels of a weight gradient are split; depends on the shape alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Split {
    pub pixels: u32,
    pub splits: u32,
}

impl Split {
    pub fn new(p: &Conv2dParams, pixels: u32) -> Split {
        let depth = p.weight_len() / p.c_out;
        let tiles = (depth as u32).div_ceil(TILE) * (p.c_out as u32).div_ceil(TILE);
        let fitting = (WORKSPACE_MAX / p.weight_len()).max(1) as u32;
        let wanted = (WEIGHT_BLOCKS / tiles).min(pixels / SPLIT_PIXELS_MIN).min(fitting).max(1);
        let per_split = pixels.div_ceil(wanted).next_multiple_of(DEPTH);
        Split { pixels: per_split, splits: pixels.div_ceil(per_split) }
    }

    pub fn workspace_len(&self, p: &Conv2dParams) -> usize {
        if self.splits == 1 { 0 } else { self.splits as usize * p.weight_len() }
    }
}

/// Twin of `struct PlainConv`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Geometry {
    out_width: FastDivisor,
    out_height: FastDivisor,
    c_in: FastDivisor,
    c_out: FastDivisor,
    kernel: FastDivisor,
    pub rows: u32,
    pub depth: u32,
    stride: i32,
    pad: i32,
}

impl Geometry {
    /// For an output of these images, rows and columns.
    pub fn new(p: &Conv2dParams, y: &Tensor) -> Geometry {
        let [c_in, c_out, kernel] = [p.c_in, p.c_out, p.kernel].map(|v| FastDivisor::new(v as u32));
        let rows = y.pixels();
        assert!(rows > 0 && rows < 1 << 31, "an output of {y:?}");
        Geometry {
            out_width: FastDivisor::new(y.w),
            out_height: FastDivisor::new(y.h),
            c_in,
            c_out,
            kernel,
            rows: rows as u32,
            depth: (p.weight_len() / p.c_out) as u32,
            stride: p.stride as i32,
            pad: p.pad as i32,
        }
    }
}

/// Twin of `struct PlainOutput`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Output {
    pub out: Tensor,
    pub residual: Tensor,
    pub partials: u64,
    pub bias: u64,
    pub scale: u64,
    pub shift: u64,
    pub activation: u32,
    pub vector: u32,
}

impl Output {
    pub fn new(out: Tensor, epilogue: &Epilogue, precision: Precision) -> Output {
        let bytes = if matches!(epilogue, Epilogue::Bias { .. }) { 4 } else { precision.bytes() as u64 };
        let pitches =
            [u64::from(out.c), out.image_pitch, u64::from(out.row_pitch), u64::from(out.pixel_pitch)];
        let vector = out.data.is_multiple_of(4 * bytes) && pitches.iter().all(|p| p.is_multiple_of(4));
        let mut output = Output {
            out,
            residual: Tensor::none(),
            partials: 0,
            bias: 0,
            scale: 0,
            shift: 0,
            activation: 0,
            vector: u32::from(vector),
        };
        match *epilogue {
            Epilogue::Raw => {}
            Epilogue::Stats { partials } => output.partials = partials,
            Epilogue::Bias { bias } => output.bias = bias,
            Epilogue::Apply { scale, shift, activation, residual } => {
                (output.scale, output.shift, output.activation) = (scale, shift, activation as u32);
                output.residual = residual.unwrap_or_else(Tensor::none);
            }
        }
        output
    }
}

/// Number of an epilogue among the forward kernels, and its name.
pub(super) const EPILOGUES: [&str; 4] = ["raw", "stats", "bias", "apply"];

pub(super) fn number(epilogue: &Epilogue) -> usize {
    match epilogue {
        Epilogue::Raw => 0,
        Epilogue::Stats { .. } => 1,
        Epilogue::Bias { .. } => 2,
        Epilogue::Apply { .. } => 3,
    }
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct ForwardArgs {
    x: Tensor,
    conv: Geometry,
    output: Output,
    weight: u64,
    vector_x: u32,
    vector_weight: u32,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct DataArgs {
    dy: Tensor,
    dx: Tensor,
    conv: Geometry,
    weight: u64,
    vector_dy: u32,
    vector_weight: u32,
    accumulate: u32,
    reserved: u32,
}

/// Twin of `struct PlainWeightArgs`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct WeightArgs {
    pub x: Tensor,
    pub dy: Tensor,
    pub conv: Geometry,
    pub sums: u64,
    pub pixels_per_split: u32,
    pub direct: u32,
    pub vector_x: u32,
    pub vector_dy: u32,
}

/// Twin of `struct PlainSumArgs`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct SumArgs {
    pub sums: u64,
    pub gradient: u64,
    pub splits: u32,
    pub count: u32,
}

/// Whether `channels` of a view can be read eight at a time.
fn vector(t: &Tensor, channels: usize, precision: Precision) -> u32 {
    u32::from(channels.is_multiple_of(8) && t.is_aligned(precision))
}

/// The kernels for one storage type.
pub(super) struct PlainKernels {
    precision: Precision,
    forward: [Kernel; 4],
    backward_data: Kernel,
    backward_weight: Kernel,
    add_splits: Kernel,
}

impl PlainKernels {
    pub fn load(device: &Arc<Device>, precision: Precision) -> Result<PlainKernels, DeviceError> {
        let module = device.module("conv2d")?;
        let kernel = |name: &str| module.kernel(&format!("conv2d_{name}_{}", precision.suffix()));
        let forward = |i: usize| kernel(&format!("forward_{}", EPILOGUES[i]));
        Ok(PlainKernels {
            precision,
            forward: [forward(0)?, forward(1)?, forward(2)?, forward(3)?],
            backward_data: kernel("backward_data")?,
            backward_weight: kernel("backward_weight")?,
            add_splits: module.kernel("conv2d_add_splits")?,
        })
    }

    /// # Safety
    /// As `Conv2dKernels::forward`.
    #[allow(clippy::too_many_arguments)] // what a convolution has
    pub unsafe fn forward(
        &self,
        stream: &Stream,
        p: &Conv2dParams,
        x: Tensor,
        weight: u64,
        out: Tensor,
        epilogue: Epilogue,
        _workspace: u64,
    ) -> Result<(), DeviceError> {
        assert_eq!((x.c as usize, out.c as usize), (p.c_in, p.c_out), "channels");
        assert!(x.pad as usize >= p.pad, "the border of {x:?}");
        let conv = Geometry::new(p, &out);
        let args = ForwardArgs {
            x,
            conv,
            output: Output::new(out, &epilogue, self.precision),
            weight,
            vector_x: vector(&x, p.c_in, self.precision),
            vector_weight: self.vector_weight(p, weight),
        };
        let grid = [conv.rows.div_ceil(TILE), out.c.div_ceil(TILE), 1];
        let launch = Launch { grid, threads: THREADS, shared_bytes: 0 };
        // SAFETY: by contract; the border keeps every tap inside the allocation.
        unsafe { stream.launch(&self.forward[number(&epilogue)], launch, &args) }
    }

    /// Rows of the weight are `c_out` long: whether each begins at a multiple of 16 bytes.
    fn vector_weight(&self, p: &Conv2dParams, weight: u64) -> u32 {
        u32::from(p.c_out.is_multiple_of(8) && weight.is_multiple_of(16))
    }

    /// # Safety
    /// As `Conv2dKernels::backward_data`.
    #[allow(clippy::too_many_arguments)] // what a convolution has
    pub unsafe fn backward_data(
        &self,
        stream: &Stream,
        p: &Conv2dParams,
        dy: Tensor,
        weight: u64,
        dx: Tensor,
        accumulate: bool,
        _workspace: u64,
    ) -> Result<(), DeviceError> {
        assert_eq!((dx.c as usize, dy.c as usize), (p.c_in, p.c_out), "channels");
        assert!(dy.pad as usize >= p.gradient_border(), "the border of {dy:?}");
        let stride = p.stride as u32;
        // Pixels of the largest class.
        let rows = u64::from(dx.n) * u64::from(dx.h.div_ceil(stride)) * u64::from(dx.w.div_ceil(stride));
        assert!(rows > 0 && rows < 1 << 31, "an input of {dx:?}");
        let args = DataArgs {
            dy,
            dx,
            conv: Geometry::new(p, &dy),
            weight,
            vector_dy: vector(&dy, p.c_out, self.precision),
            vector_weight: self.vector_weight(p, weight),
            accumulate: u32::from(accumulate),
            reserved: 0,
        };
        let grid = [(rows as u32).div_ceil(TILE), dx.c.div_ceil(TILE), stride * stride];
        // SAFETY: by contract; the border keeps every tap inside the allocation.
        unsafe {
            stream.launch(&self.backward_data, Launch { grid, threads: THREADS, shared_bytes: 0 }, &args)
        }
    }

    /// # Safety
    /// As `Conv2dKernels::backward_weight`.
    pub unsafe fn backward_weight(
        &self,
        stream: &Stream,
        p: &Conv2dParams,
        x: Tensor,
        dy: Tensor,
        dw: u64,
        workspace: u64,
    ) -> Result<(), DeviceError> {
        assert_eq!((x.c as usize, dy.c as usize), (p.c_in, p.c_out), "channels");
        assert!(x.pad as usize >= p.pad, "the border of {x:?}");
        let vectors = [vector(&x, p.c_in, self.precision), vector(&dy, p.c_out, self.precision)];
        let kernels = [&self.backward_weight, &self.add_splits];
        // SAFETY: by contract; the border keeps every tap inside the allocation.
        unsafe { launch_weight(stream, kernels, p, [x, dy], vectors, dw, workspace) }
    }
}

/// Launches a weight gradient in its splits and adds them to `dw`.
///
/// # Safety
/// As `Conv2dKernels::backward_weight`.
pub(super) unsafe fn launch_weight(
    stream: &Stream,
    [product, add_splits]: [&Kernel; 2],
    p: &Conv2dParams,
    [x, dy]: [Tensor; 2],
    [vector_x, vector_dy]: [u32; 2],
    dw: u64,
    workspace: u64,
) -> Result<(), DeviceError> {
    let conv = Geometry::new(p, &dy);
    let split = Split::new(p, conv.rows);
    let direct = split.splits == 1;
    let args = WeightArgs {
        x,
        dy,
        conv,
        sums: if direct { dw } else { workspace },
        pixels_per_split: split.pixels,
        direct: u32::from(direct),
        vector_x,
        vector_dy,
    };
    let grid = [conv.depth.div_ceil(TILE), dy.c.div_ceil(TILE), split.splits];
    // SAFETY: the caller's promise; the workspace holds one weight for each split.
    unsafe { stream.launch(product, Launch { grid, threads: THREADS, shared_bytes: 0 }, &args)? };
    if direct {
        return Ok(());
    }
    let count = p.weight_len() as u32;
    let args = SumArgs { sums: workspace, gradient: dw, splits: split.splits, count };
    // SAFETY: as above.
    let launch = Launch::row(count.div_ceil(32), 256);
    unsafe { stream.launch(add_splits, launch, &args) }
}
