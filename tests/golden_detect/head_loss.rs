//! The anchor-point loss on the stored head outputs of the reduced YOLOv8, and suppression of its decoded output.

use boxwright::detect::decode::{HeadLevel, decode, detect};
use boxwright::detect::losses::detection::{DetectionLoss, HeadLevelGrad, LossConfig, LossItems};
use boxwright::detect::nms::{NmsArgs, nms_batch};
use boxwright::detect::targets::Target;

use crate::assigner::{Dense, SCORE_FLOOR};
use crate::common::tolerances::{ASSIGNER_SCORES, LOSS, MODEL_BOXES_PX};
use crate::common::{Golden, assert_close, assert_exact};
use crate::evaluation::{anchors_first, check_detections};

/// A head's outputs, level by level, channels last.
pub struct Head {
    pub n: usize,
    pub nc: usize,
    pub reg_max: usize,
    pub grids: Vec<(usize, usize, usize)>,
    pub boxes: Vec<Vec<f32>>,
    pub scores: Vec<Vec<f32>>,
}

impl Head {
    pub fn read(golden: &Golden) -> Head {
        let strides = golden.meta("strides").as_array().expect("strides");
        let grids: Vec<_> = strides
            .iter()
            .enumerate()
            .map(|(level, stride)| {
                let shape = golden.shape(&format!("train.feat{level}"));
                (stride.as_f64().expect("a stride") as usize, shape[2], shape[3])
            })
            .collect();
        let split = |name: &str| -> Vec<Vec<f32>> {
            let shape = golden.shape(name);
            let all = anchors_first(&golden.f32(name), &shape);
            let (n, width, anchors) = (shape[0], shape[1], shape[2]);
            let mut first = 0;
            grids
                .iter()
                .map(|&(_, h, w)| {
                    let rows = (0..n).flat_map(|image| {
                        all[(image * anchors + first) * width..][..h * w * width].iter().copied()
                    });
                    let level = rows.collect();
                    first += h * w;
                    level
                })
                .collect()
        };
        Head {
            n: golden.shape("train.boxes")[0],
            nc: golden.meta_usize("nc"),
            reg_max: golden.meta_usize("reg_max"),
            boxes: split("train.boxes"),
            scores: split("train.scores"),
            grids,
        }
    }

    pub fn levels(&self) -> Vec<HeadLevel<'_>> {
        self.grids
            .iter()
            .enumerate()
            .map(|(l, &(stride, h, w))| HeadLevel {
                stride,
                h,
                w,
                boxes: &self.boxes[l],
                scores: &self.scores[l],
            })
            .collect()
    }

    fn anchors(&self) -> usize {
        self.grids.iter().map(|g| g.1 * g.2).sum()
    }
}

pub fn targets(golden: &Golden) -> Vec<Target> {
    let (images, classes) = (golden.i64("in.batch_idx"), golden.i64("in.cls"));
    let boxes = golden.f32("in.bboxes");
    let row = |i: usize| Target {
        image: images[i] as u32,
        class: classes[i] as u32,
        cxcywh: boxes.as_chunks::<4>().0[i],
    };
    (0..images.len()).map(row).collect()
}

pub fn config(golden: &Golden) -> LossConfig {
    let gains = golden.meta("gains");
    let gain = |name: &str| gains[name].as_f64().expect("a gain") as f32;
    LossConfig {
        reg_max: golden.meta_usize("reg_max"),
        gain_box: gain("box"),
        gain_cls: gain("cls"),
        gain_dfl: gain("dfl"),
        ..LossConfig::new(golden.meta_usize("nc"))
    }
}

type Gradients = Vec<(Vec<f32>, Vec<f32>)>;

fn compute(head: &Head, loss: &mut DetectionLoss, targets: &[Target], scale: f32) -> (LossItems, Gradients) {
    // Filled with rubbish: the loss must overwrite every element.
    let mut buffers: Gradients =
        head.boxes.iter().zip(&head.scores).map(|(b, s)| (vec![7.5; b.len()], vec![-7.5; s.len()])).collect();
    let mut grads: Vec<HeadLevelGrad> =
        buffers.iter_mut().map(|(boxes, scores)| HeadLevelGrad { boxes, scores }).collect();
    let items = loss.compute(&head.levels(), &mut grads, targets, head.n, scale);
    (items, buffers)
}

#[test]
fn golden_head_loss_items_and_assignment() {
    let golden = Golden::open("yolov8_tiny");
    let (head, targets) = (Head::read(&golden), targets(&golden));
    let mut loss = DetectionLoss::new(config(&golden), head.n, head.anchors(), 1);
    let (items, _) = compute(&head, &mut loss, &targets, 1.0);
    assert_close("loss.items", &[items.box_, items.cls, items.dfl], &golden.f32("loss.items"), LOSS);
    let n = head.n as f32;
    assert_close("loss.vec", &[items.box_ * n, items.cls * n, items.dfl * n], &golden.f32("loss.vec"), LOSS);
    assert_close("loss.total", &[items.total], &golden.f32("loss.total"), LOSS);

    let (anchors, nc) = (head.anchors(), head.nc);
    let (wanted_scores, wanted_fg) = (golden.f32("assign.target_scores"), golden.i64("assign.fg_mask"));
    let (wanted_index, wanted_boxes) =
        (golden.i64("assign.target_gt_idx"), golden.f32("assign.target_bboxes"));
    let wanted_predicted = golden.f32("assign.pred_bboxes_px");
    for image in 0..head.n {
        let (rows, positives) = loss.assignment(image);
        let mut dense = Dense::new(anchors, nc, rows.first().copied());
        for p in positives {
            dense.put(nc, p.anchor as usize, p.target as usize, rows[p.target as usize], p.score);
        }
        let at = image * anchors;
        let wanted = &wanted_scores[at * nc..][..anchors * nc];
        assert_close("assign.target_scores", &dense.scores, wanted, ASSIGNER_SCORES);
        let keep: Vec<bool> = (0..anchors)
            .map(|a| {
                let score = wanted[a * nc..][..nc].iter().sum::<f32>();
                score > SCORE_FLOOR || (wanted_fg[at + a] == 0 && dense.foreground[a] == 0)
            })
            .collect();
        let foreground: Vec<i64> = dense.foreground.iter().map(|f| *f as i64).collect();
        for (name, got, expected) in [
            ("assign.fg_mask", &foreground, &wanted_fg),
            ("assign.target_gt_idx", &dense.target_index, &wanted_index),
        ] {
            let expected = Dense::determined(&expected[at..][..anchors], 1, &keep);
            assert_exact(name, &Dense::determined(got, 1, &keep), &expected);
        }
        let expected = Dense::determined(&wanted_boxes[at * 4..][..anchors * 4], 4, &keep);
        assert_close(
            "assign.target_bboxes",
            &Dense::determined(&dense.boxes, 4, &keep),
            &expected,
            MODEL_BOXES_PX,
        );
        let predicted = loss.predicted_xyxy(image).concat();
        assert_close(
            "assign.pred_bboxes_px",
            &predicted,
            &wanted_predicted[at * 4..][..anchors * 4],
            MODEL_BOXES_PX,
        );
    }
}

/// The total loss in double precision from the definition, for a fixed assignment and fixed CIoU weights `alpha`.
struct Naive<'a> {
    head: &'a Head,
    config: LossConfig,
    positives: Vec<NaivePositive>,
}

struct NaivePositive {
    image: usize,
    level: usize,
    cell: usize,
    /// Corners in grid units.
    target: [f64; 4],
    class: usize,
    score: f64,
    alpha: f64,
}

/// IoU, distance term and aspect term `v`.
fn ciou_parts(p: [f64; 4], q: [f64; 4]) -> (f64, f64, f64) {
    const EPS: f64 = 1e-7;
    let (w1, h1, w2, h2) = (p[2] - p[0], p[3] - p[1] + EPS, q[2] - q[0], q[3] - q[1] + EPS);
    let inter = (p[2].min(q[2]) - p[0].max(q[0])).max(0.0) * (p[3].min(q[3]) - p[1].max(q[1])).max(0.0);
    let iou = inter / (w1 * h1 + w2 * h2 - inter + EPS);
    let (cw, ch) = (p[2].max(q[2]) - p[0].min(q[0]), p[3].max(q[3]) - p[1].min(q[1]));
    let rho = ((q[0] + q[2] - p[0] - p[2]).powi(2) + (q[1] + q[3] - p[1] - p[3]).powi(2)) / 4.0;
    let v = 4.0 / std::f64::consts::PI.powi(2) * ((w2 / h2).atan() - (w1 / h1).atan()).powi(2);
    (iou, rho / (cw * cw + ch * ch + EPS), v)
}

impl Naive<'_> {
    fn softmax(&self, logits: &[f64]) -> (Vec<f64>, f64) {
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log_sum = logits.iter().map(|x| (x - max).exp()).sum::<f64>().ln() + max;
        (logits.iter().map(|x| (x - log_sum).exp()).collect(), log_sum)
    }

    fn predicted(&self, logits: &[f64], point: [f64; 2]) -> [f64; 4] {
        let d: Vec<f64> = logits
            .chunks_exact(self.head.reg_max)
            .map(|side| self.softmax(side).0.iter().enumerate().map(|(b, p)| b as f64 * p).sum())
            .collect();
        [point[0] - d[0], point[1] - d[1], point[0] + d[2], point[1] + d[3]]
    }

    fn norm(&self) -> f64 {
        self.positives.iter().map(|p| p.score).sum::<f64>().max(1.0)
    }

    /// Box and third term of one positive, gains included, for the given box logits.
    fn box_terms(&self, index: usize, logits: &[f64]) -> f64 {
        let NaivePositive { level, cell, target, score, alpha, .. } = self.positives[index];
        let w = self.head.grids[level].2;
        let point = [(cell % w) as f64 + 0.5, (cell / w) as f64 + 0.5];
        let (iou, distance, v) = ciou_parts(self.predicted(logits, point), target);
        let mut dfl = 0.0;
        let wanted = [point[0] - target[0], point[1] - target[1], target[2] - point[0], target[3] - point[1]];
        for (side, row) in logits.chunks_exact(self.head.reg_max).enumerate() {
            let g = wanted[side].clamp(0.0, self.head.reg_max as f64 - 1.0 - 0.01);
            let (left, log_sum) = (g.floor(), self.softmax(row).1);
            let l = left as usize;
            dfl -= ((row[l] - log_sum) * (left + 1.0 - g) + (row[l + 1] - log_sum) * (g - left)) / 4.0;
        }
        let c = &self.config;
        let box_ = 1.0 - (iou - distance - v * alpha);
        self.head.n as f64 * score * (c.gain_box as f64 * box_ + c.gain_dfl as f64 * dfl) / self.norm()
    }
}

fn naive<'a>(head: &'a Head, config: LossConfig, loss: &DetectionLoss) -> Naive<'a> {
    let mut out = Naive { head, config, positives: Vec::new() };
    for image in 0..head.n {
        let (rows, positives) = loss.assignment(image);
        for p in positives {
            let (mut level, mut cell) = (0, p.anchor as usize);
            while cell >= head.grids[level].1 * head.grids[level].2 {
                cell -= head.grids[level].1 * head.grids[level].2;
                level += 1;
            }
            let (stride, _, w) = head.grids[level];
            let row = rows[p.target as usize];
            let target = row.xyxy.map(|v| (v / stride as f32) as f64);
            let logits = out.box_logits(image, level, cell);
            let point = [(cell % w) as f64 + 0.5, (cell / w) as f64 + 0.5];
            let (iou, _, v) = ciou_parts(out.predicted(&logits, point), target);
            let alpha = v / (v - iou + 1.0 + 1e-7);
            let class = row.class as usize;
            out.positives.push(NaivePositive {
                image,
                level,
                cell,
                target,
                class,
                score: p.score as f64,
                alpha,
            });
        }
    }
    out
}

impl Naive<'_> {
    fn box_logits(&self, image: usize, level: usize, cell: usize) -> Vec<f64> {
        let (_, h, w) = self.head.grids[level];
        let width = 4 * self.head.reg_max;
        self.head.boxes[level][(image * h * w + cell) * width..][..width].iter().map(|v| *v as f64).collect()
    }
}

#[test]
fn golden_head_loss_gradient_equals_finite_differences() {
    let golden = Golden::open("yolov8_tiny");
    let (head, targets) = (Head::read(&golden), targets(&golden));
    let mut config = config(&golden);
    for weighted in [false, true] {
        if weighted {
            config.class_weights = Some((0..head.nc).map(|c| 0.5 + c as f32).collect());
        }
        let mut loss = DetectionLoss::new(config.clone(), head.n, head.anchors(), 0);
        let scale = 0.25;
        let (_, gradients) = compute(&head, &mut loss, &targets, scale);
        let reference = naive(&head, config.clone(), &loss);
        let width = 4 * head.reg_max;
        let mut expected: Vec<Vec<f64>> = head.boxes.iter().map(|b| vec![0.0; b.len()]).collect();
        for (index, p) in reference.positives.iter().enumerate() {
            let (_, h, w) = head.grids[p.level];
            let at = (p.image * h * w + p.cell) * width;
            let logits = reference.box_logits(p.image, p.level, p.cell);
            for k in 0..width {
                let step = 1e-5;
                let moved = |by: f64| {
                    let mut logits = logits.clone();
                    logits[k] += by;
                    reference.box_terms(index, &logits)
                };
                expected[p.level][at + k] = scale as f64 * (moved(step) - moved(-step)) / (2.0 * step);
            }
        }
        let mut targets_of: Vec<Vec<f64>> = head.scores.iter().map(|s| vec![0.0; s.len()]).collect();
        for p in &reference.positives {
            let (_, h, w) = head.grids[p.level];
            targets_of[p.level][(p.image * h * w + p.cell) * head.nc + p.class] = p.score;
        }
        for level in 0..head.grids.len() {
            let scale_of = expected[level].iter().fold(1e-9f64, |m, v| m.max(v.abs()));
            for (i, (got, want)) in gradients[level].0.iter().zip(&expected[level]).enumerate() {
                let error = (*got as f64 - want).abs();
                assert!(
                    error < 1e-4 * want.abs() + 2e-5 * scale_of,
                    "level {level} box {i}: {got} against {want}"
                );
            }
            // The class gradient has a closed form: weight * (sigmoid - target).
            for (i, got) in gradients[level].1.iter().enumerate() {
                let x = head.scores[level][i] as f64;
                let weight = config.class_weights.as_ref().map_or(1.0, |w| w[i % head.nc] as f64);
                let want = scale as f64 * head.n as f64 * config.gain_cls as f64 / reference.norm()
                    * weight
                    * (1.0 / (1.0 + (-x).exp()) - targets_of[level][i]);
                assert!(
                    (*got as f64 - want).abs() < 1e-6 + 1e-5 * want.abs(),
                    "level {level} class {i}: {got} {want}"
                );
            }
        }
    }
}

#[test]
fn golden_head_loss_does_not_depend_on_threads_or_on_earlier_calls() {
    let golden = Golden::open("yolov8_tiny");
    let (head, targets) = (Head::read(&golden), targets(&golden));
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| {
            let mut loss = DetectionLoss::new(config(&golden), head.n, head.anchors(), 0);
            let bytes = loss.bytes();
            compute(&head, &mut loss, &[], 1.0);
            assert_eq!(loss.bytes(), bytes);
            let first = compute(&head, &mut loss, &targets, 1.0);
            let grown = loss.bytes();
            let second = compute(&head, &mut loss, &targets, 1.0);
            assert_eq!(loss.bytes(), grown, "the second call grows nothing");
            assert!(first == second);
            first
        })
    };
    let one = run(1);
    for threads in [2, 3, 7] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

#[test]
fn golden_batch_without_boxes_has_only_a_class_term() {
    let golden = Golden::open("yolov8_tiny");
    let head = Head::read(&golden);
    let mut loss = DetectionLoss::new(config(&golden), head.n, head.anchors(), 8);
    let (items, gradients) = compute(&head, &mut loss, &[], 1.0);
    assert_eq!((items.box_, items.dfl), (0.0, 0.0));
    assert!(items.cls > 0.0);
    assert!(gradients.iter().all(|g| g.0.iter().all(|v| *v == 0.0) && g.1.iter().all(|v| *v > 0.0)));
}

#[test]
fn golden_eval_output_is_suppressed_as_stored() {
    let golden = Golden::open("yolov8_tiny");
    let nc = golden.meta_usize("nc");
    let shape = golden.shape("eval.y");
    let predictions = anchors_first(&golden.f32("eval.y"), &shape);
    let nms = golden.meta("nms");
    let number = |key: &str| nms[key].as_f64().unwrap_or_else(|| panic!("nms {key}"));
    let args = NmsArgs {
        conf: number("conf") as f32,
        iou: number("iou"),
        max_det: number("max_det") as usize,
        ..NmsArgs::validation()
    };
    check_detections(&golden, "eval.nms_multi", &nms_batch(&predictions, shape[0], nc, &args));
    let single = NmsArgs { multi_label: false, agnostic: true, ..args };
    check_detections(&golden, "eval.nms_single", &nms_batch(&predictions, shape[0], nc, &single));
}

#[test]
fn golden_decoding_agrees_with_the_assigners_boxes_and_with_direct_detection() {
    let golden = Golden::open("yolov8_tiny");
    let head = Head::read(&golden);
    let mut decoded = Vec::new();
    decode(&head.levels(), head.nc, head.reg_max, head.n, &mut decoded);
    let wanted = golden.f32("assign.pred_bboxes_px");
    for (row, corners) in decoded.chunks_exact(4 + head.nc).zip(wanted.as_chunks::<4>().0) {
        let [cx, cy, w, h] = [row[0], row[1], row[2], row[3]];
        let got = [cx - w / 2.0, cy - h / 2.0, cx + w / 2.0, cy + h / 2.0];
        assert_close("decoded corners", &got, corners, MODEL_BOXES_PX);
        assert!(row[4..].iter().all(|p| (0.0..=1.0).contains(p)));
    }
    for args in [NmsArgs::validation(), NmsArgs::prediction(), NmsArgs { conf: 0.0, ..NmsArgs::validation() }]
    {
        let direct = detect(&head.levels(), head.nc, head.reg_max, head.n, &args);
        assert_eq!(direct, nms_batch(&decoded, head.n, head.nc, &args));
    }
}
