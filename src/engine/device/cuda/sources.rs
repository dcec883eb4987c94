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
    "detection.cuh",
    "exact.cuh",
    "lanes.cuh",
    "ptx.cuh",
];

/// Every kernel file.
pub const SOURCES: &[Source] = sources!["cast", "detection_loss", "muon", "optim", "task_aligned",];

/// The file of that stem.
pub fn find(stem: &str) -> Option<&'static Source> {
    SOURCES.iter().find(|s| s.stem == stem)
}
