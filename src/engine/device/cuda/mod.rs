//! The CUDA device: libraries found at run time, kernels compiled for the chip present, memory, streams.
//!
//! Nothing of CUDA is linked. Read [`probe`] (what is here), then [`Device`] (an opened GPU), [`Stream`] (what it
//! is told to do, in order). Kernels are text in the program ([`sources`]), compiled by NVRTC when first needed
//! ([`compile`]) and kept on disk ([`cache`]). A machine without a GPU gets a sentence, not an error.

pub mod cache;
pub mod ceiling;
mod chip;
pub mod compile;
mod context;
mod error;
pub mod executor;
mod libraries;
mod module;
mod probe;
mod self_test;
pub mod sources;
mod stream;
mod tensor;
mod tensor_map;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub mod tuner;
#[cfg(test)]
mod tuner_tests;

pub use chip::Chip;
pub use context::{Buffer, Device, Memory, PinnedBuffer};
pub use error::DeviceError;
pub use libraries::{driver_version, use_libraries};
pub use module::{Kernel, Module};
pub use probe::{Finding, Probe, probe};
pub use self_test::self_test;
pub use stream::{CapturedGraph, Event, Launch, LaunchTime, Stream};
pub use tensor::{FastDivisor, Tensor};
pub use tensor_map::{MappedTensor, PixelGrid, TensorMap};

pub use crate::engine::precision::Precision;
