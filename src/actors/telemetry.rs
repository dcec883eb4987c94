//! Telemetry: what the machine does, measured while jobs run.
//!
//! Owns: a thread with the sampler. In: whether jobs run (from the notices), the wish to end. Out: the newest
//! sample for whoever shows it, and samples into the outbox for each running job. Limits: a look every
//! `LOOK_INTERVAL` while a job runs, none else. When it fails (a driver's library may) the last sample stands.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::keeper::Keeper;
use super::outgoing;
use super::supervisor::Notice;
use crate::adapters::telemetry::{Sample, Sampler};
use crate::job::ids::TaskId;
use crate::job::record::JobRecord;
use crate::job::service::ServiceConfig;

/// Between two looks while a job runs.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// What the machine did at the last look, and which jobs run.
#[derive(Default)]
pub struct Telemetry {
    state: Mutex<State>,
    changed: Condvar,
    must_end: AtomicBool,
}

#[derive(Default)]
struct State {
    running: HashMap<TaskId, JobRecord>,
    newest: Option<Arc<Sample>>,
}

impl Telemetry {
    /// Starts to measure.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(config: Arc<ServiceConfig>, keeper: Keeper) -> std::io::Result<Arc<Self>> {
        let telemetry = Arc::new(Self::default());
        let own = telemetry.clone();
        std::thread::Builder::new().name("telemetry".into()).spawn(move || own.run(&config, &keeper))?;
        Ok(telemetry)
    }

    /// The newest sample.
    pub fn newest(&self) -> Option<Arc<Sample>> {
        self.state.lock().ok().and_then(|state| state.newest.clone())
    }

    /// Hears of a job that starts or leaves.
    pub fn notice(&self, notice: &Notice) {
        let Ok(mut state) = self.state.lock() else { return };
        match notice {
            Notice::Started(record) => {
                state.running.insert(record.task_id.clone(), (**record).clone());
                self.changed.notify_all();
            }
            Notice::Left(record) => {
                state.running.remove(&record.task_id);
            }
            Notice::Accepted(_) | Notice::Rejected { .. } | Notice::Event { .. } => {}
        }
    }

    /// Ends the thread.
    pub fn finish(&self) {
        self.must_end.store(true, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn run(&self, config: &ServiceConfig, keeper: &Keeper) {
        let mut sampler = None;
        let mut sent = Instant::now();
        // The number of the sample is its step on the server's page; it goes on over restarts by the clock.
        while let Some(running) = self.wait_for_jobs() {
            let sampler = sampler.get_or_insert_with(|| Sampler::new(&config.runs_dir));
            let sample = Arc::new(sampler.sample());
            if let Ok(mut state) = self.state.lock() {
                state.newest = Some(sample.clone());
            }
            let interval = Duration::from_millis(config.mlflow.system_metrics_interval_ms);
            if !interval.is_zero() && sent.elapsed() >= interval && config.mlflow.tracking_uri.is_some() {
                sent = Instant::now();
                for record in running {
                    let age_ms = sample.at_unix_ms - record.started_unix_ms.unwrap_or(sample.at_unix_ms);
                    let step = age_ms.max(0) / interval.as_millis().max(1) as i64;
                    let deliveries = outgoing::samples(config, &record, sample.metric_points(step));
                    keeper.later(move |journal| journal.put_samples(&record.instance, deliveries));
                }
            }
            self.pause();
        }
    }

    /// The running jobs, as soon as there are any; `None` at the end.
    fn wait_for_jobs(&self) -> Option<Vec<JobRecord>> {
        let mut state = self.state.lock().ok()?;
        while state.running.is_empty() {
            if self.must_end.load(Ordering::SeqCst) {
                return None;
            }
            state = self.changed.wait(state).ok()?;
        }
        (!self.must_end.load(Ordering::SeqCst)).then(|| state.running.values().cloned().collect())
    }

    fn pause(&self) {
        let until = Instant::now() + LOOK_INTERVAL;
        let Ok(mut state) = self.state.lock() else { return };
        while !self.must_end.load(Ordering::SeqCst) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            match self.changed.wait_timeout(state, left) {
                Ok((again, _)) => state = again,
                Err(_) => return,
            }
        }
    }
}
