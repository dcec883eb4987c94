use super::cpu::{Window, backward, forward};
use crate::engine::rng::{Rng, Use};
use crate::engine::tensor::{Dst, Src, View};

/// Naive reference: value and first position of the maximum.
fn naive(x: &[f32], v: View, n: usize, y: usize, column: usize, c: usize, window: Window) -> (f32, usize) {
    let mut best = (f32::NEG_INFINITY, usize::MAX);
    for ky in 0..window.kernel {
        for kx in 0..window.kernel {
            let sy = (y * window.stride + ky) as isize - window.pad as isize;
            let sx = (column * window.stride + kx) as isize - window.pad as isize;
            if sy >= 0 && sx >= 0 && (sy as usize) < v.h && (sx as usize) < v.w {
                let at = v.at(n, sy, sx) + c;
                if x[at] > best.0 || best.1 == usize::MAX {
                    best = (x[at], at);
                }
            }
        }
    }
    best
}

#[test]
fn matches_the_naive_form_both_ways() {
    let cases = [
        (5, 1, 2, 10, 7, 5),
        (3, 2, 1, 9, 6, 40),
        (2, 2, 0, 4, 4, 3),
        (5, 1, 2, 1, 2, 33),
        (2, 1, 0, 5, 3, 1),
    ];
    for (kernel, stride, pad, h, w, c) in cases {
        let window = Window { kernel, stride, pad };
        let mut rng = Rng::new(3, Use::Test, 0, 0);
        let n = 2;
        let xv = View::new(0, n, h, w, c, 0);
        let out = |side: usize| (side + 2 * pad - kernel) / stride + 1;
        let zv = View::new(0, n, out(h), out(w), c, 0);
        // Few distinct values, so that ties happen.
        let x: Vec<f32> = (0..xv.len()).map(|_| rng.below(6) as f32 - 3.0).collect();
        let dz: Vec<f32> = (0..zv.len()).map(|_| rng.below(9) as f32).collect();
        let (mut z, mut indices, mut dx) = (vec![0.0; zv.len()], vec![0; zv.len()], vec![1.0; xv.len()]);
        forward(Src::of(&x, xv), Dst::of(&mut z, zv), window, Some(&mut indices));
        backward(Src::of(&dz, zv), &indices, Dst::of(&mut dx, xv), window, false);
        let mut expected = vec![0.0; xv.len()];
        for i in 0..zv.len() {
            let (pixel, channel) = (i / c, i % c);
            let (image, y, column) = (pixel / (zv.h * zv.w), pixel / zv.w % zv.h, pixel % zv.w);
            let (value, at) = naive(&x, xv, image, y, column, channel, window);
            assert_eq!(z[i], value);
            expected[at] += dz[i];
        }
        assert_eq!(dx, expected);
        backward(Src::of(&dz, zv), &indices, Dst::of(&mut dx, xv), window, true);
        assert!(dx.iter().zip(&expected).all(|(twice, once)| *twice == 2.0 * once));
    }
}

#[test]
fn a_nan_is_not_hidden_and_minus_infinity_has_a_place() {
    let window = Window { kernel: 3, stride: 1, pad: 1 };
    let v = View::new(0, 1, 2, 2, 1, 0);
    let (mut z, mut indices) = (vec![0.0; 4], vec![0; 4]);
    forward(Src::of(&[1.0, f32::NAN, 0.0, 5.0], v), Dst::of(&mut z, v), window, Some(&mut indices));
    assert!(z.iter().all(|v| v.is_nan()));
    let x = [f32::NEG_INFINITY; 4];
    forward(Src::of(&x, v), Dst::of(&mut z, v), window, Some(&mut indices));
    let mut dx = vec![0.0; 4];
    backward(Src::of(&[1.0; 4], v), &indices, Dst::of(&mut dx, v), window, false);
    assert_eq!(dx, [4.0, 0.0, 0.0, 0.0]);
}
