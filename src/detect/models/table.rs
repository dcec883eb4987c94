//! The model table and its interpreter (models.md §1).

use super::{Detector, ModelError, blocks, head};
use crate::engine::graph::{Graph, Value};

/// How a family's table is shrunk or grown.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// Factor on repeats above 1.
    pub depth: f64,
    /// Factor on channels.
    pub width: f64,
    /// Channels are cut to this before the factor.
    pub max_channels: usize,
}

/// What a row builds; channels before scaling.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Module {
    /// Convolution, batch norm, SiLU.
    Conv {
        /// Output channels.
        channels: usize,
        /// Kernel size.
        kernel: usize,
        /// Step.
        stride: usize,
    },
    /// Cross-stage block with bottlenecks.
    C2f {
        /// Output channels.
        channels: usize,
        /// Add the input in each bottleneck.
        shortcut: bool,
    },
    /// Pyramid pooling.
    Sppf {
        /// Output channels.
        channels: usize,
        /// Pool window.
        kernel: usize,
    },
    /// Nearest-neighbour enlargement.
    Upsample {
        /// Whole factor.
        factor: usize,
    },
    /// Joins channels.
    Concat,
    /// Detection head.
    Detect,
}

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Inputs: -1 is the row before, others are row numbers.
    pub from: Vec<isize>,
    /// Repeats before scaling.
    pub repeats: usize,
    /// What to build.
    pub module: Module,
}

impl Row {
    /// A row.
    pub fn new(from: &[isize], repeats: usize, module: Module) -> Row {
        Row { from: from.to_vec(), repeats, module }
    }
}

/// A network as rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// Scale applied to every row.
    pub scale: Scale,
    /// Bins of a side's distance distribution.
    pub reg_max: usize,
    /// Backbone, then head.
    pub rows: Vec<Row>,
}

impl Table {
    /// `ceil(min(c, max) * width / 8) * 8`.
    fn channels(&self, c: usize) -> usize {
        let scaled = c.min(self.scale.max_channels) as f64 * self.scale.width;
        (scaled / 8.0).ceil() as usize * 8
    }

    /// `max(round_half_even(n * depth), 1)` for n above 1.
    fn repeats(&self, n: usize) -> usize {
        if n > 1 { ((n as f64 * self.scale.depth).round_ties_even() as usize).max(1) } else { n }
    }

    /// Builds the network.
    pub(super) fn build(&self, name: &str, nc: usize, h: usize, w: usize) -> Result<Detector, ModelError> {
        let stride = self.largest_stride();
        if h == 0 || w == 0 || !h.is_multiple_of(stride) || !w.is_multiple_of(stride) {
            return Err(ModelError::InputSize { h, w, stride });
        }
        let (mut g, image) = Graph::image(h, w);
        let mut values: Vec<Value> = Vec::with_capacity(self.rows.len());
        for (i, row) in self.rows.iter().enumerate() {
            let inputs = inputs(row, i, image, &values)?;
            let prefix = format!("model.{i}");
            let x = inputs[0];
            let repeats = self.repeats(row.repeats);
            let out = match row.module {
                Module::Conv { channels, kernel, stride } => {
                    blocks::conv(&mut g, &prefix, x, self.channels(channels), kernel, stride)
                }
                Module::C2f { channels, shortcut } => {
                    blocks::c2f(&mut g, &prefix, x, self.channels(channels), repeats, shortcut)
                }
                Module::Sppf { channels, kernel } => {
                    blocks::sppf(&mut g, &prefix, x, self.channels(channels), kernel)
                }
                Module::Upsample { factor } => g.upsample(x, factor),
                Module::Concat => g.concat(&inputs),
                Module::Detect => {
                    head::detect(&mut g, &prefix, &inputs, nc, self.reg_max);
                    return Ok(finish(name, g, i, inputs, nc, self.reg_max, h));
                }
            };
            values.push(out);
        }
        Err(ModelError::Row {
            row: self.rows.len(),
            reason: "the table ends without a Detect row".to_owned(),
        })
    }

    /// Product of all strides on the way down: what the input size must divide by.
    fn largest_stride(&self) -> usize {
        let strides = self.rows.iter().take_while(|r| !matches!(r.module, Module::Upsample { .. }));
        strides.map(|r| if let Module::Conv { stride, .. } = r.module { stride } else { 1 }).product()
    }
}

/// The input values of row `i`.
fn inputs(row: &Row, i: usize, image: Value, values: &[Value]) -> Result<Vec<Value>, ModelError> {
    let fault = |reason| ModelError::Row { row: i, reason };
    let list: Result<Vec<Value>, ModelError> = row
        .from
        .iter()
        .map(|&f| {
            let index = if f < 0 { i as isize + f } else { f };
            match usize::try_from(index) {
                Ok(index) if index < i => Ok(values[index]),
                Err(_) if i == 0 && f == -1 => Ok(image),
                _ => Err(fault(format!("no earlier row {f}"))),
            }
        })
        .collect();
    list.and_then(|l| if l.is_empty() { Err(fault("no input".to_owned())) } else { Ok(l) })
}

fn finish(
    name: &str,
    graph: Graph,
    head_row: usize,
    features: Vec<Value>,
    nc: usize,
    reg_max: usize,
    h: usize,
) -> Detector {
    let strides = features.iter().map(|&f| h / graph.shape(f)[0]).collect();
    Detector { name: name.to_owned(), graph, nc, reg_max, strides, head_row, features }
}
