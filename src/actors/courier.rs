//! Couriers: one for each side service takes its deliveries from the outbox and makes them.
//!
//! Owns: a thread with a runtime of its own, so that nothing a service does can hold up the supervisor. In: a nudge
//! when something was put into the outbox, the wish to end. Out: calls of the [`Sink`], and what the journal keeps of
//! the service's state. Order: the first delivery of each lane, oldest first; a lane waits behind its failed
//! delivery, all wait while the service is down. Limits: back-off with jitter up to a maximum, a batch of
//! `BATCH_MAX` at a time, a line in the log when a service goes down or comes back and once a minute between. When a
//! courier fails (a panic in a sink) its delivery is taken as failed and it goes on; when it dies with the
//! process the outbox has everything.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use serde_json::json;
use tokio::sync::Notify;

use super::keeper::Keeper;
use crate::adapters::queue::QueueError;
use crate::adapters::sink::{AfterFailure, DeliveryError, Receipt, Sink};
use crate::job::clock::{human_ms, now_unix_ms, rfc3339};
use crate::job::delivery::Delivery;
use crate::job::service::OutboxConfig;

/// Deliveries taken at once.
const BATCH_MAX: u32 = 64;
/// Longest time without a look, when nobody nudges.
const IDLE_INTERVAL: Duration = Duration::from_secs(5);
/// Between two lines in the log about the same outage.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);
/// Between two notes in the journal that all is well.
const WELL_INTERVAL_MS: i64 = 30_000;
/// Tries of one delivery that fails by itself before it is given up; with the delays, days.
const ATTEMPTS_MAX: u32 = 5_000;

/// A way to a courier.
pub struct Courier {
    nudge: Arc<Notify>,
    /// Unix milliseconds until when it may still deliver; 0 while it is to go on.
    finish_by: Arc<AtomicI64>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Courier {
    /// Starts the courier of a sink. `nudge` is poked when something was put into the outbox.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(
        sink: Arc<dyn Sink>,
        keeper: Keeper,
        config: OutboxConfig,
        nudge: Arc<Notify>,
    ) -> std::io::Result<Self> {
        let finish_by = Arc::new(AtomicI64::new(0));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut round = Round {
            sink,
            keeper,
            config,
            nudge: nudge.clone(),
            finish_by: finish_by.clone(),
            failures: 0,
            down_since: None,
            complained: None,
            noted_well_unix_ms: 0,
            has_begun: false,
        };
        let name = format!("courier-{}", round.sink.name().as_str());
        let thread = std::thread::Builder::new().name(name).spawn(move || runtime.block_on(round.run()))?;
        Ok(Self { nudge, finish_by, thread: Mutex::new(Some(thread)) })
    }

    /// Asks it to deliver what it can within `limit` and to end. Held deliveries are made at once; at the first outage
    /// it ends.
    pub fn finish(&self, limit: Duration) {
        self.finish_by.store(now_unix_ms() + limit.as_millis().max(1) as i64, Ordering::SeqCst);
        self.nudge.notify_one();
    }

    /// True when it has ended.
    pub fn is_finished(&self) -> bool {
        self.thread
            .lock()
            .is_ok_and(|thread| thread.as_ref().is_none_or(std::thread::JoinHandle::is_finished))
    }
}

struct Round {
    sink: Arc<dyn Sink>,
    keeper: Keeper,
    config: OutboxConfig,
    nudge: Arc<Notify>,
    finish_by: Arc<AtomicI64>,
    /// Outages in a row.
    failures: u32,
    down_since: Option<Instant>,
    complained: Option<Instant>,
    noted_well_unix_ms: i64,
    /// The service was put in order since this courier started.
    has_begun: bool,
}

/// What a look at the outbox came to.
enum Look {
    /// Something was delivered; there may be more.
    Went,
    /// Nothing is due; the next is due then, Unix milliseconds.
    Nothing(Option<i64>),
    /// The service is down.
    Down,
    /// The journal is gone: the service ends.
    NoJournal,
}

impl Round {
    async fn run(&mut self) {
        loop {
            let finish_by = self.finish_by.load(Ordering::SeqCst);
            let is_finishing = finish_by != 0;
            if is_finishing && now_unix_ms() >= finish_by {
                return;
            }
            let look = self.look(is_finishing).await;
            let pause = match look {
                Look::Went => continue,
                Look::NoJournal => return,
                Look::Nothing(_) | Look::Down if is_finishing => return,
                Look::Down => Duration::from_millis(self.delay_ms(self.failures.saturating_sub(1))),
                Look::Nothing(Some(due)) => {
                    IDLE_INTERVAL.min(Duration::from_millis((due - now_unix_ms()).max(1) as u64))
                }
                Look::Nothing(None) => IDLE_INTERVAL,
            };
            if matches!(look, Look::Down) {
                // A nudge does not shorten the back-off; the wish to end does.
                self.rest(pause).await;
            } else {
                let _ = tokio::time::timeout(pause, self.nudge.notified()).await;
            }
        }
    }

    async fn rest(&self, pause: Duration) {
        let until = tokio::time::Instant::now() + pause;
        while self.finish_by.load(Ordering::SeqCst) == 0 {
            let nudged = tokio::time::timeout_at(until, self.nudge.notified()).await;
            if nudged.is_err() {
                return;
            }
        }
    }

    /// The delay before try number `failures` (from 0), doubling up to the maximum, with up to a quarter of jitter.
    fn delay_ms(&self, failures: u32) -> u64 {
        let doubled =
            self.config.delay_ms.saturating_mul(1u64 << failures.min(20)).min(self.config.delay_ms_max);
        // Couriers of many machines must not come back in step; that it differs is enough.
        let spread = uuid::Uuid::new_v4().as_u128() as u64 % (doubled / 4 + 1);
        doubled + spread
    }

    /// Lets the sink put the service in order, once.
    async fn begin(&mut self) -> Result<(), Look> {
        if self.has_begun {
            return Ok(());
        }
        let live = match self.keeper.with(|journal| journal.live_instances()).await {
            Ok(live) => live,
            Err(QueueError::NoAnswer) => return Err(Look::NoJournal),
            Err(_) => return Err(Look::Nothing(Some(now_unix_ms() + 1000))),
        };
        match self.sink.begin(&live).await {
            Ok(()) => self.has_begun = true,
            Err(error) if error.verdict() == AfterFailure::AllWait => {
                self.down(&error.chain()).await;
                return Err(Look::Down);
            }
            Err(error) => {
                tracing::warn!("{} was not put in order: {}", self.sink.name().as_str(), error.chain());
                self.has_begun = true;
            }
        }
        Ok(())
    }

    async fn look(&mut self, is_finishing: bool) -> Look {
        if let Err(look) = self.begin().await {
            return look;
        }
        let sink = self.sink.name();
        let now = if is_finishing { i64::MAX } else { now_unix_ms() };
        let due = match self.keeper.with(move |journal| journal.due(sink, now, BATCH_MAX)).await {
            Ok(due) => due,
            Err(QueueError::NoAnswer) => return Look::NoJournal,
            Err(error) => {
                tracing::warn!("the outbox cannot be read: {error}");
                return Look::Nothing(Some(now_unix_ms() + 1000));
            }
        };
        if due.is_empty() {
            let next = self.keeper.with(move |journal| journal.next_due(sink)).await;
            // One that is due already waits behind the first of its lane, which comes later.
            let soonest = now_unix_ms() + 50;
            return Look::Nothing(next.ok().flatten().map(|due| due.max(soonest)));
        }
        let mut done = Vec::new();
        let mut is_down = false;
        for delivery in due {
            let id = delivery.id;
            match self.deliver(delivery).await {
                Some(AfterFailure::AllWait) => {
                    is_down = true;
                    break;
                }
                Some(AfterFailure::LaneWaits) => {}
                Some(AfterFailure::GiveUp) | None => done.push(id),
            }
            if self.finish_by.load(Ordering::SeqCst) != 0 && !is_finishing {
                break;
            }
        }
        let was_in_vain = done.is_empty();
        if !done.is_empty()
            && let Err(error) = self.keeper.with(move |journal| journal.delivered(&done)).await
        {
            tracing::warn!("deliveries that were made cannot be removed and are made again: {error}");
        }
        match () {
            () if is_down => Look::Down,
            // At the end nothing is waited for.
            () if was_in_vain && is_finishing => Look::Nothing(None),
            () => Look::Went,
        }
    }

    /// Makes one delivery and notes what came of it; `None` when it was made.
    async fn deliver(&mut self, delivery: Delivery) -> Option<AfterFailure> {
        let attempt = AssertUnwindSafe(self.sink.deliver(&delivery)).catch_unwind().await;
        let outcome = attempt.unwrap_or_else(|_| {
            Err(DeliveryError::Later { what: "the courier failed at it (a panic)".to_owned(), source: None })
        });
        match outcome {
            Ok(receipt) => {
                self.well(&delivery, receipt).await;
                None
            }
            Err(error) => Some(self.failed(&delivery, error).await),
        }
    }

    async fn well(&mut self, delivery: &Delivery, receipt: Receipt) {
        let name = self.sink.name().as_str();
        if let Some(since) = self.down_since.take() {
            let outage = human_ms(since.elapsed().as_millis() as i64);
            tracing::info!("{name} works again after {outage}; what waited is delivered now");
            self.noted_well_unix_ms = 0;
        }
        (self.failures, self.complained) = (0, None);
        let now = now_unix_ms();
        if now - self.noted_well_unix_ms >= WELL_INTERVAL_MS {
            self.noted_well_unix_ms = now;
            self.note(json!({"state": "up", "last_success": rfc3339(now)})).await;
        }
        if !receipt.notes.is_empty() {
            let (instance, notes) = (delivery.body.run().instance.clone(), receipt.notes);
            let kept = self.keeper.with(move |journal| journal.add_notes(&instance, &notes)).await;
            if let Err(error) = kept {
                tracing::warn!("what {name} gave back cannot be kept: {error}");
            }
        }
    }

    async fn failed(&mut self, delivery: &Delivery, error: DeliveryError) -> AfterFailure {
        let name = self.sink.name().as_str();
        let (key, task_id) = (&delivery.key, delivery.body.run().task_id.as_str());
        let text = error.chain();
        let verdict = match error.verdict() {
            AfterFailure::LaneWaits if delivery.attempts >= ATTEMPTS_MAX => AfterFailure::GiveUp,
            verdict => verdict,
        };
        match verdict {
            AfterFailure::GiveUp if matches!(error, DeliveryError::Fenced { .. }) => {
                tracing::info!(task_id, "{name}: {key} is not sent: {text}");
            }
            AfterFailure::GiveUp => tracing::error!(task_id, "{name}: {key} is given up: {text}"),
            AfterFailure::LaneWaits => {
                let delay_ms = self.delay_ms(delivery.attempts);
                if delivery.attempts == 0 {
                    tracing::warn!(task_id, "{name}: {key} failed and is tried again: {text}");
                }
                let (id, due) = (delivery.id, now_unix_ms() + delay_ms as i64);
                let noted = self.keeper.with(move |journal| journal.postpone(id, due, &text)).await;
                if let Err(error) = noted {
                    tracing::warn!("a failed delivery cannot be postponed: {error}");
                }
            }
            AfterFailure::AllWait => self.down(&text).await,
        }
        verdict
    }

    async fn down(&mut self, text: &str) {
        let name = self.sink.name().as_str();
        self.failures = self.failures.saturating_add(1);
        let is_news = self.down_since.is_none();
        let since = *self.down_since.get_or_insert_with(Instant::now);
        let is_due = self.complained.is_none_or(|at| at.elapsed() >= COMPLAINT_INTERVAL);
        if is_due {
            self.complained = Some(Instant::now());
            let outage = human_ms(since.elapsed().as_millis() as i64);
            if is_news {
                tracing::warn!("{name} does not work; what is for it waits in the outbox: {text}");
            } else {
                tracing::warn!("{name} has not worked for {outage} ({} tries): {text}", self.failures);
            }
        }
        if is_news || is_due {
            let since_unix_ms = now_unix_ms() - since.elapsed().as_millis() as i64;
            self.note(json!({"state": "down", "since": rfc3339(since_unix_ms), "error": text})).await;
        }
    }

    async fn note(&self, state: serde_json::Value) {
        let name = self.sink.name().as_str();
        if let Err(error) = self.keeper.with(move |journal| journal.set_service(name, &state)).await {
            tracing::debug!("the state of {name} cannot be noted: {error}");
        }
    }
}

#[cfg(test)]
#[path = "courier_tests.rs"]
mod tests;
