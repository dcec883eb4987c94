//! The stream consumer: this machine's part in the queue that machines share.
//!
//! Owns: a thread with a runtime of its own, the handle on Redis, entries that wait for the end of another job. In: the
//! supervisor's answers, a nudge when a slot became free, the wish to end. Out: jobs into the journal, and to the supervisor
//! `Wake`, `StopJob` (a cancellation by key), `Surrender` (another machine has the job), `FleetHeard`. Nothing is
//! acknowledged before the journal has it, and nothing is taken without a slot for it. While Redis is away it is asked
//! again with a back-off, said once a minute; what runs goes on. Limits: calls of 2 s, at most `LATER_MAX` entries in
//! hand, one heartbeat at a time. When the process dies, entries stay pending and are taken again by this machine's next
//! start or, after the lease, by another machine.

mod beat;
mod consider;
mod files;

use std::collections::{BTreeSet, HashMap};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use actix::Addr;
use serde_json::json;
use tokio::sync::Notify;

use super::keeper::Keeper;
use super::supervisor::{HowDoYouStand, Observer, Standing, Supervisor};
use crate::adapters::queue::QueueError;
use crate::adapters::queue::redis::{Fleet, FleetError, Taken, Warning};
use crate::job::clock::{human_ms, now_unix_ms, rfc3339};
use crate::job::service::ServiceConfig;
use crate::job::spec::SpecContext;

/// Entries that are held until another job has ended; beyond, they are given back.
const LATER_MAX: usize = 256;
/// Entries read at once after a restart.
const PENDING_MAX: usize = 1_000;
/// Jobs taken at once.
const TAKE_MAX: usize = 64;
/// First pause after a failed call.
const PAUSE: Duration = Duration::from_millis(250);
/// Longest pause; also no longer than half a heartbeat, so that a machine is back before it is taken for dead.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Pause after the journal refused.
const JOURNAL_PAUSE: Duration = Duration::from_secs(1);
/// How long a goodbye may take.
const GOODBYE_LIMIT: Duration = Duration::from_secs(2);
/// Flag in the journal that is written to see whether it can be.
const WRITTEN_FLAG: &str = "written_at";
/// Between two lines in the log about the same outage.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);

/// What the consumer works with.
#[derive(Clone)]
pub struct Parts {
    /// The service.
    pub config: Arc<ServiceConfig>,
    /// What it adds to every job.
    pub context: Arc<SpecContext>,
    /// The journal.
    pub keeper: Keeper,
    /// Who is told.
    pub supervisor: Addr<Supervisor>,
    /// Who watches.
    pub observer: Arc<dyn Observer>,
    /// The handle on Redis.
    pub fleet: Fleet,
    /// Poked when Redis answers again.
    pub redis_back: Arc<Notify>,
}

/// A way to the consumer.
pub struct StreamConsumer {
    nudge: Arc<Notify>,
    shared: Arc<Shared>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    must_end: AtomicBool,
    /// Takes nothing more; what runs is still its own.
    is_leaving: AtomicBool,
    /// Nothing of this service runs any more, and nothing will: it says goodbye before it ends.
    has_left: AtomicBool,
    /// Nothing was there to take at the last look, or Redis is away.
    is_quiet: AtomicBool,
    /// Why the service must not go on.
    fatal: Mutex<Option<String>>,
}

impl StreamConsumer {
    /// Starts the consumer.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(parts: Parts) -> std::io::Result<Self> {
        let (nudge, shared) = (Arc::new(Notify::new()), Arc::new(Shared::default()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut consumer = Consumer {
            parts,
            nudge: nudge.clone(),
            shared: shared.clone(),
            is_connected: false,
            has_unread: false,
            was_heard: false,
            is_intruded: None,
            failures: 0,
            down_since: None,
            complained: None,
            journal_complained: None,
            warned: None,
            next_beat: Instant::now(),
            no_steal_until: Instant::now(),
            later: Vec::new(),
            unreadable: HashMap::new(),
            passed: HashMap::new(),
            resting: HashMap::new(),
            unusable_since: None,
            is_journal_broken: false,
            hung_reads: Arc::new(AtomicUsize::new(0)),
            waiting: None,
            gpus: BTreeSet::new(),
            slots: Vec::new(),
        };
        let thread = std::thread::Builder::new().name("stream-consumer".into()).spawn(move || {
            runtime.block_on(async {
                consumer.run().await;
                consumer.say_goodbye().await;
            });
        })?;
        Ok(Self { nudge, shared, thread: Mutex::new(Some(thread)) })
    }

    /// What to poke when a slot became free.
    pub fn nudge(&self) -> Arc<Notify> {
        self.nudge.clone()
    }

    /// True when the last look found nothing to take.
    pub fn is_quiet(&self) -> bool {
        self.shared.is_quiet.load(Ordering::SeqCst)
    }

    /// Why the service must not go on, if so: another one uses its name.
    pub fn fatal(&self) -> Option<String> {
        self.shared.fatal.lock().ok().and_then(|text| text.clone())
    }

    /// Takes nothing more. Signs of life and leases go on until [`StreamConsumer::finish`]: trainers may take a while to
    /// save, and nobody else must begin their jobs meanwhile.
    pub fn stop_taking(&self) {
        self.shared.is_leaving.store(true, Ordering::SeqCst);
        self.nudge.notify_one();
    }

    /// Ends as [`StreamConsumer::finish`] does, and first gives up its GPUs and takes back its sign of life. For a service
    /// whose trainers have ended.
    pub fn leave(&self) {
        self.shared.has_left.store(true, Ordering::SeqCst);
        self.finish();
    }

    /// Takes nothing more and ends.
    pub fn finish(&self) {
        self.shared.must_end.store(true, Ordering::SeqCst);
        self.nudge.notify_one();
    }

    /// True when its thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread
            .lock()
            .is_ok_and(|thread| thread.as_ref().is_none_or(std::thread::JoinHandle::is_finished))
    }
}

/// A question to Redis that is under way.
type Waiting = Pin<Box<dyn Future<Output = Result<bool, FleetError>> + Send>>;

struct Consumer {
    parts: Parts,
    nudge: Arc<Notify>,
    shared: Arc<Shared>,
    /// The last call succeeded.
    is_connected: bool,
    /// What this machine had taken before could not be looked at yet: its name was in use, or it was drained.
    has_unread: bool,
    /// The supervisor was told of an answer at least once.
    was_heard: bool,
    /// Since when another service uses this machine's name.
    is_intruded: Option<Instant>,
    failures: u32,
    down_since: Option<Instant>,
    complained: Option<Instant>,
    journal_complained: Option<Instant>,
    /// What the server's configuration was said to be last, and when.
    warned: Option<(Instant, Vec<Warning>)>,
    next_beat: Instant,
    /// After an outage others need time to show that they live, before what they hold is taken over.
    no_steal_until: Instant,
    /// Entries of tasks that another entry is at work on.
    later: Vec<Taken>,
    /// How often an entry could not be read, by queue and id.
    unreadable: HashMap<(String, String), u32>,
    /// Entries that this machine cannot run and gave back, and until when it leaves them alone.
    passed: HashMap<(String, String), Instant>,
    /// Lists in which only what this machine cannot run was found, and until when they are left alone.
    resting: HashMap<String, Instant>,
    /// Since when no slot can take a job.
    unusable_since: Option<Instant>,
    /// The journal refused the last job that was to be written.
    is_journal_broken: bool,
    /// Reads of job files that took too long and still go on.
    hung_reads: Arc<AtomicUsize>,
    /// The question whether there is work. It goes on from round to round: a wait that is dropped goes on inside the server,
    /// and the next one would wait behind it.
    waiting: Option<Waiting>,
    /// GPUs that this machine owns in Redis.
    gpus: BTreeSet<String>,
    /// Names of the slots that were shown last.
    slots: Vec<String>,
}

/// The consumer cannot go on as it is.
enum Trouble {
    /// Redis.
    Fleet(FleetError),
    /// The journal did not do it: a full disk, a busy database.
    Journal(QueueError),
    /// The journal or the supervisor is gone: the service ends or is rebuilt.
    Gone,
}

impl From<QueueError> for Trouble {
    fn from(error: QueueError) -> Self {
        match error {
            QueueError::NoAnswer => Self::Gone,
            error => Self::Journal(error),
        }
    }
}

impl From<FleetError> for Trouble {
    fn from(error: FleetError) -> Self {
        Self::Fleet(error)
    }
}

impl Consumer {
    async fn run(&mut self) {
        while !self.must_end() {
            match self.round().await {
                Ok(()) => self.well().await,
                Err(Trouble::Gone) => return,
                Err(Trouble::Journal(error)) => {
                    // What was taken stays pending and is looked at again.
                    self.is_connected = false;
                    if self.journal_complained.is_none_or(|at| at.elapsed() >= COMPLAINT_INTERVAL) {
                        self.journal_complained = Some(Instant::now());
                        tracing::error!("the journal does not take entries of the shared queue: {error}");
                    }
                    let _ = tokio::time::timeout(JOURNAL_PAUSE, self.ending()).await;
                }
                Err(Trouble::Fleet(error)) => {
                    let pause = self.failed(&error).await;
                    self.shared.is_quiet.store(true, Ordering::SeqCst);
                    let _ = tokio::time::timeout(pause, self.ending()).await;
                }
            }
        }
    }

    /// Gives up what others would otherwise wait a lease for, where the service left in an orderly way. Leases of jobs
    /// stay: the next start of this machine has the newest checkpoints.
    async fn say_goodbye(&mut self) {
        // The supervisor goes a moment before the service says that it has left.
        let told = tokio::time::timeout(GOODBYE_LIMIT, self.ending());
        if told.await.is_err() || !self.shared.has_left.load(Ordering::SeqCst) || self.is_intruded.is_some() {
            return;
        }
        let fleet = self.parts.fleet.clone();
        let goodbye = async {
            for uuid in std::mem::take(&mut self.gpus) {
                fleet.free_gpu(&uuid).await?;
            }
            fleet.leave(&self.slots).await
        };
        match tokio::time::timeout(GOODBYE_LIMIT, goodbye).await {
            Ok(Ok(())) => {}
            // Others wait for the rest of the lease.
            Ok(Err(error)) => tracing::debug!("no goodbye: {}", error.chain()),
            Err(_) => tracing::debug!("no goodbye: Redis is too slow"),
        }
    }

    fn must_end(&self) -> bool {
        self.shared.must_end.load(Ordering::SeqCst)
    }

    /// Returns when it is to end.
    async fn ending(&self) {
        while !self.must_end() {
            self.nudge.notified().await;
        }
    }

    /// One round: a heartbeat when it is due, then work when there is room for it.
    async fn round(&mut self) -> Result<(), Trouble> {
        if !self.is_connected {
            self.waiting = None;
            self.connect().await?;
        }
        let standing = self.standing().await?;
        if self.beat_if_due(&standing).await? {
            self.reconsider(&standing).await?;
            self.steal(&standing).await?;
        }
        let room = self.room(&standing).await?;
        if room == 0 {
            self.shared.is_quiet.store(self.later.is_empty(), Ordering::SeqCst);
            let pause = self.next_beat.saturating_duration_since(Instant::now());
            let _ = tokio::time::timeout(pause, self.nudge.notified()).await;
            return Ok(());
        }
        let ageing_ms = self.parts.config.ageing_ms.max(1) as u64;
        let resting = self.resting();
        let resting: Vec<&str> = resting.iter().map(String::as_str).collect();
        let taken = self.parts.fleet.take(room.min(TAKE_MAX), ageing_ms, &resting).await?;
        if taken.is_empty() {
            self.shared.is_quiet.store(self.later.is_empty(), Ordering::SeqCst);
            return self.wait().await;
        }
        self.shared.is_quiet.store(false, Ordering::SeqCst);
        self.consider_all(taken, &standing).await
    }

    /// Gives a sign of life when it is time.
    async fn beat_if_due(&mut self, standing: &Standing) -> Result<bool, Trouble> {
        if Instant::now() < self.next_beat {
            return Ok(false);
        }
        self.next_beat = Instant::now() + self.beat_interval();
        self.beat(standing).await?;
        Ok(true)
    }

    /// Considers entries one after the other; however long that takes, signs of life are given in between.
    async fn consider_all(&mut self, taken: Vec<Taken>, standing: &Standing) -> Result<(), Trouble> {
        let mut standing = standing.clone();
        for entry in taken {
            if Instant::now() >= self.next_beat {
                standing = self.standing().await?;
                self.beat_if_due(&standing).await?;
            }
            self.consider(entry, &standing).await?;
        }
        Ok(())
    }

    /// Lists that are left alone for now.
    fn resting(&mut self) -> Vec<String> {
        let now = Instant::now();
        self.resting.retain(|_, until| *until > now);
        self.resting.keys().cloned().collect()
    }

    /// Waits for work, for a nudge, or for the next heartbeat.
    async fn wait(&mut self) -> Result<(), Trouble> {
        let left = self.next_beat.saturating_duration_since(Instant::now());
        let resting = self.resting();
        let mut waiting = self.waiting.take().unwrap_or_else(|| {
            let fleet = self.parts.fleet.clone();
            let limit_ms = (left.as_millis() as u64).max(1);
            Box::pin(async move {
                let resting: Vec<&str> = resting.iter().map(String::as_str).collect();
                fleet.wait_for_work(limit_ms, &resting).await
            })
        });
        tokio::select! {
            found = &mut waiting => { found?; }
            () = self.nudge.notified() => self.waiting = Some(waiting),
            () = tokio::time::sleep(left) => self.waiting = Some(waiting),
        }
        Ok(())
    }

    fn beat_interval(&self) -> Duration {
        Duration::from_millis(self.parts.config.redis.heartbeat_interval_ms)
    }

    async fn standing(&self) -> Result<Standing, Trouble> {
        self.parts.supervisor.send(HowDoYouStand).await.map_err(|_| Trouble::Gone)
    }

    fn is_leaving(&self) -> bool {
        self.shared.is_leaving.load(Ordering::SeqCst)
    }

    /// Tries whether the journal can be written again, before another job is taken for it.
    async fn is_journal_mended(&mut self) -> Result<bool, Trouble> {
        let now = now_unix_ms().to_string();
        match self.parts.keeper.with(move |journal| journal.set_flag(WRITTEN_FLAG, Some(&now))).await {
            Ok(()) => {
                self.is_journal_broken = false;
                self.journal_complained = None;
                tracing::info!("the journal can be written again; the shared queue is worked on");
                Ok(true)
            }
            Err(QueueError::NoAnswer) => Err(Trouble::Gone),
            Err(_) => Ok(false),
        }
    }

    /// Jobs that could be taken now.
    async fn room(&mut self, standing: &Standing) -> Result<usize, Trouble> {
        let is_shut = standing.is_closing || self.is_leaving() || standing.usable == 0;
        if is_shut || self.is_intruded.is_some() || self.later.len() >= LATER_MAX {
            return Ok(0);
        }
        if self.is_journal_broken && !self.is_journal_mended().await? {
            return Ok(0);
        }
        let wanted = standing.free + self.parts.config.redis.prefetch;
        if wanted == 0 {
            return Ok(0);
        }
        let waiting = self.parts.keeper.with(|journal| journal.count_due(now_unix_ms())).await?;
        Ok(wanted.saturating_sub(waiting))
    }

    /// Notes that a round went well.
    async fn well(&mut self) {
        if let Some(since) = self.down_since.take() {
            let outage = human_ms(since.elapsed().as_millis() as i64);
            tracing::info!("Redis at {} answers again after {outage}", self.parts.fleet.address());
        }
        (self.failures, self.complained) = (0, None);
    }

    /// Notes a failure and says how long to pause.
    async fn failed(&mut self, error: &FleetError) -> Duration {
        // Whatever it was, groups and pending entries are looked at afresh.
        let was_up = std::mem::replace(&mut self.is_connected, false);
        self.failures = self.failures.saturating_add(1);
        // A group that is gone is made again in the next round; that is no outage.
        if !error.is_no_group() {
            self.note_outage(error, was_up).await;
        }
        let doubled = PAUSE.saturating_mul(1 << self.failures.saturating_sub(1).min(10));
        let doubled = doubled.min(PAUSE_MAX).min(self.beat_interval() / 2);
        // Machines must not come back in step.
        doubled + doubled.mul_f64((uuid::Uuid::new_v4().as_u128() % 256) as f64 / 1024.0)
    }

    /// Says and notes that the server does not work, when it is news and once a minute.
    async fn note_outage(&mut self, error: &FleetError, was_up: bool) {
        let is_news = self.down_since.is_none();
        let since = *self.down_since.get_or_insert_with(Instant::now);
        let is_due = self.complained.is_none_or(|at| at.elapsed() >= COMPLAINT_INTERVAL);
        if is_due {
            self.complained = Some(Instant::now());
            let address = self.parts.fleet.address();
            let outage = human_ms(since.elapsed().as_millis() as i64);
            let lasting = if is_news { String::new() } else { format!(" (for {outage} by now)") };
            tracing::warn!("the shared queue on {address} does not work{lasting}: {}", error.chain());
        }
        // A server that answers and then refuses was noted as up in between.
        if is_due || was_up {
            let state = json!({
                "state": "down", "since": rfc3339(now_unix_ms() - since.elapsed().as_millis() as i64),
                "error": error.chain(),
            });
            self.note(state).await;
        }
    }

    async fn note(&self, state: serde_json::Value) {
        let noted = self.parts.keeper.with(move |journal| journal.set_service("queue", &state)).await;
        if let Err(error) = noted {
            tracing::debug!("the state of the shared queue cannot be noted: {error}");
        }
    }
}
