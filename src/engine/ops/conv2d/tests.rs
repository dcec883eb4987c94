//! Convolution against a plain f64 reference.
