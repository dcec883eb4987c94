//! Batch normalisation and activation on a GPU: `kernels/batch_norm_act.cu` and `kernels/batch_norm_act_finish.cu`.

mod args;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::engine::activation::Activation;
use crate::engine::device::cuda::{Buffer, Device, DeviceError, Kernel, Launch, Precision, Stream, Tensor};
use crate::engine::ops::lanes::{Forms, THREADS, Walk, vectors};
use args::*;
pub use args::{backward_workspace_len, bias_gradient_workspace_len, finish_stats_scratch_len};

/// Device addresses of a normalisation; each of `f32`, one for each channel.
#[derive(Clone, Copy, Debug)]
pub struct NormPointers {
    /// `[mean c][inverse deviation c]`, and a variance after them that only [`BatchNormActKernels::finish_stats`] writes.
    pub stats: u64,
    /// Scale.
    pub weight: u64,
    /// Shift.
    pub bias: u64,
    /// Applied to the result.
    pub activation: Activation,
}

/// Device addresses of running statistics, `f32 [c]` each.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    /// Mean.
    pub mean: u64,
    /// Unbiased variance.
    pub variance: u64,
}

/// What [`BatchNormActKernels::finish_stats`] works on.
#[derive(Clone, Copy, Debug)]
pub struct FinishStats {
    /// `f32 [row tile][2][c]`: sum, and sum of squared deviations from the tile's own mean.
    pub partials: u64,
    /// Pixels of a tile; the last may have fewer.
    pub rows_per_partial: usize,
    /// Pixels of the map, all images.
    pub pixels: usize,
    /// Channels.
    pub channels: usize,
    /// Written: `f32 [mean c][inverse deviation c][variance c]`.
    pub stats: u64,
    /// Moved.
    pub running: Running,
    /// Weight of this batch in the running statistics.
    pub momentum: f32,
    /// Added to the variance.
    pub eps: f32,
    /// [`finish_stats_scratch_len`] floats, aligned to 16 bytes.
    pub scratch: u64,
}

/// A pass over maps: any activation, and SiLU.
struct Pass([Forms; 2]);

impl Pass {
    fn pick(&self, activation: Activation, vector: bool) -> &Kernel {
        self.0[usize::from(activation == Activation::Silu)].pick(vector)
    }
}

/// The kernels for one storage type.
pub struct BatchNormActKernels {
    precision: Precision,
    forward: Pass,
    reduce: Pass,
    apply: Pass,
    bias_reduce: Forms,
    finish_stats: Kernel,
    backward_finish: Kernel,
    bias_finish: Kernel,
    running_stats: Kernel,
    fold: Kernel,
    /// Blocks that have arrived, zero between launches.
    counters: Buffer,
}

impl BatchNormActKernels {
    /// Compiles or finds the kernels.
    ///
    /// # Errors
    /// They do not compile, or the device refuses.
    pub fn load(device: &Arc<Device>, precision: Precision) -> Result<BatchNormActKernels, DeviceError> {
        let (maps, channels) = (device.module("batch_norm_act")?, device.module("batch_norm_act_finish")?);
        let pass = |name: &str| -> Result<Pass, DeviceError> {
            let name = format!("batch_norm_act_{name}");
            Ok(Pass([
                Forms::load(&maps, &name, precision)?,
                Forms::load(&maps, &format!("{name}_silu"), precision)?,
            ]))
        };
        let counters = device.allocate(4 * CHANNEL_BLOCKS_MAX as usize)?;
        let stream = device.stream()?;
        // SAFETY: just allocated, that long.
        unsafe { stream.fill(counters.pointer(), 0, counters.bytes())? };
        stream.synchronize()?;
        Ok(BatchNormActKernels {
            precision,
            forward: pass("forward")?,
            reduce: pass("backward_reduce")?,
            apply: pass("backward_apply")?,
            bias_reduce: Forms::load(&maps, "batch_norm_act_bias_reduce", precision)?,
            finish_stats: channels.kernel("batch_norm_act_finish_stats")?,
            backward_finish: channels.kernel("batch_norm_act_backward_finish")?,
            bias_finish: channels.kernel("batch_norm_act_bias_finish")?,
            running_stats: channels.kernel("batch_norm_act_running_stats")?,
            fold: channels.kernel("batch_norm_act_fold")?,
            counters,
        })
    }

    /// Mean, inverse deviation and variance from the partial sums of a convolution; moves the running statistics.
    ///
    /// # Safety
    /// Addresses lie in live allocations of this device, as long as said; calls are ordered on one stream.
    ///
    /// # Errors
    /// The device refuses.
    pub unsafe fn finish_stats(&self, stream: &Stream, a: &FinishStats) -> Result<(), DeviceError> {
        let rows = a.pixels.div_ceil(a.rows_per_partial) as u32;
        let mut columns = Columns::new(rows, a.channels as u32);
        (columns.partials, columns.scratch, columns.counters) =
            (a.partials, a.scratch, self.counters.pointer());
        let args = FinishStatsArgs {
            columns,
            stats: a.stats,
            running_mean: a.running.mean,
            running_variance: a.running.variance,
            rows_per_partial: a.rows_per_partial as u32,
            pixels: a.pixels as u32,
            eps: a.eps,
            momentum: a.momentum,
        };
        // SAFETY: by contract; the scratch holds what `scratch_len` says.
        unsafe { stream.launch(&self.finish_stats, columns.launch(), &args) }
    }

    /// Statistics of a frozen normalisation: `stats` gets the running mean and `1 / sqrt(variance + eps)`.
    ///
    /// # Safety
    /// Addresses lie in live allocations of this device with `channels` floats (`stats`: twice as many).
    ///
    /// # Errors
    /// The device refuses.
    pub unsafe fn running_stats(
        &self,
        stream: &Stream,
        channels: usize,
        running: Running,
        eps: f32,
        stats: u64,
    ) -> Result<(), DeviceError> {
        let args = RunningArgs {
            running_mean: running.mean,
            running_variance: running.variance,
            weight: 0,
            bias: 0,
            first: stats,
            second: stats + 4 * channels as u64,
            channels: channels as u32,
            eps,
        };
        // SAFETY: by contract.
        unsafe { stream.launch(&self.running_stats, Launch::cover(channels as u64, THREADS), &args) }
    }

    /// A normalisation by running statistics as `scale * y + shift`, `f32 [channels]` each.
    ///
    /// # Safety
    /// Addresses lie in live allocations of this device with `channels` floats.
    ///
    /// # Errors
    /// The device refuses.
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn fold(
        &self,
        stream: &Stream,
        channels: usize,
        [weight, bias]: [u64; 2],
        running: Running,
        eps: f32,
        [scale, shift]: [u64; 2],
    ) -> Result<(), DeviceError> {
        let args = RunningArgs {
            running_mean: running.mean,
            running_variance: running.variance,
            weight,
            bias,
            first: scale,
            second: shift,
            channels: channels as u32,
            eps,
        };
        // SAFETY: by contract.
        unsafe { stream.launch(&self.fold, Launch::cover(channels as u64, THREADS), &args) }
    }

    /// `z = act(norm(y)) + residual`, and zeros in the border of `z` (its own channels).
    ///
    /// # Safety
    /// Views and addresses lie in live allocations of this device; `z` overlaps nothing else.
    ///
    /// # Errors
    /// The device refuses.
    pub unsafe fn forward(
        &self,
        stream: &Stream,
        y: Tensor,
        norm: &NormPointers,
        residual: Option<Tensor>,
        z: Tensor,
    ) -> Result<(), DeviceError> {
        assert_eq!((y.n, y.h, y.w, y.c), (z.n, z.h, z.w, z.c), "shapes of y and z");
        let residual = residual.unwrap_or_else(Tensor::none);
        let vector = vectors(self.precision, &[y, z, residual]);
        let walk = Walk::new(&z, z.pad, vector);
        let chunks = walk.chunks(pixels_per_step(self.precision));
        let NormPointers { stats, weight, bias, activation } = *norm;
        let args =
            ForwardArgs { y, z, residual, walk, stats, weight, bias, activation: activation as u32, chunks };
        let launch = walk.launch(chunks, 12 * stream.device().chip().multiprocessors);
        // SAFETY: by contract.
        unsafe { stream.launch(self.forward.pick(activation, vector), launch, &args) }
    }

    /// The whole backward pass: `dy` (zeros in its border), `gradients` of weight and bias (`f32 [c]`, added to;
    /// `None` where the forward pass used running statistics), and the gradient of the shortcut, overwritten or
    /// added to as its flag says.
    ///
    /// # Safety
    /// Views and addresses lie in live allocations of this device; `dy` and the shortcut's gradient overlap nothing
    /// else; `workspace` is aligned to 16 bytes and holds [`backward_workspace_len`] floats; calls are ordered on one
    /// stream.
    ///
    /// # Errors
    /// The device refuses.
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn backward(
        &self,
        stream: &Stream,
        y: Tensor,
        dz: Tensor,
        norm: &NormPointers,
        gradients: Option<[u64; 2]>,
        workspace: u64,
        dy: Tensor,
        residual_grad: Option<(Tensor, bool)>,
    ) -> Result<(), DeviceError> {
        assert_eq!((y.n, y.h, y.w, y.c), (dz.n, dz.h, dz.w, dz.c), "shapes of y and dz");
        assert_eq!((y.n, y.h, y.w, y.c), (dy.n, dy.h, dy.w, dy.c), "shapes of y and dy");
        let c = y.c as usize;
        let NormPointers { stats, weight, bias, activation } = *norm;
        let per_step = pixels_per_step(self.precision);
        let vector = vectors(self.precision, &[y, dz]);
        let walk = Walk::new(&y, 0, vector);
        let chunks = walk.chunks(per_step);
        let blocks = if gradients.is_some() { reduce_blocks(chunks) } else { 0 };
        let [partials, scratch, _] = backward_layout(blocks, c, 2, 4).map(|at| workspace + 4 * at as u64);
        if gradients.is_some() {
            let activation_code = activation as u32;
            let args = ReduceArgs {
                y,
                dz,
                walk,
                stats,
                weight,
                bias,
                partials,
                activation: activation_code,
                chunks,
            };
            let grid = [blocks, walk.channel_blocks(), 1];
            let launch = Launch { grid, threads: THREADS, shared_bytes: 0 };
            // SAFETY: by contract; the partial sums have their place in the workspace.
            unsafe { stream.launch(self.reduce.pick(activation, vector), launch, &args)? };
        }
        let mut columns = Columns::new(blocks, y.c);
        (columns.partials, columns.scratch, columns.counters) = (partials, scratch, self.counters.pointer());
        let [dweight, dbias] = gradients.unwrap_or_default();
        let (coefficients, pixels) = (workspace, y.pixels() as u32);
        let args = BackwardFinishArgs {
            columns,
            stats,
            weight,
            bias,
            dweight,
            dbias,
            coefficients,
            pixels,
            reserved: 0,
        };
        // SAFETY: by contract.
        unsafe { stream.launch(&self.backward_finish, columns.launch(), &args)? };
        let (residual_grad, accumulate) = residual_grad.unwrap_or((Tensor::none(), false));
        let vector = vectors(self.precision, &[y, dz, dy, residual_grad]);
        let walk = Walk::new(&dy, dy.pad, vector);
        let chunks = walk.chunks(per_step);
        let args = ApplyArgs {
            y,
            dz,
            dy,
            residual_grad,
            walk,
            coefficients,
            activation: activation as u32,
            chunks,
            accumulate: u32::from(accumulate),
            reserved: 0,
        };
        let launch = walk.launch(chunks, 8 * stream.device().chip().multiprocessors);
        // SAFETY: by contract.
        unsafe { stream.launch(self.apply.pick(activation, vector), launch, &args) }
    }

    /// `dbias += sum of dz over all pixels`: the bias gradient of a convolution without normalisation.
    ///
    /// # Safety
    /// `dz` and `dbias` (`f32 [c]`) lie in live allocations of this device; `workspace` is aligned to 16 bytes and
    /// holds [`bias_gradient_workspace_len`] floats; calls are ordered on one stream.
    ///
    /// # Errors
    /// The device refuses.
    pub unsafe fn bias_gradient(
        &self,
        stream: &Stream,
        dz: Tensor,
        dbias: u64,
        workspace: u64,
    ) -> Result<(), DeviceError> {
        let vector = vectors(self.precision, &[dz]);
        let walk = Walk::new(&dz, 0, vector);
        let chunks = walk.chunks(BIAS_PIXELS_PER_STEP);
        let blocks = reduce_blocks(chunks);
        let [partials, scratch, _] =
            backward_layout(blocks, dz.c as usize, 1, 0).map(|at| workspace + 4 * at as u64);
        let none = (Tensor::none(), 0);
        let args = ReduceArgs {
            y: none.0,
            dz,
            walk,
            stats: 0,
            weight: 0,
            bias: 0,
            partials,
            activation: none.1,
            chunks,
        };
        let grid = [blocks, walk.channel_blocks(), 1];
        // SAFETY: by contract; the partial sums have their place in the workspace.
        unsafe {
            let launch = Launch { grid, threads: THREADS, shared_bytes: 0 };
            stream.launch(self.bias_reduce.pick(vector), launch, &args)?;
        }
        let mut columns = Columns::new(blocks, dz.c);
        (columns.partials, columns.scratch, columns.counters) = (partials, scratch, self.counters.pointer());
        // SAFETY: by contract.
        unsafe { stream.launch(&self.bias_finish, columns.launch(), &BiasFinishArgs { columns, dbias }) }
    }
}
