//! One training session: the loop, schedules, checkpoints, the run folder.

pub mod checkpoint;
pub mod early_stop;
pub mod error;
pub mod event;
pub mod files;
pub mod schedule;
