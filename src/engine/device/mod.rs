//! Devices: who runs a plan. The CPU is always there.

mod arena;
pub mod cpu;
pub mod cuda;
