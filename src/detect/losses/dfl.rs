//! Distribution focal loss: a distance as a distribution over the integers 0..R-1.
//!
//! Source: Li et al., "Generalized Focal Loss", 2020.

use super::bce::exp_negative;

/// Most bins a side may have.
pub const BINS_MAX: usize = 64;

/// How far below the last bin a target distance is cut off.
const TARGET_MARGIN: f32 = 0.01;

/// Softmax over one side's logits, the expectation `sum b p_b`, and `ln` of the softmax's denominator plus the maximum.
///
/// # Shapes
/// `logits` and `probabilities` have R elements.
#[inline(always)]
pub fn softmax_expectation(logits: &[f32], probabilities: &mut [f32]) -> (f32, f32) {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
    let mut sum = 0.0f32;
    for (p, &x) in probabilities.iter_mut().zip(logits) {
        *p = exp_negative(x - max);
    }
    for p in probabilities.iter() {
        sum += p;
    }
    let scale = 1.0 / sum;
    let mut expectation = 0.0f32;
    for (bin, p) in probabilities.iter_mut().enumerate() {
        *p *= scale;
        expectation += bin as f32 * *p;
    }
    (expectation, max + sum.ln())
}

/// The four distances (left, top, right, bottom) of one cell in grid units.
///
/// With one bin the raw value is the distance; otherwise the expectation of the distribution.
///
/// # Shapes
/// `logits` is `[4][reg_max]`.
#[inline]
pub fn distances(logits: &[f32], reg_max: usize) -> [f32; 4] {
    match reg_max {
        1 => [logits[0], logits[1], logits[2], logits[3]],
        16 => {
            // The usual width, unrolled: the four sides run side by side in vector registers.
            let (sides, _) = logits.as_chunks::<16>();
            std::array::from_fn(|side| expectation(&sides[side]))
        }
        _ => {
            let mut probabilities = [0.0f32; BINS_MAX];
            std::array::from_fn(|side| {
                let row = &logits[side * reg_max..][..reg_max];
                softmax_expectation(row, &mut probabilities[..reg_max]).0
            })
        }
    }
}

#[inline(always)]
fn expectation(logits: &[f32; 16]) -> f32 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
    let p = logits.map(|x| exp_negative(x - max));
    let (mut sum, mut moment) = ([0.0f32; 4], [0.0f32; 4]);
    for group in 0..4 {
        for lane in 0..4 {
            sum[lane] += p[group * 4 + lane];
            moment[lane] += (group * 4 + lane) as f32 * p[group * 4 + lane];
        }
    }
    moment.iter().sum::<f32>() / sum.iter().sum::<f32>()
}

/// The target distance as the loss uses it: within 0 and `R - 1 - 0.01`.
#[inline]
pub fn clamp_target(distance: f32, reg_max: usize) -> f32 {
    distance.clamp(0.0, (reg_max - 1) as f32 - TARGET_MARGIN)
}

/// Loss of one side against a clamped target distance `g`: `-(log p_l (r - g) + log p_r (g - l))` with
/// `l = floor(g)`, `r = l + 1`. `log_denominator` is the second result of [`softmax_expectation`].
///
/// # Gradient
/// By logit b: `p_b - (r - g) [b = l] - (g - l) [b = r]`.
#[inline]
pub fn side_loss(logits: &[f32], log_denominator: f32, g: f32) -> f32 {
    let left = g.floor();
    let (w_left, w_right) = (left + 1.0 - g, g - left);
    let l = left as usize;
    -((logits[l] - log_denominator) * w_left + (logits[l + 1] - log_denominator) * w_right)
}

/// Mean loss over the four sides of one cell; adds `scale * d(loss)/d(logits)` to `gradient`.
///
/// # Shapes
/// `logits` and `gradient` are `[4][reg_max]`, `targets` unclamped distances in grid units.
pub fn dfl_loss(logits: &[f32], targets: [f32; 4], reg_max: usize, gradient: &mut [f32], scale: f32) -> f32 {
    let mut probabilities = [0.0f32; BINS_MAX];
    let mut total = 0.0f32;
    for (side, target) in targets.into_iter().enumerate() {
        let row = &logits[side * reg_max..][..reg_max];
        let p = &mut probabilities[..reg_max];
        let (_, log_denominator) = softmax_expectation(row, p);
        let g = clamp_target(target, reg_max);
        total += side_loss(row, log_denominator, g);
        add_side_gradient(p, g, &mut gradient[side * reg_max..][..reg_max], scale / 4.0);
    }
    total / 4.0
}

/// Adds `scale` times the gradient of [`side_loss`] to `gradient`.
#[inline]
pub fn add_side_gradient(probabilities: &[f32], g: f32, gradient: &mut [f32], scale: f32) {
    let left = g.floor();
    let l = left as usize;
    for (out, p) in gradient.iter_mut().zip(probabilities) {
        *out += scale * p;
    }
    gradient[l] -= scale * (left + 1.0 - g);
    gradient[l + 1] -= scale * (g - left);
}
