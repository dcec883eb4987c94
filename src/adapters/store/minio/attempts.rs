//! Deadlines and tries of requests.

use std::time::Duration;

use minio::s3::error::Error;
use tokio::time::{Instant, sleep, timeout};

use super::MinioStore;
use super::faults::{self, Soon};
use crate::adapters::store::error::StoreError;

/// Time of a request that carries nothing: the way there, and the server's own work.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// The slowest pace at which a body may flow.
const PACE_BYTES_PER_S: u64 = 256 << 10;
/// Tries of one request.
const TRIES_MAX: u32 = 8;
/// Tries while nobody listens.
const CONNECT_TRIES_MAX: u32 = 3;
/// Tries while nobody answers.
const SILENT_TRIES_MAX: u32 = 2;
/// No try begins later than this after the first.
const TRY_FOR: Duration = Duration::from_secs(30);
/// The first pause between tries.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// The longest.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Time that a request may take that carries so many bytes.
pub(super) fn limit(bytes: u64) -> Duration {
    REQUEST_LIMIT + Duration::from_secs(bytes / PACE_BYTES_PER_S)
}

/// Counts tries and says whether there is another one.
pub(super) struct Tries {
    begun: Instant,
    count: u32,
}

impl Tries {
    pub(super) fn new() -> Self {
        Self { begun: Instant::now(), count: 0 }
    }

    /// Waits before another try; false when there is none.
    pub(super) async fn again(&mut self, soon: Soon) -> bool {
        self.count += 1;
        let tries_max = match soon {
            Soon::No => return false,
            Soon::NotListening => CONNECT_TRIES_MAX,
            Soon::Silent => SILENT_TRIES_MAX,
            Soon::Yes => TRIES_MAX,
        };
        if self.count >= tries_max || self.begun.elapsed() > TRY_FOR {
            return false;
        }
        sleep(jittered(PAUSE_MIN * 2u32.pow(self.count.min(8))).min(PAUSE_MAX)).await;
        true
    }

    /// Something was achieved: it is counted anew.
    pub(super) fn reset(&mut self) {
        *self = Self::new();
    }
}

/// Between half and the whole of a pause, so that machines do not come back together.
fn jittered(pause: Duration) -> Duration {
    let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let part = nanos.map_or(0, |now| now.subsec_nanos()) % 512;
    pause.mul_f64(0.5 + f64::from(part) / 1024.0)
}

impl MinioStore {
    /// Makes a request with a deadline, again while its faults are of the moment. `bytes` is what it carries.
    pub(super) async fn attempt<T, F>(
        &self,
        what: &str,
        object: &str,
        bytes: u64,
        request: impl Fn() -> F + Send,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Error>> + Send,
    {
        let mut tries = Tries::new();
        loop {
            let limit = limit(bytes);
            let (error, soon) = match timeout(limit, request()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => {
                    let fault = faults::read(what, object, error);
                    (fault.error, fault.soon)
                }
                Err(_) => {
                    let limit_ms = limit.as_millis() as u64;
                    (StoreError::Timeout { what: what.to_owned(), limit_ms }, Soon::Silent)
                }
            };
            if !tries.again(soon).await {
                return Err(error);
            }
            tracing::debug!(%error, "the store is asked again");
        }
    }
}
