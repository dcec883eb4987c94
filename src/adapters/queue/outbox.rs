//! The outbox: deliveries to side services that wait in the journal.
//!
//! A delivery is written in the transaction of the change that it tells of ([`Dispatcher`]), so that neither is ever
//! there without the other. It is removed after it was made; a crash between the two makes it twice, which deliveries
//! bear. Order is kept within a lane. When [`ITEMS_MAX`] wait for one service, those for it that may be dropped go, oldest
//! first; the others (results, ends of runs) are kept whatever it costs, because there are only a few for each job.

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, params};
use serde_json::Value as Json;

use super::journal::{Journal, sql};
use super::statements::Kept;
use super::{JobStore, QueueError};
use crate::job::clock::now_unix_ms;
use crate::job::delivery::{NewDelivery, SinkName};
use crate::job::record::JobRecord;

/// Deliveries kept for each service unless the service is configured otherwise.
pub const ITEMS_MAX: usize = 100_000;
/// Insertions between two checks of the size.
const CHECK_EVERY: i64 = 64;
/// Longest error text kept, bytes.
const ERROR_BYTES_MAX: usize = 1000;

/// What happened to a record.
#[derive(Debug, Clone, Copy)]
pub enum Occasion<'a> {
    /// Its state changed; the record shows the new one.
    State,
    /// A session event was noted.
    Event {
        /// Its name.
        kind: &'a str,
        /// The event.
        detail: &'a Json,
    },
}

/// Says what side services are to be told of an occasion.
pub type Dispatcher = Arc<dyn Fn(&JobRecord, Occasion<'_>) -> Vec<NewDelivery> + Send + Sync>;

/// How much waits for one service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Depth {
    /// The service.
    pub sink: SinkName,
    /// Deliveries.
    pub count: u64,
    /// Since when the oldest waits, Unix milliseconds.
    pub oldest_unix_ms: i64,
}

/// Puts deliveries about one instance into the outbox.
pub(super) fn put(
    connection: &Connection,
    instance: &str,
    deliveries: Vec<NewDelivery>,
    items_max: usize,
) -> Result<(), QueueError> {
    let failed = sql("put a delivery into the outbox");
    let now = now_unix_ms();
    for delivery in deliveries {
        let sink = delivery.sink.as_str();
        let waiting: Option<i64> = connection
            .prepare_cached("SELECT not_before FROM outbox WHERE sink = ?1 AND key = ?2")
            .and_then(|mut statement| statement.query_row([sink, &delivery.key], |row| row.get(0)).optional())
            .map_err(&failed)?;
        let due = now + delivery.hold_ms as i64;
        let not_before = waiting.map_or(due, |before| before.min(due));
        let body = serde_json::to_string(&delivery.body)
            .map_err(|source| QueueError::Decode { what: "delivery", source: Some(source) })?;
        connection
            .prepare_cached(
                "INSERT OR REPLACE INTO outbox (sink, lane, key, droppable, instance, body, not_before, at) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            )
            .and_then(|mut statement| {
                statement.execute(params![
                    sink,
                    delivery.lane,
                    delivery.key,
                    delivery.may_be_dropped,
                    instance,
                    body,
                    not_before,
                    now
                ])
            })
            .map_err(&failed)?;
        if connection.last_insert_rowid() % CHECK_EVERY == 0 {
            trim(connection, items_max)?;
        }
    }
    Ok(())
}

/// Drops what may be dropped, oldest first, until what waits for each service is within the limit. What waits for one that
/// is down costs the others nothing.
fn trim(connection: &Connection, items_max: usize) -> Result<(), QueueError> {
    let failed = sql("trim the outbox");
    for sink in SinkName::ALL.map(SinkName::as_str) {
        let count: i64 = connection
            .row("SELECT count(*) FROM outbox WHERE sink = ?1", [sink], |row| row.get(0))
            .map_err(&failed)?;
        let over = count - items_max as i64;
        if over <= 0 {
            continue;
        }
        let dropped = connection
            .run(
                "DELETE FROM outbox WHERE id IN \
                 (SELECT id FROM outbox WHERE sink = ?1 AND droppable ORDER BY id LIMIT ?2)",
                params![sink, over],
            )
            .map_err(&failed)?;
        if dropped > 0 {
            tracing::warn!(
                sink,
                dropped,
                "the outbox is full: the oldest samples and intermediate uploads are dropped"
            );
        }
    }
    Ok(())
}

/// Takes back everything that waits about an instance: another machine speaks for it now.
pub(super) fn withdraw(connection: &Connection, instance: &str) -> Result<(), QueueError> {
    connection
        .run("DELETE FROM outbox WHERE instance = ?1", [instance])
        .map_err(sql("take back deliveries"))?;
    Ok(())
}

impl Journal {
    /// Asks `dispatcher` from now on what side services are to be told.
    pub fn set_dispatcher(&mut self, dispatcher: Dispatcher) {
        self.dispatcher = Some(dispatcher);
    }

    /// Limits the outbox to so many deliveries for each service.
    pub fn limit_outbox(&mut self, items_max: usize) {
        self.outbox_items_max = items_max;
    }

    pub(super) fn quick(&self) -> &Connection {
        self.soft.as_ref().unwrap_or(&self.connection)
    }

    /// Puts deliveries about an instance into the outbox. They may be lost with the machine's power: for samples.
    ///
    /// # Errors
    /// When they cannot be stored.
    pub fn put_samples(&self, instance: &str, deliveries: Vec<NewDelivery>) -> Result<(), QueueError> {
        put(self.quick(), instance, deliveries, self.outbox_items_max)
    }

    /// Removes deliveries that were made or are given up.
    ///
    /// # Errors
    /// When they cannot be removed; they are made again then.
    pub fn delivered(&self, ids: &[i64]) -> Result<(), QueueError> {
        let failed = sql("remove a delivery");
        let connection = self.quick();
        let transaction = connection.unchecked_transaction().map_err(&failed)?;
        for id in ids {
            transaction
                .prepare_cached("DELETE FROM outbox WHERE id = ?1")
                .and_then(|mut statement| statement.execute([id]))
                .map_err(&failed)?;
        }
        transaction.commit().map_err(failed)
    }

    /// Notes that a delivery failed and is to be tried again at `not_before_unix_ms`.
    ///
    /// # Errors
    /// When it cannot be noted; it is tried again sooner then.
    pub fn postpone(&self, id: i64, not_before_unix_ms: i64, error: &str) -> Result<(), QueueError> {
        let mut end = error.len().min(ERROR_BYTES_MAX);
        while !error.is_char_boundary(end) {
            end -= 1;
        }
        self.quick()
            .run(
                "UPDATE outbox SET attempts = attempts + 1, not_before = ?2, error = ?3 WHERE id = ?1",
                params![id, not_before_unix_ms, &error[..end]],
            )
            .map_err(sql("postpone a delivery"))?;
        Ok(())
    }

    /// How much waits for each service that something waits for.
    ///
    /// # Errors
    /// When the outbox cannot be read.
    pub fn depths(&self) -> Result<Vec<Depth>, QueueError> {
        let failed = sql("measure the outbox");
        let mut statement = self
            .connection
            .prepare("SELECT sink, count(*), min(at) FROM outbox GROUP BY sink ORDER BY sink")
            .map_err(&failed)?;
        let rows = statement
            .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?, row.get::<_, i64>(2)?)))
            .map_err(&failed)?;
        let mut depths = Vec::new();
        for row in rows {
            let (name, count, oldest_unix_ms) = row.map_err(&failed)?;
            if let Some(sink) = SinkName::ALL.into_iter().find(|sink| sink.as_str() == name) {
                depths.push(Depth { sink, count: count as u64, oldest_unix_ms });
            }
        }
        Ok(depths)
    }

    /// Keeps what a service gave back with the records of an instance.
    ///
    /// # Errors
    /// When it cannot be stored.
    pub fn add_notes(&self, instance: &str, notes: &[(&'static str, String)]) -> Result<(), QueueError> {
        for (name, value) in notes {
            self.quick()
                .run(
                    "UPDATE jobs SET notes = json_set(notes, '$.' || ?2, ?3) WHERE instance = ?1",
                    params![instance, name, value],
                )
                .map_err(sql("keep a note"))?;
        }
        Ok(())
    }

    /// True while the result of an instance waits for its delivery.
    ///
    /// # Errors
    /// When the outbox cannot be read.
    pub fn is_result_waiting(&self, instance: &str) -> Result<bool, QueueError> {
        self.connection
            .row(
                "SELECT EXISTS (SELECT 1 FROM outbox WHERE sink = 'redis' AND key = 'result:' || ?1)",
                [instance],
                |row| row.get(0),
            )
            .map_err(sql("read the outbox"))
    }

    /// True while anything about an instance waits for its delivery.
    ///
    /// # Errors
    /// When the outbox cannot be read.
    pub fn is_delivery_waiting(&self, instance: &str) -> Result<bool, QueueError> {
        self.connection
            .row("SELECT EXISTS (SELECT 1 FROM outbox WHERE instance = ?1)", [instance], |row| row.get(0))
            .map_err(sql("read the outbox"))
    }

    /// Puts into the outbox once more what is to be told of a record as it stands, under another fencing number.
    ///
    /// # Errors
    /// When it cannot be stored.
    pub fn tell_again(&mut self, seq: i64, fence: u64) -> Result<(), QueueError> {
        self.set_fence(seq, fence)?;
        let record = JobStore::record(self, seq)?;
        let told = self.dispatcher.as_ref().map(|dispatcher| dispatcher(&record, Occasion::State));
        put(&self.connection, &record.instance, told.unwrap_or_default(), self.outbox_items_max)
    }

    /// Notes the fencing number under which this machine owns a record, and the attempts that others made.
    ///
    /// # Errors
    /// When it cannot be stored.
    pub fn set_fence(&self, seq: i64, fence: u64) -> Result<(), QueueError> {
        self.quick()
            .run("UPDATE jobs SET fence = ?2 WHERE seq = ?1", params![seq, fence as i64])
            .map_err(sql("note a fencing number"))?;
        Ok(())
    }

    /// Replaces what is known of a side service. A display: it may be lost with the machine's power.
    ///
    /// # Errors
    /// When it cannot be stored.
    pub fn set_service(&self, name: &str, state: &Json) -> Result<(), QueueError> {
        self.quick()
            .run(
                "INSERT OR REPLACE INTO services (name, state) VALUES (?1, ?2)",
                params![name, state.to_string()],
            )
            .map_err(sql("note the state of a service"))?;
        Ok(())
    }

    /// What is known of the side services, by name.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn services(&self) -> Result<Vec<(String, Json)>, QueueError> {
        let failed = sql("read the states of services");
        let mut statement = self
            .connection
            .prepare_cached("SELECT name, state FROM services ORDER BY name")
            .map_err(&failed)?;
        let rows = statement
            .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))
            .map_err(&failed)?;
        rows.map(|row| {
            let (name, state) = row.map_err(&failed)?;
            let state = serde_json::from_str(&state)
                .map_err(|source| QueueError::Decode { what: "state of a service", source: Some(source) })?;
            Ok((name, state))
        })
        .collect()
    }

    /// Sets a flag that survives restarts, or removes it.
    ///
    /// # Errors
    /// When it cannot be stored.
    pub fn set_flag(&self, name: &str, value: Option<&str>) -> Result<(), QueueError> {
        match value {
            Some(value) => self
                .connection
                .run("INSERT OR REPLACE INTO flags (name, value) VALUES (?1, ?2)", [name, value]),
            None => self.connection.run("DELETE FROM flags WHERE name = ?1", [name]),
        }
        .map_err(sql("set a flag"))?;
        Ok(())
    }

    /// The value of a flag.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn flag(&self, name: &str) -> Result<Option<String>, QueueError> {
        self.connection
            .row("SELECT value FROM flags WHERE name = ?1", [name], |row| row.get(0))
            .optional()
            .map_err(sql("read a flag"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::delivery::{DeliveryBody, RunMetricsBody, RunRef};

    fn put(journal: &Journal, sink: SinkName, count: usize, may_be_dropped: bool) {
        for number in 0..count {
            let body = RunMetricsBody { run: RunRef::sample("i"), points: Vec::new() };
            let key = format!("{may_be_dropped}-{number}");
            let body = DeliveryBody::RunMetrics(body);
            let delivery = NewDelivery { sink, lane: "i".into(), key, may_be_dropped, hold_ms: 0, body };
            journal.put_samples("i", vec![delivery]).expect("stored");
        }
    }

    fn waits(journal: &Journal, sink: SinkName) -> u64 {
        let depths = journal.depths().expect("reads");
        depths.iter().find(|depth| depth.sink == sink).map_or(0, |depth| depth.count)
    }

    #[test]
    fn what_waits_for_one_service_costs_the_others_nothing() {
        let mut journal = Journal::in_memory().expect("opens");
        journal.limit_outbox(100);
        put(&journal, SinkName::Store, 50, true);
        put(&journal, SinkName::Redis, 50, true);
        put(&journal, SinkName::Mlflow, 100, true);
        put(&journal, SinkName::Mlflow, 3 * CHECK_EVERY as usize, false);
        assert_eq!((waits(&journal, SinkName::Store), waits(&journal, SinkName::Redis)), (50, 50));
        let kept = waits(&journal, SinkName::Mlflow);
        assert_eq!(kept, 3 * CHECK_EVERY as u64, "only those that may not be dropped");
        put(&journal, SinkName::Redis, 400, true);
        let kept = waits(&journal, SinkName::Redis);
        assert!((100..100 + CHECK_EVERY as u64).contains(&kept), "{kept}");
        let first = &journal.due(SinkName::Redis, i64::MAX, 1).expect("reads")[0];
        assert_ne!(first.key, "true-0", "the oldest went");
    }
}
