//! The service as a user meets it: the built program, a folder, a trainer that speaks the protocol.

mod crashes;
#[path = "../common/emulator.rs"]
#[allow(dead_code)]
mod emulator;
mod gpus;
mod gpus_emulated;
mod intake;
mod lifecycle;
mod pruning;
mod real;
mod resuming;
mod storage;
mod world;
