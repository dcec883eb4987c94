//! Ports to the outside and their implementations: the journal and the shared queue, the object store, the tracking
//! server, the process table, the GPUs, the logs.

pub mod gpu;
pub mod logs;
pub mod process;
pub mod queue;
pub mod sink;
pub mod store;
pub mod telemetry;
pub mod tracking;
