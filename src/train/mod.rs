//! One training session: the loop, schedules, checkpoints, the run folder.

pub mod early_stop;
pub mod schedule;
