//! The fields of a progress hash: what they say when, and that they are documented.

use serde_json::{Value as Json, json};

use super::fields::Shown;
use crate::adapters::queue::JobStore;
use crate::adapters::queue::journal::Journal;
use crate::adapters::telemetry::{GpuSample, Sample, worker_fields};
use crate::job::clock::now_unix_ms;
use crate::job::record::{Change, JobRecord, NewJob};
use crate::job::service::ServiceConfig;
use crate::job::state::{FailureClass, JobState};

/// A job in its first attempt: the first of 4 trials, 10 epochs.
fn begun(journal: &mut Journal) -> JobRecord {
    let text =
        "model: yolov8n\ntype: yolo\ntask_id: a\nsweeper: {n_trials: 4}\ntrain: {data: d, epochs: 10}\n";
    let context = ServiceConfig::default().spec_context("/w".into());
    let new = NewJob::sample(text, &context);
    let record = journal.accept(new, None).expect("accepted");
    journal.begin_attempt(record.seq, "starts").expect("legal")
}

fn journal() -> Journal {
    Journal::in_memory().expect("opens")
}

/// The value of a field; nothing when it is not written.
fn get(shown: &Shown, name: &str) -> Option<String> {
    let fields = shown.fields(&ServiceConfig::default(), Some(&Sample::default()));
    fields.into_iter().find(|(known, _)| known == name).map(|(_, value)| value)
}

fn text(shown: &Shown, name: &str) -> String {
    get(shown, name).unwrap_or_else(|| panic!("{name} is not written"))
}

fn step(epoch: u32, batch: u32, time_unix_ms: i64) -> Json {
    json!({"event": "step", "epoch": epoch, "epochs": 10, "batch": batch, "batches": 10, "lr": 0.01,
        "box_loss": 1.5, "cls_loss": 1.0, "dfl_loss": 0.5, "images_per_second": 50.0, "data_wait_ratio": 0.1,
        "time_unix_ms": time_unix_ms})
}

fn epoch(number: u32) -> Json {
    json!({"event": "epoch", "epoch": number, "epochs": 10, "fitness": 0.25,
        "columns": {"metrics/mAP50(B)": 0.5, "val/box_loss": 1.0, "train/box_loss": 2.0}})
}

#[test]
fn a_running_job_shows_every_documented_field() {
    let mut journal = journal();
    let record = begun(&mut journal);
    let seq = record.seq;
    let mut shown = Shown::new(record);
    assert_eq!((text(&shown, "status").as_str(), text(&shown, "EPOCH").as_str()), ("preparing", "0"));
    shown.event(&step(3, 5, 0));
    shown.event(&epoch(2));
    for (name, value) in [
        ("status", "running"),
        ("TRIAL_NUMBER", "1"),
        ("TOTAL_TRIALS", "4"),
        ("TRIAL_PROGRESS", "0.2500"),
        ("EPOCH", "3"),
        ("TOTAL_EPOCHS", "10"),
        ("EPOCH_PROGRESS", "0.3000"),
        ("EPOCH_BATCH", "5"),
        ("progress", "25.0"),
        ("loss_box", "1.5"),
        ("metric_metrics/mAP50(B)", "0.5"),
        ("attempt", "1"),
        ("error_class", ""),
    ] {
        assert_eq!(text(&shown, name), value, "{name}");
    }
    for name in
        ["datetime", "elapsed_time", "result_time", "DEBUG_MODE", "WORKER_HOSTNAME", "processes", "task_id"]
    {
        assert!(!text(&shown, name).is_empty(), "{name}");
    }
    shown.record(journal.change(seq, Change::to(JobState::Completed, "done")).expect("legal"));
    assert_eq!(text(&shown, "progress"), "100.0");
}

#[test]
fn what_is_left_is_reckoned_from_the_pace_of_this_attempt() {
    let mut record = begun(&mut journal());
    // It began half a day ago, and was off for most of it.
    record.started_unix_ms = Some(now_unix_ms() - 12 * 3_600_000);
    let mut shown = Shown::new(record.clone());
    shown.event(&step(1, 10, 1_000));
    assert_eq!(text(&shown, "eta_seconds"), "", "one look says nothing of the pace");
    shown.event(&step(2, 10, 61_000));
    assert_eq!(text(&shown, "eta_seconds"), "480", "10 % a minute, 80 % to go");
    record.attempts = 2;
    record.state = JobState::Running;
    shown.record(record.clone());
    assert_eq!(text(&shown, "eta_seconds"), "", "a new attempt has a pace of its own");
    shown.event(&step(3, 10, 40_000_000));
    shown.event(&step(4, 10, 40_010_000));
    assert_eq!(text(&shown, "eta_seconds"), "60");
    // elapsed x (epochs x (trials + 1)) / ((trial + 1) x epoch)
    let [elapsed, total] = ["elapsed_time", "result_time"].map(|name| text(&shown, name).parse::<f64>());
    let ratio = total.expect("a number") / elapsed.expect("a number");
    assert!((ratio - 10.0 * 5.0 / (2.0 * 4.0)).abs() < 1e-3, "{ratio}");
    record.state = JobState::Completed;
    shown.record(record);
    assert_eq!(text(&shown, "eta_seconds"), "");
}

#[test]
fn what_is_no_longer_true_goes() {
    let mut journal = journal();
    let mut record = begun(&mut journal);
    let mut shown = Shown::new(record.clone());
    shown.event(&step(3, 5, 0));
    shown.event(&epoch(2));
    shown.event(&json!({"event": "checkpoint", "path": "/r/c"}));
    record.class = Some(FailureClass::Memory);
    shown.record(record.clone());
    assert_eq!(text(&shown, "error_class"), "memory");
    let done = journal.change(record.seq, Change::to(JobState::Completed, "done")).expect("legal");
    shown.record(done.clone());
    assert_eq!(text(&shown, "error_class"), "");
    // The same task id once more.
    shown.record(begun(&mut journal));
    assert_eq!((text(&shown, "EPOCH").as_str(), text(&shown, "progress").as_str()), ("0", "0.0"));
    for name in ["fitness", "best", "checkpoint", "loss_box", "metric_metrics/mAP50(B)"] {
        assert_eq!(get(&shown, name), None, "{name}");
    }
    shown.record(done);
    assert_eq!(text(&shown, "status"), "preparing", "word of the run before came late");
}

#[test]
fn a_service_that_starts_again_shows_the_place_that_the_journal_has() {
    let mut record = begun(&mut journal());
    record.state = JobState::Interrupted;
    let mut known = step(6, 5, 0);
    known["last_epoch"] = epoch(5);
    known["last_checkpoint"] = json!({"event": "checkpoint", "path": "/r/c"});
    record.progress = Some(known);
    let shown = Shown::new(record.clone());
    for (name, value) in [
        ("EPOCH", "6"),
        ("EPOCH_BATCH", "5"),
        ("progress", "55.0"),
        ("fitness", "0.25"),
        ("checkpoint", "/r/c"),
    ] {
        assert_eq!(text(&shown, name), value, "{name}");
    }
    // In a plan a batch is not a place.
    record.progress = Some(json!({"batch": 16, "batches": 40, "epochs": 10}));
    let shown = Shown::new(record);
    for (name, value) in [("EPOCH", "0"), ("EPOCH_BATCH", "0"), ("TOTAL_BATCHES", "40"), ("progress", "0.0")]
    {
        assert_eq!(text(&shown, name), value, "{name}");
    }
}

/// The name under which the table of the documentation has a field.
fn documented_as(name: &str) -> String {
    match (name.strip_prefix("gpu_0_"), name.strip_prefix("metric_")) {
        (Some(rest), _) => format!("gpu_{{i}}_{rest}"),
        (_, Some(_)) => "metric_{column}".to_owned(),
        _ => name.to_owned(),
    }
}

#[test]
fn every_field_is_in_the_table_of_the_documentation() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/redis-keys.md"));
    let page = page.expect("the documentation is there");
    let section = page.split("\n## ").find(|section| section.starts_with("Progress\n")).expect("a section");
    let rows = section.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    let names: Vec<&str> = rows.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect();
    let mut journal = journal();
    let mut shown = Shown::new(begun(&mut journal));
    for event in [step(3, 5, 0), epoch(2), json!({"event": "checkpoint", "path": "/r/c"}), step(4, 5, 9_000)]
    {
        shown.event(&event);
    }
    let gpu = GpuSample {
        name: "N".into(),
        load_percent: Some(1),
        temperature_c: Some(40),
        power_w: Some(100.0),
        ..GpuSample::default()
    };
    let sample = Sample { gpus: vec![gpu.clone()], ..Sample::default() };
    let mut written = shown.fields(&ServiceConfig::default(), Some(&sample));
    shown.record.result = Some(json!({"fitness": 0.5, "best": "/r/b", "last": "/r/l"}));
    written.extend(shown.fields(&ServiceConfig::default(), None));
    written.extend(worker_fields(&[gpu], |_| Some("x".to_owned())));
    let missing: Vec<String> = written
        .iter()
        .map(|(name, _)| documented_as(name))
        .filter(|name| !names.contains(&name.as_str()))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
    assert!(written.len() > 60 && names.len() > 60);
}
