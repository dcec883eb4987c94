//! The supervisor: gives jobs to slots and writes down what happens.
//!
//! Owns: the slots, which has which job, and how their GPUs stand. In: [`Wake`], [`ChildStarted`], [`ChildEvent`],
//! [`ChildEnded`], [`StopJob`], [`Shutdown`], [`KillAll`]. Out: `Start` and `Control` to the trainers, [`Notice`]s to the
//! observer, questions to the port of the GPUs. Everything it decides is in the journal before it is done, so when it
//! fails it is rebuilt from there. On stop of the actor the trainers stop too. Limits: one handler at a time (each waits
//! for the journal, none blocks the thread); progress is written once a second at most; a journal that refuses is asked
//! again every two seconds; GPUs are looked for once a minute and after a fault; old rows go from the journal in batches.

mod fleet;
mod gpus;
mod messages;
mod progress;
mod pruning;

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::{Actor, ActorContext, ActorFutureExt, Addr, AsyncContext, Context, WrapFuture};
use serde_json::{Map, Value as Json};

use progress::{log_event, merge_progress, step_samples};

pub use fleet::{DRAINED_FLAG, FleetHeard, GiveBack, HowDoYouStand, ShutFleet, Standing, Surrender, drained};
pub use messages::{
    ChildEnded, ChildEvent, ChildStarted, Introduce, IsIdle, KillAll, Shutdown, StopJob, Wake,
};
pub(super) use progress::{end_log, prepare_log, prepare_log_again};

use super::endings;
use super::folder_watcher::{FolderWatcher, Look};
use super::keeper::Keeper;
use super::outgoing;
use super::scheduling::{self, Gate, Placement, Round};
use super::slots::{Seat, Slot};
use super::trainer::{Control, Start, Trainer, TrainerConfig};
use crate::adapters::gpu::GpuPort;
use crate::adapters::queue::session::SessionNote;
use crate::adapters::queue::{JobStore, QueueError};
use crate::job::clock::now_unix_ms;
use crate::job::delivery::MetricPoint;
use crate::job::event::KEPT_SESSION_EVENTS;
use crate::job::ids::TaskId;
use crate::job::record::{Change, CommandKind, JobRecord};
use crate::job::service::ServiceConfig;
use crate::job::state::JobState;

/// Between two looks for requests and due retries.
const TICK: Duration = Duration::from_secs(1);
/// Between two writes of a job's progress.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Before a journal that refused is asked again.
const JOURNAL_RETRY: Duration = Duration::from_secs(2);
/// Messages that may wait.
const MAILBOX: usize = 256;

/// Something that whoever watches the service may want to show.
#[derive(Debug, Clone, PartialEq)]
pub enum Notice {
    /// A file became a job.
    Accepted(Box<JobRecord>),
    /// A file was refused.
    Rejected {
        /// The file.
        source: String,
        /// Why.
        reason: String,
    },
    /// A job's trainer starts.
    Started(Box<JobRecord>),
    /// A session event of a job.
    Event {
        /// The job.
        task_id: TaskId,
        /// The event.
        event: Json,
    },
    /// A job left its slot: ended, to be tried again, or interrupted.
    Left(Box<JobRecord>),
}

/// Shows notices. Called on the service's thread: it must return quickly.
pub trait Observer: Send + Sync {
    /// Something happened.
    fn notice(&self, notice: &Notice);
}

/// The job of a slot.
struct Busy {
    record: JobRecord,
    progress: Map<String, Json>,
    progress_saved: Instant,
    /// Step samples for the tracking server that are not in the outbox yet, and when the last was taken.
    samples: Vec<MetricPoint>,
    sampled: Option<Instant>,
}

/// A slot, its trainer and its job.
struct Bay {
    slot: Slot,
    trainer: Addr<Trainer>,
    busy: Option<Busy>,
}

impl Bay {
    fn job(&self) -> Option<&TaskId> {
        self.busy.as_ref().map(|busy| &busy.record.task_id)
    }
}

/// See the module.
pub struct Supervisor {
    config: Arc<ServiceConfig>,
    trainer_config: Arc<TrainerConfig>,
    keeper: Keeper,
    observer: Arc<dyn Observer>,
    port: Arc<dyn GpuPort>,
    /// Never shrinks, so that an index stays that of its slot.
    bays: Vec<Bay>,
    survey: gpus::Survey,
    watcher: Option<Addr<FolderWatcher>>,
    seen_version: Option<i64>,
    next_due_unix_ms: Option<i64>,
    /// When jobs were last given to slots, or the others told why they wait.
    scheduled: Option<Instant>,
    /// What holds jobs back beside slots.
    gate: Gate,
    fleet: fleet::FleetGate,
    shutting_down: bool,
}

impl Supervisor {
    /// A supervisor over a journal that recovery has put in order.
    pub fn new(
        config: Arc<ServiceConfig>,
        trainer_config: Arc<TrainerConfig>,
        keeper: Keeper,
        port: Arc<dyn GpuPort>,
        observer: Arc<dyn Observer>,
    ) -> Self {
        Self {
            config,
            trainer_config,
            keeper,
            observer,
            port,
            bays: Vec::new(),
            survey: gpus::Survey::default(),
            watcher: None,
            seen_version: None,
            next_due_unix_ms: None,
            scheduled: None,
            gate: Gate::default(),
            fleet: fleet::FleetGate::default(),
            shutting_down: false,
        }
    }

    fn bay_of(&mut self, seq: i64) -> Option<&mut Bay> {
        self.bays.iter_mut().find(|bay| bay.busy.as_ref().is_some_and(|busy| busy.record.seq == seq))
    }

    fn is_idle(&self) -> bool {
        self.bays.iter().all(|bay| bay.busy.is_none())
    }

    fn add_bay(&mut self, slot: Slot, ctx: &mut Context<Self>) {
        let trainer = Trainer::new(self.bays.len(), self.trainer_config.clone(), ctx.address()).start();
        self.bays.push(Bay { slot, trainer, busy: None });
    }

    /// Looks for requests, then fills the free slots.
    fn round(&mut self, ctx: &mut Context<Self>) {
        if self.shutting_down {
            return;
        }
        let (keeper, config) = (self.keeper.clone(), self.config.clone());
        let mut seats: Vec<Seat> = self.bays.iter().map(|bay| bay.slot.seat(bay.job())).collect();
        let looked = self.survey.looked.clone();
        let gate = self.gate.clone();
        // Without a free slot a round only tells jobs why they wait. In a queue of thousands that is read often enough once a
        // second, however many jobs come meanwhile.
        let has_room = seats.iter().any(|seat| seat.job.is_none() && seat.obstacle.is_none());
        if !has_room && self.scheduled.is_some_and(|at| at.elapsed() < TICK) {
            return self.take_requests(ctx);
        }
        self.scheduled = Some(Instant::now());
        let work = async move {
            keeper
                .with(move |journal| {
                    let stops = take_requests(journal)?;
                    let drained = fleet::drained(journal.flag(DRAINED_FLAG)?.as_deref());
                    fleet::mark_drained(&mut seats, &drained);
                    let round = scheduling::schedule(journal, &config, seats, &looked, &gate, now_unix_ms())?;
                    Ok((stops, round, drained, journal.data_version()?))
                })
                .await
        };
        ctx.wait(work.into_actor(self).map(|result, actor, ctx| match result {
            Ok((stops, round, drained, version)) => {
                actor.seen_version = Some(version);
                actor.set_drained(drained);
                for record in stops {
                    actor.stopped(record, ctx);
                }
                actor.start(round, ctx);
            }
            Err(error) => {
                log_journal("schedule", &error);
                // An attempt may have begun before the fault; only recovery can tell. Rebuild from the journal.
                if error.retry() == crate::adapters::queue::Retry::Never {
                    ctx.terminate();
                }
            }
        }));
    }

    /// Looks for requests alone. The rest follows at the next tick.
    fn take_requests(&mut self, ctx: &mut Context<Self>) {
        let due_ms = now_unix_ms() + TICK.as_millis() as i64;
        self.next_due_unix_ms = Some(self.next_due_unix_ms.map_or(due_ms, |due| due.min(due_ms)));
        let keeper = self.keeper.clone();
        let work = async move { keeper.with(take_requests).await };
        ctx.wait(work.into_actor(self).map(|result, actor, ctx| match result {
            Ok(stops) => {
                for record in stops {
                    actor.stopped(record, ctx);
                }
            }
            Err(error) => log_journal("look for requests", &error),
        }));
    }

    fn start(&mut self, round: Round, ctx: &mut Context<Self>) {
        self.next_due_unix_ms = round.next_due_unix_ms;
        // A delay that ends before the next tick is kept exactly.
        if let Some(due_ms) = self.next_due_unix_ms.map(|due| (due - now_unix_ms()).max(1) as u64)
            && due_ms < TICK.as_millis() as u64
        {
            ctx.notify_later(Wake, Duration::from_millis(due_ms));
        }
        for record in round.refused {
            tracing::error!(task_id = %record.task_id, class = ?record.class, "failed: {}", record.reason);
            self.observer.notice(&Notice::Left(Box::new(record)));
            self.wake_watcher();
        }
        for Placement { seat, record } in round.starts {
            // The journal was waited for without a message in between, so the seats are as they were.
            let bay = &mut self.bays[seat];
            prepare_log(&record);
            let (place, run_dir) = (bay.slot.name(), record.run_dir.display());
            tracing::info!(task_id = %record.task_id, attempt = record.attempts, "starting on {place} in {run_dir}");
            self.observer.notice(&Notice::Started(Box::new(record.clone())));
            // do_send: the mailbox has no limit for it, and a closed one ends this actor at the next tick.
            bay.trainer.do_send(Start { record: Box::new(record.clone()), gpu: bay.slot.as_gpu().cloned() });
            bay.busy = Some(Busy::new(record));
            self.tell_place(seat, ctx);
        }
        self.publish(ctx);
    }

    /// Acts on a record that was asked to stop: it is cancelled already, or its trainer is told.
    fn stopped(&mut self, record: JobRecord, ctx: &mut Context<Self>) {
        prepare_log(&record);
        tracing::info!(task_id = %record.task_id, state = %record.state, "{}", record.reason);
        if record.state == JobState::Stopping {
            let grace_ms = self.config.stop_grace_ms;
            if let Some(bay) = self.bay_of(record.seq) {
                bay.trainer.do_send(Control::Stop { grace_ms });
                if let Some(busy) = &mut bay.busy {
                    busy.record = record;
                }
            }
        } else {
            self.observer.notice(&Notice::Left(Box::new(record)));
            self.wake_watcher();
            ctx.notify(Wake);
        }
    }

    fn wake_watcher(&self) {
        if let Some(watcher) = &self.watcher {
            // Only makes it look sooner than it would by itself.
            drop(watcher.try_send(Look));
        }
    }

    /// Writes down an event of a session.
    fn journal_event(&mut self, slot: usize, event: Json, ctx: &mut Context<Self>) {
        let Some(bay) = self.bays.get_mut(slot) else { return };
        let place = bay.slot.as_gpu().map_or(String::new(), |gpu| format!(" on GPU {}", gpu.number));
        let Some(busy) = bay.busy.as_mut() else { return };
        let kind = event["event"].as_str().unwrap_or_default().to_owned();
        merge_progress(&mut busy.progress, &kind, &event);
        let interval = Duration::from_millis(self.config.mlflow.step_interval_ms);
        if self.config.mlflow.tracking_uri.is_some()
            && kind == "step"
            && busy.sampled.is_none_or(|at| at.elapsed() >= interval)
        {
            busy.sampled = Some(Instant::now());
            busy.samples.extend(step_samples(&event));
        }
        let runs = busy.record.state == JobState::Preparing
            && matches!(kind.as_str(), "plan" | "epoch_started" | "step" | "epoch");
        let keep = KEPT_SESSION_EVENTS.contains(&kind.as_str());
        let due = runs || keep || busy.progress_saved.elapsed() >= PROGRESS_INTERVAL;
        log_event(busy.record.task_id.as_str(), &kind, &event);
        let notice = Notice::Event { task_id: busy.record.task_id.clone(), event: event.clone() };
        self.observer.notice(&notice);
        if !due {
            return;
        }
        busy.progress_saved = Instant::now();
        busy.progress.insert("updated_unix_ms".into(), now_unix_ms().into());
        let (seq, progress) = (busy.record.seq, Json::Object(busy.progress.clone()));
        let samples = outgoing::samples(&self.config, &busy.record, std::mem::take(&mut busy.samples));
        let runs = runs.then(|| format!("{}{place}", busy.record.spec.mode.verb()));
        let note = SessionNote { runs, progress, samples, kept: keep.then_some((kind, event)) };
        let keeper = self.keeper.clone();
        let work = async move { keeper.with(move |journal| journal.note_session(seq, note)).await };
        ctx.wait(work.into_actor(self).map(move |result, actor, _ctx| match result {
            Ok(Some(record)) => {
                if let Some(busy) = actor.bay_of(seq).and_then(|bay| bay.busy.as_mut()) {
                    busy.record = record;
                }
            }
            Ok(None) => {}
            // The run folder has every event; the end of the job is written down with patience.
            Err(error) => log_journal("note an event", &error),
        }));
    }

    /// Writes down how an attempt ended, however long the journal takes, and frees the slot.
    fn settle(&mut self, ended: ChildEnded, ctx: &mut Context<Self>) {
        let Some(busy) = self.bay_of(ended.seq).and_then(|bay| bay.busy.as_ref()) else { return };
        let (record, keeper, config) = (busy.record.clone(), self.keeper.clone(), self.config.clone());
        let ending = ended.ending.clone();
        let work = async move {
            keeper
                .with(move |journal| {
                    // The journal may know of a stop that this actor has not heard of yet.
                    let record =
                        journal.job(&record.task_id)?.filter(|now| now.seq == record.seq).unwrap_or(record);
                    if record.state.is_terminal() {
                        // It moved to another machine while its process was being ended.
                        return Ok(record);
                    }
                    endings::settle(journal, &record, ending, &config, now_unix_ms())
                })
                .await
        };
        ctx.wait(work.into_actor(self).map(move |result, actor, ctx| match result {
            Ok(record) => {
                actor.judge(&ended, ctx);
                actor.left(record, ctx);
            }
            Err(error) => {
                log_journal("note the end of a job", &error);
                ctx.notify_later(ended, JOURNAL_RETRY);
            }
        }));
    }

    fn left(&mut self, record: JobRecord, ctx: &mut Context<Self>) {
        match record.state {
            JobState::Failed => {
                tracing::error!(task_id = %record.task_id, class = ?record.class, "failed: {}", record.reason)
            }
            JobState::Queued => tracing::warn!(task_id = %record.task_id, "{}", record.reason),
            state => tracing::info!(task_id = %record.task_id, %state, "{}", record.reason),
        }
        if let Some(bay) = self.bay_of(record.seq) {
            bay.busy = None;
        }
        self.publish(ctx);
        self.observer.notice(&Notice::Left(Box::new(record)));
        self.wake_watcher();
        if self.shutting_down && self.is_idle() {
            ctx.stop();
        } else {
            self.round(ctx);
        }
    }
}

/// Moves the jobs that requests ask to stop, and removes the requests.
fn take_requests(
    journal: &mut crate::adapters::queue::journal::Journal,
) -> Result<Vec<JobRecord>, QueueError> {
    let mut stopped = Vec::new();
    for command in journal.commands()? {
        match command.kind {
            CommandKind::Stop => match journal.job(&command.task_id)? {
                Some(record) => {
                    stopped.extend(request_stop(journal, &record, "stop was asked for on the command line")?)
                }
                None => tracing::warn!(task_id = %command.task_id, "asked to stop a job that is not known"),
            },
        }
        journal.finish_command(command.id)?;
    }
    Ok(stopped)
}

/// Moves a record towards `cancelled`: at once when it has no process, through `stopping` when it has. `None` when there
/// is nothing to do.
///
/// # Errors
/// Those of the journal.
pub fn request_stop(
    journal: &mut dyn JobStore,
    record: &JobRecord,
    why: &str,
) -> Result<Option<JobRecord>, QueueError> {
    match record.state {
        JobState::Queued | JobState::Interrupted => {
            journal.change(record.seq, Change::to(JobState::Cancelled, why)).map(Some)
        }
        JobState::Preparing | JobState::Running => {
            journal.change(record.seq, Change::to(JobState::Stopping, why)).map(Some)
        }
        JobState::Stopping
        | JobState::Completed
        | JobState::Failed
        | JobState::Cancelled
        | JobState::Moved => Ok(None),
    }
}

fn log_journal(what: &str, error: &QueueError) {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    tracing::error!("could not {what}: {error}{cause}");
}

impl Actor for Supervisor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.set_mailbox_capacity(MAILBOX);
        self.wait_for_fleet();
        for number in 0..self.config.cpu_slots {
            self.add_bay(Slot::cpu(number), ctx);
        }
        self.look_first(ctx);
        ctx.run_interval(TICK, |actor, ctx| actor.tick(ctx));
        self.prune(0, ctx);
        self.round(ctx);
    }
}

impl Supervisor {
    /// Once a second: requests from other processes, retries that became due, slots that broke.
    fn tick(&mut self, ctx: &mut Context<Self>) {
        if self.bays.iter().any(|bay| !bay.trainer.connected()) {
            tracing::error!("a slot is gone; rebuilding from the journal");
            ctx.terminate();
            return;
        }
        if self.shutting_down {
            return;
        }
        self.tend(ctx);
        self.tend_fleet(ctx);
        if self.next_due_unix_ms.is_some_and(|due| now_unix_ms() >= due) {
            self.round(ctx);
            return;
        }
        let (keeper, seen) = (self.keeper.clone(), self.seen_version);
        let work = async move { keeper.with(|journal| journal.data_version()).await };
        ctx.spawn(work.into_actor(self).map(move |version, _actor, ctx| {
            // Our own progress goes through another connection and shows here too; a round with nothing to do is cheap.
            if version.ok() != seen {
                ctx.notify(Wake);
            }
        }));
    }
}
