//! Every key has a row, every row a meaning.

use serde_json::{Value as Json, json};

use super::*;
use crate::yaml::parse;

fn read(text: &str) -> (Option<TrainArgs>, KeyReport, Faults) {
    let node = parse(text.as_bytes(), "job.yaml").expect("valid YAML");
    let mut faults = Faults::new("job.yaml");
    let (args, report) = TrainArgs::read(&node, "train", &mut faults);
    (args, report, faults)
}

#[test]
fn every_honoured_key_has_a_field_and_every_field_a_key() {
    let fields = serde_json::to_value(TrainArgs::default()).expect("serialises");
    let fields = fields.as_object().expect("an object");
    for key in KEYS {
        let field = fields.contains_key(key.name);
        assert_eq!(field, !matches!(key.kind, KeyKind::Refused(_)), "{}", key.name);
    }
    for field in fields.keys() {
        assert!(key_info(field).is_some(), "field {field} has no row");
    }
    let mut names: Vec<&str> = KEYS.iter().map(|key| key.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), KEYS.len(), "a key has two rows");
    assert!(KEYS.len() >= 110, "rows are missing: {}", KEYS.len());
}

#[test]
fn every_default_is_a_value_that_its_own_key_accepts() {
    for key in KEYS.iter().filter(|key| !key.default.is_empty() && key.default != "null") {
        let (_, report, faults) = read(&format!("{}: {}", key.name, key.default));
        assert!(faults.is_empty(), "{faults}");
        assert!(report.refused.is_empty(), "{:?}", report.refused);
    }
}

#[test]
fn defaults_are_the_documented_ones() {
    let args = TrainArgs::default();
    assert_eq!((args.epochs, args.imgsz, args.patience, args.workers, args.nbs), (100, 640, 100, 8, 64));
    assert_eq!(args.batch, Batch::Images(16));
    assert_eq!((args.lr0, args.lrf, args.momentum, args.weight_decay), (0.01, 0.01, 0.937, 0.0005));
    assert_eq!((args.box_, args.cls, args.dfl, args.cls_pw), (7.5, 0.5, 1.5, 0.0));
    assert_eq!(args.scale.range(), (0.5, 1.5));
    assert_eq!(args.optimizer, OptimizerChoice::Auto);
    assert_eq!((args.time, args.conf, args.classes.clone()), (None, None, Classes(None)));
    assert_eq!(
        (args.pretrained.clone(), args.resume.clone(), args.cache),
        (Source::On, Source::Off, Cache::Off)
    );
    assert_eq!((args.mosaic, args.fliplr, args.hsv_h, args.close_mosaic), (1.0, 0.5, 0.015, 10));
}

#[test]
fn special_values_are_read_in_all_their_forms() {
    let (args, report, faults) = read(
        "batch: -1\nscale: [0.5, 1.5]\ncache: disk\npretrained: w.safetensors\nresume: true\nfreeze: [0, 2, cv3]\n\
         classes: [2, 1, 2]\nfraction: [0.5, 10]\noptimizer: sgd\ndevice: cpu\nlr0: '1e-3'\ntime: 0.5\nbox: 7\n",
    );
    assert!(faults.is_empty() && report.refused.is_empty(), "{faults} {report:?}");
    let args = args.expect("valid");
    assert_eq!(args.batch, Batch::Auto);
    assert_eq!(args.scale, Scale::Pair(0.5, 1.5));
    assert_eq!(args.cache, Cache::Disk);
    assert_eq!(args.pretrained, Source::Path("w.safetensors".into()));
    assert_eq!(args.resume, Source::On);
    assert_eq!(args.freeze, Freeze::Some { rows: vec![0, 2], names: vec!["cv3".into()] });
    assert_eq!(args.classes, Classes(Some(vec![1, 2])));
    assert_eq!((args.fraction.train, args.fraction.val), (Share::Part(0.5), Share::Images(10)));
    assert_eq!((args.fraction.val.of(7), args.fraction.train.of(7)), (7, 4));
    assert_eq!(args.optimizer, OptimizerChoice::Sgd);
    assert_eq!((args.device, args.lr0, args.time, args.box_), (Device::Cpu, 1e-3, Some(0.5), 7.0));
    let (args, ..) = read("batch: 0.7\nfreeze: 3\ncache: true\nclasses: 4\n");
    let args = args.expect("valid");
    assert_eq!((args.batch, args.freeze, args.cache), (Batch::Fraction(0.7), Freeze::First(3), Cache::Ram));
    assert_eq!(args.classes, Classes(Some(vec![4])));
}

#[test]
fn values_out_of_range_are_named_all_together() {
    let bad = "epochs: 0\nimgsz: -5\nbatch: 0\nlr0: 2\nscale: [2, 1]\nfraction: 0\nseed: -1\nnbs: 0\nmomentum: .nan\n\
               max_det: 0\noptimizer: Lion\namp: fp8\ncache: tape\nfreeze: [-1]\nclasses: []\nwarmup_epochs: abc\n\
               mosaic: 1.5\npatience: 1.5\nverbose: 2\ndevice: [0, 1]\nbatch_policy: shrink\nepohcs: 3\nlearning_rate: 0.1\n";
    let (args, _, faults) = read(bad);
    assert_eq!(args, None);
    let text = faults.to_string();
    assert_eq!(faults.list().len(), 23, "{text}");
    for part in [
        "job.yaml:1: key `train.epochs`: got 0; allowed: a whole number from 1 to 1000000",
        "job.yaml:3: key `train.batch`: got 0; allowed: a whole number from 1 to 65536, -1",
        "job.yaml:4: key `train.lr0`: got 2; allowed: a number from 0 to 1",
        "key `train.device`: got a list of 2; allowed: one device; training on several GPUs is not supported",
        "key `train.batch_policy`: got \"shrink\"; allowed: one of refuse, accumulate",
        "key `train.momentum`: got NaN; allowed: a number from 0 to 1",
        "key `train.epohcs`: unknown key; did you mean `epochs`?",
        "key `train.learning_rate`: unknown key; did you mean `lr0`?",
    ] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
}

#[test]
fn what_is_not_done_is_refused_by_name_and_reason() {
    for (given, reason) in [
        ("task: classify", "trains the task detect"),
        ("mode: export", "own commands"),
        ("distill_model: yolov8x.pt", "distillation"),
        ("dis: 3", "distillation"),
        ("compile: true", "graph compiler"),
        ("tracker: bytetrack.yaml", "tracking"),
        ("format: onnx", "export"),
        ("pose: 3", "pose"),
        ("kobj: 2", "pose"),
        ("mask_ratio: 2", "segmentation"),
        ("nms: false", "suppression"),
        ("augment: true", "test-time augmentation"),
        ("cfg: other.yaml", "one file"),
        ("save_txt: true", "boxwright predict"),
        ("quantize: int8", "quantised"),
    ] {
        let (_, report, faults) = read(given);
        assert!(faults.is_empty(), "{given}: {faults}");
        let message = report.refused.first().map(|fault| fault.message.clone()).unwrap_or_default();
        assert!(message.contains(reason), "{given}: {message:?}");
    }
}

#[test]
fn keys_without_effect_are_named() {
    let (args, report, faults) =
        read("erasing: 0.4\ndropout: 0.1\namp: true\nchannels_last: true\nepochs: 3\n");
    assert!(faults.is_empty() && args.is_some());
    let named: Vec<&str> = report.no_effect.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(named, ["train.channels_last", "train.dropout", "train.erasing"]);
    assert_eq!(report.honoured, ["train.epochs", "train.amp"]);
}

#[test]
fn args_yaml_lists_every_key_and_reads_back_the_same() {
    let (args, ..) =
        read("model: yolov8n\ndata: d.yaml\nbatch: 0.5\nscale: [0.9, 1.1]\nfreeze: [1, x]\nlr0: 1e-5\n");
    let args = args.expect("valid");
    let text = args.to_yaml();
    let (again, report, faults) = read(&text);
    assert!(faults.is_empty() && report.refused.is_empty(), "{faults} {report:?}\n{text}");
    assert_eq!(again, Some(args.clone()));
    let node = parse(text.as_bytes(), "args.yaml").expect("valid");
    assert_eq!(node.as_mapping().map(<[_]>::len), Some(KEYS.len()));
    let json = serde_json::to_string(&args).expect("serialises");
    assert_eq!(serde_json::from_str::<TrainArgs>(&json).expect("reads"), args);
    assert_eq!(serde_json::from_str::<Json>(&json).expect("reads")["batch"], json!(0.5));
}

#[test]
fn model_names_are_known_or_refused() {
    for model in ["yolov8n", "yolov8x.pt", "weights/YOLOv8m.yaml", "runs/best.safetensors"] {
        assert_eq!(TrainArgs::model_refusal(model), None, "{model}");
    }
    assert!(TrainArgs::model_refusal("yolo26n.pt").is_some_and(|text| text.contains("yolov8n, yolov8s")));
    assert!(TrainArgs::model_refusal("yolov8n-cls.pt").is_some());
    assert!(TrainArgs::model_refusal("yolov8q.pt").is_some_and(|text| text.contains("did you mean")));
}
