//! Binary cross-entropy on logits, and the exponential it is built on.
//!
//! The loops run over every anchor and class in every step, so exponential and logarithm are polynomials without
//! branches that the compiler turns into vector code. Both are accurate to about one unit in the last place.

/// Smallest argument of [`exp_negative`] that still gives a normal number.
const EXP_MIN: f32 = -87.0;
/// Adding and subtracting `1.5 * 2^23` rounds to the nearest integer, which also stands in the low bits.
const ROUND: f32 = 12_582_912.0;

/// `e^x` for `x <= 0`; arguments below -87 give `e^-87`, NaN stays NaN.
#[inline(always)]
pub fn exp_negative(x: f32) -> f32 {
    // A comparison, not `max`: `max` would swallow NaN and a diverged network would look healthy.
    let x = if x < EXP_MIN { EXP_MIN } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let k = shifted - ROUND;
    // ln 2 in two parts, the first exact in the product with any k that occurs.
    let r = (x - k * 0.693_359_4) - k * -2.121_944_4e-4;
    let tail = r * (1.0 / 120.0 + r * (1.0 / 720.0 + r * (1.0 / 5040.0)));
    let p = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + tail))));
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    p * f32::from_bits(exponent << 23)
}

/// `ln(1 + z)` for z in 0..1, accurate relative to its value also for tiny z.
#[inline(always)]
fn ln_1p_unit(z: f32) -> f32 {
    // ln(1 + z) = 2 artanh(z / (2 + z)), whose series converges fast for arguments up to 1/3.
    let s = z / (2.0 + z);
    let q = s * s;
    let high = 1.0 / 9.0 + q * (1.0 / 11.0 + q * (1.0 / 13.0 + q * (1.0 / 15.0 + q * (1.0 / 17.0))));
    let series = 1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * high));
    2.0 * s + 2.0 * s * q * series
}

/// `(ln(1 + e^x), 1 / (1 + e^-x))`: softplus and sigmoid from one exponential.
#[inline(always)]
pub fn softplus_sigmoid(x: f32) -> (f32, f32) {
    let negative = x < 0.0;
    let z = exp_negative(if negative { x } else { -x });
    let positive_part = if negative { 0.0 } else { x };
    let share = 1.0 / (1.0 + z);
    (positive_part + ln_1p_unit(z), if negative { z * share } else { share })
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    let z = exp_negative(if x < 0.0 { x } else { -x });
    let share = 1.0 / (1.0 + z);
    if x < 0.0 { z * share } else { share }
}

/// Binary cross-entropy of logit `x` against target `t` in 0..1, and its gradient.
///
/// `loss = max(x, 0) - x t + ln(1 + e^-|x|)`, `gradient = sigmoid(x) - t`.
#[inline]
pub fn bce_with_logits(x: f32, t: f32) -> (f32, f32) {
    let (softplus, sigmoid) = softplus_sigmoid(x);
    (softplus - x * t, sigmoid - t)
}

const LANES: usize = 16;

#[inline(always)]
fn background_body(logits: &[f32], gradient: &mut [f32], coefficient: f32) -> f64 {
    let mut sums = [0.0f32; LANES];
    let (blocks, rest) = logits.as_chunks::<LANES>();
    let (gradient_blocks, gradient_rest) = gradient.as_chunks_mut::<LANES>();
    let mut total = 0.0f64;
    // f32 lanes over short stretches, f64 across them.
    for (stretch, out_stretch) in blocks.chunks(64).zip(gradient_blocks.chunks_mut(64)) {
        for (block, out) in stretch.iter().zip(out_stretch) {
            for lane in 0..LANES {
                let (softplus, sigmoid) = softplus_sigmoid(block[lane]);
                sums[lane] += softplus;
                out[lane] = coefficient * sigmoid;
            }
        }
        for sum in &mut sums {
            total += *sum as f64;
            *sum = 0.0;
        }
    }
    for (x, out) in rest.iter().zip(gradient_rest) {
        let (softplus, sigmoid) = softplus_sigmoid(*x);
        total += softplus as f64;
        *out = coefficient * sigmoid;
    }
    total
}

#[inline(always)]
fn background_weighted_body(logits: &[f32], gradient: &mut [f32], coefficient: f32, weights: &[f32]) -> f64 {
    let mut total = 0.0f64;
    for (row, out_row) in logits.chunks_exact(weights.len()).zip(gradient.chunks_exact_mut(weights.len())) {
        let mut sums = [0.0f32; LANES];
        let (blocks, rest) = row.as_chunks::<LANES>();
        let (out_blocks, out_rest) = out_row.as_chunks_mut::<LANES>();
        let (weight_blocks, weight_rest) = weights.as_chunks::<LANES>();
        for ((block, out), weight) in blocks.iter().zip(out_blocks).zip(weight_blocks) {
            for lane in 0..LANES {
                let (softplus, sigmoid) = softplus_sigmoid(block[lane]);
                sums[lane] += weight[lane] * softplus;
                out[lane] = coefficient * weight[lane] * sigmoid;
            }
        }
        for ((x, out), weight) in rest.iter().zip(out_rest).zip(weight_rest) {
            let (softplus, sigmoid) = softplus_sigmoid(*x);
            sums[0] += weight * softplus;
            *out = coefficient * weight * sigmoid;
        }
        total += sums.iter().map(|s| *s as f64).sum::<f64>();
    }
    total
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn background_avx2(logits: &[f32], gradient: &mut [f32], coefficient: f32, weights: Option<&[f32]>) -> f64 {
    match weights {
        None => background_body(logits, gradient, coefficient),
        Some(weights) => background_weighted_body(logits, gradient, coefficient, weights),
    }
}

/// Sum of the loss of all-background logits (`ln(1 + e^x)`, each class times its weight) and the gradient
/// `coefficient * weight * sigmoid(x)`, which is written over `gradient`.
///
/// # Shapes
/// Both slices are `[rows][classes]`; with `weights`, one per class.
///
/// The bits do not depend on the instructions the processor offers: the vector code does the same operations.
pub fn background_loss(
    logits: &[f32],
    gradient: &mut [f32],
    coefficient: f32,
    weights: Option<&[f32]>,
) -> f64 {
    assert_eq!(logits.len(), gradient.len(), "one gradient per logit");
    if let Some(weights) = weights {
        assert!(!weights.is_empty() && logits.len().is_multiple_of(weights.len()), "whole rows of classes");
    }
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor was just found to have the one feature the function is compiled for.
        return unsafe { background_avx2(logits, gradient, coefficient, weights) };
    }
    match weights {
        None => background_body(logits, gradient, coefficient),
        Some(weights) => background_weighted_body(logits, gradient, coefficient, weights),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential_softplus_and_sigmoid_are_accurate_over_the_whole_range() {
        let mut x = -100.0f32;
        while x < 100.0 {
            let exact = x as f64;
            let (softplus, s) = softplus_sigmoid(x);
            let softplus_exact = exact.max(0.0) + (-exact.abs()).exp().ln_1p();
            let sigmoid_exact = 1.0 / (1.0 + (-exact).exp());
            if x > -86.0 {
                assert!((softplus as f64 / softplus_exact - 1.0).abs() < 4e-7, "softplus({x}) = {softplus}");
                assert!((s as f64 / sigmoid_exact - 1.0).abs() < 4e-7, "sigmoid({x}) = {s}");
                assert_eq!(s, sigmoid(x));
            } else {
                assert!(softplus < 1e-37 && s < 1e-37);
            }
            x += 0.00937;
        }
    }

    #[test]
    fn not_a_number_is_not_hidden() {
        let (softplus, s) = softplus_sigmoid(f32::NAN);
        assert!(softplus.is_nan() && s.is_nan());
        let mut gradient = [0.0; 3];
        assert!(background_loss(&[0.0, f32::NAN, 1.0], &mut gradient, 1.0, None).is_nan());
        assert_eq!(softplus_sigmoid(f32::INFINITY).0, f32::INFINITY);
    }

    #[test]
    fn weights_of_one_change_nothing_and_vector_code_equals_plain_code() {
        let logits: Vec<f32> = (0..37 * 21).map(|i| ((i * 7919) % 1000) as f32 * 0.03 - 17.0).collect();
        let (mut a, mut b, mut c) =
            (vec![0.0; logits.len()], vec![0.0; logits.len()], vec![0.0; logits.len()]);
        let plain = background_loss(&logits, &mut a, 0.25, None);
        let weighted = background_loss(&logits, &mut b, 0.25, Some(&[1.0; 21]));
        assert!((plain / weighted - 1.0).abs() < 1e-6);
        assert_eq!(a, b);
        assert_eq!(plain.to_bits(), background_body(&logits, &mut c, 0.25).to_bits());
        assert_eq!(a, c);
    }
}
