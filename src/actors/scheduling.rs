//! Who runs next: by priority, then by order, with ageing so that nobody waits for ever.

use std::cmp::Reverse;

use super::recovery::result_path;
use crate::adapters::queue::journal::Journal;
use crate::adapters::queue::{JobStore, QueueError};
use crate::job::record::JobRecord;
use crate::job::service::ServiceConfig;
use crate::job::state::JobState;

/// What one round of scheduling decided.
#[derive(Debug, Default)]
pub struct Round {
    /// Jobs moved to `preparing`; the supervisor starts their trainers.
    pub starts: Vec<JobRecord>,
    /// When the next waiting job becomes due, if one is held back.
    pub next_due_unix_ms: Option<i64>,
    /// Jobs that wait.
    pub waiting: usize,
}

/// Begins attempts for up to `free_slots` waiting jobs and gives the others the sentence that says why they wait.
///
/// # Errors
/// Those of the journal; attempts begun before the fault stay begun and are in no [`Round`], so the caller must treat
/// the journal as the truth (recovery does).
pub fn schedule(
    journal: &mut Journal,
    config: &ServiceConfig,
    free_slots: usize,
    now_unix_ms: i64,
) -> Result<Round, QueueError> {
    let active = journal.active()?;
    let running: Vec<&JobRecord> = active.iter().filter(|record| record.state.has_process()).collect();
    let mut waiting: Vec<&JobRecord> = active
        .iter()
        .filter(|record| matches!(record.state, JobState::Queued | JobState::Interrupted))
        .collect();
    waiting.sort_by_key(|record| (Reverse(class(record, config, now_unix_ms)), record.seq));
    let mut round = Round { waiting: waiting.len(), ..Round::default() };
    let mut held_back = Vec::new();
    for record in waiting {
        if record.not_before_unix_ms > now_unix_ms {
            let due = round.next_due_unix_ms.unwrap_or(i64::MAX).min(record.not_before_unix_ms);
            round.next_due_unix_ms = Some(due);
        } else if round.starts.len() < free_slots {
            // A result of an earlier attempt must be gone before this one counts, or recovery could take it for ours.
            remove_old_result(record);
            let resumed = if record.attempts > 0 { "continues from its last checkpoint" } else { "starts" };
            round.starts.push(journal.begin_attempt(record.seq, resumed)?);
            round.waiting -= 1;
        } else {
            held_back.push(record);
        }
    }
    let names: Vec<&str> = running
        .iter()
        .map(|record| &record.task_id)
        .chain(round.starts.iter().map(|record| &record.task_id))
        .map(|id| id.as_str())
        .take(4)
        .collect();
    let reason = format!(
        "waits for a free CPU slot ({} of {} busy: {})",
        names.len(),
        config.cpu_slots,
        names.join(", ")
    );
    let reasons: Vec<(i64, String)> = held_back
        .into_iter()
        .filter(|record| record.reason != reason)
        .map(|record| (record.seq, reason.clone()))
        .collect();
    if !reasons.is_empty() {
        journal.set_reasons(&reasons)?;
    }
    Ok(round)
}

/// Priority class of a waiting job: its own, plus one for every ageing time it has waited.
fn class(record: &JobRecord, config: &ServiceConfig, now_unix_ms: i64) -> i64 {
    let waited = (now_unix_ms - record.accepted_unix_ms).max(0);
    record.spec.priority as i64 + waited / config.ageing_ms.max(1)
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
mod tests {
    use super::*;
    use crate::job::record::{Change, NewJob};
    use crate::job::spec::JobSpec;

    fn add(journal: &mut Journal, config: &ServiceConfig, id: &str, priority: &str) -> JobRecord {
        let text = format!(
            "model: yolov8n\ntype: yolo\ntask_id: {id}\npriority: {priority}\ntempfile: /nowhere\ntrain: {{data: d}}\n"
        );
        let spec =
            JobSpec::load(text.as_bytes(), "t", &config.spec_context("/w".into())).expect("valid").spec;
        let run_dir = spec.run_dir();
        let new = NewJob {
            spec,
            source: "t".into(),
            content_sha256: "0".into(),
            run_dir,
            reason: "just came".into(),
        };
        journal.accept(new, None).expect("accepted")
    }

    fn ids(round: &Round) -> Vec<&str> {
        round.starts.iter().map(|record| record.task_id.as_str()).collect()
    }

    #[test]
    fn priority_then_order_and_a_reason_for_everyone() {
        let config = ServiceConfig::default();
        let mut journal = Journal::in_memory().expect("opens");
        for (id, priority) in [("low", "low"), ("m1", "medium"), ("m2", "medium"), ("high", "high")] {
            add(&mut journal, &config, id, priority);
        }
        let now = crate::job::clock::now_unix_ms();
        let mut order = Vec::new();
        for left in (0..4).rev() {
            let round = schedule(&mut journal, &config, 1, now).expect("schedules");
            assert_eq!((round.starts.len(), round.waiting), (1, left));
            let id = ids(&round)[0].to_owned();
            for record in
                journal.active().expect("reads").iter().filter(|record| record.state == JobState::Queued)
            {
                assert_eq!(record.reason, format!("waits for a free CPU slot (1 of 1 busy: {id})"));
            }
            let again = schedule(&mut journal, &config, 0, now).expect("schedules");
            assert!(again.starts.is_empty());
            journal.change(round.starts[0].seq, Change::to(JobState::Completed, "done")).expect("legal");
            order.push(id);
        }
        assert_eq!(order, ["high", "m1", "m2", "low"]);
    }

    #[test]
    fn waiting_makes_important_and_back_off_holds() {
        let config = ServiceConfig { ageing_ms: 1000, ..ServiceConfig::default() };
        let mut journal = Journal::in_memory().expect("opens");
        let low = add(&mut journal, &config, "low", "low");
        // The others come later, as far as ageing counts.
        let now = low.accepted_unix_ms + 2500;
        let config_now = ServiceConfig { ageing_ms: 2000, ..config };
        let high = add(&mut journal, &config_now, "high", "high");
        let round = schedule(&mut journal, &config_now, 1, high.accepted_unix_ms).expect("schedules");
        assert_eq!(ids(&round), ["high"]);
        journal.retry(high.seq, crate::job::state::FailureClass::Killed, "later", now + 500).expect("legal");
        let round = schedule(&mut journal, &config_now, 2, now).expect("schedules");
        assert_eq!(ids(&round), ["low"]);
        assert_eq!(round.next_due_unix_ms, Some(now + 500));
        let round = schedule(&mut journal, &config_now, 1, now + 500).expect("schedules");
        assert_eq!(ids(&round), ["high"]);
        assert_eq!(round.starts[0].attempts, 2);
    }

    #[test]
    fn ten_jobs_on_one_slot_run_in_the_order_they_came() {
        let config = ServiceConfig::default();
        let mut journal = Journal::in_memory().expect("opens");
        for index in 0..10 {
            add(&mut journal, &config, &format!("j{index}"), "medium");
        }
        for index in 0..10 {
            let round =
                schedule(&mut journal, &config, 1, crate::job::clock::now_unix_ms()).expect("schedules");
            assert_eq!(ids(&round), [format!("j{index}")]);
            journal.change(round.starts[0].seq, Change::to(JobState::Completed, "done")).expect("legal");
        }
    }
}
