//! Convolution on ordinary cores and from bytes against a plain f64 reference: all epilogues and gradients, ragged
//! shapes, slices and borders, in poisoned memory.

use super::plain::PlainKernels;
use super::*;
use crate::engine::ops::cuda_testing::{
    Bench, Floats, Layout, Map, assert_close, normals, on_all, tolerance,
};

/// Inputs, and what comes out of them with the sums of absolute products.
struct Case {
    p: Conv2dParams,
    x_at: Layout,
    y_at: Layout,
    weight: Vec<f64>,
    x: Vec<f64>,
    dy: Vec<f64>,
    want: [Vec<f64>; 3],
    sizes: [Vec<f64>; 3],
}

/// [c_in, c_out, kernel, stride, pad], [n, h, w].
type Sizes = ([usize; 5], [usize; 3]);

impl Case {
    /// `bytes`: the input is fractions of 255.
    fn new(
        precision: Precision,
        ([c_in, c_out, kernel, stride, pad], [n, h, w]): Sizes,
        bytes: bool,
    ) -> Case {
        let p = Conv2dParams { c_in, c_out, kernel, stride, pad };
        let (h_out, w_out) = p.output_size(h, w);
        let (x_at, y_at) = (Layout::dense(n, h, w, c_in), Layout::dense(n, h_out, w_out, c_out));
        let weight = normals(precision, 3, p.weight_len(), 0.1);
        let dy = normals(precision, 2, y_at.len(), 0.0);
        let x = if bytes {
            (0..x_at.len()).map(|i| ((i * 37 + i / 7) % 256) as f64 / 255.0).collect()
        } else {
            normals(precision, 1, x_at.len(), 0.0)
        };
        let lens = [dy.len(), x.len(), weight.len()];
        let mut case = Case {
            p,
            x_at,
            y_at,
            weight,
            x,
            dy,
            want: lens.map(|n| vec![0.0; n]),
            sizes: lens.map(|n| vec![0.0; n]),
        };
        case.compute();
        case
    }

    fn compute(&mut self) {
        let (p, x, y) = (self.p, self.x_at, self.y_at);
        for pixel in 0..y.n * y.h * y.w {
            let (n, i, j) = (pixel / (y.h * y.w), pixel / y.w % y.h, pixel % y.w);
            for tap in 0..p.kernel * p.kernel {
                let (r, s) = (i * p.stride + tap / p.kernel, j * p.stride + tap % p.kernel);
                if r < p.pad || s < p.pad || r - p.pad >= x.h || s - p.pad >= x.w {
                    continue;
                }
                let input = ((n * x.h + r - p.pad) * x.w + s - p.pad) * p.c_in;
                for c in 0..p.c_in {
                    for o in 0..p.c_out {
                        let at = [pixel * p.c_out + o, input + c, (tap * p.c_in + c) * p.c_out + o];
                        let (dy, x, w) = (self.dy[at[0]], self.x[at[1]], self.weight[at[2]]);
                        for (k, term) in [x * w, dy * w, x * dy].into_iter().enumerate() {
                            self.want[k][at[k]] += term;
                            self.sizes[k][at[k]] += term.abs();
                        }
                    }
                }
            }
        }
    }

    /// Asserts that sums agree; `stored` says in what they were written.
    fn close(&self, what: &str, k: usize, got: &[f64], want: &[f64], stored: f64) {
        assert_eq!(got.len(), want.len());
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            let limit = stored * (w.abs() + 0.1) + 1e-5 * (1.0 + self.sizes[k][i]);
            assert!((g - w).abs() <= limit, "{what} {:?} [{i}]: {g} for {w}", self.p);
        }
    }
}

/// Where the input comes from.
enum Input {
    View(Map),
    Image(Tensor),
}

/// A case on a device.
struct Rig<'a> {
    bench: &'a Bench,
    case: &'a Case,
    kernels: &'a Conv2dKernels,
    plain: &'a PlainKernels,
    input: Input,
    weight: Map,
    masters: Floats,
    beyond: usize,
}

impl Rig<'_> {
    fn forward(&self, out: &Map, epilogue: Epilogue) {
        let (stream, p) = (&self.bench.stream, &self.case.p);
        // SAFETY: all live in this test and have the shapes said.
        let result = unsafe {
            match &self.input {
                Input::View(x) => {
                    let weight = self.weight.tensor().data;
                    self.plain.forward(stream, p, x.tensor(), weight, out.tensor(), epilogue, 0)
                }
                Input::Image(image) => {
                    let weight = self.masters.pointer();
                    self.kernels.forward_image(stream, p, *image, weight, out.tensor(), epilogue)
                }
            }
        };
        result.expect("a launch");
    }

    fn stats_layout(&self, out: &Map) -> StatsLayout {
        let (p, precision, chip) = (&self.case.p, self.bench.precision, self.bench.device.chip());
        match &self.input {
            Input::View(x) => plain::stats_layout(p, &Shape::of_views(&x.view, &out.view, precision)),
            Input::Image(..) => image_stats_layout(p, &out.view, precision, chip),
        }
    }

    fn check_forward(&self) {
        let (bench, case) = (self.bench, self.case);
        let (c, at) = (case.p.c_out, case.y_at.within(self.beyond, 1));
        let stored = tolerance(bench.precision);
        let y = Map::poisoned(bench, at);
        self.forward(&y, Epilogue::Raw);
        case.close("raw", 0, &y.read_written(bench, false), &case.want[0], stored);

        let y = Map::poisoned(bench, case.y_at);
        let layout = self.stats_layout(&y);
        let partials = Floats::poisoned(bench, layout.len(&case.p) + 1);
        self.forward(&y, Epilogue::Stats { partials: partials.pointer() });
        let y = y.read_written(bench, false);
        case.close("stats", 0, &y, &case.want[0], stored);
        let partials = partials.read(bench);
        assert!(partials[layout.len(&case.p)].is_nan(), "as long as said");
        for (tile, got) in y.chunks(layout.pixels_per_partial * c).zip(partials.chunks(2 * c)) {
            for k in 0..c {
                let values: Vec<f64> = tile.iter().skip(k).step_by(c).copied().collect();
                let (sum, mean) =
                    (values.iter().sum::<f64>(), values.iter().sum::<f64>() / values.len() as f64);
                let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
                let size = values.iter().map(|v| v.abs()).sum::<f64>();
                assert_close("partials", &[got[k], got[c + k]], &[sum, squares], 1e-5, 1.0 + size);
            }
        }

        let numbers = [5, 6].map(|seed| normals(Precision::F32, seed, c, 0.5));
        let [scale, shift] = [0, 1].map(|i| Floats::of(bench, &numbers[i]));
        let z = Map::stored(bench, case.y_at, Precision::F32);
        self.forward(&z, Epilogue::Bias { bias: shift.pointer() });
        let want: Vec<f64> =
            case.want[0].iter().enumerate().map(|(i, v)| v + f64::from(numbers[1][i % c] as f32)).collect();
        case.close("bias", 0, &z.read_written(bench, false), &want, 1e-6);

        let shortcut = normals(bench.precision, 8, case.y_at.len(), 0.0);
        let residual = Map::of(bench, case.y_at.within(self.beyond, 0), &shortcut);
        let z = Map::poisoned(bench, at);
        let apply = Epilogue::Apply {
            scale: scale.pointer(),
            shift: shift.pointer(),
            activation: Activation::Silu,
            residual: Some(residual.tensor()),
        };
        self.forward(&z, apply);
        let want: Vec<f64> = (0..case.y_at.len())
            .map(|i| {
                let u = case.want[0][i] * numbers[0][i % c] + numbers[1][i % c];
                u / (1.0 + (-u).exp()) + shortcut[i]
            })
            .collect();
        case.close("apply", 0, &z.read_written(bench, false), &want, 2.0 * stored);
    }

    fn check_weight(&self, dy: &Map) {
        let (bench, case, stream, p) = (self.bench, self.case, &self.bench.stream, &self.case.p);
        let (precision, chip) = (bench.precision, bench.device.chip());
        let len = match &self.input {
            Input::View(x) => {
                let shape = Shape::of_views(&x.view, &dy.view, precision);
                plain::workspace_len(Pass::BackwardWeight, p, &shape, chip)
            }
            Input::Image(..) => image_workspace_len(p, &dy.view, precision, chip),
        };
        let workspace = Floats::poisoned(bench, len + 1);
        let dw = Floats::of(bench, &vec![2.0; p.weight_len()]);
        let (to, scratch) = (dw.pointer(), workspace.pointer());
        // SAFETY: all live in this test and have the shapes said.
        let result = unsafe {
            match &self.input {
                Input::View(x) => self.plain.backward_weight(stream, p, x.tensor(), dy.tensor(), to, scratch),
                Input::Image(image) => {
                    self.kernels.backward_weight_image(stream, p, *image, dy.tensor(), to, scratch)
                }
            }
        };
        result.expect("launches");
        let want: Vec<f64> = case.want[2].iter().map(|v| v + 2.0).collect();
        case.close("dw", 2, &dw.read(bench), &want, 1e-6);
        assert!(workspace.read(bench)[len].is_nan(), "the workspace is as long as said");
    }

    fn check_data(&self, dy: &Map) {
        let (bench, case, p) = (self.bench, self.case, &self.case.p);
        let old = normals(bench.precision, 9, case.x_at.len(), 0.0);
        for accumulate in [false, true] {
            let at = case.x_at.within(self.beyond, usize::from(!accumulate));
            let dx = if accumulate { Map::of(bench, at, &old) } else { Map::poisoned(bench, at) };
            let weight = self.weight.tensor().data;
            // SAFETY: all live in this test and have the shapes said.
            unsafe {
                self.plain.backward_data(&bench.stream, p, dy.tensor(), weight, dx.tensor(), accumulate, 0)
            }
            .expect("a launch");
            let got = if accumulate { dx.read(bench) } else { dx.read_written(bench, false) };
            let start = |i: usize| if accumulate { old[i] } else { 0.0 };
            let want: Vec<f64> = case.want[1].iter().enumerate().map(|(i, v)| v + start(i)).collect();
            case.close("dx", 1, &got, &want, tolerance(bench.precision));
        }
    }
}

fn check(bench: &Bench, kernels: &Conv2dKernels, sizes: Sizes, beyond: usize, image: bool) {
    let case = Case::new(bench.precision, sizes, image);
    let mut images = None;
    let input = if image {
        let bytes: Vec<u8> = case.x.iter().map(|v| (v * 255.0).round() as u8).collect();
        let buffer = bench.device.allocate(bytes.len()).expect("memory");
        bench.stream.upload(&buffer, 0, &bytes).expect("a copy");
        let v = case.x_at;
        // SAFETY: the buffer holds the images and lives as long as the case.
        let tensor = unsafe { Tensor::new(buffer.pointer(), 1, &View::new(0, v.n, v.h, v.w, 3, 0)) };
        images = Some(buffer);
        Input::Image(tensor)
    } else {
        Input::View(Map::of(bench, case.x_at.within(beyond, case.p.pad), &case.x))
    };
    let flat = Layout::dense(1, 1, 1, case.p.weight_len());
    let weight = Map::of(bench, flat.within(beyond, 0), &case.weight);
    let masters = Floats::of(bench, &case.weight);
    let plain = &kernels.plain;
    let rig = Rig { bench, case: &case, kernels, plain, input, weight, masters, beyond };
    rig.check_forward();
    let border = case.p.gradient_border();
    let dy = Map::of(bench, case.y_at.within(beyond, border), &case.dy);
    rig.check_weight(&dy);
    if !image {
        rig.check_data(&dy);
    }
    drop(images);
}

#[test]
fn ordinary_cores_agree_with_the_reference() {
    let cases: [(Sizes, usize); 9] = [
        (([3, 5, 3, 2, 1], [2, 9, 8]), 1),
        (([8, 16, 3, 1, 1], [2, 14, 13]), 0),
        (([16, 24, 1, 1, 0], [1, 5, 13]), 8),
        (([7, 65, 3, 1, 1], [1, 6, 5]), 3),
        (([72, 8, 1, 2, 0], [1, 7, 9]), 8),
        (([1, 1, 5, 1, 2], [1, 6, 1]), 0),
        (([8, 72, 3, 2, 1], [1, 10, 11]), 16),
        (([4, 3, 2, 3, 0], [2, 8, 7]), 0),
        (([2, 9, 3, 1, 0], [1, 17, 19]), 2),
    ];
    on_all(|bench| {
        let kernels = Conv2dKernels::load(&bench.device, bench.precision).expect("kernels");
        for (sizes, beyond) in cases {
            check(bench, &kernels, sizes, beyond, false);
        }
    });
}

#[test]
fn images_are_read_as_bytes() {
    // The last ones take ordinary cores in every precision: an odd stride, lines that do not fit.
    let cases: [(Sizes, usize); 7] = [
        (([3, 16, 3, 2, 1], [2, 38, 34]), 0),
        (([3, 24, 3, 2, 1], [1, 45, 61]), 8),
        (([3, 40, 6, 2, 2], [2, 20, 23]), 0),
        (([3, 5, 3, 2, 1], [3, 9, 2]), 1),
        (([3, 17, 1, 2, 0], [1, 7, 50]), 0),
        (([3, 16, 3, 1, 1], [2, 9, 11]), 0),
        (([3, 8, 11, 2, 5], [1, 20, 3]), 0),
    ];
    on_all(|bench| {
        let kernels = Conv2dKernels::load(&bench.device, bench.precision).expect("kernels");
        for (sizes, beyond) in cases {
            check(bench, &kernels, sizes, beyond, true);
        }
    });
}
