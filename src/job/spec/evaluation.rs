//! A job that evaluates: `train.mode: val`. It measures the weights file `model` on `train.data`.

use super::Loader;
use crate::train::args::{Source, TrainArgs};
use crate::train::child::JobMode;
use crate::yaml::Node;

/// Keys under `train` that act on an evaluation.
const KEYS: &[&str] = &[
    "task",
    "mode",
    "data",
    "split",
    "imgsz",
    "batch",
    "rect",
    "conf",
    "iou",
    "max_det",
    "agnostic_nms",
    "device",
    "amp",
    "workers",
    "plots",
    "save_json",
    "verbose",
];

/// What the document asks for, before anything of it is checked.
pub(super) fn mode_of(root: &Node) -> JobMode {
    let word = root.get("train").and_then(|train| train.get("mode")).and_then(Node::as_text);
    let evaluates = word.is_some_and(|word| word.trim().eq_ignore_ascii_case("val"));
    if evaluates { JobMode::Evaluate } else { JobMode::Train }
}

/// True when the dotted key acts on a job of this mode.
pub(super) fn acts(mode: JobMode, key: &str) -> bool {
    mode == JobMode::Train || key.strip_prefix("train.").is_none_or(|key| KEYS.contains(&key))
}

/// Gives keys that were not given the defaults of an evaluation: the size that the weights were trained at, and
/// rectangular batches, as `boxwright val` has them.
pub(super) fn settle(args: &mut TrainArgs, train: &Node) {
    let is_given = |key: &str| train.get(key).is_some_and(|node| !node.is_null());
    if !is_given("imgsz") {
        args.imgsz = 0;
    }
    if !is_given("rect") {
        args.rect = true;
    }
    args.resume = Source::Off;
}

impl Loader<'_> {
    /// The model of an evaluation must be a weights file, and be there: nothing stands in for it.
    pub(super) fn evaluated_model(&mut self, node: &Node, is_file: bool) {
        if is_file {
            self.understand("model");
        } else {
            let allowed =
                "a weights file (.safetensors or .pt) that exists, for a job with `train.mode: val`";
            self.faults.refuse(node, "model", allowed);
        }
    }
}
