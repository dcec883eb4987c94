//! Convolution on the tensor cores: which kernels there are, their arguments, their launches.
//!
//! Two kinds of kernels make the output and the gradient of the input: `conv2d_mma_gather.cuh` (any kernel size) and
//! `conv2d_mma_patch.cuh` (3x3, input loaded once); `conv2d_mma_weight.cuh` makes the gradient of the weight.
//! Hopper has kernels of its own ([`super::wgmma`]).

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use super::mma_args::{
    GatherArgs, OutputArgs, PatchArgs, ReduceArgs, WeightArgs, assert_layout, border_start, pitches,
};
use super::mma_config::{COUNTERS, GATHER_TILES, Method, MmaConfig, PATCH_COLUMNS, Pass, Product};
use super::mma_config_weight::{WEIGHT_PATCH_TILES, WEIGHT_TAP_TILES, WeightProduct};
use super::wgmma::{self, WgmmaKernels};
use super::{Epilogue, Shape};
use crate::engine::activation::Activation;
use crate::engine::device::cuda::{
    Buffer, Device, DeviceError, FastDivisor, Kernel, Launch, Precision, Stream, Tensor,
};
use crate::engine::ops::conv2d::Conv2dParams;

type Tile = (&'static str, u32, u32);

/// The kernels of one precision.
pub struct MmaKernels {
    device: Arc<Device>,
    precision: Precision,
    kernels: HashMap<Tile, Kernel>,
    reduce: Kernel,
    counters: Buffer,
    /// Loaded when first used, or at once where the choice may fall on them.
    wgmma: OnceLock<WgmmaKernels>,
}

/// Files of the kernels of a precision; the order is that of [`MmaKernels::load`].
pub fn stems(precision: Precision) -> [&'static str; 5] {
    match precision {
        Precision::F16 => [
            "conv2d_mma_gather_forward_f16",
            "conv2d_mma_gather_backward_f16",
            "conv2d_mma_patch_forward_f16",
            "conv2d_mma_patch_backward_f16",
            "conv2d_mma_weight_f16",
        ],
        _ => [
            "conv2d_mma_gather_forward_bf16",
            "conv2d_mma_gather_backward_bf16",
            "conv2d_mma_patch_forward_bf16",
            "conv2d_mma_patch_backward_bf16",
            "conv2d_mma_weight_bf16",
        ],
    }
}

impl MmaKernels {
    /// Compiles or loads all kernels of a 16-bit precision.
    ///
    /// # Errors
    /// A kernel does not load, or there is no memory for the counters.
    pub fn load(device: &Arc<Device>, precision: Precision) -> Result<MmaKernels, DeviceError> {
        let patch_tiles: Vec<(u32, u32)> = PATCH_COLUMNS.iter().flat_map(|&c| [(128, c), (256, c)]).collect();
        type Family<'a> = (&'static str, usize, &'a [(u32, u32)]);
        let families: [Family; 6] = [
            ("gather_forward", 0, &GATHER_TILES),
            ("gather_backward", 1, &GATHER_TILES),
            ("patch_forward", 2, &patch_tiles),
            ("patch_backward", 3, &patch_tiles),
            ("weight_patch", 4, &WEIGHT_PATCH_TILES),
            ("weight_tap", 4, &WEIGHT_TAP_TILES),
        ];
        let stems = stems(precision);
        let suffix = precision.suffix();
        // Row tables and flags take up to 4 KiB of static shared memory.
        let shared = device.chip().shared_bytes_max.saturating_sub(4096);
        let mut kernels = HashMap::new();
        for (family, stem, tiles) in families {
            let module = device.module(stems[stem])?;
            for &(rows, columns) in tiles {
                let kernel = module.kernel(&format!("conv2d_{family}_{rows}x{columns}_{suffix}"))?;
                kernel.allow_shared(shared)?;
                kernels.insert((family, rows, columns), kernel);
            }
        }
        let reduce = device.module(stems[4])?.kernel(&format!("conv2d_weight_reduce_{suffix}"))?;
        let counters = device.allocate(COUNTERS as usize * 4)?;
        let stream = device.stream()?;
        // SAFETY: the buffer was just made; the stream is waited for.
        unsafe { stream.fill(counters.pointer(), 0, counters.bytes())? };
        stream.synchronize()?;
        let device = Arc::clone(device);
        let loaded = MmaKernels { device, precision, kernels, reduce, counters, wgmma: OnceLock::new() };
        if wgmma::is_wanted(loaded.device.chip()) {
            loaded.wgmma()?;
        }
        Ok(loaded)
    }

    fn wgmma(&self) -> Result<&WgmmaKernels, DeviceError> {
        if let Some(kernels) = self.wgmma.get() {
            return Ok(kernels);
        }
        let kernels = WgmmaKernels::load(&self.device, self.precision)?;
        Ok(self.wgmma.get_or_init(|| kernels))
    }

    fn kernel(&self, family: &'static str, config: &MmaConfig) -> &Kernel {
        let tile = (family, config.rows, config.columns);
        self.kernels.get(&tile).unwrap_or_else(|| panic!("there is no kernel {tile:?}"))
    }

    fn output(&self, out: &Tensor, columns: usize, config: &MmaConfig, workspace: u64) -> OutputArgs {
        let [image_pitch, row_pitch, pixel_pitch] = pitches(out);
        OutputArgs {
            data: out.data,
            columns: columns as u32,
            splits: config.splits,
            partial_tiles: workspace,
            counters: self.counters.pointer(),
            image_pitch,
            row_pitch,
            pixel_pitch,
            ..bytemuck::Zeroable::zeroed()
        }
    }

    /// The output.
    ///
    /// # Safety
    /// As [`super::Conv2dKernels::forward`]; `workspace` has [`MmaConfig::workspace_len`] floats.
    ///
    /// # Errors
    /// The launch is refused.
    #[allow(clippy::too_many_arguments)] // what a convolution has
    pub unsafe fn forward(
        &self,
        stream: &Stream,
        config: &MmaConfig,
        p: &Conv2dParams,
        x: Tensor,
        weight: u64,
        out: Tensor,
        epilogue: &Epilogue,
        workspace: u64,
    ) -> Result<(), DeviceError> {
        let mut output = self.output(&out, p.c_out, config, workspace);
        match epilogue {
            Epilogue::Raw => {}
            Epilogue::Stats { partials } => (output.kind, output.first) = (1, *partials),
            Epilogue::Bias { bias } => (output.kind, output.first) = (2, *bias),
            Epilogue::Apply { scale, shift, activation, residual } => {
                (output.kind, output.first, output.second) = (3, *scale, *shift);
                output.activation = match activation {
                    Activation::Identity => 0,
                    Activation::Silu => 1,
                    Activation::Relu => 2,
                };
                if let Some(residual) = residual {
                    output.residual = residual.data;
                    [output.residual_image_pitch, output.residual_row_pitch, output.residual_pixel_pitch] =
                        pitches(residual);
                }
            }
        }
        let product = Product::new(Pass::Forward, p, &Shape::of_tensors(&x, &out, self.precision));
        // SAFETY: the caller's promise.
        unsafe { self.correlate(stream, config, p, &product, x, weight, out, output) }
    }

    /// The gradient of the input.
    ///
    /// # Safety
    /// As [`super::Conv2dKernels::backward_data`]; `workspace` has [`MmaConfig::workspace_len`] floats.
    ///
    /// # Errors
    /// The launch is refused.
    #[allow(clippy::too_many_arguments)] // what a convolution has
    pub unsafe fn backward_data(
        &self,
        stream: &Stream,
        config: &MmaConfig,
        p: &Conv2dParams,
        dy: Tensor,
        weight: u64,
        dx: Tensor,
        accumulate: bool,
        workspace: u64,
    ) -> Result<(), DeviceError> {
        let output =
            OutputArgs { accumulate: u32::from(accumulate), ..self.output(&dx, p.c_in, config, workspace) };
        let product = Product::new(Pass::BackwardData, p, &Shape::of_tensors(&dx, &dy, self.precision));
        // SAFETY: the caller's promise.
        unsafe { self.correlate(stream, config, p, &product, dy, weight, dx, output) }
    }

    /// Launches a kernel of either kind and pass; `x` is what is read (dy, in the data gradient).
    #[allow(clippy::too_many_arguments)] // what a convolution has
    unsafe fn correlate(
        &self,
        stream: &Stream,
        config: &MmaConfig,
        p: &Conv2dParams,
        product: &Product,
        x: Tensor,
        weight: u64,
        out: Tensor,
        output: OutputArgs,
    ) -> Result<(), DeviceError> {
        assert_layout(&x);
        assert_layout(&out);
        let backward = product.pass == Pass::BackwardData;
        let border = if backward { p.gradient_border() } else { p.pad };
        assert!(x.pad as usize >= border, "a border of {} where {border} is needed", x.pad);
        if config.uses_wgmma() {
            // SAFETY: the caller's promise.
            return unsafe { self.wgmma()?.launch(stream, config, p, product, &x, weight, &out, output) };
        }
        let column_tiles = product.columns.div_ceil(config.columns);
        let launch = Launch {
            grid: [product.row_tiles(config) * column_tiles, config.splits, product.classes()],
            threads: Product::threads(config),
            shared_bytes: product.shared_bytes(config),
        };
        let [image_pitch, row_pitch, pixel_pitch] = pitches(&x);
        let (height, width) = (out.h, out.w);
        let column_tiles = FastDivisor::new(column_tiles);
        let (map_h, map_w) = (FastDivisor::new(product.h), FastDivisor::new(product.w));
        let channel_groups = product.channels / 8;
        let start = border_start(&x, self.precision);
        if config.method == Method::Gather {
            let args = GatherArgs {
                out: output,
                x: start,
                weight,
                map_h,
                map_w,
                column_tiles,
                image_pitch,
                row_pitch,
                pixel_pitch,
                border: x.pad,
                rows: product.rows(),
                height,
                width,
                kernel: product.kernel,
                stride: product.stride,
                pad: p.pad as u32,
                channel_groups,
                steps_per_split: product.gather_steps().div_ceil(config.splits),
            };
            let family = if backward { "gather_backward" } else { "gather_forward" };
            // SAFETY: rows read pixels of the map and of its border, which are at least `border` wide; rows written
            // are pixels of `out`; both lie in live memory by the caller's promise.
            return unsafe { stream.launch(self.kernel(family, config), launch, &args) };
        }
        let (patch_h, patch_w) = product.patch(config);
        let (tile_h, tile_w, run) = match config.method {
            Method::Patch { tile_h, tile_w } => (tile_h, tile_w, false),
            _ => (1, 1, true),
        };
        let args = PatchArgs {
            out: output,
            x: start,
            weight,
            map_h,
            map_w,
            tiles_y: FastDivisor::new(product.h.div_ceil(tile_h)),
            tiles_x: FastDivisor::new(product.w.div_ceil(tile_w)),
            tile_w: FastDivisor::new(tile_w),
            patch_w: FastDivisor::new(patch_w),
            column_tiles,
            row_pitch,
            pixel_pitch,
            padded_h: x.h + 2 * x.pad,
            padded_w: x.w + 2 * x.pad,
            images: x.n,
            first: if backward { x.pad + p.pad as u32 - 2 } else { x.pad - p.pad as u32 },
            rows: product.rows(),
            height,
            width,
            tile_h,
            stride: product.stride,
            run: u32::from(run),
            patch_pixels: patch_h * patch_w,
            channel_groups,
            chunks: product.chunks(),
            chunks_per_split: product.chunks().div_ceil(config.splits),
        };
        let family = if backward { "patch_backward" } else { "patch_forward" };
        // SAFETY: as above; pixels of the patch are clamped to the padded map.
        unsafe { stream.launch(self.kernel(family, config), launch, &args) }
    }

    /// Adds the gradient of the weight.
    ///
    /// # Safety
    /// As [`super::Conv2dKernels::backward_weight`]; `workspace` has [`MmaConfig::workspace_len`] floats.
    ///
    /// # Errors
    /// A launch is refused.
    #[allow(clippy::too_many_arguments)] // what a convolution has
    pub unsafe fn backward_weight(
        &self,
        stream: &Stream,
        config: &MmaConfig,
        p: &Conv2dParams,
        x: Tensor,
        dy: Tensor,
        dw: u64,
        workspace: u64,
    ) -> Result<(), DeviceError> {
        assert_layout(&x);
        assert_layout(&dy);
        assert!(x.pad as usize >= p.pad, "a border of {} where {} is needed", x.pad, p.pad);
        let product = WeightProduct::new(p, &Shape::of_tensors(&x, &dy, self.precision));
        let units = product.units(config);
        let (tile_h, tile_w) = match config.method {
            Method::Patch { tile_h, tile_w } => (tile_h, tile_w),
            _ => (1, 1),
        };
        let (patch_h, patch_w) = product.patch(tile_h, tile_w);
        let [_, row_pitch, pixel_pitch] = pitches(&x);
        let [dy_image_pitch, dy_row_pitch, dy_pixel_pitch] = pitches(&dy);
        let args = WeightArgs {
            x: border_start(&x, self.precision),
            dy: dy.data,
            out: if config.splits == 1 { dw } else { workspace },
            map_h: FastDivisor::new(product.h),
            map_w: FastDivisor::new(product.w),
            tiles_y: FastDivisor::new(product.h.div_ceil(tile_h)),
            tiles_x: FastDivisor::new(product.w.div_ceil(tile_w)),
            tile_w: FastDivisor::new(tile_w),
            patch_w: FastDivisor::new(patch_w),
            co_tiles: FastDivisor::new(product.c_out.div_ceil(config.columns)),
            ci_tiles: FastDivisor::new(product.c_in.div_ceil(config.rows)),
            row_pitch,
            pixel_pitch,
            padded_h: x.h + 2 * x.pad,
            padded_w: x.w + 2 * x.pad,
            dy_image_pitch,
            dy_row_pitch,
            dy_pixel_pitch,
            first: x.pad - p.pad as u32,
            height: dy.h,
            width: dy.w,
            tile_h,
            patch_pixels: patch_h * patch_w,
            kernel: product.kernel,
            stride: product.stride,
            c_in: product.c_in,
            c_out: product.c_out,
            units,
            units_per_split: units.div_ceil(config.splits),
            pixels: product.n * product.h * product.w,
            add: u32::from(config.splits == 1),
        };
        let launch = Launch {
            grid: [product.blocks(config), config.splits, 1],
            threads: WeightProduct::threads(config),
            shared_bytes: product.shared_bytes(config),
        };
        let family = if config.method == Method::Gather { "weight_tap" } else { "weight_patch" };
        // SAFETY: reads lie in the padded map of `x` and in `dy`; each split writes its own copy of the weight in the
        // workspace, or the only one adds to `dw`.
        unsafe { stream.launch(self.kernel(family, config), launch, &args)? };
        if config.splits == 1 {
            return Ok(());
        }
        let len = product.len() as u32;
        let lanes = config.splits.next_power_of_two().min(32);
        let args =
            ReduceArgs { partials: workspace, out: dw, len, splits: config.splits, lanes, reserved: 0 };
        let launch = Launch::row((len / 4).div_ceil(256 / lanes), 256);
        // SAFETY: the workspace was filled by the launch above, in stream order; `dw` has `len` floats.
        unsafe { stream.launch(&self.reduce, launch, &args) }
    }
}
