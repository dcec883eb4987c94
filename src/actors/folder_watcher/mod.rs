//! The folder watcher: finds dropped jobs and stop files.
//!
//! Owns: what was seen of each file. In: [`Look`], file events (both may be lost: the periodic reading finds everything
//! again), [`IsQuiet`]. Out: jobs into the journal, `Wake` and `StopJob` to the supervisor, sidecars beside the files. On
//! stop nothing is lost; when it fails it is rebuilt and reads the folders afresh, and the journal knows what was decided.
//! Limits: one look at a time; files over 1 MiB are refused; at most [`FILES_MAX`] files in a folder are looked at.

mod claims;
mod listing;
mod settled;
mod taking;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::{Actor, ActorFutureExt, Addr, AsyncContext, Context, Handler, Message, WrapFuture};
use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind, RenameMode};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};

use super::intake::{Taker, Verdict};
use super::keeper::Keeper;
use super::stop_files::{self, StopVerdict};
use super::supervisor::{Notice, Observer, StopJob, Supervisor, Wake};
use crate::adapters::queue::{JobStore, QueueError};
use crate::job::service::ServiceConfig;
use crate::job::spec::SpecContext;
use claims::Foreign;
use listing::{Listing, Seen};
use settled::{Settle, SettleTable};
use taking::{Taken, take};

/// Files of one folder that are looked at.
pub const FILES_MAX: usize = 10_000;
/// Files decided in one look; the others follow in the next.
const BATCH_MAX: usize = 64;
/// How long a file that came to no verdict is left alone.
const POSTPONE: Duration = Duration::from_secs(1);
/// Between two readings of the folder of stop files, where `watch.poll_interval_ms` is longer.
const STOP_INTERVAL: Duration = Duration::from_secs(1);
/// How long another service may decide about a file before this one says so and lets it be.
const CLAIM_PATIENCE: Duration = Duration::from_secs(30);

/// See the module.
pub struct FolderWatcher {
    config: Arc<ServiceConfig>,
    context: Arc<SpecContext>,
    /// This service, as sidecars and claims name it.
    taker: Arc<Taker>,
    /// A folder in which any event wakes the supervisor: the command line writes there.
    inbox: PathBuf,
    keeper: Keeper,
    supervisor: Addr<Supervisor>,
    observer: Arc<dyn Observer>,
    events: Option<RecommendedWatcher>,
    table: SettleTable,
    /// Stop files already warned about, with their time.
    warned: HashMap<PathBuf, i64>,
    /// Files that another service has claimed, and since when.
    claimed: HashMap<PathBuf, Instant>,
    told_unclaimable: bool,
    complaint: Option<String>,
    looking: bool,
    looking_for_stops: bool,
    look_again: bool,
    look_due: Option<Instant>,
    looks_done: u64,
    unfinished: bool,
}

impl FolderWatcher {
    /// A watcher of the folders in `config`.
    pub fn new(
        config: Arc<ServiceConfig>,
        context: Arc<SpecContext>,
        taker: Taker,
        inbox: PathBuf,
        keeper: Keeper,
        supervisor: Addr<Supervisor>,
        observer: Arc<dyn Observer>,
    ) -> Self {
        Self {
            config,
            context,
            taker: Arc::new(taker),
            inbox,
            keeper,
            supervisor,
            observer,
            events: None,
            table: SettleTable::default(),
            warned: HashMap::new(),
            claimed: HashMap::new(),
            told_unclaimable: false,
            complaint: None,
            looking: false,
            looking_for_stops: false,
            look_again: false,
            look_due: None,
            looks_done: 0,
            unfinished: true,
        }
    }

    /// Asks the system for file events. Without them the periodic reading does the work.
    fn watch(&mut self, ctx: &mut Context<Self>) {
        let address = ctx.address();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if let Some(message) = event.ok().and_then(|event| FileEvent::read(&event)) {
                // A full mailbox loses the event; the periodic reading finds the file.
                drop(address.try_send(message));
            }
        });
        let mut watcher = match watcher {
            Ok(watcher) => watcher,
            Err(error) => {
                tracing::warn!(%error, "no file events on this system; folders are read periodically");
                return;
            }
        };
        for folder in [&self.config.configs_dir, &self.config.stop_dir(), &self.inbox] {
            if let Err(error) = watcher.watch(folder, RecursiveMode::NonRecursive) {
                tracing::warn!(%error, "no file events for {}; it is read periodically", folder.display());
            }
        }
        self.events = Some(watcher);
    }

    /// Looks after `delay`, unless a sooner look is planned.
    fn look_in(&mut self, delay: Duration, ctx: &mut Context<Self>) {
        let due = Instant::now() + delay;
        if self.look_due.is_none_or(|planned| due < planned) {
            self.look_due = Some(due);
            ctx.notify_later(Look, delay);
        }
    }

    fn look(&mut self, ctx: &mut Context<Self>) {
        // The plan that led here is used up, also when the look itself has to wait.
        self.look_due = None;
        if self.looking {
            self.look_again = true;
            return;
        }
        (self.looking, self.look_again) = (true, false);
        let (configs_dir, stop_dir) = (self.config.configs_dir.clone(), self.config.stop_dir());
        let work = tokio::task::spawn_blocking(move || {
            (listing::jobs(&configs_dir, FILES_MAX), listing::stop_files(&stop_dir, FILES_MAX))
        });
        ctx.spawn(work.into_actor(self).map(|result, actor, ctx| match result {
            Ok((Ok(jobs), Ok(stops))) => {
                actor.consider(jobs, stops, ctx);
            }
            Ok((jobs, stops)) => {
                let error = jobs.err().or(stops.err()).map(|error| error.to_string()).unwrap_or_default();
                actor.complain(format!("cannot read the watched folders: {error}"));
                actor.looked(ctx);
            }
            Err(error) => {
                actor.complain(format!("reading the watched folders failed: {error}"));
                actor.looked(ctx);
            }
        }));
    }

    /// Reads the folder of stop files alone, and everything when one is there about which nothing was said yet.
    fn look_for_stops(&mut self, ctx: &mut Context<Self>) {
        if self.looking || std::mem::replace(&mut self.looking_for_stops, true) {
            return;
        }
        let stop_dir = self.config.stop_dir();
        let work = tokio::task::spawn_blocking(move || listing::stop_files(&stop_dir, FILES_MAX));
        ctx.spawn(work.into_actor(self).map(|result, actor, ctx| {
            actor.looking_for_stops = false;
            // A folder that cannot be read is named by the look at everything.
            let stops = result.ok().and_then(Result::ok).unwrap_or_default();
            if stops.iter().any(|(path, seen)| actor.warned.get(path) != Some(&seen.modified_unix_ms)) {
                actor.look(ctx);
            }
        }));
    }

    /// Says something once, until it changes.
    fn complain(&mut self, text: String) {
        if self.complaint.as_ref() != Some(&text) {
            tracing::warn!("{text}");
            self.complaint = Some(text);
        }
    }

    fn consider(&mut self, jobs: Listing, stops: Listing, ctx: &mut Context<Self>) {
        if !self.claimed.is_empty() {
            self.claimed.retain(|path, _| jobs.iter().any(|(listed, _)| listed == path));
        }
        let mut ready = self.table.update(jobs, &self.config.watch, Instant::now());
        self.unfinished = ready.len() > BATCH_MAX || self.table.next_due(Instant::now()).is_some();
        if ready.len() > BATCH_MAX {
            ready.truncate(BATCH_MAX);
            self.look_again = true;
        }
        let (keeper, context, taker) = (self.keeper.clone(), self.context.clone(), self.taker.clone());
        let honour_stale = self.config.stop_honour_stale;
        let work = async move {
            let mut decided = Vec::new();
            for (path, seen) in ready {
                let verdict = take(&keeper, &context, &taker, &path, seen).await;
                decided.push((path, seen, verdict));
            }
            let mut judged = Vec::new();
            for (path, seen) in stops {
                if let Some(verdict) = judge(&keeper, &path, seen, honour_stale).await {
                    judged.push((path, seen, verdict));
                }
            }
            (decided, judged)
        };
        ctx.spawn(work.into_actor(self).map(|(decided, judged), actor, ctx| {
            for (path, seen, verdict) in decided {
                actor.tell(&path, seen, verdict);
            }
            for (path, seen, verdict) in judged {
                actor.obey(path, seen, verdict);
            }
            actor.looked(ctx);
        }));
    }

    fn looked(&mut self, ctx: &mut Context<Self>) {
        self.looking = false;
        self.looks_done += 1;
        if self.look_again {
            self.look_in(Duration::ZERO, ctx);
        } else if let Some(due) = self.table.next_due(Instant::now()) {
            self.look_in(due, ctx);
        }
    }

    /// Reports what became of a file.
    fn tell(
        &mut self,
        path: &Path,
        seen: Seen,
        verdict: Result<(Taken, Option<std::io::Error>), QueueError>,
    ) {
        let name = path.display();
        let verdict = verdict.map(|(taken, unclaimable)| {
            if let Some(error) = unclaimable {
                self.tell_unclaimable(path, &error);
            }
            taken
        });
        match verdict {
            Ok(Taken::Moved) => return self.table.postpone(path, Instant::now() + POSTPONE),
            Ok(Taken::Unreadable(error)) => {
                self.complain(format!("{name} cannot be read: {error}"));
                return self.table.postpone(path, Instant::now() + POSTPONE);
            }
            Ok(Taken::Foreign(Foreign::Taken { machine_id, is_namesake: true, .. })) => tracing::warn!(
                "{name} was taken by a service with another state folder on this machine, {machine_id}. If that is gone for \
                 good and the job is to run again, remove {name}.accepted.json and write the file again"
            ),
            Ok(Taken::Foreign(Foreign::Taken { machine_id, edited: true, .. })) => tracing::warn!(
                "{name} was edited; it belongs to the machine {machine_id}, which took it before. If that is gone for good, \
                 remove {name}.accepted.json and write the file again to run it here"
            ),
            Ok(Taken::Foreign(Foreign::Taken { machine_id, .. })) => {
                tracing::info!("{name} is a job of the machine {machine_id}, which watches this folder too");
            }
            Ok(Taken::Foreign(Foreign::Refused { machine_id })) => {
                tracing::info!(
                    "{name} was refused by the machine {machine_id}, which watches this folder too"
                );
            }
            Ok(Taken::Foreign(Foreign::Claimed { machine_id })) => {
                return self.wait_for(path, seen, &machine_id);
            }
            Ok(Taken::Decided(Verdict::Accepted(record))) => {
                super::supervisor::prepare_log(&record);
                tracing::info!(task_id = %record.task_id, "{name} is accepted");
                for note in record.spec.ignored.iter().chain(&record.spec.overridden) {
                    tracing::warn!(task_id = %record.task_id, "key `{}`: {}", note.key, note.reason);
                }
                self.observer.notice(&Notice::Accepted(record));
                // It also looks by itself once a second.
                self.supervisor.do_send(Wake);
            }
            Ok(Taken::Decided(Verdict::DryRun(_))) => tracing::info!("{name} is valid; it asked for no run"),
            Ok(Taken::Decided(Verdict::Known(entry))) => match entry.task_id.filter(|_| entry.accepted) {
                Some(task_id) => tracing::info!(%task_id, "{name} is unchanged: it became this job before"),
                None => tracing::debug!("{name} is unchanged: its verdict stands"),
            },
            Ok(Taken::Decided(Verdict::Rejected(reason))) => {
                tracing::error!("{name} is rejected:\n{reason}");
                self.observer.notice(&Notice::Rejected { source: name.to_string(), reason });
            }
            Err(error) => {
                // The file is still there and is taken at a later look.
                let cause =
                    std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
                self.complain(format!("cannot write the verdict on {name} into the journal: {error}{cause}"));
                return self.table.postpone(path, Instant::now() + POSTPONE);
            }
        }
        self.claimed.remove(path);
        self.table.decided(path, seen);
    }

    /// Leaves a file to the service that is deciding about it.
    fn wait_for(&mut self, path: &Path, seen: Seen, machine_id: &str) {
        let since = *self.claimed.entry(path.to_owned()).or_insert_with(Instant::now);
        if since.elapsed() < CLAIM_PATIENCE {
            return self.table.postpone(path, Instant::now() + POSTPONE);
        }
        let claim = claims::claim_path(path);
        tracing::warn!(
            "{} is claimed by the machine {machine_id}, which has not decided for {} s. It will when it is back; if it never \
             comes, remove {} and write the file again",
            path.display(),
            CLAIM_PATIENCE.as_secs(),
            claim.display()
        );
        self.claimed.remove(path);
        self.table.decided(path, seen);
    }

    /// Says once that files of this folder cannot be claimed.
    fn tell_unclaimable(&mut self, path: &Path, error: &std::io::Error) {
        if !std::mem::replace(&mut self.told_unclaimable, true) {
            tracing::warn!(
                "{} and others beside it cannot be claimed ({error}): another service that watches this folder would run \
                 them too",
                path.display()
            );
        }
    }

    fn obey(
        &mut self,
        path: PathBuf,
        seen: Seen,
        (task_id, verdict): (Option<crate::job::ids::TaskId>, StopVerdict),
    ) {
        let first = self.warned.get(&path) != Some(&seen.modified_unix_ms);
        let id = task_id.as_ref().map(ToString::to_string).unwrap_or_default();
        match (verdict, task_id) {
            (StopVerdict::Stop, Some(task_id)) => {
                let why = format!("stopped by {}", path.display());
                // A closed mailbox means a rebuild; the file stays and is seen again.
                self.supervisor.do_send(StopJob { task_id, why });
            }
            (StopVerdict::PutAside(warning), _) => {
                if let Some(warning) = warning.filter(|_| first) {
                    tracing::warn!(task_id = id, "{}: {warning}", path.display());
                }
                let mut done = path.clone().into_os_string();
                done.push(".done");
                if let Err(error) = std::fs::rename(&path, done)
                    && first
                {
                    tracing::warn!(%error, "cannot put {} aside", path.display());
                }
                self.warned.insert(path, seen.modified_unix_ms);
            }
            (StopVerdict::Leave(warning), _) => {
                if first {
                    tracing::warn!(task_id = id, "{}: {warning}", path.display());
                }
                self.warned.insert(path, seen.modified_unix_ms);
            }
            (StopVerdict::Wait, _) => {}
            (StopVerdict::Stop, None) => unreachable!("only a known job is stopped"),
        }
    }
}

type Judged = (Option<crate::job::ids::TaskId>, StopVerdict);

/// Judges a stop file; `None` when its name is none or the journal does not answer.
async fn judge(keeper: &Keeper, path: &Path, seen: Seen, honour_stale: bool) -> Option<Judged> {
    let name = path.file_name()?.to_str()?.to_owned();
    match stop_files::task_id_of(&name)? {
        Err(error) => Some((None, StopVerdict::Leave(error))),
        Ok(task_id) => {
            let id = task_id.clone();
            let record = keeper.with(move |journal| journal.job(&id)).await.ok()?;
            Some((Some(task_id), stop_files::judge(record.as_ref(), seen.modified_unix_ms, honour_stale)))
        }
    }
}

impl Actor for FolderWatcher {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.set_mailbox_capacity(256);
        self.watch(ctx);
        self.look(ctx);
        // Whatever events and plans do, the folders are read this often.
        let interval = Duration::from_millis(self.config.watch.poll_interval_ms);
        ctx.run_interval(interval, |actor, ctx| actor.look(ctx));
        if interval > STOP_INTERVAL {
            ctx.run_interval(STOP_INTERVAL, |actor, ctx| actor.look_for_stops(ctx));
        }
    }
}

/// Read the folders now.
#[derive(Debug, Clone, Copy, Message)]
#[rtype(result = "()")]
pub struct Look;

impl Handler<Look> for FolderWatcher {
    type Result = ();

    fn handle(&mut self, _: Look, ctx: &mut Context<Self>) {
        self.look(ctx);
    }
}

/// What the system says about a file.
#[derive(Debug, Clone, PartialEq, Eq, Message)]
#[rtype(result = "()")]
struct FileEvent {
    path: PathBuf,
    settle: Settle,
}

impl FileEvent {
    fn read(event: &notify::Event) -> Option<Self> {
        let settle = match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => Settle::Closed,
            EventKind::Modify(ModifyKind::Name(RenameMode::To | RenameMode::Both | RenameMode::Any)) => {
                Settle::Closed
            }
            EventKind::Create(_) | EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Any) => Settle::Open,
            EventKind::Modify(ModifyKind::Metadata(_)) => Settle::Unknown,
            _ => return None,
        };
        Some(Self { path: event.paths.last()?.clone(), settle })
    }
}

impl Handler<FileEvent> for FolderWatcher {
    type Result = ();

    fn handle(&mut self, event: FileEvent, ctx: &mut Context<Self>) {
        if event.path.starts_with(&self.inbox) {
            self.supervisor.do_send(Wake);
            return;
        }
        let Some(name) = event.path.file_name().and_then(|name| name.to_str()) else { return };
        if stop_files::task_id_of(name).is_some() {
            self.look_in(Duration::ZERO, ctx);
        } else if listing::is_job_name(name)
            && event.path.parent().is_some_and(|folder| !folder.starts_with(self.config.stop_dir()))
        {
            let delay = self.table.heard(&event.path, event.settle, &self.config.watch);
            self.look_in(delay, ctx);
        }
    }
}

/// Whether every file in the folder has been looked at and decided.
#[derive(Debug, Clone, Copy, Message)]
#[rtype(result = "bool")]
pub struct IsQuiet;

impl Handler<IsQuiet> for FolderWatcher {
    type Result = bool;

    fn handle(&mut self, _: IsQuiet, _ctx: &mut Context<Self>) -> bool {
        self.looks_done > 0 && !self.looking && !self.look_again && !self.unfinished
    }
}
