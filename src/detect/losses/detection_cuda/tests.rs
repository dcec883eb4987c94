//! The device's loss against the CPU's: the same assignment, the same terms, the same gradients.

use half::{bf16, f16};

use super::*;
use crate::detect::decode::HeadLevel;
use crate::detect::losses::detection::{DetectionLoss, HeadLevelGrad, LossItems};
use crate::engine::device::cuda::Tensor;
use crate::engine::device::cuda::testing::devices;
use crate::engine::rng::{Rng, Use};
use crate::engine::tensor::View;

/// A head with random logits and its targets.
struct Case {
    n: usize,
    nc: usize,
    reg_max: usize,
    /// Stride, rows, columns.
    grids: Vec<(usize, usize, usize)>,
    boxes: Vec<Vec<f32>>,
    scores: Vec<Vec<f32>>,
    targets: Vec<Target>,
    class_weights: Option<Vec<f32>>,
}

const GRIDS: [(usize, usize, usize); 3] = [(8, 10, 14), (16, 5, 7), (32, 3, 4)];

impl Case {
    /// `boxes[i]` boxes in image i.
    fn new(seed: u32, nc: usize, reg_max: usize, grids: &[(usize, usize, usize)], boxes: &[usize]) -> Case {
        let n = boxes.len();
        let mut rng = Rng::new(u64::from(seed), Use::Test, 0, 0);
        let mut noise = |len: usize, mean: f64, spread: f64| -> Vec<f32> {
            (0..len).map(|_| (mean + spread * rng.normal()) as f32).collect()
        };
        // Low bins are likelier, so that predictions are of the size of objects.
        let logits = |h: usize, w: usize, noise: &mut dyn FnMut(usize, f64, f64) -> Vec<f32>| {
            let mut logits = noise(n * h * w * 4 * reg_max, if reg_max == 1 { 1.5 } else { 0.0 }, 1.5);
            for (i, v) in logits.iter_mut().enumerate() {
                *v -= (i % reg_max) as f32 * 0.5;
            }
            logits
        };
        let box_logits: Vec<_> = grids.iter().map(|&(_, h, w)| logits(h, w, &mut noise)).collect();
        let scores: Vec<_> = grids.iter().map(|&(_, h, w)| noise(n * h * w * nc, -2.0, 3.0)).collect();
        let mut targets = Vec::new();
        for (image, &count) in boxes.iter().enumerate() {
            for index in 0..count {
                // Now and then a box on a cell's edge, a tiny one, one as large as the image, an empty one.
                let mut cxcywh = [0.0; 4].map(|_: f32| rng.range(0.05, 0.95) as f32);
                (cxcywh[2], cxcywh[3]) = (cxcywh[2] * 0.6, cxcywh[3] * 0.6);
                match index % 11 {
                    3 => cxcywh = [0.5, 0.5, 0.25, 0.25],
                    5 => (cxcywh[2], cxcywh[3]) = (0.004, 0.01),
                    7 => cxcywh = [0.5, 0.5, 1.0, 1.0],
                    9 => cxcywh = [0.0; 4],
                    _ => {}
                }
                let class = rng.below(nc) as u32;
                targets.push(Target { image: image as u32, class, cxcywh });
            }
        }
        let grids = grids.to_vec();
        Case { n, nc, reg_max, grids, boxes: box_logits, scores, targets, class_weights: None }
    }

    fn anchors(&self) -> usize {
        self.grids.iter().map(|g| g.1 * g.2).sum()
    }

    fn config(&self) -> LossConfig {
        LossConfig {
            reg_max: self.reg_max,
            class_weights: self.class_weights.clone(),
            ..LossConfig::new(self.nc)
        }
    }

    fn cpu(&self, scale: f32) -> (LossItems, Gradients, DetectionLoss) {
        let mut loss = DetectionLoss::new(self.config(), self.n, self.anchors(), 0);
        let mut gradients: Gradients = self
            .boxes
            .iter()
            .zip(&self.scores)
            .map(|(b, s)| (vec![0.0; b.len()], vec![0.0; s.len()]))
            .collect();
        let levels: Vec<HeadLevel> = (0..self.grids.len())
            .map(|l| {
                let (stride, h, w) = self.grids[l];
                HeadLevel { stride, h, w, boxes: &self.boxes[l], scores: &self.scores[l] }
            })
            .collect();
        let mut outputs: Vec<HeadLevelGrad> =
            gradients.iter_mut().map(|(boxes, scores)| HeadLevelGrad { boxes, scores }).collect();
        let items = loss.compute(&levels, &mut outputs, &self.targets, self.n, scale);
        (items, gradients, loss)
    }
}

/// Per level: of the box logits, of the class logits.
type Gradients = Vec<(Vec<f32>, Vec<f32>)>;

/// A case on the device. Gradients are prefilled with NaN.
struct OnDevice {
    loss: DeviceDetectionLoss,
    levels: Vec<DeviceHeadLevel>,
    gradients: Vec<[(Buffer, View); 2]>,
    scale: Buffer,
    _logits: Vec<Buffer>,
}

impl OnDevice {
    /// `is_padded`: gradients have their channels rounded up to eight.
    fn new(case: &Case, stream: &Stream, precision: Precision, is_padded: bool, scale: f32) -> OnDevice {
        let device = stream.device();
        let (mut logits, mut gradients, mut levels) = (Vec::new(), Vec::new(), Vec::new());
        for (l, &(stride, h, w)) in case.grids.iter().enumerate() {
            let mut input = |numbers: &[f32], c: usize| {
                let buffer = device.allocate(numbers.len() * 4).expect("memory");
                stream.upload(&buffer, 0, numbers).expect("a copy");
                // SAFETY: the view is that of the buffer, which lives as long as the case.
                let tensor = unsafe { Tensor::new(buffer.pointer(), 4, &View::new(0, case.n, h, w, c, 0)) };
                logits.push(buffer);
                tensor
            };
            let boxes = input(&case.boxes[l], 4 * case.reg_max);
            let scores = input(&case.scores[l], case.nc);
            let output = |c: usize| {
                let pitch = if is_padded { c.next_multiple_of(8) } else { c };
                let view = View::new(0, case.n, h, w, pitch, 0).slice(0, c);
                let buffer = device.allocate(case.n * h * w * pitch * precision.bytes()).expect("memory");
                // SAFETY: the whole buffer, just allocated.
                unsafe { stream.fill(buffer.pointer(), 0xff, buffer.bytes()) }.expect("a fill");
                // SAFETY: as above.
                (unsafe { Tensor::new(buffer.pointer(), precision.bytes(), &view) }, (buffer, view))
            };
            let (box_gradient, a) = output(4 * case.reg_max);
            let (score_gradient, b) = output(case.nc);
            gradients.push([a, b]);
            levels.push(DeviceHeadLevel {
                stride: stride as u32,
                boxes,
                scores,
                box_gradient,
                score_gradient,
            });
        }
        let capacity = LossCapacity { max_batch: case.n + 1, max_anchors: case.anchors() + 3, max_boxes: 5 };
        let loss = DeviceDetectionLoss::new(stream, precision, case.config(), capacity).expect("it loads");
        let scale_buffer = device.allocate(4).expect("memory");
        stream.upload(&scale_buffer, 0, &[scale]).expect("a copy");
        OnDevice { loss, levels, gradients, scale: scale_buffer, _logits: logits }
    }

    fn run(&mut self, case: &Case, stream: &Stream) -> LossResults {
        // SAFETY: every run ends in a synchronisation.
        unsafe { self.loss.upload_targets(stream, &case.targets, case.n) }.expect("a copy");
        // SAFETY: everything lives in `self`.
        unsafe { self.loss.compute(stream, &self.levels, case.n, self.scale.pointer()) }.expect("launches");
        self.loss.read(stream).expect("a copy")
    }

    /// Gradients without padding, which is checked to be zero.
    fn read(&self, stream: &Stream, precision: Precision) -> Gradients {
        let one = |(buffer, view): &(Buffer, View)| {
            let all = download(stream, buffer, precision);
            let (c, pitch) = (view.c, view.pixel_pitch);
            all.chunks_exact(pitch)
                .flat_map(|row| {
                    assert!(row[c..].iter().all(|v| *v == 0.0), "padding is zero");
                    row[..c].iter().copied()
                })
                .collect::<Vec<f32>>()
        };
        self.gradients.iter().map(|[a, b]| (one(a), one(b))).collect()
    }
}

fn download(stream: &Stream, buffer: &Buffer, precision: Precision) -> Vec<f32> {
    let len = buffer.bytes() / precision.bytes();
    match precision {
        Precision::F32 => {
            let mut out = vec![0.0f32; len];
            stream.download(buffer, 0, &mut out).expect("a copy");
            out
        }
        Precision::Bf16 => {
            let mut out = vec![bf16::ZERO; len];
            stream.download(buffer, 0, &mut out).expect("a copy");
            out.into_iter().map(bf16::to_f32).collect()
        }
        Precision::F16 => {
            let mut out = vec![f16::ZERO; len];
            stream.download(buffer, 0, &mut out).expect("a copy");
            out.into_iter().map(f16::to_f32).collect()
        }
    }
}

/// What rounding to the storage type may change, as a share.
fn rounding(precision: Precision) -> f32 {
    match precision {
        Precision::F32 => 0.0,
        Precision::Bf16 => 1.0 / 256.0,
        Precision::F16 => 1.0 / 2048.0,
    }
}

fn check_gradients(what: &str, found: &Gradients, expected: &Gradients, precision: Precision) {
    // Half has no numbers below 2^-24.
    let floor = if precision == Precision::F16 { 2.0f32.powi(-25) } else { 1e-12 };
    for (level, (found, expected)) in found.iter().zip(expected).enumerate() {
        for (kind, found, expected) in [("box", &found.0, &expected.0), ("class", &found.1, &expected.1)] {
            assert_eq!(found.len(), expected.len());
            let top = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            for (i, (f, e)) in found.iter().zip(expected).enumerate() {
                // A class gradient is a difference of two numbers up to `top`, a box gradient a sum of such.
                let allowed = (1e-5 + rounding(precision)) * e.abs() + 1e-6 * top + floor;
                assert!((f - e).abs() <= allowed, "{what}, level {level}, {kind} {i}: {f} against {e}");
            }
        }
    }
}

fn check_assignment(
    what: &str,
    case: &Case,
    stream: &Stream,
    loss: &DeviceDetectionLoss,
    cpu: &DetectionLoss,
) {
    for image in 0..case.n {
        let (targets, positives) = loss.assignment(stream, case.anchors(), image).expect("a copy");
        let (wanted_targets, wanted) = cpu.assignment(image);
        assert_eq!(targets, wanted_targets, "{what}, image {image}");
        let owners = |p: &[(u32, u32)]| p.to_vec();
        let found: Vec<_> = positives.iter().map(|p| (p.anchor, p.target)).collect();
        let expected: Vec<_> = wanted.iter().map(|p| (p.anchor, p.target)).collect();
        assert_eq!(owners(&found), owners(&expected), "{what}, image {image}");
        for (f, e) in positives.iter().zip(wanted) {
            assert!((f.score - e.score).abs() <= 2e-6 * e.score, "{what}: {f:?} against {e:?}");
        }
    }
}

fn check(what: &str, case: &Case, precision: Precision, is_padded: bool) {
    let scale = 0.37f32;
    let (items, expected, cpu) = case.cpu(scale);
    for device in devices() {
        let stream = device.stream().expect("a stream");
        let mut on_device = OnDevice::new(case, &stream, precision, is_padded, scale);
        let results = on_device.run(case, &stream);
        check_assignment(what, case, &stream, &on_device.loss, &cpu);
        let pairs = [
            (results.box_, items.box_),
            (results.cls, items.cls),
            (results.dfl, items.dfl),
            (results.total, items.total),
        ];
        for (found, wanted) in pairs {
            assert!((found - wanted).abs() <= 2e-6 * wanted.abs(), "{what}: {results:?} against {items:?}");
        }
        let found = on_device.read(&stream, precision);
        check_gradients(what, &found, &expected, precision);
        // A second run over the same memory gives the same bits.
        assert_eq!(on_device.run(case, &stream), results, "{what}");
        assert_eq!(on_device.read(&stream, precision), found, "{what}");
    }
}

#[test]
fn agrees_with_the_cpu_on_many_seeds() {
    for seed in 0..12 {
        let boxes = [4 + seed as usize, 0, 9 + 3 * seed as usize];
        let case = Case::new(seed, 8, 16, &GRIDS, &boxes);
        check(&format!("seed {seed}"), &case, Precision::F32, false);
    }
}

#[test]
fn agrees_with_the_cpu_in_every_storage_type_and_width() {
    for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
        for (seed, (nc, reg_max)) in [(1, 16), (80, 16), (3, 1), (5, 64), (13, 3)].into_iter().enumerate() {
            for is_padded in [false, true] {
                let mut case = Case::new(100 + seed as u32, nc, reg_max, &GRIDS, &[6, 11]);
                if nc == 5 || nc == 80 {
                    case.class_weights = Some((0..nc).map(|c| 0.5 + 0.1 * c as f32).collect());
                }
                check(&format!("{nc} classes, {reg_max} bins, {precision:?}"), &case, precision, is_padded);
            }
        }
    }
}

#[test]
fn maps_of_one_cell_empty_batches_and_crowds() {
    let cells = [(8, 1, 1), (16, 1, 1), (32, 1, 1)];
    check("one cell", &Case::new(1, 2, 16, &cells, &[3, 1]), Precision::F32, true);
    check("one level", &Case::new(2, 4, 16, &[(16, 9, 5)], &[7]), Precision::F32, true);
    check("no boxes", &Case::new(3, 80, 16, &GRIDS, &[0, 0]), Precision::Bf16, true);
    check("500 boxes", &Case::new(4, 80, 16, &GRIDS, &[2, 500]), Precision::F32, true);
    let five = [(4, 12, 8), (8, 6, 4), (16, 3, 2), (32, 2, 1), (64, 1, 1)];
    check("five levels", &Case::new(5, 3, 16, &five, &[8, 0, 20, 1]), Precision::F32, false);
}

#[test]
fn a_captured_step_replays_with_other_boxes() {
    let cases = [9usize, 0, 3].map(|boxes| Case::new(7, 4, 16, &GRIDS, &[boxes, 2 * boxes]));
    for device in devices() {
        let stream = device.stream().expect("a stream");
        let mut on_device = OnDevice::new(&cases[0], &stream, Precision::F32, false, 1.0);
        assert!(on_device.loss.reserve_boxes(&stream, 40).expect("memory"));
        let graph = stream
            .capture(|stream| {
                // SAFETY: everything lives in `on_device`, which outlives the graph.
                unsafe { on_device.loss.compute(stream, &on_device.levels, 2, 0) }
            })
            .expect("a capture");
        for case in &cases {
            let (items, ..) = case.cpu(1.0);
            // SAFETY: every turn ends in a synchronisation.
            let moved = unsafe { on_device.loss.upload_targets(&stream, &case.targets, 2) }.expect("a copy");
            assert!(!moved);
            // SAFETY: the memory of the capture is alive and has not moved.
            unsafe { stream.run(&graph) }.expect("a launch");
            let results = on_device.loss.read(&stream).expect("a copy");
            // The logits are those of the first case; only their seed and shape decide them, so all agree.
            assert!(
                (results.total - items.total).abs() <= 2e-6 * items.total,
                "{results:?} against {items:?}"
            );
        }
    }
}

#[test]
fn terms_without_gradients_are_the_same() {
    for reg_max in [1, 16] {
        let case = Case::new(21, 5, reg_max, &GRIDS, &[4, 7]);
        for device in devices() {
            let stream = device.stream().expect("a stream");
            let mut on_device = OnDevice::new(&case, &stream, Precision::F32, false, 1.0);
            let results = on_device.run(&case, &stream);
            for level in &mut on_device.levels {
                *level = DeviceHeadLevel::without_gradients(level.stride, level.boxes, level.scores);
            }
            assert_eq!(on_device.run(&case, &stream), results);
        }
    }
}

#[test]
fn bytes_are_those_allocated() {
    let case = Case::new(7, 4, 16, &GRIDS, &[3]);
    for device in devices() {
        let stream = device.stream().expect("a stream");
        let on_device = OnDevice::new(&case, &stream, Precision::F32, false, 1.0);
        let loss = &on_device.loss;
        let bytes = DeviceDetectionLoss::bytes(&case.config(), &loss.capacity());
        assert_eq!(bytes, loss.workspace.bytes() + loss.targets.bytes());
    }
}
