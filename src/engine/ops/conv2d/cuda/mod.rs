//! Convolution on the GPU: which kernels take which case.
//!
//! Tensor cores (`mma`) take 16-bit numbers on compute capability 8.0 and later where the channels of both sides come
//! in eights and every pixel is aligned to 16 bytes; everything else is computed by `plain`. How a case is cut is
//! known before anything is allocated: a [`Shape`] is made of the two views, and the sizes of partial statistics and
//! workspaces follow from it, the precision, the chip, and what was measured on it ([`Tuning`]).

mod image;
mod mma;
mod mma_args;
mod mma_config;
mod mma_config_weight;
mod plain;
#[cfg(test)]
mod plain_tests;
#[cfg(test)]
mod tests;
mod tuner;
#[cfg(test)]
mod tuner_tests;
mod tuning;
pub mod tuning_file;
mod wgmma;
#[cfg(test)]
mod wgmma_tests;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::Conv2dParams;
use crate::engine::activation::Activation;
use crate::engine::device::cuda::{Chip, Device, DeviceError, Precision, Stream, Tensor};
use crate::engine::tensor::View;

pub use image::{image_stats_layout, image_workspace_len};
pub use mma_config::{Method, MmaConfig, Pass};
pub use tuner::{Clock, EventClock, Limits, Output, Subject, measure};
pub use tuning::{Case, Tuning};

/// What happens to the output before it is written. Addresses are those of `c_out` floats on the device.
#[derive(Clone, Copy, Debug)]
pub enum Epilogue {
    /// `y = conv`.
    Raw,
    /// `y = conv`, and statistics of the rounded numbers.
    Stats {
        /// `[partials][2][c_out]` floats, overwritten: for each tile of pixels ([`stats_layout`]) the sum of each
        /// channel, and the sum of squared deviations from the tile's own mean.
        partials: u64,
    },
    /// `y = conv + bias`, written as dense `f32` whatever the precision.
    Bias {
        /// Added per channel.
        bias: u64,
    },
    /// `y = activation(conv * scale + shift) + residual`; the border of the output is not written.
    Apply {
        /// Factor per channel.
        scale: u64,
        /// Added per channel after the factor.
        shift: u64,
        /// Applied to the sum.
        activation: Activation,
        /// Added last; as large as the output.
        residual: Option<Tensor>,
    },
}

/// Sizes of both maps of a convolution, and what of their layout decides how it is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Images.
    pub n: usize,
    /// Rows of the input.
    pub h_in: usize,
    /// Columns of the input.
    pub w_in: usize,
    /// Border of the input.
    pub x_pad: usize,
    /// Rows of the output.
    pub h_out: usize,
    /// Columns of the output.
    pub w_out: usize,
    /// Border of the output (of its gradient).
    pub dy_pad: usize,
    /// Whether every pixel of both begins at a multiple of 16 bytes.
    pub aligned: bool,
}

impl Shape {
    /// Of the views of the input and the output (or of their gradients), in numbers of `precision`. Buffers are taken
    /// to begin at a multiple of 16 bytes.
    pub fn of_views(x: &View, y: &View, precision: Precision) -> Shape {
        // SAFETY: these tensors are only looked at here, never given to a kernel.
        let (x, y) = unsafe { (Tensor::new(0, precision.bytes(), x), Tensor::new(0, precision.bytes(), y)) };
        Shape::of_tensors(&x, &y, precision)
    }

    /// Of the input and the output, or of their gradients.
    pub fn of_tensors(x: &Tensor, y: &Tensor, precision: Precision) -> Shape {
        Shape {
            n: x.n as usize,
            h_in: x.h as usize,
            w_in: x.w as usize,
            x_pad: x.pad as usize,
            h_out: y.h as usize,
            w_out: y.w as usize,
            dy_pad: y.pad as usize,
            aligned: x.is_aligned(precision) && y.is_aligned(precision),
        }
    }
}

/// Whether the tensor cores compute this case.
pub fn uses_tensor_cores(p: &Conv2dParams, shape: &Shape, precision: Precision, chip: &Chip) -> bool {
    let eights = p.c_in.is_multiple_of(8) && p.c_out.is_multiple_of(8);
    precision.bytes() == 2 && chip.has_tensor_bf16() && eights && shape.aligned
}

/// How the statistics of [`Epilogue::Stats`] are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatsLayout {
    /// Partial statistics, each of `2 * c_out` floats.
    pub partials: usize,
    /// Pixels of each; only the last may have fewer.
    pub pixels_per_partial: usize,
}

impl StatsLayout {
    /// Floats of the partial statistics.
    pub fn len(&self, p: &Conv2dParams) -> usize {
        self.partials * 2 * p.c_out
    }
}

/// How the forward pass of this case cuts its statistics.
pub fn stats_layout(
    p: &Conv2dParams,
    shape: &Shape,
    precision: Precision,
    chip: &Chip,
    tuning: &Tuning,
) -> StatsLayout {
    if !uses_tensor_cores(p, shape, precision, chip) {
        return plain::stats_layout(p, shape);
    }
    let (partials, pixels_per_partial) = tuning.choose(Pass::Forward, p, shape, chip).stats_tiles(p, shape);
    StatsLayout { partials, pixels_per_partial }
}

/// Floats of the workspace that a pass of this case needs; its contents are ignored and destroyed.
pub fn workspace_len(
    pass: Pass,
    p: &Conv2dParams,
    shape: &Shape,
    precision: Precision,
    chip: &Chip,
    tuning: &Tuning,
) -> usize {
    if uses_tensor_cores(p, shape, precision, chip) {
        tuning.choose(pass, p, shape, chip).workspace_len(pass, p, shape)
    } else {
        plain::workspace_len(pass, p, shape, chip)
    }
}

/// The kernels of one precision on one device.
///
/// Launches of one value must be ordered (one stream): split sums share counters.
pub struct Conv2dKernels {
    device: Arc<Device>,
    precision: Precision,
    mma: Option<mma::MmaKernels>,
    plain: plain::PlainKernels,
    image: image::ImageKernels,
    tuning: Arc<Tuning>,
    /// What [`Tuning::choose`] said, since a launch should not have to ask again.
    chosen: Mutex<HashMap<(Pass, Conv2dParams, Shape), MmaConfig>>,
}

impl Conv2dKernels {
    /// Files of the kernels that [`Conv2dKernels::load`] needs, for compiling them beforehand and in parallel.
    pub fn stems(precision: Precision, chip: &Chip) -> Vec<&'static str> {
        let mut stems = plain::stems().to_vec();
        stems.extend(image::stems(precision, chip));
        if precision.bytes() == 2 && chip.has_tensor_bf16() {
            stems.extend(mma::stems(precision));
            if wgmma::is_wanted(chip) {
                stems.push(wgmma::stem(precision));
            }
        }
        stems
    }

    /// Compiles or loads the kernels.
    ///
    /// # Errors
    /// A kernel does not compile or load.
    pub fn load(device: &Arc<Device>, precision: Precision) -> Result<Conv2dKernels, DeviceError> {
        let with_mma = precision.bytes() == 2 && device.chip().has_tensor_bf16();
        Ok(Conv2dKernels {
            device: Arc::clone(device),
            precision,
            mma: with_mma.then(|| mma::MmaKernels::load(device, precision)).transpose()?,
            plain: plain::PlainKernels::load(device, precision)?,
            image: image::ImageKernels::load(device, precision)?,
            tuning: Arc::default(),
            chosen: Mutex::default(),
        })
    }

    /// From now on cases are cut as `tuning` says; plans and workspaces must have been made with it too.
    pub fn set_tuning(&mut self, tuning: Arc<Tuning>) {
        self.tuning = tuning;
        self.chosen.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// What cases are cut by.
    pub fn tuning(&self) -> &Arc<Tuning> {
        &self.tuning
    }

    /// The tensor-core kernels and the configuration of a case, where they compute it.
    fn mma(
        &self,
        pass: Pass,
        p: &Conv2dParams,
        x: &Tensor,
        y: &Tensor,
    ) -> Option<(&mma::MmaKernels, MmaConfig)> {
        let (chip, shape) = (self.device.chip(), Shape::of_tensors(x, y, self.precision));
        let taken = uses_tensor_cores(p, &shape, self.precision, chip);
        let mma = self.mma.as_ref().filter(|_| taken)?;
        let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        let config =
            chosen.entry((pass, *p, shape)).or_insert_with(|| self.tuning.choose(pass, p, &shape, chip));
        Some((mma, *config))
    }

    /// `out = epilogue(x * weight)`.
    ///
    /// `x`: `[n, h, w, c_in]` with a zero border of at least `pad`; `out`: `[n, h_out, w_out, c_out]`, its border is
    /// not written; `weight`: `[kernel][kernel][c_in][c_out]` in the storage type; `workspace`: [`workspace_len`]
    /// floats.
    ///
    /// # Safety
    /// All addresses are those of live device memory of the sizes said; `weight` and `workspace` begin at multiples of
    /// 16 bytes; `out`, partials and workspace overlap nothing else; other work on them is ordered with `stream`.
    ///
    /// # Errors
    /// The launch is refused.
    #[allow(clippy::too_many_arguments)] // what a convolution has
    pub unsafe fn forward(
        &self,
        stream: &Stream,
        p: &Conv2dParams,
        x: Tensor,
        weight: u64,
        out: Tensor,
        epilogue: Epilogue,
        workspace: u64,
    ) -> Result<(), DeviceError> {
        let unaligned_residual =
            matches!(&epilogue, Epilogue::Apply { residual: Some(r), .. } if !r.is_aligned(self.precision));
        // SAFETY: the caller's promise.
        unsafe {
            match self.mma(Pass::Forward, p, &x, &out).filter(|_| !unaligned_residual) {
                Some((mma, config)) => mma.forward(stream, &config, p, x, weight, out, &epilogue, workspace),
                None => self.plain.forward(stream, p, x, weight, out, epilogue, workspace),
            }
        }
    }

    /// `dx = dy * transposed weight`, or `dx += ..` with `accumulate`.
    ///
    /// `dy`: `[n, h_out, w_out, c_out]` with a zero border of at least [`Conv2dParams::gradient_border`]; `dx`:
    /// `[n, h, w, c_in]`, its border is not written.
    ///
    /// # Safety
    /// As for [`Conv2dKernels::forward`].
    ///
    /// # Errors
    /// The launch is refused.
    #[allow(clippy::too_many_arguments)] // what a convolution has
    pub unsafe fn backward_data(
        &self,
        stream: &Stream,
        p: &Conv2dParams,
        dy: Tensor,
        weight: u64,
        dx: Tensor,
        accumulate: bool,
        workspace: u64,
    ) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        unsafe {
            match self.mma(Pass::BackwardData, p, &dx, &dy) {
                Some((mma, config)) => {
                    mma.backward_data(stream, &config, p, dy, weight, dx, accumulate, workspace)
                }
                None => self.plain.backward_data(stream, p, dy, weight, dx, accumulate, workspace),
            }
        }
    }

    /// `dw +=` the gradient of the weight, `[kernel][kernel][c_in][c_out]` floats.
    ///
    /// # Safety
    /// As for [`Conv2dKernels::forward`].
    ///
    /// # Errors
    /// A launch is refused.
    #[allow(clippy::too_many_arguments)] // what a convolution has
    pub unsafe fn backward_weight(
        &self,
        stream: &Stream,
        p: &Conv2dParams,
        x: Tensor,
        dy: Tensor,
        dw: u64,
        workspace: u64,
    ) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        unsafe {
            match self.mma(Pass::BackwardWeight, p, &x, &dy) {
                Some((mma, config)) => mma.backward_weight(stream, &config, p, x, dy, dw, workspace),
                None => self.plain.backward_weight(stream, p, x, dy, dw, workspace),
            }
        }
    }
}
