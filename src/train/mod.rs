//! One training session: arguments, the loop, schedules, checkpoints, the run folder.

pub mod args;
pub mod autobatch;
pub mod bench;
pub mod checkpoint;
pub mod child;
pub mod device;
pub mod early_stop;
pub mod error;
pub mod event;
pub mod files;
pub mod plots;
pub mod predictor;
pub mod profile;
pub mod recommend;
pub mod run_folder;
pub mod schedule;
pub mod session;
pub mod weights_file;
