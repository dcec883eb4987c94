//! Two-dimensional convolution: parameters, shape rule, cost. Start reading at [`cpu`].
//!
//! Activations are NHWC views, weights HWIO `[kernel][kernel][c_in][c_out]`, dense. Parameter
//! gradients add, the data gradient overwrites or adds as asked. There is no grouping and no
//! dilation: `y[i, j, o] = sum over a, b, c of x[i * stride + a - pad, j * stride + b - pad, c] * w[a, b, c, o]`.

pub mod cpu;
pub mod cuda;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

/// A convolution, apart from the sizes of its maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(C)]
pub struct Conv2dParams {
    /// Channels of the input.
    pub c_in: usize,
    /// Channels of the output.
    pub c_out: usize,
    /// Height and width of the kernel.
    pub kernel: usize,
    /// Step of the output grid on the input.
    pub stride: usize,
    /// Zero pixels assumed on every side of the input.
    pub pad: usize,
}

/// Widest vector of any processor: packed weights are padded to a multiple of it at most.
const LANES_MAX: usize = 16;

impl Conv2dParams {
    /// Height and width of the output for an input of `h` by `w`.
    ///
    /// Panics when the kernel does not fit into the padded input.
    pub fn output_size(&self, h: usize, w: usize) -> (usize, usize) {
        let size = |input: usize| {
            let padded = input + 2 * self.pad;
            assert!(padded >= self.kernel, "kernel {} on {input} + 2 * {}", self.kernel, self.pad);
            (padded - self.kernel) / self.stride + 1
        };
        (size(h), size(w))
    }

    /// Floats of the weight: `kernel * kernel * c_in * c_out`.
    pub fn weight_len(&self) -> usize {
        self.kernel * self.kernel * self.c_in * self.c_out
    }

    /// Multiply-adds of the forward pass over `n` inputs of `h_in` by `w_in`, borders counted; each
    /// of the two gradients takes as many.
    pub fn macs(&self, n: usize, h_in: usize, w_in: usize) -> u64 {
        let (h, w) = self.output_size(h_in, w_in);
        (n * h * w) as u64 * self.weight_len() as u64
    }

    /// Zero pixels that [`cpu::backward_data`] needs around the gradient of the output:
    /// `(kernel - 1 - pad) / stride`, rounded up.
    pub fn gradient_border(&self) -> usize {
        self.kernel.saturating_sub(1 + self.pad).div_ceil(self.stride)
    }

    /// Floats of the buffer for [`cpu::pack_forward`]. Align it to 64 bytes for speed.
    pub fn packed_forward_len(&self) -> usize {
        self.kernel * self.kernel * self.c_in * self.c_out.next_multiple_of(LANES_MAX)
    }

    /// Floats of the buffer for [`cpu::pack_backward`]. Align it to 64 bytes for speed.
    pub fn packed_backward_len(&self) -> usize {
        self.kernel * self.kernel * self.c_out * self.c_in.next_multiple_of(LANES_MAX)
    }

    /// Floats of the workspace for [`cpu::backward_weight`]: one partial sum of the whole weight for
    /// each part into which the pixels are split (see there), at most 4 MiB.
    pub fn backward_weight_workspace_len(&self, n: usize, h_out: usize, w_out: usize) -> usize {
        match cpu::weight_gradient_splits(self, n, h_out, w_out) {
            1 => 0,
            splits => splits * self.weight_len(),
        }
    }
}
