//! What the journal knows of the jobs that other machines may ask about, and how many jobs there are.

use std::collections::BTreeMap;

use super::journal::{Journal, sql};
use super::{QueueError, rows};
use crate::job::ids::TaskId;
use crate::job::record::JobRecord;

/// Records read at once, those that have not ended first.
const HELD_MAX: u32 = 10_000;

impl Journal {
    /// Records that came from a queue that machines share and that are this machine's there: those that have not ended, in
    /// order of acceptance, then those that have while their result waits in the outbox.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn held_shared(&self) -> Result<Vec<JobRecord>, QueueError> {
        let failed = sql("read the shared jobs");
        // The key of a result is `result:` and the instance; the two bounds let the index find them.
        let text = format!(
            "SELECT {columns} FROM jobs WHERE entry IS NOT NULL AND seq IN ( \
             SELECT seq FROM jobs INDEXED BY active_jobs \
             WHERE state NOT IN ('completed', 'failed', 'cancelled', 'moved') \
             UNION ALL SELECT jobs.seq FROM outbox JOIN jobs ON jobs.instance = substr(outbox.key, 8) \
             WHERE outbox.sink = 'redis' AND outbox.key >= 'result:' AND outbox.key < 'result;' \
             AND jobs.state IN ('completed', 'failed', 'cancelled')) \
             ORDER BY state IN ('completed', 'failed', 'cancelled'), seq LIMIT ?1",
            columns = rows::JOB_COLUMNS
        );
        let mut statement = self.connection.prepare_cached(&text).map_err(&failed)?;
        let found = statement.query_map([HELD_MAX], rows::job).map_err(&failed)?;
        found.map(|row| row.map_err(&failed)?).collect()
    }

    /// Task ids of records that are not terminal.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn active_ids(&self) -> Result<Vec<TaskId>, QueueError> {
        let failed = sql("read the active jobs");
        let text = "SELECT task_id FROM jobs WHERE state NOT IN ('completed', 'failed', 'cancelled', 'moved') ORDER BY seq";
        let mut statement = self.connection.prepare_cached(text).map_err(&failed)?;
        let rows = statement.query_map([], |row| row.get::<_, String>(0)).map_err(&failed)?;
        let mut ids = Vec::new();
        for row in rows {
            let text = row.map_err(&failed)?;
            ids.push(text.parse().map_err(|_| QueueError::Decode { what: "task id", source: None })?);
        }
        Ok(ids)
    }

    /// Records by state.
    ///
    /// # Errors
    /// When they cannot be counted.
    pub fn counts(&self) -> Result<BTreeMap<String, u64>, QueueError> {
        let failed = sql("count its jobs");
        let mut statement = self
            .connection
            .prepare_cached("SELECT state, count(*) FROM jobs GROUP BY state")
            .map_err(&failed)?;
        let rows = statement
            .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)? as u64)))
            .map_err(&failed)?;
        rows.map(|row| row.map_err(&failed)).collect()
    }

    /// Instances of the records that are not terminal, and of those that a delivery still waits about.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn live_instances(&self) -> Result<Vec<String>, QueueError> {
        let failed = sql("read the live instances");
        let text = "SELECT instance FROM jobs WHERE state NOT IN ('completed', 'failed', 'cancelled', 'moved') \
             UNION SELECT instance FROM outbox";
        let mut statement = self.connection.prepare_cached(text).map_err(&failed)?;
        let rows = statement.query_map([], |row| row.get(0)).map_err(&failed)?;
        rows.map(|row| row.map_err(&failed)).collect()
    }

    /// Waiting records that could be started now, were there slots.
    ///
    /// # Errors
    /// When they cannot be counted.
    pub fn count_due(&self, now_unix_ms: i64) -> Result<usize, QueueError> {
        let text = "SELECT count(*) FROM jobs WHERE state IN ('queued', 'interrupted') AND not_before <= ?1";
        let mut statement = self.connection.prepare_cached(text).map_err(sql("count its jobs"))?;
        let count: i64 =
            statement.query_row([now_unix_ms], |row| row.get(0)).map_err(sql("count its jobs"))?;
        Ok(count.max(0) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::queue::JobStore;
    use crate::adapters::queue::contract::new_job;
    use crate::job::delivery::{DeliveryBody, NewDelivery, QueueEntry, ResultBody, RunRef, SinkName};
    use crate::job::record::{Change, SharedJob};
    use crate::job::state::JobState;

    fn take(journal: &mut Journal, id: &str) -> JobRecord {
        let entry = QueueEntry { queue: "q".into(), id: format!("{id}-0"), is_list: false };
        let instance = format!("q/{id}-0");
        let shared = SharedJob { instance, entry, fence: 5, attempts_before: 0 };
        let mut job = new_job(id);
        job.shared = Some(shared);
        journal.accept(job, None).expect("accepted")
    }

    fn result(record: &JobRecord) -> NewDelivery {
        let run = RunRef {
            task_id: record.task_id.clone(),
            instance: record.instance.clone(),
            study_name: "s".into(),
            version: None,
            trial_number: 1,
            kind: "yolo".into(),
            run_dir: "/r".into(),
            fence: 5,
            machine_id: "m".into(),
        };
        NewDelivery {
            sink: SinkName::Redis,
            lane: record.instance.clone(),
            key: format!("result:{}", record.instance),
            may_be_dropped: false,
            hold_ms: 0,
            body: DeliveryBody::Result(ResultBody { run, message: serde_json::json!({}), entry: None }),
        }
    }

    #[test]
    fn a_shared_job_is_held_until_its_result_is_out() {
        let mut journal = Journal::in_memory().expect("opens");
        let [told, waits, moved, runs] = ["told", "waits", "moved", "runs"].map(|id| take(&mut journal, id));
        journal.accept(new_job("own"), None).expect("accepted");
        for record in [&told, &waits] {
            journal.change(record.seq, Change::to(JobState::Cancelled, "enough")).expect("legal");
        }
        for record in [&waits, &moved, &runs] {
            journal.put_samples(&record.instance, vec![result(record)]).expect("stored");
        }
        journal.change(moved.seq, Change::to(JobState::Moved, "elsewhere")).expect("legal");
        let held = |journal: &Journal| -> Vec<i64> {
            journal.held_shared().expect("reads").iter().map(|record| record.seq).collect()
        };
        assert_eq!(held(&journal), [runs.seq, waits.seq], "what runs comes first");
        let due = journal.due(SinkName::Redis, i64::MAX, 9).expect("reads");
        let made: Vec<i64> = due.iter().map(|delivery| delivery.id).collect();
        journal.delivered(&made).expect("removes");
        assert_eq!(held(&journal), [runs.seq]);
    }

    #[test]
    fn a_later_run_of_a_task_has_a_later_number_also_when_the_clock_was_set_back() {
        let mut journal = Journal::in_memory().expect("opens");
        let first = journal.accept(new_job("a"), None).expect("accepted");
        assert!(first.fence >= first.accepted_unix_ms as u64 && first.fence > 0);
        let hour_ahead = first.fence + 3_600_000;
        journal.set_fence(first.seq, hour_ahead).expect("stored");
        journal.change(first.seq, Change::to(JobState::Cancelled, "enough")).expect("legal");
        assert_eq!(journal.accept(new_job("a"), None).expect("accepted").fence, hour_ahead + 1);
    }
}
