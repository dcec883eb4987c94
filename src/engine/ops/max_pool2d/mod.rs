//! Maximum over `k * k` windows; outside the map counts as minus infinity.
//!
//! Gradient: goes whole to the position of the maximum, the first in row-major order on ties. That
//! position is kept as one byte for each output (`ky * k + kx`), so windows up to 15 x 15 are possible.
//! A NaN in a window is its maximum, so that a broken number is seen and not hidden.

pub mod cpu;
pub mod cuda;
#[cfg(test)]
mod tests;

/// Floats of arena that hold the positions of the maxima for an output of `[h, w, c]`.
pub fn indices_len(n: usize, [h, w, c]: [usize; 3]) -> usize {
    (n * h * w * c).div_ceil(4)
}
