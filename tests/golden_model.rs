//! A whole reduced YOLOv8 against the golden vectors: forward, loss, every gradient, one optimiser step.

mod common;

use boxwright::detect::decode::{HeadLevel, decode};
use boxwright::detect::losses::detection::{DetectionLoss, HeadLevelGrad, LossConfig};
use boxwright::detect::models::Detector;
use boxwright::engine::device::cpu::Executor;
use boxwright::engine::optim::{Algorithm, Hyper, Optimizer, groups};
use boxwright::engine::optim::{clip_grad_norm, squared_norm};
use boxwright::engine::params::{ParamSet, from_reference};
use boxwright::engine::plan::{Mode, Plan};
use common::tiny::{Tiny, nchw_to_nhwc, targets};
use common::tolerances::{
    MODEL_BOXES_PX, MODEL_FORWARD, MODEL_GRADIENT_FLOOR, MODEL_GRADIENT_REL_L2, MODEL_LOSS, OPTIMISER,
    RUNNING_STATISTICS,
};
use common::{Golden, assert_close, assert_rel_l2};

/// The model of the file, its weights, and an executor for both modes.
struct Fixture {
    golden: Golden,
    config: LossConfig,
    model: Detector,
    params: ParamSet,
    train: Plan,
    eval: Plan,
    executor: Executor,
    batch: usize,
}

impl Fixture {
    fn open() -> Fixture {
        let tiny = Tiny::open();
        let config = tiny.loss_config();
        let Tiny { golden, model, params, batch, images } = tiny;
        let (train, eval) =
            (Plan::new(&model.graph, batch, Mode::Train), Plan::new(&model.graph, batch, Mode::Eval));
        let mut executor = Executor::new(&[&train, &eval], 2).expect("a small plan");
        // One buffer serves both plans.
        executor.input_mut(&train).copy_from_slice(&images);
        Fixture { golden, config, model, params, train, eval, executor, batch }
    }

    /// Output `2 * level + branch` of all levels as the reference joins them: `(n, channels, anchors)`.
    fn joined(&self, plan: &Plan, branch: usize) -> Vec<f32> {
        let levels = self.model.strides.len();
        let mut out = Vec::new();
        for image in 0..self.batch {
            let channels = plan.output_shape(branch)[3];
            for channel in 0..channels {
                for level in 0..levels {
                    let i = 2 * level + branch;
                    let [_, h, w, c] = plan.output_shape(i);
                    let values = &self.executor.output(plan, i)[image * h * w * c..(image + 1) * h * w * c];
                    out.extend(values.iter().skip(channel).step_by(c));
                }
            }
        }
        out
    }
}

#[test]
fn golden_model_forward_in_training_mode() {
    let mut f = Fixture::open();
    f.executor.forward(&f.model.graph, &f.train, &mut f.params);
    for (i, &feature) in f.model.features.iter().enumerate() {
        let name = format!("train.feat{i}");
        let expected = nchw_to_nhwc(&f.golden.shape(&name), &f.golden.f32(&name));
        assert_close(&name, &f.executor.read(&f.train, feature), &expected, MODEL_FORWARD);
    }
    assert_close("train.boxes", &f.joined(&f.train, 0), &f.golden.f32("train.boxes"), MODEL_FORWARD);
    assert_close("train.scores", &f.joined(&f.train, 1), &f.golden.f32("train.scores"), MODEL_FORWARD);
    for array in f.golden.with_prefix("bn_after.") {
        let target = &array["bn_after.".len()..];
        if !target.ends_with("num_batches_tracked") {
            let (_, got) = f.params.export(target).expect("a statistic of the model");
            assert_close(&array, &got, &f.golden.f32(&array), RUNNING_STATISTICS);
        }
    }
}

impl Fixture {
    /// Head outputs of a plan, by level.
    fn levels<'a>(&self, plan: &Plan, outputs: &[&'a [f32]]) -> Vec<HeadLevel<'a>> {
        let levels = self.model.strides.iter().enumerate();
        let levels = levels.map(|(i, &stride)| {
            let [_, h, w, _] = plan.output_shape(2 * i);
            HeadLevel { stride, h, w, boxes: outputs[2 * i], scores: outputs[2 * i + 1] }
        });
        levels.collect()
    }

    fn loss(&self) -> DetectionLoss {
        DetectionLoss::new(
            self.config.clone(),
            self.batch,
            self.model.anchor_count(),
            self.golden.shape("in.cls")[0].max(1),
        )
    }
}

#[test]
fn golden_model_loss_and_every_gradient() {
    let mut f = Fixture::open();
    f.executor.forward(&f.model.graph, &f.train, &mut f.params);
    let mut loss = f.loss();
    let outputs: Vec<Vec<f32>> =
        (0..f.train.output_count()).map(|i| f.executor.output(&f.train, i).to_vec()).collect();
    let slices: Vec<&[f32]> = outputs.iter().map(Vec::as_slice).collect();
    let levels = f.levels(&f.train, &slices);
    let mut pairs = f.executor.outputs_and_grads(&f.train).into_iter().map(|(_, grad)| grad);
    let mut grads = Vec::new();
    while let (Some(boxes), Some(scores)) = (pairs.next(), pairs.next()) {
        grads.push(HeadLevelGrad { boxes, scores });
    }
    let items = loss.compute(&levels, &mut grads, &targets(&f.golden), f.batch, 1.0);
    assert_close("loss.items", &[items.box_, items.cls, items.dfl], &f.golden.f32("loss.items"), MODEL_LOSS);
    assert_close("loss.total", &[items.total], &f.golden.f32("loss.total"), MODEL_LOSS);
    f.executor.backward(&f.model.graph, &f.train, &mut f.params);
    let norm = squared_norm(&f.params.grads).sqrt();
    assert_rel_l2("grad_norm", &[norm as f32], &f.golden.f32("grad_norm"), MODEL_GRADIENT_REL_L2, 1e-6);
    let mut checked = 0;
    for array in f.golden.with_prefix("grad.").iter().filter(|a| !a.contains(".dfl.")) {
        let (_, got) = f.params.export_grad(&array["grad.".len()..]).expect("a parameter of the model");
        assert_rel_l2(array, &got, &f.golden.f32(array), MODEL_GRADIENT_REL_L2, MODEL_GRADIENT_FLOOR * norm);
        checked += 1;
    }
    assert_eq!(checked, f.params.tensors().len(), "every trainable tensor has a gradient in the file");
}

#[test]
fn golden_model_one_optimiser_step() {
    for (prefix, algorithm) in [("sgd1.", Algorithm::Sgd), ("adamw1.", Algorithm::AdamW)] {
        let mut f = Fixture::open();
        let settings = f.golden.meta("optimizer").clone();
        let number = |key: &str| settings[key].as_f64().expect("a number");
        for array in f.golden.with_prefix("grad.").iter().filter(|a| !a.contains(".dfl.")) {
            let i = f.params.index(&array["grad.".len()..]).expect("a parameter of the model");
            let range = f.params.infos[i].range.clone();
            let stored = from_reference(&f.params.infos[i].kind, &f.golden.f32(array));
            f.params.grads[range].copy_from_slice(&stored);
        }
        clip_grad_norm(&mut f.params.grads, number("clip"));
        let sgd = algorithm == Algorithm::Sgd;
        let (lr, momentum) =
            if sgd { (number("sgd_lr"), number("sgd_momentum")) } else { (number("adamw_lr"), 0.0) };
        let hyper = Hyper { beta1: number("adamw_beta1"), ..Hyper::default() };
        let tensors = f.params.tensors();
        let groups = groups::build(algorithm, &tensors, lr, momentum, number("weight_decay"), |_| false);
        let mut optimizer = Optimizer::new(algorithm, hyper, tensors, groups, f.params.values.len());
        optimizer.step(&mut f.params.values, &f.params.grads);
        for array in f.golden.with_prefix(prefix).iter().filter(|a| !a.contains(".dfl.")) {
            let (_, got) = f.params.export(&array[prefix.len()..]).expect("a parameter of the model");
            let expected = f.golden.f32(array);
            assert_close(array, &got[..expected.len()], &expected, OPTIMISER);
        }
    }
}

#[test]
fn golden_model_evaluation_decodes_and_suppresses() {
    let mut f = Fixture::open();
    f.executor.forward(&f.model.graph, &f.eval, &mut f.params);
    let outputs: Vec<Vec<f32>> =
        (0..f.eval.output_count()).map(|i| f.executor.output(&f.eval, i).to_vec()).collect();
    let slices: Vec<&[f32]> = outputs.iter().map(Vec::as_slice).collect();
    let levels = f.levels(&f.eval, &slices);
    let (nc, anchors) = (f.model.nc, f.model.anchor_count());
    let mut decoded = Vec::new();
    decode(&levels, nc, f.model.reg_max, f.batch, &mut decoded);
    let expected = f.golden.f32("eval.y");
    for image in 0..f.batch {
        for row in 0..4 + nc {
            let got: Vec<f32> =
                (0..anchors).map(|a| decoded[(image * anchors + a) * (4 + nc) + row]).collect();
            let want = &expected[(image * (4 + nc) + row) * anchors..][..anchors];
            let tolerance = if row < 4 { MODEL_BOXES_PX } else { MODEL_FORWARD };
            assert_close(&format!("eval.y image {image} row {row}"), &got, want, tolerance);
        }
    }
}

#[test]
fn golden_model_evaluation_runs_folded() {
    let mut f = Fixture::open();
    f.executor.forward(&f.model.graph, &f.eval, &mut f.params);
    let nc = f.model.nc;
    let shape = f.golden.shape("eval.y");
    let anchors = shape[2];
    let probabilities: Vec<f32> = f.joined(&f.eval, 1).iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
    let expected = f.golden.f32("eval.y");
    for image in 0..f.batch {
        let got = &probabilities[image * nc * anchors..(image + 1) * nc * anchors];
        let want = &expected[(image * (4 + nc) + 4) * anchors..(image + 1) * (4 + nc) * anchors];
        assert_close("eval.y scores", got, want, MODEL_FORWARD);
    }
}
