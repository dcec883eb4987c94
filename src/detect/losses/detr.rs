//! Set-prediction losses of RT-DETR: one-to-one matching and the criterion over the decoder layers.
//!
//! Source: Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", 2023.

use super::bce::sigmoid;
use super::focal::focal;
use super::varifocal::varifocal;
use crate::detect::assigners::hungarian;
use crate::detect::boxes::{IouKind, iou_cxcywh, iou_cxcywh_gradient};

/// Gains and exponents of matching and criterion.
#[derive(Clone, Copy, Debug)]
pub struct DetrConfig {
    /// Number of classes.
    pub nc: usize,
    /// Cost of a wrong class in the matching.
    pub cost_class: f32,
    /// Cost of the summed absolute coordinate differences.
    pub cost_bbox: f32,
    /// Cost of `1 - GIoU`.
    pub cost_giou: f32,
    /// Gain of the class loss.
    pub gain_class: f32,
    /// Gain of the coordinate loss.
    pub gain_bbox: f32,
    /// Gain of the GIoU loss.
    pub gain_giou: f32,
    /// Focusing exponent of varifocal and focal loss.
    pub gamma: f32,
    /// Balance of varifocal and focal loss.
    pub alpha: f32,
}

impl DetrConfig {
    /// The usual parameters for `nc` classes.
    pub fn new(nc: usize) -> DetrConfig {
        DetrConfig {
            nc,
            cost_class: 2.0,
            cost_bbox: 5.0,
            cost_giou: 2.0,
            gain_class: 1.0,
            gain_bbox: 5.0,
            gain_giou: 2.0,
            gamma: 1.5,
            alpha: 0.25,
        }
    }
}

/// The targets of a batch, image after image.
#[derive(Clone, Copy, Debug)]
pub struct DetrTargets<'a> {
    /// Centre and size as fractions of the input.
    pub cxcywh: &'a [[f32; 4]],
    /// Class indices.
    pub classes: &'a [usize],
    /// Number of targets of each image.
    pub groups: &'a [usize],
}

/// One matched pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match {
    /// Image of the batch.
    pub image: usize,
    /// Query of the image.
    pub query: usize,
    /// Target, counted over the whole batch.
    pub target: usize,
}

/// Matches the queries of each image with its targets at least cost.
///
/// `cost = 2 C_cls + 5 C_L1 + 2 C_giou` with, p = predicted probability of the target's class,
/// `C_cls = 0.25 (1-p)^2 (-ln(p + 1e-8)) - 0.75 p^2 (-ln(1 - p + 1e-8))`; costs that are not finite count as 0.
///
/// # Shapes
/// `boxes` `[images][queries]`, `logits` `[images][queries][nc]`. Pairs come back by image, then query.
pub fn match_queries(
    config: &DetrConfig,
    boxes: &[[f32; 4]],
    logits: &[f32],
    queries: usize,
    targets: &DetrTargets<'_>,
) -> Vec<Match> {
    let mut matches = Vec::with_capacity(targets.cxcywh.len());
    let mut first = 0;
    for (image, &count) in targets.groups.iter().enumerate() {
        let mut cost = vec![0.0f32; queries * count];
        for query in 0..queries {
            let row = image * queries + query;
            for j in 0..count {
                let target = first + j;
                let p = sigmoid(logits[row * config.nc + targets.classes[target]]);
                let negative = 0.75 * p * p * -(1.0 - p + 1e-8).ln();
                let positive = 0.25 * (1.0 - p) * (1.0 - p) * -(p + 1e-8).ln();
                let (predicted, wanted) = (boxes[row], targets.cxcywh[target]);
                let l1: f32 = predicted.iter().zip(wanted).map(|(a, b)| (a - b).abs()).sum();
                let giou = 1.0 - iou_cxcywh(IouKind::Giou, predicted, wanted);
                let total = config.cost_class * (positive - negative)
                    + config.cost_bbox * l1
                    + config.cost_giou * giou;
                cost[query * count + j] = if total.is_finite() { total } else { 0.0 };
            }
        }
        let pairs = hungarian::assign(&cost, queries, count);
        matches.extend(pairs.into_iter().map(|(query, j)| Match { image, query, target: first + j }));
        first += count;
    }
    matches
}

/// The terms of one layer, gains included.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LayerLoss {
    /// Class term: varifocal, or focal when nothing is matched.
    pub class: f32,
    /// Coordinate term.
    pub bbox: f32,
    /// GIoU term.
    pub giou: f32,
}

/// Loss of one layer for given matches; writes the gradients of its boxes and logits.
///
/// With n matched pairs: `bbox = 5 sum|difference| / n`, `giou = 2 sum(1 - GIoU) / n`, `class` = sum over images,
/// queries and classes / max(n, 1), the target of a matched class being the plain IoU of its pair.
///
/// # Shapes
/// `boxes`, `d_boxes`: `[images][queries]`; `logits`, `d_logits`: `[images][queries][nc]`.
///
/// # Gradient
/// The quality (IoU) of a pair is a constant; a background logit's varifocal weight is differentiated.
#[allow(clippy::too_many_arguments)]
pub fn layer_loss(
    config: &DetrConfig,
    boxes: &[[f32; 4]],
    logits: &[f32],
    queries: usize,
    targets: &DetrTargets<'_>,
    matches: &[Match],
    d_boxes: &mut [[f32; 4]],
    d_logits: &mut [f32],
) -> LayerLoss {
    d_boxes.fill([0.0; 4]);
    let norm = matches.len().max(1) as f32;
    let (mut bbox, mut giou) = (0.0f64, 0.0f64);
    let mut quality = vec![0.0f32; logits.len()];
    let mut positive = vec![false; logits.len()];
    for pair in matches {
        let row = pair.image * queries + pair.query;
        let (predicted, wanted) = (boxes[row], targets.cxcywh[pair.target]);
        let at = row * config.nc + targets.classes[pair.target];
        positive[at] = true;
        quality[at] = iou_cxcywh(IouKind::Iou, predicted, wanted);
        let (value, gradient) = iou_cxcywh_gradient(IouKind::Giou, predicted, wanted);
        giou += 1.0 - value as f64;
        for side in 0..4 {
            let difference = predicted[side] - wanted[side];
            bbox += difference.abs() as f64;
            let direction = if difference == 0.0 { 0.0 } else { difference.signum() };
            d_boxes[row][side] += (config.gain_bbox * direction - config.gain_giou * gradient[side]) / norm;
        }
    }
    let mut class = 0.0f64;
    for (at, (x, d)) in logits.iter().zip(d_logits.iter_mut()).enumerate() {
        let (loss, gradient) = if matches.is_empty() {
            focal(*x, 0.0, config.alpha, config.gamma)
        } else {
            varifocal(*x, quality[at], positive[at], config.alpha, config.gamma)
        };
        class += loss as f64;
        *d = gradient * config.gain_class / norm;
    }
    LayerLoss {
        class: (class * (config.gain_class / norm) as f64) as f32,
        bbox: (bbox * (config.gain_bbox / norm) as f64) as f32,
        giou: (giou * (config.gain_giou / norm) as f64) as f32,
    }
}

/// Main terms (last layer) and summed auxiliary terms (all others).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CriterionLoss {
    /// The last layer.
    pub main: LayerLoss,
    /// Sum over the layers before it.
    pub auxiliary: LayerLoss,
}

impl CriterionLoss {
    /// Plain sum of the six terms.
    pub fn total(&self) -> f32 {
        let sum = |l: &LayerLoss| l.class + l.bbox + l.giou;
        sum(&self.main) + sum(&self.auxiliary)
    }
}

/// The criterion over all layers, each with its own matching, or all with `fixed` matches (denoising).
///
/// # Shapes
/// Layer-major: `boxes` `[layers][images][queries]`, `logits` `[layers][images][queries][nc]`, gradients alike.
#[allow(clippy::too_many_arguments)]
pub fn criterion(
    config: &DetrConfig,
    layers: usize,
    boxes: &[[f32; 4]],
    logits: &[f32],
    queries: usize,
    targets: &DetrTargets<'_>,
    fixed: Option<&[Match]>,
    d_boxes: &mut [[f32; 4]],
    d_logits: &mut [f32],
) -> CriterionLoss {
    let rows = targets.groups.len() * queries;
    assert_eq!(boxes.len(), layers * rows, "boxes are [layers][images][queries]");
    assert_eq!(logits.len(), layers * rows * config.nc, "logits are [layers][images][queries][nc]");
    let mut loss = CriterionLoss::default();
    for layer in 0..layers {
        let b = layer * rows..(layer + 1) * rows;
        let l = layer * rows * config.nc..(layer + 1) * rows * config.nc;
        let found;
        let matches = match fixed {
            Some(matches) => matches,
            None => {
                found = match_queries(config, &boxes[b.clone()], &logits[l.clone()], queries, targets);
                &found
            }
        };
        let (db, dl) = (&mut d_boxes[b.clone()], &mut d_logits[l.clone()]);
        let terms = layer_loss(config, &boxes[b], &logits[l], queries, targets, matches, db, dl);
        if layer + 1 == layers {
            loss.main = terms;
        } else {
            loss.auxiliary.class += terms.class;
            loss.auxiliary.bbox += terms.bbox;
            loss.auxiliary.giou += terms.giou;
        }
    }
    loss
}
