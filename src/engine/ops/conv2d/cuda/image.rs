//! The first convolution, from bytes: `kernels/conv2d_image.cu`, and `kernels/conv2d_image_mma.cu` on tensor cores.

use std::sync::Arc;

use super::plain::{EPILOGUES, Geometry, Output, Split, SumArgs, THREADS, TILE, launch_weight, number};
use super::{Conv2dKernels, Epilogue, StatsLayout};
use crate::engine::device::cuda::{
    Chip, Device, DeviceError, FastDivisor, Kernel, Launch, Precision, Stream, Tensor,
};
use crate::engine::ops::conv2d::Conv2dParams;
use crate::engine::ops::lanes::even;
use crate::engine::tensor::View;

/// Pixels of a run, forward and for the weight gradient; as `RUN` of the kernels.
const FORWARD_RUN: u32 = 512;
const WEIGHT_RUN: u32 = 256;
/// Pitch of the gradient in shared memory.
const WEIGHT_PITCH: u32 = 40;
/// Channels, and numbers of a window, of a block of the weight gradient.
const WEIGHT_SIDE: u32 = 32;
/// Blocks of the weight gradient, about: several for each multiprocessor of a large chip.
const WEIGHT_BLOCKS: u32 = 528;
/// Shared memory of a block at most; more goes to ordinary cores.
const SHARED_MAX: u32 = 64 << 10;

/// Twin of `struct ImageRun`.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct ImageRun {
    out_width: FastDivisor,
    out_height: FastDivisor,
    bytes: u64,
    h: u32,
    w: u32,
    kernel: u32,
    stride: u32,
    pad: u32,
    pixels: u32,
    row_numbers: u32,
    depth: u32,
    line: u32,
    gap: u32,
}

/// Numbers of a window, padded; and the extra numbers where a row of output pixels ends.
fn window_numbers(p: &Conv2dParams) -> (u32, u32, u32) {
    let row_numbers = (3 * p.kernel as u32).next_multiple_of(2);
    let gap = (3 * p.kernel.saturating_sub(p.stride) as u32).next_multiple_of(2);
    (row_numbers, (p.kernel as u32 * row_numbers).next_multiple_of(16), gap)
}

/// Numbers of a line in shared memory for runs of `run` pixels.
fn line_numbers(p: &Conv2dParams, w_out: u32, run: u32) -> u32 {
    let (_, _, gap) = window_numbers(p);
    run * 3 * p.stride as u32 + ((run - 1) / w_out + 2) * gap
}

/// Bytes of shared memory: (forward, weight gradient).
fn shared_bytes(p: &Conv2dParams, w_out: u32) -> (u32, u32) {
    let (_, depth, _) = window_numbers(p);
    let lines = |run: u32| 2 * p.kernel as u32 * line_numbers(p, w_out, run);
    let weights = 2 * (p.c_out as u32).next_multiple_of(16) * (depth + 8);
    let board = 4 * 8 * WEIGHT_SIDE * (WEIGHT_SIDE + 1);
    let gradient = 2 * WEIGHT_RUN * WEIGHT_PITCH + 4 * WEIGHT_RUN;
    (weights + 2 * depth + lines(FORWARD_RUN), (gradient + lines(WEIGHT_RUN)).max(board))
}

/// Whether the tensor cores compute this case.
fn uses_tensor_cores(p: &Conv2dParams, w_out: usize, precision: Precision, chip: &Chip) -> bool {
    let (forward, weight) = shared_bytes(p, w_out as u32);
    precision.bytes() == 2
        && chip.has_tensor_bf16()
        && p.stride.is_multiple_of(2)
        && forward.max(weight) <= SHARED_MAX.min(chip.shared_bytes_max)
}

/// How the forward pass of a convolution that reads bytes cuts its statistics; `y` is its output.
pub fn image_stats_layout(p: &Conv2dParams, y: &View, precision: Precision, chip: &Chip) -> StatsLayout {
    let tile = if uses_tensor_cores(p, y.w, precision, chip) { FORWARD_RUN } else { TILE } as usize;
    StatsLayout { partials: (y.n * y.h * y.w).div_ceil(tile), pixels_per_partial: tile }
}

/// Floats of the workspace of [`Conv2dKernels::backward_weight_image`]; `dy` is the gradient of the output.
pub fn image_workspace_len(p: &Conv2dParams, dy: &View, precision: Precision, chip: &Chip) -> usize {
    let pixels = (dy.n * dy.h * dy.w) as u32;
    if uses_tensor_cores(p, dy.w, precision, chip) {
        weight_grid(p, pixels)[0] as usize * p.weight_len()
    } else {
        Split::new(p, pixels).workspace_len(p)
    }
}

/// Blocks of the weight gradient on tensor cores: runs, channels, numbers of a window.
fn weight_grid(p: &Conv2dParams, pixels: u32) -> [u32; 3] {
    let (_, depth, _) = window_numbers(p);
    let (y, z) = ((p.c_out as u32).div_ceil(WEIGHT_SIDE), depth.div_ceil(WEIGHT_SIDE));
    [even(pixels.div_ceil(WEIGHT_RUN), WEIGHT_BLOCKS.div_ceil(y * z)), y, z]
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct ForwardArgs {
    conv: Geometry,
    output: Output,
    bytes: u64,
    weight: u64,
    h: i32,
    w: i32,
    vector_weight: u32,
    reserved: u32,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct MmaArgs {
    run: ImageRun,
    out: Tensor,
    residual: Tensor,
    weight: u64,
    partials: u64,
    scale: u64,
    shift: u64,
    activation: u32,
    vector: u32,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct MmaWeightArgs {
    run: ImageRun,
    dy: Tensor,
    sums: u64,
    runs: u32,
    vector: u32,
}

/// The kernels on tensor cores.
struct MmaKernels {
    /// By [`number`]; none with a bias.
    forward: [Option<Kernel>; 4],
    backward_weight: Kernel,
}

/// The kernels for one storage type.
pub(super) struct ImageKernels {
    forward: [Kernel; 4],
    backward_weight: Kernel,
    add_splits: Kernel,
    mma: Option<MmaKernels>,
}

/// Kernel files.
pub(super) fn stems(precision: Precision, chip: &Chip) -> &'static [&'static str] {
    if precision.bytes() == 2 && chip.has_tensor_bf16() {
        &["conv2d_image", "conv2d_image_mma"]
    } else {
        &["conv2d_image"]
    }
}

impl ImageKernels {
    pub fn load(device: &Arc<Device>, precision: Precision) -> Result<ImageKernels, DeviceError> {
        let module = device.module("conv2d_image")?;
        let kernel = |name: &str| module.kernel(&format!("conv2d_image_{name}_{}", precision.suffix()));
        let forward = |i: usize| kernel(&format!("forward_{}", EPILOGUES[i]));
        let with_mma = precision.bytes() == 2 && device.chip().has_tensor_bf16();
        Ok(ImageKernels {
            forward: [forward(0)?, forward(1)?, forward(2)?, forward(3)?],
            backward_weight: kernel("backward_weight")?,
            add_splits: module.kernel("conv2d_image_add_splits")?,
            mma: with_mma.then(|| MmaKernels::load(device, precision)).transpose()?,
        })
    }
}

impl MmaKernels {
    fn load(device: &Arc<Device>, precision: Precision) -> Result<MmaKernels, DeviceError> {
        let module = device.module("conv2d_image_mma")?;
        let shared = SHARED_MAX.min(device.chip().shared_bytes_max);
        let kernel = |name: &str| -> Result<Kernel, DeviceError> {
            let kernel = module.kernel(&format!("conv2d_image_mma_{name}_{}", precision.suffix()))?;
            kernel.allow_shared(shared)?;
            Ok(kernel)
        };
        let forward = |i: usize| kernel(&format!("forward_{}", EPILOGUES[i]));
        Ok(MmaKernels {
            forward: [Some(forward(0)?), Some(forward(1)?), None, Some(forward(3)?)],
            backward_weight: kernel("backward_weight")?,
        })
    }
}

/// The run of an output or its gradient `y` on images.
fn run(p: &Conv2dParams, image: &Tensor, y: &Tensor, pixels_per_run: u32) -> ImageRun {
    let (row_numbers, depth, gap) = window_numbers(p);
    let pixels = y.pixels();
    assert!(pixels > 0 && pixels < 1 << 31, "an output of {y:?}");
    ImageRun {
        out_width: FastDivisor::new(y.w),
        out_height: FastDivisor::new(y.h),
        bytes: image.data,
        h: image.h,
        w: image.w,
        kernel: p.kernel as u32,
        stride: p.stride as u32,
        pad: p.pad as u32,
        pixels: pixels as u32,
        row_numbers,
        depth,
        line: line_numbers(p, y.w, pixels_per_run),
        gap,
    }
}

fn check(p: &Conv2dParams, image: &Tensor, y: &Tensor) {
    assert_eq!((p.c_in, image.c, y.c as usize), (3, 3, p.c_out), "channels");
    let dense = image.pad == 0 && image.pixel_pitch == 3 && image.row_pitch == 3 * image.w;
    assert!(dense && image.n == y.n, "images are dense: {image:?}");
}

impl Conv2dKernels {
    /// `out = epilogue(image / 255 * weight)`, with zeros outside the image.
    ///
    /// `image`: bytes, dense `[n, h, w, 3]`; `out` as in [`Conv2dKernels::forward`]; `weight`: the `f32` masters,
    /// `[kernel][kernel][3][c_out]`. Partial statistics are cut as [`image_stats_layout`] says.
    ///
    /// # Safety
    /// All addresses are those of live device memory of the sizes said; `out` and partials overlap nothing else; other
    /// work on them is ordered with `stream`.
    ///
    /// # Errors
    /// The launch is refused.
    pub unsafe fn forward_image(
        &self,
        stream: &Stream,
        p: &Conv2dParams,
        image: Tensor,
        weight: u64,
        out: Tensor,
        epilogue: Epilogue,
    ) -> Result<(), DeviceError> {
        check(p, &image, &out);
        let (k, precision) = (&self.image, self.precision);
        let output = Output::new(out, &epilogue, precision);
        let chosen = uses_tensor_cores(p, out.w as usize, precision, self.device.chip());
        let mma = k.mma.as_ref().filter(|_| chosen).and_then(|mma| mma.forward[number(&epilogue)].as_ref());
        if let Some(kernel) = mma {
            let Output { residual, partials, scale, shift, activation, vector, .. } = output;
            let run = run(p, &image, &out, FORWARD_RUN);
            let args = MmaArgs { run, out, residual, weight, partials, scale, shift, activation, vector };
            let grid = [run.pixels.div_ceil(FORWARD_RUN), 1, 1];
            let launch = Launch { grid, threads: 256, shared_bytes: shared_bytes(p, out.w).0 };
            // SAFETY: by contract.
            return unsafe { stream.launch(kernel, launch, &args) };
        }
        let conv = Geometry::new(p, &out);
        let args = ForwardArgs {
            conv,
            output,
            bytes: image.data,
            weight,
            h: image.h as i32,
            w: image.w as i32,
            vector_weight: u32::from(p.c_out.is_multiple_of(8) && weight.is_multiple_of(16)),
            reserved: 0,
        };
        let grid = [conv.rows.div_ceil(TILE), out.c.div_ceil(TILE), 1];
        let launch = Launch { grid, threads: THREADS, shared_bytes: 0 };
        // SAFETY: by contract.
        unsafe { stream.launch(&k.forward[number(&epilogue)], launch, &args) }
    }

    /// `dw +=` the gradient of the weight, `[kernel][kernel][3][c_out]` floats; `workspace`: [`image_workspace_len`].
    ///
    /// # Safety
    /// As for [`Conv2dKernels::forward_image`].
    ///
    /// # Errors
    /// A launch is refused.
    pub unsafe fn backward_weight_image(
        &self,
        stream: &Stream,
        p: &Conv2dParams,
        image: Tensor,
        dy: Tensor,
        dw: u64,
        workspace: u64,
    ) -> Result<(), DeviceError> {
        check(p, &image, &dy);
        let (k, precision) = (&self.image, self.precision);
        let vector = u32::from(p.c_out.is_multiple_of(8) && dy.is_aligned(precision));
        let chosen = uses_tensor_cores(p, dy.w as usize, precision, self.device.chip());
        let Some(mma) = k.mma.as_ref().filter(|_| chosen) else {
            let kernels = [&k.backward_weight, &k.add_splits];
            // SAFETY: by contract.
            return unsafe { launch_weight(stream, kernels, p, [image, dy], [0, vector], dw, workspace) };
        };
        let run = run(p, &image, &dy, WEIGHT_RUN);
        let runs = run.pixels.div_ceil(WEIGHT_RUN);
        let grid = weight_grid(p, run.pixels);
        let args = MmaWeightArgs { run, dy, sums: workspace, runs, vector };
        let launch = Launch { grid, threads: 256, shared_bytes: shared_bytes(p, dy.w).1 };
        let count = p.weight_len() as u32;
        let sum = SumArgs { sums: workspace, gradient: dw, splits: grid[0], count };
        // SAFETY: by contract; the workspace holds a weight for each block along x.
        unsafe {
            stream.launch(&mma.backward_weight, launch, &args)?;
            stream.launch(&k.add_splits, Launch::row(count.div_ceil(32), 256), &sum)
        }
    }
}
