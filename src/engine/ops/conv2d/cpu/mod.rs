//! Convolution on the CPU: direct, NHWC, in registers.
//!
//! The forward pass and the data gradient are one algorithm, a *correlation* (`correlate.rs`): a
//! register tile of output pixels times vectors of output channels (`tile.rs`) runs over the taps
//! and input channels; packed weights (`pack.rs`) are read in order, inputs are broadcast from
//! memory. The gradient of stride `s` is `s * s` correlations, one for each parity of the output.
//! The weight gradient (`weight_gradient.rs`) is an outer product summed over pixels.
//! Biases, statistics and activations are applied to a row while it is still in the nearest cache
//! (`epilogue.rs`).
//!
//! Work is split into tasks by shape alone and every sum has a fixed order, so results are the same
//! bits for any number of threads (they differ between instruction sets). Tasks run in the current
//! rayon pool. Nothing here allocates.

mod correlate;
mod epilogue;
mod pack;
mod tile;
mod weight_gradient;
mod weight_tile;

use super::Conv2dParams;
use crate::engine::activation::Activation;
use crate::engine::simd;
use crate::engine::tensor::{Dst, Src};

pub use epilogue::{finish_stats, stats_partials_len};
pub(super) use weight_gradient::splits as weight_gradient_splits;

/// What happens to the output of [`forward`] before it leaves the cache. Channel slices have
/// `c_out` elements.
pub enum Epilogue<'a> {
    /// `y = conv`.
    Raw,
    /// `y = conv + bias`.
    Bias {
        /// Added per channel.
        bias: &'a [f32],
    },
    /// `y = conv`, and the statistics of each channel, for [`finish_stats`].
    Stats {
        /// [`stats_partials_len`] numbers, overwritten.
        partials: &'a mut [f64],
    },
    /// `y = activation(conv * scale + shift) + residual`: batch normalisation folded.
    Apply {
        /// Factor per channel.
        scale: &'a [f32],
        /// Added per channel after the factor.
        shift: &'a [f32],
        /// Applied to the sum.
        activation: Activation,
        /// Added last; as large as the output.
        residual: Option<Src<'a>>,
    },
}

/// Packs a weight `[kernel][kernel][c_in][c_out]` for [`forward`].
///
/// `packed` has [`Conv2dParams::packed_forward_len`] floats; the layout belongs to the processor's
/// instruction set.
pub fn pack_forward(p: &Conv2dParams, weight: &[f32], packed: &mut [f32]) {
    pack::forward(simd::level(), p, weight, packed);
}

/// Packs a weight for [`backward_data`] into [`Conv2dParams::packed_backward_len`] floats.
pub fn pack_backward(p: &Conv2dParams, weight: &[f32], packed: &mut [f32]) {
    pack::backward(simd::level(), p, weight, packed);
}

/// `y = epilogue(x * weight)`.
///
/// # Shapes
/// `x`: `[n, h, w, c_in]` with a zero border of at least `pad`; `y`: `[n, h_out, w_out, c_out]`,
/// its border is not written. Both may be slices of channels.
pub fn forward(p: &Conv2dParams, x: Src, packed: &[f32], y: Dst, epilogue: Epilogue) {
    correlate::forward(simd::level(), p, x, packed, y, epilogue);
}

/// `dx = dy * transposed weight`, or `dx += ..` with `accumulate`.
///
/// # Shapes
/// `dy`: `[n, h_out, w_out, c_out]` with a zero border of at least
/// [`Conv2dParams::gradient_border`]; `dx`: `[n, h, w, c_in]`, its border is not written.
pub fn backward_data(p: &Conv2dParams, dy: Src, packed: &[f32], dx: Dst, accumulate: bool) {
    correlate::backward_data(simd::level(), p, dy, packed, dx, accumulate);
}

/// `dweight += ` the gradient of the weight, `[kernel][kernel][c_in][c_out]`.
///
/// # Shapes
/// `x` as in [`forward`]; `dy`: `[n, h_out, w_out, c_out]`; `workspace`: at least
/// [`Conv2dParams::backward_weight_workspace_len`] floats, contents ignored and destroyed.
pub fn backward_weight(p: &Conv2dParams, x: Src, dy: Src, dweight: &mut [f32], workspace: &mut [f32]) {
    weight_gradient::run(simd::level(), p, x, dy, dweight, workspace);
}

/// `dbias += ` the sum of `dy` over images and pixels.
pub fn backward_bias(p: &Conv2dParams, dy: Src, dbias: &mut [f32]) {
    epilogue::bias_gradient(simd::level(), p, dy, dbias);
}

// The same with a given instruction set, for the tests; weights must have been packed for it.
#[cfg(test)]
pub(super) use correlate::{backward_data as backward_data_at, forward as forward_at};
#[cfg(test)]
pub(super) use epilogue::bias_gradient as backward_bias_at;
#[cfg(test)]
pub(super) use pack::{backward as pack_backward_at, forward as pack_forward_at};
#[cfg(test)]
pub(super) use weight_gradient::run as backward_weight_at;
