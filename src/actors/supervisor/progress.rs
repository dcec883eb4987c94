//! Session events on their way to people: the last sign of progress, and the lines of the job's log.

use std::time::Instant;

use actix::{AsyncContext, Context, WrapFuture};
use serde_json::{Map, Value as Json};

use super::{Busy, Supervisor, log_journal};
use crate::actors::outgoing;
use crate::adapters::gpu::Gpu;
use crate::adapters::logs;
use crate::adapters::telemetry::{GpuMemory, GpuSample, worker_fields};
use crate::job::clock::now_unix_ms;
use crate::job::delivery::MetricPoint;
use crate::job::record::JobRecord;
use crate::job::state::JobState;

/// Gives the job's log the level and format that the job asked for; called before the first line about it. The file of a job
/// that has begun stays until [`end_log`].
pub(in crate::actors) fn prepare_log(record: &JobRecord) {
    // A job of the command line is first heard of when its first attempt begins.
    let is_first =
        matches!((record.attempts, record.state), (0, JobState::Queued) | (1, JobState::Preparing));
    prepare(record, is_first.then_some(record.seq));
}

/// The same for a job that an earlier start of the service had: where its run begins in the file is not known.
pub(in crate::actors) fn prepare_log_again(record: &JobRecord) {
    prepare(record, None);
}

fn prepare(record: &JobRecord, run: Option<i64>) {
    let (spec, task_id) = (&record.spec, record.task_id.as_str());
    let has_begun = record.attempts > 0;
    if has_begun && !record.state.is_terminal() {
        logs::keep_job_log(task_id);
    }
    logs::set_job_log(task_id, spec.log_level.as_deref(), spec.log_format.as_deref(), run);
}

/// Lets the log file of a job that has ended go some time.
pub(in crate::actors) fn end_log(record: &JobRecord) {
    if record.state.is_terminal() {
        logs::let_job_log_go(record.task_id.as_str());
    }
}

/// What of a job's progress outlives the process that said it: a later attempt goes on from there.
const KEPT_PROGRESS: [&str; 3] = ["best_epoch", "last_epoch", "last_checkpoint"];

impl Busy {
    /// The job of a slot at the start of an attempt.
    pub(super) fn new(record: JobRecord) -> Self {
        let known = record.progress.as_ref().and_then(Json::as_object);
        let kept = |name: &str| Some((name.to_owned(), known?.get(name)?.clone()));
        let progress = KEPT_PROGRESS.into_iter().filter_map(kept).collect();
        Self { record, progress, progress_saved: Instant::now(), samples: Vec::new(), sampled: None }
    }
}

impl Supervisor {
    /// Tells the tracking server where the job of a seat runs.
    pub(super) fn tell_place(&self, seat: usize, ctx: &mut Context<Self>) {
        let Some(busy) = self.bays[seat].busy.as_ref().filter(|_| self.config.mlflow.tracking_uri.is_some())
        else {
            return;
        };
        let given = self.bays[seat].slot.as_gpu().cloned();
        let all: Vec<Gpu> = self.bays.iter().filter_map(|bay| bay.slot.as_gpu().cloned()).collect();
        let (record, keeper, config) = (busy.record.clone(), self.keeper.clone(), self.config.clone());
        let work = async move {
            let set = |name: &str| std::env::var(name).ok();
            let tags = tokio::task::spawn_blocking(move || place_tags(given.as_ref(), &all, set)).await;
            let start = outgoing::run_start(&config, &record, tags.unwrap_or_default());
            let told = keeper.with(move |journal| journal.put_samples(&record.instance, start)).await;
            if let Err(error) = told {
                log_journal("note where a job runs", &error);
            }
        };
        // Waited for, so that no end of the job comes before it.
        ctx.wait(work.into_actor(self));
    }
}

/// Tags of this machine, with `all` its GPUs, and of the GPU that a job was `given`. Blocks.
fn place_tags(
    given: Option<&Gpu>,
    all: &[Gpu],
    set: impl Fn(&str) -> Option<String>,
) -> Vec<(String, String)> {
    let memory =
        |gpu: &Gpu| GpuMemory { total_bytes: gpu.memory_bytes, free_bytes: gpu.memory_bytes, used_bytes: 0 };
    let sample = |gpu: &Gpu| GpuSample {
        number: gpu.number as u32,
        name: gpu.name.clone(),
        uuid: gpu.uuid.clone(),
        memory: Some(memory(gpu)),
        ..GpuSample::default()
    };
    let samples: Vec<GpuSample> = all.iter().map(sample).collect();
    let mut tags = worker_fields(&samples, set);
    if let Some(gpu) = given {
        let named = |what: &str, value: String| (format!("gpu_{}_{what}", gpu.number), value);
        tags.push(named("name", gpu.name.clone()));
        tags.push(named("uuid", gpu.uuid.clone()));
        // MiB, as in the progress hash.
        tags.push(named("memoryTotal", (gpu.memory_bytes >> 20).to_string()));
    }
    tags
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::adapters::queue::JobStore;
    use crate::adapters::queue::journal::Journal;
    use crate::job::record::NewJob;
    use crate::job::service::ServiceConfig;

    #[test]
    fn a_later_attempt_knows_what_the_earlier_ones_reached() {
        let mut journal = Journal::in_memory().expect("opens");
        let context = ServiceConfig::default().spec_context("/w".into());
        let text = "model: yolov8n\ntype: yolo\ntask_id: t\ntrain: {data: d}\n";
        let new = NewJob::sample(text, &context);
        let mut record = journal.accept(new, None).expect("accepted");
        assert!(Busy::new(record.clone()).progress.is_empty());
        let mut progress = Map::new();
        for event in [
            json!({"event": "step", "step": 9, "images_per_second": 70.5}),
            json!({"event": "epoch", "epoch": 2, "is_best": true, "columns": {"metrics/mAP50(B)": 0.5}}),
            json!({"event": "checkpoint", "epoch": 2, "step": 9}),
        ] {
            merge_progress(&mut progress, event["event"].as_str().expect("text"), &event);
        }
        record.progress = Some(Json::Object(progress));
        let busy = Busy::new(record);
        assert_eq!(busy.progress["best_epoch"], 2);
        assert_eq!(busy.progress["last_epoch"]["columns"]["metrics/mAP50(B)"], 0.5);
        assert_eq!(busy.progress["last_checkpoint"]["step"], 9);
        assert_eq!(busy.progress.len(), 3, "the speed of a process that is gone is no news");
    }

    #[test]
    fn the_tags_name_the_machine_and_the_gpu_of_the_job() {
        let gpu = |number: usize| Gpu {
            number,
            uuid: format!("GPU-{number}"),
            name: "N".into(),
            memory_bytes: 8 << 30,
            refused: None,
        };
        let set = |name: &str| (name == "WORKER_NAME").then(|| "w1".to_owned());
        let tags = place_tags(Some(&gpu(1)), &[gpu(0), gpu(1)], set);
        let find = |name: &str| tags.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        assert_eq!((find("WORKER_NAME"), find("WORKER_GPU_COUNT")), (Some("w1"), Some("2")));
        assert_eq!(find("WORKER_GPU_MEMORY"), Some("8192, 8192"));
        assert_eq!((find("gpu_1_name"), find("gpu_1_uuid")), (Some("N"), Some("GPU-1")));
        assert_eq!((find("gpu_1_memoryTotal"), find("gpu_0_uuid")), (Some("8192"), None));
        let tags = place_tags(None, &[], set);
        assert!(tags.iter().all(|(key, _)| !key.starts_with("gpu_")));
    }
}
