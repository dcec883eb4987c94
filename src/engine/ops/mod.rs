//! Operations. One operation is one folder: `mod.rs` (parameters, shape rule), `cpu.rs`, `tests.rs`.

pub mod conv2d;
