//! Slots: where jobs train, as a person sees them, and which of them a service may have.

use serde::{Deserialize, Serialize};

use super::ids::TaskId;
use super::record::ProcessId;

/// Largest number of a GPU that is read.
pub const GPU_NUMBER_MAX: i64 = 1023;

/// Which GPUs a service uses.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum GpuChoice {
    /// Every one that can be used.
    #[default]
    All,
    /// None: the driver is never asked.
    None,
    /// Those of these numbers.
    Only(Vec<usize>),
}

impl GpuChoice {
    /// True when the GPU of this number may be used.
    pub fn allows(&self, number: usize) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::Only(numbers) => numbers.contains(&number),
        }
    }
}

/// What a slot does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SlotState {
    /// It takes the next job.
    Free,
    /// It trains.
    Busy,
    /// Its GPU is tested.
    Testing,
    /// Its GPU failed and takes no job for a while.
    Quarantined,
    /// Its GPU is not there any more.
    Missing,
    /// Its GPU belongs to another machine.
    Standby,
    /// It was told to take no job.
    Drained,
}

impl std::fmt::Display for SlotState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Free => "free",
            Self::Busy => "busy",
            Self::Testing => "testing",
            Self::Quarantined => "quarantined",
            Self::Missing => "missing",
            Self::Standby => "standby",
            Self::Drained => "drained",
        })
    }
}

/// One slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRecord {
    /// `cpu 0`, `GPU 1`.
    pub name: String,
    /// As a job names it: `cpu`, `cuda:1`.
    pub device: String,
    /// Identity of the GPU, as the driver's tools write it.
    pub uuid: Option<String>,
    /// Name of the GPU.
    pub model: Option<String>,
    /// What it does.
    pub state: SlotState,
    /// Its job.
    pub task_id: Option<TaskId>,
    /// Why it is in this state, in a sentence; empty when there is nothing to say.
    pub reason: String,
    /// Faults of the device in a row.
    pub faults: u32,
    /// The last time without work after a fault, milliseconds; 0 for none.
    pub back_off_ms: u64,
    /// End of the quarantine, Unix milliseconds.
    pub until_unix_ms: Option<i64>,
}

/// All slots of a service, for `boxwright status` and for a supervisor that is rebuilt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotBoard {
    /// The service's process.
    pub service: ProcessId,
    /// Its slots, CPU first, GPUs in the order in which they were found.
    pub slots: Vec<SlotRecord>,
}
