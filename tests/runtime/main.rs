//! The service as a user meets it: the built program, a folder, a trainer that speaks the protocol.

mod crashes;
mod intake;
mod lifecycle;
mod real;
mod storage;
mod world;
