//! Every level against scalar arithmetic.

use super::*;

#[inline(always)]
fn map_body<S: Simd>(s: S, which: usize, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    let mut i = 0;
    while i < x.len() {
        let n = S::LANES.min(x.len() - i);
        // SAFETY: lanes i..i + n lie in both slices.
        unsafe {
            let v = s.load_partial(x.as_ptr().add(i), n);
            let v = match which {
                0 => s.exp(v),
                1 => s.sigmoid(v),
                2 => s.select_positive(v, v, s.mul(v, s.splat(2.0))),
                3 => s.round(v),
                4 => s.fma(v, v, s.splat(3.0)),
                5 => s.fnma(v, v, s.splat(3.0)),
                6 => s.min(s.splat(1.0), s.max(s.splat(-1.0), v)),
                _ => s.sqrt(s.mul(v, v)),
            };
            s.store_partial(y.as_mut_ptr().add(i), v, n);
        }
        i += n;
    }
}

crate::simd_dispatch! {
    fn map(which: usize, x: &[f32], y: &mut [f32]) = map_body;
}

struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        assert!(self.0.len() >= S::LANES);
        // SAFETY: LANES floats lie in the slice.
        unsafe { s.sum(s.load(self.0.as_ptr())) }
    }
}

fn expected(which: usize, x: f64) -> f64 {
    match which {
        0 => x.exp(),
        1 => 1.0 / (1.0 + (-x).exp()),
        2 => {
            if x > 0.0 {
                x
            } else {
                2.0 * x
            }
        }
        3 => x.round_ties_even(),
        4 => x * x + 3.0,
        5 => 3.0 - x * x,
        6 => x.clamp(-1.0, 1.0),
        _ => x.abs(),
    }
}

#[test]
fn operations_agree_with_scalars_on_every_level() {
    // 17 * 101 values, so that the last vector is ragged; halves included for the ties of `round`.
    let x: Vec<f32> = (0..1717).map(|i| (i as f32 - 858.0) * 0.1).chain([0.5, 1.5, -2.5]).collect();
    for level in levels() {
        for which in 0..8 {
            let mut y = vec![f32::NAN; x.len()];
            map(level, which, &x, &mut y);
            for (&x, &y) in x.iter().zip(&y) {
                let want = expected(which, x as f64);
                let error = (y as f64 - want).abs() / want.abs().max(1e-30);
                // Without a fused multiply-add, 3 - x^2 may cancel.
                let limit = if which == 5 { 1e-5 } else { 2.5e-7 };
                assert!(error < limit, "{} op {which} x {x}: {y} != {want}", level.name());
            }
        }
    }
}

#[test]
fn exp_saturates_and_keeps_nan() {
    for level in levels() {
        let mut y = [0.0; 4];
        map(level, 0, &[-1e9, 1e9, f32::NAN, 0.0], &mut y);
        assert!(y[0] > 0.0 && y[0] < 2e-38, "{y:?}");
        assert!(y[1].is_finite() && y[1] > 2e38, "{y:?}");
        assert!(y[2].is_nan() && y[3] == 1.0, "{y:?}");
    }
}

#[test]
fn partial_moves_leave_the_rest_alone() {
    for level in levels() {
        for n in 1..=level.lanes() {
            let x: Vec<f32> = (1..=n).map(|i| i as f32).collect();
            let mut y = vec![-7.0; n + 16];
            map(level, 2, &x, &mut y[..n]);
            assert_eq!(&y[..n], &x[..]);
            assert!(y[n..].iter().all(|&v| v == -7.0), "{}", level.name());
        }
    }
}

#[test]
fn sum_counts_every_lane_once() {
    let x: Vec<f32> = (0..16).map(|i| (1 << i) as f32).collect();
    for level in levels() {
        assert_eq!(level.call(Sum(&x)), ((1u32 << level.lanes()) - 1) as f32);
    }
}
