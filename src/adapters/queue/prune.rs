//! What the journal forgets: jobs that ended long ago with their history, and verdicts on files that are gone.
//!
//! A verdict on a file is what keeps the file from running again, so it outlives its job for as long as the file lies
//! there; whether it does, the caller looks up, away from the journal's thread.

use std::path::PathBuf;

use rusqlite::params;

use super::QueueError;
use super::journal::{Journal, begin, sql};
use super::statements::Kept;

/// Jobs, or verdicts, of one call.
pub const ROWS_MAX: usize = 200;
/// Entries of histories after which a call ends, with the job in hand.
const EVENTS_MAX: usize = 5_000;

/// A verdict whose job is not known any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OldVerdict {
    /// Its place, growing.
    pub id: i64,
    /// The file.
    pub path: PathBuf,
}

impl Journal {
    /// Removes a batch of the jobs that ended before `before_unix_ms` and of which nothing waits in the outbox, each with its
    /// history, those first that ended first. Returns how many; 0 means that there are no more.
    ///
    /// # Errors
    /// When they cannot be removed; none is then.
    pub fn prune_jobs(&mut self, before_unix_ms: i64) -> Result<usize, QueueError> {
        let what = "forget old jobs";
        let failed = sql(what);
        let transaction = begin(self.writer(false), what)?;
        let old: Vec<i64> = {
            let text = "SELECT seq FROM jobs INDEXED BY jobs_by_end WHERE finished < ?1 \
                 AND state IN ('completed', 'failed', 'cancelled', 'moved') \
                 AND NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.instance = jobs.instance) \
                 ORDER BY finished LIMIT ?2";
            let mut statement = transaction.prepare_cached(text).map_err(&failed)?;
            let rows = statement
                .query_map(params![before_unix_ms, ROWS_MAX as i64], |row| row.get(0))
                .map_err(&failed)?;
            rows.collect::<Result<_, _>>().map_err(&failed)?
        };
        let (mut jobs, mut events) = (0, 0);
        for seq in old {
            events += transaction.run("DELETE FROM events WHERE seq = ?1", [seq]).map_err(&failed)?;
            jobs += transaction.run("DELETE FROM jobs WHERE seq = ?1", [seq]).map_err(&failed)?;
            if events >= EVENTS_MAX {
                break;
            }
        }
        transaction.commit().map_err(failed)?;
        Ok(jobs)
    }

    /// Up to [`ROWS_MAX`] verdicts after the place `after_id` that are older than `before_unix_ms` and whose job, if they made
    /// one, is not known any more.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn old_verdicts(&self, after_id: i64, before_unix_ms: i64) -> Result<Vec<OldVerdict>, QueueError> {
        let failed = sql("read old verdicts");
        let text = "SELECT rowid, path FROM intake WHERE rowid > ?1 AND at < ?2 \
             AND NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.task_id = intake.task_id) ORDER BY rowid LIMIT ?3";
        let mut statement = self.connection.prepare_cached(text).map_err(&failed)?;
        let rows = statement
            .query_map(params![after_id, before_unix_ms, ROWS_MAX as i64], |row| {
                Ok(OldVerdict { id: row.get(0)?, path: row.get::<_, String>(1)?.into() })
            })
            .map_err(&failed)?;
        rows.map(|row| row.map_err(&failed)).collect()
    }

    /// Removes verdicts. One that was written again since then has another place and stays.
    ///
    /// # Errors
    /// When they cannot be removed; none is then.
    pub fn prune_verdicts(&mut self, ids: &[i64]) -> Result<(), QueueError> {
        let what = "forget old verdicts";
        let failed = sql(what);
        let transaction = begin(self.writer(false), what)?;
        for id in ids {
            transaction
                .prepare_cached("DELETE FROM intake WHERE rowid = ?1")
                .and_then(|mut statement| statement.execute([id]))
                .map_err(&failed)?;
        }
        transaction.commit().map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::queue::JobStore;
    use crate::adapters::queue::contract::new_job;
    use crate::job::delivery::{DeliveryBody, EpochBody, NewDelivery, RunRef, SinkName};
    use crate::job::record::{Change, IntakeEntry, JobRecord};
    use crate::job::state::JobState;

    const OLD: i64 = 1_000;

    /// A job that ended at `finished_unix_ms`, from a file of its name.
    fn ended(journal: &mut Journal, id: &str, finished_unix_ms: i64) -> JobRecord {
        let entry = IntakeEntry {
            path: format!("/c/{id}.yaml"),
            content_sha256: "1".into(),
            modified_unix_ms: 1,
            accepted: true,
            task_id: Some(id.parse().expect("valid")),
            verdict: "{}".into(),
            at_unix_ms: finished_unix_ms,
        };
        let record = journal.accept(new_job(id), Some(entry)).expect("accepted");
        journal.add_event(record.seq, "note", &serde_json::json!({"a": 1})).expect("stored");
        let record = journal.change(record.seq, Change::to(JobState::Cancelled, "enough")).expect("legal");
        let text = "UPDATE jobs SET finished = ?2 WHERE seq = ?1";
        journal.connection.execute(text, [record.seq, finished_unix_ms]).expect("aged");
        record
    }

    fn count(journal: &Journal, table: &str) -> i64 {
        let text = format!("SELECT count(*) FROM {table}");
        journal.connection.query_row(&text, [], |row| row.get(0)).expect("reads")
    }

    #[test]
    fn what_ended_long_ago_is_forgotten_and_nothing_else() {
        let mut journal = Journal::in_memory().expect("opens");
        let gone = ended(&mut journal, "gone", OLD);
        let young = ended(&mut journal, "young", OLD + 10);
        let told = ended(&mut journal, "told", OLD);
        let active = journal.accept(new_job("active"), None).expect("accepted");
        let run = RunRef { task_id: told.task_id.clone(), ..RunRef::sample(&told.instance) };
        let body = EpochBody { run, epoch: 1, metrics: serde_json::Map::new(), at_unix_ms: 1 };
        let waits = NewDelivery {
            sink: SinkName::Redis,
            lane: told.instance.clone(),
            key: "k".into(),
            may_be_dropped: false,
            hold_ms: 0,
            body: DeliveryBody::EpochMetrics(body),
        };
        journal.put_samples(&told.instance, vec![waits]).expect("stored");
        assert_eq!(journal.old_verdicts(0, OLD + 5).expect("reads"), [], "their jobs are known");

        assert_eq!(journal.prune_jobs(OLD + 5).expect("forgets"), 1);
        assert_eq!(journal.prune_jobs(OLD + 5).expect("forgets"), 0);
        assert!(matches!(journal.record(gone.seq), Err(QueueError::Unknown { .. })));
        assert_eq!(journal.events(gone.seq, 0, 10).expect("reads"), []);
        for kept in [&young, &told, &active] {
            assert_eq!(&journal.record(kept.seq).expect("is there").task_id, &kept.task_id);
            assert!(!journal.events(kept.seq, 0, 10).expect("reads").is_empty());
        }
        // The verdict stays until somebody has looked whether the file is gone.
        let old = journal.old_verdicts(0, OLD + 5).expect("reads");
        assert_eq!(old.iter().map(|old| old.path.to_str()).collect::<Vec<_>>(), [Some("/c/gone.yaml")]);
        assert_eq!(journal.old_verdicts(old[0].id, OLD + 5).expect("reads"), []);
        assert!(journal.intake("/c/gone.yaml", "1").expect("reads").is_some());
        journal.prune_verdicts(&[old[0].id]).expect("forgets");
        assert!(journal.intake("/c/gone.yaml", "1").expect("reads").is_none());
        assert_eq!(count(&journal, "intake"), 2);
        // What was told goes with the next call.
        let due = journal.due(SinkName::Redis, i64::MAX, 9).expect("reads");
        journal.delivered(&[due[0].id]).expect("removes");
        assert_eq!(journal.prune_jobs(OLD + 5).expect("forgets"), 1);
        assert_eq!(journal.accept(new_job("gone"), None).expect("accepted").generation, 1);
    }

    #[test]
    fn one_call_takes_a_batch() {
        let mut journal = Journal::in_memory().expect("opens");
        for number in 0..ROWS_MAX + 10 {
            ended(&mut journal, &format!("job-{number}"), OLD + number as i64);
        }
        assert_eq!(journal.prune_jobs(i64::MAX).expect("forgets"), ROWS_MAX);
        assert_eq!((count(&journal, "jobs"), count(&journal, "events")), (10, 30));
        assert_eq!(journal.recent(1).expect("reads")[0].task_id.as_str(), "job-209", "the oldest went first");
        assert_eq!(journal.old_verdicts(0, i64::MAX).expect("reads").len(), ROWS_MAX);
        assert_eq!(journal.prune_jobs(i64::MAX).expect("forgets"), 10);
    }
}
