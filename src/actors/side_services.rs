//! The side services of a running service: couriers, reporter, stream consumer, telemetry, started and ended together.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::Addr;
use tokio::sync::Notify;

use super::courier::Courier;
use super::keeper::Keeper;
use super::outgoing;
use super::reporter::Reporter;
use super::stream_consumer::{Parts, StreamConsumer};
use super::supervisor::{Notice, Observer, Supervisor};
use super::telemetry::Telemetry;
use super::trainer::Supply;
use crate::adapters::queue::QueueError;
use crate::adapters::queue::journal::Journal;
use crate::adapters::queue::outbox::Dispatcher;
use crate::adapters::queue::redis::{Fleet, FleetError, RedisSink};
use crate::adapters::sink::Sink;
use crate::adapters::store::archive::StoreSink;
use crate::adapters::store::{self, BucketName, ObjectStore, StoreError};
use crate::adapters::tracking::{MlflowSink, TrackingError};
use crate::job::delivery::SinkName;
use crate::job::record::JobRecord;
use crate::job::service::ServiceConfig;
use crate::job::spec::SpecContext;

/// Flag in the journal: identity of this state folder among services that claim the same machine id.
const INSTALLATION_FLAG: &str = "installation";
/// Flag in the journal: the name of the machine at the first start to which none was set.
const MACHINE_ID_FLAG: &str = "machine_id";
/// Between two looks whether the threads have ended.
const END_POLL: Duration = Duration::from_millis(10);

/// Why the side services cannot be used as configured.
#[derive(Debug, thiserror::Error)]
pub enum SideServiceError {
    /// Redis.
    #[error("the configuration of Redis cannot be used")]
    Redis(#[source] FleetError),
    /// The object store.
    #[error("the configuration of the object store cannot be used")]
    Store(#[source] StoreError),
    /// The tracking server.
    #[error("the configuration of the tracking server cannot be used")]
    Tracking(#[source] TrackingError),
    /// The journal.
    #[error("the journal cannot be used")]
    Journal(#[source] QueueError),
    /// A thread cannot be started.
    #[error("cannot start a thread for side services")]
    Thread(#[source] std::io::Error),
}

/// Handles on the side services that are configured. Making them does no network.
pub struct Handles {
    pub(super) fleet: Option<Fleet>,
    pub(super) store: Option<Arc<dyn ObjectStore>>,
    tracking: Option<Arc<MlflowSink>>,
    nudges: Vec<(SinkName, Arc<Notify>)>,
}

impl Handles {
    /// Opens the handles.
    ///
    /// # Errors
    /// A configuration that cannot work.
    pub fn open(config: &ServiceConfig, state_dir: &Path) -> Result<Self, SideServiceError> {
        let fleet = if config.redis.is_on() {
            let journal = Journal::open(state_dir).map_err(SideServiceError::Journal)?;
            let installation = installation(&journal).map_err(SideServiceError::Journal)?;
            // A copy of the state folder on another host is another service, that of a container made anew too: it takes
            // the name when the earlier one is gone.
            let host = sysinfo::System::host_name().unwrap_or_default();
            let incarnation = format!("{installation}@{host}");
            let fleet = Fleet::new(&config.redis, &config.machine_id, &incarnation);
            Some(fleet.map_err(SideServiceError::Redis)?)
        } else {
            None
        };
        let store = store::open(&config.store).map_err(SideServiceError::Store)?;
        let tracking = match &config.mlflow.tracking_uri {
            Some(_) => {
                let mut sink = MlflowSink::new(&config.mlflow).map_err(SideServiceError::Tracking)?;
                sink = sink.with_machine(&config.machine_id);
                if let Some(endpoint) = &config.store.endpoint {
                    sink = sink.with_store_url(format!("{endpoint}/{}", config.store.bucket));
                }
                Some(Arc::new(sink))
            }
            None => None,
        };
        let nudges = SinkName::ALL.into_iter().map(|name| (name, Arc::new(Notify::new()))).collect();
        Ok(Self { fleet, store, tracking, nudges })
    }

    /// What the journal asks at each change: deliveries, and the couriers woken for them.
    pub fn dispatcher(&self, config: Arc<ServiceConfig>) -> Dispatcher {
        let decide = outgoing::dispatcher(config);
        let nudges = self.nudges.clone();
        Arc::new(move |record, occasion| {
            let deliveries = decide(record, occasion);
            for delivery in &deliveries {
                // The courier looks through the journal's thread, thus after this transaction.
                if let Some((_, nudge)) = nudges.iter().find(|(name, _)| *name == delivery.sink) {
                    nudge.notify_one();
                }
            }
            deliveries
        })
    }

    /// The store as trainers use it.
    ///
    /// # Errors
    /// A bucket name that cannot be one.
    pub fn supply(&self, config: &ServiceConfig) -> Result<Option<Supply>, SideServiceError> {
        let Some(store) = &self.store else { return Ok(None) };
        let bucket = BucketName::new(&config.store.bucket).map_err(SideServiceError::Store)?;
        Ok(Some(Supply {
            store: store.clone(),
            bucket,
            datasets_dir: config.store.datasets_dir.clone(),
            machine_id: config.machine_id.clone(),
        }))
    }

    fn nudge(&self, name: SinkName) -> Arc<Notify> {
        let found = self.nudges.iter().find(|(known, _)| *known == name);
        found.map_or_else(|| Arc::new(Notify::new()), |(_, nudge)| nudge.clone())
    }
}

/// The identity of the state folder, made at its first use. A restart is the same service, a copy of the configuration with
/// another state folder is not.
pub(super) fn installation(journal: &Journal) -> Result<String, QueueError> {
    if let Some(known) = journal.flag(INSTALLATION_FLAG)? {
        return Ok(known);
    }
    let made = uuid::Uuid::new_v4().to_string();
    journal.set_flag(INSTALLATION_FLAG, Some(&made))?;
    Ok(made)
}

/// The name of this machine: as it was set, else as at the first start over this journal. The host name of a container
/// that is made anew is another one, while the jobs in the journal and in the queue stay its own.
pub(super) fn machine_id(journal: &Journal, config: &ServiceConfig) -> Result<String, QueueError> {
    if config.is_machine_id_set {
        return Ok(config.machine_id.clone());
    }
    if let Some(kept) = journal.flag(MACHINE_ID_FLAG)? {
        return Ok(kept);
    }
    journal.set_flag(MACHINE_ID_FLAG, Some(&config.machine_id))?;
    Ok(config.machine_id.clone())
}

/// The running side services.
pub struct SideServices {
    couriers: Vec<Courier>,
    consumer: Option<StreamConsumer>,
    consumer_nudge: Option<Arc<Notify>>,
    reporter: Option<Reporter>,
    telemetry: Arc<Telemetry>,
}

/// What the side services are started with.
pub struct Surroundings {
    /// The service.
    pub config: Arc<ServiceConfig>,
    /// What it adds to every job.
    pub context: Arc<SpecContext>,
    /// The journal.
    pub keeper: Keeper,
    /// Who gives jobs to slots.
    pub supervisor: Addr<Supervisor>,
    /// Who watches.
    pub observer: Arc<dyn Observer>,
}

impl SideServices {
    /// Starts everything that is configured.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(handles: &Handles, around: &Surroundings) -> Result<Self, SideServiceError> {
        let thread = SideServiceError::Thread;
        let Surroundings { config, context, keeper, supervisor, observer } = around;
        let telemetry = Telemetry::start(config.clone(), keeper.clone()).map_err(thread)?;
        let mut sinks: Vec<Arc<dyn Sink>> = Vec::new();
        if let Some(fleet) = &handles.fleet {
            sinks.push(Arc::new(RedisSink::new(fleet.clone())));
        }
        if let Some(tracking) = &handles.tracking {
            sinks.push(tracking.clone());
        }
        if let Some(store) = &handles.store {
            let sink = StoreSink::new(&config.store, store.clone()).map_err(SideServiceError::Store)?;
            sinks.push(Arc::new(sink));
        }
        let redis_back = Arc::new(Notify::new());
        let mut couriers = Vec::new();
        for sink in sinks {
            let nudge = handles.nudge(sink.name());
            // Of the others nobody but their couriers hears.
            let is_back = if sink.name() == SinkName::Redis { redis_back.clone() } else { Arc::default() };
            let courier = Courier::start(sink, keeper.clone(), config.outbox, nudge, is_back);
            couriers.push(courier.map_err(thread)?);
        }
        let (mut consumer, mut reporter) = (None, None);
        if let Some(fleet) = &handles.fleet {
            let made = Reporter::start(config.clone(), fleet.clone(), telemetry.clone()).map_err(thread)?;
            reporter = Some(made);
            let parts = Parts {
                config: config.clone(),
                context: context.clone(),
                keeper: keeper.clone(),
                supervisor: supervisor.clone(),
                observer: observer.clone(),
                fleet: fleet.clone(),
                redis_back,
            };
            consumer = Some(StreamConsumer::start(parts).map_err(thread)?);
        }
        let consumer_nudge = consumer.as_ref().map(StreamConsumer::nudge);
        Ok(Self { couriers, consumer, consumer_nudge, reporter, telemetry })
    }

    /// Hears a notice. Returns at once.
    pub fn notice(&self, notice: &Notice) {
        self.telemetry.notice(notice);
        if let Some(reporter) = &self.reporter {
            reporter.notice(notice);
        }
        if let (Some(nudge), Notice::Left(_)) = (&self.consumer_nudge, notice) {
            nudge.notify_one();
        }
    }

    /// Shows where jobs are that an earlier start of this service had in hand: it may have been killed before it did.
    pub fn show_again(&self, records: Vec<JobRecord>) {
        let Some(reporter) = &self.reporter else { return };
        for record in records {
            reporter.show_again(record);
        }
    }

    /// True when the shared queue had nothing to take at the last look.
    pub fn is_quiet(&self) -> bool {
        self.consumer.as_ref().is_none_or(StreamConsumer::is_quiet)
    }

    /// Why the service must not go on, if so.
    pub fn fatal(&self) -> Option<String> {
        self.consumer.as_ref().and_then(StreamConsumer::fatal)
    }

    /// Takes nothing more from the shared queue; what runs stays this machine's.
    pub fn stop_taking(&self) {
        if let Some(consumer) = &self.consumer {
            consumer.stop_taking();
        }
    }

    /// Tells other machines that this one has left. For a service whose trainers have ended.
    pub fn leave(&self) {
        if let Some(consumer) = &self.consumer {
            consumer.leave();
        }
    }

    /// True when a part ended that should go on: without its heartbeats other machines would take this one's jobs.
    pub fn has_failed(&self) -> bool {
        self.consumer.as_ref().is_some_and(StreamConsumer::is_finished)
    }

    /// Lets the couriers deliver what they can within `limit`, and ends them. Leases are renewed meanwhile. What is left is in
    /// the outbox.
    pub async fn deliver(&self, limit: Duration) {
        if let Some(reporter) = &self.reporter {
            reporter.finish();
        }
        for courier in &self.couriers {
            courier.finish(limit);
        }
        self.telemetry.finish();
        let is_over = || {
            self.couriers.iter().all(Courier::is_finished)
                && self.reporter.as_ref().is_none_or(Reporter::is_finished)
        };
        wait_until(is_over, limit).await;
    }

    /// As [`SideServices::deliver`], and ends everything.
    pub async fn finish(&self, limit: Duration) {
        if let Some(consumer) = &self.consumer {
            consumer.finish();
        }
        let deadline = Instant::now() + limit;
        self.deliver(limit).await;
        let is_over = || self.consumer.as_ref().is_none_or(StreamConsumer::is_finished);
        wait_until(is_over, deadline.saturating_duration_since(Instant::now())).await;
    }
}

async fn wait_until(is_over: impl Fn() -> bool, limit: Duration) {
    let deadline = Instant::now() + limit;
    while !is_over() && Instant::now() < deadline {
        tokio::time::sleep(END_POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_the_first_start_stays_unless_one_is_set() {
        let journal = Journal::in_memory().expect("opens");
        let config = |name: &str, is_machine_id_set| ServiceConfig {
            machine_id: name.into(),
            is_machine_id_set,
            ..ServiceConfig::default()
        };
        let named = |config: ServiceConfig| machine_id(&journal, &config).expect("a name");
        assert_eq!(named(config("chosen", true)), "chosen");
        assert_eq!(named(config("container-1", false)), "container-1", "a name that was set is not kept");
        assert_eq!(named(config("container-2", false)), "container-1");
        assert_eq!(named(config("chosen", true)), "chosen");
    }
}
