//! What happened to a job, as the journal keeps it.

use serde::{Deserialize, Serialize};

/// One entry of a job's history: a change of state, a command, or an event of its training session worth keeping.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobEvent {
    /// Position in the journal, growing.
    pub id: i64,
    /// Which record of the job (see [`super::record::JobRecord::seq`]).
    pub seq: i64,
    /// When, in Unix milliseconds.
    pub at_unix_ms: i64,
    /// `state`, `command`, or the name of a session event (`epoch`, `checkpoint`, ...).
    pub kind: String,
    /// The rest.
    pub detail: serde_json::Value,
}

/// Session events that the journal keeps; the others (steps, chiefly) are progress and only the last one counts.
pub const KEPT_SESSION_EVENTS: &[&str] =
    &["started", "plan", "resumed", "epoch", "checkpoint", "warning", "finished", "failed", "stopped"];

/// At most this many events are kept for one job record; the oldest go first.
pub const EVENTS_PER_JOB_MAX: i64 = 5_000;
