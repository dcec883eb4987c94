//! Varifocal loss.
//!
//! Source: Zhang et al., "VarifocalNet", 2021.

use super::bce::bce_with_logits;

/// Loss of one logit `x` and its gradient.
///
/// `W BCE(x, quality)` with `W = alpha sigmoid(x)^gamma` for background and `W = quality` where `positive`.
///
/// # Gradient
/// The weight of a background logit is differentiated too.
pub fn varifocal(x: f32, quality: f32, positive: bool, alpha: f32, gamma: f32) -> (f32, f32) {
    let (bce, d_bce) = bce_with_logits(x, quality);
    if positive {
        return (quality * bce, quality * d_bce);
    }
    let p = super::bce::sigmoid(x);
    let weight = alpha * p.powf(gamma);
    (weight * bce, weight * gamma * (1.0 - p) * bce + weight * d_bce)
}
