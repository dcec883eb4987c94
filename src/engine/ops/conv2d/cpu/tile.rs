//! The register tile of the correlation: `PIXELS` output pixels of a row times `VECTORS` vectors of
//! output channels, all sums in registers over all taps and input channels.

use super::weight_tile::{WeightTileFn, weight_tile};
use crate::engine::simd::{Kernel, Level, Portable, Simd};

/// What one tile reads and writes. Pitches and steps count floats.
#[derive(Clone, Copy)]
pub(super) struct TileArgs {
    /// Input under the first tap of the first pixel.
    pub x: *const f32,
    /// From one output pixel to the next, in the input.
    pub x_step: usize,
    /// Taps: rows, columns, and contiguous channels at each.
    pub tap_rows: usize,
    pub tap_columns: usize,
    pub run: usize,
    pub tap_row_pitch: usize,
    pub tap_column_pitch: usize,
    /// Packed weights of the block.
    pub weights: *const f32,
    /// First output pixel, first channel of the block.
    pub y: *mut f32,
    /// From one output pixel to the next.
    pub y_step: usize,
    /// Lanes to write in the last vector.
    pub last: usize,
    /// Add to the output.
    pub accumulate: bool,
}

/// A tile function of one size; `unsafe` to call: `args` must be true of the memory.
pub(super) type TileFn<S> = unsafe fn(S, &TileArgs);

struct Tile<'a, const PIXELS: usize, const VECTORS: usize>(&'a TileArgs);

impl<const PIXELS: usize, const VECTORS: usize> Kernel for Tile<'_, PIXELS, VECTORS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let a = self.0;
        let mut sums = [[s.zero(); VECTORS]; PIXELS];
        // SAFETY: the caller of the tile function promised that every address formed here (taps
        // times run under PIXELS pixels, taps * run * VECTORS vectors of weights) is readable.
        unsafe {
            let mut weights = a.weights;
            for row in 0..a.tap_rows {
                for column in 0..a.tap_columns {
                    let x = a.x.add(row * a.tap_row_pitch + column * a.tap_column_pitch);
                    for channel in 0..a.run {
                        let x = x.add(channel);
                        let mut w = [s.zero(); VECTORS];
                        for (v, w) in w.iter_mut().enumerate() {
                            *w = s.load(weights.add(v * S::LANES));
                        }
                        weights = weights.add(VECTORS * S::LANES);
                        for (m, sums) in sums.iter_mut().enumerate() {
                            let x = s.splat(*x.add(m * a.x_step));
                            for v in 0..VECTORS {
                                sums[v] = s.fma(x, w[v], sums[v]);
                            }
                        }
                    }
                }
            }
        }
        let last = VECTORS - 1;
        for (m, sums) in sums.iter().enumerate() {
            // SAFETY: the caller promised that VECTORS vectors of PIXELS output pixels, `last` lanes
            // in the last, are writable.
            unsafe {
                let y = a.y.add(m * a.y_step);
                for (v, &sum) in sums.iter().enumerate().take(last) {
                    let y = y.add(v * S::LANES);
                    s.store(y, if a.accumulate { s.add(sum, s.load(y)) } else { sum });
                }
                let y = y.add(last * S::LANES);
                let sum = sums[last];
                let sum = if a.accumulate { s.add(sum, s.load_partial(y, a.last)) } else { sum };
                s.store_partial(y, sum, a.last);
            }
        }
    }
}

unsafe fn tile<S: Simd, const PIXELS: usize, const VECTORS: usize>(s: S, args: &TileArgs) {
    s.call(Tile::<PIXELS, VECTORS>(args));
}

/// The sizes of register tiles of one instruction set.
pub(super) trait Tiles: Simd {
    /// Widest block, in vectors, for the weight gradient.
    const WEIGHT_BLOCK: usize;
    /// Widest block, in vectors, for an output of `vectors` vectors.
    fn widest_block(vectors: usize) -> usize;
    /// Most pixels (or input channels) in a tile of `vectors` vectors.
    fn height_max(vectors: usize) -> usize;
    /// The correlation tile of that size; panics on sizes past the maxima.
    fn tile(pixels: usize, vectors: usize) -> TileFn<Self>;
    /// The weight gradient tile of that size; panics on sizes past the maxima.
    fn weight_tile(channels: usize, vectors: usize) -> WeightTileFn<Self>;
}

/// Both tile functions, for the sizes that the instruction set has registers for:
/// `vectors: heights;`.
macro_rules! tile_tables {
    ($($v:literal: $($m:literal)+;)+) => {
        fn tile(pixels: usize, vectors: usize) -> TileFn<Self> {
            match (vectors, pixels) {
                $($(($v, $m) => tile::<Self, $m, $v>,)+)+
                (vectors, pixels) => unreachable!("tile of {pixels} pixels, {vectors} vectors"),
            }
        }
        fn weight_tile(channels: usize, vectors: usize) -> WeightTileFn<Self> {
            match (vectors, channels) {
                $($(($v, $m) => weight_tile::<Self, $m, $v>,)+)+
                (vectors, channels) => unreachable!("tile of {channels} channels, {vectors} vectors"),
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
impl Tiles for crate::engine::simd::Avx512 {
    const WEIGHT_BLOCK: usize = 3;
    fn widest_block(vectors: usize) -> usize {
        if vectors == 5 { 5 } else { 4 }
    }
    fn height_max(vectors: usize) -> usize {
        [0, 24, 14, 9, 6, 5][vectors]
    }
    tile_tables! {
        1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24;
        2: 1 2 3 4 5 6 7 8 9 10 11 12 13 14;
        3: 1 2 3 4 5 6 7 8 9;
        4: 1 2 3 4 5 6;
        5: 1 2 3 4 5;
    }
}

#[cfg(target_arch = "x86_64")]
impl Tiles for crate::engine::simd::Avx2 {
    // Three vectors leave no register for the mask of the last one.
    const WEIGHT_BLOCK: usize = 2;
    fn widest_block(vectors: usize) -> usize {
        if vectors == 3 { 3 } else { 2 }
    }
    fn height_max(vectors: usize) -> usize {
        [0, 12, 6, 4][vectors]
    }
    tile_tables! {
        1: 1 2 3 4 5 6 7 8 9 10 11 12;
        2: 1 2 3 4 5 6;
        3: 1 2 3 4;
    }
}

impl Tiles for Portable {
    const WEIGHT_BLOCK: usize = 1;
    fn widest_block(_vectors: usize) -> usize {
        1
    }
    fn height_max(_vectors: usize) -> usize {
        6
    }
    tile_tables! { 1: 1 2 3 4 5 6; }
}

/// [`Tiles::widest_block`] of a level.
pub(super) fn widest_block(level: Level, vectors: usize) -> usize {
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512(_) => crate::engine::simd::Avx512::widest_block(vectors),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2(_) => crate::engine::simd::Avx2::widest_block(vectors),
        Level::Portable(_) => Portable::widest_block(vectors),
    }
}

/// `length` cut into the fewest parts of at most `max`, as equal as can be: the number of parts, the
/// smaller size, and how many parts are one larger.
pub(super) fn even_parts(length: usize, max: usize) -> (usize, usize, usize) {
    let count = length.div_ceil(max);
    (count, length / count, length % count)
}
