//! Training.

pub mod plots;
