//! The engine: graph, plan, operations, optimisers. It knows nothing of detection.
//!
//! Read [`graph`] first (how a network is written), then [`plan`] (every step and byte of it), then
//! [`device`] (who runs the steps) and [`ops`] (what a step computes).

pub mod activation;
pub mod device;
pub mod error;
pub mod graph;
pub mod ops;
pub mod optim;
pub mod params;
pub mod plan;
pub mod precision;
pub mod rng;
pub mod simd;
pub mod tensor;
