//! MLflow over its REST API, version 2.0.
//!
//! An experiment is a study and a run is a submission of a job, known by the tag `boxwright.instance`. The server keeps all
//! state: what is found there decides what is still to be sent, so every delivery can be made again, by
//! this process, by a later one, or by another machine.

mod artifacts;
mod client;
mod names;
mod points;
mod reconcile;
mod registry;
mod runs;

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::Value as Json;

use self::client::Client;
use self::reconcile::REASON;
use self::registry::REGISTRY;
use self::runs::{RunView, items};
use super::TrackingError;
use crate::adapters::sink::{DeliveryError, Receipt, Sink};
use crate::job::delivery::{
    Delivery, DeliveryBody, FilesBody, FilesMoment, RunEndBody, RunMetricsBody, RunStartBody, SinkName,
};
use crate::job::service::MlflowConfig;

/// Runs whose identity on the server is remembered.
const REMEMBERED_MAX: usize = 1024;
/// Tag with the fence and the time of the newest start, `fence:milliseconds`.
const STARTED: &str = "boxwright.started";
/// Tag with the parameters that a later attempt has otherwise.
const CHANGED: &str = "boxwright.changed_params";
/// Tag with the names of what was too long.
const CUT: &str = "boxwright.cut";

/// An MLflow tracking server.
pub struct MlflowSink {
    client: Client,
    is_sending_artifacts: bool,
    is_registering: bool,
    store_url: Option<String>,
    /// Whose open runs are closed at the start.
    machine_id: Option<String>,
    /// Run of an instance.
    runs: Mutex<HashMap<String, String>>,
    /// Failures of a delivery at a step that it can do without, by its number.
    step_failures: Mutex<HashMap<i64, u32>>,
}

impl MlflowSink {
    /// Prepares a sink; nothing is asked of the server yet. Reads `ca_file`.
    ///
    /// # Errors
    /// [`TrackingError::Config`] when there is no usable address or the certificates cannot be read.
    pub fn new(config: &MlflowConfig) -> Result<Self, TrackingError> {
        Ok(Self {
            client: Client::new(config)?,
            is_sending_artifacts: config.is_sending_artifacts,
            is_registering: config.is_registering,
            store_url: None,
            machine_id: None,
            runs: Mutex::new(HashMap::new()),
            step_failures: Mutex::new(HashMap::new()),
        })
    }

    /// With another time limit for each request than 30 s.
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.client.set_deadline(deadline);
        self
    }

    /// With the address of the bucket of runs (`http://HOST:9000/models`), for the runs whose files the server does not take.
    pub fn with_store_url(mut self, url: impl Into<String>) -> Self {
        self.store_url = Some(artifacts::without_secrets(&url.into()));
        self
    }

    /// With the machine whose open runs are closed at the start, unless their jobs go on.
    pub fn with_machine(mut self, machine_id: impl Into<String>) -> Self {
        self.machine_id = Some(machine_id.into());
        self
    }

    fn remembered(&self, instance: &str) -> Option<String> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner).get(instance).cloned()
    }

    fn remember(&self, instance: &str, run_id: &str) {
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        // What is forgotten is found again by a search.
        if runs.len() >= REMEMBERED_MAX && !runs.contains_key(instance) {
            runs.clear();
        }
        runs.insert(instance.to_owned(), run_id.to_owned());
    }

    fn forget(&self, instance: &str) {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner).remove(instance);
    }

    async fn start(&self, start: &RunStartBody) -> Result<RunView, TrackingError> {
        let view = self.open(&start.run, start.at_unix_ms, true).await?;
        if is_replay(&view, start) {
            return Ok(view);
        }
        if view.status != "RUNNING" {
            self.set_status(&view.id, "RUNNING", None).await?;
        }
        self.unmark(&view).await?;
        let mut notes = Notes::default();
        let params = new_params(&view, &start.params, &mut notes);
        self.log_params(&view.id, params).await?;
        let mut tags: Vec<(String, String)> = Vec::new();
        for (key, value) in &start.tags {
            let Some(key) = names::name(key) else { continue };
            tags.push((key.clone(), notes.cut(&key, value, names::TAG_CHARS_MAX)));
        }
        tags.extend(notes.tags());
        // Last, since it says that the rest is there.
        tags.push((STARTED.to_owned(), format!("{}:{}", start.run.fence, start.at_unix_ms)));
        let tags: Vec<_> = tags.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        self.tag(&view, &tags).await?;
        Ok(view)
    }

    async fn metrics(&self, metrics: &RunMetricsBody) -> Result<RunView, TrackingError> {
        let began = metrics.points.iter().map(|point| point.at_unix_ms).min().unwrap_or(0);
        let view = self.open(&metrics.run, began, false).await?;
        self.reopen(&view).await?;
        self.log_points(&view, &metrics.points).await?;
        Ok(view)
    }

    async fn end(&self, end: &RunEndBody, delivery: i64) -> Result<RunView, TrackingError> {
        let status = match end.status.as_str() {
            "completed" => "FINISHED",
            "failed" => "FAILED",
            "cancelled" => "KILLED",
            other => return Err(TrackingError::Delivery { what: format!("{other:?} is no end of a run") }),
        };
        let view = self.open(&end.run, end.at_unix_ms, false).await?;
        self.log_points(&view, &points::at_end(end)).await?;
        let (reason, _) = names::cut(&end.reason, names::TAG_CHARS_MAX);
        let mut tags = vec![(REASON, reason.as_str())];
        if !end.fitness_name.is_empty() {
            tags.push(("fitness_name", &end.fitness_name));
        }
        tags.extend(end.best_url.as_deref().map(|url| ("boxwright.best_url", url)));
        tags.extend(end.val_fingerprint.as_deref().map(|print| ("val_fingerprint", print)));
        self.tag(&view, &tags).await?;
        self.close(&view, status, end.at_unix_ms).await?;
        self.drop_twins(&view, &end.run).await?;
        // The tag says that the registry was seen to.
        if self.is_registering && end.status == "completed" && !view.tags.contains_key(REGISTRY) {
            let said = self.register(&view, end, delivery).await?;
            let (said, _) = names::cut(&said, names::TAG_CHARS_MAX);
            self.tag(&view, &[(REGISTRY, said.as_str())]).await?;
        }
        Ok(view)
    }

    async fn files(&self, files: &FilesBody, delivery: &Delivery) -> Result<Option<RunView>, TrackingError> {
        if files.moment != FilesMoment::End || !self.is_sending_artifacts {
            return Ok(None);
        }
        let view = self.open(&files.run, delivery.at_unix_ms, false).await?;
        self.send_files(&view, &files.run, delivery.id).await?;
        Ok(Some(view))
    }
}

/// True when the run has had this start, or a later one, already.
fn is_replay(view: &RunView, start: &RunStartBody) -> bool {
    let seen = view.tags.get(STARTED).and_then(|text| text.split_once(':'));
    let seen = seen.and_then(|(fence, at)| Some((fence.parse::<u64>().ok()?, at.parse::<i64>().ok()?)));
    // A new owner's clock is not compared with the old one's.
    seen.is_some_and(|(fence, at)| fence == start.run.fence && at >= start.at_unix_ms)
}

/// What is to be said about parameters and tags.
#[derive(Default)]
struct Notes {
    cut: Vec<String>,
    changed: Vec<String>,
}

impl Notes {
    fn cut(&mut self, key: &str, value: &str, chars_max: usize) -> String {
        let (text, is_cut) = names::cut(value, chars_max);
        if is_cut {
            self.cut.push(key.to_owned());
        }
        text
    }

    fn tags(self) -> Vec<(String, String)> {
        let notes = [(CUT, self.cut.join(", ")), (CHANGED, self.changed.join("; "))];
        let said = notes.into_iter().filter(|(_, text)| !text.is_empty());
        said.map(|(key, text)| (key.to_owned(), names::cut(&text, names::TAG_CHARS_MAX).0)).collect()
    }
}

/// The parameters that the run does not have. Those that it has otherwise stay: the server lets no parameter change.
fn new_params(view: &RunView, params: &[(String, String)], notes: &mut Notes) -> Vec<Json> {
    let mut new: Vec<(String, String)> = Vec::new();
    for (key, value) in params {
        let Some(key) = names::name(key) else { continue };
        let value = notes.cut(&key, value, names::PARAM_CHARS_MAX);
        match view.params.get(&key) {
            Some(first) if *first != value => {
                let (first, _) = names::cut(first, 100);
                notes.changed.push(format!("{key}: {first} -> {}", names::cut(&value, 100).0));
            }
            Some(_) => {}
            None if new.iter().any(|(other, _)| *other == key) => {}
            None => new.push((key, value)),
        }
    }
    items(new.iter().map(|(key, value)| (key.as_str(), value.as_str())))
}

#[async_trait]
impl Sink for MlflowSink {
    fn name(&self) -> SinkName {
        SinkName::Mlflow
    }

    async fn begin(&self, live: &[String]) -> Result<(), DeliveryError> {
        let Some(machine_id) = &self.machine_id else { return Ok(()) };
        let answers_before = self.client.answers();
        let closed = match self.reconcile(machine_id, live).await {
            Ok(closed) => closed,
            Err(error) => return Err(self.verdict(error, answers_before).await),
        };
        if !closed.is_empty() {
            tracing::warn!("mlflow: {} runs that nobody goes on with are closed as KILLED", closed.len());
        }
        Ok(())
    }

    async fn deliver(&self, delivery: &Delivery) -> Result<Receipt, DeliveryError> {
        let answers_before = self.client.answers();
        let view = match &delivery.body {
            DeliveryBody::RunStart(start) => self.start(start).await.map(Some),
            DeliveryBody::RunMetrics(metrics) => self.metrics(metrics).await.map(Some),
            DeliveryBody::RunEnd(end) => self.end(end, delivery.id).await.map(Some),
            DeliveryBody::Files(files) => self.files(files, delivery).await,
            DeliveryBody::Result(_) | DeliveryBody::EpochMetrics(_) => {
                let what = "the tracking server takes runs, their samples and their files".to_owned();
                Err(TrackingError::Delivery { what })
            }
        };
        let view = match view {
            Ok(view) => {
                self.step_failures().remove(&delivery.id);
                view
            }
            Err(error) => return Err(self.verdict(error, answers_before).await),
        };
        let notes = view.map(|view| {
            let url = self.page(&view);
            vec![("mlflow_run_id", view.id), ("mlflow_run_url", url)]
        });
        Ok(Receipt { notes: notes.unwrap_or_default() })
    }
}

impl MlflowSink {
    fn step_failures(&self) -> MutexGuard<'_, HashMap<i64, u32>> {
        self.step_failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a failure of a delivery at a step, and says whether it does without it from now on. Failures at other steps do
    /// not count; after a restart it is tried for longer.
    fn does_without(&self, delivery: i64, error: &TrackingError) -> bool {
        if is_dispensed_with(error, 0) {
            return true;
        }
        let mut failures = self.step_failures();
        if failures.len() >= REMEMBERED_MAX && !failures.contains_key(&delivery) {
            let oldest = failures.keys().min().copied();
            oldest.and_then(|oldest| failures.remove(&oldest));
        }
        let before = failures.entry(delivery).or_insert(0);
        let answer = is_dispensed_with(error, *before);
        *before = before.saturating_add(1);
        answer
    }

    /// What a failure means: when the server does other things, it holds its own lane only.
    async fn verdict(&self, error: TrackingError, answers_before: u64) -> DeliveryError {
        let has_answered = self.client.answers() > answers_before;
        let is_this_alone = match &error {
            // What answers so is no tracking server, whatever it says to other questions.
            TrackingError::Failed { status: 200..=299, .. } => false,
            TrackingError::Silent { .. } => has_answered,
            TrackingError::Failed { .. } | TrackingError::Credentials { .. } => {
                has_answered || self.does_answer().await
            }
            _ => false,
        };
        match DeliveryError::from(error) {
            DeliveryError::Outage { what, source } if is_this_alone => DeliveryError::Later { what, source },
            other => other,
        }
    }
}

/// True when a delivery that failed at such a step `failures` times before is to do without it: a file, or the entry in the
/// registry. The run itself is told of already.
fn is_dispensed_with(error: &TrackingError, failures: u32) -> bool {
    match error {
        TrackingError::Refused { .. } | TrackingError::Missing { .. } => true,
        // A time limit costs its whole time at each try, and others wait for it.
        TrackingError::Silent { is_late: false, .. }
        | TrackingError::Failed { status: 408 | 425 | 500.., .. } => failures >= TRIES_WHILE_IT_FAILS,
        TrackingError::Silent { .. } | TrackingError::Failed { .. } | TrackingError::Credentials { .. } => {
            failures >= TRIES_WHILE_IT_REFUSES
        }
        _ => false,
    }
}

/// Tries of a step while what is behind the server (a bucket) fails; with the delays, an hour.
const TRIES_WHILE_IT_FAILS: u32 = 60;
/// Tries of a step that is forbidden, unknown to the server, or longer than the time limit.
const TRIES_WHILE_IT_REFUSES: u32 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_keeps_its_first_value() {
        let mut view = RunView::default();
        view.params.insert("batch".into(), "16".into());
        view.params.insert("imgsz".into(), "640".into());
        let given = [("batch", "8"), ("imgsz", "640"), ("lr0", "0.01"), ("lr0", "0.02"), ("a(b)", "1")];
        let given = given.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let mut notes = Notes::default();
        let new = new_params(&view, &given, &mut notes);
        assert_eq!(new, items([("lr0", "0.01"), ("ab", "1")]));
        assert_eq!(notes.tags(), [(CHANGED.to_owned(), "batch: 16 -> 8".to_owned())]);
    }

    #[test]
    fn a_step_is_tried_longer_the_less_a_try_costs_and_the_more_it_may_help() {
        let (operation, said) = ("put artifact", String::new());
        let failed = |status| TrackingError::Failed { operation, status, said: said.clone() };
        let silent = |is_late| TrackingError::Silent { operation, limit_s: 30.0, is_late, source: None };
        let forbidden = TrackingError::Credentials { operation, status: 403, said: said.clone() };
        let missing = TrackingError::Missing { operation, said: said.clone() };
        let tries = |error: &TrackingError| (0..100).find(|failures| is_dispensed_with(error, *failures));
        assert_eq!(
            (tries(&failed(500)), tries(&failed(503)), tries(&silent(false))),
            (Some(60), Some(60), Some(60))
        );
        assert_eq!(
            (tries(&failed(404)), tries(&forbidden), tries(&silent(true))),
            (Some(10), Some(10), Some(10))
        );
        assert_eq!(tries(&missing), Some(0));
        // Those that speak of the run or of the server are not for a step to decide.
        assert_eq!(tries(&TrackingError::Busy { operation, wait_s: 5 }), None);
        assert_eq!(tries(&TrackingError::Fenced { owner: "b".into(), fence: 2 }), None);
    }

    #[test]
    fn long_values_are_cut_and_named() {
        let long = [("x".to_owned(), "y".repeat(7000))];
        let mut notes = Notes::default();
        let new = new_params(&RunView::default(), &long, &mut notes);
        assert_eq!(new[0]["value"].as_str().map(|text| text.chars().count()), Some(6000));
        assert_eq!(notes.tags(), [(CUT.to_owned(), "x".to_owned())]);
    }
}
