//! The states of a job, which may follow which, why a job fails, and which failures are tried again.

use serde::{Deserialize, Serialize};

/// Where a job is. A job moves only along [`TRANSITIONS`]; a terminal state is never left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Waits, for the reason kept with it.
    Queued,
    /// Its process is being started: dataset scan, plan, batch.
    Preparing,
    /// It trains.
    Running,
    /// It was asked to stop.
    Stopping,
    /// Its process is gone through no fault of its own; it continues from its checkpoint.
    Interrupted,
    /// Done.
    Completed,
    /// Failed, with a class and a reason.
    Failed,
    /// Stopped on request.
    Cancelled,
    /// Goes on on another machine, which took it over; over as far as this one is concerned.
    Moved,
}

use JobState::{Cancelled, Completed, Failed, Interrupted, Moved, Preparing, Queued, Running, Stopping};

/// The legal moves.
pub const TRANSITIONS: &[(JobState, &[JobState])] = &[
    (Queued, &[Preparing, Failed, Cancelled, Moved]),
    (Preparing, &[Running, Stopping, Interrupted, Queued, Completed, Failed, Cancelled, Moved]),
    (Running, &[Stopping, Interrupted, Queued, Completed, Failed, Cancelled, Moved]),
    (Stopping, &[Completed, Failed, Cancelled, Moved]),
    (Interrupted, &[Preparing, Queued, Completed, Failed, Cancelled, Moved]),
    (Completed, &[]),
    (Failed, &[]),
    (Cancelled, &[]),
    (Moved, &[]),
];

impl JobState {
    /// All states.
    pub const ALL: [JobState; 9] =
        [Queued, Preparing, Running, Stopping, Interrupted, Completed, Failed, Cancelled, Moved];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Queued => "queued",
            Preparing => "preparing",
            Running => "running",
            Stopping => "stopping",
            Interrupted => "interrupted",
            Completed => "completed",
            Failed => "failed",
            Cancelled => "cancelled",
            Moved => "moved",
        }
    }

    /// The state of a word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }

    /// True for completed, failed, cancelled and moved.
    pub fn is_terminal(self) -> bool {
        matches!(self, Completed | Failed | Cancelled | Moved)
    }

    /// True while a process may belong to the job.
    pub fn has_process(self) -> bool {
        matches!(self, Preparing | Running | Stopping)
    }

    /// True when `next` may follow.
    pub fn may_become(self, next: JobState) -> bool {
        TRANSITIONS.iter().any(|(from, to)| *from == self && to.contains(&next))
    }
}

impl std::fmt::Display for JobState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// Why a job failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailureClass {
    /// The configuration cannot be run.
    Config,
    /// The dataset cannot be used.
    Data,
    /// Not enough memory.
    Memory,
    /// The loss is not finite.
    Diverged,
    /// The device failed.
    Device,
    /// A file could not be written.
    Storage,
    /// The process was killed from outside, or stood still.
    Killed,
    /// A fault of the program.
    Internal,
}

impl FailureClass {
    /// All classes.
    pub const ALL: [FailureClass; 8] = [
        Self::Config,
        Self::Data,
        Self::Memory,
        Self::Diverged,
        Self::Device,
        Self::Storage,
        Self::Killed,
        Self::Internal,
    ];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Data => "data",
            Self::Memory => "memory",
            Self::Diverged => "diverged",
            Self::Device => "device",
            Self::Storage => "storage",
            Self::Killed => "killed",
            Self::Internal => "internal",
        }
    }

    /// The class of a word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.as_str() == word)
    }

    /// True for the classes that another attempt may cure: memory, device, storage, killed.
    pub fn is_retried(self) -> bool {
        match self {
            Self::Memory | Self::Device | Self::Storage | Self::Killed => true,
            Self::Config | Self::Data | Self::Diverged | Self::Internal => false,
        }
    }
}

impl std::fmt::Display for FailureClass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// How often one class is tried again, and after how long.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RetryPolicy {
    /// Attempts after the first.
    pub budget: u32,
    /// Delay before the first of them.
    pub delay_ms: u64,
    /// Longest delay.
    pub delay_ms_max: u64,
}

impl RetryPolicy {
    /// Delay before retry number `retry` (from 0): doubling, capped, with up to a quarter of jitter (`jitter` in 0..1).
    pub fn delay_ms(&self, retry: u32, jitter: f64) -> u64 {
        let doubled = self.delay_ms.saturating_mul(1u64 << retry.min(20)).min(self.delay_ms_max);
        doubled + (doubled as f64 * 0.25 * jitter.clamp(0.0, 1.0)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_states_are_never_left_and_every_other_state_can_end() {
        for state in JobState::ALL {
            assert_eq!(JobState::parse(state.as_str()), Some(state));
            let leaves = JobState::ALL.into_iter().filter(|&next| state.may_become(next)).count();
            assert_eq!(leaves == 0, state.is_terminal(), "{state}");
            assert!(!state.may_become(state), "{state} to itself");
            if !state.is_terminal() {
                assert!(state.may_become(Cancelled) && state.may_become(Failed), "{state}");
            }
        }
        assert!(
            !Stopping.may_become(Running) && !Queued.may_become(Running) && !Queued.may_become(Completed)
        );
        assert_eq!(TRANSITIONS.len(), JobState::ALL.len());
    }

    #[test]
    fn only_four_classes_are_tried_again() {
        let retried: Vec<&str> =
            FailureClass::ALL.iter().filter(|class| class.is_retried()).map(|class| class.as_str()).collect();
        assert_eq!(retried, ["memory", "device", "storage", "killed"]);
        assert!(FailureClass::ALL.iter().all(|class| FailureClass::parse(class.as_str()) == Some(*class)));
    }

    #[test]
    fn delays_double_up_to_a_cap() {
        let policy = RetryPolicy { budget: 9, delay_ms: 100, delay_ms_max: 1000 };
        let delays: Vec<u64> = (0..6).map(|retry| policy.delay_ms(retry, 0.0)).collect();
        assert_eq!(delays, [100, 200, 400, 800, 1000, 1000]);
        assert_eq!(policy.delay_ms(0, 1.0), 125);
        assert_eq!(policy.delay_ms(u32::MAX, 0.0), 1000);
    }
}
