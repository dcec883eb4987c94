//! The fleet as its users meet it: the built program on several machines, a real Redis, a real S3 server, the documented
//! clients, and everything that can fail.
//!
//! Machines are services with folders of their own on this host. A stub in place of the trainer leaves checkpoints, weights and
//! tables as a run does, in milliseconds.

mod clients;
mod endings;
mod faults;
mod held;
mod machines;
mod network;
mod park;
mod real;
mod secured;
#[path = "../common/servers/mod.rs"]
mod servers;
mod shared_cache;
mod shown;
mod soak;
mod tracking;
#[allow(dead_code)]
#[path = "../runtime/world.rs"]
mod world;
