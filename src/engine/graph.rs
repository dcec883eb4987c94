//! The graph builder: a network as a list of operations, written like its table.
//!
//! ```
//! use boxwright::engine::{activation::Activation, graph::Graph};
//! let (mut g, x) = Graph::image(64, 64);
//! let x = g.conv_bn_act("model.0", x, 16, 3, 2, Activation::Silu);
//! let x = g.max_pool(x, 5, 1, 2);
//! assert_eq!(g.shape(x), [32, 32, 16]);
//! ```
//!
//! Shapes are `[h, w, c]` without the batch, inferred and checked while building: a wrong shape is an
//! error of the program that builds, so it is asserted, not returned. The batch size belongs to the plan.

use super::activation::Activation;
use super::ops::conv2d::Conv2dParams;
use super::params::{ParamDecl, ParamKind};

/// A tensor of the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(pub(crate) usize);

/// What feeds the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputKind {
    /// RGB bytes; the network sees `value / 255`. Has no gradient.
    ImageU8,
    /// Floats as they are, with a gradient: for tests of single blocks.
    Float,
}

/// Batch normalisation: `eps` and the weight of a batch in the running statistics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormConfig {
    /// Added to the variance.
    pub eps: f32,
    /// `running <- (1 - momentum) * running + momentum * batch`.
    pub momentum: f32,
}

impl NormConfig {
    /// What all detection models use (models.md §2).
    pub const DETECTION: NormConfig = NormConfig { eps: 1e-3, momentum: 0.03 };
}

/// Indices into the parameter declarations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NormParams {
    pub weight: usize,
    pub bias: usize,
    pub running_mean: usize,
    pub running_var: usize,
}

#[derive(Clone, Debug)]
pub(crate) struct ConvNode {
    pub name: String,
    pub x: Value,
    pub out: Value,
    pub params: Conv2dParams,
    pub weight: usize,
    /// Batch normalisation, or else a plain bias.
    pub norm: Option<NormParams>,
    pub bias: Option<usize>,
    pub activation: Activation,
    pub residual: Option<Value>,
}

#[derive(Clone, Debug)]
pub(crate) enum Node {
    Input { out: Value, kind: InputKind },
    Conv(ConvNode),
    MaxPool { x: Value, out: Value, kernel: usize, stride: usize, pad: usize },
    Upsample { x: Value, out: Value, factor: usize },
    Concat { parts: Vec<Value>, out: Value },
    Slice { x: Value, from: usize, out: Value },
}

/// A network: operations in order, shapes, parameters.
#[derive(Clone, Debug)]
pub struct Graph {
    pub(crate) nodes: Vec<Node>,
    /// `[h, w, c]` of each value.
    pub(crate) shapes: Vec<[usize; 3]>,
    pub(crate) params: Vec<ParamDecl>,
    pub(crate) outputs: Vec<Value>,
    pub(crate) norm: NormConfig,
}

impl Graph {
    /// A graph fed with RGB bytes `[h, w, 3]`.
    pub fn image(h: usize, w: usize) -> (Graph, Value) {
        Graph::new(h, w, 3, InputKind::ImageU8)
    }

    /// A graph fed with `[h, w, c]`.
    pub fn new(h: usize, w: usize, c: usize, kind: InputKind) -> (Graph, Value) {
        assert!(h > 0 && w > 0 && c > 0, "empty input {h}x{w}x{c}");
        let mut graph = Graph {
            nodes: Vec::new(),
            shapes: Vec::new(),
            params: Vec::new(),
            outputs: Vec::new(),
            norm: NormConfig::DETECTION,
        };
        let out = graph.value([h, w, c]);
        graph.nodes.push(Node::Input { out, kind });
        (graph, out)
    }

    /// Sets `eps` and momentum of every batch normalisation of this graph.
    pub fn set_norm(&mut self, norm: NormConfig) {
        self.norm = norm;
    }

    /// `[h, w, c]` of a value.
    pub fn shape(&self, x: Value) -> [usize; 3] {
        self.shapes[x.0]
    }

    /// Channels of a value.
    pub fn channels(&self, x: Value) -> usize {
        self.shapes[x.0][2]
    }

    /// `act(batch_norm(conv(x)))`, no bias in the convolution, padding `kernel / 2`.
    /// Parameters: `name.conv.weight`, `name.bn.{weight,bias,running_mean,running_var}`.
    pub fn conv_bn_act(
        &mut self,
        name: &str,
        x: Value,
        c_out: usize,
        kernel: usize,
        stride: usize,
        activation: Activation,
    ) -> Value {
        self.conv_bn_act_add(name, x, c_out, kernel, stride, activation, None)
    }

    /// As [`Graph::conv_bn_act`], then adds `residual` (after the activation).
    #[allow(clippy::too_many_arguments)] // one argument for each column of the model's table
    pub fn conv_bn_act_add(
        &mut self,
        name: &str,
        x: Value,
        c_out: usize,
        kernel: usize,
        stride: usize,
        activation: Activation,
        residual: Option<Value>,
    ) -> Value {
        let [h, w, c_in] = self.shape(x);
        let params = Conv2dParams { c_in, c_out, kernel, stride, pad: kernel / 2 };
        let (h_out, w_out) = params.output_size(h, w);
        if let Some(r) = residual {
            assert_eq!(self.shape(r), [h_out, w_out, c_out], "{name}: shape of the shortcut");
        }
        let weight = self.param(format!("{name}.conv.weight"), ParamKind::ConvWeight { kernel, c_in, c_out });
        let norm = NormParams {
            weight: self.param(format!("{name}.bn.weight"), ParamKind::NormWeight { c: c_out }),
            bias: self.param(format!("{name}.bn.bias"), ParamKind::NormBias { c: c_out }),
            running_mean: self.param(format!("{name}.bn.running_mean"), ParamKind::RunningMean { c: c_out }),
            running_var: self.param(format!("{name}.bn.running_var"), ParamKind::RunningVar { c: c_out }),
        };
        let out = self.value([h_out, w_out, c_out]);
        self.nodes.push(Node::Conv(ConvNode {
            name: name.to_owned(),
            x,
            out,
            params,
            weight,
            norm: Some(norm),
            bias: None,
            activation,
            residual,
        }));
        out
    }

    /// A plain 1x1 convolution with bias: `name.weight`, `name.bias`.
    pub fn conv_bias(&mut self, name: &str, x: Value, c_out: usize) -> Value {
        let [h, w, c_in] = self.shape(x);
        let params = Conv2dParams { c_in, c_out, kernel: 1, stride: 1, pad: 0 };
        let weight = self.param(format!("{name}.weight"), ParamKind::ConvWeight { kernel: 1, c_in, c_out });
        let bias = self.param(format!("{name}.bias"), ParamKind::Bias { c: c_out, fan_in: c_in });
        let out = self.value([h, w, c_out]);
        self.nodes.push(Node::Conv(ConvNode {
            name: name.to_owned(),
            x,
            out,
            params,
            weight,
            norm: None,
            bias: Some(bias),
            activation: Activation::Identity,
            residual: None,
        }));
        out
    }

    /// Maximum over windows; outside the map counts as minus infinity.
    pub fn max_pool(&mut self, x: Value, kernel: usize, stride: usize, pad: usize) -> Value {
        let [h, w, c] = self.shape(x);
        assert!(pad < kernel && h + 2 * pad >= kernel && w + 2 * pad >= kernel, "window {kernel} on {h}x{w}");
        let out = self.value([(h + 2 * pad - kernel) / stride + 1, (w + 2 * pad - kernel) / stride + 1, c]);
        self.nodes.push(Node::MaxPool { x, out, kernel, stride, pad });
        out
    }

    /// Nearest-neighbour enlargement by a whole factor.
    pub fn upsample(&mut self, x: Value, factor: usize) -> Value {
        let [h, w, c] = self.shape(x);
        let out = self.value([h * factor, w * factor, c]);
        self.nodes.push(Node::Upsample { x, out, factor });
        out
    }

    /// Joins channels, in the written order. Costs nothing when it runs: producers write into their slice.
    /// A value can be a part of one concat only, and must not be a slice of another value.
    pub fn concat(&mut self, parts: &[Value]) -> Value {
        let [h, w, _] = self.shape(parts[0]);
        let mut c = 0;
        for &part in parts {
            let [ph, pw, pc] = self.shape(part);
            assert_eq!((ph, pw), (h, w), "concat of maps of different size");
            c += pc;
        }
        let out = self.value([h, w, c]);
        self.nodes.push(Node::Concat { parts: parts.to_vec(), out });
        out
    }

    /// The channels `from..from + len`. A view: costs nothing.
    pub fn slice(&mut self, x: Value, from: usize, len: usize) -> Value {
        let [h, w, c] = self.shape(x);
        assert!(from + len <= c, "channels {from}..{} of {c}", from + len);
        let out = self.value([h, w, len]);
        self.nodes.push(Node::Slice { x, from, out });
        out
    }

    /// Marks a result of the network; its buffer is dense.
    pub fn output(&mut self, x: Value) {
        self.outputs.push(x);
    }

    /// The marked results, in order.
    pub fn outputs(&self) -> &[Value] {
        &self.outputs
    }

    /// Multiply-accumulates of the forward pass of one image (convolutions only).
    pub fn macs(&self) -> u64 {
        let convs = self.nodes.iter().filter_map(|n| match n {
            Node::Conv(c) => Some(c.params.macs(1, self.shapes[c.x.0][0], self.shapes[c.x.0][1])),
            _ => None,
        });
        convs.sum()
    }

    /// One line for each operation: name, kind, output shape, parameters, multiply-accumulates.
    pub fn summary(&self) -> Vec<LayerSummary> {
        self.nodes.iter().map(|n| self.layer_summary(n)).collect()
    }

    fn layer_summary(&self, node: &Node) -> LayerSummary {
        let (name, kind, out) = match node {
            Node::Input { out, .. } => (String::new(), "input".to_owned(), *out),
            Node::Conv(c) => {
                let p = c.params;
                let tail = if c.norm.is_some() { "+bn" } else { "+bias" };
                let act = if c.activation == Activation::Identity { "" } else { "+act" };
                let add = if c.residual.is_some() { "+add" } else { "" };
                (
                    c.name.clone(),
                    format!("conv {}x{} s{}{tail}{act}{add}", p.kernel, p.kernel, p.stride),
                    c.out,
                )
            }
            Node::MaxPool { out, kernel, .. } => (String::new(), format!("max_pool {kernel}x{kernel}"), *out),
            Node::Upsample { out, factor, .. } => (String::new(), format!("upsample x{factor}"), *out),
            Node::Concat { out, parts } => (String::new(), format!("concat of {}", parts.len()), *out),
            Node::Slice { out, .. } => (String::new(), "slice".to_owned(), *out),
        };
        let (mut parameters, mut macs) = (0, 0);
        if let Node::Conv(c) = node {
            let [h, w, _] = self.shapes[c.x.0];
            macs = c.params.macs(1, h, w);
            parameters = c.params.weight_len() + c.params.c_out * if c.norm.is_some() { 2 } else { 1 };
        }
        LayerSummary { name, kind, shape: self.shape(out), parameters, macs }
    }

    fn value(&mut self, shape: [usize; 3]) -> Value {
        self.shapes.push(shape);
        Value(self.shapes.len() - 1)
    }

    fn param(&mut self, name: String, kind: ParamKind) -> usize {
        assert!(self.params.iter().all(|p| p.name != name), "parameter {name} is declared twice");
        self.params.push(ParamDecl { name, kind });
        self.params.len() - 1
    }
}

/// One operation as `boxwright plan` prints it.
#[derive(Clone, Debug)]
pub struct LayerSummary {
    /// State-dict prefix; empty where there are no parameters.
    pub name: String,
    /// The operation in words.
    pub kind: String,
    /// `[h, w, c]` of the output.
    pub shape: [usize; 3],
    /// Trainable numbers.
    pub parameters: usize,
    /// Multiply-accumulates of one image, forward.
    pub macs: u64,
}
