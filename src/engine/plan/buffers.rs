//! Which buffers a plan needs, how large, and from when to when.
//!
//! Time: forward node `i` of `N` runs at `i`, the loss at `N`, backward node `i` at `2 * N - i`.

use super::arena::Request;
use super::target::ConvLayout;
use super::{Mode, Target, View};
use crate::engine::graph::{ConvNode, Graph, InputKind, Node, Value};
use crate::engine::ops::max_pool2d;

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
    /// Scratch of the forward pass.
    pub workspace_forward: Option<usize>,
    /// Packed weights, partial sums and scratch of the backward pass.
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
    /// Bytes of a number of each activation, channels from pixel to pixel of each gradient.
    pub activation_bytes: Vec<usize>,
    gradient_pitch: Vec<usize>,
    /// True for the values that convolutions read as image bytes; they have no activation.
    pub image: Vec<bool>,
    target: Target,
    shapes: Vec<[usize; 3]>,
}

impl Buffers {
    /// Collects the demands of a graph.
    pub fn demand(graph: &Graph, batch: usize, mode: Mode, frozen: &[bool], target: &Target) -> Buffers {
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
            activation_bytes: (0..graph.shapes.len()).map(|v| target.activation_bytes(graph, v)).collect(),
            gradient_pitch: (0..graph.shapes.len())
                .map(|v| target.gradient_pitch(graph, v, graph.shapes[v][2]))
                .collect(),
            image: target.image_values(graph),
            target: target.clone(),
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
            if !self.image[v] {
                let numbers = View::storage_len(self.batch, h, w, c, self.pad[v]);
                let len = words(numbers, self.activation_bytes[v]);
                self.activation[v] = Some(self.request(len, forward[v].0, forward[v].1));
            }
            if self.needs_grad[v] && backward[v].0 <= backward[v].1 {
                let numbers = View::storage_len(self.batch, h, w, self.gradient_pitch[v], 0);
                let len = words(numbers, self.target.bytes());
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
        let (n, again) = (self.batch, 2 * nodes - i);
        let [h, w, c_out] = graph.shapes[c.out.0];
        let sizes = self.target.conv_words(&self.conv_layout(graph, c, mode));
        let mut b = ConvBuffers { packed: self.request(sizes.packed, i, i), ..Default::default() };
        let train = mode == Mode::Train;
        b.workspace_forward = (sizes.workspace > 0).then(|| self.request(sizes.workspace, i, i));
        if let Some(norm) = c.norm {
            let keep = if train { again } else { i };
            b.stats = Some(self.request(3 * c_out, i, keep));
            if train {
                let len = words(View::storage_len(n, h, w, c_out, 0), self.target.bytes());
                b.y = Some(self.request(len, i, again));
                if !frozen[norm.weight] {
                    b.partials = Some(self.request(sizes.partials, i, i));
                }
            }
        }
        if train && self.needs_grad[c.out.0] {
            if c.norm.is_some() {
                let pad = c.params.gradient_border();
                let len = words(View::storage_len(n, h, w, c_out, pad), self.target.bytes());
                b.dy = Some(self.request(len, again, again));
            }
            if sizes.partials_backward > 0 {
                b.partials_backward = Some(self.request(sizes.partials_backward, again, again));
            }
            b.packed_backward = Some(self.request(sizes.packed_backward, again, again));
            b.workspace = Some(self.request(sizes.workspace_backward, again, again));
        }
        self.conv[i] = b;
    }

    /// True for a plan of the processor.
    pub fn is_on_cpu(&self) -> bool {
        self.target == Target::Cpu
    }

    /// What a convolution's scratch depends on.
    fn conv_layout(&self, graph: &Graph, c: &ConvNode, mode: Mode) -> ConvLayout {
        let view = |v: Value, pad: Option<usize>, pitch: Option<usize>| {
            let (root, from) = self.home[v.0];
            let [h, w, all] = self.shapes[root.0];
            let pad = pad.unwrap_or(self.pad[root.0]);
            let from = if self.image[root.0] { 0 } else { from };
            View::new(0, self.batch, h, w, pitch.unwrap_or(all), pad).slice(from, self.shapes[v.0][2])
        };
        let [h, w, channels] = graph.shapes[c.out.0];
        let dense = |pad| View::new(0, self.batch, h, w, channels, pad);
        let is_raw = c.norm.is_some() && mode == Mode::Train;
        let is_image = self.image[self.home[c.x.0].0.0];
        let root = |v: Value| self.home[v.0].0.0;
        ConvLayout {
            params: c.params,
            x: view(c.x, is_image.then_some(0), None),
            out: if is_raw { dense(0) } else { view(c.out, None, None) },
            dy: match c.norm {
                Some(_) => dense(c.params.gradient_border()),
                None => view(c.out, Some(0), Some(self.gradient_pitch[root(c.out)])),
            },
            dx: view(c.x, Some(0), Some(self.gradient_pitch[root(c.x)])),
            is_image,
            has_norm: c.norm.is_some(),
        }
    }

    /// The view of a value's activation. An image has none: the view is that of the input bytes.
    pub fn view(&self, v: Value) -> View {
        let root = self.home[v.0].0;
        let [h, w, c] = self.shapes[root.0];
        if self.image[root.0] {
            return View::new(0, self.batch, h, w, c, 0);
        }
        let request = self.activation[root.0].expect("a root value has a buffer");
        let start = self.requests[request].start * 4 / self.activation_bytes[root.0];
        View::new(start, self.batch, h, w, c, self.pad[root.0]).slice(self.home[v.0].1, self.shapes[v.0][2])
    }

    /// A view of a request that holds numbers of the storage type.
    pub fn stored(&self, request: usize, [n, h, w, c]: [usize; 4], pad: usize) -> View {
        View::new(self.requests[request].start * 4 / self.target.bytes(), n, h, w, c, pad)
    }

    /// The view of a value's gradient.
    pub fn grad_view(&self, v: Value) -> Option<View> {
        let (root, from) = self.home[v.0];
        let request = self.gradient[root.0]?;
        let [h, w, _] = self.shapes[root.0];
        let view = self.stored(request, [self.batch, h, w, self.gradient_pitch[root.0]], 0);
        Some(view.slice(from, self.shapes[v.0][2]))
    }

    /// Kind, shape and gradient of the network's input.
    pub fn input(&self, graph: &Graph) -> (InputKind, [usize; 3], Option<View>) {
        match &graph.nodes[0] {
            Node::Input { out, kind } => (*kind, graph.shapes[out.0], self.grad_view(*out)),
            _ => unreachable!("the first node of a graph is its input"),
        }
    }
}

/// 4-byte words that hold so many numbers of `bytes` bytes.
fn words(numbers: usize, bytes: usize) -> usize {
    (numbers * bytes).div_ceil(4)
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
