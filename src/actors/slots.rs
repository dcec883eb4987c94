//! What a slot is and how it stands: its device, its health, and what a fault of its GPU means.
//!
//! A GPU that failed is tested before it takes another job. After [`FAULTS_MAX`] faults in a row, or a failed test, it
//! is quarantined: it takes no job for a time that doubles with every further fault ([`BACK_OFF_MS`] to
//! [`BACK_OFF_MS_MAX`]) and is tested at the end of it. One completed job clears its record. Plain values without
//! actors: the supervisor holds them, [`scheduling`](super::scheduling) sees them as [`Seat`]s.

use crate::adapters::gpu::Gpu;
use crate::job::clock::rfc3339;
use crate::job::ids::TaskId;
use crate::job::slot::{SlotRecord, SlotState};

/// Faults in a row after which a GPU is quarantined.
pub const FAULTS_MAX: u32 = 3;
/// The first quarantine, milliseconds.
pub const BACK_OFF_MS: u64 = 60_000;
/// The longest quarantine, milliseconds.
pub const BACK_OFF_MS_MAX: u64 = 3_600_000;

/// What a slot computes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlotDevice {
    /// A share of the cores, with its number.
    Cpu(usize),
    /// A GPU.
    Gpu(Gpu),
}

/// How a slot stands, apart from its job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// Well.
    Ready,
    /// Being tested.
    Testing,
    /// Out of use until then, Unix milliseconds.
    Quarantined(i64),
    /// The driver does not show it any more.
    Missing,
}

/// Whose a slot's GPU is, among machines (or containers) that see the same one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    /// This service's.
    Ours,
    /// It is not known yet.
    Unheard,
    /// That machine's.
    Foreign(String),
}

/// A slot without its job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// What it computes on.
    pub device: SlotDevice,
    /// How it stands.
    pub health: Health,
    /// Whose it is.
    pub claim: Claim,
    /// Why, in a sentence; empty when there is nothing to say.
    reason: String,
    faults: u32,
    back_off_ms: u64,
    /// The job that met the last fault.
    failed_seq: Option<i64>,
}

impl Slot {
    /// A slot on the CPU.
    pub fn cpu(number: usize) -> Self {
        Self::new(SlotDevice::Cpu(number), Health::Ready)
    }

    /// A slot on a GPU that has to pass its test.
    pub fn gpu(gpu: Gpu) -> Self {
        Self::new(SlotDevice::Gpu(gpu), Health::Testing)
    }

    fn new(device: SlotDevice, health: Health) -> Self {
        Self {
            device,
            health,
            claim: Claim::Ours,
            reason: String::new(),
            faults: 0,
            back_off_ms: 0,
            failed_seq: None,
        }
    }

    /// `cpu 0`, `GPU 1`.
    pub fn name(&self) -> String {
        match &self.device {
            SlotDevice::Cpu(number) => format!("cpu {number}"),
            SlotDevice::Gpu(gpu) => format!("GPU {}", gpu.number),
        }
    }

    /// Its GPU.
    pub fn as_gpu(&self) -> Option<&Gpu> {
        match &self.device {
            SlotDevice::Cpu(_) => None,
            SlotDevice::Gpu(gpu) => Some(gpu),
        }
    }

    /// Notes that a job met a fault of the device. True when it must be tested now; else it is quarantined or gone.
    pub fn fault(&mut self, seq: i64, why: &str, now_unix_ms: i64) -> bool {
        self.faults += 1;
        self.failed_seq = Some(seq);
        let times =
            if self.faults == 1 { "a fault".to_owned() } else { format!("{} faults in a row", self.faults) };
        let why = format!("{times}, last: {}", first_line(why));
        if self.health == Health::Missing {
            return false;
        }
        if self.faults >= FAULTS_MAX {
            self.quarantine(why, now_unix_ms);
            return false;
        }
        self.reason = why;
        self.health = Health::Testing;
        true
    }

    /// Notes what a test found. False when nobody waited for it.
    pub fn tested(&mut self, fault: Option<&str>, now_unix_ms: i64) -> bool {
        if self.health != Health::Testing {
            return false;
        }
        match fault {
            None => self.health = Health::Ready,
            Some(why) => self.quarantine(format!("it failed its test: {}", first_line(why)), now_unix_ms),
        }
        true
    }

    /// Notes a completed job.
    pub fn success(&mut self) {
        (self.faults, self.back_off_ms, self.failed_seq) = (0, 0, None);
        if self.health == Health::Ready {
            self.reason.clear();
        }
    }

    /// True at the end of a quarantine: it must be tested now.
    pub fn is_due(&mut self, now_unix_ms: i64) -> bool {
        let due = matches!(self.health, Health::Quarantined(until) if until <= now_unix_ms);
        if due {
            self.health = Health::Testing;
        }
        due
    }

    /// Notes that a look did not show its GPU. True when that is news.
    pub fn vanished(&mut self, why: &str) -> bool {
        let news = self.health != Health::Missing;
        if news {
            self.health = Health::Missing;
            self.reason = first_line(why).to_owned();
        }
        news
    }

    /// Notes that a look showed its GPU, perhaps under another number. True when it is back and must be tested.
    pub fn appeared(&mut self, gpu: &Gpu) -> bool {
        self.device = SlotDevice::Gpu(gpu.clone());
        let back = self.health == Health::Missing;
        if back {
            self.health = Health::Testing;
        }
        back
    }

    fn quarantine(&mut self, why: String, now_unix_ms: i64) {
        self.back_off_ms = match self.back_off_ms {
            0 => BACK_OFF_MS,
            before => (before * 2).min(BACK_OFF_MS_MAX),
        };
        self.health = Health::Quarantined(now_unix_ms + self.back_off_ms as i64);
        self.reason = why;
    }

    /// Takes over what is known of this GPU from before the supervisor was rebuilt.
    pub fn remember(&mut self, record: &SlotRecord) {
        self.faults = record.faults;
        self.back_off_ms = record.back_off_ms;
        if let (SlotState::Quarantined, Some(until)) = (record.state, record.until_unix_ms) {
            self.health = Health::Quarantined(until);
            self.reason.clone_from(&record.reason);
        }
    }

    /// Why it takes no job, to follow "GPU 1, which ..."; `None` when it could.
    pub fn obstacle(&self) -> Option<String> {
        let colon = if self.reason.is_empty() { "" } else { ": " };
        match self.health {
            Health::Ready => match &self.claim {
                Claim::Ours => None,
                Claim::Unheard => Some("waits to hear from Redis whose it is".to_owned()),
                Claim::Foreign(machine) => Some(format!("belongs to the machine {machine}")),
            },
            Health::Testing => Some("is being tested".to_owned()),
            Health::Quarantined(until) => {
                Some(format!("is out of use until {}{colon}{}", rfc3339(until), self.reason))
            }
            Health::Missing => Some(format!("is missing{colon}{}", self.reason)),
        }
    }

    /// The slot as scheduling sees it.
    pub fn seat(&self, job: Option<&TaskId>) -> Seat {
        Seat {
            gpu: self.as_gpu().map(|gpu| gpu.number),
            name: self.name(),
            job: job.cloned(),
            obstacle: self.obstacle(),
            is_missing: self.health == Health::Missing,
            faults: self.faults,
            failed_seq: self.failed_seq,
        }
    }

    /// The slot as people see it.
    pub fn record(&self, job: Option<&TaskId>) -> SlotRecord {
        let (state, until_unix_ms) = match self.health {
            _ if job.is_some() => (SlotState::Busy, None),
            Health::Ready if self.claim != Claim::Ours => (SlotState::Standby, None),
            Health::Ready => (SlotState::Free, None),
            Health::Testing => (SlotState::Testing, None),
            Health::Quarantined(until) => (SlotState::Quarantined, Some(until)),
            Health::Missing => (SlotState::Missing, None),
        };
        let gpu = self.as_gpu();
        SlotRecord {
            name: self.name(),
            device: gpu.map_or("cpu".to_owned(), |gpu| format!("cuda:{}", gpu.number)),
            uuid: gpu.map(|gpu| gpu.uuid.clone()),
            model: gpu.map(|gpu| gpu.name.clone()),
            state,
            task_id: job.cloned(),
            reason: match &self.claim {
                Claim::Ours => self.reason.clone(),
                Claim::Unheard | Claim::Foreign(_) => self.obstacle().unwrap_or_default(),
            },
            faults: self.faults,
            back_off_ms: self.back_off_ms,
            until_unix_ms,
        }
    }
}

/// A slot as scheduling sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seat {
    /// Number of its GPU; `None` for the CPU.
    pub gpu: Option<usize>,
    /// Its name.
    pub name: String,
    /// Its job.
    pub job: Option<TaskId>,
    /// Why it takes no job although it has none.
    pub obstacle: Option<String>,
    /// Its GPU is not there any more.
    pub is_missing: bool,
    /// Faults of its GPU in a row.
    pub faults: u32,
    /// The job that met the last fault.
    pub failed_seq: Option<i64>,
}

/// What the last look for GPUs said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Looked {
    /// It has not ended yet.
    #[default]
    NotYet,
    /// It failed.
    Failed(String),
    /// It found what there is.
    Found {
        /// GPUs that are there and have no slot, with the reason.
        left_out: Vec<(usize, String)>,
        /// Why none can be used.
        obstacle: Option<String>,
    },
}

fn first_line(text: &str) -> &str {
    text.trim().lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(number: usize) -> Gpu {
        Gpu { number, uuid: format!("GPU-{number}"), name: "T".into(), memory_bytes: 1, refused: None }
    }

    fn ready(number: usize) -> Slot {
        let mut slot = Slot::gpu(gpu(number));
        assert!(slot.obstacle().is_some_and(|o| o == "is being tested") && slot.tested(None, 0));
        slot
    }

    #[test]
    fn three_faults_in_a_row_quarantine_and_success_forgives() {
        let mut slot = ready(1);
        for _ in 0..3 {
            assert!(slot.fault(7, "launch failed\nmore", 0) && slot.health == Health::Testing);
            assert!(slot.tested(None, 0) && slot.health == Health::Ready);
            assert!(slot.fault(7, "launch failed", 0));
            slot.tested(None, 0);
            slot.success();
            assert_eq!(slot.seat(None).faults, 0);
        }
        slot.fault(7, "one", 0);
        slot.tested(None, 0);
        slot.fault(8, "two", 0);
        slot.tested(None, 0);
        assert!(!slot.fault(9, "three", 1000), "no test now");
        assert_eq!(slot.health, Health::Quarantined(61_000));
        let obstacle = slot.obstacle().expect("out of use");
        assert_eq!(obstacle, "is out of use until 1970-01-01T00:01:01Z: 3 faults in a row, last: three");
        assert_eq!(slot.seat(None).failed_seq, Some(9));
    }

    #[test]
    fn the_back_off_doubles_up_to_an_hour_and_a_test_stands_at_its_end() {
        let mut slot = ready(0);
        for _ in 0..2 {
            slot.fault(1, "x", 0);
            slot.tested(None, 0);
        }
        slot.fault(1, "x", 0);
        let mut lengths = Vec::new();
        let mut now = 0;
        for round in 0..8 {
            let Health::Quarantined(until) = slot.health else { panic!("{slot:?}") };
            lengths.push((until - now) / 60_000);
            assert!(!slot.is_due(until - 1) && slot.is_due(until) && slot.health == Health::Testing);
            now = until;
            if round % 2 == 0 {
                assert!(slot.tested(Some("wrong numbers"), now), "a failed test doubles too");
            } else {
                assert!(slot.tested(None, now));
                assert!(!slot.fault(2, "x", now), "one more fault is enough");
            }
        }
        assert_eq!(lengths, [1, 2, 4, 8, 16, 32, 60, 60]);
    }

    #[test]
    fn a_gpu_may_vanish_and_return_under_another_number() {
        let mut slot = ready(2);
        assert!(slot.vanished("the driver shows GPU 0") && !slot.vanished("again"));
        assert_eq!(slot.obstacle().as_deref(), Some("is missing: the driver shows GPU 0"));
        assert!(!slot.fault(1, "gone", 0) && slot.health == Health::Missing);
        assert!(slot.appeared(&gpu(1)) && slot.health == Health::Testing && slot.name() == "GPU 1");
        assert!(slot.tested(None, 0) && !slot.tested(None, 0) && !slot.appeared(&gpu(1)));
    }

    #[test]
    fn a_rebuilt_supervisor_remembers_the_quarantine() {
        let mut slot = ready(0);
        slot.tested(None, 0);
        for _ in 0..3 {
            slot.health = Health::Ready;
            slot.fault(1, "x", 0);
        }
        let record = slot.record(None);
        assert_eq!(
            (record.state, record.until_unix_ms, record.device.as_str()),
            (SlotState::Quarantined, Some(60_000), "cuda:0")
        );
        let mut again = Slot::gpu(gpu(0));
        again.remember(&record);
        assert_eq!((again.health, again.obstacle()), (slot.health, slot.obstacle()));
        assert_eq!(slot.record(Some(&"a".parse().expect("valid"))).state, SlotState::Busy);
    }
}
