//! Runs, deliveries and a look at what the server has.

use std::time::Duration;

use boxwright::adapters::sink::{AfterFailure, DeliveryError, Receipt, Sink};
use boxwright::adapters::tracking::MlflowSink;
use boxwright::job::delivery::{
    Delivery, DeliveryBody, FilesBody, FilesMoment, MetricPoint, RunEndBody, RunMetricsBody, RunRef,
    RunStartBody, SinkName,
};
use boxwright::job::service::MlflowConfig;
use serde_json::{Map, Value as Json, json};

use crate::server::{self, MlflowServer};

/// Start of all times here.
pub const T0: i64 = 1_700_000_000_000;
/// For requests that are meant to succeed.
pub const PATIENT: Duration = Duration::from_secs(60);

/// Runs a test with the shared server, or skips it.
pub fn with_server<F: Future<Output = ()>>(test: impl FnOnce(World) -> F) {
    let Some(server) = server::shared() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(test(World { server, http: reqwest::Client::new() }));
}

pub struct World {
    pub server: &'static MlflowServer,
    pub http: reqwest::Client,
}

pub fn config(url: &str) -> MlflowConfig {
    MlflowConfig { tracking_uri: Some(url.to_owned()), ..MlflowConfig::default() }
}

pub fn sink_at(url: &str) -> MlflowSink {
    MlflowSink::new(&config(url)).expect("a configuration").with_deadline(PATIENT)
}

/// A run that no other test knows.
pub fn run(study: &str) -> RunRef {
    let unique = uuid::Uuid::new_v4().simple().to_string();
    RunRef {
        task_id: format!("task-{}", &unique[..8]).parse().expect("a name"),
        instance: unique.clone(),
        study_name: format!("{study}-{}", &unique[8..16]),
        version: Some(2),
        trial_number: 1,
        kind: "yolo".into(),
        run_dir: "/no/such/folder".into(),
        fence: 1,
        machine_id: "machine-a".into(),
    }
}

pub fn wrap(body: DeliveryBody) -> Delivery {
    let lane = body.run().task_id.to_string();
    Delivery { id: 1, sink: SinkName::Mlflow, lane, key: "k".into(), body, attempts: 0, at_unix_ms: T0 }
}

fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

pub fn start(run: &RunRef, at_unix_ms: i64, params: &[(&str, &str)]) -> Delivery {
    let tags = owned(&[("author", "somebody"), ("mlflow.note.content", "a note")]);
    wrap(DeliveryBody::RunStart(RunStartBody { run: run.clone(), at_unix_ms, params: owned(params), tags }))
}

pub fn metrics(run: &RunRef, points: Vec<MetricPoint>) -> Delivery {
    wrap(DeliveryBody::RunMetrics(RunMetricsBody { run: run.clone(), points }))
}

/// The two points of an epoch.
pub fn epoch(run: &RunRef, epoch: i64, at_unix_ms: i64) -> Delivery {
    let point = |key: &str, value: f64| MetricPoint { key: key.into(), value, at_unix_ms, step: epoch };
    let points = vec![
        point("metrics/mAP50(B)", epoch as f64 / 100.0),
        point("train/box_loss", 1.0 / epoch as f64),
        point("val/box_loss", f64::NAN),
    ];
    metrics(run, points)
}

pub fn end(run: &RunRef, status: &str, at_unix_ms: i64, last_epoch: i64) -> RunEndBody {
    // As the trainer ends: without a row's epoch and time.
    let metrics = json!({ "metrics/mAP50(B)": last_epoch as f64 / 100.0 });
    RunEndBody {
        run: run.clone(),
        status: status.into(),
        reason: format!("it {status}"),
        at_unix_ms,
        metrics: metrics.as_object().expect("an object").clone(),
        epochs: Some(last_epoch as u32),
        fitness: Some(0.5),
        fitness_name: "metrics/mAP50-95(B)".into(),
        best_url: Some(format!("s3://models/{}/{}/weights/best.safetensors", run.study_name, run.task_id)),
        val_fingerprint: Some("v1".into()),
    }
}

pub fn ended(run: &RunRef, status: &str, at_unix_ms: i64, last_epoch: i64) -> Delivery {
    wrap(DeliveryBody::RunEnd(end(run, status, at_unix_ms, last_epoch)))
}

pub fn files(run: &RunRef, moment: FilesMoment) -> Delivery {
    wrap(DeliveryBody::Files(FilesBody {
        continues: Vec::new(),
        run: run.clone(),
        moment,
        status: "completed".into(),
        epoch: 1,
        step: 1,
        metrics: Map::new(),
        fitness: None,
        fitness_name: String::new(),
        val_fingerprint: None,
    }))
}

/// Delivers and expects success.
pub async fn deliver(sink: &MlflowSink, delivery: &Delivery) -> Receipt {
    sink.deliver(delivery).await.unwrap_or_else(|error| panic!("{}", error.chain()))
}

/// Delivers as a courier does: in order, again and again while the service is out. Says how often it failed.
pub async fn deliver_all(sink: &MlflowSink, deliveries: &[Delivery], tries_max: usize) -> usize {
    let mut failures = 0;
    for delivery in deliveries {
        let mut delivery = delivery.clone();
        loop {
            match sink.deliver(&delivery).await {
                Ok(_) => break,
                Err(error @ (DeliveryError::Outage { .. } | DeliveryError::Later { .. })) => {
                    failures += 1;
                    // An outage is no attempt.
                    if error.verdict() == AfterFailure::LaneWaits {
                        delivery.attempts += 1;
                    }
                    assert!(failures <= tries_max, "still failing: {}", error.chain());
                }
                Err(error) => panic!("given up: {}", error.chain()),
            }
        }
    }
    failures
}

/// The value of a receipt's note.
pub fn note(receipt: &Receipt, name: &str) -> String {
    let found = receipt.notes.iter().find(|(key, _)| *key == name);
    found.map(|(_, value)| value.clone()).unwrap_or_else(|| panic!("no {name} in {receipt:?}"))
}

/// What the server has of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Shown(pub Json);

impl Shown {
    pub fn status(&self) -> &str {
        self.0["info"]["status"].as_str().expect("a status")
    }

    fn item(&self, list: &str, key: &str) -> Option<&str> {
        let items = self.0["data"][list].as_array()?;
        items.iter().find(|item| item["key"] == key)?["value"].as_str()
    }

    pub fn tag(&self, key: &str) -> Option<&str> {
        self.item("tags", key)
    }

    pub fn param(&self, key: &str) -> Option<&str> {
        self.item("params", key)
    }
}

impl World {
    /// Waits for a condition.
    pub async fn until(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = std::time::Instant::now() + PATIENT;
        while !condition() {
            assert!(std::time::Instant::now() < deadline, "{what}: not within {PATIENT:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn sink(&self) -> MlflowSink {
        sink_at(&self.server.url)
    }

    pub async fn get(&self, path: &str, query: &[(&str, &str)]) -> Json {
        let url = format!("{}/api/2.0/mlflow/{path}", self.server.url);
        let answer = self.http.get(url).query(query).send().await.expect("an answer");
        answer.json().await.expect("JSON")
    }

    pub async fn post(&self, path: &str, body: Json) -> Json {
        let url = format!("{}/api/2.0/mlflow/{path}", self.server.url);
        let answer = self.http.post(url).json(&body).send().await.expect("an answer");
        let status = answer.status();
        let told: Json = answer.json().await.expect("JSON");
        assert!(status.is_success(), "{path}: {told}");
        told
    }

    pub async fn experiment(&self, study: &str) -> String {
        let answer = self.get("experiments/get-by-name", &[("experiment_name", study)]).await;
        answer["experiment"]["experiment_id"].as_str().expect("an experiment").to_owned()
    }

    /// All active runs of a study.
    pub async fn runs(&self, study: &str) -> Vec<Shown> {
        let experiment = self.experiment(study).await;
        let search = json!({ "experiment_ids": [experiment], "max_results": 100 });
        let mut answer = self.post("runs/search", search).await;
        let runs = answer["runs"].as_array_mut().map(std::mem::take).unwrap_or_default();
        runs.into_iter().map(Shown).collect()
    }

    /// The only run of a study.
    pub async fn only_run(&self, study: &str) -> Shown {
        let mut runs = self.runs(study).await;
        assert_eq!(runs.len(), 1, "{runs:?}");
        runs.remove(0)
    }

    /// Steps, times and values of a metric, in the order in which the server keeps them.
    pub async fn history(&self, run_id: &str, key: &str) -> Vec<(i64, i64, f64)> {
        let answer = self.get("metrics/get-history", &[("run_id", run_id), ("metric_key", key)]).await;
        let points = answer["metrics"].as_array().cloned().unwrap_or_default();
        let number = |point: &Json, name: &str| point[name].as_i64().expect("a number");
        points
            .iter()
            .map(|p| (number(p, "step"), number(p, "timestamp"), p["value"].as_f64().expect("a value")))
            .collect()
    }
}
