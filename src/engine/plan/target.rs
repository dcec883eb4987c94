//! What a plan is made for: the device decides the width of a number and the scratch of each operation.

use std::sync::Arc;

use crate::engine::device::cuda::{Chip, Precision};
use crate::engine::graph::{Graph, InputKind, Node};
use crate::engine::ops::batch_norm_act::cuda as norm;
use crate::engine::ops::conv2d::Conv2dParams;
use crate::engine::ops::conv2d::cuda::{Pass, Shape, StatsLayout, Tuning};
use crate::engine::ops::{batch_norm_act, conv2d};
use crate::engine::tensor::View;

/// The device that runs a plan, and in what numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `f32` on the processor.
    Cpu,
    /// A GPU.
    Cuda {
        /// Storage of activations and their gradients.
        precision: Precision,
        /// Its chip: how far work is split depends on it.
        chip: Chip,
        /// Cuts of convolutions that were measured on it; empty for those of the model.
        tuning: Arc<Tuning>,
    },
}

/// What the scratch of a convolution depends on: its views, as if every buffer began at 0.
pub(crate) struct ConvLayout {
    pub params: Conv2dParams,
    pub x: View,
    /// What the convolution itself writes.
    pub out: View,
    /// Gradient of its output.
    pub dy: View,
    /// Gradient of its input.
    pub dx: View,
    pub is_image: bool,
    pub has_norm: bool,
}

/// Scratch of a convolution, in 4-byte words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ConvWords {
    /// Packed weights, forward.
    pub packed: usize,
    /// Partial statistics of the epilogue.
    pub partials: usize,
    /// Anything else of the forward pass.
    pub workspace: usize,
    /// Packed weights, backward.
    pub packed_backward: usize,
    /// Partial sums of the normalisation's gradients, or of the bias's.
    pub partials_backward: usize,
    /// Partial weight gradients and anything else of the backward pass.
    pub workspace_backward: usize,
}

impl Target {
    /// Bytes of a number of the storage type.
    pub fn bytes(&self) -> usize {
        match self {
            Target::Cpu => 4,
            Target::Cuda { precision, .. } => precision.bytes(),
        }
    }

    /// Bytes of a number of the activation of root value `v`: on a GPU the head's outputs are `f32`, because
    /// the loss reads them.
    pub(crate) fn activation_bytes(&self, graph: &Graph, v: usize) -> usize {
        let is_plain = |n: &Node| matches!(n, Node::Conv(c) if c.out.0 == v && c.norm.is_none());
        if graph.nodes.iter().any(is_plain) { 4 } else { self.bytes() }
    }

    /// Numbers from pixel to pixel of the gradient of root value `v` with `c` channels.
    pub(crate) fn gradient_pitch(&self, graph: &Graph, v: usize, c: usize) -> usize {
        let is_output = graph.outputs.iter().any(|o| o.0 == v);
        if *self != Target::Cpu && is_output { c.next_multiple_of(8) } else { c }
    }

    /// Which values stay bytes: on a GPU the image, when three channels of it are read by normalised
    /// convolutions alone.
    pub(crate) fn image_values(&self, graph: &Graph) -> Vec<bool> {
        let mut image = vec![false; graph.shapes.len()];
        let Node::Input { out, kind: InputKind::ImageU8 } = &graph.nodes[0] else { return image };
        let reads_well = |n: &Node| match n {
            Node::Input { .. } => true,
            Node::Conv(c) => c.x != *out || c.norm.is_some(),
            Node::MaxPool { x, .. } | Node::Upsample { x, .. } | Node::Slice { x, .. } => x != out,
            Node::Concat { parts, .. } => !parts.contains(out),
        };
        image[out.0] =
            *self != Target::Cpu && graph.shapes[out.0][2] == 3 && graph.nodes.iter().all(reads_well);
        image
    }

    /// Scratch of a convolution.
    pub(crate) fn conv_words(&self, layout: &ConvLayout) -> ConvWords {
        let (p, View { n, h, w, .. }) = (layout.params, layout.out);
        match self {
            Target::Cpu => ConvWords {
                packed: p.packed_forward_len(),
                // Partial sums are f64 on the CPU.
                partials: 2 * conv2d::cpu::stats_partials_len(&p, n, h, w),
                workspace: 0,
                packed_backward: p.packed_backward_len(),
                partials_backward: match layout.has_norm {
                    true => 2 * batch_norm_act::cpu::partials_len(n, h, w, p.c_out),
                    false => 0,
                },
                workspace_backward: p.backward_weight_workspace_len(n, h, w),
            },
            Target::Cuda { precision, chip, tuning } => cuda_words(layout, *precision, chip, tuning),
        }
    }

    /// Pixels of each partial statistic that a convolution leaves.
    pub(crate) fn stats_layout(&self, p: &Conv2dParams, x: &View, y: &View, is_image: bool) -> StatsLayout {
        match self {
            Target::Cpu => unreachable!("the CPU cuts its statistics itself"),
            Target::Cuda { precision, chip, tuning } => {
                stats_layout(p, x, y, is_image, *precision, chip, tuning)
            }
        }
    }
}

fn stats_layout(
    p: &Conv2dParams,
    x: &View,
    y: &View,
    is_image: bool,
    precision: Precision,
    chip: &Chip,
    tuning: &Tuning,
) -> StatsLayout {
    if is_image {
        return conv2d::cuda::image_stats_layout(p, y, precision, chip);
    }
    conv2d::cuda::stats_layout(p, &Shape::of_views(x, y, precision), precision, chip, tuning)
}

/// Floats of partial statistics before the scratch of the kernel that joins them.
pub(crate) fn stats_words(layout: &StatsLayout, p: &Conv2dParams) -> usize {
    layout.len(p).next_multiple_of(4)
}

fn cuda_words(layout: &ConvLayout, precision: Precision, chip: &Chip, tuning: &Tuning) -> ConvWords {
    let ConvLayout { params: p, x, out, dy, dx, is_image, has_norm } = layout;
    let pixels = out.n * out.h * out.w;
    let words = |pass, a: &View, b: &View| {
        let shape = Shape::of_views(a, b, precision);
        conv2d::cuda::workspace_len(pass, p, &shape, precision, chip, tuning)
    };
    let stats = stats_layout(p, x, out, *is_image, precision, chip, tuning);
    let scratch = norm::finish_stats_scratch_len(pixels, stats.pixels_per_partial, p.c_out);
    ConvWords {
        partials: stats_words(&stats, p) + scratch,
        workspace: if *is_image { 0 } else { words(Pass::Forward, x, out) },
        partials_backward: match has_norm {
            true => norm::backward_workspace_len(precision, pixels, p.c_out),
            false => norm::bias_gradient_workspace_len(pixels, p.c_out),
        },
        workspace_backward: match is_image {
            true => conv2d::cuda::image_workspace_len(p, dy, precision, chip),
            false => words(Pass::BackwardWeight, x, dy).max(words(Pass::BackwardData, dx, dy)),
        },
        ..ConvWords::default()
    }
}
