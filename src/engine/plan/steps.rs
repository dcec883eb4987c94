//! The steps of a plan, in order, with every view resolved.

use super::buffers::Buffers;
use super::{Mode, OutputPlan, Plan, Span, View};
use crate::engine::graph::{ConvNode, Graph, Node, Value};

/// Forward step of a convolution.
#[derive(Clone, Debug)]
pub(crate) struct ConvStep {
    /// Index of the node in the graph.
    pub node: usize,
    pub x: View,
    /// Raw output; `None` where the epilogue writes `z` directly.
    pub y: Option<View>,
    pub z: View,
    pub residual: Option<View>,
    pub packed: Span,
    pub stats: Option<Span>,
    /// `None` with a frozen normalisation: running statistics are used.
    pub partials: Option<Span>,
    /// Scratch, where the device needs some.
    pub workspace: Option<Span>,
    /// `x` is the image's bytes.
    pub reads_image: bool,
}

/// Backward step of a convolution.
#[derive(Clone, Debug)]
pub(crate) struct ConvBackwardStep {
    pub node: usize,
    pub x: View,
    pub y: Option<View>,
    pub dz: View,
    /// Gradient of the raw output; `None` without normalisation, where it is `dz`.
    pub dy: Option<View>,
    /// Gradient of the input and whether to add to it.
    pub dx: Option<(View, bool)>,
    pub residual_grad: Option<(View, bool)>,
    pub packed: Span,
    pub workspace: Span,
    pub stats: Option<Span>,
    pub partials: Option<Span>,
    pub frozen_weight: bool,
    pub frozen_norm: bool,
    /// `x` is the image's bytes.
    pub reads_image: bool,
}

/// Forward or backward step of a max-pool.
#[derive(Clone, Debug)]
pub(crate) struct PoolStep {
    pub x: View,
    pub z: View,
    pub indices: Option<Span>,
    pub kernel: usize,
    pub stride: usize,
    pub pad: usize,
}

/// One thing to do.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Input {
        dst: View,
    },
    Conv(ConvStep),
    MaxPool(PoolStep),
    Upsample {
        x: View,
        z: View,
        factor: usize,
    },
    ZeroBorder(View),
    Zero(View),
    ConvBackward(ConvBackwardStep),
    /// `x` and `z` are gradients here.
    MaxPoolBackward {
        pool: PoolStep,
        accumulate: bool,
    },
    UpsampleBackward {
        dz: View,
        dx: View,
        factor: usize,
        accumulate: bool,
    },
}

/// Which channels of each gradient buffer have been written so far in the backward pass.
struct Written(Vec<Vec<bool>>);

impl Written {
    /// Marks a value's gradient as written. True if the writer must add. Channels that are partly written
    /// are completed with a `Zero` step first, so that adding is right everywhere.
    fn claim(&mut self, b: &Buffers, v: Value, steps: &mut Vec<Step>) -> bool {
        let (root, from) = b.home[v.0];
        let len = b.view(v).c;
        let grad = b.grad_view(root).expect("claimed gradients exist");
        let channels = &mut self.0[root.0];
        if channels[from..from + len].iter().all(|w| !w) {
            channels[from..from + len].fill(true);
            return false;
        }
        let mut i = from;
        while i < from + len {
            let run = channels[i..from + len].iter().take_while(|w| !**w).count();
            if run > 0 {
                steps.push(Step::Zero(grad.slice(i, run)));
            }
            i += run.max(1);
        }
        channels[from..from + len].fill(true);
        true
    }

    /// Before a gradient is read: zeroes channels that nobody wrote.
    fn complete(&mut self, b: &Buffers, v: Value, steps: &mut Vec<Step>) {
        let (root, from) = b.home[v.0];
        let len = b.view(v).c;
        if self.0[root.0][from..from + len].iter().any(|w| !w) {
            let untouched = !self.claim(b, v, steps);
            if untouched {
                steps.push(Step::Zero(b.grad_view(v).expect("completed gradients exist")));
            }
        }
    }
}

/// Emits all steps and hands them to `finish`.
pub(crate) fn emit(
    graph: &Graph,
    b: &Buffers,
    mode: Mode,
    frozen: &[bool],
    finish: impl FnOnce(Vec<Step>, Vec<Step>, Vec<OutputPlan>, Vec<View>) -> Plan,
) -> Plan {
    let mut forward = Vec::new();
    for (i, node) in graph.nodes.iter().enumerate() {
        emit_forward(b, i, node, &mut forward);
    }
    let mut backward = Vec::new();
    if mode == Mode::Train {
        let mut written = Written(graph.shapes.iter().map(|s| vec![false; s[2]]).collect());
        for &out in &graph.outputs {
            written.0[out.0].fill(true); // by the loss
        }
        for (i, node) in graph.nodes.iter().enumerate().rev() {
            emit_backward(b, i, node, frozen, &mut written, &mut backward);
        }
    }
    let outputs = graph
        .outputs
        .iter()
        .map(|&v| OutputPlan { view: b.view(v), grad: b.grad_view(v), bytes: b.activation_bytes[v.0] })
        .collect();
    let values = (0..graph.shapes.len()).map(|v| b.view(Value(v))).collect();
    finish(forward, backward, outputs, values)
}

fn span(b: &Buffers, request: usize) -> Span {
    Span { start: b.requests[request].start, len: b.requests[request].len }
}

fn emit_forward(b: &Buffers, i: usize, node: &Node, steps: &mut Vec<Step>) {
    let out = match node {
        // Convolutions read the bytes themselves.
        Node::Input { out, .. } if b.image[out.0] => return,
        Node::Input { out, .. } => {
            steps.push(Step::Input { dst: b.view(*out) });
            *out
        }
        Node::Conv(c) => {
            let buffers = &b.conv[i];
            let z = b.view(c.out);
            steps.push(Step::Conv(ConvStep {
                node: i,
                x: b.view(c.x),
                y: buffers.y.map(|r| b.stored(r, [z.n, z.h, z.w, z.c], 0)),
                z,
                residual: c.residual.map(|r| b.view(r)),
                packed: span(b, buffers.packed),
                stats: buffers.stats.map(|r| span(b, r)),
                partials: buffers.partials.map(|r| span(b, r)),
                workspace: buffers.workspace_forward.map(|r| span(b, r)),
                reads_image: b.image[b.home[c.x.0].0.0],
            }));
            c.out
        }
        Node::MaxPool { x, out, kernel, stride, pad } => {
            let indices = b.pool_indices[i].map(|r| span(b, r));
            let (x, z) = (b.view(*x), b.view(*out));
            steps.push(Step::MaxPool(PoolStep {
                x,
                z,
                indices,
                kernel: *kernel,
                stride: *stride,
                pad: *pad,
            }));
            *out
        }
        Node::Upsample { x, out, factor } => {
            steps.push(Step::Upsample { x: b.view(*x), z: b.view(*out), factor: *factor });
            *out
        }
        Node::Concat { .. } | Node::Slice { .. } => return,
    };
    // Bytes are shared by lifetime, so the border may hold an earlier tenant's numbers. Device kernels write the
    // border of what they write, but for a convolution that finishes its output itself.
    let is_finished_by_conv = matches!(node, Node::Conv(_)) && b.conv[i].y.is_none();
    if b.view(out).pad > 0 && (b.is_on_cpu() || is_finished_by_conv) {
        steps.push(Step::ZeroBorder(b.view(out)));
    }
}

fn emit_backward(
    b: &Buffers,
    i: usize,
    node: &Node,
    frozen: &[bool],
    written: &mut Written,
    steps: &mut Vec<Step>,
) {
    match node {
        Node::Conv(c) if b.needs_grad[c.out.0] => emit_conv_backward(b, i, c, frozen, written, steps),
        Node::MaxPool { x, out, kernel, stride, pad } if b.needs_grad[x.0] => {
            written.complete(b, *out, steps);
            let accumulate = written.claim(b, *x, steps);
            let (dx, dz) = (b.grad_view(*x), b.grad_view(*out));
            let pool = PoolStep {
                x: dx.expect("the input needs a gradient"),
                z: dz.expect("so does the output"),
                indices: b.pool_indices[i].map(|r| span(b, r)),
                kernel: *kernel,
                stride: *stride,
                pad: *pad,
            };
            steps.push(Step::MaxPoolBackward { pool, accumulate });
        }
        Node::Upsample { x, out, factor } if b.needs_grad[x.0] => {
            written.complete(b, *out, steps);
            let accumulate = written.claim(b, *x, steps);
            let (dx, dz) = (b.grad_view(*x), b.grad_view(*out));
            steps.push(Step::UpsampleBackward {
                dz: dz.expect("the output needs a gradient"),
                dx: dx.expect("so does the input"),
                factor: *factor,
                accumulate,
            });
        }
        Node::Input { out, .. } if b.needs_grad[out.0] => written.complete(b, *out, steps),
        _ => {}
    }
}

fn emit_conv_backward(
    b: &Buffers,
    i: usize,
    c: &ConvNode,
    frozen: &[bool],
    written: &mut Written,
    steps: &mut Vec<Step>,
) {
    let buffers = &b.conv[i];
    written.complete(b, c.out, steps);
    let dz = b.grad_view(c.out).expect("the output needs a gradient");
    let residual_grad = c.residual.filter(|r| b.needs_grad[r.0]).map(|r| {
        let accumulate = written.claim(b, r, steps);
        (b.grad_view(r).expect("the shortcut needs a gradient"), accumulate)
    });
    let dx = Some(c.x).filter(|x| b.needs_grad[x.0]).map(|x| {
        let accumulate = written.claim(b, x, steps);
        (b.grad_view(x).expect("the input needs a gradient"), accumulate)
    });
    let pad = c.params.gradient_border();
    steps.push(Step::ConvBackward(ConvBackwardStep {
        node: i,
        x: b.view(c.x),
        y: buffers.y.map(|r| b.stored(r, [dz.n, dz.h, dz.w, dz.c], 0)),
        dz,
        dy: buffers.dy.map(|r| b.stored(r, [dz.n, dz.h, dz.w, dz.c], pad)),
        dx,
        residual_grad,
        packed: span(b, buffers.packed_backward.expect("made for every backward step")),
        workspace: span(b, buffers.workspace.expect("made for every backward step")),
        stats: buffers.stats.map(|r| span(b, r)),
        partials: buffers.partials_backward.map(|r| span(b, r)),
        frozen_weight: frozen[c.weight],
        frozen_norm: c.norm.is_some_and(|n| frozen[n.weight]),
        reads_image: b.image[b.home[c.x.0].0.0],
    }));
}
