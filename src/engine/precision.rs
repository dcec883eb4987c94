//! In what numbers activations and their gradients are stored.

use super::device::cuda::Chip;

/// Storage of activations and of the weights that kernels read. Sums, statistics, losses, master weights and the
/// optimiser's state are `f32` in every case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// 32-bit floats: what the CPU computes in; for parity on a GPU.
    F32,
    /// Brain floats: 8 bits of mantissa, the range of `f32`.
    Bf16,
    /// IEEE half: 11 bits of mantissa, a small range; gradients need a loss scale.
    F16,
}

impl Precision {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Precision::F32 => 4,
            Precision::Bf16 | Precision::F16 => 2,
        }
    }

    /// Ending of kernel names.
    pub fn suffix(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
        }
    }

    /// The mixed precision of a chip: bfloat16 where its tensor cores have it, half on older ones.
    pub fn mixed(chip: &Chip) -> Precision {
        if chip.has_tensor_bf16() { Precision::Bf16 } else { Precision::F16 }
    }
}
