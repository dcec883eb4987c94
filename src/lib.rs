//! Boxwright trains object detectors from one binary: no Python, no deep-learning framework.
//!
//! The path of one job through the rooms, top to bottom (arrows go down only):
//!
//! * [`cli`] turns arguments into a command and its result into an exit code;
//! * [`actors`] own the roles of the running service: supervisor, folder watcher, trainer slots;
//! * [`adapters`] are the ports to the outside (the journal today) and their implementations;
//! * [`job`] says what a job is: its specification, its states, its events, its failure classes;
//! * [`train`] runs one training session: the loop, schedules, checkpoints, the run folder;
//! * [`data`] reads datasets and feeds batches;
//! * [`detect`] knows detection: networks, losses, assigners, suppression, metrics, weights;
//! * [`engine`] computes: graph, plan, operations, optimisers. It knows nothing of detection;
//! * [`yaml`] reads YAML with a place for every value. It knows nothing at all.

pub mod actors;
pub mod adapters;
pub mod cli;
pub mod data;
pub mod detect;
pub mod engine;
pub mod job;
pub mod train;
pub mod yaml;
