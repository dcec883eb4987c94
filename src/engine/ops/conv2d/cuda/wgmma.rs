//! Convolution on Hopper's warpgroups (`conv2d_wgmma.cuh`): its kernels, their tensor maps and launches.
//!
//! Off until it has been measured on a chip: [`MmaConfig::choose`] considers it only where [`is_wanted`]; a tuner gets
//! it by `include_wgmma` of [`MmaConfig::candidates`].

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use super::mma_args::OutputArgs;
use super::mma_config::{Method, MmaConfig, Pass, Product};
use crate::engine::device::cuda::{
    Chip, Device, DeviceError, FastDivisor, Kernel, Launch, MappedTensor, PixelGrid, Precision, Stream,
    Tensor, TensorMap,
};
use crate::engine::ops::conv2d::Conv2dParams;

/// Pixels and columns of the tiles.
pub(super) const TILES: [(u32, u32); 6] =
    [(128, 64), (128, 128), (128, 192), (128, 256), (256, 64), (256, 128)];
/// Two groups of four warps that multiply, and one warp that copies.
pub(super) const THREADS: u32 = 288;
/// Longest step between pixels that a tensor map takes.
pub(super) const STRIDE_MAX: u32 = 8;
/// Bytes that the copy engine brings through L2 in a cycle, for the model: a guess until it is measured.
pub(super) const L2_BYTES_PER_CYCLE: f64 = 40.0;
/// Channels of a step.
const STEP: u32 = 64;

/// Environment: `1` lets the choice fall on these kernels.
const WANTED: &str = "BOXWRIGHT_WGMMA";

/// Whether these kernels are among those that are chosen from without a tuner.
pub(super) fn is_wanted(chip: &Chip) -> bool {
    static WANTED_BY_USER: OnceLock<bool> = OnceLock::new();
    chip.has_wgmma() && *WANTED_BY_USER.get_or_init(|| std::env::var_os(WANTED).is_some_and(|v| v == "1"))
}

/// Stages of a tile's ring: as many as let the small tiles share a multiprocessor.
fn stages(config: &MmaConfig) -> u32 {
    if (config.rows, config.columns) == (128, 128) { 3 } else { 4 }
}

/// Dynamic shared memory of a block; finishing a tile takes less.
pub(super) fn shared_bytes(config: &MmaConfig) -> u32 {
    stages(config) * (config.rows + config.columns) * STEP * 2
}

/// Registers of a thread, by the blocks that the kernels promise to share a multiprocessor.
pub(super) fn registers(config: &MmaConfig) -> u32 {
    if config.rows == 128 && config.columns <= 128 { 96 } else { 168 }
}

impl Product {
    /// Steps of one tap and 64 channels.
    pub fn wgmma_steps(&self) -> u32 {
        self.taps() * self.channels.div_ceil(STEP)
    }
}

/// Twin of `struct ConvWgmmaArgs`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct WgmmaArgs {
    x: TensorMap,
    weight: TensorMap,
    out: OutputArgs,
    map_h: FastDivisor,
    map_w: FastDivisor,
    tiles_y: FastDivisor,
    tiles_x: FastDivisor,
    tile_w: FastDivisor,
    column_tiles: FastDivisor,
    rows: u32,
    height: u32,
    width: u32,
    tile_h: u32,
    stride: u32,
    run: u32,
    box_bytes: u32,
    first: i32,
    kernel: u32,
    steps: u32,
    steps_per_split: u32,
    reserved: [u32; 5],
}

/// File of the kernels of a precision.
pub(super) fn stem(precision: Precision) -> &'static str {
    if precision == Precision::F16 { "conv2d_wgmma_f16" } else { "conv2d_wgmma_bf16" }
}

/// The kernels of one 16-bit precision, by pass (backward or not), rows and columns.
pub(super) struct WgmmaKernels {
    device: Arc<Device>,
    precision: Precision,
    kernels: HashMap<(bool, u32, u32), Kernel>,
}

impl WgmmaKernels {
    /// Compiles or loads all kernels of a precision.
    ///
    /// # Errors
    /// A kernel does not load.
    pub fn load(device: &Arc<Device>, precision: Precision) -> Result<WgmmaKernels, DeviceError> {
        let module = device.module(stem(precision))?;
        let mut kernels = HashMap::new();
        for (rows, columns) in TILES {
            for (backward, pass) in [(false, "forward"), (true, "backward")] {
                let name = format!("conv2d_wgmma_{pass}_{rows}x{columns}_{}", precision.suffix());
                let kernel = module.kernel(&name)?;
                let config = MmaConfig { method: Method::WgmmaRun, rows, columns, splits: 1 };
                kernel.allow_shared(shared_bytes(&config))?;
                kernels.insert((backward, rows, columns), kernel);
            }
        }
        Ok(WgmmaKernels { device: Arc::clone(device), precision, kernels })
    }

    /// The map of what is read, with the bytes of one box of it.
    fn input_map(
        &self,
        config: &MmaConfig,
        product: &Product,
        x: &Tensor,
        first: i32,
    ) -> Result<(TensorMap, u32), DeviceError> {
        let sizes = [x.c, x.w, x.h, x.n].map(u64::from);
        let pitches = [u64::from(x.pixel_pitch), u64::from(x.row_pitch), x.image_pitch];
        let tensor =
            MappedTensor { precision: self.precision, data: x.data, sizes: &sizes, pitches: &pitches };
        if let Method::Wgmma { tile_h, tile_w } = config.method {
            let map = TensorMap::tiled(&self.device, &tensor, &[STEP, tile_w, tile_h, 1])?;
            return Ok((map, tile_h * tile_w * STEP * 2));
        }
        let grid = PixelGrid { first: [first; 2], count: [product.w, product.h], stride: product.stride };
        let map = TensorMap::pixels(&self.device, &tensor, &grid, STEP, config.rows)?;
        Ok((map, config.rows * STEP * 2))
    }

    /// Launches the kernel of a configuration; `x` is what is read (dy, in the data gradient).
    ///
    /// # Safety
    /// As [`super::Conv2dKernels::forward`] and [`super::Conv2dKernels::backward_data`].
    ///
    /// # Errors
    /// A tensor map or the launch is refused.
    #[allow(clippy::too_many_arguments)] // what a convolution has
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        config: &MmaConfig,
        p: &Conv2dParams,
        product: &Product,
        x: &Tensor,
        weight: u64,
        out: &Tensor,
        output: OutputArgs,
    ) -> Result<(), DeviceError> {
        let backward = product.pass == Pass::BackwardData;
        let first = if backward { p.pad as i32 - (p.kernel as i32 - 1) } else { -(p.pad as i32) };
        let (x_map, box_bytes) = self.input_map(config, product, x, first)?;
        let (c_in, c_out) = (p.c_in as u64, p.c_out as u64);
        let taps = (p.kernel * p.kernel) as u64;
        let weights = MappedTensor {
            precision: self.precision,
            data: weight,
            sizes: &[c_out, c_in, taps],
            pitches: &[c_out, c_in * c_out],
        };
        let weight_box = [STEP, if backward { config.columns } else { STEP }, 1];
        let (tile_h, tile_w, run) = match config.method {
            Method::Wgmma { tile_h, tile_w } => (tile_h, tile_w, false),
            _ => (1, 1, true),
        };
        let column_tiles = product.columns.div_ceil(config.columns);
        let args = WgmmaArgs {
            x: x_map,
            weight: TensorMap::tiled(&self.device, &weights, &weight_box)?,
            out: output,
            map_h: FastDivisor::new(product.h),
            map_w: FastDivisor::new(product.w),
            tiles_y: FastDivisor::new(product.h.div_ceil(tile_h)),
            tiles_x: FastDivisor::new(product.w.div_ceil(tile_w)),
            tile_w: FastDivisor::new(tile_w),
            column_tiles: FastDivisor::new(column_tiles),
            rows: product.rows(),
            height: out.h,
            width: out.w,
            tile_h,
            stride: product.stride,
            run: u32::from(run),
            box_bytes,
            first,
            kernel: product.kernel,
            steps: product.wgmma_steps(),
            steps_per_split: product.wgmma_steps().div_ceil(config.splits),
            reserved: [0; 5],
        };
        let launch = Launch {
            grid: [product.row_tiles(config) * column_tiles, config.splits, 1],
            threads: THREADS,
            shared_bytes: shared_bytes(config),
        };
        let tile = (backward, config.rows, config.columns);
        let kernel = self.kernels.get(&tile).unwrap_or_else(|| panic!("there is no kernel {tile:?}"));
        // SAFETY: the maps name the tensors of the caller's promise and nothing outside of them is read; rows
        // written are pixels of `out`.
        unsafe { stream.launch(kernel, launch, &args) }
    }
}
