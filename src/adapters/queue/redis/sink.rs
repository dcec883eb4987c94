//! Deliveries from the outbox: results and metrics.

use async_trait::async_trait;
use serde_json::Value as Json;

use super::{Fleet, FleetError, Published, Retry};
use crate::adapters::sink::{DeliveryError, Receipt, Sink};
use crate::job::delivery::{Delivery, DeliveryBody, ResultBody, SinkName};
use crate::job::state::JobState;

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
    async fn result(&self, body: &ResultBody) -> Result<Published, DeliveryError> {
        let published = match self.fleet.publish_result(body, body.run.fence).await {
            Ok(published) => published,
            Err(error) => return Err(self.result_failed(error).await),
        };
        if matches!(published, Published::Fenced { .. }) {
            return Ok(published);
        }
        let task_id = &body.run.task_id;
        let shown = self.fleet.progress_end(&body.run, &end_fields(body)).await;
        for shown in [shown, self.fleet.log_end(&body.run).await] {
            match shown {
                Ok(_) => {}
                // The connection broke in between: the next try finds the result published and shows the rest.
                Err(error) if error.retry() == Retry::Reconnect => return Err(sort(error, true)),
                Err(error) => tracing::warn!(
                    %task_id,
                    "the result is published, but its end cannot be shown: {}",
                    error.chain()
                ),
            }
        }
        Ok(published)
    }

    /// What it means for deliveries that a result was not published. A key of a wrong type holds up all of them only when it
    /// is that of the results; others belong to one job.
    async fn result_failed(&self, error: FleetError) -> DeliveryError {
        if matches!(error, FleetError::WrongType { .. }) {
            match self.fleet.has_results_stream().await {
                Ok(true) => {}
                Ok(false) => return outage(error),
                Err(second) => return sort(second, true),
            }
        }
        sort(error, true)
    }
}

/// What the progress of a job says of its end.
fn end_fields(body: &ResultBody) -> Vec<(String, String)> {
    let message = &body.message;
    let text = |value: &Json| value.as_str().unwrap_or_default().to_owned();
    let mut fields = vec![
        ("task_id", body.run.task_id.to_string()),
        ("status", text(&message["status"])),
        ("reason", text(&message["reason"])),
        ("error_class", text(&message["error"]["class"])),
        ("eta_seconds", String::new()),
    ];
    if message["status"] == JobState::Completed.as_str() {
        fields.push(("progress", "100.0".to_owned()));
    }
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

#[async_trait]
impl Sink for RedisSink {
    fn name(&self) -> SinkName {
        SinkName::Redis
    }

    async fn deliver(&self, delivery: &Delivery) -> Result<Receipt, DeliveryError> {
        let published = match &delivery.body {
            DeliveryBody::Result(body) => self.result(body).await?,
            DeliveryBody::EpochMetrics(body) => {
                self.fleet.publish_metrics(body).await.map_err(|error| sort(error, false))?
            }
            DeliveryBody::Files(_)
            | DeliveryBody::RunStart(_)
            | DeliveryBody::RunMetrics(_)
            | DeliveryBody::RunEnd(_) => {
                let what = format!("redis takes results and metrics, not {}", delivery.key);
                return Err(DeliveryError::Refused { what, source: None });
            }
        };
        match published {
            Published::Published | Published::Duplicate => Ok(Receipt::default()),
            Published::Fenced { owner, fence } => Err(DeliveryError::Fenced { owner, fence }),
        }
    }
}

const WHAT: &str = "cannot deliver to redis";

fn outage(error: FleetError) -> DeliveryError {
    DeliveryError::Outage { what: WHAT.to_owned(), source: Some(Box::new(error)) }
}

/// What a failed call means for deliveries. A result is never given up for an error of the server, which may be about anything:
/// it is tried again. Metrics are given up when the server refuses them or has something else in their place; rights and
/// passwords are put right by somebody, and everything is delivered then.
fn sort(error: FleetError, is_result: bool) -> DeliveryError {
    match error {
        FleetError::Refused { .. } | FleetError::WrongType { .. } if !is_result => {
            DeliveryError::Refused { what: WHAT.to_owned(), source: Some(Box::new(error)) }
        }
        FleetError::Refused { .. }
        | FleetError::WrongType { .. }
        | FleetError::Answer { .. }
        | FleetError::NoGroup { .. } => {
            DeliveryError::Later { what: WHAT.to_owned(), source: Some(Box::new(error)) }
        }
        FleetError::Config { .. }
        | FleetError::Unreachable { .. }
        | FleetError::Timeout { .. }
        | FleetError::Auth { .. }
        | FleetError::NoPermission { .. }
        | FleetError::NotReady { .. } => outage(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::sink::AfterFailure;

    #[test]
    fn an_unknown_error_never_ends_a_result() {
        let refused = || FleetError::Refused {
            address: "r".into(),
            what: "publish a result",
            source: "ERR something that nobody has seen before".into(),
        };
        let wrong = || FleetError::WrongType { what: "publish a result", source: None };
        assert_eq!(sort(refused(), true).verdict(), AfterFailure::LaneWaits);
        assert_eq!(sort(wrong(), true).verdict(), AfterFailure::LaneWaits);
        assert_eq!(sort(refused(), false).verdict(), AfterFailure::GiveUp);
        assert_eq!(sort(wrong(), false).verdict(), AfterFailure::GiveUp);
        let slow = FleetError::Timeout { address: "r".into(), what: "note metrics", limit_ms: 1 };
        assert_eq!(sort(slow, false).verdict(), AfterFailure::AllWait);
    }
}
