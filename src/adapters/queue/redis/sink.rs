//! Deliveries from the outbox: results and metrics.

use async_trait::async_trait;

use super::{Fleet, FleetError, Published};
use crate::adapters::sink::{DeliveryError, Receipt, Sink};
use crate::job::delivery::{Delivery, DeliveryBody, ResultBody, SinkName};

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

impl RedisSink {
    /// Publishes a result; afterwards what is shown of the job says so too, also when the service that showed it is gone.
    async fn result(&self, body: &ResultBody) -> Result<Published, FleetError> {
        let published = self.fleet.publish_result(body, body.run.fence).await?;
        if !matches!(published, Published::Fenced { .. }) {
            let status = body.message["status"].as_str().unwrap_or_default().to_owned();
            let reason = body.message["reason"].as_str().unwrap_or_default().to_owned();
            let fields = [
                ("task_id".to_owned(), body.run.task_id.to_string()),
                ("status".to_owned(), status),
                ("reason".to_owned(), reason),
            ];
            self.fleet.progress(&body.run.task_id, &fields, true).await?;
            self.fleet.log_end(&body.run.task_id).await?;
        }
        Ok(published)
    }
}

#[async_trait]
impl Sink for RedisSink {
    fn name(&self) -> SinkName {
        SinkName::Redis
    }

    async fn deliver(&self, delivery: &Delivery) -> Result<Receipt, DeliveryError> {
        let published = match &delivery.body {
            DeliveryBody::Result(body) => self.result(body).await,
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
