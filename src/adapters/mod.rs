//! Ports to the outside and their implementations: the journal, the process table, the logs.

pub mod logs;
pub mod process;
pub mod queue;
