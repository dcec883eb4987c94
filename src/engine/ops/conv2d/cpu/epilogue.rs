//! What is done to a row of outputs while it lies in the nearest cache: bias, statistics for batch
//! normalisation, or normalisation and activation.

use rayon::prelude::*;

use super::super::Conv2dParams;
use super::Epilogue;
use super::correlate::Split;
use crate::engine::activation::Activation;
use crate::engine::simd::{Level, Simd};
use crate::engine::tensor::{Src, View};

/// Channels of the widest block of any instruction set.
const BLOCK_CHANNELS_MAX: usize = 80;

/// Some channels of one row of outputs, just written.
pub(super) struct RowSpan {
    /// First pixel, first channel.
    pub y: *mut f32,
    /// From one pixel to the next, in floats.
    pub step: usize,
    /// Pixels.
    pub w: usize,
    pub first_channel: usize,
    pub vectors: usize,
    /// Lanes in use in the last vector.
    pub last: usize,
    pub image: usize,
    pub row: usize,
}

/// An [`Epilogue`] that tasks can share.
pub(super) enum RowWork<'a> {
    Raw,
    Bias(&'a [f32]),
    /// Partials `[chunk][mean, squares][channel]`; every task writes its own chunk and channels.
    Stats {
        partials: *mut f64,
        channels: usize,
    },
    Apply {
        scale: &'a [f32],
        shift: &'a [f32],
        activation: Activation,
        residual: Option<Src<'a>>,
    },
}

// SAFETY: slices and a `Src` may be shared; the partials are written by tasks at places of their own.
unsafe impl Sync for RowWork<'_> {}

/// Sums of one block of channels over the rows of a task, about a pivot near the mean, so that a
/// mean far larger than the deviation costs no digits.
pub(super) struct BlockStats {
    rows: usize,
    pivot: [f32; BLOCK_CHANNELS_MAX],
    sum: [f64; BLOCK_CHANNELS_MAX],
    square: [f64; BLOCK_CHANNELS_MAX],
}

impl BlockStats {
    #[inline(always)]
    pub(super) fn new() -> BlockStats {
        BlockStats {
            rows: 0,
            pivot: [0.0; BLOCK_CHANNELS_MAX],
            sum: [0.0; BLOCK_CHANNELS_MAX],
            square: [0.0; BLOCK_CHANNELS_MAX],
        }
    }
}

impl<'a> RowWork<'a> {
    /// Checks the epilogue against the output.
    pub(super) fn new(p: &Conv2dParams, y: View, epilogue: Epilogue<'a>) -> RowWork<'a> {
        match epilogue {
            Epilogue::Raw => RowWork::Raw,
            Epilogue::Bias { bias } => {
                assert_eq!(bias.len(), p.c_out, "bias of {p:?}");
                RowWork::Bias(bias)
            }
            Epilogue::Stats { partials } => {
                assert!(partials.len() >= stats_partials_len(p, y.n, y.h, y.w), "partials of {p:?}");
                RowWork::Stats { partials: partials.as_mut_ptr(), channels: p.c_out }
            }
            Epilogue::Apply { scale, shift, activation, residual } => {
                assert!(scale.len() == p.c_out && shift.len() == p.c_out, "scale and shift of {p:?}");
                if let Some(Src { view: r, .. }) = residual {
                    assert_eq!((r.n, r.h, r.w, r.c), (y.n, y.h, y.w, y.c), "residual of {p:?}");
                }
                RowWork::Apply { scale, shift, activation, residual }
            }
        }
    }

    /// Works on one row.
    ///
    /// # Safety
    /// The span lies in the output this was made for, and no other thread touches it.
    #[inline(always)]
    pub(super) unsafe fn row<S: Simd>(&self, s: S, span: &RowSpan, stats: &mut BlockStats) {
        // SAFETY: passed on from the caller.
        unsafe {
            match self {
                RowWork::Raw => {}
                RowWork::Bias(bias) => bias_row(s, span, bias),
                RowWork::Stats { .. } => {
                    for v in 0..span.vectors - 1 {
                        stats_row::<S, true>(s, span, v, stats);
                    }
                    match span.last == S::LANES {
                        true => stats_row::<S, true>(s, span, span.vectors - 1, stats),
                        false => stats_row::<S, false>(s, span, span.vectors - 1, stats),
                    }
                    stats.rows += 1;
                }
                RowWork::Apply { scale, shift, activation, residual } => {
                    let residual = residual.map(|r| {
                        let at = r.view.at(span.image, span.row as isize, 0) + span.first_channel;
                        (r.data.wrapping_add(at), r.view.pixel_pitch)
                    });
                    // A constant in each arm, so that the choice is made outside of the loop.
                    match activation {
                        Activation::Identity => {
                            apply_row(s, span, scale, shift, Activation::Identity, residual)
                        }
                        Activation::Silu => apply_row(s, span, scale, shift, Activation::Silu, residual),
                        Activation::Relu => apply_row(s, span, scale, shift, Activation::Relu, residual),
                    }
                }
            }
        }
    }

    /// Stores the statistics of a block of a task that wrote `pixels` outputs.
    #[inline(always)]
    pub(super) fn finish_block(
        &self,
        stats: &BlockStats,
        first_channel: usize,
        width: usize,
        chunk: usize,
        pixels: usize,
    ) {
        let RowWork::Stats { partials, channels } = *self else { return };
        assert!(first_channel + width <= channels && width <= BLOCK_CHANNELS_MAX);
        for i in 0..width {
            let shift = stats.sum[i] / pixels as f64;
            let mean = f64::from(stats.pivot[i]) + shift;
            let squares = (stats.square[i] - stats.sum[i] * shift).max(0.0);
            // A NaN must not become 0 in `max`.
            let squares = if stats.square[i].is_nan() { f64::NAN } else { squares };
            // SAFETY: `chunk` counts the chunks of `Split`, `first_channel + i` the channels: within
            // `stats_partials_len`, and this task's own.
            unsafe {
                let at = partials.add(chunk * 2 * channels + first_channel + i);
                at.write(mean);
                at.add(channels).write(squares);
            }
        }
    }
}

#[inline(always)]
unsafe fn load<S: Simd, const FULL: bool>(s: S, p: *const f32, lanes: usize) -> S::F32 {
    // SAFETY: passed on from the caller.
    unsafe { if FULL { s.load(p) } else { s.load_partial(p, lanes) } }
}

/// Adds one row of vector `v` to the statistics. The first row of a task gives the pivot.
#[inline(always)]
unsafe fn stats_row<S: Simd, const FULL: bool>(s: S, span: &RowSpan, v: usize, stats: &mut BlockStats) {
    let (lanes, from) = (if FULL { S::LANES } else { span.last }, v * S::LANES);
    assert!(from + S::LANES <= BLOCK_CHANNELS_MAX);
    // SAFETY: the pixels and lanes lie in the span; the block fits into the arrays (asserted).
    unsafe {
        let y = span.y.add(from);
        let at = |x: usize| y.add(x * span.step);
        if stats.rows == 0 {
            let mut sum = s.zero();
            for x in 0..span.w {
                sum = s.add(sum, load::<S, FULL>(s, at(x), lanes));
            }
            let pivot = s.mul(sum, s.splat(1.0 / span.w as f32));
            s.store(stats.pivot.as_mut_ptr().add(from), pivot);
        }
        let pivot = s.load(stats.pivot.as_ptr().add(from));
        let (mut sum, mut square) = ([s.zero(); 4], [s.zero(); 4]);
        let mut x = 0;
        while x + 4 <= span.w {
            for i in 0..4 {
                let d = s.sub(load::<S, FULL>(s, at(x + i), lanes), pivot);
                sum[i] = s.add(sum[i], d);
                square[i] = s.fma(d, d, square[i]);
            }
            x += 4;
        }
        for x in x..span.w {
            let d = s.sub(load::<S, FULL>(s, at(x), lanes), pivot);
            sum[0] = s.add(sum[0], d);
            square[0] = s.fma(d, d, square[0]);
        }
        let (mut row_sum, mut row_square) = ([0.0f32; 16], [0.0f32; 16]);
        let sum = s.add(s.add(sum[0], sum[1]), s.add(sum[2], sum[3]));
        let square = s.add(s.add(square[0], square[1]), s.add(square[2], square[3]));
        s.store(row_sum.as_mut_ptr(), sum);
        s.store(row_square.as_mut_ptr(), square);
        for (i, (&sum, &square)) in row_sum.iter().zip(&row_square).enumerate().take(S::LANES) {
            stats.sum[from + i] += f64::from(sum);
            stats.square[from + i] += f64::from(square);
        }
    }
}

#[inline(always)]
unsafe fn bias_row<S: Simd>(s: S, span: &RowSpan, bias: &[f32]) {
    for v in 0..span.vectors {
        let lanes = if v + 1 == span.vectors { span.last } else { S::LANES };
        // SAFETY: channels of the span are channels of the bias; pixels and lanes lie in the span.
        unsafe {
            let b = s.load_partial(bias.as_ptr().add(span.first_channel + v * S::LANES), lanes);
            for x in 0..span.w {
                let y = span.y.add(x * span.step + v * S::LANES);
                s.store_partial(y, s.add(s.load_partial(y, lanes), b), lanes);
            }
        }
    }
}

#[inline(always)]
unsafe fn apply_row<S: Simd>(
    s: S,
    span: &RowSpan,
    scale: &[f32],
    shift: &[f32],
    activation: Activation,
    residual: Option<(*const f32, usize)>,
) {
    for v in 0..span.vectors {
        let lanes = if v + 1 == span.vectors { span.last } else { S::LANES };
        let (from, channel) = (v * S::LANES, span.first_channel + v * S::LANES);
        // SAFETY: channels of the span are channels of scale, shift and residual; pixels and lanes
        // lie in the span.
        unsafe {
            let scale = s.load_partial(scale.as_ptr().add(channel), lanes);
            let shift = s.load_partial(shift.as_ptr().add(channel), lanes);
            for x in 0..span.w {
                let y = span.y.add(x * span.step + from);
                let mut z = s.fma(s.load_partial(y, lanes), scale, shift);
                z = activation.value_vector(s, z);
                if let Some((residual, pitch)) = residual {
                    z = s.add(z, s.load_partial(residual.add(x * pitch + from), lanes));
                }
                s.store_partial(y, z, lanes);
            }
        }
    }
}

/// Numbers that [`Epilogue::Stats`] writes: a mean and a sum of squared deviations for each channel
/// of each chunk of rows.
pub fn stats_partials_len(p: &Conv2dParams, n: usize, h_out: usize, w_out: usize) -> usize {
    let split = Split::new(p.kernel * p.kernel * p.c_in, p.c_out, n, h_out, w_out);
    n * split.chunks * 2 * p.c_out
}

/// Combines the partials of [`Epilogue::Stats`] into mean and biased variance of each channel over
/// images and pixels.
///
/// `mean = sum n_i mean_i / N`, `var = sum (M_i + n_i (mean_i - mean)^2) / N` (Chan, Golub and
/// LeVeque 1979), in f64, in the order of the chunks.
pub fn finish_stats(
    p: &Conv2dParams,
    n: usize,
    h_out: usize,
    w_out: usize,
    partials: &[f64],
    mean: &mut [f32],
    var: &mut [f32],
) {
    assert!(mean.len() == p.c_out && var.len() == p.c_out, "statistics of {p:?}");
    let split = Split::new(p.kernel * p.kernel * p.c_in, p.c_out, n, h_out, w_out);
    let total = (n * h_out * w_out) as f64;
    let partials = &partials[..n * split.chunks * 2 * p.c_out];
    let pixels = |chunk: usize| {
        let first = chunk % split.chunks * split.rows;
        ((h_out.min(first + split.rows) - first) * w_out) as f64
    };
    // Some channels at a time, on the stack, so that the inner loops run over contiguous numbers.
    const PIECE: usize = 64;
    for first in (0..p.c_out).step_by(PIECE) {
        let width = PIECE.min(p.c_out - first);
        let (mut center, mut squares) = ([0.0f64; PIECE], [0.0f64; PIECE]);
        for (i, part) in partials.chunks_exact(2 * p.c_out).enumerate() {
            let weight = pixels(i) / total;
            for (center, &mean) in center.iter_mut().zip(&part[first..first + width]) {
                *center += weight * mean;
            }
        }
        for (i, part) in partials.chunks_exact(2 * p.c_out).enumerate() {
            let (means, deviations) = part.split_at(p.c_out);
            let count = pixels(i);
            for c in 0..width {
                let d = means[first + c] - center[c];
                squares[c] += deviations[first + c] + count * d * d;
            }
        }
        for c in 0..width {
            mean[first + c] = center[c] as f32;
            var[first + c] = (squares[c] / total) as f32;
        }
    }
}

/// See [`super::backward_bias`].
pub(in super::super) fn bias_gradient(level: Level, p: &Conv2dParams, dy: Src, dbias: &mut [f32]) {
    assert!(dy.view.c == p.c_out && dbias.len() == p.c_out, "bias gradient of {p:?}");
    dbias
        .par_chunks_mut(level.lanes())
        .enumerate()
        .for_each(|(vector, dbias)| bias_gradient_vector(level, dy, vector, dbias));
}

crate::simd_dispatch! {
    fn bias_gradient_vector(dy: Src, vector: usize, dbias: &mut [f32]) = bias_gradient_body;
}

#[inline(always)]
fn bias_gradient_body<S: Simd>(s: S, dy: Src, vector: usize, dbias: &mut [f32]) {
    let (view, lanes) = (dy.view, dbias.len());
    assert!(lanes <= S::LANES && vector * S::LANES + lanes <= view.c);
    let mut total = [0.0f64; 16];
    for image in 0..view.n {
        for row in 0..view.h {
            let first = dy.data.wrapping_add(view.at(image, row as isize, 0) + vector * S::LANES);
            let mut sum = [s.zero(); 4];
            for x in 0..view.w {
                // SAFETY: the pixel and its lanes lie in the view.
                let y = unsafe { s.load_partial(first.add(x * view.pixel_pitch), lanes) };
                sum[x % 4] = s.add(sum[x % 4], y);
            }
            let mut row = [0.0f32; 16];
            // SAFETY: no vector has more than sixteen lanes.
            unsafe { s.store(row.as_mut_ptr(), s.add(s.add(sum[0], sum[1]), s.add(sum[2], sum[3]))) };
            for (total, &row) in total.iter_mut().zip(&row) {
                *total += f64::from(row);
            }
        }
    }
    for (dbias, &total) in dbias.iter_mut().zip(&total) {
        *dbias += total as f32;
    }
}
