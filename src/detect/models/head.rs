//! The anchor-free detection head (models.md §3.1, the form of YOLOv8).

use super::blocks::conv;
use crate::engine::graph::{Graph, Value};

/// Adds box and class branches for each level and marks them as outputs: boxes 0, scores 0, boxes 1, …
/// Box channels are `side * reg_max + bin`, sides left, top, right, bottom.
pub fn detect(g: &mut Graph, name: &str, features: &[Value], nc: usize, reg_max: usize) {
    let first = g.channels(features[0]);
    let box_width = 16.max(first / 4).max(4 * reg_max);
    let class_width = first.max(nc.min(100));
    for (level, &x) in features.iter().enumerate() {
        for (branch, width, out) in [("cv2", box_width, 4 * reg_max), ("cv3", class_width, nc)] {
            let prefix = format!("{name}.{branch}.{level}");
            let y = conv(g, &format!("{prefix}.0"), x, width, 3, 1);
            let y = conv(g, &format!("{prefix}.1"), y, width, 3, 1);
            let y = g.conv_bias(&format!("{prefix}.2"), y, out);
            g.output(y);
        }
    }
}
