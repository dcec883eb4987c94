//! The supervisor: gives jobs to slots and writes down what happens.
//!
//! Owns: which slot has which job. In: [`Wake`], [`ChildStarted`], [`ChildEvent`], [`ChildEnded`], [`StopJob`],
//! [`Shutdown`], [`KillAll`]. Out: `Start` and `Control` to the trainers, [`Notice`]s to the observer. Everything it
//! decides is in the journal before it is done, so when it fails it is rebuilt from there. On stop of the actor the
//! trainers stop too. Limits: one handler at a time (each waits for the journal, none blocks the thread); progress is
//! written once a second at most; a journal that refuses is asked again every two seconds.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::{Actor, ActorContext, ActorFutureExt, Addr, AsyncContext, Context, Handler, Message, WrapFuture};
use serde_json::{Map, Value as Json};

use super::endings::{self, Ending};
use super::folder_watcher::{FolderWatcher, Look};
use super::keeper::Keeper;
use super::scheduling::{self, Round};
use super::trainer::{Control, Start, Trainer, TrainerConfig};
use crate::adapters::queue::{JobStore, QueueError};
use crate::job::clock::now_unix_ms;
use crate::job::event::KEPT_SESSION_EVENTS;
use crate::job::ids::TaskId;
use crate::job::record::{Change, CommandKind, JobRecord, ProcessId};
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
}

struct Slot {
    trainer: Addr<Trainer>,
    busy: Option<Busy>,
}

/// See the module.
pub struct Supervisor {
    config: Arc<ServiceConfig>,
    trainer_config: Arc<TrainerConfig>,
    keeper: Keeper,
    observer: Arc<dyn Observer>,
    slots: Vec<Slot>,
    watcher: Option<Addr<FolderWatcher>>,
    seen_version: Option<i64>,
    next_due_unix_ms: Option<i64>,
    shutting_down: bool,
}

impl Supervisor {
    /// A supervisor over a journal that recovery has put in order.
    pub fn new(
        config: Arc<ServiceConfig>,
        trainer_config: Arc<TrainerConfig>,
        keeper: Keeper,
        observer: Arc<dyn Observer>,
    ) -> Self {
        Self {
            config,
            trainer_config,
            keeper,
            observer,
            slots: Vec::new(),
            watcher: None,
            seen_version: None,
            next_due_unix_ms: None,
            shutting_down: false,
        }
    }

    fn slot_of(&mut self, seq: i64) -> Option<&mut Slot> {
        self.slots.iter_mut().find(|slot| slot.busy.as_ref().is_some_and(|busy| busy.record.seq == seq))
    }

    fn is_idle(&self) -> bool {
        self.slots.iter().all(|slot| slot.busy.is_none())
    }

    /// Looks for requests, then fills the free slots.
    fn round(&mut self, ctx: &mut Context<Self>) {
        if self.shutting_down {
            return;
        }
        let (keeper, config) = (self.keeper.clone(), self.config.clone());
        let free = self.slots.iter().filter(|slot| slot.busy.is_none()).count();
        let work = async move {
            keeper
                .with(move |journal| {
                    let stops = take_requests(journal)?;
                    let round = scheduling::schedule(journal, &config, free, now_unix_ms())?;
                    Ok((stops, round, journal.data_version()?))
                })
                .await
        };
        ctx.wait(work.into_actor(self).map(|result, actor, ctx| match result {
            Ok((stops, round, version)) => {
                actor.seen_version = Some(version);
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

    fn start(&mut self, round: Round, ctx: &mut Context<Self>) {
        self.next_due_unix_ms = round.next_due_unix_ms;
        // A delay that ends before the next tick is kept exactly.
        if let Some(due_ms) = self.next_due_unix_ms.map(|due| (due - now_unix_ms()).max(1) as u64)
            && due_ms < TICK.as_millis() as u64
        {
            ctx.notify_later(Wake, Duration::from_millis(due_ms));
        }
        for record in round.starts {
            let Some(slot) = self.slots.iter_mut().find(|slot| slot.busy.is_none()) else {
                unreachable!("a round starts no more jobs than there are free slots");
            };
            prepare_log(&record);
            tracing::info!(task_id = %record.task_id, attempt = record.attempts, "starting in {}", record.run_dir.display());
            self.observer.notice(&Notice::Started(Box::new(record.clone())));
            // do_send: the mailbox has no limit for it, and a closed one ends this actor at the next tick.
            slot.trainer.do_send(Start(Box::new(record.clone())));
            let progress_saved = Instant::now();
            slot.busy = Some(Busy { record, progress: Map::new(), progress_saved });
        }
    }

    /// Acts on a record that was asked to stop: it is cancelled already, or its trainer is told.
    fn stopped(&mut self, record: JobRecord, ctx: &mut Context<Self>) {
        prepare_log(&record);
        tracing::info!(task_id = %record.task_id, state = %record.state, "{}", record.reason);
        if record.state == JobState::Stopping {
            let grace_ms = self.config.stop_grace_ms;
            if let Some(slot) = self.slot_of(record.seq) {
                slot.trainer.do_send(Control::Stop { grace_ms });
                if let Some(busy) = &mut slot.busy {
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
        let Some(busy) = self.slots.get_mut(slot).and_then(|slot| slot.busy.as_mut()) else { return };
        let kind = event["event"].as_str().unwrap_or_default().to_owned();
        merge_progress(&mut busy.progress, &kind, &event);
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
        let keeper = self.keeper.clone();
        let work = async move {
            keeper
                .with(move |journal| {
                    let record = if runs {
                        Some(journal.change(seq, Change::to(JobState::Running, "trains"))?)
                    } else {
                        None
                    };
                    if keep {
                        journal.add_event(seq, &kind, &event)?;
                    }
                    journal.set_progress(seq, &progress)?;
                    Ok(record)
                })
                .await
        };
        ctx.wait(work.into_actor(self).map(move |result, actor, _ctx| match result {
            Ok(Some(record)) => {
                if let Some(busy) = actor.slot_of(seq).and_then(|slot| slot.busy.as_mut()) {
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
        let Some(busy) = self.slot_of(ended.seq).and_then(|slot| slot.busy.as_ref()) else { return };
        let (record, keeper, config) = (busy.record.clone(), self.keeper.clone(), self.config.clone());
        let ending = ended.ending.clone();
        let work = async move {
            keeper
                .with(move |journal| {
                    // The journal may know of a stop that this actor has not heard of yet.
                    let record =
                        journal.job(&record.task_id)?.filter(|now| now.seq == record.seq).unwrap_or(record);
                    endings::settle(journal, &record, ending, &config, now_unix_ms())
                })
                .await
        };
        ctx.wait(work.into_actor(self).map(move |result, actor, ctx| match result {
            Ok(record) => actor.left(record, ctx),
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
        if let Some(slot) = self.slot_of(record.seq) {
            slot.busy = None;
        }
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
        JobState::Stopping | JobState::Completed | JobState::Failed | JobState::Cancelled => Ok(None),
    }
}

/// Gives the job's log the level and format that the job asked for; called before the first line about it.
pub(super) fn prepare_log(record: &JobRecord) {
    let spec = &record.spec;
    crate::adapters::logs::set_job_log(
        record.task_id.as_str(),
        spec.log_level.as_deref(),
        spec.log_format.as_deref(),
    );
}

/// Keeps the last word of each kind that a status shows.
fn merge_progress(progress: &mut Map<String, Json>, kind: &str, event: &Json) {
    let Some(fields) = event.as_object() else { return };
    if matches!(kind, "step" | "epoch_started" | "memory" | "plan") {
        for (key, value) in fields.iter().filter(|(key, _)| *key != "event" && *key != "time_unix_ms") {
            progress.insert(key.clone(), value.clone());
        }
    } else if matches!(kind, "epoch" | "checkpoint") {
        progress.insert(format!("last_{kind}"), event.clone());
    }
}

fn log_event(task_id: &str, kind: &str, event: &Json) {
    match kind {
        "warning" => tracing::warn!(task_id, "{}", event["message"].as_str().unwrap_or_default()),
        "failed" => {
            tracing::error!(task_id, "{}", event["message"].as_str().unwrap_or("the trainer failed"));
        }
        "epoch" => {
            let columns = event["columns"].as_object();
            let figures: Vec<String> = columns
                .into_iter()
                .flatten()
                .filter(|(name, _)| name.as_str() != "epoch" && name.as_str() != "time")
                .map(|(name, value)| format!("{name} {value}"))
                .collect();
            tracing::info!(task_id, "epoch {}/{}: {}", event["epoch"], event["epochs"], figures.join(", "));
        }
        "started" => {
            tracing::info!(task_id, "trainer started: {}", figures(event, &["model", "data", "pid"]))
        }
        "plan" => {
            let keys = [
                "batch",
                "imgsz",
                "images",
                "val_images",
                "batches",
                "epochs",
                "optimizer",
                "lr0",
                "threads",
            ];
            tracing::info!(task_id, "plan: {}", figures(event, &keys));
        }
        "finished" => {
            tracing::info!(task_id, "trainer finished: {}", figures(event, &["outcome", "epochs", "fitness"]))
        }
        "checkpoint" => {
            tracing::debug!(task_id, "checkpoint: {}", figures(event, &["path", "epoch", "step"]))
        }
        _ => tracing::debug!(task_id, "{kind}: {event}"),
    }
}

/// Those of the named fields that an event has, as `name value, name value`.
fn figures(event: &Json, keys: &[&str]) -> String {
    let present = keys.iter().filter(|key| !event[**key].is_null());
    let spelt = present.map(|key| {
        let value = event[*key].as_str().map_or_else(|| event[*key].to_string(), str::to_owned);
        format!("{key} {value}")
    });
    spelt.collect::<Vec<_>>().join(", ")
}

fn log_journal(what: &str, error: &QueueError) {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    tracing::error!("could not {what}: {error}{cause}");
}

impl Actor for Supervisor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.set_mailbox_capacity(MAILBOX);
        for index in 0..self.config.cpu_slots {
            let trainer = Trainer::new(index, self.trainer_config.clone(), ctx.address()).start();
            self.slots.push(Slot { trainer, busy: None });
        }
        ctx.run_interval(TICK, |actor, ctx| actor.tick(ctx));
        self.round(ctx);
    }
}

impl Supervisor {
    /// Once a second: requests from other processes, retries that became due, slots that broke.
    fn tick(&mut self, ctx: &mut Context<Self>) {
        if self.slots.iter().any(|slot| !slot.trainer.connected()) {
            tracing::error!("a slot is gone; rebuilding from the journal");
            ctx.terminate();
            return;
        }
        if self.shutting_down {
            return;
        }
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

/// Something may have changed: look for requests and fill the slots.
#[derive(Debug, Clone, Copy, Message)]
#[rtype(result = "()")]
pub struct Wake;

impl Handler<Wake> for Supervisor {
    type Result = ();

    fn handle(&mut self, _: Wake, ctx: &mut Context<Self>) {
        self.round(ctx);
    }
}

/// The watcher to wake when a job ends.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Introduce(pub Addr<FolderWatcher>);

impl Handler<Introduce> for Supervisor {
    type Result = ();

    fn handle(&mut self, Introduce(watcher): Introduce, _ctx: &mut Context<Self>) {
        self.watcher = Some(watcher);
    }
}

/// A trainer's process runs.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ChildStarted {
    /// The record.
    pub seq: i64,
    /// Its process.
    pub process: ProcessId,
}

impl Handler<ChildStarted> for Supervisor {
    type Result = ();

    fn handle(&mut self, message: ChildStarted, ctx: &mut Context<Self>) {
        let keeper = self.keeper.clone();
        let work = async move {
            keeper.with(move |journal| journal.set_process(message.seq, Some(message.process))).await
        };
        ctx.wait(work.into_actor(self).map(|result, _actor, _ctx| {
            if let Err(error) = result {
                // Recovery also finds processes by their arguments.
                log_journal("note the process of a job", &error);
            }
        }));
    }
}

/// A session event.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ChildEvent {
    /// The slot.
    pub slot: usize,
    /// The record.
    pub seq: i64,
    /// The event.
    pub event: Json,
}

impl Handler<ChildEvent> for Supervisor {
    type Result = ();

    fn handle(&mut self, message: ChildEvent, ctx: &mut Context<Self>) {
        let ours = self
            .slots
            .get(message.slot)
            .and_then(|slot| slot.busy.as_ref())
            .is_some_and(|busy| busy.record.seq == message.seq);
        if ours {
            self.journal_event(message.slot, message.event, ctx);
        }
    }
}

/// A trainer's process is gone.
#[derive(Debug, Clone, Message)]
#[rtype(result = "()")]
pub struct ChildEnded {
    /// The slot.
    pub slot: usize,
    /// The record.
    pub seq: i64,
    /// How it ended.
    pub ending: Ending,
}

impl Handler<ChildEnded> for Supervisor {
    type Result = ();

    fn handle(&mut self, message: ChildEnded, ctx: &mut Context<Self>) {
        self.settle(message, ctx);
    }
}

/// Stop this job.
#[derive(Message)]
#[rtype(result = "()")]
pub struct StopJob {
    /// The job.
    pub task_id: TaskId,
    /// Who asked, in a sentence.
    pub why: String,
}

impl Handler<StopJob> for Supervisor {
    type Result = ();

    fn handle(&mut self, StopJob { task_id, why }: StopJob, ctx: &mut Context<Self>) {
        let keeper = self.keeper.clone();
        let work = async move {
            keeper
                .with(move |journal| match journal.job(&task_id)? {
                    Some(record) => request_stop(journal, &record, &why),
                    None => Ok(None),
                })
                .await
        };
        ctx.wait(work.into_actor(self).map(|result, actor, ctx| match result {
            Ok(Some(record)) => actor.stopped(record, ctx),
            Ok(None) => {}
            // The stop file stays, so it is tried again at the next look.
            Err(error) => log_journal("stop a job", &error),
        }));
    }
}

/// Take no more work, let the trainers save and leave, then stop.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Shutdown;

impl Handler<Shutdown> for Supervisor {
    type Result = ();

    fn handle(&mut self, _: Shutdown, ctx: &mut Context<Self>) {
        self.shutting_down = true;
        // A part of the limit is left for the journal.
        let limit_ms = self.config.shutdown_limit_ms * 9 / 10;
        for slot in self.slots.iter().filter(|slot| slot.busy.is_some()) {
            slot.trainer.do_send(Control::Interrupt { limit_ms });
        }
        if self.is_idle() {
            ctx.stop();
        }
    }
}

/// Kill the trainers now.
#[derive(Message)]
#[rtype(result = "()")]
pub struct KillAll;

impl Handler<KillAll> for Supervisor {
    type Result = ();

    fn handle(&mut self, _: KillAll, _ctx: &mut Context<Self>) {
        for slot in &self.slots {
            slot.trainer.do_send(Control::Kill);
        }
    }
}
