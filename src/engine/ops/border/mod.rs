//! Fills: the zero border around a padded map, and a whole view.

mod cpu;
pub mod cuda;
#[cfg(test)]
mod tests;

pub use cpu::{zero, zero_inside};
