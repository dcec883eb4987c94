//! The task-aligned assigner against its vectors.

use boxwright::detect::anchors::GridLevel;
use boxwright::detect::assigners::task_aligned::{
    AssignTarget, AssignerConfig, ImagePredictions, ImageWorkspace, TaskAlignedAssigner,
};

use crate::common::tolerances::ASSIGNER_SCORES;
use crate::common::{Golden, assert_close, assert_exact};

/// Scores below this may belong to anchors that tie at zero: their assignment is free.
pub const SCORE_FLOOR: f32 = 1e-6;

/// Rows of an `[A, 2]` or `[A, 4]` array.
fn rows<const N: usize>(values: &[f32]) -> Vec<[f32; N]> {
    values.as_chunks::<N>().0.to_vec()
}

/// The grids behind a list of anchor points: runs of equal stride, rows of equal height.
fn grids(points: &[[f32; 2]], strides: &[f32]) -> Vec<GridLevel> {
    let mut levels = Vec::new();
    let mut start = 0;
    while start < strides.len() {
        let end = start + strides[start..].iter().take_while(|s| **s == strides[start]).count();
        let w = points[start..end].iter().take_while(|p| p[1] == points[start][1]).count();
        levels.push(GridLevel { stride: strides[start] as usize, h: (end - start) / w, w });
        start = end;
    }
    levels
}

/// An assignment laid out over all anchors, as the reference keeps it.
pub struct Dense {
    pub labels: Vec<i64>,
    pub boxes: Vec<f32>,
    pub scores: Vec<f32>,
    pub foreground: Vec<u8>,
    pub target_index: Vec<i64>,
}

impl Dense {
    /// Background carries the first (possibly padded) row of the image.
    pub fn new(anchors: usize, nc: usize, first: Option<AssignTarget>) -> Dense {
        let (label, xyxy) = first.map_or((nc as i64, [0.0; 4]), |t| (t.class as i64, t.xyxy));
        Dense {
            labels: vec![label; anchors],
            boxes: xyxy.repeat(anchors),
            scores: vec![0.0; anchors * nc],
            foreground: vec![0; anchors],
            target_index: vec![0; anchors],
        }
    }

    pub fn put(&mut self, nc: usize, anchor: usize, target: usize, row: AssignTarget, score: f32) {
        self.labels[anchor] = row.class as i64;
        self.boxes[anchor * 4..][..4].copy_from_slice(&row.xyxy);
        self.scores[anchor * nc + row.class as usize] = score;
        self.foreground[anchor] = 1;
        self.target_index[anchor] = target as i64;
    }

    /// Keeps the anchors whose assignment is determined.
    pub fn determined<T: Copy>(values: &[T], width: usize, keep: &[bool]) -> Vec<T> {
        keep.iter()
            .enumerate()
            .filter(|(_, keep)| **keep)
            .flat_map(|(a, _)| values[a * width..][..width].to_vec())
            .collect()
    }
}

#[test]
fn golden_assigner() {
    let golden = Golden::open("assigner");
    let cases = golden.meta("cases").as_object().expect("cases by name");
    assert!(!cases.is_empty());
    for (case, parameters) in cases {
        let name = |array: &str| format!("{case}/{array}");
        let number = |key: &str| parameters[key].as_f64().unwrap_or_else(|| panic!("{case}: {key}"));
        let shape = golden.shape(&name("pd_scores"));
        let (images, anchors, nc) = (shape[0], shape[1], shape[2]);
        assert_eq!(nc, number("nc") as usize);
        let points: Vec<[f32; 2]> = rows(&golden.f32(&name("anc_points")));
        let levels = grids(&points, &golden.f32(&name("stride_tensor")));
        let config = AssignerConfig {
            topk: number("topk") as usize,
            topk2: number("topk2") as usize,
            alpha: number("alpha") as f32,
            beta: number("beta") as f32,
        };
        let assigner = TaskAlignedAssigner::new(config, levels);
        let boxes: Vec<[f32; 4]> = rows(&golden.f32(&name("pd_bboxes")));
        let scores = golden.f32(&name("pd_scores"));
        let per_image = golden.shape(&name("gt_bboxes"))[1];
        let target_boxes: Vec<[f32; 4]> = rows(&golden.f32(&name("gt_bboxes")));
        let (labels, mask) = (golden.i64(&name("gt_labels")), golden.f32(&name("mask_gt")));
        let mut workspaces: Vec<ImageWorkspace> = (0..images)
            .map(|image| {
                let mut workspace = ImageWorkspace::new(anchors, per_image, config.topk);
                workspace.targets_mut().extend((image * per_image..(image + 1) * per_image).map(|row| {
                    let xyxy = if mask[row] > 0.0 { target_boxes[row] } else { [0.0; 4] };
                    AssignTarget { xyxy, class: labels[row] as u32 }
                }));
                workspace
            })
            .collect();
        let (boxes, scores) = (&boxes, &scores);
        assigner.assign_batch(
            |image| ImagePredictions {
                xyxy: &boxes[image * anchors..][..anchors],
                probability: move |anchor: usize, class: usize| {
                    scores[(image * anchors + anchor) * nc + class]
                },
            },
            &mut workspaces,
        );
        for (image, workspace) in workspaces.iter().enumerate() {
            let first = (per_image > 0).then(|| workspace.targets()[0]);
            let mut dense = Dense::new(anchors, nc, first);
            for p in workspace.positives() {
                let row = workspace.targets()[p.target as usize];
                dense.put(nc, p.anchor as usize, p.target as usize, row, p.score);
            }
            let slice = |array: &str, width: usize| -> Vec<f32> {
                golden.f32(&name(array))[image * anchors * width..][..anchors * width].to_vec()
            };
            let integers = |array: &str| golden.i64(&name(array))[image * anchors..][..anchors].to_vec();
            let wanted_scores = slice("out_target_scores", nc);
            assert_close(&name("out_target_scores"), &dense.scores, &wanted_scores, ASSIGNER_SCORES);
            let wanted_foreground = integers("out_fg_mask");
            let keep: Vec<bool> = (0..anchors)
                .map(|a| {
                    let score = wanted_scores[a * nc..][..nc].iter().sum::<f32>();
                    score > SCORE_FLOOR || (wanted_foreground[a] == 0 && dense.foreground[a] == 0)
                })
                .collect();
            let undetermined = keep.iter().filter(|k| !**k).count();
            assert!(undetermined <= config.topk * per_image, "{case}: {undetermined} anchors tie at zero");
            let check = |array: &str, got: &[i64]| {
                let wanted = Dense::determined(&integers(array), 1, &keep);
                assert_exact(&name(array), &Dense::determined(got, 1, &keep), &wanted);
            };
            check("out_fg_mask", &dense.foreground.iter().map(|f| *f as i64).collect::<Vec<_>>());
            check("out_target_gt_idx", &dense.target_index);
            check("out_target_labels", &dense.labels);
            let wanted_boxes = Dense::determined(&slice("out_target_bboxes", 4), 4, &keep);
            assert_exact(
                &name("out_target_bboxes"),
                &Dense::determined(&dense.boxes, 4, &keep),
                &wanted_boxes,
            );
        }
    }
}
