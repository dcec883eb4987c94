//! The roles of the running service.
//!
//! * [`folder_watcher`] finds dropped jobs and stop files and says what became of them;
//! * [`supervisor`] gives jobs to slots, journals what happens, retries, shuts down;
//! * [`trainer`] owns one slot: one child process at a time, watched until it is gone;
//! * [`keeper`] is the thread that owns the journal: no handler waits for the disk;
//! * [`service`] starts them all, rebuilds them from the journal when one panics, and ends them.
//!
//! Decisions are plain functions over the journal, tested without actors: [`intake`] (what becomes of a file),
//! [`scheduling`] (who runs next and where), [`slots`] (what a slot is and when its GPU is put aside), [`endings`] (what
//! an exit means), [`recovery`] (what a dead service left).

pub mod courier;
pub mod endings;
pub mod folder_watcher;
pub mod intake;
pub mod keeper;
pub mod outgoing;
pub mod recovery;
pub mod reporter;
pub mod scheduling;
pub mod service;
pub mod side_services;
pub mod slots;
mod stop_files;
pub mod stream_consumer;
pub mod supervisor;
pub mod telemetry;
pub mod trainer;
