//! A whole reduced YOLOv8 against the golden vectors: forward, loss, every gradient, one optimiser step.

mod common;

use boxwright::detect::models::Detector;
use boxwright::detect::models::table::{Module, Row, Scale, Table};
use boxwright::engine::device::cpu::Executor;
use boxwright::engine::graph::NormConfig;
use boxwright::engine::params::ParamSet;
use boxwright::engine::plan::{Mode, Plan};
use common::tolerances::{MODEL_FORWARD, RUNNING_STATISTICS};
use common::{Golden, assert_close};
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
