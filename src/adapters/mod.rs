//! Ports to the outside and their implementations: the journal, the process table, the GPUs, the logs.

pub mod gpu;
pub mod logs;
pub mod process;
pub mod queue;
