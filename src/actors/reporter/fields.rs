//! The fields of a progress hash.

use std::collections::BTreeMap;

use serde_json::Value as Json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::adapters::telemetry::Sample;
use crate::job::clock::now_unix_ms;
use crate::job::record::JobRecord;
use crate::job::service::ServiceConfig;
use crate::job::state::JobState;

/// What is shown of one job.
pub(super) struct Shown {
    pub(super) record: JobRecord,
    pub(super) is_dirty: bool,
    /// The job has ended and the log was sent to its end once since.
    pub(super) is_log_complete: bool,
    /// The last word of the session, by the names of its events.
    step: Json,
    epoch: Json,
    plan: Json,
    checkpoint: Json,
}

impl Shown {
    pub(super) fn new(record: JobRecord) -> Self {
        let null = || Json::Null;
        Self {
            record,
            is_dirty: true,
            is_log_complete: false,
            step: null(),
            epoch: null(),
            plan: null(),
            checkpoint: null(),
        }
    }

    pub(super) fn record(&mut self, record: JobRecord) {
        self.record = record;
        (self.is_dirty, self.is_log_complete) = (true, false);
    }

    pub(super) fn event(&mut self, event: &Json) {
        let place = match event["event"].as_str() {
            Some("step") => &mut self.step,
            Some("epoch") => &mut self.epoch,
            Some("plan") => &mut self.plan,
            Some("checkpoint") => &mut self.checkpoint,
            _ => return,
        };
        place.clone_from(event);
        if self.record.state == JobState::Preparing && event["event"] != "checkpoint" {
            // The supervisor's record of it comes with the end; what is shown need not wait.
            self.record.state = JobState::Running;
        }
        self.is_dirty = true;
    }

    /// All fields, as text.
    pub(super) fn fields(&self, config: &ServiceConfig, machine: Option<&Sample>) -> Vec<(String, String)> {
        let mut fields = BTreeMap::new();
        self.place(&mut fields);
        self.times(&mut fields);
        self.figures(&mut fields);
        let record = &self.record;
        let mut put = |name: &str, value: String| fields.insert(name.to_owned(), value);
        put("task_id", record.task_id.to_string());
        put("status", record.state.to_string());
        put("reason", record.reason.clone());
        put("attempt", record.attempts_all().to_string());
        put("MACHINE_ID", config.machine_id.clone());
        put("updated_unix_ms", now_unix_ms().to_string());
        let debug = record.spec.effective.get("debug").map(plain);
        put("DEBUG_MODE", debug.unwrap_or_else(|| "False".to_owned()));
        let local = OffsetDateTime::now_local().unwrap_or_else(|_| OffsetDateTime::now_utc());
        put("datetime", local.format(&Rfc3339).unwrap_or_default());
        if let Some(class) = record.class {
            put("error_class", class.to_string());
        }
        if let Some(sample) = machine {
            fields.extend(sample.progress_fields());
        }
        fields.into_iter().collect()
    }

    /// Where it is: trials, epochs, batches.
    fn place(&self, fields: &mut BTreeMap<String, String>) {
        let spec = &self.record.spec;
        let trials = spec.effective["sweeper"]["n_trials"].as_u64().unwrap_or(1).max(1);
        let trial = u64::from(spec.trial_number);
        let (epoch, epochs) = (self.epoch_now(), self.epochs());
        let batch = self.step["batch"].as_u64();
        let batches = self.step["batches"].as_u64().or(self.plan["batches"].as_u64());
        let mut put = |name: &str, value: String| fields.insert(name.to_owned(), value);
        put("TRIAL_NUMBER", trial.to_string());
        put("TOTAL_TRIALS", trials.to_string());
        put("TRIAL_PROGRESS", ratio(trial as f64, trials as f64));
        put("EPOCH", epoch.to_string());
        put("TOTAL_EPOCHS", epochs.to_string());
        put("EPOCH_PROGRESS", ratio(epoch as f64, epochs as f64));
        put("EPOCH_BATCH", batch.unwrap_or(0).to_string());
        put("TOTAL_BATCHES", batches.unwrap_or(0).to_string());
        put("progress", format!("{:.1}", self.percent()));
    }

    fn epochs(&self) -> u64 {
        let said =
            [&self.step, &self.epoch, &self.plan].into_iter().find_map(|event| event["epochs"].as_u64());
        said.unwrap_or(u64::from(self.record.spec.args.epochs)).max(1)
    }

    /// The epoch in hand, from 1; 0 before the first.
    fn epoch_now(&self) -> u64 {
        let of = |event: &Json| event["epoch"].as_u64().unwrap_or(0);
        of(&self.step).max(of(&self.epoch))
    }

    /// 0 to 100; 100 for a completed job alone.
    fn percent(&self) -> f64 {
        if self.record.state == JobState::Completed {
            return 100.0;
        }
        let batches = self.step["batches"].as_f64().unwrap_or(1.0).max(1.0);
        let batch = self.step["batch"].as_f64().unwrap_or(0.0);
        let done = self.epoch["epoch"].as_f64().unwrap_or(0.0);
        let in_hand = self.step["epoch"].as_f64().map_or(done, |epoch| epoch - 1.0 + batch / batches);
        (done.max(in_hand) / self.epochs() as f64 * 100.0).clamp(0.0, 99.9)
    }

    fn times(&self, fields: &mut BTreeMap<String, String>) {
        let record = &self.record;
        let Some(started) = record.started_unix_ms else { return };
        let until = record.finished_unix_ms.unwrap_or_else(now_unix_ms);
        let elapsed_s = (until - started).max(0) as f64 / 1000.0;
        fields.insert("elapsed_time".into(), format!("{elapsed_s:.3}"));
        let trial = f64::from(record.spec.trial_number);
        let epoch = self.epoch_now().max(1) as f64;
        // The estimate of the older workers, kept as it was.
        let total = elapsed_s * (self.epochs() as f64 * (trial + 1.0)) / ((trial + 1.0) * epoch);
        fields.insert("result_time".into(), format!("{total:.3}"));
        let percent = self.percent();
        if record.state == JobState::Running && percent > 0.0 {
            let left_s = elapsed_s * (100.0 - percent) / percent;
            fields.insert("eta_seconds".into(), format!("{left_s:.0}"));
        }
    }

    fn figures(&self, fields: &mut BTreeMap<String, String>) {
        let mut put = |name: String, value: &Json| {
            if !value.is_null() {
                fields.insert(name, plain(value));
            }
        };
        for name in ["images_per_second", "data_wait_ratio", "lr"] {
            put(name.to_owned(), &self.step[name]);
        }
        for name in ["box", "cls", "dfl"] {
            put(format!("loss_{name}"), &self.step[format!("{name}_loss")]);
        }
        for (name, value) in self.epoch["columns"].as_object().into_iter().flatten() {
            if name.starts_with("metrics/") || name.starts_with("val/") {
                put(format!("metric_{name}"), value);
            }
        }
        let result = self.record.result.as_ref();
        put("fitness".to_owned(), result.map_or(&self.epoch["fitness"], |result| &result["fitness"]));
        put("checkpoint".to_owned(), result.map_or(&self.checkpoint["path"], |result| &result["last"]));
        if let Some(best) = result.map(|result| &result["best"]) {
            put("best".to_owned(), best);
        }
    }
}

fn ratio(part: f64, whole: f64) -> String {
    format!("{:.4}", (part / whole.max(1.0)).clamp(0.0, 1.0))
}

/// A value as text, without the quotes of a text.
fn plain(value: &Json) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::adapters::queue::JobStore;
    use crate::adapters::queue::journal::Journal;
    use crate::job::record::{Change, NewJob};
    use crate::job::spec::JobSpec;

    #[test]
    fn a_running_job_shows_every_documented_field() {
        let config = ServiceConfig::default();
        let mut journal = Journal::in_memory().expect("opens");
        let text =
            b"model: yolov8n\ntype: yolo\ntask_id: a\nsweeper: {n_trials: 4}\ntrain: {data: d, epochs: 10}\n";
        let spec = JobSpec::load(text, "t", &config.spec_context("/w".into())).expect("valid").spec;
        let run_dir = spec.run_dir();
        let new = NewJob {
            spec,
            source: "t".into(),
            content_sha256: "0".into(),
            run_dir,
            reason: "waits".into(),
            shared: None,
            continues: None,
        };
        let record = journal.accept(new, None).expect("accepted");
        let mut shown = Shown::new(journal.begin_attempt(record.seq, "starts").expect("legal"));
        let get = |shown: &Shown, name: &str| {
            let fields = shown.fields(&config, Some(&Sample::default()));
            fields.into_iter().find(|(known, _)| known == name).map(|(_, value)| value).unwrap_or_default()
        };
        assert_eq!((get(&shown, "status").as_str(), get(&shown, "EPOCH").as_str()), ("preparing", "0"));
        shown
            .event(&json!({"event": "step", "epoch": 3, "epochs": 10, "batch": 5, "batches": 10, "lr": 0.01,
            "box_loss": 1.5, "images_per_second": 50.0}));
        shown.event(
            &json!({"event": "epoch", "epoch": 2, "epochs": 10, "columns": {"metrics/mAP50(B)": 0.5}}),
        );
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
        ] {
            assert_eq!(get(&shown, name), value, "{name}");
        }
        for name in [
            "datetime",
            "elapsed_time",
            "result_time",
            "DEBUG_MODE",
            "WORKER_HOSTNAME",
            "processes",
            "task_id",
        ] {
            assert!(!get(&shown, name).is_empty(), "{name}");
        }
        let done = journal.change(record.seq, Change::to(JobState::Completed, "done")).expect("legal");
        shown.record(done);
        assert_eq!(get(&shown, "progress"), "100.0");
    }
}
