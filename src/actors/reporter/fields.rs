//! The fields of a progress hash.

use std::cmp::Ordering;
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
    /// Nothing happened to it since the service started: it may be shown already.
    pub(super) is_again: bool,
    /// The job has ended and the log was sent to its end once since.
    pub(super) is_log_complete: bool,
    /// The last word of the session, by the names of its events.
    step: Json,
    epoch: Json,
    plan: Json,
    checkpoint: Json,
    pace: Option<Pace>,
}

/// How far this attempt has come in what time: two looks at the clock and at the percentage.
#[derive(Clone, Copy)]
struct Pace {
    attempt: u32,
    from: (i64, f64),
    to: (i64, f64),
}

impl Shown {
    /// What is shown of a record that nothing was heard of yet: its place is that of the last sign of progress in the journal.
    pub(super) fn new(record: JobRecord) -> Self {
        let known = record.progress.clone().unwrap_or_default();
        let (epoch, checkpoint) = (known["last_epoch"].clone(), known["last_checkpoint"].clone());
        // Before the first epoch a `batch` in it is the size of one.
        let (step, plan) = if known["epoch"].is_u64() { (known, Json::Null) } else { (Json::Null, known) };
        Self {
            record,
            is_dirty: true,
            is_again: false,
            is_log_complete: false,
            step,
            epoch,
            plan,
            checkpoint,
            pace: None,
        }
    }

    /// The same of a job of an earlier start of the service.
    pub(super) fn again(record: JobRecord) -> Self {
        Self { is_again: true, ..Self::new(record) }
    }

    /// True when something of it may be to be shown: it changed, or its log may have grown.
    pub(super) fn is_wanted(&self) -> bool {
        let state = self.record.state;
        self.is_dirty || state.has_process() || state.is_terminal()
    }

    pub(super) fn record(&mut self, record: JobRecord) {
        match record.seq.cmp(&self.record.seq) {
            // Word of an earlier run that came late.
            Ordering::Less => {}
            Ordering::Equal => {
                self.record = record;
                (self.is_dirty, self.is_again, self.is_log_complete) = (true, false, false);
            }
            Ordering::Greater => *self = Self::new(record),
        }
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
        if matches!(event["event"].as_str(), Some("step" | "epoch")) {
            let now = (event["time_unix_ms"].as_i64().unwrap_or_else(now_unix_ms), self.percent());
            let attempt = self.record.attempts;
            let known = self.pace.filter(|pace| pace.attempt == attempt);
            self.pace = Some(Pace { attempt, from: known.map_or(now, |pace| pace.from), to: now });
        }
        (self.is_dirty, self.is_again) = (true, false);
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
        put("error_class", record.class.map(|class| class.to_string()).unwrap_or_default());
        put("eta_seconds", self.seconds_left().map(|left_s| format!("{left_s:.0}")).unwrap_or_default());
        if let Some(sample) = machine {
            fields.extend(sample.progress_fields());
        }
        fields.into_iter().collect()
    }

    /// Where it is: trials, epochs, batches.
    fn place(&self, fields: &mut BTreeMap<String, String>) {
        let (trial, trials) = (u64::from(self.record.spec.trial_number), self.trials());
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

    fn trials(&self) -> u64 {
        self.record.spec.effective["sweeper"]["n_trials"].as_u64().unwrap_or(1).max(1)
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
        let (trial, trials) = (f64::from(record.spec.trial_number), self.trials() as f64);
        let epoch = self.epoch_now().max(1) as f64;
        // The estimate of the older workers, kept as it was.
        let total_s = elapsed_s * (self.epochs() as f64 * (trials + 1.0)) / ((trial + 1.0) * epoch);
        fields.insert("result_time".into(), format!("{total_s:.3}"));
    }

    /// What is left at the pace of this attempt: time in which nothing ran, or something was repeated, says nothing of it.
    fn seconds_left(&self) -> Option<f64> {
        let pace = self.pace.filter(|pace| pace.attempt == self.record.attempts)?;
        let (took_ms, came) = (pace.to.0 - pace.from.0, pace.to.1 - pace.from.1);
        let is_known = self.record.state == JobState::Running && took_ms > 0 && came > 0.0;
        is_known.then(|| took_ms as f64 / 1000.0 * (100.0 - pace.to.1) / came)
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
