//! Rows to records and back.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use rusqlite::Row;

use super::QueueError;
use crate::job::event::JobEvent;
use crate::job::record::{IntakeEntry, JobRecord, ProcessId, WaitingJob};
use crate::job::spec::{JobSpec, Priority};
use crate::job::state::{FailureClass, JobState};

/// Columns of a job, in the order that [`job`] reads them.
pub(super) const JOB_COLUMNS: &str = "seq, task_id, generation, source, content_sha256, spec, run_dir, state, reason, \
    class, attempts, retries, interruptions, not_before, accepted, started, finished, pid, pid_started, result, progress, instance, entry, \
    fence, attempts_before, notes";

/// Columns of a verdict, in the order that [`intake`] reads them.
pub(super) const INTAKE_COLUMNS: &str = "path, content_sha256, modified, accepted, task_id, verdict, at";

/// A row whose texts are still to be parsed: what SQLite gives and what the record needs fail differently.
pub(super) type Parsed<T> = Result<T, QueueError>;

fn json<T: serde::de::DeserializeOwned>(text: &str, what: &'static str) -> Parsed<T> {
    serde_json::from_str(text).map_err(|source| QueueError::Decode { what, source: Some(source) })
}

/// Specifications that a thread keeps, and the longest text of one, bytes.
const SPECS_MAX: usize = 64;
const SPEC_BYTES_MAX: usize = 64 << 10;

/// The specification in a text. A record is read at each of its moves, and its specification is most of it: what was read
/// of late is not parsed again.
fn specification(text: String) -> Parsed<Arc<JobSpec>> {
    thread_local! {
        static READ: RefCell<HashMap<String, Arc<JobSpec>>> = RefCell::default();
    }
    READ.with_borrow_mut(|read| {
        if let Some(spec) = read.get(&text) {
            return Ok(spec.clone());
        }
        let spec: Arc<JobSpec> = Arc::new(json(&text, "job specification")?);
        if read.len() >= SPECS_MAX {
            read.clear();
        }
        if text.len() <= SPEC_BYTES_MAX {
            read.insert(text, spec.clone());
        }
        Ok(spec)
    })
}

fn optional_json(text: Option<String>, what: &'static str) -> Parsed<Option<serde_json::Value>> {
    text.map(|text| json(&text, what)).transpose()
}

fn missing<T>(value: Option<T>, what: &'static str) -> Parsed<T> {
    value.ok_or(QueueError::Decode { what, source: None })
}

pub(super) fn job(row: &Row<'_>) -> rusqlite::Result<Parsed<JobRecord>> {
    let task_id: String = row.get(1)?;
    let spec: String = row.get(5)?;
    let run_dir: String = row.get(6)?;
    let state: String = row.get(7)?;
    let class: Option<String> = row.get(9)?;
    let retries: String = row.get(11)?;
    let (pid, started_ticks): (Option<i64>, Option<i64>) = (row.get(17)?, row.get(18)?);
    let (result, progress): (Option<String>, Option<String>) = (row.get(19)?, row.get(20)?);
    let (instance, entry, notes): (String, Option<String>, String) =
        (row.get(21)?, row.get(22)?, row.get(25)?);
    let (fence, attempts_before): (i64, u32) = (row.get(23)?, row.get(24)?);
    let plain = (row.get(0)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(8)?, row.get(10)?);
    let times = (row.get(13)?, row.get(14)?, row.get(15)?, row.get(16)?);
    let interruptions = row.get(12)?;
    let (seq, generation, source, content_sha256, reason, attempts) = plain;
    let (not_before_unix_ms, accepted_unix_ms, started_unix_ms, finished_unix_ms) = times;
    let parse = || -> Parsed<JobRecord> {
        let retries: BTreeMap<FailureClass, u32> = json(&retries, "count of retries")?;
        Ok(JobRecord {
            seq,
            task_id: missing(task_id.parse().ok(), "task id")?,
            generation,
            source,
            content_sha256,
            spec: specification(spec)?,
            run_dir: run_dir.into(),
            state: missing(JobState::parse(&state), "state")?,
            reason,
            class: match class {
                Some(word) => Some(missing(FailureClass::parse(&word), "failure class")?),
                None => None,
            },
            attempts,
            retries,
            interruptions,
            not_before_unix_ms,
            accepted_unix_ms,
            started_unix_ms,
            finished_unix_ms,
            process: match (pid, started_ticks) {
                (Some(pid), Some(ticks)) => Some(ProcessId { pid: pid as u32, started_ticks: ticks as u64 }),
                _ => None,
            },
            result: optional_json(result, "result")?,
            progress: optional_json(progress, "progress")?,
            instance,
            entry: entry.map(|text| json(&text, "queue entry")).transpose()?,
            fence: fence as u64,
            attempts_before,
            notes: json(&notes, "notes")?,
        })
    };
    Ok(parse())
}

pub(super) fn waiting(row: &Row<'_>) -> rusqlite::Result<Parsed<WaitingJob>> {
    let (seq, task_id, priority): (i64, String, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
    let (accepted_unix_ms, not_before_unix_ms) = (row.get(3)?, row.get(4)?);
    let (wanted, reason, is_shared): (String, String, bool) = (row.get(5)?, row.get(6)?, row.get(7)?);
    let parse = || -> Parsed<WaitingJob> {
        Ok(WaitingJob {
            seq,
            task_id: missing(task_id.parse().ok(), "task id")?,
            priority: match priority {
                ..=0 => Priority::Low,
                1 => Priority::Medium,
                _ => Priority::High,
            },
            accepted_unix_ms,
            not_before_unix_ms,
            wanted: json(&wanted, "wanted device")?,
            reason,
            is_shared,
        })
    };
    Ok(parse())
}

pub(super) fn event(row: &Row<'_>) -> rusqlite::Result<Parsed<JobEvent>> {
    let detail: String = row.get(4)?;
    let (id, seq, at_unix_ms, kind) = (row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?);
    Ok(json(&detail, "event").map(|detail| JobEvent { id, seq, at_unix_ms, kind, detail }))
}

pub(super) fn intake(row: &Row<'_>) -> rusqlite::Result<Parsed<IntakeEntry>> {
    let task_id: Option<String> = row.get(4)?;
    let entry = IntakeEntry {
        path: row.get(0)?,
        content_sha256: row.get(1)?,
        modified_unix_ms: row.get(2)?,
        accepted: row.get(3)?,
        task_id: None,
        verdict: row.get(5)?,
        at_unix_ms: row.get(6)?,
    };
    let task_id = match task_id {
        Some(text) => match text.parse() {
            Ok(id) => Some(id),
            Err(_) => return Ok(Err(QueueError::Decode { what: "task id", source: None })),
        },
        None => None,
    };
    Ok(Ok(IntakeEntry { task_id, ..entry }))
}
