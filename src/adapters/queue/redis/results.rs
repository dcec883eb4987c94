//! Results and metrics of jobs: each published once, and only by the owner.

use redis::cmd;
use serde_json::{Value as Json, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Fleet, FleetError, scripts};
use crate::job::delivery::{EpochBody, ResultBody, RunRef};

/// How long it is remembered that a result was published, and how long metrics are kept: 30 days, in milliseconds.
const KEPT_MS: &str = "2592000000";
/// Entries of the stream of results.
const RESULTS_MAX: &str = "100000";

/// What became of a publication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Published {
    /// It is published now.
    Published,
    /// It was before.
    Duplicate,
    /// Another machine, or a later start of this one, owns the run: nothing was published.
    Fenced {
        /// The machine.
        owner: String,
        /// Its fencing number.
        fence: u64,
    },
}

impl Published {
    fn of((word, owner, fence): (String, String, u64)) -> Self {
        match word.as_str() {
            "published" => Self::Published,
            "duplicate" => Self::Duplicate,
            _ => Self::Fenced { owner, fence },
        }
    }
}

/// The fields of a result's entry: `task_id`, `trial_number`, `attempt`, `status`, `fitness` (the shortest text that
/// reads back as the same number; empty without one) and `result`, the whole message as JSON.
fn result_fields(body: &ResultBody) -> [(&'static str, String); 6] {
    let message = &body.message;
    let text = |key: &str, otherwise: String| match message.get(key) {
        Some(Json::String(text)) => text.clone(),
        None | Some(Json::Null) => otherwise,
        Some(other) => other.to_string(),
    };
    let fitness = message.get("fitness").and_then(Json::as_f64).map(|score| format!("{score:?}"));
    [
        ("task_id", body.run.task_id.to_string()),
        ("trial_number", text("trial_number", body.run.trial_number.to_string())),
        ("attempt", text("attempt", "1".to_owned())),
        ("status", text("status", String::new())),
        ("fitness", fitness.unwrap_or_default()),
        ("result", message.to_string()),
    ]
}

impl Fleet {
    /// Publishes the end of a job in the stream of results, ends the entry that it came from, and lets its lease go. The
    /// instance decides whether it was published before. On one server all of it happens or nothing; on a cluster the steps
    /// follow each other, and repeating the call completes them.
    ///
    /// # Errors
    /// As every call. The call may be repeated after any.
    pub async fn publish_result(&self, body: &ResultBody, fence: u64) -> Result<Published, FleetError> {
        let what = "publish a result";
        let keys = self.keys();
        let seen = keys.seen(&body.run.instance);
        let task_id = body.run.task_id.as_str();
        let mut names = vec![seen, keys.results.clone()];
        let mut entry_id: &[u8] = b"";
        let mut entry_kind: &[u8] = b"stream";
        if self.is_cluster() {
            if let Some(fenced) = self.fenced(what, &body.run, fence).await? {
                return Ok(fenced);
            }
        } else {
            names.extend([keys.fence(task_id), keys.lease(task_id)]);
            if let Some(entry) = &body.entry {
                entry_id = entry.id.as_bytes();
                if entry.is_list {
                    entry_kind = b"list";
                    names.push(keys.processing(&entry.queue, &self.inner.machine_id));
                } else {
                    names.push(entry.queue.clone());
                }
            }
        }
        let fields = result_fields(body);
        let fence_text = fence.to_string();
        let mut arguments: Vec<&[u8]> = vec![
            body.run.instance.as_bytes(),
            fence_text.as_bytes(),
            KEPT_MS.as_bytes(),
            RESULTS_MAX.as_bytes(),
            self.inner.config.group.as_bytes(),
            entry_kind,
            entry_id,
        ];
        for (name, value) in &fields {
            arguments.extend([name.as_bytes(), value.as_bytes()]);
        }
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let outcome = Published::of(self.script(what, &scripts::PUBLISH, &names, &arguments).await?);
        if self.is_cluster() {
            if let Some(entry) = &body.entry {
                self.acknowledge(entry).await?;
            }
            self.let_go(&body.run.task_id, fence).await?;
        }
        Ok(outcome)
    }

    /// The later owner of the run, if there is one.
    async fn fenced(
        &self,
        what: &'static str,
        run: &RunRef,
        fence: u64,
    ) -> Result<Option<Published>, FleetError> {
        let mut command = cmd("HMGET");
        command.arg(self.keys().fence(run.task_id.as_str())).arg("owner").arg("fence").arg("instance");
        let (owner, other, instance): (Option<String>, Option<u64>, Option<String>) =
            self.command(what, &command).await?;
        let other = other.filter(|other| *other > fence && instance.as_ref() == Some(&run.instance));
        Ok(other.map(|fence| Published::Fenced { owner: owner.unwrap_or_default(), fence }))
    }

    /// True when the result of this instance of a task was published (in the last 30 days): an entry that is delivered
    /// again can be acknowledged.
    ///
    /// # Errors
    /// As every call.
    pub async fn is_done(&self, instance: &str) -> Result<bool, FleetError> {
        self.command("look for a result", cmd("EXISTS").arg(self.keys().seen(instance))).await
    }

    /// False when the key of the results holds something that is no stream: no result can be published.
    ///
    /// # Errors
    /// As every call.
    pub async fn has_results_stream(&self) -> Result<bool, FleetError> {
        let kind: String = self.command("type of the results", cmd("TYPE").arg(&self.keys().results)).await?;
        Ok(matches!(kind.as_str(), "stream" | "none"))
    }

    /// Notes the metrics of an epoch in the history of its task; a second note of the epoch replaces the first. The history is
    /// that of the last run: its first note removes what an earlier one left from that epoch on, and what an earlier one tells of
    /// those epochs later is a [`Published::Duplicate`].
    ///
    /// # Errors
    /// As every call.
    pub async fn publish_metrics(&self, body: &EpochBody) -> Result<Published, FleetError> {
        let what = "note metrics";
        let task_id = body.run.task_id.as_str();
        let mut names = vec![self.keys().metrics(task_id), self.keys().metrics_run(task_id)];
        if self.is_cluster() {
            if let Some(fenced) = self.fenced(what, &body.run, body.run.fence).await? {
                return Ok(fenced);
            }
        } else {
            names.push(self.keys().fence(task_id));
        }
        let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(body.at_unix_ms) * 1_000_000);
        let timestamp = at.ok().and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_default();
        let member =
            json!({"epoch": body.epoch, "metrics": body.metrics, "timestamp": timestamp}).to_string();
        let (epoch, fence) = (body.epoch.to_string(), body.run.fence.to_string());
        let arguments: [&[u8]; 6] = [
            epoch.as_bytes(),
            member.as_bytes(),
            KEPT_MS.as_bytes(),
            body.run.instance.as_bytes(),
            fence.as_bytes(),
            self.inner.machine_id.as_bytes(),
        ];
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        Ok(Published::of(self.script(what, &scripts::METRICS, &names, &arguments).await?))
    }
}
