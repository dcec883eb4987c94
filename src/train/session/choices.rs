//! What a run decides at its first start and keeps: batch, optimiser, schedule, class weights.

use super::reporter::Reporter;
use crate::data::Split;
use crate::detect::losses::detection::LossConfig;
use crate::detect::models::Detector;
use crate::engine::ops::conv2d::cuda::Tuning;
use crate::engine::optim::{Algorithm, Form, Hyper, Optimizer, Role, Tensor, groups};
use crate::engine::params::{ParamKind, ParamSet};
use crate::train::args::{Batch, OptimizerChoice as Wanted, TrainArgs};
use crate::train::autobatch::Choice;
use crate::train::checkpoint::{Progress, Resolved};
use crate::train::early_stop::EarlyStop;
use crate::train::error::TrainError;
use crate::train::schedule::{self, ScheduleSpec};

/// Class weights (1 / count)^power of mean 1; classes without boxes get the mean of the others.
fn class_weights(counts: &[usize], power: f64) -> Option<Vec<f32>> {
    let present: Vec<f64> =
        counts.iter().filter(|&&n| n > 0).map(|&n| (1.0 / n as f64).powf(power)).collect();
    if power == 0.0 || present.is_empty() {
        return None;
    }
    let mean = present.iter().sum::<f64>() / present.len() as f64;
    let raw = counts.iter().map(|&n| if n > 0 { (1.0 / n as f64).powf(power) } else { mean });
    let raw: Vec<f64> = raw.collect();
    let mean = raw.iter().sum::<f64>() / raw.len() as f64;
    Some(raw.iter().map(|w| (w / mean) as f32).collect())
}

pub(super) fn loss_config(args: &TrainArgs, train: &Split, nc: usize) -> LossConfig {
    LossConfig {
        gain_box: args.box_ as f32,
        gain_cls: args.cls as f32,
        gain_dfl: args.dfl as f32,
        class_weights: class_weights(&train.class_counts(nc), args.cls_pw),
        ..LossConfig::new(nc)
    }
}

/// The choices of a first start, with the batch that was chosen.
pub(super) fn resolve(
    args: &TrainArgs,
    detector: &Detector,
    chosen: Choice,
    images: usize,
    nc: usize,
) -> Result<Resolved, TrainError> {
    let (batch, passes) = (chosen.batch, chosen.passes);
    let choice = match args.optimizer {
        Wanted::Auto => schedule::auto_optimizer(images, batch * passes, args.nbs as usize, args.epochs, nc),
        named => schedule::OptimizerChoice {
            algorithm: algorithm(&format!("{named:?}"))?,
            lr0: args.lr0,
            momentum: args.momentum,
            warmup_bias_lr: args.warmup_bias_lr,
        },
    };
    let model = detector.name.clone();
    let asked_batch = match args.batch {
        Batch::Images(batch) => batch as usize,
        Batch::Auto | Batch::Fraction(_) => 0,
    };
    Ok(Resolved {
        model,
        batch,
        passes,
        asked_batch,
        optimizer: choice.algorithm.name().to_owned(),
        lr0: choice.lr0,
        momentum: choice.momentum,
        warmup_bias_lr: choice.warmup_bias_lr,
    })
}

pub(super) fn algorithm(name: &str) -> Result<Algorithm, TrainError> {
    Algorithm::parse(name).ok_or_else(|| TrainError::Config {
        key: "optimizer".into(),
        message: format!("no optimiser is called {name:?}"),
    })
}

/// The choices of the run's first start, with an explicit new batch taken over.
pub(super) fn keep_choices(saved: &Progress, args: &TrainArgs, reporter: &mut Reporter) -> Resolved {
    let mut resolved = saved.resolved.clone();
    if let Batch::Images(batch) = args.batch
        && batch as usize != resolved.batch
        && batch as usize != resolved.asked_batch
    {
        reporter.warn(format!("batch is {batch} now, it was {}", resolved.batch));
        (resolved.batch, resolved.asked_batch) = (batch as usize, batch as usize);
        resolved.passes = 1;
    }
    resolved
}

pub(super) fn check_batch(args: &TrainArgs, resolved: &Resolved, images: usize, reporter: &mut Reporter) {
    if let Batch::Images(batch) = args.batch
        && batch as usize > images
    {
        reporter.warn(format!("batch {batch} is capped at the {images} images of the dataset"));
    }
    if resolved.passes > 1 {
        let (parts, images) = (resolved.passes, resolved.batch);
        reporter
            .warn(format!("the batch does not fit the memory: it runs as {parts} passes of {images} images"));
    }
    assert!(resolved.batch > 0, "a batch holds at least one image");
}

/// The tensors as optimisers see them.
fn tensors(params: &ParamSet) -> Vec<Tensor> {
    let mut tensors = Vec::with_capacity(params.infos.len());
    for info in &params.infos {
        let (role, form) = match info.kind {
            ParamKind::ConvWeight { kernel, c_in, c_out } => {
                (Role::Weight, Form::Matrix { rows: kernel * kernel * c_in, cols: c_out, aspect: 1.0 })
            }
            ParamKind::Bias { .. } | ParamKind::NormBias { .. } => (Role::Bias, Form::Vector),
            ParamKind::NormWeight { .. } => (Role::Norm, Form::Vector),
            ParamKind::RunningMean { .. } | ParamKind::RunningVar { .. } => continue,
        };
        let (name, range, frozen) = (info.name.clone(), info.range.clone(), info.frozen);
        tensors.push(Tensor { name, range, role, form, frozen });
    }
    tensors.sort_by_key(|t| t.range.start);
    tensors
}

pub(super) fn optimizer(
    args: &TrainArgs,
    resolved: &Resolved,
    params: &ParamSet,
) -> Result<Optimizer, TrainError> {
    let algorithm = algorithm(&resolved.optimizer)?;
    let decay =
        schedule::effective_weight_decay(args.weight_decay, resolved.step_images(), args.nbs as usize);
    let tensors = tensors(params);
    let is_class_branch = |name: &str| name.contains(".cv3.") || name.contains(".one2one_cv3.");
    let groups = groups::build(algorithm, &tensors, resolved.lr0, resolved.momentum, decay, is_class_branch);
    let hyper = Hyper { beta1: resolved.momentum, ..Hyper::default() };
    Ok(Optimizer::new(algorithm, hyper, tensors, groups, params.values.len()))
}

/// An optimiser of that kind with constants that do not matter: for its size.
pub(super) fn optimizer_of(algorithm: Algorithm, params: &ParamSet) -> Optimizer {
    let tensors = tensors(params);
    let groups = groups::build(algorithm, &tensors, 0.01, 0.9, 0.0, |_| false);
    Optimizer::new(algorithm, Hyper::default(), tensors, groups, params.values.len())
}

pub(super) fn schedule_spec(
    args: &TrainArgs,
    resolved: &Resolved,
    batches: usize,
    epochs: u32,
) -> ScheduleSpec {
    let accumulate = schedule::accumulate_for(args.nbs as usize, resolved.step_images());
    let cap = if args.time.is_some() { usize::MAX } else { batches * epochs as usize / resolved.passes };
    ScheduleSpec {
        epochs,
        batches,
        lrf: args.lrf,
        cosine: args.cos_lr,
        warmup_epochs: args.warmup_epochs,
        warmup_bias_lr: resolved.warmup_bias_lr,
        warmup_momentum: args.warmup_momentum,
        momentum: args.momentum,
        accumulate: accumulate.min(cap.max(1)),
    }
}

/// The arguments with what `auto` became, for `args.yaml`.
pub(super) fn resolved_args(args: &TrainArgs, resolved: &Resolved) -> TrainArgs {
    let mut args = args.clone();
    // A batch that was cut stays the one that was asked for; on resume it is cut in the same way.
    let batch = if resolved.passes > 1 { resolved.asked_batch } else { resolved.batch };
    args.batch = Batch::Images(batch as u32);
    args
}

/// A run that has done nothing yet.
pub(super) fn fresh_progress(
    fingerprint: String,
    resolved: Resolved,
    epochs: u32,
    patience: u32,
) -> Progress {
    Progress {
        fingerprint,
        resolved,
        epoch: 0,
        batch: 0,
        epochs,
        step: 0,
        last_step: -1,
        ema_updates: 0,
        loss_sums: [0.0; 3],
        best_fitness: None,
        stopper: EarlyStop::new(patience),
        is_stopping: false,
        metrics: [0.0; 4],
        val_losses: [0.0; 3],
        rows: Vec::new(),
        elapsed_s: 0.0,
        rollbacks: 0,
        loss_scale: None,
        tuning: Tuning::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn class_weights_have_mean_one() {
        assert_eq!(class_weights(&[10, 5], 0.0), None);
        assert_eq!(class_weights(&[0, 0], 1.0), None);
        let weights = class_weights(&[10, 40, 0], 1.0).expect("two classes have boxes");
        let mean = weights.iter().sum::<f32>() / 3.0;
        assert!((mean - 1.0).abs() < 1e-6);
        assert!((weights[0] / weights[1] - 4.0).abs() < 1e-5);
        assert!((weights[2] - (weights[0] + weights[1]) / 2.0).abs() < 1e-6);
    }

    #[test]
    fn every_trainable_tensor_is_in_one_group() {
        let detector = Detector::build("yolov8n", 80, 64, 64).expect("a shipped model");
        let params = ParamSet::new(&detector.graph);
        let tensors = tensors(&params);
        let groups = groups::build(Algorithm::Sgd, &tensors, 0.01, 0.9, 5e-4, |_| false);
        let sizes: Vec<_> = groups.iter().map(|g| g.members.len()).collect();
        // 64 weights in the reference, of which one is the constant of the distance decoder.
        assert_eq!(sizes, [63, 57, 63]);
    }
}
