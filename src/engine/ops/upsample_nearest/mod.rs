//! Nearest-neighbour enlargement by a whole factor: `z[y, x] = x[y / f, x / f]`.
//!
//! Gradient: the sum of the `f * f` gradients of the copies, row by row.

pub mod cpu;
pub mod cuda;
#[cfg(test)]
mod tests;
