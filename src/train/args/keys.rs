//! The table of training keys: one row drives reading, validation, hints and the documentation.

use super::device::{Amp, Device};
use super::values::{Batch, Cache, Classes, Fraction, Freeze, Scale, Source};

/// What becomes of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// It does what it says.
    Honoured,
    /// Accepted, named in a warning, and without effect for this reason.
    AcceptedNoEffect(&'static str),
    /// Any value but the default is refused for this reason.
    Refused(&'static str),
}

/// What values a key takes.
#[derive(Debug, Clone, Copy)]
pub enum Form {
    /// A whole number in a closed range.
    Int(i64, i64),
    /// A finite number in a closed range.
    Float(f64, f64),
    /// A truth value.
    Bool,
    /// A text.
    Text,
    /// One of these words, whatever the case.
    Choice(&'static [&'static str]),
    /// What this conversion accepts; its error says what is allowed.
    Special(fn(serde_json::Value) -> Result<serde_json::Value, String>),
    /// Anything: only the default is accepted, so there is nothing to check.
    Anything,
}

/// One training key.
#[derive(Debug, Clone, Copy)]
pub struct KeyInfo {
    /// Its name.
    pub name: &'static str,
    /// Its default, as YAML.
    pub default: &'static str,
    /// The values it takes.
    pub form: Form,
    /// What becomes of it.
    pub kind: KeyKind,
    /// What it means, in one line.
    pub doc: &'static str,
}

/// Names that other programs use for a key of ours.
pub const RENAMED: &[(&str, &str)] = &[
    ("learning_rate", "lr0"),
    ("lr", "lr0"),
    ("batch_size", "batch"),
    ("img_size", "imgsz"),
    ("image_size", "imgsz"),
    ("num_epochs", "epochs"),
    ("max_epochs", "epochs"),
    ("n_epochs", "epochs"),
    ("num_workers", "workers"),
    ("dataset", "data"),
    ("early_stopping", "patience"),
    ("random_seed", "seed"),
    ("optim", "optimizer"),
];

fn special<T>(json: serde_json::Value) -> Result<serde_json::Value, String>
where
    T: TryFrom<serde_json::Value, Error = String> + Into<serde_json::Value>,
{
    T::try_from(json).map(Into::into)
}

const ONE: Form = Form::Float(0.0, 1.0);
const GAIN: Form = Form::Float(0.0, 1000.0);
const YES: KeyKind = KeyKind::Honoured;
const PREDICT: KeyKind = KeyKind::Refused("it belongs to prediction; use `boxwright predict`");
const EXPORT: KeyKind = KeyKind::Refused("it belongs to export, which this build does not have");
const SEGMENT: KeyKind = KeyKind::Refused("it belongs to segmentation; this build trains detection");
const POSE: KeyKind = KeyKind::Refused("it belongs to pose estimation; this build trains detection");
const ANGLE: KeyKind = KeyKind::Refused("it belongs to oriented boxes; this build trains upright boxes");
const DEPTH: KeyKind = KeyKind::Refused("it belongs to depth estimation; this build trains detection");
const CLASSIFY: KeyKind = KeyKind::AcceptedNoEffect("it acts on classification only; detection ignores it");
const DISTILL: KeyKind = KeyKind::Refused("knowledge distillation is not built");

const OPTIMIZERS: &[&str] = &["auto", "SGD", "MuSGD", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSProp"];
const TASKS: &[&str] = &["detect", "segment", "semantic", "depth", "classify", "pose", "obb"];
const MODES: &[&str] = &["train", "val", "predict", "export", "track", "benchmark"];

const fn key(
    name: &'static str,
    default: &'static str,
    form: Form,
    kind: KeyKind,
    doc: &'static str,
) -> KeyInfo {
    KeyInfo { name, default, form, kind, doc }
}

/// Every documented training key, in the order of `args.yaml`.
#[rustfmt::skip]
pub const KEYS: &[KeyInfo] = &[
    key("task", "detect", Form::Choice(TASKS), YES, "what is learnt; this build trains detect"),
    key("mode", "train", Form::Choice(MODES), YES, "train, or val: measure the weights file `model` on `data` and train nothing"),
    key("model", "", Form::Text, YES, "name of a model table (yolov8n) or a .safetensors file"),
    key("data", "", Form::Text, YES, "dataset YAML or folder"),
    key("epochs", "100", Form::Int(1, 1_000_000), YES, "number of epochs"),
    key("time", "null", Form::Float(1e-6, 100_000.0), YES, "budget in hours; overrides epochs"),
    key("patience", "100", Form::Int(0, 1_000_000), YES, "epochs without a better fitness before stopping; 0 never stops"),
    key("batch", "16", Form::Special(special::<Batch>), YES, "images per step; -1 or a share of the free memory: automatic"),
    key("batch_policy", "refuse", Form::Choice(&["refuse", "accumulate"]), YES, "when a batch does not fit: refuse it, or accumulate smaller ones"),
    key("imgsz", "640", Form::Int(1, 8192), YES, "side of the training square in pixels, rounded up to a multiple of 32"),
    key("save", "true", Form::Bool, YES, "write checkpoints"),
    key("save_period", "-1", Form::Int(-1, 1_000_000), YES, "from 1: also keep the weights of every so many epochs"),
    key("cache", "false", Form::Special(special::<Cache>), YES, "keep decoded images: false, true or ram, disk"),
    key("device", "null", Form::Special(special::<Device>), YES, "cpu, cuda, cuda:N or N; the best device there is when not given"),
    key("workers", "8", Form::Int(0, 256), YES, "loader threads"),
    key("project", "null", Form::Text, YES, "folder of the run; a service job has its own"),
    key("name", "null", Form::Text, YES, "name of the run folder; a service job has its own"),
    key("exist_ok", "false", Form::Bool, YES, "reuse an existing run folder"),
    key("pretrained", "true", Form::Special(special::<Source>), YES, "start from weights: true, false or a .safetensors file"),
    key("cls_remap", "true", Form::Bool, YES, "copy rows of the class head by class name when fine-tuning"),
    key("optimizer", "auto", Form::Choice(OPTIMIZERS), YES, "update rule"),
    key("verbose", "true", Form::Bool, YES, "print one line per class after validation"),
    key("seed", "0", Form::Int(0, i64::MAX), YES, "random seed"),
    key("deterministic", "true", Form::Bool, KeyKind::AcceptedNoEffect("every run is deterministic"), "deterministic arithmetic"),
    key("single_cls", "false", Form::Bool, YES, "treat all labels as class 0"),
    key("rect", "false", Form::Bool, YES, "rectangular training batches"),
    key("cos_lr", "false", Form::Bool, YES, "cosine learning rate instead of linear"),
    key("close_mosaic", "10", Form::Int(0, 1_000_000), YES, "last epochs without mosaic, mixup, cutmix, copy-paste; 0 never"),
    key("resume", "false", Form::Special(special::<Source>), YES, "continue from the run's last checkpoint, or from this one"),
    key("amp", "true", Form::Special(special::<Amp>), YES, "mixed precision where the device has it: true, false, fp16, bf16 or fp32; the CPU computes in single precision"),
    key("fraction", "1.0", Form::Special(special::<Fraction>), YES, "share or count of the images used; a list is train, val, test"),
    key("profile", "false", Form::Bool, KeyKind::Refused("it times exported formats, which this build does not have"), "time exported formats"),
    key("freeze", "null", Form::Special(special::<Freeze>), YES, "first rows, or a list of row indices and name parts, that do not learn"),
    key("multi_scale", "0.0", ONE, YES, "image size drawn per batch within this share around imgsz"),
    key("compile", "false", Form::Anything, KeyKind::Refused("there is no graph compiler to switch on; every model is planned ahead"), "graph compilation"),
    key("channels_last", "null", Form::Bool, KeyKind::AcceptedNoEffect("activations always lie channels last"), "memory format"),
    key("overlap_mask", "true", Form::Bool, SEGMENT, "merge masks"),
    key("mask_ratio", "4", Form::Int(1, 1024), SEGMENT, "mask downsampling"),
    key("dropout", "0.0", ONE, CLASSIFY, "dropout of the classification head"),
    key("val", "true", Form::Bool, YES, "validate every epoch"),
    key("split", "val", Form::Choice(&["train", "val", "test", "minival"]), YES, "split that validation uses"),
    key("save_json", "false", Form::Bool, YES, "write the validation's detections as COCO JSON"),
    key("conf", "null", ONE, YES, "score threshold; validation 0.001 when not given"),
    key("iou", "0.7", ONE, YES, "IoU threshold of non-maximum suppression"),
    key("max_det", "300", Form::Int(1, 100_000), YES, "detections kept per image"),
    key("quantize", "null", Form::Anything, KeyKind::Refused("quantised arithmetic is not built"), "inference precision"),
    key("dnn", "false", Form::Bool, EXPORT, "OpenCV DNN for ONNX"),
    key("plots", "true", Form::Bool, YES, "write plots"),
    key("nms", "null", Form::Bool, YES, "false asks for a head that needs no suppression, which YOLOv8 lacks"),
    key("source", "null", Form::Anything, PREDICT, "what to predict"),
    key("vid_stride", "1", Form::Int(1, 1_000_000), PREDICT, "video frames skipped"),
    key("stream_buffer", "false", Form::Bool, PREDICT, "buffer video frames"),
    key("visualize", "false", Form::Bool, KeyKind::Refused("pictures of activations are not built"), "pictures of activations"),
    key("augment", "false", Form::Bool, KeyKind::Refused("test-time augmentation is not built"), "test-time augmentation"),
    key("agnostic_nms", "false", Form::Bool, YES, "suppress across classes"),
    key("classes", "null", Form::Special(special::<Classes>), YES, "keep only these class ids"),
    key("retina_masks", "false", Form::Bool, SEGMENT, "masks at full size"),
    key("embed", "null", Form::Anything, PREDICT, "return feature vectors"),
    key("show", "false", Form::Bool, PREDICT, "open a window"),
    key("save_frames", "false", Form::Bool, PREDICT, "write video frames"),
    key("save_txt", "false", Form::Bool, PREDICT, "write detections as text"),
    key("save_conf", "false", Form::Bool, PREDICT, "write scores"),
    key("save_crop", "false", Form::Bool, PREDICT, "write crops"),
    key("show_labels", "true", Form::Bool, PREDICT, "draw class names"),
    key("show_conf", "true", Form::Bool, PREDICT, "draw scores"),
    key("show_boxes", "true", Form::Bool, PREDICT, "draw boxes"),
    key("line_width", "null", Form::Int(1, 1000), PREDICT, "width of drawn lines"),
    key("format", "torchscript", Form::Text, EXPORT, "exported format"),
    key("optimize", "false", Form::Bool, EXPORT, "optimise for mobile"),
    key("dynamic", "false", Form::Bool, EXPORT, "dynamic shapes"),
    key("simplify", "true", Form::Bool, EXPORT, "simplify the graph"),
    key("opset", "null", Form::Anything, EXPORT, "ONNX opset"),
    key("workspace", "null", Form::Anything, EXPORT, "workspace size"),
    key("lr0", "0.01", ONE, YES, "initial learning rate; optimizer auto chooses its own"),
    key("lrf", "0.01", ONE, YES, "final learning rate as a share of lr0"),
    key("momentum", "0.937", ONE, YES, "momentum, or beta1 of Adam"),
    key("weight_decay", "0.0005", ONE, YES, "weight decay at the nominal batch"),
    key("warmup_epochs", "3.0", Form::Float(0.0, 1_000_000.0), YES, "epochs of warm-up"),
    key("warmup_momentum", "0.8", ONE, YES, "momentum at the start of the warm-up"),
    key("warmup_bias_lr", "0.1", ONE, YES, "learning rate of the biases at the start of the warm-up"),
    key("distill_model", "null", Form::Anything, DISTILL, "teacher"),
    key("dis", "6.0", GAIN, DISTILL, "distillation gain"),
    key("box", "7.5", GAIN, YES, "gain of the box loss"),
    key("cls", "0.5", GAIN, YES, "gain of the class loss"),
    key("dfl", "1.5", GAIN, YES, "gain of the distribution focal loss"),
    key("cls_pw", "0.0", ONE, YES, "class weights are (1 / count)^cls_pw, of mean 1"),
    key("pose", "12.0", GAIN, POSE, "pose gain"),
    key("kobj", "1.0", GAIN, POSE, "keypoint objectness gain"),
    key("rle", "1.0", GAIN, POSE, "residual log-likelihood gain"),
    key("angle", "1.0", GAIN, ANGLE, "angle gain"),
    key("dlog", "1.0", GAIN, DEPTH, "depth gain"),
    key("dgrad", "0.5", GAIN, DEPTH, "depth gradient gain"),
    key("dlam", "1.0", GAIN, DEPTH, "depth variance weight"),
    key("nbs", "64", Form::Int(1, 1_000_000), YES, "nominal batch; gradients accumulate up to it"),
    key("hsv_h", "0.015", ONE, YES, "random hue"),
    key("hsv_s", "0.7", ONE, YES, "random saturation"),
    key("hsv_v", "0.4", ONE, YES, "random brightness"),
    key("degrees", "0.0", Form::Float(0.0, 180.0), YES, "random rotation, degrees either way"),
    key("translate", "0.1", ONE, YES, "random shift as a share of the side"),
    key("scale", "0.5", Form::Special(special::<Scale>), YES, "random scaling: 1 ± scale, or [min, max]"),
    key("shear", "0.0", Form::Float(0.0, 180.0), YES, "random shear, degrees either way"),
    key("perspective", "0.0", ONE, YES, "random perspective"),
    key("flipud", "0.0", ONE, YES, "probability of a vertical flip"),
    key("fliplr", "0.5", ONE, YES, "probability of a horizontal flip"),
    key("bgr", "0.0", ONE, YES, "probability of swapped colour channels"),
    key("mosaic", "1.0", ONE, YES, "probability of a mosaic of four"),
    key("mixup", "0.0", ONE, YES, "probability of mixing two images"),
    key("cutmix", "0.0", ONE, YES, "probability of pasting a rectangle of another image"),
    key("copy_paste", "0.0", ONE, YES, "probability of pasting objects; acts on labels with polygons"),
    key("copy_paste_mode", "flip", Form::Choice(&["flip", "mixup"]), YES, "where pasted objects come from"),
    key("auto_augment", "randaugment", Form::Text, CLASSIFY, "augmentation policy of classification"),
    key("erasing", "0.4", ONE, CLASSIFY, "random erasing of classification"),
    key("cfg", "null", Form::Anything, KeyKind::Refused("a job is one file; write its keys under `train`"), "a file of overrides"),
    key("tracker", "tracktrack.yaml", Form::Text, KeyKind::Refused("tracking is not built"), "tracker settings"),
];

/// The row of a key.
pub fn key_info(name: &str) -> Option<&'static KeyInfo> {
    KEYS.iter().find(|key| key.name == name)
}

/// The table as Markdown, for the documentation.
pub fn keys_markdown() -> String {
    let mut table = String::from("| key | default | what it does |\n|---|---|---|\n");
    for key in KEYS {
        let note = match key.kind {
            KeyKind::Honoured => String::new(),
            KeyKind::AcceptedNoEffect(reason) => format!(" — accepted without effect: {reason}"),
            KeyKind::Refused(reason) => format!(" — refused: {reason}"),
        };
        let default = if key.default.is_empty() { "required" } else { key.default };
        table.push_str(&format!("| `{}` | `{default}` | {}{note} |\n", key.name, key.doc));
    }
    table
}
