//! Session events on their way to people: the last sign of progress, and the lines of the job's log.

use serde_json::{Map, Value as Json};

use crate::adapters::logs;
use crate::job::clock::now_unix_ms;
use crate::job::delivery::MetricPoint;
use crate::job::record::JobRecord;
use crate::job::state::JobState;

/// Gives the job's log the level and format that the job asked for; called before the first line about it. The file of a job
/// that has begun stays until [`end_log`].
pub(in crate::actors) fn prepare_log(record: &JobRecord) {
    let (spec, task_id) = (&record.spec, record.task_id.as_str());
    let has_begun = record.attempts > 0;
    if has_begun && !record.state.is_terminal() {
        logs::keep_job_log(task_id);
    }
    let is_new_run = !has_begun && record.state == JobState::Queued;
    logs::set_job_log(task_id, spec.log_level.as_deref(), spec.log_format.as_deref(), is_new_run);
}

/// Lets the log file of a job that has ended go some time.
pub(in crate::actors) fn end_log(record: &JobRecord) {
    if record.state.is_terminal() {
        logs::let_job_log_go(record.task_id.as_str());
    }
}

/// Keeps the last word of each kind that a status shows.
pub(super) fn merge_progress(progress: &mut Map<String, Json>, kind: &str, event: &Json) {
    let Some(fields) = event.as_object() else { return };
    if matches!(kind, "step" | "epoch_started" | "memory" | "plan" | "validating") {
        for (key, value) in fields.iter().filter(|(key, _)| *key != "event" && *key != "time_unix_ms") {
            progress.insert(key.clone(), value.clone());
        }
    } else if matches!(kind, "epoch" | "checkpoint") {
        if kind == "epoch" && event["is_best"] == true {
            progress.insert("best_epoch".into(), event["epoch"].clone());
        }
        progress.insert(format!("last_{kind}"), event.clone());
    }
}

/// Samples of a step for the tracking server, under `step/`: losses, learning rate, speed.
pub(super) fn step_samples(event: &Json) -> Vec<MetricPoint> {
    let step = event["step"].as_i64().unwrap_or(0);
    let at_unix_ms = event["time_unix_ms"].as_i64().unwrap_or_else(now_unix_ms);
    let names = ["box_loss", "cls_loss", "dfl_loss", "lr", "images_per_second", "data_wait_ratio"];
    let point = |name: &&str| {
        let value = event[*name].as_f64()?;
        Some(MetricPoint { key: format!("step/{name}"), value, at_unix_ms, step })
    };
    names.iter().filter_map(point).collect()
}

/// Writes an event as a line for people.
pub(super) fn log_event(task_id: &str, kind: &str, event: &Json) {
    match kind {
        "warning" => tracing::warn!(task_id, "{}", event["message"].as_str().unwrap_or_default()),
        "failed" => {
            tracing::error!(task_id, "{}", event["message"].as_str().unwrap_or("the trainer failed"));
        }
        "epoch" => {
            let columns = event["columns"].as_object();
            let figures: Vec<String> = columns
                .into_iter()
                .flatten()
                .filter(|(name, _)| name.as_str() != "epoch" && name.as_str() != "time")
                .map(|(name, value)| format!("{name} {value}"))
                .collect();
            tracing::info!(task_id, "epoch {}/{}: {}", event["epoch"], event["epochs"], figures.join(", "));
        }
        "started" => {
            tracing::info!(task_id, "trainer started: {}", figures(event, &["model", "data", "pid"]))
        }
        "plan" => {
            let keys = [
                "batch",
                "imgsz",
                "images",
                "val_images",
                "batches",
                "epochs",
                "optimizer",
                "lr0",
                "threads",
            ];
            tracing::info!(task_id, "plan: {}", figures(event, &keys));
        }
        "finished" => {
            tracing::info!(task_id, "trainer finished: {}", figures(event, &["outcome", "epochs", "fitness"]))
        }
        "checkpoint" => {
            tracing::debug!(task_id, "checkpoint: {}", figures(event, &["path", "epoch", "step"]))
        }
        _ => tracing::debug!(task_id, "{kind}: {event}"),
    }
}

/// Those of the named fields that an event has, as `name value, name value`.
fn figures(event: &Json, keys: &[&str]) -> String {
    let present = keys.iter().filter(|key| !event[**key].is_null());
    let spelt = present.map(|key| {
        let value = event[*key].as_str().map_or_else(|| event[*key].to_string(), str::to_owned);
        format!("{key} {value}")
    });
    spelt.collect::<Vec<_>>().join(", ")
}
