//! The reporter: shows running jobs in Redis (progress, log) and delivers results and metrics there.
//!
//! Owns: a thread with a runtime of its own, what is to be shown of each job. In: the supervisor's notices (never
//! waits), the wish to end. Out: `progress:{task_id}`, the channels, `stream:{task_id}`. What is shown is liveness: while
//! Redis is away nothing piles up, and afterwards the newest state and the log from where it was are shown. Results and
//! metrics are facts: they go through the outbox ([`RedisSink`](crate::adapters::queue::redis::RedisSink)). Limits: a flush a second, `LOG_BYTES_MAX` of
//! a log at once, `JOBS_MAX` jobs.

mod fields;
mod log;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;

use super::outgoing;
use super::supervisor::Notice;
use super::telemetry::Telemetry;
use crate::adapters::logs::{job_log_begin, job_log_path};
use crate::adapters::queue::redis::{Fleet, FleetError, Retry};
use crate::job::delivery::RunRef;
use crate::job::ids::TaskId;
use crate::job::record::JobRecord;
use crate::job::service::ServiceConfig;
use crate::job::state::JobState;
use fields::Shown;

/// Between two flushes of what changed.
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);
/// Pause after a failure, doubling up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(500);
/// See [`PAUSE`].
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Bytes of a log that are sent at once.
const LOG_BYTES_MAX: usize = 256 << 10;
/// Jobs shown at a time: those beyond wait for one to end.
const JOBS_MAX: usize = 20_000;

/// A way to the reporter.
pub struct Reporter {
    board: Arc<Board>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

#[derive(Default)]
struct Board {
    jobs: Mutex<BTreeMap<TaskId, Shown>>,
    nudge: Notify,
    must_end: AtomicBool,
}

impl Reporter {
    /// Starts the reporter.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(
        config: Arc<ServiceConfig>,
        fleet: Fleet,
        telemetry: Arc<Telemetry>,
    ) -> std::io::Result<Self> {
        let board = Arc::new(Board::default());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut round = Round {
            config,
            fleet,
            telemetry,
            board: board.clone(),
            logs: BTreeMap::new(),
            refused: BTreeSet::new(),
        };
        let thread = std::thread::Builder::new()
            .name("reporter".into())
            .spawn(move || runtime.block_on(round.run()))?;
        Ok(Self { board, thread: Mutex::new(Some(thread)) })
    }

    /// Hears a notice. Never waits for Redis.
    pub fn notice(&self, notice: &Notice) {
        let Ok(mut jobs) = self.board.jobs.lock() else { return };
        match notice {
            Notice::Accepted(record) | Notice::Started(record) | Notice::Left(record) => {
                if let Some(shown) = jobs.get_mut(&record.task_id) {
                    shown.record((**record).clone());
                } else if jobs.len() < JOBS_MAX {
                    jobs.insert(record.task_id.clone(), Shown::new((**record).clone()));
                }
                drop(jobs);
                self.board.nudge.notify_one();
            }
            Notice::Event { task_id, event } => {
                if let Some(shown) = jobs.get_mut(task_id) {
                    shown.event(event);
                }
            }
            Notice::Rejected { .. } => {}
        }
    }

    /// Shows a job of an earlier start of the service, unless it is shown to have ended.
    pub fn show_again(&self, record: JobRecord) {
        let Ok(mut jobs) = self.board.jobs.lock() else { return };
        if jobs.len() < JOBS_MAX && !jobs.contains_key(&record.task_id) {
            jobs.insert(record.task_id.clone(), Shown::again(record));
        }
        drop(jobs);
        self.board.nudge.notify_one();
    }

    /// Shows what is left to show and ends.
    pub fn finish(&self) {
        self.board.must_end.store(true, Ordering::SeqCst);
        self.board.nudge.notify_one();
    }

    /// True when its thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread
            .lock()
            .is_ok_and(|thread| thread.as_ref().is_none_or(std::thread::JoinHandle::is_finished))
    }
}

struct Round {
    config: Arc<ServiceConfig>,
    fleet: Fleet,
    telemetry: Arc<Telemetry>,
    board: Arc<Board>,
    /// How far the log of each job was sent, as far as this process knows.
    logs: BTreeMap<TaskId, u64>,
    /// Jobs of which something was refused, so that it is said once of each.
    refused: BTreeSet<TaskId>,
}

/// A job of which something may be to be shown.
struct Wanted {
    run: RunRef,
    seq: i64,
    state: JobState,
}

impl Round {
    async fn run(&mut self) {
        let mut failures = 0u32;
        loop {
            let must_end = self.board.must_end.load(Ordering::SeqCst);
            let pause = match self.flush(must_end).await {
                Ok(()) => {
                    failures = 0;
                    FLUSH_INTERVAL
                }
                Err(error) => {
                    if failures == 0 {
                        // The consumer of the same server says it to people.
                        tracing::debug!("nothing is shown: {}", error.chain());
                    }
                    failures = failures.saturating_add(1);
                    PAUSE.saturating_mul(1 << (failures - 1).min(8)).min(PAUSE_MAX)
                }
            };
            if must_end {
                return;
            }
            if failures == 0 && self.is_idle() {
                self.board.nudge.notified().await;
                continue;
            }
            tokio::time::sleep(pause).await;
        }
    }

    fn is_idle(&self) -> bool {
        self.board.jobs.lock().map_or(true, |jobs| !jobs.values().any(Shown::is_wanted))
    }

    /// Shows everything that changed. What the server refuses of one job does not keep the others from being shown.
    async fn flush(&mut self, is_last: bool) -> Result<(), FleetError> {
        for job in self.wanted() {
            self.tell(&job, is_last).await?;
        }
        Ok(())
    }

    fn wanted(&self) -> Vec<Wanted> {
        let Ok(jobs) = self.board.jobs.lock() else { return Vec::new() };
        let wanted = jobs.values().filter(|shown| shown.is_wanted());
        let of = |record: &JobRecord| Wanted {
            run: outgoing::run_of(&self.config.machine_id, record),
            seq: record.seq,
            state: record.state,
        };
        wanted.map(|shown| of(&shown.record)).collect()
    }

    /// Shows one job; `is_last` when there is no later flush.
    async fn tell(&mut self, job: &Wanted, is_last: bool) -> Result<(), FleetError> {
        let shown = self.show(job).await;
        self.weigh(job, shown)?;
        let sent = self.send_log(job).await;
        // A log that is refused is as good as sent.
        let is_complete = self.weigh(job, sent)?.unwrap_or(true);
        // A moved job is shown by the machine that has it.
        // Its last words may still be on their way to the file.
        if job.state.is_terminal() && is_complete && (self.was_complete(&job.run.task_id) || is_last) {
            self.forget(job).await?;
        }
        Ok(())
    }

    /// Passes on an error that concerns all jobs: the server is away. One that concerns this job is named once.
    fn weigh<T>(&mut self, job: &Wanted, outcome: Result<T, FleetError>) -> Result<Option<T>, FleetError> {
        match outcome {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.retry() == Retry::Reconnect => Err(error),
            Err(error) => {
                let task_id = &job.run.task_id;
                if self.refused.insert(task_id.clone()) {
                    tracing::warn!(%task_id, "the job is not shown, or not all of it: {}", error.chain());
                }
                Ok(None)
            }
        }
    }

    /// True when the log was complete at an earlier flush after the end; notes that it is now.
    fn was_complete(&self, task_id: &TaskId) -> bool {
        let Ok(mut jobs) = self.board.jobs.lock() else { return true };
        jobs.get_mut(task_id).is_none_or(|shown| std::mem::replace(&mut shown.is_log_complete, true))
    }

    async fn show(&self, job: &Wanted) -> Result<(), FleetError> {
        let machine = self.telemetry.newest();
        let task_id = &job.run.task_id;
        let Some((run, fields, is_final, is_again)) = self.board.jobs.lock().ok().and_then(|mut jobs| {
            let shown = jobs.get_mut(task_id).filter(|shown| shown.is_dirty)?;
            let is_again = std::mem::take(&mut shown.is_again);
            shown.is_dirty = false;
            let state = shown.record.state;
            // It may have become another run since it was looked for.
            let run = outgoing::run_of(&self.config.machine_id, &shown.record);
            (state != JobState::Moved)
                .then(|| (run, shown.fields(&self.config, machine.as_deref()), state.is_terminal(), is_again))
        }) else {
            return Ok(());
        };
        let shown = match is_again {
            true => self.fleet.progress_again(&run, &fields, is_final).await,
            false => self.fleet.progress(&run, &fields, is_final).await,
        };
        if shown.as_ref().is_err_and(|error| error.retry() == Retry::Reconnect)
            && let Ok(mut jobs) = self.board.jobs.lock()
            && let Some(shown) = jobs.get_mut(task_id)
        {
            (shown.is_dirty, shown.is_again) = (true, is_again);
        }
        shown.map(drop)
    }

    /// Sends the lines of the log that were not sent. True when everything was.
    async fn send_log(&mut self, job: &Wanted) -> Result<bool, FleetError> {
        if job.state == JobState::Moved {
            return Ok(true);
        }
        let task_id = &job.run.task_id;
        let log = log::JobLog {
            path: job_log_path(&self.config.logging.dir, task_id.as_str()),
            begin: job_log_begin(task_id.as_str()),
            lines_max: self.config.redis.log_lines_max,
            is_final: job.state.is_terminal(),
        };
        let from = self.logs.get(task_id).copied().unwrap_or(log.begin);
        let (offset, is_complete) = log::send(&self.fleet, &job.run, &log, from).await?;
        self.logs.insert(task_id.clone(), offset);
        Ok(is_complete)
    }

    async fn forget(&mut self, job: &Wanted) -> Result<(), FleetError> {
        let task_id = &job.run.task_id;
        if job.state != JobState::Moved {
            let ended = self.fleet.log_end(&job.run).await;
            self.weigh(job, ended)?;
        }
        self.logs.remove(task_id);
        self.refused.remove(task_id);
        if let Ok(mut jobs) = self.board.jobs.lock()
            && jobs.get(task_id).is_some_and(|shown| shown.record.seq == job.seq && !shown.is_dirty)
        {
            jobs.remove(task_id);
        }
        Ok(())
    }
}
