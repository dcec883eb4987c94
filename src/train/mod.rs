//! One training session: arguments, the loop, schedules, checkpoints, the run folder.

pub mod args;
pub mod child;
pub mod plots;
