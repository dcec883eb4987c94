//! What side services are told of a job: plain functions from a record and an occasion to deliveries.
//!
//! The journal asks inside the transaction of each change (see [`outbox`](crate::adapters::queue::outbox)), so no way
//! to the end of a job can forget to tell.

use std::sync::Arc;

use serde_json::{Map, Value as Json, json};

use crate::adapters::queue::outbox::{Dispatcher, Occasion};
use crate::job::clock::{now_unix_ms, rfc3339};
use crate::job::delivery::{
    DeliveryBody, EpochBody, FilesBody, FilesMoment, MetricPoint, NewDelivery, ResultBody, RunEndBody,
    RunMetricsBody, RunRef, RunStartBody, SinkName,
};
use crate::job::record::JobRecord;
use crate::job::service::ServiceConfig;
use crate::job::spec::masked;
use crate::job::state::JobState;

/// A dispatcher for the side services that are configured.
pub fn dispatcher(config: Arc<ServiceConfig>) -> Dispatcher {
    Arc::new(move |record, occasion| match occasion {
        Occasion::State => on_state(&config, record),
        Occasion::Event { kind: "epoch", detail } => on_epoch(&config, record, detail),
        Occasion::Event { kind: "checkpoint", detail } => on_checkpoint(&config, record, detail),
        Occasion::Event { .. } => Vec::new(),
    })
}

/// How a run is named to side services.
pub fn run_ref(config: &ServiceConfig, record: &JobRecord) -> RunRef {
    run_of(&config.machine_id, record)
}

/// The same by the name of this machine.
pub fn run_of(machine_id: &str, record: &JobRecord) -> RunRef {
    RunRef {
        task_id: record.task_id.clone(),
        instance: record.instance.clone(),
        study_name: record.spec.study_name.clone(),
        version: record.spec.version,
        trial_number: record.spec.trial_number,
        kind: record.spec.kind.clone(),
        run_dir: record.run_dir.clone(),
        // Jobs of this machine alone had no number in earlier versions.
        fence: if record.fence == 0 { record.accepted_unix_ms.max(0) as u64 } else { record.fence },
        machine_id: machine_id.to_owned(),
    }
}

/// A delivery of samples, which may be lost.
pub fn samples(config: &ServiceConfig, record: &JobRecord, points: Vec<MetricPoint>) -> Vec<NewDelivery> {
    let Some(last) = points.last().filter(|_| config.mlflow.tracking_uri.is_some()) else {
        return Vec::new();
    };
    let key = format!("samples:{}:{}:{}", record.instance, last.key, last.at_unix_ms);
    let body = RunMetricsBody { run: run_ref(config, record), points };
    vec![delivery(record, SinkName::Mlflow, key, true, 0, DeliveryBody::RunMetrics(body))]
}

fn delivery(
    record: &JobRecord,
    sink: SinkName,
    key: String,
    may_be_dropped: bool,
    hold_ms: u64,
    body: DeliveryBody,
) -> NewDelivery {
    NewDelivery { sink, lane: record.instance.clone(), key, may_be_dropped, hold_ms, body }
}

fn on_state(config: &ServiceConfig, record: &JobRecord) -> Vec<NewDelivery> {
    match record.state {
        JobState::Preparing => run_start(config, record, Vec::new()),
        JobState::Interrupted | JobState::Queued if record.attempts > 0 && config.store.is_on() => {
            // Whoever continues it, here or elsewhere, wants the newest checkpoint.
            vec![files(config, record, SinkName::Store, FilesMoment::Checkpoint, None, 0)]
        }
        JobState::Completed | JobState::Failed | JobState::Cancelled => ended(config, record),
        _ => Vec::new(),
    }
}

fn ended(config: &ServiceConfig, record: &JobRecord) -> Vec<NewDelivery> {
    let mut deliveries = Vec::new();
    let has_run = record.attempts_all() > 0;
    if config.store.is_on() && has_run {
        deliveries.push(files(config, record, SinkName::Store, FilesMoment::End, None, 0));
    }
    if config.mlflow.tracking_uri.is_some() && has_run {
        // The status first: files that the server does not take must not hold it back.
        deliveries.push(run_end(config, record));
        if config.mlflow.is_sending_artifacts {
            deliveries.push(files(config, record, SinkName::Mlflow, FilesMoment::End, None, 0));
        }
    }
    if config.redis.is_on() {
        let body = ResultBody {
            run: run_ref(config, record),
            message: result_message(config, record),
            entry: record.entry.clone(),
        };
        let key = format!("result:{}", record.instance);
        deliveries.push(delivery(record, SinkName::Redis, key, false, 0, DeliveryBody::Result(body)));
    }
    deliveries
}

/// The start of a run, with `more_tags` about where it runs, if a tracking server is configured. It takes the place of the same
/// start without them while that waits, and completes it when that was delivered.
pub fn run_start(
    config: &ServiceConfig,
    record: &JobRecord,
    more_tags: Vec<(String, String)>,
) -> Vec<NewDelivery> {
    if config.mlflow.tracking_uri.is_none() {
        return Vec::new();
    }
    let spec = &record.spec;
    let data = masked(&Json::from(spec.args.data.as_str())).as_str().unwrap_or_default().to_owned();
    let mut params = vec![
        ("type".to_owned(), spec.kind.clone()),
        ("trial_number".to_owned(), spec.trial_number.to_string()),
        ("fitness".to_owned(), spec.fitness.clone()),
    ];
    if let Ok(Json::Object(args)) = serde_json::to_value(&spec.args) {
        flatten("", &args, &mut params);
    }
    let mut tags = vec![
        ("task_id".to_owned(), record.task_id.to_string()),
        ("framework".to_owned(), "boxwright".to_owned()),
        ("boxwright.release".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
        ("model_type".to_owned(), spec.kind.clone()),
        ("experiment_name".to_owned(), spec.study_name.clone()),
        ("data_source".to_owned(), data.clone()),
        ("content_sha256".to_owned(), record.content_sha256.clone()),
    ];
    if let Some(version) = spec.version {
        tags.push(("version".to_owned(), version.to_string()));
    }
    if data.contains("://") {
        tags.push(("dataset_url".to_owned(), data));
    }
    let metadata = spec.bookkeeping.get("metadata").and_then(Json::as_object);
    let kept = |name: &str| {
        let found = metadata.and_then(|block| block.get(name)).or_else(|| spec.bookkeeping.get(name))?;
        Some(found.as_str().map_or_else(|| found.to_string(), str::to_owned))
    };
    for (name, tag) in
        [("content", "mlflow.note.content"), ("documentation", "documentation"), ("author", "author")]
    {
        tags.extend(kept(name).map(|text| (tag.to_owned(), text)));
    }
    tags.extend(more_tags);
    let body = RunStartBody { run: run_ref(config, record), at_unix_ms: now_unix_ms(), params, tags };
    let key = format!("start:{}:{}", record.instance, record.attempts_all());
    vec![delivery(record, SinkName::Mlflow, key, false, 0, DeliveryBody::RunStart(body))]
}

/// `key_sub` for nested values, as users of the older workers know their parameters.
fn flatten(prefix: &str, values: &Map<String, Json>, params: &mut Vec<(String, String)>) {
    for (name, value) in values {
        let name = if prefix.is_empty() { name.clone() } else { format!("{prefix}_{name}") };
        match value {
            Json::Object(inner) => flatten(&name, inner, params),
            Json::String(text) => params.push((name, text.clone())),
            other => params.push((name, other.to_string())),
        }
    }
}

fn run_end(config: &ServiceConfig, record: &JobRecord) -> NewDelivery {
    let body = RunEndBody {
        run: run_ref(config, record),
        status: record.state.to_string(),
        reason: record.reason.clone(),
        at_unix_ms: record.finished_unix_ms.unwrap_or_else(now_unix_ms),
        metrics: final_metrics(record),
        epochs: epochs(record),
        fitness: fitness(record),
        fitness_name: record.spec.fitness.clone(),
        best_url: result_text(record, "best")
            .and_then(|_| store_url(config, record, "weights/best.safetensors")),
        val_fingerprint: result_text(record, "val_fingerprint"),
    };
    let key = format!("end:{}", record.instance);
    delivery(record, SinkName::Mlflow, key, false, 0, DeliveryBody::RunEnd(body))
}

fn files(
    config: &ServiceConfig,
    record: &JobRecord,
    sink: SinkName,
    moment: FilesMoment,
    event: Option<&Json>,
    hold_ms: u64,
) -> NewDelivery {
    let progress =
        |name: &str| record.progress.as_ref().map_or(Json::Null, |progress| progress[name].clone());
    let count = |name: &str| {
        let said = event.map_or(Json::Null, |event| event[name].clone());
        said.as_u64().or_else(|| progress("last_checkpoint")[name].as_u64()).unwrap_or(0)
    };
    let is_end = moment == FilesMoment::End;
    let body = FilesBody {
        run: run_ref(config, record),
        continues: record.continued().map(|continued| continued.instances).unwrap_or_default(),
        moment,
        status: if is_end { record.state.to_string() } else { "running".to_owned() },
        // What the checkpoint that is sent says of itself counts more: it may be a newer one by then.
        epoch: epochs(record).filter(|_| is_end).unwrap_or_else(|| count("epoch") as u32),
        step: count("step"),
        metrics: if is_end {
            final_metrics(record)
        } else {
            epoch_metrics(&progress("last_epoch")["columns"])
        },
        fitness: if is_end { fitness(record) } else { progress("last_epoch")["fitness"].as_f64() },
        fitness_name: record.spec.fitness.clone(),
        val_fingerprint: result_text(record, "val_fingerprint"),
    };
    let key = format!("files:{}", record.instance);
    delivery(record, sink, key, !is_end, hold_ms, DeliveryBody::Files(body))
}

fn on_checkpoint(config: &ServiceConfig, record: &JobRecord, event: &Json) -> Vec<NewDelivery> {
    if !config.store.is_on() {
        return Vec::new();
    }
    // The first is stored at once: it is what another machine needs most.
    let is_first = event["epoch"].as_u64().is_some_and(|epoch| epoch <= 1);
    let hold_ms = if is_first { 0 } else { config.store.upload_interval_ms };
    vec![files(config, record, SinkName::Store, FilesMoment::Checkpoint, Some(event), hold_ms)]
}

fn on_epoch(config: &ServiceConfig, record: &JobRecord, event: &Json) -> Vec<NewDelivery> {
    let Some(epoch) = event["epoch"].as_u64() else { return Vec::new() };
    let at_unix_ms = event["time_unix_ms"].as_i64().unwrap_or_else(now_unix_ms);
    let metrics = epoch_metrics(&event["columns"]);
    let mut deliveries = Vec::new();
    if config.mlflow.tracking_uri.is_some() {
        let points = metrics.iter().filter_map(|(name, value)| {
            let value = value.as_f64()?;
            Some(MetricPoint { key: name.clone(), value, at_unix_ms, step: epoch as i64 })
        });
        let body = RunMetricsBody { run: run_ref(config, record), points: points.collect() };
        let key = format!("epoch:{}:{epoch}:{at_unix_ms}", record.instance);
        deliveries.push(delivery(record, SinkName::Mlflow, key, false, 0, DeliveryBody::RunMetrics(body)));
    }
    if config.redis.is_on() {
        let body = EpochBody { run: run_ref(config, record), epoch: epoch as u32, metrics, at_unix_ms };
        let key = format!("epoch:{}:{epoch}", record.instance);
        deliveries.push(delivery(record, SinkName::Redis, key, true, 0, DeliveryBody::EpochMetrics(body)));
    }
    deliveries
}

/// The numbers of a row of `results.csv` without its epoch.
fn epoch_metrics(columns: &Json) -> Map<String, Json> {
    let columns = columns.as_object().cloned().unwrap_or_default();
    columns.into_iter().filter(|(name, value)| name != "epoch" && value.is_number()).collect()
}

fn final_metrics(record: &JobRecord) -> Map<String, Json> {
    let found = record.result.as_ref().and_then(|result| result["metrics"].as_object()).cloned();
    found.unwrap_or_default()
}

/// Epochs trained, when the trainer said so.
fn epochs(record: &JobRecord) -> Option<u32> {
    record.result.as_ref()?["epochs"].as_u64().map(|epochs| epochs as u32)
}

fn fitness(record: &JobRecord) -> Option<f64> {
    // A job that failed has no score; one that was stopped has what it had reached.
    let result = record.result.as_ref().filter(|_| record.state != JobState::Failed)?;
    result["fitness"].as_f64()
}

fn result_text(record: &JobRecord, name: &str) -> Option<String> {
    record.result.as_ref()?[name].as_str().map(str::to_owned)
}

/// Where a file of a run lies, or will lie, in the object store; `None` when nothing is stored.
fn store_url(config: &ServiceConfig, record: &JobRecord, path: &str) -> Option<String> {
    let store = &config.store;
    let key = format!("{}/{}/{path}", record.spec.study_name, record.task_id);
    match (&store.endpoint, &store.folder) {
        (Some(_), _) => Some(format!("s3://{}/{key}", store.bucket)),
        (None, Some(folder)) => Some(folder.join(&store.bucket).join(key).display().to_string()),
        (None, None) => None,
    }
}

/// The message that tells of the end of a job.
pub fn result_message(config: &ServiceConfig, record: &JobRecord) -> Json {
    let checkpoint = |name: &str| {
        let Some(local) = result_text(record, name) else { return Json::Null };
        let file = format!("weights/{name}.safetensors");
        json!({
            "local": local,
            "s3": config.store.endpoint.as_ref().and_then(|_| store_url(config, record, &file)),
            "sha256": result_text(record, &format!("{name}_sha256")),
            "epoch": match name {
                "best" => record.progress.as_ref().and_then(|progress| progress["best_epoch"].as_u64()),
                _ => epochs(record).map(u64::from),
            },
        })
    };
    let error = (record.state == JobState::Failed)
        .then(|| json!({"class": record.class.map(|class| class.as_str()), "message": record.reason}));
    json!({
        "task_id": record.task_id,
        "trial_number": record.spec.trial_number,
        "attempt": record.attempts_all(),
        "status": record.state,
        "fitness": fitness(record),
        "fitness_name": record.spec.fitness,
        "metrics": final_metrics(record),
        "best_checkpoint": checkpoint("best"),
        "last_checkpoint": checkpoint("last"),
        "mlflow_run_id": record.notes.get("mlflow_run_id"),
        "started_at": record.started_unix_ms.map(rfc3339),
        "finished_at": record.finished_unix_ms.map(rfc3339),
        "error": error,
        "machine_id": config.machine_id,
        "gpu_uuid": result_text(record, "gpu_uuid"),
        "instance": record.instance,
        "reason": record.reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::queue::JobStore;
    use crate::adapters::queue::journal::Journal;
    use crate::job::record::{Change, NewJob};
    use crate::job::state::FailureClass;

    fn fleet() -> ServiceConfig {
        let mut config = ServiceConfig { machine_id: "box-1".into(), ..ServiceConfig::default() };
        config.redis.urls = vec!["redis://r".into()];
        config.mlflow.tracking_uri = Some("http://m".into());
        config.store.endpoint = Some("http://s".into());
        config
    }

    fn job(journal: &mut Journal, config: &ServiceConfig, id: &str) -> JobRecord {
        let text = format!(
            "model: yolov8n\ntype: yolo\ntask_id: {id}\nmetadata: {{author: me, content: a note}}\n\
             sweeper: {{study_name: s, version: 3}}\ntrain: {{data: d}}\n"
        );
        let context = config.spec_context("/w".into());
        let new = NewJob::sample(&text, &context);
        journal.accept(new, None).expect("accepted")
    }

    fn waiting(journal: &Journal) -> Vec<(SinkName, String)> {
        let mut found = Vec::new();
        for sink in SinkName::ALL {
            // One lane: each look shows its first, which is then taken.
            while let Some(first) = journal.due(sink, i64::MAX, 1).expect("reads").first() {
                found.push((sink, first.key.replace(&first.lane, "I")));
                journal.delivered(&[first.id]).expect("removes");
            }
        }
        found
    }

    #[test]
    fn every_side_service_hears_of_a_life_in_order_and_once() {
        let config = Arc::new(fleet());
        let mut journal = Journal::in_memory().expect("opens");
        journal.set_dispatcher(dispatcher(config.clone()));
        let record = job(&mut journal, &config, "a");
        journal.begin_attempt(record.seq, "starts").expect("legal");
        for epoch in 1..=2 {
            let columns = json!({"epoch": epoch, "train/box_loss": 1.5, "lr/pg0": "nan"});
            let event =
                json!({"event": "epoch", "epoch": epoch, "columns": columns, "time_unix_ms": 5 * epoch});
            journal.add_event(record.seq, "epoch", &event).expect("stored");
            let event = json!({"event": "checkpoint", "epoch": epoch, "step": epoch * 10});
            journal.add_event(record.seq, "checkpoint", &event).expect("stored");
        }
        let result =
            json!({"fitness": 0.5, "metrics": {"metrics/mAP50(B)": 0.9}, "best": "/b", "last": "/l"});
        let change = Change::to(JobState::Completed, "done").with_result(Some(result));
        let done = journal.change(record.seq, change).expect("legal");
        let message = result_message(&config, &done);
        assert_eq!((message["status"].as_str(), message["fitness"].as_f64()), (Some("completed"), Some(0.5)));
        assert_eq!(message["best_checkpoint"]["s3"], "s3://models/s/a/weights/best.safetensors");
        assert_eq!(message["error"], Json::Null);
        let keys = waiting(&journal);
        let keys: Vec<(SinkName, &str)> = keys.iter().map(|(sink, key)| (*sink, key.as_str())).collect();
        use SinkName::{Mlflow, Redis, Store};
        assert_eq!(
            keys,
            [
                (Redis, "epoch:I:1"),
                (Redis, "epoch:I:2"),
                (Redis, "result:I"),
                (Store, "files:I"),
                (Mlflow, "start:I:1"),
                (Mlflow, "epoch:I:1:5"),
                (Mlflow, "epoch:I:2:10"),
                (Mlflow, "end:I"),
                (Mlflow, "files:I"),
            ]
        );
    }

    #[test]
    fn a_job_that_moved_away_takes_its_deliveries_along() {
        let config = Arc::new(fleet());
        let mut journal = Journal::in_memory().expect("opens");
        journal.set_dispatcher(dispatcher(config.clone()));
        let (gone, kept) = (job(&mut journal, &config, "gone"), job(&mut journal, &config, "kept"));
        for record in [&gone, &kept] {
            journal.begin_attempt(record.seq, "starts").expect("legal");
        }
        let moved = journal.change(gone.seq, Change::to(JobState::Moved, "box-2 has it")).expect("legal");
        assert!(moved.state.is_terminal());
        assert_eq!(waiting(&journal), [(SinkName::Mlflow, "start:I:1".to_owned())], "only that of the other");
    }

    #[test]
    fn a_failure_has_no_score_and_says_why() {
        let config = fleet();
        let mut journal = Journal::in_memory().expect("opens");
        let record = job(&mut journal, &config, "a");
        journal.begin_attempt(record.seq, "starts").expect("legal");
        let change = Change::to(JobState::Failed, "no images").with_class(FailureClass::Data);
        let failed =
            journal.change(record.seq, change.with_result(Some(json!({"fitness": 0.1})))).expect("legal");
        let message = result_message(&config, &failed);
        assert_eq!(message["fitness"], Json::Null);
        assert_eq!(message["error"], json!({"class": "data", "message": "no images"}));
        assert_eq!(message["attempt"], 1);
        let mut quiet = ServiceConfig::default();
        quiet.store.folder = None;
        assert_eq!(on_state(&quiet, &failed), [], "nobody to tell");
    }

    #[test]
    fn the_end_knows_its_epochs_and_names_no_place_where_nothing_is_stored() {
        let mut config = fleet();
        let mut journal = Journal::in_memory().expect("opens");
        let record = job(&mut journal, &config, "a");
        journal.begin_attempt(record.seq, "starts").expect("legal");
        let result = json!({"metrics": {"metrics/mAP50(B)": 0.9}, "best": "/b", "epochs": 7});
        let change = Change::to(JobState::Completed, "done").with_result(Some(result));
        let done = journal.change(record.seq, change).expect("legal");
        let end = |config: &ServiceConfig| match run_end(config, &done).body {
            DeliveryBody::RunEnd(end) => (end.epochs, end.best_url),
            other => panic!("{other:?}"),
        };
        assert_eq!(end(&config), (Some(7), Some("s3://models/s/a/weights/best.safetensors".to_owned())));
        config.store.endpoint = None;
        config.store.folder = None;
        assert_eq!(end(&config), (Some(7), None));
    }

    #[test]
    fn parameters_and_tags_are_those_that_the_job_gave() {
        let config = fleet();
        let mut journal = Journal::in_memory().expect("opens");
        let record = job(&mut journal, &config, "a");
        let place = vec![("gpu_0_uuid".to_owned(), "GPU-1".to_owned())];
        let start = run_start(&config, &record, place).remove(0).body;
        let DeliveryBody::RunStart(start) = start else { panic!("a start") };
        let tag =
            |name: &str| start.tags.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
        assert_eq!(
            (tag("author"), tag("mlflow.note.content"), tag("version")),
            (Some("me"), Some("a note"), Some("3"))
        );
        assert_eq!((tag("gpu_0_uuid"), tag("dataset_url")), (Some("GPU-1"), None), "its data is a path");
        let param =
            |name: &str| start.params.iter().find(|(known, _)| known == name).map(|(_, v)| v.as_str());
        assert_eq!((param("epochs"), param("type"), param("data")), (Some("100"), Some("yolo"), Some("d")));
    }
}
