//! The plan: every step of a network at one batch size, and the place of every buffer.
//!
//! A detector is a fixed graph with fixed shapes, so nothing is decided while it runs. `Plan::new` orders
//! the steps, forward and backward, and gives each buffer an offset in one arena by its lifetime. It knows
//! every byte before the first allocation. Three rules keep it small and fast:
//!
//! * a concat is one buffer; its producers write straight into their channel slice, and gradients are read
//!   straight from it;
//! * a map read by a padded convolution carries a border of zero pixels, so kernels never test for edges;
//! * of several consumers of a value, the one whose backward pass comes first writes the gradient, the
//!   others add: a flag on the step, decided here.

mod arena;
mod buffers;
mod cost;
mod steps;
mod target;

use super::graph::{Graph, InputKind, Value};
use super::params::ParamSet;
use super::tensor::View;
pub use cost::{Cost, StepCost};
pub(crate) use steps::{ConvBackwardStep, ConvStep, PoolStep, Step};
pub use target::Target;
pub(crate) use target::stats_words;

/// What a plan is for. An argument, never guessed from the surroundings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Batch statistics, everything kept that the backward pass needs.
    Train,
    /// Running statistics folded into the convolutions, forward only.
    Eval,
}

/// A run of 4-byte words in the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub start: usize,
    pub len: usize,
}

/// An output of the network and, when training, its gradient. Both are dense on the CPU; on a GPU the pixels of
/// the gradient lie at a multiple of eight numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OutputPlan {
    pub view: View,
    pub grad: Option<View>,
    /// Bytes of a number of the output.
    pub bytes: usize,
}

/// Bytes that a plan needs, exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanBytes {
    /// The arena: activations, gradients of activations, scratch; shared by lifetime.
    pub arena: usize,
    /// The input batch.
    pub input: usize,
    /// What the arena would take if nothing were shared.
    pub unshared: usize,
}

impl PlanBytes {
    /// Bytes allocated for this plan.
    pub fn total(&self) -> usize {
        self.arena + self.input
    }
}

/// Steps and buffer places for one graph, batch size and mode.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) batch: usize,
    pub(crate) mode: Mode,
    pub(crate) input_kind: InputKind,
    pub(crate) input_shape: [usize; 3],
    pub(crate) input_grad: Option<View>,
    pub(crate) forward: Vec<Step>,
    pub(crate) backward: Vec<Step>,
    pub(crate) outputs: Vec<OutputPlan>,
    pub(crate) values: Vec<View>,
    pub(crate) target: Target,
    pub(crate) arena_floats: usize,
    unshared_floats: usize,
}

impl Plan {
    /// A plan in which every parameter is trained.
    pub fn new(graph: &Graph, batch: usize, mode: Mode) -> Plan {
        Plan::build(graph, batch, mode, &vec![false; graph.params.len()], &Target::Cpu)
    }

    /// A plan that leaves out what the frozen parameters of `params` make needless.
    pub fn with_params(graph: &Graph, params: &ParamSet, batch: usize, mode: Mode) -> Plan {
        Plan::for_target(graph, params, batch, mode, &Target::Cpu)
    }

    /// As [`Plan::with_params`], for a device and precision.
    pub fn for_target(graph: &Graph, params: &ParamSet, batch: usize, mode: Mode, target: &Target) -> Plan {
        let frozen: Vec<bool> = params.infos.iter().map(|p| p.frozen).collect();
        Plan::build(graph, batch, mode, &frozen, target)
    }

    fn build(graph: &Graph, batch: usize, mode: Mode, frozen: &[bool], target: &Target) -> Plan {
        assert!(batch > 0, "a plan for an empty batch");
        let mut buffers = buffers::Buffers::demand(graph, batch, mode, frozen, target);
        let arena_floats = arena::place(&mut buffers.requests);
        let unshared_floats = buffers.requests.iter().map(|r| r.len).sum();
        steps::emit(graph, &buffers, mode, frozen, |forward, backward, outputs, values| {
            let (input_kind, input_shape, input_grad) = buffers.input(graph);
            Plan {
                batch,
                mode,
                input_kind,
                input_shape,
                input_grad,
                forward,
                backward,
                outputs,
                values,
                target: target.clone(),
                arena_floats,
                unshared_floats,
            }
        })
    }

    /// Images of a batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Training or evaluation.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// `[h, w, c]` of one input image.
    pub fn input_shape(&self) -> [usize; 3] {
        self.input_shape
    }

    /// `[n, h, w, c]` of output `i`.
    pub fn output_shape(&self, i: usize) -> [usize; 4] {
        let v = self.outputs[i].view;
        [v.n, v.h, v.w, v.c]
    }

    /// Number of outputs.
    pub fn output_count(&self) -> usize {
        self.outputs.len()
    }

    /// The device and precision it is for.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Where a value of the graph lies.
    pub fn view(&self, value: Value) -> View {
        self.values[value.0]
    }

    /// Exact bytes.
    pub fn bytes(&self) -> PlanBytes {
        let [h, w, c] = self.input_shape;
        let numbers = self.batch * h * w * c;
        let input = match self.input_kind {
            InputKind::ImageU8 => numbers,
            InputKind::Float => numbers * 4,
        };
        PlanBytes { arena: self.arena_floats * 4, input, unshared: self.unshared_floats * 4 }
    }
}
