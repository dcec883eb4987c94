//! Runs the steps of a plan on a GPU: one arena, one stream, kernels in the plan's order.
//!
//! Nothing here waits for the GPU or allocates while stepping, so that a whole step can be captured and replayed.

use std::sync::Arc;

use super::{Buffer, Device, DeviceError, Launch, Precision, Stream, Tensor};
use crate::engine::activation::Activation;
use crate::engine::graph::{ConvNode, Graph, InputKind, Node, Value};
use crate::engine::ops::batch_norm_act::cuda::{BatchNormActKernels, FinishStats, NormPointers, Running};
use crate::engine::ops::border::cuda::BorderKernels;
use crate::engine::ops::conv2d::cuda::{Conv2dKernels, Epilogue, Tuning};
use crate::engine::ops::image_input::cuda::ImageInputKernels;
use crate::engine::ops::max_pool2d::cpu::Window;
use crate::engine::ops::max_pool2d::cuda::MaxPool2dKernels;
use crate::engine::ops::upsample_nearest::cuda::UpsampleNearestKernels;
use crate::engine::params::ParamSet;
use crate::engine::plan::{ConvBackwardStep, ConvStep, Plan, PoolStep, Span, Step, Target, stats_words};
use crate::engine::tensor::View;

/// The numbers of a network on the device, in the places of [`ParamSet`].
pub struct DeviceParams {
    /// Trainable numbers, `f32`.
    pub values: Buffer,
    /// Their gradients, `f32`.
    pub grads: Buffer,
    /// Running statistics, `f32`.
    pub buffers: Buffer,
    /// The values in the storage type, as kernels read them; none where that is `f32`.
    cast: Option<Buffer>,
    count: usize,
    /// Start of each parameter, by its index in the graph.
    starts: Vec<usize>,
}

impl DeviceParams {
    /// Memory for the numbers of `params`, and a copy of them.
    ///
    /// # Errors
    /// Memory refused.
    pub fn new(
        stream: &Stream,
        params: &ParamSet,
        precision: Precision,
    ) -> Result<DeviceParams, DeviceError> {
        let device = stream.device();
        let count = params.values.len();
        let cast = (precision != Precision::F32).then(|| device.allocate(count * 2)).transpose()?;
        let made = DeviceParams {
            values: device.allocate(count * 4)?,
            grads: device.allocate(count * 4)?,
            buffers: device.allocate(params.buffers.len() * 4)?,
            cast,
            count,
            starts: params.infos.iter().map(|p| p.range.start).collect(),
        };
        made.upload(stream, params)?;
        Ok(made)
    }

    /// Bytes on the device for so many trainable numbers and running statistics.
    pub fn bytes(values: usize, buffers: usize, precision: Precision) -> usize {
        let cast = if precision == Precision::F32 { 0 } else { 2 };
        values * (8 + cast) + buffers * 4
    }

    /// Copies everything to the device.
    ///
    /// # Errors
    /// The device failed.
    pub fn upload(&self, stream: &Stream, params: &ParamSet) -> Result<(), DeviceError> {
        stream.upload(&self.values, 0, &params.values)?;
        stream.upload(&self.grads, 0, &params.grads)?;
        stream.upload(&self.buffers, 0, &params.buffers)
    }

    /// Copies everything back.
    ///
    /// # Errors
    /// The device failed.
    pub fn download(&self, stream: &Stream, params: &mut ParamSet) -> Result<(), DeviceError> {
        stream.download(&self.values, 0, &mut params.values)?;
        stream.download(&self.grads, 0, &mut params.grads)?;
        stream.download(&self.buffers, 0, &mut params.buffers)
    }
}

/// Arguments of `cast_<type>`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct CastArgs {
    values: u64,
    out: u64,
    count: u64,
}

/// Kernels of all operations.
struct Kernels {
    cast: Option<super::Kernel>,
    conv2d: Conv2dKernels,
    batch_norm_act: BatchNormActKernels,
    border: BorderKernels,
    image_input: ImageInputKernels,
    max_pool2d: MaxPool2dKernels,
    upsample: UpsampleNearestKernels,
}

/// Runs plans on a GPU.
pub struct Executor {
    device: Arc<Device>,
    stream: Stream,
    precision: Precision,
    kernels: Kernels,
    arena: Buffer,
    input: Buffer,
}

/// Files of the kernels that an executor loads for a chip.
pub fn stems(device: &Device, precision: Precision) -> Vec<&'static str> {
    let mut stems = vec![
        "cast",
        "batch_norm_act",
        "batch_norm_act_finish",
        "border",
        "image_input",
        "max_pool2d",
        "upsample_nearest",
    ];
    stems.extend(Conv2dKernels::stems(precision, device.chip()));
    stems
}

impl Executor {
    /// An executor without memory yet; see [`Executor::reserve`].
    ///
    /// # Errors
    /// Kernels do not compile or load.
    pub fn new(device: &Arc<Device>, precision: Precision) -> Result<Executor, DeviceError> {
        let cast = match precision {
            Precision::F32 => None,
            _ => Some(device.module("cast")?.kernel(&format!("cast_{}", precision.suffix()))?),
        };
        let kernels = Kernels {
            cast,
            conv2d: Conv2dKernels::load(device, precision)?,
            batch_norm_act: BatchNormActKernels::load(device, precision)?,
            border: BorderKernels::load(device, precision)?,
            image_input: ImageInputKernels::load(device, precision)?,
            max_pool2d: MaxPool2dKernels::load(device, precision)?,
            upsample: UpsampleNearestKernels::load(device, precision)?,
        };
        Ok(Executor {
            stream: device.stream()?,
            precision,
            kernels,
            arena: device.allocate(0)?,
            input: device.allocate(0)?,
            device: Arc::clone(device),
        })
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The queue on which everything runs.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Storage of activations.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// For [`Plan::for_target`].
    pub fn target(&self) -> Target {
        let (chip, tuning) = (self.device.chip().clone(), Arc::clone(self.kernels.conv2d.tuning()));
        Target::Cuda { precision: self.precision, chip, tuning }
    }

    /// From now on convolutions are cut as `tuning` says. Plans made before are for another target.
    pub fn set_tuning(&mut self, tuning: Arc<Tuning>) {
        self.kernels.conv2d.set_tuning(tuning);
    }

    /// Grows the memory so that `plan` fits; true when it moved, which makes captured graphs worthless.
    /// Contents are lost then.
    ///
    /// # Errors
    /// Memory refused; what was held before is given back in that case.
    pub fn reserve(&mut self, plan: &Plan) -> Result<bool, DeviceError> {
        let mut moved = false;
        for (held, needed) in
            [(&mut self.arena, plan.arena_floats * 4), (&mut self.input, plan.bytes().input)]
        {
            if held.bytes() < needed {
                self.stream.synchronize()?;
                *held = self.device.allocate(0)?; // give back first: the two never need to exist together
                *held = self.device.allocate(needed)?;
                moved = true;
            }
        }
        Ok(moved)
    }

    /// Bytes held for activations and the input.
    pub fn bytes(&self) -> usize {
        self.arena.bytes() + self.input.bytes()
    }

    /// The batch, `[n, h, w, 3]` bytes RGB; fill it before [`Executor::forward`].
    pub fn input(&self) -> &Buffer {
        &self.input
    }

    /// Copies a batch of RGB bytes to the device and waits.
    ///
    /// # Errors
    /// The device failed.
    pub fn upload_images(&self, plan: &Plan, images: &[u8]) -> Result<(), DeviceError> {
        assert_eq!(images.len(), plan.bytes().input, "a batch of the plan's shape");
        self.stream.upload(&self.input, 0, images)
    }

    /// Copies the input of a float graph to the device and waits.
    ///
    /// # Errors
    /// The device failed.
    pub fn upload_floats(&self, plan: &Plan, numbers: &[f32]) -> Result<(), DeviceError> {
        assert_eq!(numbers.len() * 4, plan.bytes().input, "a batch of the plan's shape");
        self.stream.upload(&self.input, 0, numbers)
    }

    /// Output `i`, and its gradient when training. Outputs of plain convolutions are `f32`.
    pub fn output(&self, plan: &Plan, i: usize) -> (Tensor, Option<Tensor>) {
        let run = Run { executor: self, plan };
        let out = plan.outputs[i];
        (run.tensor_of(out.view, out.bytes), out.grad.map(|g| run.tensor(g)))
    }

    /// A copy of output `i`, dense `[n, h, w, c]`; waits.
    ///
    /// # Errors
    /// The device failed.
    pub fn download_output(&self, plan: &Plan, i: usize, to: &mut [f32]) -> Result<(), DeviceError> {
        let out = plan.outputs[i];
        assert!(out.bytes == 4 && out.view.is_dense(), "an output in f32");
        self.stream.download(&self.arena, out.view.offset * 4, to)
    }

    /// Sets the gradient of output `i` from dense numbers; for tests.
    ///
    /// # Errors
    /// The device failed.
    pub fn upload_output_grad(&self, plan: &Plan, i: usize, numbers: &[f32]) -> Result<(), DeviceError> {
        let view = plan.outputs[i].grad.expect("a plan for training has gradients of its outputs");
        let mut row = vec![0.0; view.pixel_pitch];
        for (pixel, from) in numbers.chunks_exact(view.c).enumerate() {
            row[..view.c].copy_from_slice(from);
            let at = (view.offset + pixel * view.pixel_pitch) * self.precision.bytes();
            match self.precision {
                Precision::F32 => self.stream.upload(&self.arena, at, &row)?,
                Precision::Bf16 => {
                    let row: Vec<half::bf16> = row.iter().map(|v| half::bf16::from_f32(*v)).collect();
                    self.stream.upload(&self.arena, at, &row)?;
                }
                Precision::F16 => {
                    let row: Vec<half::f16> = row.iter().map(|v| half::f16::from_f32(*v)).collect();
                    self.stream.upload(&self.arena, at, &row)?;
                }
            }
        }
        Ok(())
    }

    /// A copy of a value, dense `[n, h, w, c]`, while the plan keeps it; waits. For tests and reports.
    ///
    /// # Errors
    /// The device failed.
    pub fn read(&self, plan: &Plan, value: Value) -> Result<Vec<f32>, DeviceError> {
        let is_f32 = plan.outputs.iter().any(|o| o.view == plan.view(value) && o.bytes == 4);
        self.read_view(plan.view(value), if is_f32 { Precision::F32 } else { self.precision })
    }

    /// The gradient of a float input after [`Executor::backward`].
    ///
    /// # Errors
    /// The device failed.
    pub fn input_grad(&self, plan: &Plan) -> Result<Option<Vec<f32>>, DeviceError> {
        plan.input_grad.map(|v| self.read_view(v, self.precision)).transpose()
    }

    fn read_view(&self, v: View, precision: Precision) -> Result<Vec<f32>, DeviceError> {
        let mut bytes = vec![0u8; self.arena.bytes()];
        self.stream.download(&self.arena, 0, &mut bytes)?;
        let number = |i: usize| match precision {
            Precision::F32 => bytemuck::pod_read_unaligned::<f32>(&bytes[i * 4..i * 4 + 4]),
            Precision::Bf16 => bytemuck::pod_read_unaligned::<half::bf16>(&bytes[i * 2..i * 2 + 2]).to_f32(),
            Precision::F16 => bytemuck::pod_read_unaligned::<half::f16>(&bytes[i * 2..i * 2 + 2]).to_f32(),
        };
        let mut out = Vec::with_capacity(v.len());
        for pixel in 0..v.n * v.h * v.w {
            let (n, y, x) = (pixel / (v.h * v.w), pixel / v.w % v.h, pixel % v.w);
            let at = v.at(n, y as isize, x as isize);
            out.extend((at..at + v.c).map(number));
        }
        Ok(out)
    }

    /// Queues the forward pass. In training mode it also updates the running statistics.
    ///
    /// # Errors
    /// The driver refuses a launch.
    pub fn forward(&self, graph: &Graph, plan: &Plan, params: &DeviceParams) -> Result<(), DeviceError> {
        let run = self.run(plan);
        if let (Some(kernel), Some(cast)) = (&self.kernels.cast, &params.cast) {
            let args =
                CastArgs { values: params.values.pointer(), out: cast.pointer(), count: params.count as u64 };
            // SAFETY: both buffers hold `count` numbers, a multiple of 16, and live as long as `params`, which the
            // owner of this executor keeps until the stream is done.
            unsafe { self.stream.launch(kernel, Launch::cover(args.count / 8, 256), &args) }?;
        }
        plan.forward.iter().enumerate().try_for_each(|(i, step)| {
            self.stream.set_part(i as u32);
            run.step(graph, params, step)
        })?;
        self.stream.set_part(u32::MAX);
        Ok(())
    }

    /// Queues the backward pass; adds to the gradients of `params`.
    ///
    /// # Errors
    /// The driver refuses a launch.
    pub fn backward(&self, graph: &Graph, plan: &Plan, params: &DeviceParams) -> Result<(), DeviceError> {
        let run = self.run(plan);
        let first = plan.forward.len();
        plan.backward.iter().enumerate().try_for_each(|(i, step)| {
            self.stream.set_part((first + i) as u32);
            run.step(graph, params, step)
        })?;
        self.stream.set_part(u32::MAX);
        Ok(())
    }

    fn run<'a>(&'a self, plan: &'a Plan) -> Run<'a> {
        assert_eq!(*plan.target(), self.target(), "a plan for another device");
        assert!(plan.arena_floats * 4 <= self.arena.bytes(), "reserve the plan before running it");
        assert!(plan.bytes().input <= self.input.bytes(), "reserve the plan before running it");
        Run { executor: self, plan }
    }
}

/// One pass.
///
/// All `unsafe` below shares one argument: the plan gives every buffer that is alive during a step a place of its
/// own inside the arena, steps run in stream order, and arena, input and parameters outlive the queued work because
/// their owner waits for the stream before it drops or moves them.
struct Run<'a> {
    executor: &'a Executor,
    plan: &'a Plan,
}

impl Run<'_> {
    fn tensor(&self, view: View) -> Tensor {
        self.tensor_of(view, self.executor.precision.bytes())
    }

    fn tensor_of(&self, view: View, bytes: usize) -> Tensor {
        // SAFETY: inside the arena, see `Run`.
        unsafe { Tensor::new(self.executor.arena.pointer(), bytes, &view) }
    }

    fn image(&self, view: View) -> Tensor {
        // SAFETY: the input buffer holds the whole batch, see `Run`.
        unsafe { Tensor::new(self.executor.input.pointer(), 1, &view) }
    }

    fn span(&self, span: Option<Span>) -> u64 {
        span.map_or(0, |s| self.executor.arena.pointer() + s.start as u64 * 4)
    }

    fn step(&self, graph: &Graph, params: &DeviceParams, step: &Step) -> Result<(), DeviceError> {
        let (k, stream) = (&self.executor.kernels, &self.executor.stream);
        let t = |v: &View| self.tensor(*v);
        // SAFETY: see `Run`.
        unsafe {
            match step {
                Step::Input { dst } => match self.plan.input_kind {
                    InputKind::ImageU8 => {
                        k.image_input.forward_u8(stream, self.executor.input.pointer(), t(dst))
                    }
                    InputKind::Float => {
                        k.image_input.forward_f32(stream, self.executor.input.pointer(), t(dst))
                    }
                },
                Step::Conv(s) => self.conv(graph, params, s),
                Step::ConvBackward(s) => self.conv_backward(graph, params, s),
                Step::MaxPool(p) => {
                    let indices = p.indices.map(|s| self.span(Some(s)));
                    k.max_pool2d.forward(stream, t(&p.x), t(&p.z), window(p), indices)
                }
                Step::MaxPoolBackward { pool: p, accumulate } => {
                    let indices = self.span(p.indices);
                    k.max_pool2d.backward(stream, t(&p.z), indices, t(&p.x), window(p), *accumulate)
                }
                Step::Upsample { x, z, factor } => k.upsample.forward(stream, t(x), t(z), *factor),
                Step::UpsampleBackward { dz, dx, factor, accumulate } => {
                    k.upsample.backward(stream, t(dz), t(dx), *factor, *accumulate)
                }
                Step::ZeroBorder(view) => k.border.zero(stream, t(view)),
                Step::Zero(view) => k.border.zero_inside(stream, t(view)),
            }
        }
    }

    fn conv(&self, graph: &Graph, params: &DeviceParams, s: &ConvStep) -> Result<(), DeviceError> {
        let (k, stream) = (&self.executor.kernels, &self.executor.stream);
        let node = node(graph, s.node);
        let p = &node.params;
        let residual = s.residual.map(|r| self.tensor(r));
        let at = Places(params);
        let convolve = |out: Tensor, epilogue: Epilogue| {
            let workspace = self.span(s.workspace);
            // SAFETY: see `Run`.
            unsafe {
                if s.reads_image {
                    let weight = at.master(node.weight);
                    k.conv2d.forward_image(stream, p, self.image(s.x), weight, out, epilogue)
                } else {
                    k.conv2d.forward(
                        stream,
                        p,
                        self.tensor(s.x),
                        at.weight(node.weight),
                        out,
                        epilogue,
                        workspace,
                    )
                }
            }
        };
        let Some(norm) = node.norm else {
            let bias = at.master(node.bias.expect("a bias where there is no normalisation"));
            return convolve(self.tensor_of(s.z, 4), Epilogue::Bias { bias });
        };
        let z = self.tensor(s.z);
        let stats = self.span(s.stats);
        let running = Running { mean: at.buffer(norm.running_mean), variance: at.buffer(norm.running_var) };
        let (weight, bias, activation) = (at.master(norm.weight), at.master(norm.bias), node.activation);
        let (eps, momentum) = (graph.norm.eps, graph.norm.momentum);
        let (bn, channels) = (&k.batch_norm_act, p.c_out);
        let Some(y) = s.y else {
            let (scale, shift) = (stats, stats + 4 * channels as u64);
            // SAFETY: see `Run`.
            unsafe { bn.fold(stream, channels, [weight, bias], running, eps, [scale, shift]) }?;
            return convolve(z, Epilogue::Apply { scale, shift, activation, residual });
        };
        let y = self.tensor(y);
        if let Some(partials) = s.partials {
            let layout =
                self.plan.target().stats_layout(p, &s.x, &s.y.expect("checked above"), s.reads_image);
            let (rows_per_partial, pixels) = (layout.pixels_per_partial, y.pixels() as usize);
            let partials = self.span(Some(partials));
            convolve(y, Epilogue::Stats { partials })?;
            let scratch = partials + 4 * stats_words(&layout, p) as u64;
            let finish = FinishStats {
                partials,
                rows_per_partial,
                pixels,
                channels,
                stats,
                running,
                momentum,
                eps,
                scratch,
            };
            // SAFETY: see `Run`.
            unsafe { bn.finish_stats(stream, &finish) }?;
        } else {
            convolve(y, Epilogue::Raw)?;
            // SAFETY: see `Run`.
            unsafe { bn.running_stats(stream, channels, running, eps, stats) }?;
        }
        let norm = NormPointers { stats, weight, bias, activation };
        // SAFETY: see `Run`.
        unsafe { bn.forward(stream, y, &norm, residual, z) }
    }

    fn conv_backward(
        &self,
        graph: &Graph,
        params: &DeviceParams,
        s: &ConvBackwardStep,
    ) -> Result<(), DeviceError> {
        let (k, stream) = (&self.executor.kernels, &self.executor.stream);
        let node = node(graph, s.node);
        let p = &node.params;
        let at = Places(params);
        let partials = self.span(s.partials);
        let workspace = self.span(Some(s.workspace));
        let dy = match s.dy {
            Some(dy) => {
                let dy = self.tensor(dy);
                let norm = node.norm.expect("a gradient of the raw output belongs to a normalisation");
                let y = self.tensor(s.y.expect("kept for every normalisation"));
                let residual = s.residual_grad.map(|(view, accumulate)| (self.tensor(view), accumulate));
                let grads = (!s.frozen_norm).then(|| [at.grad(norm.weight), at.grad(norm.bias)]);
                let pointers = NormPointers {
                    stats: self.span(s.stats),
                    weight: at.master(norm.weight),
                    bias: at.master(norm.bias),
                    activation: node.activation,
                };
                let dz = self.tensor(s.dz);
                // SAFETY: see `Run`.
                unsafe {
                    k.batch_norm_act.backward(stream, y, dz, &pointers, grads, partials, dy, residual)
                }?;
                dy
            }
            None => {
                assert_eq!(node.activation, Activation::Identity, "a plain convolution has no activation");
                self.tensor(s.dz)
            }
        };
        // SAFETY: see `Run`.
        unsafe {
            if !s.frozen_weight {
                if let Some(bias) = node.bias {
                    k.batch_norm_act.bias_gradient(stream, dy, at.grad(bias), partials)?;
                }
                let dw = at.grad(node.weight);
                if s.reads_image {
                    k.conv2d.backward_weight_image(stream, p, self.image(s.x), dy, dw, workspace)?;
                } else {
                    k.conv2d.backward_weight(stream, p, self.tensor(s.x), dy, dw, workspace)?;
                }
            }
            if let Some((dx, accumulate)) = s.dx {
                let weight = at.weight(node.weight);
                k.conv2d.backward_data(stream, p, dy, weight, self.tensor(dx), accumulate, workspace)?;
            }
        }
        Ok(())
    }
}

/// Addresses of parameters by their index in the graph.
struct Places<'a>(&'a DeviceParams);

impl Places<'_> {
    fn start(&self, index: usize) -> u64 {
        self.0.starts[index] as u64
    }

    /// In the storage type.
    fn weight(&self, index: usize) -> u64 {
        match &self.0.cast {
            Some(cast) => cast.pointer() + 2 * self.start(index),
            None => self.master(index),
        }
    }

    fn master(&self, index: usize) -> u64 {
        self.0.values.pointer() + 4 * self.start(index)
    }

    fn grad(&self, index: usize) -> u64 {
        self.0.grads.pointer() + 4 * self.start(index)
    }

    fn buffer(&self, index: usize) -> u64 {
        self.0.buffers.pointer() + 4 * self.start(index)
    }
}

fn window(p: &PoolStep) -> Window {
    Window { kernel: p.kernel, stride: p.stride, pad: p.pad }
}

fn node(graph: &Graph, index: usize) -> &ConvNode {
    match &graph.nodes[index] {
        Node::Conv(c) => c,
        other => unreachable!("step {index} belongs to {other:?}"),
    }
}
