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
