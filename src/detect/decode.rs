//! From raw head outputs to boxes and class probabilities.

use rayon::prelude::*;

use super::anchors::GridLevel;
use super::losses::{bce, dfl};
use super::nms::{Candidate, Detection, NmsArgs, suppress};

/// Raw outputs of one head level.
#[derive(Clone, Copy)]
pub struct HeadLevel<'a> {
    /// Pixels of the network input per cell.
    pub stride: usize,
    /// Rows of the grid.
    pub h: usize,
    /// Columns of the grid.
    pub w: usize,
    /// Box logits `[n, h, w, 4 * reg_max]`: side (left, top, right, bottom) times bin.
    pub boxes: &'a [f32],
    /// Class logits `[n, h, w, nc]`.
    pub scores: &'a [f32],
}

impl HeadLevel<'_> {
    /// The grid of the level.
    pub fn grid(&self) -> GridLevel {
        GridLevel { stride: self.stride, h: self.h, w: self.w }
    }
}

/// Decodes the boxes of image `image` into corners in pixels, one per anchor, levels in order.
pub fn decode_corners(levels: &[HeadLevel<'_>], reg_max: usize, image: usize, out: &mut [[f32; 4]]) {
    let mut first = 0;
    for level in levels {
        let cells = level.h * level.w;
        let stride = level.stride as f32;
        let rows = &level.boxes[image * cells * 4 * reg_max..][..cells * 4 * reg_max];
        for (cell, (row, corners)) in rows.chunks_exact(4 * reg_max).zip(&mut out[first..]).enumerate() {
            let point = [(cell % level.w) as f32 + 0.5, (cell / level.w) as f32 + 0.5];
            *corners = corners_of(point, dfl::distances(row, reg_max)).map(|v| v * stride);
        }
        first += cells;
    }
}

/// Corners from an anchor point and its distances (left, top, right, bottom), same units.
#[inline(always)]
pub(crate) fn corners_of(point: [f32; 2], d: [f32; 4]) -> [f32; 4] {
    [point[0] - d[0], point[1] - d[1], point[0] + d[2], point[1] + d[3]]
}

/// Decodes a whole batch: per anchor `(cx, cy, w, h)` in pixels of the network input, then `nc` probabilities.
///
/// # Shapes
/// `out` becomes `[n][anchors][4 + nc]`, anchors level by level, row-major.
pub fn decode(levels: &[HeadLevel<'_>], nc: usize, reg_max: usize, n: usize, out: &mut Vec<f32>) {
    let anchors: usize = levels.iter().map(|level| level.h * level.w).sum();
    let width = 4 + nc;
    out.clear();
    out.resize(n * anchors * width, 0.0);
    if anchors == 0 {
        return;
    }
    out.par_chunks_mut(anchors * width).enumerate().for_each(|(image, rows)| {
        let mut rows = rows.chunks_exact_mut(width);
        for_each_row(levels, nc, reg_max, image, |boxes, scores, point, stride| {
            let row = rows.next().expect("one row per anchor was laid out above");
            row[..4].copy_from_slice(&cxcywh_of(point, dfl::distances(boxes, reg_max), stride));
            for (p, x) in row[4..].iter_mut().zip(scores) {
                *p = bce::sigmoid(*x);
            }
        });
    });
}

/// Decodes and suppresses a batch without laying out the anchors that fall below the score threshold.
///
/// The result equals [`decode`] followed by [`nms`](super::nms::nms).
pub fn detect(
    levels: &[HeadLevel<'_>],
    nc: usize,
    reg_max: usize,
    n: usize,
    args: &NmsArgs,
) -> Vec<Vec<Detection>> {
    let logit_min = logit_below(args.conf);
    (0..n)
        .into_par_iter()
        .map(|image| {
            let mut candidates = Vec::new();
            let mut probabilities = vec![0.0f32; nc];
            for_each_row(levels, nc, reg_max, image, |boxes, scores, point, stride| {
                // `<=` is false for NaN, as in the comparison of the probabilities themselves.
                if scores.iter().all(|x| *x <= logit_min) {
                    return;
                }
                for (p, x) in probabilities.iter_mut().zip(scores) {
                    *p = bce::sigmoid(*x);
                }
                let cxcywh = || cxcywh_of(point, dfl::distances(boxes, reg_max), stride);
                Candidate::collect(&probabilities, cxcywh, args, &mut candidates);
            });
            suppress(candidates, nc, args)
        })
        .collect()
}

/// A logit whose probability lies safely below `conf`.
pub(super) fn logit_below(conf: f32) -> f32 {
    let p = conf as f64;
    if p <= 0.0 {
        f32::NEG_INFINITY
    } else if p >= 1.0 {
        f32::MAX
    } else {
        ((p / (1.0 - p)).ln() - 1e-3) as f32
    }
}

/// Calls `visit(box logits, class logits, anchor point, stride)` for each anchor of one image.
fn for_each_row(
    levels: &[HeadLevel<'_>],
    nc: usize,
    reg_max: usize,
    image: usize,
    mut visit: impl FnMut(&[f32], &[f32], [f32; 2], f32),
) {
    for level in levels {
        let cells = level.h * level.w;
        let boxes = &level.boxes[image * cells * 4 * reg_max..][..cells * 4 * reg_max];
        let scores = &level.scores[image * cells * nc..][..cells * nc];
        for (cell, (b, s)) in boxes.chunks_exact(4 * reg_max).zip(scores.chunks_exact(nc)).enumerate() {
            let point = [(cell % level.w) as f32 + 0.5, (cell / level.w) as f32 + 0.5];
            visit(b, s, point, level.stride as f32);
        }
    }
}

/// Centre and size in pixels.
fn cxcywh_of(point: [f32; 2], distances: [f32; 4], stride: f32) -> [f32; 4] {
    super::boxes::xyxy_to_cxcywh(corners_of(point, distances)).map(|v| v * stride)
}
