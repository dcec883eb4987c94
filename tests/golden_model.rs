//! A whole reduced YOLOv8 against the golden vectors: forward, loss, every gradient, one optimiser step.

mod common;

use boxwright::detect::decode::{HeadLevel, decode};
use boxwright::detect::losses::detection::{DetectionLoss, HeadLevelGrad, LossConfig};
use boxwright::detect::models::Detector;
use boxwright::detect::models::table::{Module, Row, Scale, Table};
use boxwright::detect::targets::Target;
use boxwright::engine::device::cpu::Executor;
use boxwright::engine::graph::NormConfig;
use boxwright::engine::optim::{Algorithm, Hyper, Optimizer, groups};
use boxwright::engine::optim::{clip_grad_norm, squared_norm};
use boxwright::engine::params::{ParamSet, from_reference};
use boxwright::engine::plan::{Mode, Plan};
use common::tolerances::{
    MODEL_BOXES_PX, MODEL_FORWARD, MODEL_GRADIENT_FLOOR, MODEL_GRADIENT_REL_L2, MODEL_LOSS, OPTIMISER,
    RUNNING_STATISTICS,
};
use common::{Golden, assert_close, assert_rel_l2};
use serde_json::Value as Json;

/// The model table as the file writes it.
fn table(config: &Json) -> Table {
    let scale = config["scales"][config["scale"].as_str().expect("a scale")].as_array().expect("a triple");
    let number = |v: &Json| v.as_f64().expect("a number");
    let count = |v: &Json| v.as_u64().expect("a count") as usize;
    let scale = Scale { depth: number(&scale[0]), width: number(&scale[1]), max_channels: count(&scale[2]) };
    let rows = ["backbone", "head"].iter().flat_map(|part| config[part].as_array().expect("rows"));
    let rows = rows.map(|row| {
        let from: Vec<isize> = match &row[0] {
            Json::Array(list) => list.iter().map(|v| v.as_i64().expect("a row") as isize).collect(),
            one => vec![one.as_i64().expect("a row") as isize],
        };
        let args = &row[3];
        let module = match row[2].as_str().expect("a module") {
            "Conv" => Module::Conv {
                channels: count(&args[0]),
                kernel: args.get(1).map_or(1, count),
                stride: args.get(2).map_or(1, count),
            },
            "C2f" => Module::C2f {
                channels: count(&args[0]),
                shortcut: args.get(1).and_then(Json::as_bool).unwrap_or(false),
            },
            "SPPF" => Module::Sppf { channels: count(&args[0]), kernel: count(&args[1]) },
            "nn.Upsample" => Module::Upsample { factor: count(&args[1]) },
            "Concat" => Module::Concat,
            "Detect" => Module::Detect,
            other => panic!("module {other} is not one of YOLOv8"),
        };
        Row::new(&from, count(&row[1]), module)
    });
    Table { scale, reg_max: count(&config["reg_max"]), rows: rows.collect() }
}

/// The model of the file, its weights, and an executor for both modes.
struct Fixture {
    golden: Golden,
    model: Detector,
    params: ParamSet,
    train: Plan,
    eval: Plan,
    executor: Executor,
    batch: usize,
}

impl Fixture {
    fn open() -> Fixture {
        let golden = Golden::open("yolov8_tiny");
        let shape = golden.shape("in.img_u8");
        let (batch, h, w) = (shape[0], shape[2], shape[3]);
        let table = table(golden.meta("config"));
        let nc = golden.meta_usize("nc");
        let mut model = Detector::from_table("tiny", &table, nc, h, w).expect("the model of the file");
        let bn = golden.meta("bn");
        let number = |key: &str| bn[key].as_f64().expect("a number") as f32;
        model.graph.set_norm(NormConfig { eps: number("eps"), momentum: number("momentum") });
        let mut params = ParamSet::new(&model.graph);
        for array in golden.with_prefix("sd.") {
            let target = &array[3..];
            if target.ends_with("num_batches_tracked") || target.contains(".dfl.") {
                continue;
            }
            params.import(target, &golden.shape(&array), &golden.f32(&array)).expect("shapes of the file");
        }
        let loaded = golden.with_prefix("sd.").iter().filter(|a| !a.ends_with("num_batches_tracked")).count();
        assert_eq!(
            loaded - 1,
            params.infos.len(),
            "every parameter comes from the file, and the rest is the dfl constant"
        );
        let (train, eval) =
            (Plan::new(&model.graph, batch, Mode::Train), Plan::new(&model.graph, batch, Mode::Eval));
        let mut executor = Executor::new(&[&train, &eval], 2).expect("a small plan");
        // One buffer serves both plans.
        let images = nchw_to_nhwc(&shape, &golden.u8("in.img_u8"));
        executor.input_mut(&train).copy_from_slice(&images);
        Fixture { golden, model, params, train, eval, executor, batch }
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

fn nchw_to_nhwc<T: Copy>(shape: &[usize], data: &[T]) -> Vec<T> {
    let (n, c, pixels) = (shape[0], shape[1], shape[2] * shape[3]);
    let at = |image, pixel, channel| data[(image * c + channel) * pixels + pixel];
    (0..n)
        .flat_map(|image| {
            (0..pixels).flat_map(move |pixel| (0..c).map(move |channel| (image, pixel, channel)))
        })
        .map(|(image, pixel, channel)| at(image, pixel, channel))
        .collect()
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

/// The labelled boxes of the batch.
fn targets(golden: &Golden) -> Vec<Target> {
    let (classes, boxes, images) =
        (golden.f32("in.cls"), golden.f32("in.bboxes"), golden.f32("in.batch_idx"));
    (0..images.len())
        .map(|i| Target {
            image: images[i] as u32,
            class: classes[i] as u32,
            cxcywh: std::array::from_fn(|k| boxes[4 * i + k]),
        })
        .collect()
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
        let gains = self.golden.meta("gains");
        let gain = |key: &str| gains[key].as_f64().expect("a gain") as f32;
        let config = LossConfig {
            reg_max: self.model.reg_max,
            gain_box: gain("box"),
            gain_cls: gain("cls"),
            gain_dfl: gain("dfl"),
            ..LossConfig::new(self.model.nc)
        };
        DetectionLoss::new(
            config,
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
