//! What of the outbox may be delivered now.
//!
//! Lanes are walked from one to the next by the index `(sink, lane, id)`, so that a look costs what there are lanes, not
//! what waits in them: an outage may leave a hundred thousand deliveries in a few.

use rusqlite::params;

use super::QueueError;
use super::journal::{Journal, sql};
use crate::job::delivery::{Delivery, DeliveryBody, SinkName};

/// Deliveries of one lane that are handed out at once.
const LANE_MAX: u32 = 64;

/// The lanes of the sink `?1`, and `NULL` after the last.
const LANES: &str = "WITH RECURSIVE lanes (lane) AS ( \
    SELECT (SELECT lane FROM outbox WHERE sink = ?1 ORDER BY lane LIMIT 1) \
    UNION ALL SELECT (SELECT lane FROM outbox WHERE sink = ?1 AND lane > lanes.lane ORDER BY lane LIMIT 1) \
    FROM lanes WHERE lanes.lane IS NOT NULL) ";

/// The first delivery of each of [`LANES`], as `first`.
const FIRSTS: &str = "FROM lanes CROSS JOIN outbox AS first ON first.id = \
    (SELECT id FROM outbox WHERE sink = ?1 AND lane = lanes.lane ORDER BY id LIMIT 1) ";

/// A row before its body is read.
struct Row {
    id: i64,
    key: String,
    body: String,
    attempts: u32,
    at_unix_ms: i64,
    not_before_unix_ms: i64,
    /// Fencing number of the job by now.
    fence: Option<i64>,
    /// The run on the tracking server, when it is known by now.
    mlflow_run_id: Option<String>,
}

impl Row {
    fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get(0)?,
            key: row.get(1)?,
            body: row.get(2)?,
            attempts: row.get(3)?,
            at_unix_ms: row.get(4)?,
            not_before_unix_ms: row.get(5)?,
            fence: row.get(6)?,
            mlflow_run_id: row.get(7)?,
        })
    }

    fn body(&self) -> Result<DeliveryBody, serde_json::Error> {
        let mut body: DeliveryBody = serde_json::from_str(&self.body)?;
        // The machine may have got a later number for the same job since; it still speaks for it.
        if let Some(fence) = self.fence.filter(|&fence| fence > 0) {
            body.run_mut().fence = fence as u64;
        }
        if let DeliveryBody::Result(result) = &mut body
            && let Some(id) = &self.mlflow_run_id
        {
            result.message["mlflow_run_id"] = id.as_str().into();
        }
        Ok(body)
    }
}

impl Journal {
    /// Up to `limit` deliveries that are due now, oldest first: of each lane those before its first one that is not due. One
    /// that cannot be read is removed and named in the log: an earlier version of the program may have written it.
    ///
    /// # Errors
    /// When the outbox cannot be read.
    pub fn due(&self, sink: SinkName, now_unix_ms: i64, limit: u32) -> Result<Vec<Delivery>, QueueError> {
        let lanes = self.due_lanes(sink, now_unix_ms, limit)?;
        // Few lanes may give much each; of many, all get their turn.
        let each = (limit / (lanes.len() as u32).max(1)).clamp(1, LANE_MAX);
        let mut due = Vec::new();
        for lane in lanes {
            self.due_of(sink, lane, now_unix_ms, each, &mut due)?;
        }
        due.sort_by_key(|delivery| delivery.id);
        Ok(due)
    }

    /// Lanes whose first delivery is due, those first that wait longest.
    fn due_lanes(&self, sink: SinkName, now_unix_ms: i64, limit: u32) -> Result<Vec<String>, QueueError> {
        let failed = sql("read the outbox");
        let text = format!(
            "{LANES} SELECT first.lane {FIRSTS} WHERE first.not_before <= ?2 ORDER BY first.id LIMIT ?3"
        );
        let mut statement = self.connection.prepare_cached(&text).map_err(&failed)?;
        let rows = statement
            .query_map(params![sink.as_str(), now_unix_ms, limit], |row| row.get(0))
            .map_err(&failed)?;
        rows.map(|row| row.map_err(&failed)).collect()
    }

    fn due_of(
        &self,
        sink: SinkName,
        lane: String,
        now_unix_ms: i64,
        limit: u32,
        due: &mut Vec<Delivery>,
    ) -> Result<(), QueueError> {
        let failed = sql("read the outbox");
        let text = "SELECT id, key, body, attempts, at, not_before, \
             (SELECT fence FROM jobs WHERE jobs.instance = o.instance ORDER BY seq DESC LIMIT 1), \
             (SELECT json_extract(notes, '$.mlflow_run_id') FROM jobs WHERE jobs.instance = o.instance \
              ORDER BY seq DESC LIMIT 1) \
             FROM outbox AS o WHERE sink = ?1 AND lane = ?2 ORDER BY id LIMIT ?3";
        let mut statement = self.connection.prepare_cached(text).map_err(&failed)?;
        let rows = statement.query_map(params![sink.as_str(), lane, limit], Row::read).map_err(&failed)?;
        for row in rows {
            let row = row.map_err(&failed)?;
            if row.not_before_unix_ms > now_unix_ms {
                break;
            }
            let body = row.body();
            let Row { id, key, attempts, at_unix_ms, .. } = row;
            match body {
                Ok(body) => {
                    due.push(Delivery { id, sink, lane: lane.clone(), key, body, attempts, at_unix_ms });
                }
                Err(error) => {
                    tracing::error!(id, key, %error, "a delivery cannot be read; it is given up");
                    self.delivered(&[id])?;
                }
            }
        }
        Ok(())
    }

    /// When the next lane of a service becomes due, Unix milliseconds.
    ///
    /// # Errors
    /// When the outbox cannot be read.
    pub fn next_due(&self, sink: SinkName) -> Result<Option<i64>, QueueError> {
        let failed = sql("read the outbox");
        let text = format!("{LANES} SELECT min(first.not_before) {FIRSTS}");
        let mut statement = self.connection.prepare_cached(&text).map_err(&failed)?;
        statement.query_row([sink.as_str()], |row| row.get(0)).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::job::delivery::{MetricPoint, RunMetricsBody, RunRef};

    const SINK: SinkName = SinkName::Mlflow;

    /// A journal with `count` deliveries in eight lanes, in turn.
    fn journal(count: u32) -> Journal {
        let journal = Journal::in_memory().expect("opens");
        let run = RunRef::sample("i");
        let point = MetricPoint { key: "k".into(), value: 1.0, at_unix_ms: 1, step: 1 };
        let body = DeliveryBody::RunMetrics(RunMetricsBody { run, points: vec![point] });
        let body = serde_json::to_string(&body).expect("JSON");
        let text = "WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?1) \
             INSERT INTO outbox (sink, lane, key, droppable, instance, body, not_before, at) \
             SELECT 'mlflow', 'lane-' || (i % 8), 'key-' || i, 1, 'lane-' || (i % 8), ?2, 0, 0 FROM n";
        journal.connection.execute(text, params![count, body]).expect("stored");
        journal
    }

    fn by_lane(due: &[Delivery]) -> BTreeMap<&str, Vec<i64>> {
        let mut lanes: BTreeMap<&str, Vec<i64>> = BTreeMap::new();
        for delivery in due {
            lanes.entry(&delivery.lane).or_default().push(delivery.id);
        }
        lanes
    }

    #[test]
    fn a_look_at_a_hundred_thousand_deliveries_is_quick_and_in_order() {
        let journal = journal(100_000);
        let began = Instant::now();
        let due = journal.due(SINK, 1, 256).expect("reads");
        let next = journal.next_due(SINK).expect("reads");
        let took = began.elapsed();
        // About 10 ms in a build without optimisation on a busy machine; a scan of all rows takes thirty times that.
        assert!(took < Duration::from_millis(100), "{took:?}");
        println!("a look took {took:?}");
        assert_eq!((due.len(), next), (256, Some(0)));
        assert!(due.is_sorted_by_key(|delivery| delivery.id), "oldest first");
        for (lane, ids) in by_lane(&due) {
            let first: i64 = lane.trim_start_matches("lane-").parse().expect("a number");
            let expected: Vec<i64> = (0..32).map(|turn| first + 1 + 8 * turn).collect();
            assert_eq!(ids, expected, "{lane}: its first ones, without a gap");
        }
    }

    #[test]
    fn a_lane_ends_at_its_first_delivery_that_is_not_due() {
        let journal = journal(80);
        // The third of lane-0, and the first of lane-1.
        for (id, until) in [(17, 500), (2, 900)] {
            journal.postpone(id, until, "later").expect("noted");
        }
        let due = journal.due(SINK, 100, 1000).expect("reads");
        let lanes = by_lane(&due);
        assert_eq!((lanes.len(), lanes["lane-0"].as_slice()), (7, &[1, 9][..]));
        assert_eq!(lanes["lane-2"].len(), 10);
        let done: Vec<i64> = due.iter().map(|delivery| delivery.id).collect();
        journal.delivered(&done).expect("removes");
        assert_eq!(journal.due(SINK, 100, 1000).expect("reads"), []);
        assert_eq!(journal.next_due(SINK).expect("reads"), Some(500), "not what waits behind it");
        assert_eq!(journal.due(SINK, 500, 1000).expect("reads").len(), 8);
        assert_eq!(journal.next_due(SinkName::Redis).expect("reads"), None);
    }

    #[test]
    fn of_many_lanes_each_gets_its_turn_and_one_alone_gives_a_batch() {
        let journal = journal(8_000);
        assert_eq!(by_lane(&journal.due(SINK, 1, 8).expect("reads")).len(), 8);
        assert_eq!(by_lane(&journal.due(SINK, 1, 4).expect("reads")).len(), 4);
        journal.connection.execute("DELETE FROM outbox WHERE lane <> 'lane-3'", []).expect("removes");
        assert_eq!(journal.due(SINK, 1, 1000).expect("reads").len(), LANE_MAX as usize);
    }
}
