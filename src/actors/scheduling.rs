//! Who runs next and where: by priority, then by order, with ageing so that nobody waits for ever; on the device that
//! the job names, else on a GPU, else on the CPU.

use std::cmp::Reverse;

use super::recovery::result_path;
use super::slots::{Looked, Seat};
use crate::adapters::queue::journal::Journal;
use crate::adapters::queue::{JobStore, QueueError};
use crate::job::record::{Change, JobRecord, WaitingJob};
use crate::job::service::ServiceConfig;
use crate::job::state::{FailureClass, JobState};
use crate::train::args::Device;
use crate::train::child::JobMode;

/// A job and the slot that it gets.
#[derive(Debug, PartialEq)]
pub struct Placement {
    /// Index of the seat.
    pub seat: usize,
    /// The job, moved to `preparing`.
    pub record: JobRecord,
}

/// What one round of scheduling decided.
#[derive(Debug, Default)]
pub struct Round {
    /// Jobs whose trainers the supervisor starts.
    pub starts: Vec<Placement>,
    /// Jobs that can never run here, failed as `config`.
    pub refused: Vec<JobRecord>,
    /// When the next waiting job becomes due, if one is held back.
    pub next_due_unix_ms: Option<i64>,
    /// Jobs that wait.
    pub waiting: usize,
}

/// Waiting jobs that get a sentence of their own in each round; those further back are told that they are.
const REASONS_MAX: usize = 16;

/// What holds jobs back beside seats.
#[derive(Debug, Clone, Default)]
pub struct Gate {
    /// Jobs of the shared queue wait, with this sentence: it is not known yet whose they are.
    pub shared: Option<String>,
}

/// Begins attempts of waiting jobs on free seats and gives the others the sentence that says why they wait.
///
/// # Errors
/// Those of the journal; attempts begun before the fault stay begun and are in no [`Round`], so the caller must treat
/// the journal as the truth (recovery does).
pub fn schedule(
    journal: &mut Journal,
    config: &ServiceConfig,
    seats: Vec<Seat>,
    looked: &Looked,
    gate: &Gate,
    now_unix_ms: i64,
) -> Result<Round, QueueError> {
    let mut waiting = journal.waiting()?;
    waiting.sort_by_key(|record| (Reverse(class(record, config, now_unix_ms)), record.seq));
    let mut round = Round { waiting: waiting.len(), ..Round::default() };
    let mut seats = seats;
    let mut held_back = Vec::new();
    for record in &waiting {
        if let Some(reason) = gate.shared.as_ref().filter(|_| record.is_shared) {
            held_back.push((record, Held::Said(reason.clone())));
            continue;
        }
        if record.not_before_unix_ms > now_unix_ms {
            let due = round.next_due_unix_ms.unwrap_or(i64::MAX).min(record.not_before_unix_ms);
            round.next_due_unix_ms = Some(due);
            continue;
        }
        match places(record.wanted.device, record.wanted.requires_gpu, &seats, looked) {
            Places::Never(reason) => {
                let change = Change::to(JobState::Failed, reason).with_class(FailureClass::Config);
                round.refused.push(journal.change(record.seq, change)?);
                round.waiting -= 1;
            }
            Places::Later(reason) => held_back.push((record, Held::Said(reason))),
            Places::These(candidates) => match best(&candidates, &seats, record.seq) {
                Some(seat) => {
                    // A result of an earlier attempt must be gone before this one counts, or recovery could take it
                    // for ours.
                    let before = journal.record(record.seq)?;
                    remove_old_result(&before);
                    let resumed = match (before.attempts_all(), before.spec.mode) {
                        (0, _) => "starts",
                        (_, JobMode::Train) => "continues from its last checkpoint",
                        (_, JobMode::Evaluate) => "starts again",
                    };
                    let place =
                        seats[seat].gpu.map_or(String::new(), |_| format!(" on {}", seats[seat].name));
                    let record = journal.begin_attempt(record.seq, &format!("{resumed}{place}"))?;
                    seats[seat].job = Some(record.task_id.clone());
                    round.starts.push(Placement { seat, record });
                    round.waiting -= 1;
                }
                None => held_back.push((record, Held::For(candidates))),
            },
        }
    }
    // Only now are all starts known that the sentences name.
    let reasons: Vec<(i64, String)> = held_back
        .into_iter()
        .enumerate()
        .map(|(place, (record, held))| match held {
            // A sentence that changes with every start would be written thousands of times in a long queue.
            _ if place >= REASONS_MAX => (record, format!("waits behind {REASONS_MAX} jobs and more")),
            Held::Said(reason) => (record, reason),
            Held::For(candidates) => (record, waits_for(&candidates, &seats)),
        })
        .filter(|(record, reason)| record.reason != *reason)
        .map(|(record, reason)| (record.seq, reason))
        .collect();
    if !reasons.is_empty() {
        journal.set_reasons(&reasons)?;
    }
    Ok(round)
}

/// Why a job is held back.
enum Held {
    /// A sentence.
    Said(String),
    /// None of these seats is free.
    For(Vec<usize>),
}

/// Where a job may go.
enum Places {
    /// To one of these seats, of which there is at least one.
    These(Vec<usize>),
    /// Not yet to any, for this reason.
    Later(String),
    /// Nowhere, for this reason.
    Never(String),
}

/// Where a job may go that asks for this device. A job that asks for none takes a GPU; the CPU only where no GPU has a
/// slot, and not even then when the job requires a GPU.
fn places(device: Device, requires_gpu: bool, seats: &[Seat], looked: &Looked) -> Places {
    let with = |wanted: &dyn Fn(&Seat) -> bool| -> Vec<usize> {
        seats.iter().enumerate().filter(|(_, seat)| wanted(seat)).map(|(index, _)| index).collect()
    };
    let cpu = with(&|seat| seat.gpu.is_none());
    match device {
        Device::Cpu if cpu.is_empty() => Places::Never(
            "the CPU was asked for: this service has no CPU slots (`slots.cpu` is 0)".to_owned(),
        ),
        Device::Cpu => Places::These(cpu),
        Device::Cuda(number) => {
            let named = with(&|seat| seat.gpu == Some(number));
            let present: Vec<usize> =
                named.iter().copied().filter(|&index| !seats[index].is_missing).collect();
            match (present.is_empty(), named.is_empty()) {
                (false, _) => Places::These(present),
                (true, false) => Places::These(named),
                (true, true) => absent(number, seats, looked),
            }
        }
        Device::Default => {
            let gpus = with(&|seat| seat.gpu.is_some());
            match looked {
                _ if !gpus.is_empty() => Places::These(gpus),
                Looked::NotYet => Places::Later("waits for the first look for GPUs".to_owned()),
                _ if !cpu.is_empty() && !requires_gpu => Places::These(cpu),
                Looked::Failed(why) => Places::Later(format!("waits for a GPU: {why}")),
                Looked::Found { obstacle, .. } => {
                    let why = obstacle.as_deref().unwrap_or("this service uses none of those that are here");
                    Places::Later(format!("waits for a GPU: {why}"))
                }
            }
        }
    }
}

/// What becomes of a job that names a GPU without a slot.
fn absent(number: usize, seats: &[Seat], looked: &Looked) -> Places {
    let asked = format!("cuda:{number} was asked for");
    match looked {
        Looked::NotYet => Places::Later("waits for the first look for GPUs".to_owned()),
        Looked::Failed(why) => Places::Later(format!("waits for GPU {number}: {why}")),
        Looked::Found { left_out, obstacle } => {
            let own = left_out.iter().find(|(found, _)| *found == number).map(|(_, why)| why.clone());
            Places::Never(match own.or_else(|| obstacle.clone()) {
                Some(why) => format!("{asked}: {why}"),
                None => {
                    let names: Vec<&str> = seats
                        .iter()
                        .filter(|seat| seat.gpu.is_some())
                        .map(|seat| seat.name.as_str())
                        .collect();
                    let names = if names.is_empty() { "no GPU".to_owned() } else { names.join(", ") };
                    format!("{asked}: this service has {names}")
                }
            })
        }
    }
}

/// The free seat for a job: rather not the one on which it met a fault, then the one with the fewest faults, then the
/// first.
fn best(candidates: &[usize], seats: &[Seat], seq: i64) -> Option<usize> {
    let free =
        candidates.iter().filter(|&&index| seats[index].job.is_none() && seats[index].obstacle.is_none());
    free.min_by_key(|&&index| (seats[index].failed_seq == Some(seq), seats[index].faults, index)).copied()
}

/// Names of jobs that a sentence holds.
const NAMES_MAX: usize = 4;

/// The sentence of a job that none of these seats has room for.
fn waits_for(candidates: &[usize], seats: &[Seat]) -> String {
    let seats: Vec<&Seat> = candidates.iter().map(|&index| &seats[index]).collect();
    let is_gpu = seats.first().is_some_and(|seat| seat.gpu.is_some());
    if let ([seat], true) = (seats.as_slice(), is_gpu) {
        let does = match (&seat.job, &seat.obstacle) {
            (Some(job), _) => format!("trains {job}"),
            (None, Some(obstacle)) => obstacle.clone(),
            (None, None) => "becomes free".to_owned(),
        };
        return format!("waits for {}, which {does}", seat.name);
    }
    let busy: Vec<&str> = seats.iter().filter_map(|seat| seat.job.as_ref()).map(|job| job.as_str()).collect();
    let names = busy.iter().take(NAMES_MAX).copied().collect::<Vec<_>>().join(", ");
    let what = if is_gpu { "GPU" } else { "CPU slot" };
    let mut parts = Vec::new();
    if !busy.is_empty() {
        parts.push(format!("{} of {} busy: {names}", busy.len(), seats.len()));
    }
    let out = seats.iter().filter(|seat| seat.job.is_none());
    parts.extend(out.filter_map(|seat| Some(format!("{} {}", seat.name, seat.obstacle.as_ref()?))));
    format!("waits for a free {what} ({})", parts.join("; "))
}

/// Priority class of a waiting job: its own, plus one for every ageing time it has waited.
fn class(record: &WaitingJob, config: &ServiceConfig, now_unix_ms: i64) -> i64 {
    let waited = (now_unix_ms - record.accepted_unix_ms).max(0);
    record.priority as i64 + waited / config.ageing_ms.max(1)
}

fn remove_old_result(record: &JobRecord) {
    let path = result_path(&record.run_dir);
    if let Err(error) = std::fs::remove_file(&path)
        && error.kind() != std::io::ErrorKind::NotFound
        && error.kind() != std::io::ErrorKind::NotADirectory
    {
        // The attempt number in the file keeps it from being taken for the new one's.
        tracing::warn!(task_id = %record.task_id, %error, "cannot remove the old result {}", path.display());
    }
}

#[cfg(test)]
mod tests;
