//! The register tile of the weight gradient: `CHANNELS` input channels of one tap times `VECTORS`
//! vectors of output channels, summed over the pixels of a few rows.

use crate::engine::simd::{Kernel, Simd};

/// What one tile reads and writes. Pitches and steps count floats.
#[derive(Clone, Copy)]
pub(super) struct WeightTileArgs {
    /// First input channel of the tap under the first pixel.
    pub x: *const f32,
    pub x_row_pitch: usize,
    /// From one output pixel to the next, in the input.
    pub x_step: usize,
    /// First output channel of the block at the first pixel.
    pub dy: *const f32,
    pub dy_row_pitch: usize,
    pub dy_step: usize,
    /// Pixels to sum over.
    pub rows: usize,
    pub columns: usize,
    /// First weight of the tile, and from one input channel to the next.
    pub dweight: *mut f32,
    pub dweight_pitch: usize,
    /// Lanes in use in the last vector.
    pub last: usize,
    /// Add to what is there.
    pub accumulate: bool,
}

/// A tile function of one size; `unsafe` to call: `args` must be true of the memory.
pub(super) type WeightTileFn<S> = unsafe fn(S, &WeightTileArgs);

struct Tile<'a, const CHANNELS: usize, const VECTORS: usize>(&'a WeightTileArgs);

impl<const CHANNELS: usize, const VECTORS: usize> Kernel for Tile<'_, CHANNELS, VECTORS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let a = self.0;
        let last = VECTORS - 1;
        let mut sums = [[s.zero(); VECTORS]; CHANNELS];
        for row in 0..a.rows {
            // SAFETY: the caller of the tile function promised that CHANNELS input channels and the
            // lanes of VECTORS vectors are readable at each of `rows * columns` pixels.
            unsafe {
                let mut x = a.x.add(row * a.x_row_pitch);
                let mut dy = a.dy.add(row * a.dy_row_pitch);
                for _ in 0..a.columns {
                    let mut d = [s.zero(); VECTORS];
                    for (v, d) in d.iter_mut().enumerate().take(last) {
                        *d = s.load(dy.add(v * S::LANES));
                    }
                    d[last] = s.load_partial(dy.add(last * S::LANES), a.last);
                    for (c, sums) in sums.iter_mut().enumerate() {
                        let x = s.splat(*x.add(c));
                        for v in 0..VECTORS {
                            sums[v] = s.fma(x, d[v], sums[v]);
                        }
                    }
                    // The last step may lead past the buffer; it is not read then.
                    x = x.wrapping_add(a.x_step);
                    dy = dy.wrapping_add(a.dy_step);
                }
            }
        }
        for (c, sums) in sums.iter().enumerate() {
            // SAFETY: the caller promised that the tile's weights are writable.
            unsafe {
                let w = a.dweight.add(c * a.dweight_pitch);
                for (v, &sum) in sums.iter().enumerate().take(last) {
                    let w = w.add(v * S::LANES);
                    s.store(w, if a.accumulate { s.add(sum, s.load(w)) } else { sum });
                }
                let w = w.add(last * S::LANES);
                let sum = sums[last];
                let sum = if a.accumulate { s.add(sum, s.load_partial(w, a.last)) } else { sum };
                s.store_partial(w, sum, a.last);
            }
        }
    }
}

/// The tile as a function.
///
/// # Safety
/// Every address that `args` describes is readable or writable as its field says.
pub(super) unsafe fn weight_tile<S: Simd, const CHANNELS: usize, const VECTORS: usize>(
    s: S,
    args: &WeightTileArgs,
) {
    s.call(Tile::<CHANNELS, VECTORS>(args));
}
