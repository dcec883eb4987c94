//! How the weight gradient is cut for the tensor cores; the model of cost is that of `mma_config`.

use crate::engine::device::cuda::Chip;
use crate::engine::ops::conv2d::Conv2dParams;

use super::Shape;
use super::mma_config::{
    L2_BYTES_PER_CYCLE, LATENCY_CYCLES, LOAD_CYCLES, Method, MmaConfig, PRODUCTS_PER_CYCLE,
    SHARED_BYTES_PER_CYCLE, WORKSPACE_MAX, resident, sorted, waves,
};

/// Channels (in, out) of the weight gradient's tiles with all taps.
pub(super) const WEIGHT_PATCH_TILES: [(u32, u32); 6] =
    [(16, 16), (16, 32), (16, 48), (16, 80), (32, 32), (32, 64)];
/// The same with one tap.
pub(super) const WEIGHT_TAP_TILES: [(u32, u32); 4] = [(32, 32), (64, 64), (96, 96), (128, 128)];
/// Pixels of a tile of the weight gradient with all taps.
pub(super) const WEIGHT_PATCH_ROWS: u32 = 128;

/// The weight gradient.
#[derive(Clone, Copy, Debug)]
pub(super) struct WeightProduct {
    pub n: u32,
    pub h: u32,
    pub w: u32,
    pub kernel: u32,
    pub stride: u32,
    pub c_in: u32,
    pub c_out: u32,
}

impl WeightProduct {
    pub fn new(p: &Conv2dParams, s: &Shape) -> WeightProduct {
        WeightProduct {
            n: s.n as u32,
            h: s.h_out as u32,
            w: s.w_out as u32,
            kernel: p.kernel as u32,
            stride: p.stride as u32,
            c_in: p.c_in as u32,
            c_out: p.c_out as u32,
        }
    }

    pub fn len(&self) -> u64 {
        u64::from(self.kernel * self.kernel) * u64::from(self.c_in) * u64::from(self.c_out)
    }

    /// Pieces that the pixels are cut into: tiles, or steps.
    pub fn units(&self, config: &MmaConfig) -> u32 {
        match config.method {
            Method::Patch { tile_h, tile_w } => self.n * self.h.div_ceil(tile_h) * self.w.div_ceil(tile_w),
            _ => (self.n * self.h * self.w).div_ceil(WeightProduct::step(config)),
        }
    }

    /// Pixels of a step with one tap a block.
    pub fn step(config: &MmaConfig) -> u32 {
        if config.rows <= 64 { 64 } else { 32 }
    }

    /// Blocks that share no sum.
    pub fn blocks(&self, config: &MmaConfig) -> u32 {
        let taps = if config.method == Method::Gather { self.kernel * self.kernel } else { 1 };
        self.c_in.div_ceil(config.rows) * self.c_out.div_ceil(config.columns) * taps
    }

    pub fn threads(config: &MmaConfig) -> u32 {
        match (config.method, config.rows, config.columns) {
            (Method::Gather, _, _) | (_, 16, 16 | 32) => 128,
            _ => 192,
        }
    }

    pub fn patch(&self, tile_h: u32, tile_w: u32) -> (u32, u32) {
        ((tile_h - 1) * self.stride + 3, (tile_w - 1) * self.stride + 3)
    }

    pub fn shared_bytes(&self, config: &MmaConfig) -> u32 {
        let (x, y) = (config.rows * 2 + 16, config.columns * 2 + 16);
        if let Method::Patch { tile_h, tile_w } = config.method {
            let (h, w) = self.patch(tile_h, tile_w);
            let ring = 2 * ((h * w * x).next_multiple_of(128) + WEIGHT_PATCH_ROWS * y);
            // The warps that share a piece of the result meet here.
            return ring.max(9 * config.rows * config.columns * 4);
        }
        let step = WeightProduct::step(config);
        ((if step == 64 { 3 } else { 4 }) * step * (x + y)).max(config.rows * config.columns * 4)
    }

    /// Cycles by the model.
    fn cost(&self, config: &MmaConfig, chip: &Chip) -> Option<f64> {
        let (rows, columns) = (f64::from(config.rows), f64::from(config.columns));
        let registers = match config.method {
            Method::Gather => [72, 96, 132, 224][(config.rows / 32 - 1) as usize],
            _ => 152,
        };
        let resident =
            resident(chip, WeightProduct::threads(config), registers, self.shared_bytes(config) + 2048)?;
        let (pixels, taps, input_pixels) = match config.method {
            Method::Patch { tile_h, tile_w } => {
                let (h, w) = self.patch(tile_h, tile_w);
                ((tile_h * tile_w).next_multiple_of(16), 9.0, h * w)
            }
            _ => (WeightProduct::step(config), 1.0, WeightProduct::step(config)),
        };
        let pixels = f64::from(pixels);
        let products = pixels * rows * columns * taps / PRODUCTS_PER_CYCLE;
        let l2 = (f64::from(input_pixels) * rows + pixels * columns) * 2.0 / L2_BYTES_PER_CYCLE;
        // A warp reads its own fragments of both sides; those of x again for each tap.
        let shared = match config.method {
            Method::Gather => (rows + columns) * 2.0 * 2.0,
            _ => {
                (9.0 * rows
                    * if config.columns == 64 || (config.rows, config.columns) == (16, 32) {
                        2.0
                    } else {
                        1.0
                    }
                    + 3.0 * columns)
                    * 2.0
            }
        } * pixels
            / SHARED_BYTES_PER_CYCLE;
        let units = f64::from(self.units(config).div_ceil(config.splits));
        // Starting a step has a cost of its own: addresses, a barrier.
        let block = units * (products.max(l2).max(shared) + 100.0);
        let blocks = f64::from(self.blocks(config)) * f64::from(config.splits);
        let reduce = if config.splits == 1 {
            0.0
        } else {
            let bytes = self.len() as f64 * f64::from(config.splits) * 8.0;
            2.0 * LATENCY_CYCLES + bytes / (L2_BYTES_PER_CYCLE * f64::from(chip.multiprocessors))
        };
        let under_way = if config.method == Method::Gather { 3.0 } else { 1.0 };
        let alone = units * LOAD_CYCLES / under_way;
        Some(waves(blocks, block, alone, resident, chip) + reduce)
    }

    pub fn candidates(&self, chip: &Chip) -> Vec<MmaConfig> {
        let mut found = Vec::new();
        let mut add = |method: Method, (rows, columns): (u32, u32)| {
            let one = MmaConfig { method, rows, columns, splits: 1 };
            let (units, blocks) = (self.units(&one), self.blocks(&one));
            // One block, or a whole number of blocks, on each multiprocessor.
            for share in [0, 1, 2, 3, 4, 6, 8] {
                let wanted = (chip.multiprocessors * share / blocks).clamp(1, units);
                let splits = units.div_ceil(units.div_ceil(wanted)).min(65535);
                let config = MmaConfig { splits, ..one };
                let fits = splits == 1 || u64::from(splits) * self.len() <= WORKSPACE_MAX;
                if let Some(cost) = self.cost(&config, chip)
                    && fits
                    && !found.iter().any(|(_, c)| *c == config)
                {
                    found.push((cost, config));
                }
            }
        };
        for tile in WEIGHT_TAP_TILES {
            add(Method::Gather, tile);
        }
        if self.kernel == 3 {
            let (tile_h, tile_w) = self.tile();
            for tile in WEIGHT_PATCH_TILES {
                add(Method::Patch { tile_h, tile_w }, tile);
            }
        }
        sorted(found)
    }

    /// The tile of at most 128 pixels that covers the map with the fewest tiles, and then the smallest patches.
    fn tile(&self) -> (u32, u32) {
        let options = (1..=self.w.min(WEIGHT_PATCH_ROWS)).map(|tile_w| {
            let tile_h = (WEIGHT_PATCH_ROWS / tile_w).min(self.h);
            let tiles = self.h.div_ceil(tile_h) * self.w.div_ceil(tile_w);
            let (h, w) = self.patch(tile_h, tile_w);
            (tiles * (2 * WEIGHT_PATCH_ROWS + h * w), tile_h, tile_w)
        });
        options.min().map_or((1, 1), |(_, tile_h, tile_w)| (tile_h, tile_w))
    }
}
