//! Results and metrics of the outbox, delivered to Redis.

use async_trait::async_trait;

use crate::adapters::queue::redis::{Fleet, FleetError, Published, Retry};
use crate::adapters::sink::{DeliveryError, Receipt, Sink};
use crate::job::delivery::{Delivery, DeliveryBody, SinkName};

/// The sink of Redis.
pub struct RedisSink {
    fleet: Fleet,
}

impl RedisSink {
    /// A sink over a handle.
    pub fn new(fleet: Fleet) -> Self {
        Self { fleet }
    }
}

#[async_trait]
impl Sink for RedisSink {
    fn name(&self) -> SinkName {
        SinkName::Redis
    }

    async fn deliver(&self, delivery: &Delivery) -> Result<Receipt, DeliveryError> {
        let published = match &delivery.body {
            DeliveryBody::Result(body) => self.fleet.publish_result(body, body.run.fence).await,
            DeliveryBody::EpochMetrics(body) => self.fleet.publish_metrics(body).await,
            DeliveryBody::Files(_)
            | DeliveryBody::RunStart(_)
            | DeliveryBody::RunMetrics(_)
            | DeliveryBody::RunEnd(_) => {
                let what = format!("{} is nothing for Redis", delivery.key);
                return Err(DeliveryError::Refused { what, source: None });
            }
        };
        match published.map_err(failure)? {
            Published::Published | Published::Duplicate => Ok(Receipt::default()),
            Published::Fenced { owner, fence } => Err(DeliveryError::Fenced { owner, fence }),
        }
    }
}

/// A server that refuses a command may be mended (a full memory, a read-only replica, rights): only a delivery that it
/// cannot understand would be given up, and there is none.
fn failure(error: FleetError) -> DeliveryError {
    let what = "Redis did not take it".to_owned();
    match error.retry() {
        Retry::Never | Retry::After | Retry::Reconnect => {
            DeliveryError::Outage { what, source: Some(Box::new(error)) }
        }
    }
}
