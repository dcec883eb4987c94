//! Deliveries from the outbox: results and metrics.

use async_trait::async_trait;

use super::{Fleet, FleetError, Published};
use crate::adapters::sink::{DeliveryError, Receipt, Sink};
use crate::job::delivery::{Delivery, DeliveryBody, SinkName};

/// Makes the deliveries of results and of metrics.
#[derive(Debug, Clone)]
pub struct RedisSink {
    fleet: Fleet,
}

impl RedisSink {
    /// Over the connections of `fleet`.
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
                let what = format!("redis takes results and metrics, not {}", delivery.key);
                return Err(DeliveryError::Refused { what, source: None });
            }
        };
        match published.map_err(sort)? {
            Published::Published | Published::Duplicate => Ok(Receipt::default()),
            Published::Fenced { owner, fence } => Err(DeliveryError::Fenced { owner, fence }),
        }
    }
}

/// What a failed call means for deliveries. A result is given up only when it is the result that is refused: rights, passwords
/// and keys of a wrong type are put right by somebody, and it is delivered then.
fn sort(error: FleetError) -> DeliveryError {
    let what = "cannot deliver to redis".to_owned();
    match error {
        FleetError::Refused { .. } => DeliveryError::Refused { what, source: Some(Box::new(error)) },
        FleetError::Answer { .. } | FleetError::NoGroup { .. } => {
            DeliveryError::Later { what, source: Some(Box::new(error)) }
        }
        FleetError::Config { .. }
        | FleetError::Unreachable { .. }
        | FleetError::Timeout { .. }
        | FleetError::Auth { .. }
        | FleetError::NoPermission { .. }
        | FleetError::WrongType { .. }
        | FleetError::NotReady { .. } => DeliveryError::Outage { what, source: Some(Box::new(error)) },
    }
}
