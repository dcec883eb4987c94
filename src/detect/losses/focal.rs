//! Focal loss.
//!
//! Source: Lin et al., "Focal Loss for Dense Object Detection", 2017.

use super::bce::{bce_with_logits, sigmoid};

/// Loss of one logit `x` against label `y` (0 or 1) and its gradient.
///
/// `BCE(x, y) (1 - p_t)^gamma (alpha y + (1 - alpha)(1 - y))`, `p_t = y p + (1 - y)(1 - p)`, `p = sigmoid(x)`.
pub fn focal(x: f32, y: f32, alpha: f32, gamma: f32) -> (f32, f32) {
    let (bce, d_bce) = bce_with_logits(x, y);
    let p = sigmoid(x);
    let miss = 1.0 - (y * p + (1.0 - y) * (1.0 - p));
    let balance = alpha * y + (1.0 - alpha) * (1.0 - y);
    let modulation = miss.powf(gamma);
    let d_miss = -(2.0 * y - 1.0) * p * (1.0 - p);
    let d_modulation = if miss > 0.0 { gamma * modulation / miss * d_miss } else { 0.0 };
    (balance * bce * modulation, balance * (d_bce * modulation + bce * d_modulation))
}
