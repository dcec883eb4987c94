//! The service: starts the actors, rebuilds them when one fails, ends them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use actix::{Actor, Addr};
use tokio::signal::unix::{SignalKind, signal};

use super::folder_watcher::{FolderWatcher, IsQuiet};
use super::intake::Taker;
use super::keeper::Keeper;
use super::recovery;
use super::side_services::{self, Handles, SideServiceError, SideServices, Surroundings};
use super::supervisor::{Introduce, IsIdle, KillAll, Notice, Observer, Shutdown, Supervisor, end_log};
use super::trainer::TrainerConfig;
use crate::adapters::gpu::{GpuPort, NoGpus, ProbeProgram};
use crate::adapters::queue::journal::Journal;
use crate::adapters::queue::lock::{LockError, ProcessLock};
use crate::adapters::queue::{JobStore, QueueError};
use crate::job::clock::now_unix_ms;
use crate::job::record::JobRecord;
use crate::job::service::ServiceConfig;
use crate::job::slot::GpuChoice;
use crate::job::state::JobState;

/// Rebuilds within [`REBUILD_WINDOW`] before the service gives up.
const REBUILDS_MAX: usize = 5;
/// See [`REBUILDS_MAX`].
const REBUILD_WINDOW: Duration = Duration::from_secs(600);
/// Between two looks at the health of the actors.
const HEALTH_INTERVAL: Duration = Duration::from_millis(500);
/// The same while the service waits for the queue to become empty.
const ONCE_INTERVAL: Duration = Duration::from_millis(100);
/// How long deliveries to side services may hold up the end of a service whose queue became empty.
const ONCE_DELIVERY_LIMIT: Duration = Duration::from_secs(30);
/// Jobs that ended within this time before a start are shown once more.
const LATELY: Duration = Duration::from_secs(15 * 60);
/// Newest jobs that are looked at for it.
const LATELY_JOBS_MAX: u32 = 500;
/// How long its goodbye to other machines may take.
const LEAVE_LIMIT: Duration = Duration::from_secs(3);

/// How a service ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServiceEnd {
    /// `once`: the queue became empty. True when every job of this session completed and no file was refused.
    Empty {
        /// See above.
        all_completed: bool,
    },
    /// It was told to end.
    Stopped,
}

/// Why a service did not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Another service has the state folder.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The journal cannot be used.
    #[error("the journal cannot be used")]
    Queue(#[from] QueueError),
    /// A folder cannot be made.
    #[error("cannot make the folder {path}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The system refused something.
    #[error("cannot {what}")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A side service is configured in a way that cannot work.
    #[error("a side service cannot be used")]
    SideService(#[from] SideServiceError),
    /// The service must not go on.
    #[error("{reason}")]
    Refused {
        /// Why.
        reason: String,
    },
    /// The actors failed again and again.
    #[error("the actors failed {REBUILDS_MAX} times within {} s; the journal has everything", REBUILD_WINDOW.as_secs())]
    Rebuilds,
}

/// Where the command line leaves a sign that it wrote to the journal.
pub fn inbox(state_dir: &Path) -> PathBuf {
    state_dir.join("inbox")
}

/// Counts what the exit code of `once` depends on, and passes every notice on.
struct Tally {
    inner: Arc<dyn Observer>,
    counts: Mutex<Counts>,
    side: RwLock<Option<Arc<SideServices>>>,
}

#[derive(Default)]
struct Counts {
    not_completed: BTreeSet<i64>,
    rejected: bool,
}

impl Observer for Tally {
    fn notice(&self, notice: &Notice) {
        if let Notice::Left(record) = notice {
            end_log(record);
        }
        if let Ok(mut counts) = self.counts.lock() {
            match notice {
                Notice::Left(record) if record.state == JobState::Completed => {
                    counts.not_completed.remove(&record.seq);
                }
                Notice::Left(record) => {
                    counts.not_completed.insert(record.seq);
                }
                Notice::Rejected { .. } => counts.rejected = true,
                Notice::Accepted(_) | Notice::Started(_) | Notice::Event { .. } => {}
            }
        }
        if let Ok(side) = self.side.read()
            && let Some(side) = side.as_ref()
        {
            side.notice(notice);
        }
        self.inner.notice(notice);
    }
}

impl Tally {
    fn set_side(&self, side: Option<Arc<SideServices>>) {
        if let Ok(mut place) = self.side.write() {
            *place = side;
        }
    }

    fn all_completed(&self) -> bool {
        self.counts.lock().is_ok_and(|counts| counts.not_completed.is_empty() && !counts.rejected)
    }
}

/// Jobs that ended shortly before a start, newest first. A service that was killed may not have shown that they did.
fn ended_lately(journal: &Journal) -> Result<Vec<JobRecord>, QueueError> {
    let since_unix_ms = now_unix_ms() - LATELY.as_millis() as i64;
    let mut records = journal.recent(LATELY_JOBS_MAX)?;
    records.retain(|record| record.finished_unix_ms.is_some_and(|at| at >= since_unix_ms));
    Ok(records)
}

struct Actors {
    supervisor: Addr<Supervisor>,
    watcher: Addr<FolderWatcher>,
    side: Arc<SideServices>,
}

/// A service that is being run.
pub struct Service {
    config: Arc<ServiceConfig>,
    trainer_config: Arc<TrainerConfig>,
    gpus: Arc<dyn GpuPort>,
    working_dir: PathBuf,
    state_dir: PathBuf,
    tally: Arc<Tally>,
    handles: Handles,
    _lock: ProcessLock,
}

impl Service {
    /// Takes the state folder and makes the other folders.
    ///
    /// # Errors
    /// [`ServiceError`] names what is in the way.
    pub fn new(mut config: ServiceConfig, observer: Arc<dyn Observer>) -> Result<Self, ServiceError> {
        let working_dir = std::env::current_dir()
            .map_err(|source| ServiceError::System { what: "find the working folder", source })?;
        let lock = ProcessLock::acquire(&config.state_dir)?;
        // Absolute, so that the argument of a left-over trainer names this state folder and no other.
        let state_dir = std::fs::canonicalize(&config.state_dir)
            .map_err(|source| ServiceError::Folder { path: config.state_dir.clone(), source })?;
        for path in [config.configs_dir.clone(), config.stop_dir(), inbox(&state_dir)] {
            std::fs::create_dir_all(&path).map_err(|source| ServiceError::Folder { path, source })?;
        }
        let machine_id = side_services::machine_id(&Journal::open(&state_dir)?, &config)?;
        if machine_id == config.machine_id {
            tracing::info!("the name of this machine is {machine_id}");
        } else {
            tracing::info!(
                "the name of this machine is {machine_id}, as at the first start over this state folder; the host name is {} \
                 now. MACHINE_ID gives it another one",
                config.machine_id
            );
        }
        config.machine_id = machine_id;
        let program = match &config.trainer_program {
            Some(program) => program.clone(),
            None => std::env::current_exe()
                .map_err(|source| ServiceError::System { what: "find this program's file", source })?,
        };
        // The program that trains is the one to say where it can.
        let gpus: Arc<dyn GpuPort> = match config.gpus {
            GpuChoice::None => Arc::new(NoGpus),
            GpuChoice::All | GpuChoice::Only(_) => Arc::new(ProbeProgram::new(program.clone())),
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (config.cpu_slots > 1).then(|| (cores / config.cpu_slots).max(1));
        let handles = Handles::open(&config, &state_dir)?;
        let trainer_config = TrainerConfig {
            supply: handles.supply(&config)?,
            program,
            state_dir: state_dir.clone(),
            threads,
            gpu_share_max: f64::from(config.max_gpu_percent) / 100.0,
            stall_timeout_ms: config.stall_timeout_ms,
        };
        Ok(Self {
            handles,
            config: Arc::new(config),
            trainer_config: Arc::new(trainer_config),
            gpus,
            working_dir,
            state_dir,
            tally: Arc::new(Tally { inner: observer, counts: Mutex::default(), side: RwLock::default() }),
            _lock: lock,
        })
    }

    /// Runs until told to end, or with `once` until the queue is empty.
    ///
    /// # Errors
    /// [`ServiceError`]; the journal has everything.
    pub fn run(self, once: bool) -> Result<ServiceEnd, ServiceError> {
        let system = actix::System::new();
        system.block_on(self.serve(once))
    }

    async fn serve(self, once: bool) -> Result<ServiceEnd, ServiceError> {
        let hear =
            |kind| signal(kind).map_err(|source| ServiceError::System { what: "listen for signals", source });
        let (mut terminate, mut interrupt) = (hear(SignalKind::terminate())?, hear(SignalKind::interrupt())?);
        let mut rebuilds: Vec<Instant> = Vec::new();
        loop {
            let (actors, keeper) = self.build()?;
            loop {
                let interval = if once { ONCE_INTERVAL } else { HEALTH_INTERVAL };
                tokio::select! {
                    _ = terminate.recv() => return self.shut_down(&actors, &mut terminate, &mut interrupt).await,
                    _ = interrupt.recv() => return self.shut_down(&actors, &mut terminate, &mut interrupt).await,
                    () = tokio::time::sleep(interval) => {}
                }
                if !actors.supervisor.connected() || !actors.watcher.connected() || actors.side.has_failed() {
                    break;
                }
                if let Some(reason) = actors.side.fatal() {
                    self.shut_down(&actors, &mut terminate, &mut interrupt).await?;
                    return Err(ServiceError::Refused { reason });
                }
                if once && is_empty(&actors, &keeper).await {
                    // Leases last until the results are out.
                    actors.side.deliver(ONCE_DELIVERY_LIMIT).await;
                    actors.side.leave();
                    actors.side.finish(LEAVE_LIMIT).await;
                    actors.supervisor.do_send(Shutdown);
                    return Ok(ServiceEnd::Empty { all_completed: self.tally.all_completed() });
                }
            }
            tracing::error!("an actor failed; rebuilding all from the journal");
            rebuilds.retain(|at| at.elapsed() < REBUILD_WINDOW);
            rebuilds.push(Instant::now());
            if rebuilds.len() > REBUILDS_MAX {
                return Err(ServiceError::Rebuilds);
            }
            self.tally.set_side(None);
            actors.side.finish(HEALTH_INTERVAL).await;
            drop(actors);
            // The dropped actors' processes are killed by their drop; recovery makes sure of it.
            tokio::time::sleep(HEALTH_INTERVAL).await;
        }
    }

    /// Puts the journal in order and starts the actors over it.
    fn build(&self) -> Result<(Actors, Keeper), ServiceError> {
        let mut journal = Journal::open(&self.state_dir)?;
        journal.limit_outbox(self.config.outbox.items_max);
        journal.set_dispatcher(self.handles.dispatcher(self.config.clone()));
        let mut left = recovery::recover(&mut journal, &self.config, &self.state_dir)?;
        left.extend(ended_lately(&journal)?);
        let installation = side_services::installation(&journal)?;
        let taker = Taker { machine_id: self.config.machine_id.clone(), installation };
        let keeper = Keeper::start(journal)
            .map_err(|source| ServiceError::System { what: "start the journal's thread", source })?;
        let observer: Arc<dyn Observer> = self.tally.clone();
        let supervisor = Supervisor::new(
            self.config.clone(),
            self.trainer_config.clone(),
            keeper.clone(),
            self.gpus.clone(),
            observer.clone(),
        )
        .start();
        let context = Arc::new(self.config.spec_context(self.working_dir.clone()));
        let around = Surroundings {
            config: self.config.clone(),
            context: context.clone(),
            keeper: keeper.clone(),
            supervisor: supervisor.clone(),
            observer: observer.clone(),
        };
        let side = Arc::new(SideServices::start(&self.handles, &around)?);
        side.show_again(left);
        self.tally.set_side(Some(side.clone()));
        let watcher = FolderWatcher::new(
            self.config.clone(),
            context,
            taker,
            inbox(&self.state_dir),
            keeper.clone(),
            supervisor.clone(),
            observer,
        )
        .start();
        supervisor.do_send(Introduce(watcher.clone()));
        Ok((Actors { supervisor, watcher, side }, keeper))
    }

    /// Lets the trainers save and leave; a second signal kills them.
    async fn shut_down(
        &self,
        actors: &Actors,
        terminate: &mut tokio::signal::unix::Signal,
        interrupt: &mut tokio::signal::unix::Signal,
    ) -> Result<ServiceEnd, ServiceError> {
        tracing::info!("shutting down: trainers save and leave; a second signal kills them");
        actors.side.stop_taking();
        actors.supervisor.do_send(Shutdown);
        let limit = Duration::from_millis(self.config.shutdown_limit_ms);
        let deadline = Instant::now() + limit;
        while actors.supervisor.connected() {
            if Instant::now() >= deadline {
                tracing::error!("the shutdown took too long; the rest is recovered at the next start");
                break;
            }
            tokio::select! {
                _ = terminate.recv() => actors.supervisor.do_send(KillAll),
                _ = interrupt.recv() => actors.supervisor.do_send(KillAll),
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
            }
        }
        if !actors.supervisor.connected() {
            actors.side.leave();
        }
        // The newest checkpoints may go out while there is time; what is left waits in the outbox.
        let left = deadline.saturating_duration_since(Instant::now()).min(limit / 3);
        actors.side.finish(left).await;
        Ok(ServiceEnd::Stopped)
    }
}

/// True when every dropped file has its verdict and no job is left to do.
async fn is_empty(actors: &Actors, keeper: &Keeper) -> bool {
    let quiet = actors.watcher.send(IsQuiet).await.unwrap_or(false);
    let is_done = keeper.with(|journal| Ok(!journal.has_active()?)).await.unwrap_or(false);
    // The journal knows of an end before the supervisor has told anybody.
    quiet && is_done && actors.side.is_quiet() && actors.supervisor.send(IsIdle).await.unwrap_or(false)
}
