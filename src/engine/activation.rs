//! Activation functions: values and derivatives, scalar and vector.

use super::simd::Simd;

/// An element-wise activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x`.
    Identity,
    /// `x * sigmoid(x)` (Elfwing et al. 2017, "Sigmoid-weighted linear units").
    Silu,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// The function at `x`.
    pub fn value(self, x: f32) -> f32 {
        match self {
            Activation::Identity => x,
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Relu => x.max(0.0),
        }
    }

    /// Its derivative at `x`; 0 at 0 for the rectifier.
    pub fn derivative(self, x: f32) -> f32 {
        match self {
            Activation::Identity => 1.0,
            Activation::Silu => {
                let sigmoid = 1.0 / (1.0 + (-x).exp());
                sigmoid * (1.0 + x * (1.0 - sigmoid))
            }
            Activation::Relu => f32::from(x > 0.0),
        }
    }

    /// The function on a vector. In a hot loop, branch on the activation outside of it.
    #[inline(always)]
    pub fn value_vector<S: Simd>(self, s: S, x: S::F32) -> S::F32 {
        match self {
            Activation::Identity => x,
            Activation::Silu => {
                let one = s.splat(1.0);
                s.div(x, s.add(one, s.exp(s.sub(s.zero(), x))))
            }
            // Second operand wins on NaN, so it passes through.
            Activation::Relu => s.max(s.zero(), x),
        }
    }

    /// The derivative on a vector.
    #[inline(always)]
    pub fn derivative_vector<S: Simd>(self, s: S, x: S::F32) -> S::F32 {
        let one = s.splat(1.0);
        match self {
            Activation::Identity => one,
            Activation::Silu => {
                let sigmoid = s.sigmoid(x);
                s.mul(sigmoid, s.fma(x, s.sub(one, sigmoid), one))
            }
            Activation::Relu => s.select_positive(x, one, s.zero()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::simd::levels;

    #[inline(always)]
    fn both_body<S: Simd>(s: S, activation: Activation, x: &[f32], value: &mut [f32], slope: &mut [f32]) {
        assert!(x.len().is_multiple_of(S::LANES) && value.len() == x.len() && slope.len() == x.len());
        for i in (0..x.len()).step_by(S::LANES) {
            // SAFETY: whole vectors, lengths checked above.
            unsafe {
                let v = s.load(x.as_ptr().add(i));
                s.store(value.as_mut_ptr().add(i), activation.value_vector(s, v));
                s.store(slope.as_mut_ptr().add(i), activation.derivative_vector(s, v));
            }
        }
    }

    crate::simd_dispatch! {
        fn both(activation: Activation, x: &[f32], value: &mut [f32], slope: &mut [f32]) = both_body;
    }

    #[test]
    fn vectors_agree_with_scalars_and_slopes_with_differences() {
        let x: Vec<f32> = (0..1600).map(|i| (i as f32 - 800.5) * 0.05).collect();
        for activation in [Activation::Identity, Activation::Silu, Activation::Relu] {
            for level in levels() {
                let (mut value, mut slope) = (vec![0.0; x.len()], vec![0.0; x.len()]);
                both(level, activation, &x, &mut value, &mut slope);
                for (i, &x) in x.iter().enumerate() {
                    assert!((value[i] - activation.value(x)).abs() <= 1e-6 * x.abs().max(1e-3));
                    assert!((slope[i] - activation.derivative(x)).abs() <= 1e-6);
                    let difference = (activation.value(x + 0.01) - activation.value(x - 0.01)) / 0.02;
                    // f32 differences of values up to 40 over 0.02, and the curvature of SiLU.
                    assert!((difference - slope[i]).abs() < 1e-3, "{activation:?} at {x}");
                }
            }
        }
    }

    #[test]
    fn extremes_are_finite_and_nan_stays() {
        for level in levels() {
            let mut x = vec![0.0; 16];
            x[..4].copy_from_slice(&[-1e4, 1e4, f32::NAN, f32::MIN_POSITIVE]);
            for activation in [Activation::Silu, Activation::Relu] {
                let (mut value, mut slope) = (vec![0.0; 16], vec![0.0; 16]);
                both(level, activation, &x, &mut value, &mut slope);
                assert!(value[0].abs() < 1e-30 && value[1] == 1e4 && value[2].is_nan());
                assert!(slope[0].abs() < 1e-30 && slope[1] == 1.0);
            }
        }
    }
}
