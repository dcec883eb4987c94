//! The Redis of the fleet behind the caches of this machine.

use std::cell::Cell;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use crate::adapters::queue::redis::{Fleet, FleetError};
use crate::data::shelf::SecondTier;
use crate::job::service::ServiceConfig;

/// Limit of one question, with the connection that the first one makes. Working it out anew takes seconds.
const LIMIT: Duration = Duration::from_millis(300);

/// Values that machines share through Redis. The first failure is the last question: who waits for an answer at the
/// command line waits for Redis once.
pub(super) struct SharedCache {
    fleet: Fleet,
    /// Taken at the end only.
    runtime: Option<Runtime>,
    is_away: Cell<bool>,
}

impl SharedCache {
    /// `None` when no Redis is configured, or it cannot be used as configured.
    pub(super) fn open(config: &ServiceConfig) -> Option<Self> {
        if !config.redis.is_on() {
            return None;
        }
        let fleet = Fleet::new(&config.redis, &config.machine_id, "recommend");
        let fleet = fleet.inspect_err(|error| tracing::debug!("no shared cache: {}", error.chain())).ok()?;
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.inspect_err(|error| tracing::debug!("no shared cache: {error}")).ok()?;
        Some(Self { fleet, runtime: Some(runtime), is_away: Cell::new(false) })
    }

    fn ask<T>(&self, question: impl Future<Output = Result<T, FleetError>>) -> Option<T> {
        let runtime = self.runtime.as_ref().filter(|_| !self.is_away.get())?;
        let fault = match runtime.block_on(async { tokio::time::timeout(LIMIT, question).await }) {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => error.chain(),
            Err(_) => format!("redis at {} takes longer than {LIMIT:?}", self.fleet.address()),
        };
        tracing::debug!("the shared cache is not asked any more: {fault}");
        self.is_away.set(true);
        None
    }
}

impl SecondTier for SharedCache {
    fn get(&self, key: &str) -> Option<String> {
        self.ask(self.fleet.cache_get(key)).flatten()
    }

    fn set(&self, key: &str, text: &str, lifetime: Duration) {
        let lifetime_ms = u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX);
        self.ask(self.fleet.cache_set(key, text, lifetime_ms));
    }
}

impl Drop for SharedCache {
    fn drop(&mut self) {
        // A look-up of the host name may hang in a thread of the runtime; the end of the command does not wait for it.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
