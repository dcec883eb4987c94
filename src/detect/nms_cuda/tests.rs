//! The device's detections against the CPU's: the same boxes, the same bits.

use super::*;
use crate::detect::decode::{HeadLevel, detect};
use crate::engine::device::cuda::Tensor;
use crate::engine::device::cuda::testing::devices;
use crate::engine::rng::{Rng, Use};
use crate::engine::tensor::View;

const GRIDS: [(usize, usize, usize); 3] = [(8, 9, 13), (16, 5, 7), (32, 3, 4)];

struct Case {
    n: usize,
    nc: usize,
    reg_max: usize,
    boxes: Vec<Vec<f32>>,
    scores: Vec<Vec<f32>>,
}

impl Case {
    /// Class logits around `mean`; with `is_coarse` they take few values, so that scores tie.
    fn new(seed: u64, n: usize, nc: usize, reg_max: usize, mean: f64, is_coarse: bool) -> Case {
        let mut rng = Rng::new(seed, Use::Test, 1, 0);
        let (mut boxes, mut scores) = (Vec::new(), Vec::new());
        for (_, h, w) in GRIDS {
            boxes.push((0..n * h * w * 4 * reg_max).map(|_| (2.0 * rng.normal()) as f32).collect());
            let mut logit = || {
                let x = mean + 2.0 * rng.normal();
                if is_coarse { (x * 2.0).round() as f32 / 2.0 } else { x as f32 }
            };
            scores.push((0..n * h * w * nc).map(|_| logit()).collect());
        }
        Case { n, nc, reg_max, boxes, scores }
    }

    fn levels(&self) -> Vec<HeadLevel<'_>> {
        let level = |l: usize| {
            let (stride, h, w) = GRIDS[l];
            HeadLevel { stride, h, w, boxes: &self.boxes[l], scores: &self.scores[l] }
        };
        (0..GRIDS.len()).map(level).collect()
    }

    fn check(&self, what: &str, args: &NmsArgs) {
        let expected = detect(&self.levels(), self.nc, self.reg_max, self.n, args);
        for device in devices() {
            let stream = device.stream().expect("a stream");
            let capacity =
                NmsCapacity { max_batch: self.n + 1, max_anchors: 200, nc: self.nc, reg_max: self.reg_max };
            let nms = DeviceNms::new(&stream, args.clone(), capacity).expect("it loads");
            assert_eq!(nms.workspace.bytes(), DeviceNms::bytes(args, &capacity));
            let mut buffers = Vec::new();
            let mut send = |numbers: &[f32], h: usize, w: usize, c: usize| {
                let buffer = device.allocate(numbers.len() * 4).expect("memory");
                stream.upload(&buffer, 0, numbers).expect("a copy");
                // SAFETY: the view is that of the buffer, which outlives the work.
                let tensor = unsafe { Tensor::new(buffer.pointer(), 4, &View::new(0, self.n, h, w, c, 0)) };
                buffers.push(buffer);
                tensor
            };
            let levels: Vec<DeviceHeadLevel> = (0..GRIDS.len())
                .map(|l| {
                    let (stride, h, w) = GRIDS[l];
                    let boxes = send(&self.boxes[l], h, w, 4 * self.reg_max);
                    let scores = send(&self.scores[l], h, w, self.nc);
                    DeviceHeadLevel::without_gradients(stride as u32, boxes, scores)
                })
                .collect();
            for _ in 0..2 {
                // SAFETY: everything lives until the end of the loop.
                unsafe { nms.detect(&stream, &levels, self.n) }.expect("launches");
                let found = nms.read(&stream, self.n).expect("a copy");
                for (image, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    assert_eq!(found.len(), expected.len(), "{what}, image {image}");
                    // As text, so that what is no number equals itself.
                    assert_eq!(format!("{found:?}"), format!("{expected:?}"), "{what}, image {image}");
                }
                assert_eq!(found.len(), expected.len());
            }
        }
    }
}

#[test]
fn gives_the_cpus_detections() {
    let validation = NmsArgs { max_det: 40, ..NmsArgs::validation() };
    for seed in 0..3 {
        let what = format!("seed {seed}");
        Case::new(seed, 2, 8, 16, -3.0, seed == 1)
            .check(&what, &NmsArgs { conf: 0.05, ..validation.clone() });
        Case::new(seed, 2, 8, 16, -3.0, seed == 1)
            .check(&what, &NmsArgs { max_det: 30, ..NmsArgs::prediction() });
    }
    Case::new(5, 1, 1, 16, -1.0, false).check("one class", &validation);
    Case::new(6, 2, 13, 1, -4.0, false).check("13 classes, no distribution", &validation);
    Case::new(7, 1, 80, 16, -12.0, false).check("none", &NmsArgs { conf: 0.9, ..validation.clone() });
    let agnostic = NmsArgs { agnostic: true, conf: 0.1, ..validation.clone() };
    Case::new(8, 2, 3, 16, -2.0, false).check("agnostic", &agnostic);
    let some = NmsArgs { classes: Some(vec![1, 4]), conf: 0.05, ..validation.clone() };
    Case::new(9, 2, 5, 16, -2.0, false).check("some classes", &some);
    Case::new(9, 2, 5, 16, -2.0, false).check("some classes, best", &NmsArgs { multi_label: false, ..some });
}

#[test]
fn selects_the_best_of_too_many() {
    for max_nms in [0, 1, 37, 300] {
        for multi_label in [true, false] {
            for is_coarse in [false, true] {
                let args = NmsArgs { max_nms, multi_label, max_det: 25, iou: 0.3, ..NmsArgs::validation() };
                let what = format!("the best {max_nms}, several labels {multi_label}, ties {is_coarse}");
                Case::new(11, 2, 6, 4, -1.0, is_coarse).check(&what, &args);
            }
        }
    }
}

#[test]
fn huge_boxes_meet_across_classes() {
    let mut case = Case::new(12, 1, 4, 1, -1.0, false);
    case.boxes[2][..4].copy_from_slice(&[300.0, 300.0, 300.0, 300.0]);
    case.boxes[2][8] = f32::NAN;
    let args = NmsArgs { max_det: 50, conf: 0.1, ..NmsArgs::validation() };
    case.check("a huge box and one that is no number", &args);
    case.boxes[2][8] = 1.0;
    case.check("a huge box", &args);
}
