//! Detector networks: a table of rows becomes a graph.
//!
//! Start at [`Detector::build`]. `yolov8` holds the table and its scales, `table` interprets rows,
//! `blocks` has the building blocks, `head` the detection head. Shapes, wiring and parameter names follow
//! the reference, so that weights travel both ways.

pub mod blocks;
pub mod head;
pub mod table;
pub mod yolov8;

use crate::engine::graph::{Graph, Value};
use table::Table;

/// Why a network could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// No such model.
    #[error("unknown model {name:?}; available: {available}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        available: String,
    },
    /// The input does not divide by the largest stride.
    #[error("input {h}x{w} is not a multiple of the largest stride {stride}")]
    InputSize {
        /// Rows.
        h: usize,
        /// Columns.
        w: usize,
        /// Largest stride.
        stride: usize,
    },
    /// A row of a table makes no sense.
    #[error("row {row} of the model table: {reason}")]
    Row {
        /// Row number from 0.
        row: usize,
        /// What is wrong.
        reason: String,
    },
    /// A network needs at least one class.
    #[error("number of classes is {nc}, allowed: 1 to 10000")]
    Classes {
        /// What was asked for.
        nc: usize,
    },
}

/// A detector at one input size.
#[derive(Clone, Debug)]
pub struct Detector {
    /// For example `yolov8n`.
    pub name: String,
    /// The network. Outputs alternate by level: boxes 0, scores 0, boxes 1, scores 1, ...
    pub graph: Graph,
    /// Classes.
    pub nc: usize,
    /// Bins of a side's distance distribution.
    pub reg_max: usize,
    /// Input pixels per cell, finest level first.
    pub strides: Vec<usize>,
    /// Index of the head's row: its parameters are `model.<row>.…`.
    pub head_row: usize,
    /// The three inputs of the head.
    pub features: Vec<Value>,
}

impl Detector {
    /// Builds a named model (`yolov8n`, also written `yolov8n.pt` or `yolov8n.yaml`) for `nc` classes and
    /// an input of `h` by `w`.
    ///
    /// # Errors
    /// An unknown name, a size that does not divide by the largest stride, no classes.
    pub fn build(name: &str, nc: usize, h: usize, w: usize) -> Result<Detector, ModelError> {
        let stem = stem(name);
        let table = yolov8::table(&stem).ok_or_else(|| ModelError::Unknown {
            name: name.to_owned(),
            available: available().join(", "),
        })?;
        Detector::from_table(&stem, &table, nc, h, w)
    }

    /// Builds any table of YOLOv8 rows.
    pub fn from_table(
        name: &str,
        table: &Table,
        nc: usize,
        h: usize,
        w: usize,
    ) -> Result<Detector, ModelError> {
        if !(1..=10_000).contains(&nc) {
            return Err(ModelError::Classes { nc });
        }
        table.build(name, nc, h, w)
    }

    /// Cells over all levels for the built input size.
    pub fn anchor_count(&self) -> usize {
        let cells = self.graph.outputs().iter().step_by(2).map(|&v| {
            let [h, w, _] = self.graph.shape(v);
            h * w
        });
        cells.sum()
    }

    /// The untrained weight of the distance decoder, `0, 1, … reg_max - 1`, which the reference keeps in its
    /// state dict although it never changes: name, shape, numbers.
    pub fn dfl_constant(&self) -> (String, Vec<usize>, Vec<f32>) {
        let numbers = (0..self.reg_max).map(|i| i as f32).collect();
        (format!("model.{}.dfl.conv.weight", self.head_row), vec![1, self.reg_max, 1, 1], numbers)
    }
}

/// The models there are.
pub fn available() -> Vec<&'static str> {
    yolov8::NAMES.to_vec()
}

/// `dir/yolov8n.pt` to `yolov8n`.
pub fn stem(name: &str) -> String {
    let file = name.rsplit(['/', '\\']).next().unwrap_or(name);
    file.trim_end_matches(".safetensors").trim_end_matches(".pt").trim_end_matches(".yaml").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::params::ParamSet;

    /// Trainable parameters and state entries of the reference (models.md §6).
    #[test]
    fn sizes_are_the_references() {
        let cases = [
            ("yolov8n", 80, 3_157_184, 355),
            ("yolov8n", 3, 3_011_417, 355),
            ("yolov8s", 80, 11_166_544, 355),
            ("yolov8m", 80, 25_902_624, 475),
            ("yolov8l", 80, 43_691_504, 595),
            ("yolov8x", 80, 68_229_632, 595),
        ];
        for (name, nc, trainable, entries) in cases {
            let model = Detector::build(name, nc, 64, 64).expect("a shipped model");
            let params = ParamSet::new(&model.graph);
            assert_eq!(params.trainable_count(), trainable, "{name}");
            // One batch counter for each normalisation and the distance constant come on top.
            let norms = params.infos.iter().filter(|p| p.name.ends_with("running_var")).count();
            assert_eq!(params.infos.len() + norms + 1, entries, "{name}");
        }
    }

    #[test]
    fn multiply_accumulates_are_the_references() {
        for (name, giga) in [("yolov8n", 4.37), ("yolov8s", 14.3), ("yolov8m", 39.5), ("yolov8x", 128.9)] {
            let macs =
                Detector::build(name, 80, 640, 640).expect("a shipped model").graph.macs() as f64 / 1e9;
            assert!((macs - giga).abs() / giga < 0.01, "{name}: {macs}");
        }
    }

    #[test]
    fn wrong_requests_are_told() {
        let unknown = Detector::build("yolov7", 3, 64, 64).expect_err("not shipped").to_string();
        assert!(unknown.contains("yolov7") && unknown.contains("yolov8n"), "{unknown}");
        assert!(matches!(Detector::build("yolov8n", 3, 100, 64), Err(ModelError::InputSize { .. })));
        assert!(matches!(Detector::build("yolov8n", 0, 64, 64), Err(ModelError::Classes { nc: 0 })));
        assert_eq!(Detector::build("a/yolov8n.pt", 3, 64, 96).expect("a path").strides, [8, 16, 32]);
    }
}
