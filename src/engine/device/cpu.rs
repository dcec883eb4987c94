//! The CPU executor: runs the steps of a plan over one arena on a pool of threads of its own.
//!
//! The arena is allocated once, for the largest of the plans it will run; stepping allocates nothing.
//! Results have the same bits for any number of threads.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::arena::Arena;
use crate::engine::activation::Activation;
use crate::engine::error::EngineError;
use crate::engine::graph::{ConvNode, Graph, InputKind, Node, Value};
use crate::engine::ops::batch_norm_act::{self, Norm};
use crate::engine::ops::max_pool2d::cpu::Window;
use crate::engine::ops::{border, conv2d, image_input, max_pool2d, upsample_nearest};
use crate::engine::params::ParamSet;
use crate::engine::plan::{ConvBackwardStep, ConvStep, Plan, PoolStep, Span, Step};
use crate::engine::tensor::{Dst, Src, View};
use conv2d::cpu::Epilogue;

/// Time spent by kind of work since the last [`Executor::take_profile`].
#[derive(Clone, Debug, Default)]
pub struct Profile {
    /// (what, time, calls), in a fixed order.
    pub rows: Vec<(&'static str, Duration, u64)>,
}

impl Profile {
    const KINDS: [&'static str; 8] = [
        "input",
        "conv forward",
        "norm+act forward",
        "norm+act backward",
        "conv backward data",
        "conv backward weight",
        "pool, upsample, borders",
        "packing",
    ];

    fn new() -> Profile {
        Profile { rows: Self::KINDS.iter().map(|&k| (k, Duration::ZERO, 0)).collect() }
    }

    fn add(&mut self, kind: usize, since: Instant) -> Instant {
        let now = Instant::now();
        self.rows[kind].1 += now - since;
        self.rows[kind].2 += 1;
        now
    }
}

/// Runs plans on the CPU.
pub struct Executor {
    arena: Arena,
    input: Vec<u8>,
    input_floats: Vec<f32>,
    pool: Arc<rayon::ThreadPool>,
    profile: Profile,
}

impl Executor {
    /// An executor with memory for the largest of `plans`, computing on `threads` threads (0: all cores).
    ///
    /// # Errors
    /// Memory or threads refused by the system.
    pub fn new(plans: &[&Plan], threads: usize) -> Result<Executor, EngineError> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("compute-{i}"))
            .build()
            .map_err(|source| EngineError::Threads { threads, source })?;
        let mut executor = Executor {
            arena: Arena::new(0)?,
            input: Vec::new(),
            input_floats: Vec::new(),
            pool: Arc::new(pool),
            profile: Profile::new(),
        };
        for plan in plans {
            executor.reserve(plan)?;
        }
        Ok(executor)
    }

    /// Grows the memory so that `plan` fits. Contents are lost.
    ///
    /// # Errors
    /// Memory refused by the system.
    pub fn reserve(&mut self, plan: &Plan) -> Result<(), EngineError> {
        if plan.arena_floats > self.arena.len() {
            self.arena = Arena::new(0)?; // give back first: the two never need to exist together
            self.arena = Arena::new(plan.arena_floats)?;
        }
        let [h, w, c] = plan.input_shape;
        let numbers = plan.batch * h * w * c;
        match plan.input_kind {
            InputKind::ImageU8 if self.input.len() < numbers => self.input.resize(numbers, 0),
            InputKind::Float if self.input_floats.len() < numbers => self.input_floats.resize(numbers, 0.0),
            _ => {}
        }
        Ok(())
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// The compute threads: losses and optimisers run on them too.
    pub fn pool(&self) -> Arc<rayon::ThreadPool> {
        Arc::clone(&self.pool)
    }

    /// Runs `work` on the compute threads.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }

    /// The batch to fill before [`Executor::forward`]: RGB, `[n, h, w, 3]`.
    pub fn input_mut(&mut self, plan: &Plan) -> &mut [u8] {
        let [h, w, c] = plan.input_shape;
        &mut self.input[..plan.batch * h * w * c]
    }

    /// The input of a float graph, `[n, h, w, c]`.
    pub fn input_floats_mut(&mut self, plan: &Plan) -> &mut [f32] {
        let [h, w, c] = plan.input_shape;
        &mut self.input_floats[..plan.batch * h * w * c]
    }

    /// Output `i`, dense `[n, h, w, c]`. Valid after [`Executor::forward`] until the next pass.
    pub fn output(&self, plan: &Plan, i: usize) -> &[f32] {
        let v = plan.outputs[i].view;
        &self.arena.floats()[v.offset..v.offset + v.len()]
    }

    /// Outputs and, to be written before [`Executor::backward`], their gradients: `(output, gradient)` each,
    /// dense `[n, h, w, c]`. The plan must be one for training.
    pub fn outputs_and_grads<'a>(&'a mut self, plan: &Plan) -> Vec<(&'a [f32], &'a mut [f32])> {
        let base = self.arena.base();
        let pairs = plan.outputs.iter().map(|o| {
            let grad = o.grad.expect("a plan for training has gradients of its outputs");
            // SAFETY: outputs and their gradients are all alive when the loss runs, so the plan gives each a
            // place of its own; the borrow of `self` lasts as long as the slices.
            unsafe {
                (
                    std::slice::from_raw_parts(base.add(o.view.offset), o.view.len()),
                    std::slice::from_raw_parts_mut(base.add(grad.offset), grad.len()),
                )
            }
        });
        pairs.collect()
    }

    /// Gradient of output `i`, to be written before [`Executor::backward`].
    pub fn output_grad_mut(&mut self, plan: &Plan, i: usize) -> &mut [f32] {
        let v = plan.outputs[i].grad.expect("a plan for training has gradients of its outputs");
        &mut self.arena.floats_mut()[v.offset..v.offset + v.len()]
    }

    /// A copy of a value, dense `[n, h, w, c]`: for tests and reports. Meaningful only while the plan keeps
    /// the value (a training plan keeps convolution inputs until their backward step).
    pub fn read(&self, plan: &Plan, value: Value) -> Vec<f32> {
        self.read_view(plan.view(value))
    }

    /// The gradient of a float input after [`Executor::backward`].
    pub fn input_grad(&self, plan: &Plan) -> Option<Vec<f32>> {
        plan.input_grad.map(|v| self.read_view(v))
    }

    fn read_view(&self, v: View) -> Vec<f32> {
        let mut out = Vec::with_capacity(v.len());
        for pixel in 0..v.n * v.h * v.w {
            let (n, y, x) = (pixel / (v.h * v.w), pixel / v.w % v.h, pixel % v.w);
            let at = v.at(n, y as isize, x as isize);
            out.extend_from_slice(&self.arena.floats()[at..at + v.c]);
        }
        out
    }

    /// Time by kind of work since the last call; resets it.
    pub fn take_profile(&mut self) -> Profile {
        std::mem::replace(&mut self.profile, Profile::new())
    }

    /// Runs the network on the input. In training mode also updates the running statistics.
    pub fn forward(&mut self, graph: &Graph, plan: &Plan, params: &mut ParamSet) {
        let mut run = Run::new(&mut self.arena, &self.input, &self.input_floats, graph, plan, params);
        let mut profile = std::mem::take(&mut self.profile);
        self.pool.install(|| {
            for step in &plan.forward {
                run.step(step, &mut profile);
            }
        });
        self.profile = profile;
    }

    /// Propagates the gradients of the outputs back; adds to `params.grads`.
    pub fn backward(&mut self, graph: &Graph, plan: &Plan, params: &mut ParamSet) {
        let mut run = Run::new(&mut self.arena, &self.input, &self.input_floats, graph, plan, params);
        let mut profile = std::mem::take(&mut self.profile);
        self.pool.install(|| {
            for step in &plan.backward {
                run.step(step, &mut profile);
            }
        });
        self.profile = profile;
    }
}

/// One pass: what the steps need.
struct Run<'a> {
    base: *mut f32,
    input: &'a [u8],
    input_floats: &'a [f32],
    graph: &'a Graph,
    plan: &'a Plan,
    params: &'a mut ParamSet,
}

// SAFETY: `base` is the arena, which the executor lends to one pass at a time; steps run one after another.
unsafe impl Send for Run<'_> {}

impl<'a> Run<'a> {
    fn new(
        arena: &'a mut Arena,
        input: &'a [u8],
        input_floats: &'a [f32],
        graph: &'a Graph,
        plan: &'a Plan,
        params: &'a mut ParamSet,
    ) -> Run<'a> {
        assert!(plan.arena_floats <= arena.len(), "reserve the plan before running it");
        assert_eq!(params.infos.len(), graph.params.len(), "parameters of another network");
        let [h, w, c] = plan.input_shape;
        let numbers = plan.batch * h * w * c;
        let (input, input_floats) = match plan.input_kind {
            InputKind::ImageU8 => (&input[..numbers], &input_floats[..0]),
            InputKind::Float => (&input[..0], &input_floats[..numbers]),
        };
        Run { base: arena.base(), input, input_floats, graph, plan, params }
    }

    // The three helpers below share one argument: the plan gives every buffer that is alive during a step a
    // place of its own inside the arena, so what a step reads and what it writes never overlap, and the
    // arena outlives the pass.

    fn src(&self, view: View) -> Src<'a> {
        // SAFETY: as above.
        unsafe { Src::new(self.base, view) }
    }

    fn dst(&self, view: View) -> Dst<'a> {
        // SAFETY: as above.
        unsafe { Dst::new(self.base, view) }
    }

    fn span<T: bytemuck::Pod>(&self, span: Span) -> &'a mut [T] {
        let bytes = span.len * 4;
        // SAFETY: as above; spans start at a cache line, so `T` is aligned, and any bits are a `T`.
        unsafe {
            let start = self.base.add(span.start).cast::<T>();
            std::slice::from_raw_parts_mut(start, bytes / std::mem::size_of::<T>())
        }
    }

    fn step(&mut self, step: &Step, profile: &mut Profile) {
        let start = Instant::now();
        match step {
            Step::Input { dst } => {
                match self.plan.input_kind {
                    InputKind::ImageU8 => image_input::cpu::forward_u8(self.input, self.dst(*dst)),
                    InputKind::Float => image_input::cpu::forward_f32(self.input_floats, self.dst(*dst)),
                }
                profile.add(0, start);
            }
            Step::Conv(s) => self.conv(s, profile),
            Step::ConvBackward(s) => self.conv_backward(s, profile),
            other => {
                self.small(other);
                profile.add(6, start);
            }
        }
    }

    fn small(&self, step: &Step) {
        match step {
            Step::MaxPool(p) => {
                let indices = p.indices.map(|s| &mut self.span::<u8>(s)[..p.z.len()]);
                max_pool2d::cpu::forward(self.src(p.x), self.dst(p.z), window(p), indices);
            }
            Step::MaxPoolBackward { pool: p, accumulate } => {
                let span = p.indices.expect("kept by the forward step when training");
                let indices = &self.span::<u8>(span)[..p.z.len()];
                max_pool2d::cpu::backward(self.src(p.z), indices, self.dst(p.x), window(p), *accumulate);
            }
            Step::Upsample { x, z, factor } => {
                upsample_nearest::cpu::forward(self.src(*x), self.dst(*z), *factor);
            }
            Step::UpsampleBackward { dz, dx, factor, accumulate } => {
                upsample_nearest::cpu::backward(self.src(*dz), self.dst(*dx), *factor, *accumulate);
            }
            Step::ZeroBorder(view) => border::zero(self.dst(*view)),
            Step::Zero(view) => border::zero_inside(self.dst(*view)),
            Step::Input { .. } | Step::Conv(_) | Step::ConvBackward(_) => unreachable!("handled by `step`"),
        }
    }

    fn node(&self, index: usize) -> &'a ConvNode {
        match &self.graph.nodes[index] {
            Node::Conv(c) => c,
            other => unreachable!("step {index} belongs to {other:?}"),
        }
    }

    fn conv(&mut self, s: &ConvStep, profile: &mut Profile) {
        let start = Instant::now();
        let (node, x, z) = (self.node(s.node), self.src(s.x), self.dst(s.z));
        let p = node.params;
        let packed = &mut self.span::<f32>(s.packed)[..p.packed_forward_len()];
        conv2d::cpu::pack_forward(&p, self.params.numbers(node.weight), packed);
        let start = profile.add(7, start);
        let residual = s.residual.map(|r| self.src(r));
        let Some(norm) = node.norm else {
            let bias = self.params.numbers(node.bias.expect("a bias where there is no normalisation"));
            conv2d::cpu::forward(&p, x, packed, z, Epilogue::Bias { bias });
            profile.add(1, start);
            return;
        };
        let c = p.c_out;
        let stats = self.span::<f32>(s.stats.expect("kept for every normalisation"));
        let (first, rest) = stats.split_at_mut(c);
        let (second, third) = rest.split_at_mut(c);
        let eps = self.graph.norm.eps;
        let Some(y) = s.y else {
            // Evaluation: the normalisation is a scale and a shift, folded into the convolution.
            batch_norm_act::fold(
                self.params.numbers(norm.weight),
                self.params.numbers(norm.bias),
                self.params.numbers(norm.running_mean),
                self.params.numbers(norm.running_var),
                eps,
                first,
                second,
            );
            let activation = node.activation;
            let epilogue = Epilogue::Apply { scale: first, shift: second, activation, residual };
            conv2d::cpu::forward(&p, x, packed, z, epilogue);
            profile.add(1, start);
            return;
        };
        let y_dst = self.dst(y);
        if let Some(partials) = s.partials {
            let len = conv2d::cpu::stats_partials_len(&p, y.n, y.h, y.w);
            let partials = &mut self.span::<f64>(partials)[..len];
            conv2d::cpu::forward(&p, x, packed, y_dst, Epilogue::Stats { partials });
            let var = &mut third[..c];
            conv2d::cpu::finish_stats(&p, y.n, y.h, y.w, partials, first, var);
            let momentum = self.graph.norm.momentum;
            let count = y.n * y.h * y.w;
            let (mean_at, var_at) = (norm.running_mean, norm.running_var);
            batch_norm_act::update_running(self.params.numbers_mut(mean_at), first, momentum, 1.0);
            let unbiased = count as f32 / (count.max(2) - 1) as f32;
            batch_norm_act::update_running(self.params.numbers_mut(var_at), var, momentum, unbiased);
            batch_norm_act::inverse_deviation(var, eps, second);
        } else {
            conv2d::cpu::forward(&p, x, packed, y_dst, Epilogue::Raw);
            first.copy_from_slice(self.params.numbers(norm.running_mean));
            batch_norm_act::inverse_deviation(self.params.numbers(norm.running_var), eps, second);
        }
        let start = profile.add(1, start);
        let norm = self.norm(node, first, second);
        batch_norm_act::cpu::forward(y_dst.as_src(), &norm, residual, z);
        profile.add(2, start);
    }

    fn norm<'b>(&'b self, node: &ConvNode, mean: &'b [f32], inverse_deviation: &'b [f32]) -> Norm<'b> {
        let norm = node.norm.expect("only called with a normalisation");
        Norm {
            mean,
            inverse_deviation,
            weight: self.params.numbers(norm.weight),
            bias: self.params.numbers(norm.bias),
            activation: node.activation,
        }
    }

    fn conv_backward(&mut self, s: &ConvBackwardStep, profile: &mut Profile) {
        let start = Instant::now();
        let node = self.node(s.node);
        let p = node.params;
        let dy = match s.dy {
            Some(dy) => {
                self.norm_backward(node, s, dy);
                dy
            }
            None => {
                assert_eq!(node.activation, Activation::Identity, "a plain convolution has no activation");
                s.dz
            }
        };
        let start = profile.add(3, start);
        let dy = self.src(dy);
        if !s.frozen_weight {
            if let Some(bias) = node.bias {
                let range = self.params.infos[bias].range.clone();
                conv2d::cpu::backward_bias(&p, dy, &mut self.params.grads[range]);
            }
            let range = self.params.infos[node.weight].range.clone();
            let workspace = self.span::<f32>(s.workspace);
            conv2d::cpu::backward_weight(&p, self.src(s.x), dy, &mut self.params.grads[range], workspace);
        }
        let start = profile.add(5, start);
        if let Some((dx, accumulate)) = s.dx {
            let packed = &mut self.span::<f32>(s.packed)[..p.packed_backward_len()];
            conv2d::cpu::pack_backward(&p, self.params.numbers(node.weight), packed);
            let start = profile.add(7, start);
            conv2d::cpu::backward_data(&p, dy, packed, self.dst(dx), accumulate);
            profile.add(4, start);
        }
    }

    fn norm_backward(&mut self, node: &ConvNode, s: &ConvBackwardStep, dy: View) {
        let y = self.src(s.y.expect("kept for every normalisation"));
        let (dz, dy) = (self.src(s.dz), self.dst(dy));
        let stats = self.span::<f32>(s.stats.expect("kept for every normalisation"));
        let c = node.params.c_out;
        let (mean, rest) = stats.split_at(c);
        let inverse = &rest[..c];
        let v = y.view;
        let len = batch_norm_act::cpu::partials_len(v.n, v.h, v.w, v.c);
        let partials = &mut self.span::<f64>(s.partials.expect("kept for every normalisation"))[..len];
        let norm = self.norm(node, mean, inverse);
        let residual = s.residual_grad.map(|(view, accumulate)| (self.dst(view), accumulate));
        batch_norm_act::cpu::backward(y, dz, &norm, !s.frozen_norm, partials, dy, residual);
        if !s.frozen_norm {
            let ids = node.norm.expect("only called with a normalisation");
            let (weight, bias) =
                (self.params.infos[ids.weight].range.clone(), self.params.infos[ids.bias].range.clone());
            let sums = &partials[..2 * c];
            batch_norm_act::cpu::add_sums(&sums[..c], &mut self.params.grads[bias]);
            batch_norm_act::cpu::add_sums(&sums[c..], &mut self.params.grads[weight]);
        }
        if dy.view.pad > 0 {
            border::zero(dy);
        }
    }
}

fn window(p: &PoolStep) -> Window {
    Window { kernel: p.kernel, stride: p.stride, pad: p.pad }
}
