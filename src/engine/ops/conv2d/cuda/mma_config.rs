//! How a convolution is cut for the tensor cores: the choices, a model of their cost, and which one is taken.
//!
//! A choice fixes the order of every sum: the same choice gives the same bits. [`MmaConfig::choose`] takes the
//! cheapest by the model, which depends on the shape and the chip alone; [`MmaConfig::candidates`] gives the best in
//! order, of which `tuner` times a few. What it found stands in a `Tuning`, which a run keeps.
//!
//! The model, in cycles of one multiprocessor: a tile takes as long as the slowest of its products (1024 a cycle),
//! its reads through L2 (24 bytes a cycle) and its fragments from shared memory (128 bytes a cycle). As many blocks
//! as fit share a multiprocessor, so a wave of them takes that many tiles' time and one latency, but no less than one
//! block takes by itself, whose steps wait for memory; splitting a sum pays for writing and reading the parts.

use serde::{Deserialize, Serialize};

use crate::engine::device::cuda::Chip;
use crate::engine::ops::conv2d::Conv2dParams;

use super::mma_config_weight::WeightProduct;
use super::{Shape, wgmma};

/// Which sum a configuration is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Pass {
    /// The output.
    Forward,
    /// The gradient of the input.
    BackwardData,
    /// The gradient of the weight.
    BackwardWeight,
}

/// How a block finds its pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Method {
    /// Row by row, each tap by itself (for the weight gradient: one tap a block).
    Gather,
    /// Tiles of `tile_h` by `tile_w` output pixels whose input is loaded once for all nine taps.
    Patch {
        /// Rows of a tile.
        tile_h: u32,
        /// Columns of a tile.
        tile_w: u32,
    },
    /// As `Patch`, with tiles of consecutive pixels (n, y, x).
    Run,
    /// Hopper: boxes of `tile_h` by `tile_w` pixels, each tap by itself, multiplied by warpgroups.
    Wgmma {
        /// Rows of a tile.
        tile_h: u32,
        /// Columns of a tile.
        tile_w: u32,
    },
    /// As `Wgmma`, with tiles of consecutive pixels (n, y, x).
    WgmmaRun,
}

/// A way to cut one pass of one convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MmaConfig {
    /// How pixels are found.
    pub method: Method,
    /// Pixels of a tile; for the weight gradient, input channels.
    pub rows: u32,
    /// Output channels of a tile (input channels, in the data gradient).
    pub columns: u32,
    /// Blocks that share one sum.
    pub splits: u32,
}

/// Tiles of the gathered products; (64, 64) has four warps of 32x32.
pub(super) const GATHER_TILES: [(u32, u32); 9] =
    [(128, 16), (128, 32), (128, 48), (128, 64), (128, 80), (128, 96), (128, 128), (64, 64), (256, 128)];
/// Columns of the tiles of patches; each exists with 128 and 256 rows.
pub(super) const PATCH_COLUMNS: [u32; 7] = [16, 32, 48, 64, 80, 96, 128];
/// Tiles whose sums may be split: counters that are kept.
pub(super) const COUNTERS: u32 = 1 << 16;
/// Most floats of partial sums of one pass.
pub(super) const WORKSPACE_MAX: u64 = 1 << 25;

pub(super) const PRODUCTS_PER_CYCLE: f64 = 1024.0;
pub(super) const L2_BYTES_PER_CYCLE: f64 = 24.0;
pub(super) const SHARED_BYTES_PER_CYCLE: f64 = 128.0;
/// Starting and ending a block.
pub(super) const LATENCY_CYCLES: f64 = 1500.0;
/// From asking for a step's numbers to having them; a ring keeps several steps under way.
pub(super) const LOAD_CYCLES: f64 = 900.0;

/// One matrix product of the forward pass or the data gradient: what both share.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub pass: Pass,
    pub n: u32,
    /// Grid of the rows: the output; in the data gradient the pixels of one class.
    pub h: u32,
    pub w: u32,
    pub kernel: u32,
    pub stride: u32,
    /// Channels summed over, and channels of the result.
    pub channels: u32,
    pub columns: u32,
    /// Padded rows of the map that is read.
    pub padded_h: u32,
}

impl Product {
    pub fn new(pass: Pass, p: &Conv2dParams, s: &Shape) -> Product {
        let stride = p.stride as u32;
        let common = |h: usize, w: usize| (s.n as u32, h as u32, w as u32);
        let (kernel, c_in, c_out) = (p.kernel as u32, p.c_in as u32, p.c_out as u32);
        if pass == Pass::BackwardData {
            let (n, h, w) = common(s.h_in.div_ceil(p.stride), s.w_in.div_ceil(p.stride));
            let padded_h = (s.h_out + 2 * s.dy_pad) as u32;
            Product { pass, n, h, w, kernel, stride, channels: c_out, columns: c_in, padded_h }
        } else {
            let (n, h, w) = common(s.h_out, s.w_out);
            let padded_h = (s.h_in + 2 * s.x_pad) as u32;
            Product { pass, n, h, w, kernel, stride, channels: c_in, columns: c_out, padded_h }
        }
    }

    pub fn rows(&self) -> u32 {
        self.n * self.h * self.w
    }

    /// Classes of pixels with taps of their own.
    pub fn classes(&self) -> u32 {
        if self.pass == Pass::BackwardData { self.stride * self.stride } else { 1 }
    }

    /// Most taps of a class.
    pub fn taps(&self) -> u32 {
        let side =
            if self.pass == Pass::BackwardData { self.kernel.div_ceil(self.stride) } else { self.kernel };
        side * side
    }

    /// Steps of 32 numbers (gathered) of the class with the most taps.
    pub fn gather_steps(&self) -> u32 {
        (self.taps() * self.channels).div_ceil(32)
    }

    /// Chunks of 16 channels (patches).
    pub fn chunks(&self) -> u32 {
        self.channels.div_ceil(16)
    }

    /// Tiles of rows.
    pub fn row_tiles(&self, config: &MmaConfig) -> u32 {
        match config.method {
            Method::Patch { tile_h, tile_w } | Method::Wgmma { tile_h, tile_w } => {
                self.n * self.h.div_ceil(tile_h) * self.w.div_ceil(tile_w)
            }
            _ => self.rows().div_ceil(config.rows),
        }
    }

    /// Height and width of the patch under a tile.
    pub fn patch(&self, config: &MmaConfig) -> (u32, u32) {
        match config.method {
            Method::Patch { tile_h, tile_w } => {
                ((tile_h - 1) * self.stride + 3, (tile_w - 1) * self.stride + 3)
            }
            _ => {
                // Rows that a run may touch, and the borders between the images it may cross.
                let rows = ((config.rows + self.w - 2) / self.w + 1).min(self.n * self.h);
                let crossings = ((rows + self.h - 2) / self.h).min(self.n - 1);
                (rows - 1 + crossings * (self.padded_h - self.h) + 3, (self.w - 1) + 3)
            }
        }
    }

    /// A warp computes 32x32, 32 times all columns, or 64 times half of them.
    fn warps(config: &MmaConfig) -> u32 {
        if config.rows == 64 { 4 } else { config.rows / 32 }
    }

    pub fn threads(config: &MmaConfig) -> u32 {
        if config.uses_wgmma() {
            return wgmma::THREADS;
        }
        Product::warps(config) * 32
    }

    /// Dynamic shared memory of a block.
    pub fn shared_bytes(&self, config: &MmaConfig) -> u32 {
        if config.uses_wgmma() {
            return wgmma::shared_bytes(config);
        }
        let (rows, columns) = (config.rows, config.columns);
        let backward = self.pass == Pass::BackwardData;
        let finish = rows * (columns + 8) * 2;
        let ring = if config.method == Method::Gather {
            let weights = if backward { columns * 64 } else { 32 * (columns * 2 + 16) };
            (if rows == 256 { 3 } else { 4 }) * (rows * 64 + weights)
        } else {
            let weights = if backward { columns * 112 } else { 48 * (columns * 2 + 16) };
            let (h, w) = self.patch(config);
            3 * weights + self.chunks().min(2) * (h * w * 48).next_multiple_of(128)
        };
        ring.max(finish)
    }

    /// Cycles of the whole pass by the model; `None` where the configuration does not fit.
    fn cost(&self, config: &MmaConfig, chip: &Chip) -> Option<f64> {
        let (rows, columns) = (f64::from(config.rows), f64::from(config.columns));
        let accumulators = config.rows * config.columns / Product::threads(config);
        let resident = resident(
            chip,
            Product::threads(config),
            if config.uses_wgmma() { wgmma::registers(config) } else { registers(accumulators) },
            self.shared_bytes(config) + config.rows * 12,
        )?;
        let tiles = u64::from(self.row_tiles(config)) * u64::from(self.columns.div_ceil(config.columns));
        let splits = f64::from(config.splits);
        // Over all classes together, the taps of a stride-2 data gradient are those of the kernel.
        let taps = f64::from(self.kernel * self.kernel) / f64::from(self.classes());
        let channels = f64::from(self.channels);
        let (inner, input_bytes) = if config.uses_wgmma() {
            let inner = f64::from(self.wgmma_steps() * 64);
            (inner, rows * inner * 2.0)
        } else if config.method == Method::Gather {
            let inner = (taps * channels / 32.0).ceil() * 32.0;
            (inner, rows * taps * channels * 2.0)
        } else {
            let (h, w) = self.patch(config);
            let padded = f64::from(self.chunks() * 16);
            (9.0 * padded, f64::from(h * w) * padded * 2.0)
        };
        let warp = if config.columns > 80 { (64.0, columns / 2.0) } else { (32.0, columns) };
        let warp = if config.rows == 64 { (32.0, 32.0) } else { warp };
        let fragments = (warp.0 + warp.1) * 2.0 * f64::from(Product::warps(config));
        // Warpgroups read shared memory while they multiply, and the copy engine needs no threads for its addresses.
        let (products_per_cycle, l2_per_cycle, fragments) = if config.uses_wgmma() {
            (2.0 * PRODUCTS_PER_CYCLE, wgmma::L2_BYTES_PER_CYCLE, 0.0)
        } else {
            (PRODUCTS_PER_CYCLE, L2_BYTES_PER_CYCLE, fragments)
        };
        let products = rows * columns * inner / products_per_cycle;
        let l2 = (input_bytes + inner * columns * 2.0 + rows * columns * 2.0) / l2_per_cycle;
        let shared = fragments * inner / SHARED_BYTES_PER_CYCLE;
        let mut block = products.max(l2).max(shared) / splits;
        let steps = if config.method == Method::Gather { inner / 32.0 / 3.0 } else { inner / 48.0 / 2.0 };
        let alone = steps / splits * LOAD_CYCLES;
        if config.splits > 1 {
            // Writes its part; one block in `splits` reads them all.
            block += rows * columns * 4.0 * 2.0 / L2_BYTES_PER_CYCLE;
        }
        let blocks = tiles as f64 * splits * f64::from(self.classes());
        Some(
            waves(blocks, block, alone, resident, chip)
                + if config.splits > 1 { LATENCY_CYCLES } else { 0.0 },
        )
    }

    /// All configurations that make sense, cheapest first.
    fn candidates(&self, chip: &Chip, include_wgmma: bool) -> Vec<MmaConfig> {
        let mut found = Vec::new();
        let widest = self.columns.next_multiple_of(16).max(16);
        let mut add = |method: Method, rows: u32, columns: u32, depth: u32| {
            if columns > widest && columns > 64 {
                return;
            }
            for splits in [1u32, 2, 3, 4, 6, 8, 12, 16] {
                // Every split has work, and none is left with nothing to do.
                let splits = depth.div_ceil(depth.div_ceil(splits));
                let config = MmaConfig { method, rows, columns, splits };
                let tiles = self.row_tiles(&config) * self.columns.div_ceil(columns) * self.classes();
                let words = u64::from(tiles) * u64::from(splits * rows * columns);
                if splits > 1
                    && (tiles > COUNTERS || tiles > 2 * chip.multiprocessors || words > WORKSPACE_MAX)
                {
                    continue;
                }
                if let Some(cost) = self.cost(&config, chip)
                    && !found.iter().any(|(_, c)| *c == config)
                {
                    found.push((cost, config));
                }
            }
        };
        for (rows, columns) in GATHER_TILES {
            add(Method::Gather, rows, columns, self.gather_steps().div_ceil(4));
        }
        let stride_fits = self.pass == Pass::Forward || self.stride == 1;
        if include_wgmma && stride_fits && self.stride <= wgmma::STRIDE_MAX {
            for (rows, columns) in wgmma::TILES {
                add(Method::WgmmaRun, rows, columns, self.wgmma_steps());
                if let Some((tile_h, tile_w)) = self.tile(rows)
                    && self.stride == 1
                {
                    add(Method::Wgmma { tile_h, tile_w }, rows, columns, self.wgmma_steps());
                }
            }
        }
        if self.kernel == 3 && stride_fits {
            for columns in PATCH_COLUMNS {
                for rows in [128, 256] {
                    if let Some((tile_h, tile_w)) = self.tile(rows) {
                        add(Method::Patch { tile_h, tile_w }, rows, columns, self.chunks());
                    }
                    if self.stride == 1 {
                        add(Method::Run, rows, columns, self.chunks());
                    }
                }
            }
        }
        sorted(found)
    }

    /// The tile of at most `rows` pixels that divides the map exactly (statistics count on full tiles), has the most
    /// pixels, and of those the smallest patch.
    pub fn tile(&self, rows: u32) -> Option<(u32, u32)> {
        let mut best: Option<((u32, u32), (u32, u32))> = None;
        for tile_w in (1..=self.w.min(rows)).filter(|w| self.w.is_multiple_of(*w)) {
            let Some(tile_h) = (1..=self.h.min(rows / tile_w)).rev().find(|h| self.h.is_multiple_of(*h))
            else {
                continue;
            };
            let patch = ((tile_h - 1) * self.stride + 3) * ((tile_w - 1) * self.stride + 3);
            let key = (tile_h * tile_w, u32::MAX - patch);
            if best.is_none_or(|(b, _)| key > b) {
                best = Some((key, (tile_h, tile_w)));
            }
        }
        best.map(|(_, tile)| tile)
    }
}

/// Registers of a thread by its accumulators, as the compiler reports them, rounded up.
fn registers(accumulators: u32) -> u32 {
    match accumulators {
        0..=16 => 56,
        17..=32 => 88,
        33..=80 => 128,
        81..=96 => 184,
        _ => 255,
    }
}

/// Blocks that one multiprocessor holds at a time; `None` where not even one fits.
pub(super) fn resident(chip: &Chip, threads: u32, registers: u32, shared_bytes: u32) -> Option<u32> {
    if shared_bytes > chip.shared_bytes_max {
        return None;
    }
    // 1 KiB of shared memory belongs to the system for each block.
    let shared = (chip.shared_bytes_max + 1024) / (shared_bytes + 1024);
    Some(shared.min(65536 / (registers.next_multiple_of(8) * threads)).clamp(1, 1536 / threads))
}

/// `block` is what a block costs a busy multiprocessor, `alone` what it takes at least.
pub(super) fn waves(blocks: f64, block: f64, alone: f64, resident: u32, chip: &Chip) -> f64 {
    let places = f64::from(chip.multiprocessors);
    // Full waves of `resident` blocks, then the rest spread over the multiprocessors.
    let full = (blocks / (places * f64::from(resident))).floor();
    let rest = blocks - full * places * f64::from(resident);
    let last = (rest / places).ceil();
    let wave = |count: f64| (block * count).max(alone) + LATENCY_CYCLES;
    full * wave(f64::from(resident)) + if last > 0.0 { wave(last) } else { 0.0 }
}

pub(super) fn sorted(mut found: Vec<(f64, MmaConfig)>) -> Vec<MmaConfig> {
    found.sort_by(|a, b| a.0.total_cmp(&b.0));
    found.into_iter().map(|(_, config)| config).collect()
}

impl MmaConfig {
    /// Every configuration of a pass that fits the chip, cheapest by the model first; with those of
    /// Hopper's warpgroups where `include_wgmma` and the chip has them.
    pub fn candidates(
        pass: Pass,
        p: &Conv2dParams,
        shape: &Shape,
        chip: &Chip,
        include_wgmma: bool,
    ) -> Vec<MmaConfig> {
        match pass {
            Pass::BackwardWeight => WeightProduct::new(p, shape).candidates(chip),
            _ => Product::new(pass, p, shape).candidates(chip, include_wgmma && chip.has_wgmma()),
        }
    }

    /// The cheapest configuration by the model.
    pub fn choose(pass: Pass, p: &Conv2dParams, shape: &Shape, chip: &Chip) -> MmaConfig {
        let found = MmaConfig::candidates(pass, p, shape, chip, wgmma::is_wanted(chip));
        found.into_iter().next().expect("a tile of 128x16 or 32x32 fits every chip with tensor cores")
    }

    /// Whether Hopper's warpgroups multiply.
    pub fn uses_wgmma(&self) -> bool {
        matches!(self.method, Method::Wgmma { .. } | Method::WgmmaRun)
    }

    /// Floats of partial sums that the pass needs.
    pub fn workspace_len(&self, pass: Pass, p: &Conv2dParams, shape: &Shape) -> usize {
        if self.splits == 1 {
            return 0;
        }
        if pass == Pass::BackwardWeight {
            return WeightProduct::new(p, shape).len() as usize * self.splits as usize;
        }
        let product = Product::new(pass, p, shape);
        let tiles = product.row_tiles(self) * product.columns.div_ceil(self.columns) * product.classes();
        tiles as usize * (self.splits * self.rows * self.columns) as usize
    }

    /// Tiles of rows of the forward pass and the pixels of each (the last may have fewer): one partial statistic each.
    pub fn stats_tiles(&self, p: &Conv2dParams, shape: &Shape) -> (usize, usize) {
        let tiles = Product::new(Pass::Forward, p, shape).row_tiles(self) as usize;
        match self.method {
            Method::Patch { tile_h, tile_w } | Method::Wgmma { tile_h, tile_w } => {
                (tiles, (tile_h * tile_w) as usize)
            }
            _ => (tiles, self.rows as usize),
        }
    }
}
