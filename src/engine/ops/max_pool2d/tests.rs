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

#[test]
fn the_device_does_as_the_cpu() {
    use super::cuda::MaxPool2dKernels;
    use crate::engine::ops::cuda_testing::{Layout, Map, assert_close, normals, on_all, tolerance};
    // (kernel, stride, pad, n, h, w, c, channels beyond the slice)
    let cases = [
        (5, 1, 2, 2, 10, 7, 16, 8),
        (3, 2, 1, 1, 9, 6, 40, 0),
        (2, 2, 0, 2, 4, 4, 3, 1),
        (5, 1, 2, 1, 1, 2, 33, 0),
        (2, 1, 0, 1, 5, 3, 8, 3),
    ];
    on_all(|bench| {
        let kernels = MaxPool2dKernels::load(&bench.device, bench.precision).expect("kernels");
        for (i, (kernel, stride, pad, n, h, w, c, beyond)) in cases.into_iter().enumerate() {
            let window = Window { kernel, stride, pad };
            let out = |side: usize| (side + 2 * pad - kernel) / stride + 1;
            let (x_at, z_at) = (Layout::dense(n, h, w, c), Layout::dense(n, out(h), out(w), c));
            // Few distinct values, so that ties happen.
            let x: Vec<f64> =
                normals(bench.precision, 1, x_at.len(), 0.0).iter().map(|v| v.round()).collect();
            let dz = normals(bench.precision, 2, z_at.len(), 0.0);
            let (xv, zv) = (View::new(0, n, h, w, c, 0), View::new(0, n, z_at.h, z_at.w, c, 0));
            let [x32, dz32] = [&x, &dz].map(|v| v.iter().map(|x| *x as f32).collect::<Vec<f32>>());
            let (mut z, mut indices) = (vec![0.0f32; zv.len()], vec![0u8; zv.len()]);
            forward(Src::of(&x32, xv), Dst::of(&mut z, zv), window, Some(&mut indices));
            let start = if i % 2 == 0 { 1.0 } else { 0.0 };
            let mut dx = vec![start as f32; xv.len()];
            backward(Src::of(&dz32, zv), &indices, Dst::of(&mut dx, xv), window, true);

            let x_map = Map::of(bench, x_at.within(beyond, i % 2), &x);
            let z_map = Map::poisoned(bench, z_at.within(beyond, (i + 1) % 3));
            let kept = bench.device.allocate(zv.len()).expect("memory");
            let dz_map = Map::of(bench, z_at.within(beyond, 0), &dz);
            let dx_at = x_at.within(beyond, 0);
            let dx_map = if i % 2 == 0 {
                Map::of(bench, dx_at, &vec![1.0; xv.len()])
            } else {
                Map::poisoned(bench, dx_at)
            };
            // SAFETY: all live in this test and have the shapes said.
            unsafe {
                let (x, z) = (x_map.tensor(), z_map.tensor());
                kernels.forward(&bench.stream, x, z, window, Some(kept.pointer())).expect("a launch");
                let (dz, dx) = (dz_map.tensor(), dx_map.tensor());
                kernels
                    .backward(&bench.stream, dz, kept.pointer(), dx, window, i % 2 == 0)
                    .expect("a launch");
            }
            let mut got = vec![0u8; zv.len()];
            bench.stream.download(&kept, 0, &mut got).expect("a copy");
            assert_eq!(got, indices, "positions");
            let as_f64 = |v: &[f32]| v.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
            assert_eq!(z_map.read_written(bench, true), as_f64(&z));
            let got = if i % 2 == 0 { dx_map.read(bench) } else { dx_map.read_written(bench, false) };
            assert_close("dx", &got, &as_f64(&dx), tolerance(bench.precision), 1.0);
        }
    });
}

#[test]
fn the_device_hides_no_nan_either() {
    use super::cuda::MaxPool2dKernels;
    use crate::engine::ops::cuda_testing::{Layout, Map, on_all};
    on_all(|bench| {
        let kernels = MaxPool2dKernels::load(&bench.device, bench.precision).expect("kernels");
        let at = Layout::dense(1, 2, 2, 1);
        let window = Window { kernel: 3, stride: 1, pad: 1 };
        for (x, nan) in [([1.0, f64::NAN, 0.0, 5.0], true), ([f64::NEG_INFINITY; 4], false)] {
            let (x, z) = (Map::of(bench, at, &x), Map::poisoned(bench, at));
            let (dz, dx) = (Map::of(bench, at, &[1.0; 4]), Map::poisoned(bench, at));
            let kept = bench.device.allocate(4).expect("memory");
            // SAFETY: all live in this test and have the shapes said.
            unsafe {
                kernels
                    .forward(&bench.stream, x.tensor(), z.tensor(), window, Some(kept.pointer()))
                    .expect("a launch");
                kernels
                    .backward(&bench.stream, dz.tensor(), kept.pointer(), dx.tensor(), window, false)
                    .expect("a launch");
            }
            assert!(z.read(bench).iter().all(|v| v.is_nan() == nan));
            assert_eq!(dx.read(bench), if nan { [0.0, 4.0, 0.0, 0.0] } else { [4.0, 0.0, 0.0, 0.0] });
        }
    });
}
