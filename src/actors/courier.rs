//! Couriers: one for each side service takes its deliveries from the outbox and makes them.
//!
//! Owns: a thread with a runtime of its own, so that nothing a service does can hold up the supervisor. In: a nudge
//! when something was put into the outbox, a word that the service was heard again, the wish to end. Out: calls of the
//! [`Sink`], and what the journal keeps of the service's state. Order: oldest first, each lane in order; a lane waits
//! behind its failed delivery, all wait while the service is down or the journal cannot be written. Limits: back-off
//! with jitter up to a maximum, a batch of `BATCH_MAX` at a time, a line in the log when a service goes down or comes
//! back and once a minute between. When a courier fails (a panic in a sink) its delivery is taken as failed and it goes
//! on; when it dies with the process the outbox has everything.

use std::collections::HashSet;
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
const BATCH_MAX: u32 = 256;
/// After this long a batch ends, so that it does not grow stale.
const BATCH_LIMIT: Duration = Duration::from_secs(5);
/// Longest time without a look, when nobody nudges.
const IDLE_INTERVAL: Duration = Duration::from_secs(5);
/// Between two lines in the log about the same outage.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);
/// Between two notes in the journal that all is well.
const WELL_INTERVAL_MS: i64 = 30_000;
/// Tries of one delivery that fails by itself before it is given up; with the delays, three weeks.
const ATTEMPTS_MAX: u32 = 30_000;
/// Tries to put a service in order that does other things.
const BEGINNINGS_MAX: u32 = 5;

/// A way to a courier.
pub struct Courier {
    nudge: Arc<Notify>,
    /// Unix milliseconds until when it may still deliver; 0 while it is to go on.
    finish_by: Arc<AtomicI64>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Courier {
    /// Starts the courier of a sink. `nudge` is poked when something was put into the outbox, `is_back` when somebody heard
    /// from the service again: that ends a back-off.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(
        sink: Arc<dyn Sink>,
        keeper: Keeper,
        config: OutboxConfig,
        nudge: Arc<Notify>,
        is_back: Arc<Notify>,
    ) -> std::io::Result<Self> {
        let finish_by = Arc::new(AtomicI64::new(0));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut round = Round {
            sink,
            keeper,
            config,
            nudge: nudge.clone(),
            is_back,
            finish_by: finish_by.clone(),
            failures: 0,
            down_since: None,
            complained: None,
            made: Vec::new(),
            refusal: None,
            refusals: 0,
            refusal_told: None,
            noted_well_unix_ms: 0,
            beginnings: 0,
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
    is_back: Arc<Notify>,
    finish_by: Arc<AtomicI64>,
    /// Outages in a row.
    failures: u32,
    down_since: Option<Instant>,
    complained: Option<Instant>,
    /// Deliveries that were made, or are given up, and that are still in the outbox.
    made: Vec<i64>,
    /// What the journal did not do at this look.
    refusal: Option<String>,
    /// Looks in a row at which it did not.
    refusals: u32,
    refusal_told: Option<Instant>,
    noted_well_unix_ms: i64,
    /// Tries to put the service in order that failed though it does other things.
    beginnings: u32,
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
    /// The journal did not do its part.
    Refused,
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
            let look = self.weigh(look);
            let pause = match look {
                Look::Went => continue,
                Look::NoJournal => return,
                Look::Nothing(_) | Look::Down | Look::Refused if is_finishing => return,
                Look::Down => Duration::from_millis(self.delay_ms(self.failures.saturating_sub(1))),
                Look::Refused => Duration::from_millis(self.delay_ms(self.refusals.saturating_sub(1))),
                Look::Nothing(Some(due)) => {
                    IDLE_INTERVAL.min(Duration::from_millis((due - now_unix_ms()).max(1) as u64))
                }
                Look::Nothing(None) => IDLE_INTERVAL,
            };
            if matches!(look, Look::Down | Look::Refused) {
                // A nudge does not shorten the back-off; the wish to end does, and a service that is back.
                self.rest(pause).await;
            } else {
                let _ = tokio::time::timeout(pause, self.nudge.notified()).await;
            }
        }
    }

    async fn rest(&self, pause: Duration) {
        let until = tokio::time::Instant::now() + pause;
        while self.finish_by.load(Ordering::SeqCst) == 0 {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return,
                () = self.is_back.notified() => return,
                () = self.nudge.notified() => {}
            }
        }
    }

    /// Counts looks at which the journal did not do its part, and says so once a minute.
    fn weigh(&mut self, look: Look) -> Look {
        let Some(refusal) = self.refusal.take() else {
            self.refusals = 0;
            return look;
        };
        if matches!(look, Look::NoJournal) {
            return look;
        }
        self.refusals = self.refusals.saturating_add(1);
        if self.refusal_told.is_none_or(|at| at.elapsed() >= COMPLAINT_INTERVAL) {
            self.refusal_told = Some(Instant::now());
            tracing::warn!("{}: {refusal}", self.sink.name().as_str());
        }
        Look::Refused
    }

    fn refused(&mut self, what: &str, error: &QueueError) {
        if self.refusal.is_none() {
            let cause =
                std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
            self.refusal = Some(format!("{what}: {error}{cause}"));
        }
    }

    /// Takes what was made out of the outbox; while that fails nothing more is made.
    async fn remove_made(&mut self) -> Result<(), Look> {
        if self.made.is_empty() {
            return Ok(());
        }
        let made = self.made.clone();
        match self.keeper.with(move |journal| journal.delivered(&made)).await {
            Ok(()) => self.made.clear(),
            Err(error) => {
                self.refused("deliveries that were made cannot be removed", &error);
                return Err(Look::Refused);
            }
        }
        Ok(())
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
            Err(error) => {
                self.refused("the live jobs cannot be read", &error);
                return Err(Look::Refused);
            }
        };
        match self.sink.begin(&live).await {
            Ok(()) => self.has_begun = true,
            Err(error) if error.verdict() == AfterFailure::AllWait => {
                self.down(&error.chain()).await;
                return Err(Look::Down);
            }
            Err(error) if error.verdict() == AfterFailure::LaneWaits && self.beginnings < BEGINNINGS_MAX => {
                self.beginnings += 1;
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
        if let Err(look) = self.remove_made().await {
            return look;
        }
        let sink = self.sink.name();
        let now = if is_finishing { i64::MAX } else { now_unix_ms() };
        let due = match self.keeper.with(move |journal| journal.due(sink, now, BATCH_MAX)).await {
            Ok(due) => due,
            Err(QueueError::NoAnswer) => return Look::NoJournal,
            Err(error) => {
                self.refused("the outbox cannot be read", &error);
                return Look::Refused;
            }
        };
        if due.is_empty() {
            let next = self.keeper.with(move |journal| journal.next_due(sink)).await;
            // One may have become due just now.
            let soonest = now_unix_ms() + 50;
            return Look::Nothing(next.ok().flatten().map(|due| due.max(soonest)));
        }
        let began = Instant::now();
        let mut is_down = false;
        let mut waiting: HashSet<String> = HashSet::new();
        for delivery in due {
            if waiting.contains(&delivery.lane) {
                continue;
            }
            let (id, lane) = (delivery.id, delivery.lane.clone());
            match self.deliver(delivery).await {
                Some(AfterFailure::AllWait) => {
                    is_down = true;
                    break;
                }
                Some(AfterFailure::LaneWaits) => {
                    waiting.insert(lane);
                }
                Some(AfterFailure::GiveUp) | None => self.made.push(id),
            }
            let must_finish = self.finish_by.load(Ordering::SeqCst) != 0 && !is_finishing;
            if must_finish || began.elapsed() >= BATCH_LIMIT {
                break;
            }
        }
        let was_in_vain = self.made.is_empty();
        if let Err(look) = self.remove_made().await {
            return look;
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
                    self.refused("a failed delivery cannot be postponed", &error);
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
