use super::*;
use crate::engine::activation::Activation;
use crate::engine::rng::{Rng, Use};
use crate::engine::tensor::{Dst, Src, View};

/// One case with everything in `f64`.
struct Case {
    n: usize,
    h: usize,
    w: usize,
    c: usize,
    y: Vec<f64>,
    dz: Vec<f64>,
    weight: Vec<f64>,
    bias: Vec<f64>,
    activation: Activation,
}

const EPS: f64 = 1e-3;

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn value(a: Activation, x: f64) -> f64 {
    match a {
        Activation::Identity => x,
        Activation::Silu => x * sigmoid(x),
        Activation::Relu => x.max(0.0),
    }
}

impl Case {
    fn new(n: usize, h: usize, w: usize, c: usize, activation: Activation) -> Case {
        let mut rng = Rng::new(11, Use::Test, 0, c as u32);
        let mut many =
            |len: usize, mean: f64| (0..len).map(|_| f64::from((mean + rng.normal()) as f32)).collect();
        let len = n * h * w * c;
        Case {
            n,
            h,
            w,
            c,
            y: many(len, 2.0),
            dz: many(len, 0.0),
            weight: many(c, 1.0),
            bias: many(c, 0.0),
            activation,
        }
    }

    fn statistics(&self, y: &[f64], c: usize) -> (f64, f64) {
        let channel = || y.iter().skip(c).step_by(self.c);
        let count = (self.n * self.h * self.w) as f64;
        let mean = channel().sum::<f64>() / count;
        (mean, channel().map(|v| (v - mean).powi(2)).sum::<f64>() / count)
    }

    /// The naive forward pass.
    fn forward(&self, y: &[f64], weight: &[f64], bias: &[f64]) -> Vec<f64> {
        let stats: Vec<(f64, f64)> = (0..self.c).map(|c| self.statistics(y, c)).collect();
        y.iter()
            .enumerate()
            .map(|(i, v)| {
                let (mean, var) = stats[i % self.c];
                value(
                    self.activation,
                    (v - mean) / (var + EPS).sqrt() * weight[i % self.c] + bias[i % self.c],
                )
            })
            .collect()
    }

    fn loss(&self, y: &[f64], weight: &[f64], bias: &[f64]) -> f64 {
        self.forward(y, weight, bias).iter().zip(&self.dz).map(|(z, d)| z * d).sum()
    }
}

fn f32s(v: &[f64]) -> Vec<f32> {
    v.iter().map(|x| *x as f32).collect()
}

/// Runs both passes: (z, dy, dweight, dbias).
fn run(case: &Case, threads: usize) -> (Vec<f32>, Vec<f32>, Vec<f64>, Vec<f64>) {
    let (n, h, w, c) = (case.n, case.h, case.w, case.c);
    let view = View::new(0, n, h, w, c, 0);
    // `z` is a slice of a wider, bordered buffer, `dy` has a border.
    let wide = View::new(0, n, h, w, c + 3, 1).slice(2, c);
    let bordered = View::new(0, n, h, w, c, 1);
    let stats: Vec<(f64, f64)> = (0..c).map(|ch| case.statistics(&case.y, ch)).collect();
    let mean: Vec<f32> = stats.iter().map(|s| s.0 as f32).collect();
    let mut inverse = vec![0.0; c];
    inverse_deviation(&stats.iter().map(|s| s.1 as f32).collect::<Vec<_>>(), EPS as f32, &mut inverse);
    let (weight, bias) = (f32s(&case.weight), f32s(&case.bias));
    let norm = Norm {
        mean: &mean,
        inverse_deviation: &inverse,
        weight: &weight,
        bias: &bias,
        activation: case.activation,
    };
    let (y, dz) = (f32s(&case.y), f32s(&case.dz));
    let mut z = vec![-9.0; View::storage_len(n, h, w, c + 3, 1)];
    let mut dy = vec![-9.0; View::storage_len(n, h, w, c, 1)];
    let mut partials = vec![0.0; cpu::partials_len(n, h, w, c)];
    let mut shortcut = vec![1.0; view.len()];
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    pool.install(|| {
        cpu::forward(Src::of(&y, view), &norm, Some(Src::of(&y, view)), Dst::of(&mut z, wide));
        let add = Some((Dst::of(&mut shortcut, view), true));
        let (y, dz) = (Src::of(&y, view), Src::of(&dz, view));
        cpu::backward(y, dz, &norm, true, &mut partials, Dst::of(&mut dy, bordered), add);
    });
    assert!(shortcut.iter().zip(&dz).all(|(s, d)| *s == 1.0 + d), "the shortcut gets dz on top");
    let touched = z.iter().filter(|v| **v != -9.0).count();
    assert_eq!(touched, view.len(), "only the slice is written");
    let dense = |buffer: &[f32], v: View| -> Vec<f32> {
        (0..n * h * w)
            .flat_map(|p| {
                let at = v.at(p / (h * w), (p / w % h) as isize, (p % w) as isize);
                buffer[at..at + c].to_vec()
            })
            .collect()
    };
    (dense(&z, wide), dense(&dy, bordered), partials[c..2 * c].to_vec(), partials[..c].to_vec())
}

fn close(got: f64, want: f64, tolerance: f64, what: &str) {
    assert!((got - want).abs() <= tolerance * (1.0 + want.abs()), "{what}: {got} against {want}");
}

#[test]
fn agrees_with_the_naive_form_and_finite_differences() {
    let shapes = [(2, 3, 5, 1), (1, 4, 4, 7), (3, 2, 3, 16), (2, 5, 3, 80), (1, 3, 3, 67), (2, 1, 1, 33)];
    for (n, h, w, c) in shapes {
        for activation in [Activation::Silu, Activation::Identity] {
            let case = Case::new(n, h, w, c, activation);
            let (z, dy, dweight, dbias) = run(&case, 2);
            let naive = case.forward(&case.y, &case.weight, &case.bias);
            for (i, want) in naive.iter().enumerate() {
                close(f64::from(z[i]), want + case.y[i], 3e-6, "z");
            }
            let step = 1e-4;
            for i in (0..dy.len()).step_by(1 + dy.len() / 23) {
                let mut y = case.y.clone();
                y[i] += step;
                let up = case.loss(&y, &case.weight, &case.bias);
                y[i] -= 2.0 * step;
                let slope = (up - case.loss(&y, &case.weight, &case.bias)) / (2.0 * step);
                close(f64::from(dy[i]), slope, 2e-5, "dy");
            }
            for ch in (0..c).step_by(1 + c / 7) {
                for (of_bias, got) in [(false, dweight[ch]), (true, dbias[ch])] {
                    let slope = |sign: f64| {
                        let (mut weight, mut bias) = (case.weight.clone(), case.bias.clone());
                        (if of_bias { &mut bias } else { &mut weight })[ch] += sign * step;
                        case.loss(&case.y, &weight, &bias)
                    };
                    close(got, (slope(1.0) - slope(-1.0)) / (2.0 * step), 2e-5, "dweight, dbias");
                }
            }
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let case = Case::new(3, 40, 37, 24, Activation::Silu);
    let (z, dy, dweight, dbias) = run(&case, 1);
    for threads in [2, 5] {
        let other = run(&case, threads);
        assert!(z == other.0 && dy == other.1 && dweight == other.2 && dbias == other.3, "{threads} threads");
    }
}

#[test]
fn frozen_statistics_scale_the_gradient_only() {
    let view = View::new(0, 1, 2, 2, 2, 0);
    let (y, dz) = ([0.5; 8], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    let norm = Norm {
        mean: &[0.0; 2],
        inverse_deviation: &[2.0, 0.5],
        weight: &[3.0, 4.0],
        bias: &[0.0; 2],
        activation: Activation::Identity,
    };
    let (mut dy, mut partials) = ([0.0; 8], vec![7.0; cpu::partials_len(1, 2, 2, 2)]);
    cpu::backward(
        Src::of(&y, view),
        Src::of(&dz, view),
        &norm,
        false,
        &mut partials,
        Dst::of(&mut dy, view),
        None,
    );
    assert_eq!(dy, [6.0, 4.0, 18.0, 8.0, 30.0, 12.0, 42.0, 16.0]);
}

#[test]
fn folding_and_running_statistics() {
    let (mut scale, mut shift) = ([0.0], [0.0]);
    fold(&[2.0], &[1.0], &[3.0], &[3.0], 1.0, &mut scale, &mut shift);
    assert_eq!((scale, shift), ([1.0], [-2.0]));
    let mut running = [1.0];
    update_running(&mut running, &[3.0], 0.25, 2.0);
    assert_eq!(running, [0.75 + 0.25 * 6.0]);
}
