use super::*;
use crate::engine::ops::cuda_testing::{
    Bench, Floats, Layout, Map, assert_close, normals, on_all, tolerance,
};

const EPS: f64 = 1e-3;

fn sigmoid(u: f64) -> f64 {
    1.0 / (1.0 + (-u).exp())
}

fn value(a: Activation, u: f64) -> f64 {
    match a {
        Activation::Identity => u,
        Activation::Silu => u * sigmoid(u),
        Activation::Relu => u.max(0.0),
    }
}

fn derivative(a: Activation, u: f64) -> f64 {
    match a {
        Activation::Identity => 1.0,
        Activation::Silu => sigmoid(u) * (1.0 + u * (1.0 - sigmoid(u))),
        Activation::Relu => f64::from(u > 0.0),
    }
}

/// A normalisation and its data, on the device and here.
struct Case {
    y: Vec<f64>,
    dz: Vec<f64>,
    residual: Vec<f64>,
    mean: Vec<f64>,
    inverse: Vec<f64>,
    weight: Vec<f64>,
    bias: Vec<f64>,
    device: [Floats; 3],
    activation: Activation,
}

fn as_f32(values: Vec<f64>) -> Vec<f64> {
    values.into_iter().map(|v| f64::from(v as f32)).collect()
}

impl Case {
    fn new(bench: &Bench, at: Layout, activation: Activation) -> Case {
        let p = bench.precision;
        let y = normals(p, 1, at.len(), 1.5);
        let count = (at.len() / at.c) as f64;
        let channel = |c: usize| y.iter().skip(c).step_by(at.c);
        let mean: Vec<f64> = as_f32((0..at.c).map(|c| channel(c).sum::<f64>() / count).collect());
        let variance = |c: usize| channel(c).map(|v| (v - mean[c]).powi(2)).sum::<f64>() / count;
        let inverse: Vec<f64> = as_f32((0..at.c).map(|c| 1.0 / (variance(c) + EPS).sqrt()).collect());
        let weight = as_f32(normals(p, 2, at.c, 1.0));
        let bias = as_f32(normals(p, 3, at.c, 0.0));
        let stats: Vec<f64> = mean.iter().chain(&inverse).copied().collect();
        let device = [&stats, &weight, &bias].map(|v| Floats::of(bench, v));
        let (dz, residual) = (normals(p, 4, at.len(), 0.0), normals(p, 5, at.len(), 0.0));
        Case { y, dz, residual, mean, inverse, weight, bias, device, activation }
    }

    fn norm(&self) -> NormPointers {
        let [stats, weight, bias] = &self.device;
        NormPointers {
            stats: stats.pointer(),
            weight: weight.pointer(),
            bias: bias.pointer(),
            activation: self.activation,
        }
    }

    fn xhat(&self, i: usize) -> f64 {
        let c = i % self.mean.len();
        (self.y[i] - self.mean[c]) * self.inverse[c]
    }

    fn u(&self, i: usize) -> f64 {
        let c = i % self.mean.len();
        self.xhat(i) * self.weight[c] + self.bias[c]
    }

    fn z(&self) -> Vec<f64> {
        (0..self.y.len()).map(|i| value(self.activation, self.u(i)) + self.residual[i]).collect()
    }

    /// (dy, dweight, dbias).
    fn gradients(&self, batch_statistics: bool) -> [Vec<f64>; 3] {
        let c = self.mean.len();
        let (mut dweight, mut dbias) = (vec![0.0; c], vec![0.0; c]);
        let d: Vec<f64> =
            (0..self.y.len()).map(|i| self.dz[i] * derivative(self.activation, self.u(i))).collect();
        for (i, d) in d.iter().enumerate() {
            dbias[i % c] += d;
            dweight[i % c] += d * self.xhat(i);
        }
        let count = (self.y.len() / c) as f64;
        let dy = (0..d.len()).map(|i| {
            let k = i % c;
            let means = (dbias[k] + self.xhat(i) * dweight[k]) / count;
            self.weight[k] * self.inverse[k] * (d[i] - if batch_statistics { means } else { 0.0 })
        });
        [dy.collect(), dweight, dbias]
    }
}

/// Shapes and the channels beyond a slice: multiples of eight take the vector path.
const SHAPES: [([usize; 4], usize); 7] = [
    ([2, 3, 5, 1], 0),
    ([1, 4, 4, 7], 2),
    ([3, 7, 9, 16], 8),
    ([1, 13, 11, 24], 0),
    ([2, 1, 1, 40], 3),
    ([1, 2, 3, 520], 8),
    ([1, 1, 37, 80], 16),
];

#[test]
fn both_passes_agree_with_the_naive_form_on_the_device() {
    on_all(|bench| {
        let kernels = BatchNormActKernels::load(&bench.device, bench.precision).expect("kernels");
        for (i, ([n, h, w, c], beyond)) in SHAPES.into_iter().enumerate() {
            for activation in [Activation::Silu, Activation::Relu] {
                let dense = Layout::dense(n, h, w, c);
                let case = Case::new(bench, dense, activation);
                let y = Map::of(bench, dense, &case.y);
                let within = dense.within(beyond, i % 3);
                forward(bench, &kernels, &case, &y, within);
                backward(bench, &kernels, &case, &y, within, i % 2 == 0);
            }
        }
    });
}

fn forward(bench: &Bench, kernels: &BatchNormActKernels, case: &Case, y: &Map, within: Layout) {
    let residual = Map::of(bench, within, &case.residual);
    let z = Map::poisoned(bench, within);
    // SAFETY: all live in this test and have the shapes said.
    unsafe { kernels.forward(&bench.stream, y.tensor(), &case.norm(), Some(residual.tensor()), z.tensor()) }
        .expect("a launch");
    let got = z.read_written(bench, true);
    assert_close("z", &got, &case.z(), tolerance(bench.precision), 1.0);
}

fn backward(
    bench: &Bench,
    kernels: &BatchNormActKernels,
    case: &Case,
    y: &Map,
    within: Layout,
    accumulate: bool,
) {
    let c = within.c;
    let dz = Map::of(bench, Layout { pad: 0, ..within }, &case.dz);
    let shortcut_at = Layout { pad: 0, ..within };
    let len = backward_workspace_len(bench.precision, case.y.len() / c, c);
    for frozen in [false, true] {
        let workspace = Floats::poisoned(bench, len + 1);
        let sums = [Floats::of(bench, &vec![1.0; c]), Floats::of(bench, &vec![2.0; c])];
        let dy = Map::poisoned(bench, within);
        let shortcut = if accumulate {
            Map::of(bench, shortcut_at, &case.residual)
        } else {
            Map::poisoned(bench, shortcut_at)
        };
        let gradients = (!frozen).then(|| [sums[0].pointer(), sums[1].pointer()]);
        // SAFETY: all live in this test and have the shapes said.
        unsafe {
            kernels.backward(
                &bench.stream,
                y.tensor(),
                dz.tensor(),
                &case.norm(),
                gradients,
                workspace.pointer(),
                dy.tensor(),
                Some((shortcut.tensor(), accumulate)),
            )
        }
        .expect("launches");
        let [want, dweight, dbias] = case.gradients(!frozen);
        let p = bench.precision;
        // Of few pixels, `dy` is a small difference of terms that are as large as this.
        let largest = (0..c).map(|k| (case.weight[k] * case.inverse[k]).abs()).fold(2.0, f64::max);
        assert_close("dy", &dy.read_written(bench, true), &want, tolerance(p), largest);
        let grown = |start: f64, sums: &[f64]| -> Vec<f64> {
            sums.iter().map(|s| start + if frozen { 0.0 } else { *s }).collect()
        };
        assert_close("dweight", &sums[0].read(bench), &grown(1.0, &dweight), 1e-4, 3.0);
        assert_close("dbias", &sums[1].read(bench), &grown(2.0, &dbias), 1e-4, 3.0);
        let passed: Vec<f64> =
            case.dz.iter().zip(&case.residual).map(|(d, r)| if accumulate { d + r } else { *d }).collect();
        let got = if accumulate { shortcut.read(bench) } else { shortcut.read_written(bench, false) };
        assert_close("shortcut", &got, &passed, tolerance(p), 0.0);
        assert!(workspace.read(bench)[len].is_nan(), "the workspace is as long as said");
    }
}

#[test]
fn partial_statistics_are_combined_exactly() {
    // (pixels, pixels of a tile, channels): one tile, a short last tile, so many tiles that ranges are used.
    let shapes = [(1, 64, 3), (5, 64, 16), (1000, 64, 80), (128, 64, 1), (40_000, 16, 16), (3000, 8, 33)];
    on_all(|bench| {
        let kernels = BatchNormActKernels::load(&bench.device, bench.precision).expect("kernels");
        for (pixels, rows, c) in shapes {
            // A mean large against the deviation: where a careless variance would be lost.
            let y: Vec<f64> = normals(bench.precision, 9, pixels * c, 30.0);
            let mut partials = Vec::new();
            for tile in y.chunks(rows * c) {
                let count = (tile.len() / c) as f64;
                let channel = |k: usize| tile.iter().skip(k).step_by(c);
                let sums: Vec<f64> = (0..c).map(|k| channel(k).sum()).collect();
                let mean = |k: usize| sums[k] / count;
                partials.extend(sums.iter().copied());
                partials.extend((0..c).map(|k| channel(k).map(|v| (v - mean(k)).powi(2)).sum::<f64>()));
            }
            let partials = Floats::of(bench, &partials);
            let (mean, var) = (Floats::of(bench, &vec![1.0; c]), Floats::of(bench, &vec![2.0; c]));
            let stats = Floats::poisoned(bench, 3 * c);
            let scratch = Floats::poisoned(bench, finish_stats_scratch_len(pixels, rows, c));
            let args = FinishStats {
                partials: partials.pointer(),
                rows_per_partial: rows,
                pixels,
                channels: c,
                stats: stats.pointer(),
                running: Running { mean: mean.pointer(), variance: var.pointer() },
                momentum: 0.25,
                eps: EPS as f32,
                scratch: scratch.pointer(),
            };
            // Twice: the counters are as they were.
            for _ in 0..2 {
                // SAFETY: all live in this test, as long as said.
                unsafe { kernels.finish_stats(&bench.stream, &args) }.expect("a launch");
            }
            let (got, mean, var) = (stats.read(bench), mean.read(bench), var.read(bench));
            for k in 0..c {
                let values: Vec<f64> = y.iter().skip(k).step_by(c).copied().collect();
                let m = values.iter().sum::<f64>() / pixels as f64;
                let v = values.iter().map(|x| (x - m).powi(2)).sum::<f64>() / pixels as f64;
                let unbiased = v * pixels as f64 / (pixels.max(2) - 1) as f64;
                let want = [m, 1.0 / (v + EPS).sqrt(), v];
                let twice = |start: f64, batch: f64| start * 0.5625 + batch * 0.4375;
                assert_close("stats", &[got[k], got[c + k], got[2 * c + k]], &want, 2e-5, 1e-3);
                assert_close(
                    "running",
                    &[mean[k], var[k]],
                    &[twice(1.0, m), twice(2.0, unbiased)],
                    2e-5,
                    0.1,
                );
            }
        }
    });
}

#[test]
fn bias_gradients_are_sums_over_pixels() {
    on_all(|bench| {
        let kernels = BatchNormActKernels::load(&bench.device, bench.precision).expect("kernels");
        // A head's output: channels padded to a multiple of eight.
        for (c, parent) in [(80, 80), (3, 8), (1, 1), (64, 72)] {
            let at = Layout { n: 2, h: 9, w: 7, c, from: 0, parent, pad: 0 };
            let dz = normals(bench.precision, 4, at.len(), 0.5);
            let map = Map::of(bench, at, &dz);
            let dbias = Floats::of(bench, &vec![3.0; c]);
            let workspace = Floats::poisoned(bench, bias_gradient_workspace_len(at.len() / c, c));
            // SAFETY: all live in this test, as long as said.
            unsafe {
                kernels.bias_gradient(&bench.stream, map.tensor(), dbias.pointer(), workspace.pointer())
            }
            .expect("launches");
            let want: Vec<f64> = (0..c).map(|k| 3.0 + dz.iter().skip(k).step_by(c).sum::<f64>()).collect();
            assert_close("dbias", &dbias.read(bench), &want, 1e-5, 10.0);
        }
    });
}

#[test]
fn running_statistics_and_folding_on_the_device() {
    on_all(|bench| {
        let kernels = BatchNormActKernels::load(&bench.device, bench.precision).expect("kernels");
        let c = 300;
        let [mean, weight, bias] = [1, 2, 3].map(|seed| normals(bench.precision, seed, c, 1.0));
        let var: Vec<f64> =
            normals(bench.precision, 4, c, 0.0).iter().map(|v| f64::from((v * v) as f32)).collect();
        let [m, v, w, b] = [&mean, &var, &weight, &bias].map(|x| Floats::of(bench, x));
        let running = Running { mean: m.pointer(), variance: v.pointer() };
        let (stats, folded) = (Floats::poisoned(bench, 2 * c), Floats::poisoned(bench, 2 * c));
        // SAFETY: all live in this test, as long as said.
        unsafe {
            kernels.running_stats(&bench.stream, c, running, EPS as f32, stats.pointer()).expect("a launch");
            let to = [folded.pointer(), folded.pointer() + 4 * c as u64];
            let from = [w.pointer(), b.pointer()];
            kernels.fold(&bench.stream, c, from, running, EPS as f32, to).expect("a launch");
        }
        let inverse: Vec<f64> = var.iter().map(|v| 1.0 / (v + EPS).sqrt()).collect();
        let (stats, folded) = (stats.read(bench), folded.read(bench));
        assert_close("mean", &stats[..c], &mean, 0.0, 1.0);
        assert_close("inverse deviation", &stats[c..], &inverse, 1e-6, 0.0);
        let scale: Vec<f64> = (0..c).map(|k| weight[k] * inverse[k]).collect();
        let shift: Vec<f64> = (0..c).map(|k| bias[k] - mean[k] * scale[k]).collect();
        assert_close("scale", &folded[..c], &scale, 1e-6, 0.0);
        assert_close("shift", &folded[c..], &shift, 1e-6, 40.0);
    });
}
