use super::cpu::{backward, forward};
use crate::engine::rng::{Rng, Use};
use crate::engine::tensor::{Dst, Src, View};

#[test]
fn forward_copies_and_backward_is_its_transpose() {
    for (factor, h, w, c) in [(2, 3, 4, 5), (3, 1, 2, 17), (1, 2, 2, 1)] {
        let mut rng = Rng::new(1, Use::Test, 0, 0);
        let n = 2;
        let (xv, zv) = (View::new(0, n, h, w, c, 0), View::new(0, n, h * factor, w * factor, c, 0));
        let x: Vec<f32> = (0..xv.len()).map(|_| rng.normal() as f32).collect();
        let dz: Vec<f32> = (0..zv.len()).map(|_| rng.normal() as f32).collect();
        let mut z = vec![0.0; zv.len()];
        forward(Src::of(&x, xv), Dst::of(&mut z, zv), factor);
        assert_eq!(z[zv.at(1, h as isize * factor as isize - 1, 0)], x[xv.at(1, h as isize - 1, 0)]);
        let mut dx = vec![f32::NAN; xv.len()];
        backward(Src::of(&dz, zv), Dst::of(&mut dx, xv), factor, false);
        // <dz, up(x)> = <down(dz), x> for a linear map and its transpose.
        let dot =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        assert!((dot(&dz, &z) - dot(&dx, &x)).abs() < 1e-4);
        let first = dx.clone();
        backward(Src::of(&dz, zv), Dst::of(&mut dx, xv), factor, true);
        assert!(dx.iter().zip(&first).all(|(twice, once)| (twice - 2.0 * once).abs() < 1e-5));
    }
}

#[test]
fn the_device_does_as_the_cpu() {
    use super::cuda::UpsampleNearestKernels;
    use crate::engine::ops::cuda_testing::{Layout, Map, assert_close, normals, on_all, tolerance};
    on_all(|bench| {
        let kernels = UpsampleNearestKernels::load(&bench.device, bench.precision).expect("kernels");
        for (i, (factor, h, w, c, beyond)) in
            [(2, 3, 4, 5, 1), (3, 1, 2, 16, 8), (1, 2, 2, 1, 0), (2, 5, 3, 24, 0)].into_iter().enumerate()
        {
            let x_at = Layout::dense(2, h, w, c);
            let z_at = Layout::dense(2, h * factor, w * factor, c);
            let (x, dz) =
                (normals(bench.precision, 1, x_at.len(), 0.0), normals(bench.precision, 2, z_at.len(), 0.0));
            let (xv, zv) = (View::new(0, 2, h, w, c, 0), View::new(0, 2, z_at.h, z_at.w, c, 0));
            let [x32, dz32] = [&x, &dz].map(|v| v.iter().map(|x| *x as f32).collect::<Vec<f32>>());
            let start = if i % 2 == 0 { 1.0 } else { 0.0 };
            let (mut z, mut dx) = (vec![0.0f32; zv.len()], vec![start as f32; xv.len()]);
            forward(Src::of(&x32, xv), Dst::of(&mut z, zv), factor);
            backward(Src::of(&dz32, zv), Dst::of(&mut dx, xv), factor, true);
            let x_map = Map::of(bench, x_at.within(beyond, 0), &x);
            let z_map = Map::poisoned(bench, z_at.within(beyond, i % 2));
            let dz_map = Map::of(bench, z_at.within(beyond, 0), &dz);
            let dx_at = x_at.within(beyond, 0);
            let dx_map = if i % 2 == 0 {
                Map::of(bench, dx_at, &vec![1.0; xv.len()])
            } else {
                Map::poisoned(bench, dx_at)
            };
            // SAFETY: all live in this test and have the shapes said.
            unsafe {
                kernels.forward(&bench.stream, x_map.tensor(), z_map.tensor(), factor).expect("a launch");
                kernels
                    .backward(&bench.stream, dz_map.tensor(), dx_map.tensor(), factor, i % 2 == 0)
                    .expect("a launch");
            }
            let as_f64 = |v: &[f32]| v.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
            assert_eq!(z_map.read_written(bench, true), as_f64(&z));
            let got = if i % 2 == 0 { dx_map.read(bench) } else { dx_map.read_written(bench, false) };
            assert_close("dx", &got, &as_f64(&dx), tolerance(bench.precision), 1.0);
        }
    });
}
