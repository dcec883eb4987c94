//! The head's outputs on a CUDA device, as the kernels of the loss and of suppression take them.

use crate::engine::device::cuda::{FastDivisor, Precision, Tensor};

/// Head levels that the kernels take.
pub(crate) const LEVELS_MAX: usize = 5;

const BOXES_VECTOR: u32 = 1;
const BOX_GRADIENT_VECTOR: u32 = 2;
const SCORES_VECTOR: u32 = 4;
const SCORE_GRADIENT_VECTOR: u32 = 8;

/// One level of the head on the device.
#[derive(Clone, Copy, Debug)]
pub struct DeviceHeadLevel {
    /// Pixels of the network input per cell.
    pub stride: u32,
    /// Box logits, f32 `[n, h, w, 4 * reg_max]`.
    pub boxes: Tensor,
    /// Class logits, f32 `[n, h, w, nc]`.
    pub scores: Tensor,
    /// Gradient of the box logits, storage type, no border; overwritten. Where the pixel pitch is the channels
    /// rounded up to eight, the padding is overwritten with zeros. [`Tensor::none`] where only the terms are wanted.
    pub box_gradient: Tensor,
    /// Gradient of the class logits, in the same way.
    pub score_gradient: Tensor,
}

impl DeviceHeadLevel {
    /// A level whose gradients nobody wants.
    pub fn without_gradients(stride: u32, boxes: Tensor, scores: Tensor) -> DeviceHeadLevel {
        let (box_gradient, score_gradient) = (Tensor::none(), Tensor::none());
        DeviceHeadLevel { stride, boxes, scores, box_gradient, score_gradient }
    }
}

/// Checks that all tensors have the shapes of `n` images; returns the anchor points of an image.
///
/// # Panics
/// When they have not.
pub(crate) fn check(levels: &[DeviceHeadLevel], n: usize, nc: usize, reg_max: usize) -> usize {
    assert!((1..=LEVELS_MAX).contains(&levels.len()), "{} head levels", levels.len());
    for level in levels {
        for (tensor, c, is_gradient) in [
            (&level.boxes, 4 * reg_max, false),
            (&level.scores, nc, false),
            (&level.box_gradient, 4 * reg_max, true),
            (&level.score_gradient, nc, true),
        ] {
            if is_gradient && tensor.data == 0 {
                continue;
            }
            let wanted = [n as u32, level.boxes.h, level.boxes.w, c as u32];
            assert_eq!(
                [tensor.n, tensor.h, tensor.w, tensor.c],
                wanted,
                "a tensor of stride {}",
                level.stride
            );
            assert!(!is_gradient || tensor.pad == 0, "gradients have no border");
        }
    }
    levels.iter().map(|level| (level.boxes.h * level.boxes.w) as usize).sum()
}

/// `struct HeadLevel`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct LevelArgs {
    boxes: Tensor,
    scores: Tensor,
    box_gradient: Tensor,
    score_gradient: Tensor,
    width: FastDivisor,
    cells: FastDivisor,
    /// Anchors of the levels before.
    pub first: u32,
    /// Units of the class term of the levels before.
    pub first_unit: u32,
    stride: u32,
    flags: u32,
    box_channels: u32,
    score_channels: u32,
}

/// Channels of a gradient that are written: the padding too, where the buffer has one.
fn written_channels(gradient: &Tensor) -> u32 {
    let padded = gradient.c.next_multiple_of(8);
    if gradient.pixel_pitch == padded { padded } else { gradient.c }
}

impl LevelArgs {
    /// A level's arguments, its places among the others left at zero.
    pub fn new(level: &DeviceHeadLevel, precision: Precision) -> LevelArgs {
        let nc = level.scores.c;
        let flag = |is_set: bool, bit: u32| if is_set { bit } else { 0 };
        let score_channels = written_channels(&level.score_gradient);
        let flags = flag(level.boxes.is_aligned(Precision::F32), BOXES_VECTOR)
            | flag(level.box_gradient.is_aligned(precision), BOX_GRADIENT_VECTOR)
            | flag(level.scores.is_aligned(Precision::F32) && nc.is_multiple_of(8), SCORES_VECTOR)
            | flag(
                level.score_gradient.is_aligned(precision) && score_channels.is_multiple_of(8),
                SCORE_GRADIENT_VECTOR,
            );
        LevelArgs {
            boxes: level.boxes,
            scores: level.scores,
            box_gradient: level.box_gradient,
            score_gradient: level.score_gradient,
            width: FastDivisor::new(level.boxes.w.max(1)),
            cells: FastDivisor::new((level.boxes.h * level.boxes.w).max(1)),
            first: 0,
            first_unit: 0,
            stride: level.stride,
            flags,
            box_channels: written_channels(&level.box_gradient),
            score_channels,
        }
    }
}
