//! Which buffers a plan needs, how large, and from when to when.
//!
//! Time: forward node `i` of `N` runs at `i`, the loss at `N`, backward node `i` at `2 * N - i`.

use super::arena::Request;
use super::{Mode, View};
use crate::engine::graph::{ConvNode, Graph, InputKind, Node, Value};
use crate::engine::ops::{batch_norm_act, conv2d, max_pool2d};

/// Buffers of one convolution, as indices into the requests.
#[derive(Clone, Debug, Default)]
pub(crate) struct ConvBuffers {
    /// Raw convolution output (training with normalisation).
    pub y: Option<usize>,
    /// Mean and inverse deviation when training, scale and shift in evaluation; then one scratch row.
    pub stats: Option<usize>,
    /// Packed weights and partial statistics of the forward pass.
    pub packed: usize,
    pub partials: Option<usize>,
    /// Gradient of the raw output, with a border.
    pub dy: Option<usize>,
    /// Packed weights, partial sums and weight-gradient scratch of the backward pass.
    pub packed_backward: Option<usize>,
    pub partials_backward: Option<usize>,
    pub workspace: Option<usize>,
}

/// What the buffers are and which node uses which.
pub(crate) struct Buffers {
    pub requests: Vec<Request>,
    pub batch: usize,
    /// Root value and first channel of each value.
    pub home: Vec<(Value, usize)>,
    /// Border of each root buffer.
    pub pad: Vec<usize>,
    /// Request of the activation and of the gradient of each root value.
    pub activation: Vec<Option<usize>>,
    pub gradient: Vec<Option<usize>>,
    /// True where a gradient is wanted.
    pub needs_grad: Vec<bool>,
    /// By node.
    pub conv: Vec<ConvBuffers>,
    pub pool_indices: Vec<Option<usize>>,
    shapes: Vec<[usize; 3]>,
}

impl Buffers {
    /// Collects the demands of a graph.
    pub fn demand(graph: &Graph, batch: usize, mode: Mode, frozen: &[bool]) -> Buffers {
        let nodes = graph.nodes.len();
        let mut buffers = Buffers {
            requests: Vec::new(),
            batch,
            home: homes(graph),
            pad: vec![0; graph.shapes.len()],
            activation: vec![None; graph.shapes.len()],
            gradient: vec![None; graph.shapes.len()],
            needs_grad: needs_grad(graph, mode, frozen),
            conv: vec![ConvBuffers::default(); nodes],
            pool_indices: vec![None; nodes],
            shapes: graph.shapes.clone(),
        };
        for node in &graph.nodes {
            if let Node::Conv(c) = node {
                let root = buffers.home[c.x.0].0.0;
                buffers.pad[root] = buffers.pad[root].max(c.params.pad);
            }
        }
        for &out in &graph.outputs {
            let (root, _) = buffers.home[out.0];
            assert!(root == out && buffers.pad[out.0] == 0, "an output must have a dense buffer of its own");
        }
        buffers.demand_values(graph, mode);
        for (i, node) in graph.nodes.iter().enumerate() {
            match node {
                Node::Conv(c) => buffers.demand_conv(i, nodes, c, graph, mode, frozen),
                Node::MaxPool { out, .. } if mode == Mode::Train => {
                    let len = max_pool2d::indices_len(batch, buffers.shapes[out.0]);
                    buffers.pool_indices[i] = Some(buffers.request(len, i, 2 * nodes - i));
                }
                _ => {}
            }
        }
        buffers
    }

    fn request(&mut self, len: usize, first: usize, last: usize) -> usize {
        self.requests.push(Request::new(len, first, last));
        self.requests.len() - 1
    }

    /// Activations and their gradients, one of each for every root value.
    fn demand_values(&mut self, graph: &Graph, mode: Mode) {
        let nodes = graph.nodes.len();
        let values = graph.shapes.len();
        // First and last use of each root: activation, gradient.
        let mut forward = vec![(usize::MAX, 0); values];
        let mut backward = vec![(usize::MAX, 0); values];
        let touch = |uses: &mut Vec<(usize, usize)>, root: usize, time: usize| {
            uses[root] = (uses[root].0.min(time), uses[root].1.max(time));
        };
        for (i, node) in graph.nodes.iter().enumerate() {
            let again = 2 * nodes - i;
            let root = |v: Value| self.home[v.0].0.0;
            let (reads, out): (Vec<Value>, Value) = match node {
                Node::Input { out, .. } => (vec![], *out),
                Node::Conv(c) => (std::iter::once(c.x).chain(c.residual).collect(), c.out),
                Node::MaxPool { x, out, .. } | Node::Upsample { x, out, .. } => (vec![*x], *out),
                Node::Concat { .. } | Node::Slice { .. } => continue,
            };
            touch(&mut forward, root(out), i);
            touch(&mut backward, root(out), again);
            for &x in &reads {
                touch(&mut forward, root(x), i);
                touch(&mut backward, root(x), again);
            }
            // The weight gradient reads the input once more.
            if let (Node::Conv(c), Mode::Train) = (node, mode) {
                touch(&mut forward, root(c.x), again);
            }
        }
        for &out in &graph.outputs {
            touch(&mut forward, out.0, nodes);
            touch(&mut backward, out.0, nodes);
        }
        for v in 0..values {
            if self.home[v].0.0 != v {
                continue;
            }
            let [h, w, c] = self.shapes[v];
            let len = View::storage_len(self.batch, h, w, c, self.pad[v]);
            self.activation[v] = Some(self.request(len, forward[v].0, forward[v].1));
            if self.needs_grad[v] && backward[v].0 <= backward[v].1 {
                let len = View::storage_len(self.batch, h, w, c, 0);
                self.gradient[v] = Some(self.request(len, backward[v].0, backward[v].1));
            }
        }
    }

    fn demand_conv(
        &mut self,
        i: usize,
        nodes: usize,
        c: &ConvNode,
        graph: &Graph,
        mode: Mode,
        frozen: &[bool],
    ) {
        let (n, p, again) = (self.batch, c.params, 2 * nodes - i);
        let [h, w, c_out] = graph.shapes[c.out.0];
        let mut b = ConvBuffers { packed: self.request(p.packed_forward_len(), i, i), ..Default::default() };
        let train = mode == Mode::Train;
        if let Some(norm) = c.norm {
            let keep = if train { again } else { i };
            b.stats = Some(self.request(3 * c_out, i, keep));
            if train {
                b.y = Some(self.request(View::storage_len(n, h, w, c_out, 0), i, again));
                if !frozen[norm.weight] {
                    let len = 2 * conv2d::cpu::stats_partials_len(&p, n, h, w);
                    b.partials = Some(self.request(len, i, i));
                }
            }
        }
        if train && self.needs_grad[c.out.0] {
            if c.norm.is_some() {
                let pad = p.gradient_border();
                b.dy = Some(self.request(View::storage_len(n, h, w, c_out, pad), again, again));
                let len = 2 * batch_norm_act::cpu::partials_len(n, h, w, c_out);
                b.partials_backward = Some(self.request(len, again, again));
            }
            b.packed_backward = Some(self.request(p.packed_backward_len(), again, again));
            b.workspace = Some(self.request(p.backward_weight_workspace_len(n, h, w), again, again));
        }
        self.conv[i] = b;
    }

    /// The view of a value's activation.
    pub fn view(&self, v: Value) -> View {
        self.view_in(v, &self.activation, self.pad[self.home[v.0].0.0])
    }

    /// The view of a value's gradient.
    pub fn grad_view(&self, v: Value) -> Option<View> {
        self.gradient[self.home[v.0].0.0]?;
        Some(self.view_in(v, &self.gradient, 0))
    }

    fn view_in(&self, v: Value, requests: &[Option<usize>], pad: usize) -> View {
        let (root, from) = self.home[v.0];
        let [h, w, c] = self.shapes[root.0];
        let request = requests[root.0].expect("a root value has a buffer");
        View::new(self.requests[request].start, self.batch, h, w, c, pad).slice(from, self.shapes[v.0][2])
    }

    /// Kind, shape and gradient of the network's input.
    pub fn input(&self, graph: &Graph) -> (InputKind, [usize; 3], Option<View>) {
        match &graph.nodes[0] {
            Node::Input { out, kind } => (*kind, graph.shapes[out.0], self.grad_view(*out)),
            _ => unreachable!("the first node of a graph is its input"),
        }
    }
}

/// Where each value lives: its root and its first channel there. Parts of a concat live in the concat.
fn homes(graph: &Graph) -> Vec<(Value, usize)> {
    let mut home: Vec<(Value, usize)> = (0..graph.shapes.len()).map(|v| (Value(v), 0)).collect();
    let mut is_part = vec![false; graph.shapes.len()];
    // Later concats first, so that a concat that is itself a part already knows its own home.
    for node in graph.nodes.iter().rev() {
        if let Node::Concat { parts, out } = node {
            let (root, mut from) = home[out.0];
            for part in parts {
                assert!(!is_part[part.0], "a value can be a part of one concat only");
                is_part[part.0] = true;
                home[part.0] = (root, from);
                from += graph.shapes[part.0][2];
            }
        }
    }
    for node in &graph.nodes {
        if let Node::Slice { x, from, out } = node {
            assert!(!is_part[out.0], "a slice cannot be a part of a concat");
            home[out.0] = (home[x.0].0, home[x.0].1 + from);
        }
    }
    home
}

/// True for values whose gradient somebody needs: they depend on a trained parameter or a float input.
fn needs_grad(graph: &Graph, mode: Mode, frozen: &[bool]) -> Vec<bool> {
    let mut needs = vec![false; graph.shapes.len()];
    if mode == Mode::Eval {
        return needs;
    }
    for node in &graph.nodes {
        match node {
            Node::Input { out, kind } => needs[out.0] = *kind == InputKind::Float,
            Node::Conv(c) => {
                let trained = !frozen[c.weight]
                    || c.bias.is_some_and(|b| !frozen[b])
                    || c.norm.is_some_and(|n| !frozen[n.weight] || !frozen[n.bias]);
                needs[c.out.0] = trained || needs[c.x.0] || c.residual.is_some_and(|r| needs[r.0]);
            }
            Node::MaxPool { x, out, .. } | Node::Upsample { x, out, .. } | Node::Slice { x, out, .. } => {
                needs[out.0] = needs[x.0];
            }
            Node::Concat { parts, out } => needs[out.0] = parts.iter().any(|p| needs[p.0]),
        }
    }
    needs
}
