//! Batch normalisation, activation and shortcut in one sweep: `z = act(weight * xhat + bias) + residual`,
//! `xhat = (y - mean) * inverse_deviation`.
//!
//! Gradients (Ioffe and Szegedy, "Batch Normalization", 2015), with `d = dz * act'(u)`, `M` pixels:
//! `dbias = sum d`, `dweight = sum d * xhat`,
//! `dy = weight * inverse_deviation * (d - dbias / M - xhat * dweight / M)`. With frozen statistics the two
//! means are left out. The activation's input `u` is computed again from `y`, not kept.
//!
//! Moves: forward reads `y` (and the shortcut), writes `z`; backward reads `dz` and `y` twice, writes `dy`.

pub mod cpu;
pub mod cuda;
#[cfg(test)]
mod tests;

use crate::engine::activation::Activation;

/// One normalisation and what follows it; slices hold one number for each channel.
#[derive(Clone, Copy)]
pub struct Norm<'a> {
    /// Mean of the batch, or the running one.
    pub mean: &'a [f32],
    /// `1 / sqrt(variance + eps)`.
    pub inverse_deviation: &'a [f32],
    /// Scale.
    pub weight: &'a [f32],
    /// Shift.
    pub bias: &'a [f32],
    /// Applied to the result.
    pub activation: Activation,
}

/// `out = 1 / sqrt(variance + eps)`.
pub fn inverse_deviation(variance: &[f32], eps: f32, out: &mut [f32]) {
    for (o, v) in out.iter_mut().zip(variance) {
        *o = 1.0 / (v + eps).sqrt();
    }
}

/// `running <- (1 - momentum) * running + momentum * batch * factor`.
pub fn update_running(running: &mut [f32], batch: &[f32], momentum: f32, factor: f32) {
    for (r, b) in running.iter_mut().zip(batch) {
        *r = (1.0 - momentum) * *r + momentum * (b * factor);
    }
}

/// A normalisation by running statistics as `scale * y + shift`.
pub fn fold(
    weight: &[f32],
    bias: &[f32],
    running_mean: &[f32],
    running_var: &[f32],
    eps: f32,
    scale: &mut [f32],
    shift: &mut [f32],
) {
    for c in 0..weight.len() {
        scale[c] = weight[c] / (running_var[c] + eps).sqrt();
        shift[c] = bias[c] - running_mean[c] * scale[c];
    }
}
