//! The text of every kernel, carried in the program.

/// A kernel file.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// File without ending.
    pub stem: &'static str,
    /// The text.
    pub text: &'static str,
}

/// One line for each file `kernels/<stem>.cu`.
macro_rules! sources {
    ($($stem:literal),* $(,)?) => {
        &[$(Source { stem: $stem, text: include_str!(concat!("../../../../kernels/", $stem, ".cu")) }),*]
    };
}

/// One line for each file `kernels/<name>`.
macro_rules! headers {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../../../kernels/", $name)))),*]
    };
}

/// Headers that the files include, by name.
pub const HEADERS: &[(&str, &str)] = headers![
    "common.cuh",
    "conv2d_mma.cuh",
    "conv2d_mma_gather.cuh",
    "conv2d_mma_patch.cuh",
    "conv2d_mma_weight.cuh",
    "conv2d_plain.cuh",
    "conv2d_wgmma.cuh",
    "detection.cuh",
    "exact.cuh",
    "lanes.cuh",
    "ptx.cuh",
    "ptx_sm90.cuh",
];

/// Every kernel file.
pub const SOURCES: &[Source] = sources![
    "augment",
    "batch_norm_act",
    "batch_norm_act_finish",
    "border",
    "cast",
    "ceiling",
    "conv2d",
    "conv2d_image",
    "conv2d_image_mma",
    "conv2d_mma_gather_backward_bf16",
    "conv2d_mma_gather_backward_f16",
    "conv2d_mma_gather_forward_bf16",
    "conv2d_mma_gather_forward_f16",
    "conv2d_mma_patch_backward_bf16",
    "conv2d_mma_patch_backward_f16",
    "conv2d_mma_patch_forward_bf16",
    "conv2d_mma_patch_forward_f16",
    "conv2d_mma_weight_bf16",
    "conv2d_mma_weight_f16",
    "conv2d_wgmma_bf16",
    "conv2d_wgmma_f16",
    "detection_loss",
    "image_input",
    "max_pool2d",
    "muon",
    "nms",
    "optim",
    "task_aligned",
    "upsample_nearest",
];

/// The file of that stem.
pub fn find(stem: &str) -> Option<&'static Source> {
    SOURCES.iter().find(|s| s.stem == stem)
}
