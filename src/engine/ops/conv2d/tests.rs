//! Convolution against a plain f64 reference: every pass, level, border, slice and thread count.

use super::cpu::{self, Epilogue};
use super::*;
use crate::engine::activation::Activation;
use crate::engine::rng::{Rng, Use};
use crate::engine::simd::{Level, levels};
use crate::engine::tensor::{Dst, Src, View};

/// `f32` sums of up to a few thousand products of numbers in [-1, 1], relative to the sum of their
/// absolute values.
const TOLERANCE: f64 = 2e-6;
/// Marks memory that nobody may write; not a number, so that reading it shows as well.
const POISON: u32 = 0x7fc0_dead;

/// A case: sizes of the input, and how the views lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub p: Conv2dParams,
    pub n: usize,
    pub h: usize,
    pub w: usize,
    /// Channels of the parent buffers beyond the view, before and after it.
    pub beyond: usize,
}

/// A tensor in a poisoned buffer: border zero, neighbours not numbers.
struct Tensor {
    data: Vec<f32>,
    view: View,
}

impl Tensor {
    fn new(case: &Case, h: usize, w: usize, c: usize, border: usize) -> Tensor {
        let parent = c + 2 * case.beyond;
        let view = View::new(3, case.n, h, w, parent, border).slice(case.beyond, c);
        let len = 3 + View::storage_len(case.n, h, w, parent, border) + 5;
        let mut tensor = Tensor { data: vec![f32::from_bits(POISON); len], view };
        tensor.each(border, |_, value| *value = 0.0);
        tensor
    }

    /// All elements of the view, with `border` pixels around it.
    fn each(&mut self, border: usize, mut f: impl FnMut([usize; 4], &mut f32)) {
        let (v, b) = (self.view, border as isize);
        for n in 0..v.n {
            for y in -b..v.h as isize + b {
                for x in -b..v.w as isize + b {
                    let at = v.at(n, y, x);
                    for c in 0..v.c {
                        f([n, y as usize, x as usize, c], &mut self.data[at + c]);
                    }
                }
            }
        }
    }

    fn random(mut self, rng: &mut Rng) -> Tensor {
        self.each(0, |_, value| *value = rng.range(-1.0, 1.0) as f32);
        self
    }

    fn dense(&mut self) -> Vec<f64> {
        let mut values = Vec::new();
        self.each(0, |_, value| values.push(f64::from(*value)));
        values
    }

    /// Everything but the view's own elements.
    fn outside(&self) -> Vec<u32> {
        let mut copy = Tensor { data: self.data.clone(), view: self.view };
        copy.each(0, |_, value| *value = 0.0);
        copy.data.iter().map(|v| v.to_bits()).collect()
    }
}

/// Calls `f(output pixel, input pixel, tap, ..)` for every product inside the input.
fn products(case: &Case, mut f: impl FnMut(usize, usize, usize)) {
    let (p, h, w) = (&case.p, case.h, case.w);
    let (h_out, w_out) = p.output_size(h, w);
    for n in 0..case.n {
        for y in 0..h_out {
            for x in 0..w_out {
                for a in 0..p.kernel {
                    for b in 0..p.kernel {
                        let (i, j) = (y * p.stride + a, x * p.stride + b);
                        if i >= p.pad && j >= p.pad && i - p.pad < h && j - p.pad < w {
                            let input = (n * h + i - p.pad) * w + j - p.pad;
                            f((n * h_out + y) * w_out + x, input, a * p.kernel + b);
                        }
                    }
                }
            }
        }
    }
}

/// The three passes in f64: `y`, `dx`, `dw`, each with the sum of absolute products.
pub(super) struct Reference(pub [Vec<f64>; 3], pub [Vec<f64>; 3]);

pub(super) fn reference(case: &Case, x: &[f64], w: &[f64], dy: &[f64]) -> Reference {
    let (ci, co) = (case.p.c_in, case.p.c_out);
    let lens = [dy.len(), x.len(), w.len()];
    let (mut sums, mut sizes) = (lens.map(|n| vec![0.0; n]), lens.map(|n| vec![0.0; n]));
    products(case, |output, input, tap| {
        for i in 0..ci {
            for o in 0..co {
                let at = [output * co + o, input * ci + i, (tap * ci + i) * co + o];
                let terms = [x[at[1]] * w[at[2]], dy[at[0]] * w[at[2]], x[at[1]] * dy[at[0]]];
                for k in 0..3 {
                    sums[k][at[k]] += terms[k];
                    sizes[k][at[k]] += terms[k].abs();
                }
            }
        }
    });
    Reference(sums, sizes)
}

fn close(what: &str, case: &Case, level: Level, got: &[f64], want: &[f64], size: &[f64]) {
    assert_eq!(got.len(), want.len());
    for i in 0..got.len() {
        let limit = TOLERANCE * (1.0 + size[i]);
        let error = (got[i] - want[i]).abs();
        // Written so that NaN fails.
        assert!(error <= limit, "{what} {} {case:?} at {i}: {} for {}", level.name(), got[i], want[i]);
    }
}

/// Inputs of a case and everything the passes made of them.
struct Run {
    x: Tensor,
    dy: Tensor,
    weight: Vec<f32>,
    y: Tensor,
    dx: Tensor,
    dweight: Vec<f32>,
    dbias: Vec<f32>,
    mean: Vec<f32>,
    var: Vec<f32>,
}

/// Runs every pass with statistics. `dx` starts at one and is added to when `accumulate`.
fn run(level: Level, case: &Case, accumulate: bool) -> Run {
    let p = &case.p;
    let mut rng = Rng::new(7, Use::Test, case.h as u32, case.w as u32);
    let (h_out, w_out) = p.output_size(case.h, case.w);
    let x = Tensor::new(case, case.h, case.w, p.c_in, p.pad).random(&mut rng);
    let dy = Tensor::new(case, h_out, w_out, p.c_out, p.gradient_border()).random(&mut rng);
    let weight: Vec<f32> = (0..p.weight_len()).map(|_| rng.range(-1.0, 1.0) as f32).collect();
    let mut y = Tensor::new(case, h_out, w_out, p.c_out, 1);
    y.each(0, |_, value| *value = f32::NAN);
    let mut dx = Tensor::new(case, case.h, case.w, p.c_in, 1);
    dx.each(0, |_, value| *value = if accumulate { 1.0 } else { f32::NAN });
    let (y_outside, dx_outside) = (y.outside(), dx.outside());

    let mut packed = vec![f32::NAN; p.packed_forward_len()];
    cpu::pack_forward_at(level, p, &weight, &mut packed);
    let mut partials = vec![f64::NAN; cpu::stats_partials_len(p, case.n, h_out, w_out)];
    let epilogue = Epilogue::Stats { partials: &mut partials };
    cpu::forward_at(level, p, Src::of(&x.data, x.view), &packed, Dst::of(&mut y.data, y.view), epilogue);
    let (mut mean, mut var) = (vec![f32::NAN; p.c_out], vec![f32::NAN; p.c_out]);
    cpu::finish_stats(p, case.n, h_out, w_out, &partials, &mut mean, &mut var);

    let mut packed = vec![f32::NAN; p.packed_backward_len()];
    cpu::pack_backward_at(level, p, &weight, &mut packed);
    let target = Dst::of(&mut dx.data, dx.view);
    cpu::backward_data_at(level, p, Src::of(&dy.data, dy.view), &packed, target, accumulate);

    let mut dweight = vec![1.0; p.weight_len()];
    let mut workspace = vec![f32::NAN; p.backward_weight_workspace_len(case.n, h_out, w_out)];
    let (from, gradient) = (Src::of(&x.data, x.view), Src::of(&dy.data, dy.view));
    cpu::backward_weight_at(level, p, from, gradient, &mut dweight, &mut workspace);
    let mut dbias = vec![1.0; p.c_out];
    cpu::backward_bias_at(level, p, Src::of(&dy.data, dy.view), &mut dbias);

    assert_eq!(y_outside, y.outside(), "forward wrote outside of its output: {case:?}");
    assert_eq!(dx_outside, dx.outside(), "data gradient wrote outside of its output: {case:?}");
    Run { x, dy, weight, y, dx, dweight, dbias, mean, var }
}

fn check(level: Level, case: &Case, accumulate: bool) {
    let mut r = run(level, case, accumulate);
    let weight: Vec<f64> = r.weight.iter().map(|&v| f64::from(v)).collect();
    let dy = r.dy.dense();
    let Reference([y, mut dx, mut dw], sizes) = reference(case, &r.x.dense(), &weight, &dy);
    close("forward", case, level, &r.y.dense(), &y, &sizes[0]);
    if accumulate {
        dx.iter_mut().for_each(|v| *v += 1.0);
    }
    close("data gradient", case, level, &r.dx.dense(), &dx, &sizes[1]);
    dw.iter_mut().for_each(|v| *v += 1.0);
    let got: Vec<f64> = r.dweight.iter().map(|&v| f64::from(v)).collect();
    close("weight gradient", case, level, &got, &dw, &sizes[2]);

    let (co, pixels) = (case.p.c_out, (dy.len() / case.p.c_out) as f64);
    let y = r.y.dense();
    for c in 0..co {
        let channel = |of: &[f64]| of.iter().skip(c).step_by(co).copied().collect::<Vec<f64>>();
        let bias: f64 = 1.0 + channel(&dy).iter().sum::<f64>();
        assert!((f64::from(r.dbias[c]) - bias).abs() < 1e-5 * (1.0 + pixels.sqrt()), "bias of {case:?}");
        let mean = channel(&y).iter().sum::<f64>() / pixels;
        let var = channel(&y).iter().map(|v| (v - mean).powi(2)).sum::<f64>() / pixels;
        assert!((f64::from(r.mean[c]) - mean).abs() <= 1e-6 * (mean.abs() + var.sqrt() + 1e-6));
        assert!((f64::from(r.var[c]) - var).abs() <= 3e-6 * (var + 1e-6), "{} {var} {case:?}", r.var[c]);
    }
}

pub(super) fn case(
    c: (usize, usize),
    kernel: usize,
    stride: usize,
    size: (usize, usize, usize),
    beyond: usize,
) -> Case {
    let pad = if kernel == 2 { 0 } else { kernel / 2 };
    let p = Conv2dParams { c_in: c.0, c_out: c.1, kernel, stride, pad };
    Case { p, n: size.0, h: size.1, w: size.2, beyond }
}

/// Shapes of every kind the networks have, and odd ones.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for c_out in [1, 3, 16, 17, 80, 144] {
        cases.push(case((3, c_out), 3, 2, (2, 13, 10), 0));
        cases.push(case((16, c_out), 3, 1, (1, 5, 13), 8));
        cases.push(case((24, c_out), 1, 1, (2, 7, 9), 0));
    }
    for c_in in [1, 5, 16, 33, 80, 100] {
        cases.push(case((c_in, 19), 3, 1, (1, 6, 11), 0));
        cases.push(case((c_in, 20), 3, 2, (1, 7, 12), 3));
    }
    for kernel in [1, 2, 3, 5, 7] {
        for stride in [1, 2] {
            cases.push(case((7, 18), kernel, stride, (2, 11, 9), 0));
            cases.push(case((16, 32), kernel, stride, (1, 10, 14), 4));
        }
    }
    cases.push(case((8, 8), 3, 1, (3, 1, 1), 0));
    cases.push(case((8, 8), 3, 2, (3, 1, 1), 1));
    cases.push(case((4, 6), 3, 3, (1, 10, 10), 0));
    cases.push(case((2, 3), 3, 1, (1, 3, 333), 0));
    cases.push(case((16, 16), 3, 1, (3, 40, 40), 0));
    cases
}

#[test]
fn all_passes_agree_with_the_reference_on_every_level() {
    for level in levels() {
        for (i, case) in cases().iter().enumerate() {
            check(level, case, i % 2 == 1);
        }
    }
}

#[test]
fn large_weights_are_cut_by_channels() {
    for level in levels() {
        check(level, &case((96, 320), 3, 1, (2, 4, 5), 0), true);
        check(level, &case((320, 112), 3, 2, (1, 6, 4), 0), false);
    }
}

#[test]
fn results_are_the_same_bits_for_any_number_of_threads() {
    for case in [case((16, 24), 3, 1, (3, 40, 41), 0), case((96, 320), 3, 1, (2, 10, 10), 2)] {
        let bits = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            let r = pool.install(|| run(crate::engine::simd::level(), &case, true));
            [r.y.data, r.dx.data, r.dweight, r.dbias, r.mean, r.var]
                .map(|values| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
        };
        let one = bits(1);
        assert!(one == bits(2), "two threads: {case:?}");
        assert!(one == bits(5), "five threads: {case:?}");
    }
}

#[test]
fn weight_gradient_adds_and_statistics_survive_a_large_mean() {
    let case = case((4, 20), 1, 1, (2, 40, 40), 0);
    for level in levels() {
        let mut x = Tensor::new(&case, 40, 40, 4, 0);
        // One input channel is a constant of 1000, the others small: mean 1000 w, deviation about 0.3.
        let mut rng = Rng::new(1, Use::Test, 0, 0);
        x.each(0, |at, value| *value = if at[3] == 0 { 1000.0 } else { rng.range(-0.5, 0.5) as f32 });
        let weight: Vec<f32> = (0..80).map(|i| if i < 20 { 1.0 } else { 0.5 }).collect();
        let mut packed = vec![0.0; case.p.packed_forward_len()];
        cpu::pack_forward_at(level, &case.p, &weight, &mut packed);
        let mut y = Tensor::new(&case, 40, 40, 20, 0);
        let mut partials = vec![0.0; cpu::stats_partials_len(&case.p, 2, 40, 40)];
        let (from, to) = (Src::of(&x.data, x.view), Dst::of(&mut y.data, y.view));
        cpu::forward_at(level, &case.p, from, &packed, to, Epilogue::Stats { partials: &mut partials });
        let (mut mean, mut var) = (vec![0.0; 20], vec![0.0; 20]);
        cpu::finish_stats(&case.p, 2, 40, 40, &partials, &mut mean, &mut var);
        let values: Vec<f64> = y.dense().into_iter().skip(7).step_by(20).collect();
        let want = values.iter().sum::<f64>() / 3200.0;
        let spread = values.iter().map(|v| (v - want).powi(2)).sum::<f64>() / 3200.0;
        assert!((f64::from(mean[7]) - want).abs() < 1e-4, "{} {want}", mean[7]);
        assert!((f64::from(var[7]) / spread - 1.0).abs() < 1e-5, "{} {spread}", var[7]);
    }
}

#[test]
fn epilogues_follow_their_formulas() {
    let case = case((8, 37), 3, 1, (2, 6, 21), 5);
    let (p, mut rng) = (&case.p, Rng::new(3, Use::Test, 0, 0));
    let mut draw = |len: usize| (0..len).map(|_| rng.range(-1.0, 1.0) as f32).collect::<Vec<f32>>();
    let (weight, scale, shift) = (draw(p.weight_len()), draw(37), draw(37));
    let mut rng = Rng::new(4, Use::Test, 0, 0);
    let x = Tensor::new(&case, 6, 21, 8, 1).random(&mut rng);
    let mut residual = Tensor::new(&case, 6, 21, 37, 2).random(&mut rng);
    for level in levels() {
        let mut packed = vec![0.0; p.packed_forward_len()];
        cpu::pack_forward_at(level, p, &weight, &mut packed);
        let run = |epilogue: Epilogue| {
            let mut y = Tensor::new(&case, 6, 21, 37, 1);
            let outside = y.outside();
            let to = Dst::of(&mut y.data, y.view);
            cpu::forward_at(level, p, Src::of(&x.data, x.view), &packed, to, epilogue);
            assert_eq!(outside, y.outside());
            y.dense()
        };
        let raw = run(Epilogue::Raw);
        for (i, y) in run(Epilogue::Bias { bias: &shift }).into_iter().enumerate() {
            assert!((y - raw[i] - f64::from(shift[i % 37])).abs() < 1e-6);
        }
        let added = residual.dense();
        for activation in [Activation::Identity, Activation::Silu, Activation::Relu] {
            for with_residual in [false, true] {
                let source = with_residual.then(|| Src::of(&residual.data, residual.view));
                let (scale, shift) = (&scale[..], &shift[..]);
                let got = run(Epilogue::Apply { scale, shift, activation, residual: source });
                for (i, y) in got.into_iter().enumerate() {
                    let z = raw[i] * f64::from(scale[i % 37]) + f64::from(shift[i % 37]);
                    let want =
                        f64::from(activation.value(z as f32)) + if with_residual { added[i] } else { 0.0 };
                    assert!((y - want).abs() < 3e-6 * (1.0 + want.abs()), "{activation:?} {y} {want}");
                }
            }
        }
    }
}

#[test]
fn the_reference_itself_agrees_with_finite_differences() {
    let case = case((3, 4), 3, 2, (1, 5, 6), 0);
    let mut rng = Rng::new(5, Use::Test, 0, 0);
    let (h, w) = case.p.output_size(5, 6);
    let mut draw = |len: usize| (0..len).map(|_| rng.range(-1.0, 1.0)).collect::<Vec<f64>>();
    let (x, weight, dy) = (draw(90), draw(case.p.weight_len()), draw(h * w * 4));
    // The loss is sum(dy * y), so its gradient at y is dy.
    let loss = |x: &[f64], weight: &[f64]| -> f64 {
        reference(&case, x, weight, &dy).0[0].iter().zip(&dy).map(|(y, d)| y * d).sum()
    };
    let Reference([_, dx, dw], _) = reference(&case, &x, &weight, &dy);
    for i in (0..x.len()).step_by(7) {
        let (mut up, mut down) = (x.clone(), x.clone());
        (up[i], down[i]) = (x[i] + 1e-3, x[i] - 1e-3);
        let slope = (loss(&up, &weight) - loss(&down, &weight)) / 2e-3;
        assert!((slope - dx[i]).abs() < 1e-9 * (1.0 + slope.abs()));
    }
    for i in (0..weight.len()).step_by(5) {
        let (mut up, mut down) = (weight.clone(), weight.clone());
        (up[i], down[i]) = (weight[i] + 1e-3, weight[i] - 1e-3);
        let slope = (loss(&x, &up) - loss(&x, &down)) / 2e-3;
        assert!((slope - dw[i]).abs() < 1e-9 * (1.0 + slope.abs()));
    }
}

#[test]
fn sizes_and_costs() {
    let p = Conv2dParams { c_in: 16, c_out: 20, kernel: 3, stride: 2, pad: 1 };
    assert_eq!(p.output_size(9, 320), (5, 160));
    assert_eq!(p.weight_len(), 2880);
    assert_eq!(p.macs(2, 9, 320), 2 * 5 * 160 * 2880);
    assert_eq!(p.packed_forward_len(), 9 * 16 * 32);
    assert_eq!(p.packed_backward_len(), 9 * 20 * 16);
    // A small map needs no partial sums, a large one many, none of them more than 4 MiB together.
    assert_eq!(p.backward_weight_workspace_len(1, 5, 5), 0);
    assert_eq!(p.backward_weight_workspace_len(8, 80, 80) % p.weight_len(), 0);
    let wide = Conv2dParams { c_in: 512, c_out: 512, ..p };
    assert!(wide.backward_weight_workspace_len(64, 80, 80) <= 1 << 20);
}

#[test]
#[should_panic(expected = "border of 0")]
fn an_input_without_its_border_is_refused() {
    let case = case((4, 4), 3, 1, (1, 4, 4), 0);
    let x = Tensor::new(&case, 4, 4, 4, 0);
    let mut y = Tensor::new(&case, 4, 4, 4, 0);
    let packed = vec![0.0; case.p.packed_forward_len()];
    cpu::forward(&case.p, Src::of(&x.data, x.view), &packed, Dst::of(&mut y.data, y.view), Epilogue::Raw);
}
