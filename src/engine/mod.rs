//! The engine: graph, plan, operations, optimisers. It knows nothing of detection.

pub mod activation;
pub mod ops;
pub mod optim;
pub mod rng;
pub mod simd;
pub mod tensor;
