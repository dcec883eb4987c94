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

/// Headers that the files include, by name.
pub const HEADERS: &[(&str, &str)] = &[
    ("common.cuh", include_str!("../../../../kernels/common.cuh")),
    ("ptx.cuh", include_str!("../../../../kernels/ptx.cuh")),
];

/// Every kernel file.
pub const SOURCES: &[Source] = sources!["augment", "cast"];

/// The file of that stem.
pub fn find(stem: &str) -> Option<&'static Source> {
    SOURCES.iter().find(|s| s.stem == stem)
}
