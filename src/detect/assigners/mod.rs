//! Which prediction is responsible for which target.

pub mod hungarian;
pub mod task_aligned;
