//! The tensor-core kernels against the plain f64 reference: every tile of every pass, split and not, on ragged
//! shapes, slices and borders, in poisoned memory.

use std::sync::Arc;

use super::mma::MmaKernels;
use super::*;
use crate::engine::device::cuda::{Buffer, testing};
use crate::engine::ops::conv2d::tests::{Case, Reference, case, reference};
use crate::engine::rng::{Rng, Use};

/// A number of the storage type as bits.
fn encode(precision: Precision, v: f32) -> u16 {
    match precision {
        Precision::F16 => half::f16::from_f32(v).to_bits(),
        _ => half::bf16::from_f32(v).to_bits(),
    }
}

fn decode(precision: Precision, bits: u16) -> f64 {
    match precision {
        Precision::F16 => half::f16::from_bits(bits).to_f64(),
        _ => half::bf16::from_bits(bits).to_f64(),
    }
}

/// Half a unit in the last place, relative.
fn rounding(precision: Precision) -> f64 {
    if precision == Precision::F16 { 1.0 / 2048.0 } else { 1.0 / 256.0 }
}

/// A tensor on the device in a buffer of NaN: border zero, neighbours not numbers.
struct Placed {
    buffer: Buffer,
    view: View,
    precision: Precision,
    before: Vec<u16>,
}

impl Placed {
    fn new(
        device: &Arc<Device>,
        precision: Precision,
        (n, h, w, c): (usize, usize, usize, usize),
        border: usize,
        beyond: usize,
        mut value: impl FnMut() -> f32,
    ) -> Placed {
        let parent = c + 2 * beyond;
        let view = View::new(16, n, h, w, parent, border).slice(beyond, c);
        let mut before = vec![0xffffu16; 16 + View::storage_len(n, h, w, parent, border) + 24];
        for_each(&view, border, |_, at| before[at] = 0);
        for_each(&view, 0, |_, at| before[at] = encode(precision, value()));
        let buffer = device.allocate(before.len() * 2).expect("memory");
        device.stream().expect("a stream").upload(&buffer, 0, &before).expect("a copy");
        Placed { buffer, view, precision, before }
    }

    fn tensor(&self) -> Tensor {
        // SAFETY: the view lies in the buffer, which lives as long as the test's launches, all waited for.
        unsafe { Tensor::new(self.buffer.pointer(), 2, &self.view) }
    }

    fn dense(&self, bits: &[u16]) -> Vec<f64> {
        let mut values = Vec::new();
        for_each(&self.view, 0, |_, at| values.push(decode(self.precision, bits[at])));
        values
    }

    /// The numbers now, after a check that nothing else changed.
    fn read(&self, stream: &Stream, what: &str) -> Vec<f64> {
        let mut now = vec![0u16; self.before.len()];
        stream.download(&self.buffer, 0, &mut now).expect("a copy");
        let values = self.dense(&now);
        for_each(&self.view, 0, |_, at| now[at] = self.before[at]);
        assert!(now == self.before, "{what} wrote outside of its output");
        values
    }

    fn reset(&self, stream: &Stream) {
        stream.upload(&self.buffer, 0, &self.before).expect("a copy");
    }
}

fn for_each(v: &View, border: usize, mut f: impl FnMut(usize, usize)) {
    let (b, mut i) = (border as isize, 0);
    for n in 0..v.n {
        for y in -b..v.h as isize + b {
            for x in -b..v.w as isize + b {
                for c in 0..v.c {
                    f(i, v.at(n, y, x) + c);
                    i += 1;
                }
            }
        }
    }
}

/// One case on one device: inputs, outputs and what should come out.
pub(super) struct Bench {
    device: Arc<Device>,
    stream: Stream,
    precision: Precision,
    case: Case,
    x: Placed,
    dy: Placed,
    y: Placed,
    dx: Placed,
    weight: Buffer,
    dw: Buffer,
    want: Reference,
}

/// Floats that stand after the end of each f32 output, and must stay.
const GUARD: usize = 8;

impl Bench {
    pub fn new(device: &Arc<Device>, precision: Precision, case: Case) -> Bench {
        let (p, n) = (&case.p, case.n);
        let mut rng = Rng::new(7, Use::Test, case.h as u32, case.w as u32);
        let (h_out, w_out) = p.output_size(case.h, case.w);
        let (input, output) = ((n, case.h, case.w, p.c_in), (n, h_out, w_out, p.c_out));
        let extra = case.beyond / 8;
        let mut draw = || rng.range(-1.0, 1.0) as f32;
        let x = Placed::new(device, precision, input, p.pad + extra, case.beyond, &mut draw);
        let dy = Placed::new(device, precision, output, p.gradient_border() + extra, case.beyond, &mut draw);
        let y = Placed::new(device, precision, output, extra, case.beyond, || f32::NAN);
        let dx = Placed::new(device, precision, input, 0, case.beyond, || 1.0);
        let bits: Vec<u16> = (0..p.weight_len()).map(|_| encode(precision, draw())).collect();
        let stream = device.stream().expect("a stream");
        let weight = device.allocate(bits.len() * 2).expect("memory");
        stream.upload(&weight, 0, &bits).expect("a copy");
        let dw = device.allocate((p.weight_len() + GUARD) * 4).expect("memory");
        let weights: Vec<f64> = bits.iter().map(|&b| decode(precision, b)).collect();
        let want = reference(&case, &x.dense(&x.before), &weights, &dy.dense(&dy.before));
        Bench { device: Arc::clone(device), stream, precision, case, x, dy, y, dx, weight, dw, want }
    }

    pub fn params(&self) -> &Conv2dParams {
        &self.case.p
    }

    pub fn shape(&self, pass: Pass) -> Shape {
        let (x, y) = match pass {
            Pass::Forward => (&self.x, &self.y),
            Pass::BackwardData => (&self.dx, &self.dy),
            Pass::BackwardWeight => (&self.x, &self.dy),
        };
        let shape = Shape::of_views(&x.view, &y.view, self.precision);
        assert_eq!(shape, Shape::of_tensors(&x.tensor(), &y.tensor(), self.precision));
        shape
    }

    /// Every tile of a pass, of warpgroups or not, unsplit and with the most splits offered.
    pub fn configs(&self, pass: Pass, of_wgmma: bool) -> Vec<MmaConfig> {
        let shape = self.shape(pass);
        let mut all = MmaConfig::candidates(pass, &self.case.p, &shape, self.device.chip(), of_wgmma);
        all.retain(|config| config.uses_wgmma() == of_wgmma);
        let mut configs: Vec<MmaConfig> = Vec::new();
        for config in &all {
            let same: Vec<&MmaConfig> = all
                .iter()
                .filter(|c| MmaConfig { splits: 1, ..**c } == MmaConfig { splits: 1, ..*config })
                .collect();
            let fewest = same.iter().min_by_key(|c| c.splits).expect("itself");
            let most = same.iter().max_by_key(|c| c.splits).expect("itself");
            for pick in [**fewest, **most] {
                if !configs.contains(&pick) {
                    configs.push(pick);
                }
            }
        }
        configs
    }

    pub fn workspace(&self, pass: Pass, config: &MmaConfig) -> Buffer {
        let len = config.workspace_len(pass, &self.case.p, &self.shape(pass)).max(4);
        let buffer = self.device.allocate(len * 4).expect("memory");
        // SAFETY: the whole of a live buffer.
        unsafe { self.stream.fill(buffer.pointer(), 0xff, buffer.bytes()) }.expect("a fill");
        buffer
    }

    /// The result is that of the reference, rounded once where `rounds`; `start` was there before.
    pub fn check(&self, index: usize, what: &str, got: &[f64], rounds: bool, start: f64) {
        let (want, size) = (&self.want.0[index], &self.want.1[index]);
        assert_eq!(got.len(), want.len());
        for i in 0..got.len() {
            let value = want[i] + start;
            let limit =
                1e-6 + 2e-6 * size[i] + if rounds { rounding(self.precision) * value.abs() } else { 0.0 };
            // Written so that NaN fails.
            assert!((got[i] - value).abs() <= limit, "{what} {:?} at {i}: {} for {value}", self.case, got[i]);
        }
    }

    pub fn forward(&self, mma: &MmaKernels, config: &MmaConfig) {
        let (p, shape) = (&self.case.p, self.shape(Pass::Forward));
        let (partials, pixels) = config.stats_tiles(p, &shape);
        let len = partials * 2 * p.c_out;
        let stats = self.device.allocate((len + GUARD) * 4).expect("memory");
        let workspace = self.workspace(Pass::Forward, config);
        self.y.reset(&self.stream);
        let what = format!("forward {config:?}");
        let epilogue = Epilogue::Stats { partials: stats.pointer() };
        // SAFETY: all buffers live to the end of this function, which waits for the launch.
        unsafe {
            self.stream.fill(stats.pointer(), 0xff, stats.bytes()).expect("a fill");
            let (x, y) = (self.x.tensor(), self.y.tensor());
            mma.forward(&self.stream, config, p, x, self.weight.pointer(), y, &epilogue, workspace.pointer())
        }
        .expect("a launch");
        let got = self.y.read(&self.stream, &what);
        self.check(0, &what, &got, true, 0.0);
        let mut parts = vec![0f32; len + GUARD];
        self.stream.download(&stats, 0, &mut parts).expect("a copy");
        assert!(parts[len..].iter().all(|v| v.is_nan()), "{what} wrote past its statistics");
        let all = got.len() / p.c_out;
        assert_eq!(partials, all.div_ceil(pixels), "{what}");
        for c in 0..p.c_out {
            let channel: Vec<f64> = got.iter().skip(c).step_by(p.c_out).copied().collect();
            let mean = channel.iter().sum::<f64>() / all as f64;
            let (mut count, mut got_mean, mut got_sum) = (0.0, 0.0, 0.0);
            for part in 0..partials {
                let pixels = (all - part * pixels).min(pixels) as f64;
                let sum = f64::from(parts[part * 2 * p.c_out + c]);
                let delta = sum / pixels - got_mean;
                got_sum += f64::from(parts[(part * 2 + 1) * p.c_out + c])
                    + delta * delta * count * pixels / (count + pixels);
                got_mean += delta * pixels / (count + pixels);
                count += pixels;
            }
            let squares = channel.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
            assert!(
                (got_mean - mean).abs() <= 1e-5 * (1.0 + mean.abs()),
                "{what}: mean {got_mean} for {mean}"
            );
            assert!((got_sum - squares).abs() <= 1e-5 * (1.0 + squares), "{what}: {got_sum} for {squares}");
        }
    }

    pub fn backward_data(&self, mma: &MmaKernels, config: &MmaConfig, accumulate: bool) {
        let workspace = self.workspace(Pass::BackwardData, config);
        self.dx.reset(&self.stream);
        let what = format!("data gradient {config:?}");
        // SAFETY: all buffers live to the end of this function, which waits for the launch.
        unsafe {
            let (dy, dx) = (self.dy.tensor(), self.dx.tensor());
            let (weight, workspace) = (self.weight.pointer(), workspace.pointer());
            mma.backward_data(&self.stream, config, &self.case.p, dy, weight, dx, accumulate, workspace)
        }
        .expect("a launch");
        let start = if accumulate { 1.0 } else { 0.0 };
        self.check(1, &what, &self.dx.read(&self.stream, &what), true, start);
    }

    pub fn backward_weight(&self, mma: &MmaKernels, config: &MmaConfig) {
        let workspace = self.workspace(Pass::BackwardWeight, config);
        let len = self.case.p.weight_len();
        let mut values = vec![1.0f32; len + GUARD];
        self.stream.upload(&self.dw, 0, &values).expect("a copy");
        let what = format!("weight gradient {config:?}");
        // SAFETY: all buffers live to the end of this function, which waits for the launch.
        unsafe {
            let (x, dy) = (self.x.tensor(), self.dy.tensor());
            mma.backward_weight(
                &self.stream,
                config,
                &self.case.p,
                x,
                dy,
                self.dw.pointer(),
                workspace.pointer(),
            )
        }
        .expect("a launch");
        self.stream.download(&self.dw, 0, &mut values).expect("a copy");
        assert!(values[len..].iter().all(|&v| v == 1.0), "{what} wrote past the weight");
        let got: Vec<f64> = values[..len].iter().map(|&v| f64::from(v)).collect();
        self.check(2, &what, &got, false, 1.0);
    }

    /// Every configuration of every pass.
    pub fn all(&self, mma: &MmaKernels) {
        for config in self.configs(Pass::Forward, false) {
            self.forward(mma, &config);
        }
        for (i, config) in self.configs(Pass::BackwardData, false).iter().enumerate() {
            self.backward_data(mma, config, i % 2 == 1);
        }
        for config in self.configs(Pass::BackwardWeight, false) {
            self.backward_weight(mma, &config);
        }
    }
}

pub(super) const PRECISIONS: [Precision; 2] = [Precision::Bf16, Precision::F16];

#[test]
fn mma_every_tile_agrees_with_the_reference() {
    for device in testing::devices() {
        let [bf16, f16] = PRECISIONS.map(|p| (p, MmaKernels::load(&device, p).expect("it loads")));
        for ((precision, mma), case) in [
            (&bf16, case((24, 136), 3, 1, (2, 6, 9), 8)),
            (&f16, case((104, 40), 3, 1, (3, 5, 4), 0)),
            (&bf16, case((40, 104), 3, 2, (2, 9, 7), 16)),
            (&f16, case((136, 48), 1, 1, (1, 11, 13), 8)),
        ] {
            Bench::new(&device, *precision, case).all(mma);
        }
    }
}

/// The configuration that the model takes, through the public interface.
fn chosen(device: &Arc<Device>, precision: Precision, case: Case) {
    let bench = Bench::new(device, precision, case);
    let mma = MmaKernels::load(device, precision).expect("it loads");
    let config = |pass| MmaConfig::choose(pass, &case.p, &bench.shape(pass), device.chip());
    bench.forward(&mma, &config(Pass::Forward));
    bench.backward_data(&mma, &config(Pass::BackwardData), true);
    bench.backward_weight(&mma, &config(Pass::BackwardWeight));
}

#[test]
fn mma_odd_shapes_agree_with_the_reference() {
    for device in testing::devices() {
        for (i, kernel) in [1, 2, 3, 5, 7].into_iter().enumerate() {
            for stride in [1, 2, 3] {
                let precision = PRECISIONS[(i + stride) % 2];
                chosen(&device, precision, case((8, 24), kernel, stride, (2, 11, 9), 8 * (i % 2)));
            }
        }
        for size in [(3, 1, 1), (1, 1, 200), (1, 150, 1), (5, 3, 2), (1, 20, 20), (1, 16, 32)] {
            chosen(&device, Precision::Bf16, case((16, 16), 3, 1, size, 0));
            chosen(&device, Precision::F16, case((32, 8), 3, 2, size, 8));
            chosen(&device, Precision::Bf16, case((8, 64), 1, 1, size, 8));
        }
    }
}

#[test]
fn mma_epilogues_follow_their_formulas() {
    for (device, precision) in testing::devices().iter().flat_map(|d| PRECISIONS.map(|p| (d, p))) {
        let bench = Bench::new(device, precision, case((16, 40), 3, 1, (2, 6, 21), 8));
        let (p, stream) = (&bench.case.p, &bench.stream);
        let mma = MmaKernels::load(device, precision).expect("it loads");
        let mut rng = Rng::new(3, Use::Test, 0, 0);
        let mut draw = || rng.range(-1.0, 1.0) as f32;
        let residual = Placed::new(device, precision, (2, 6, 21, 40), 2, 8, &mut draw);
        let columns: Vec<f32> = (0..80).map(|_| draw()).collect();
        let vectors = device.allocate(320).expect("memory");
        stream.upload(&vectors, 0, &columns).expect("a copy");
        let (scale, shift) = (vectors.pointer(), vectors.pointer() + 160);
        let added = residual.dense(&residual.before);
        let of_warps = bench.configs(Pass::Forward, false).into_iter();
        for config in of_warps.chain(bench.configs(Pass::Forward, true)) {
            let workspace = bench.workspace(Pass::Forward, &config);
            let run = |out: Tensor, epilogue: Epilogue| {
                let (x, weight) = (bench.x.tensor(), bench.weight.pointer());
                // SAFETY: all buffers live to the end of the test, which waits for the launch.
                unsafe { mma.forward(stream, &config, p, x, weight, out, &epilogue, workspace.pointer()) }
                    .expect("a launch");
            };
            let activation =
                [Activation::Silu, Activation::Relu, Activation::Identity][config.columns as usize / 16 % 3];
            for with_residual in [false, true] {
                bench.y.reset(stream);
                let residual = with_residual.then(|| residual.tensor());
                run(bench.y.tensor(), Epilogue::Apply { scale, shift, activation, residual });
                for (i, got) in bench.y.read(stream, "forward").into_iter().enumerate() {
                    let z = bench.want.0[0][i] * f64::from(columns[i % 40]) + f64::from(columns[40 + i % 40]);
                    let want =
                        f64::from(activation.value(z as f32)) + if with_residual { added[i] } else { 0.0 };
                    let limit = rounding(precision) * want.abs() + 1e-5 * (1.0 + bench.want.1[0][i]);
                    assert!(
                        (got - want).abs() <= limit,
                        "{config:?} {activation:?} at {i}: {got} for {want}"
                    );
                }
            }
            let view = View::new(0, 2, 6, 21, 40, 0);
            let out = device.allocate((view.len() + GUARD) * 4).expect("memory");
            // SAFETY: a live buffer, as long as the view.
            let tensor = unsafe {
                stream.fill(out.pointer(), 0xff, out.bytes()).expect("a fill");
                Tensor::new(out.pointer(), 4, &view)
            };
            run(tensor, Epilogue::Bias { bias: shift });
            let mut values = vec![0f32; view.len() + GUARD];
            stream.download(&out, 0, &mut values).expect("a copy");
            assert!(values[view.len()..].iter().all(|v| v.is_nan()));
            for i in 0..view.len() {
                let want = bench.want.0[0][i] + f64::from(columns[40 + i % 40]);
                let limit = 2e-6 * (1.0 + bench.want.1[0][i]);
                assert!(
                    (f64::from(values[i]) - want).abs() <= limit,
                    "{config:?} at {i}: {} for {want}",
                    values[i]
                );
            }
            bench.y.reset(stream);
            run(bench.y.tensor(), Epilogue::Raw);
            bench.check(0, "raw", &bench.y.read(stream, "forward"), true, 0.0);
        }
    }
}

#[test]
fn mma_the_whole_interface_takes_aligned_cases() {
    for device in testing::devices() {
        let bench = Bench::new(&device, Precision::Bf16, case((32, 48), 3, 1, (2, 8, 16), 0));
        let kernels = Conv2dKernels::load(&device, Precision::Bf16).expect("it loads");
        let (p, chip, stream) = (&bench.case.p, device.chip(), &bench.stream);
        assert!(uses_tensor_cores(p, &bench.shape(Pass::Forward), Precision::Bf16, chip));
        assert!(!uses_tensor_cores(p, &bench.shape(Pass::Forward), Precision::F32, chip));
        let model = Tuning::default();
        let passes = [Pass::Forward, Pass::BackwardData, Pass::BackwardWeight];
        let words =
            passes.map(|pass| workspace_len(pass, p, &bench.shape(pass), Precision::Bf16, chip, &model));
        let workspace = device.allocate(words.into_iter().max().map_or(4, |w| w.max(1) * 4)).expect("memory");
        stream.upload(&bench.dw, 0, &vec![1.0f32; p.weight_len()]).expect("a copy");
        let layout = stats_layout(p, &bench.shape(Pass::Forward), Precision::Bf16, chip, &model);
        assert_eq!(layout.partials, 256usize.div_ceil(layout.pixels_per_partial));
        let stats = device.allocate(layout.len(p) * 4).expect("memory");
        let (x, y, dy, dx) = (bench.x.tensor(), bench.y.tensor(), bench.dy.tensor(), bench.dx.tensor());
        let (weight, w, dw) = (bench.weight.pointer(), workspace.pointer(), bench.dw.pointer());
        // SAFETY: all buffers live to the end of the test, which waits for the launches.
        let graph = stream.capture(|s| unsafe {
            let epilogue = Epilogue::Stats { partials: stats.pointer() };
            kernels.forward(s, p, x, weight, y, epilogue, w)?;
            kernels.backward_data(s, p, dy, weight, dx, true, w)?;
            kernels.backward_weight(s, p, x, dy, dw, w)
        });
        // SAFETY: as above.
        unsafe { stream.run(&graph.expect("a graph")) }.expect("it runs");
        bench.check(0, "forward", &bench.y.read(stream, "forward"), true, 0.0);
        bench.check(1, "data gradient", &bench.dx.read(stream, "data gradient"), true, 1.0);
        let mut values = vec![0f32; p.weight_len()];
        stream.download(&bench.dw, 0, &mut values).expect("a copy");
        let got: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
        bench.check(2, "weight gradient", &got, false, 1.0);
    }
}

#[test]
fn mma_the_same_configuration_gives_the_same_bits() {
    for device in testing::devices() {
        let bench = Bench::new(&device, Precision::Bf16, case((64, 64), 3, 1, (2, 5, 5), 0));
        let mma = MmaKernels::load(&device, Precision::Bf16).expect("it loads");
        let configs = bench.configs(Pass::Forward, false);
        let split = configs.iter().find(|c| c.splits > 1).expect("a small map is split");
        let run = || {
            bench.forward(&mma, split);
            bench.y.read(&bench.stream, "forward").iter().map(|v| v.to_bits()).collect::<Vec<u64>>()
        };
        assert!(run() == run());
    }
}

/// A large chip, as the tables of the maker give it.
fn large_chip() -> Chip {
    Chip {
        name: "a large chip".into(),
        uuid: String::new(),
        major: 9,
        minor: 0,
        multiprocessors: 132,
        shared_bytes_max: 232_448,
        l2_bytes: 50 << 20,
        memory_bytes: 80 << 30,
    }
}

#[test]
fn configurations_fit_every_chip() {
    let small = Chip { major: 8, minor: 6, multiprocessors: 28, shared_bytes_max: 101_376, ..large_chip() };
    for chip in [large_chip(), small] {
        for (c, kernel, stride, size) in [
            ((16, 16), 3, 1, (16, 160, 160)),
            ((16, 32), 3, 2, (16, 320, 320)),
            ((80, 80), 3, 1, (16, 80, 80)),
            ((512, 512), 3, 1, (16, 20, 20)),
            ((640, 320), 1, 1, (1, 20, 20)),
            ((8, 8), 3, 1, (1, 1, 1)),
        ] {
            let case = case(c, kernel, stride, size, 0);
            let (p, (n, h, w)) = (&case.p, size);
            let (h_out, w_out) = p.output_size(h, w);
            let x = View::new(0, n, h, w, p.c_in, p.pad);
            let y = View::new(0, n, h_out, w_out, p.c_out, p.gradient_border());
            let shape = Shape::of_views(&x, &y, Precision::Bf16);
            for pass in [Pass::Forward, Pass::BackwardData, Pass::BackwardWeight] {
                let found = MmaConfig::candidates(pass, p, &shape, &chip, wgmma::is_wanted(&chip));
                println!("{c:?} {kernel} {stride} {size:?} {pass:?}: {:?}", &found[..found.len().min(2)]);
                assert_eq!(found[0], MmaConfig::choose(pass, p, &shape, &chip));
                for config in found {
                    assert!(config.workspace_len(pass, p, &shape) <= 1 << 25);
                    assert!(config.splits >= 1 && config.splits < 65536);
                }
            }
        }
    }
}
