//! Bytes or floats into the first activation: `x = byte / 255`, RGB, NHWC.

pub mod cpu;
pub mod cuda;
#[cfg(test)]
mod tests;
