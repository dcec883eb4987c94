//! The reduced YOLOv8 of the golden vectors: model, weights, images, boxes.

use boxwright::detect::losses::detection::LossConfig;
use boxwright::detect::models::Detector;
use boxwright::detect::models::table::{Module, Row, Scale, Table};
use boxwright::detect::targets::Target;
use boxwright::engine::graph::NormConfig;
use boxwright::engine::params::ParamSet;
use serde_json::Value as Json;

use super::Golden;

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

/// The model of the file, its weights and its batch.
pub struct Tiny {
    pub golden: Golden,
    pub model: Detector,
    pub params: ParamSet,
    pub batch: usize,
    /// `[n, h, w, 3]`.
    pub images: Vec<u8>,
}

impl Tiny {
    pub fn open() -> Tiny {
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
        let images = nchw_to_nhwc(&shape, &golden.u8("in.img_u8"));
        Tiny { golden, model, params, batch, images }
    }

    /// The loss with the gains of the file.
    pub fn loss_config(&self) -> LossConfig {
        let gains = self.golden.meta("gains");
        let gain = |key: &str| gains[key].as_f64().expect("a gain") as f32;
        LossConfig {
            reg_max: self.model.reg_max,
            gain_box: gain("box"),
            gain_cls: gain("cls"),
            gain_dfl: gain("dfl"),
            ..LossConfig::new(self.model.nc)
        }
    }
}

pub fn nchw_to_nhwc<T: Copy>(shape: &[usize], data: &[T]) -> Vec<T> {
    let (n, c, pixels) = (shape[0], shape[1], shape[2] * shape[3]);
    let at = |image, pixel, channel| data[(image * c + channel) * pixels + pixel];
    (0..n)
        .flat_map(|image| {
            (0..pixels).flat_map(move |pixel| (0..c).map(move |channel| (image, pixel, channel)))
        })
        .map(|(image, pixel, channel)| at(image, pixel, channel))
        .collect()
}

/// The labelled boxes of the batch.
pub fn targets(golden: &Golden) -> Vec<Target> {
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
