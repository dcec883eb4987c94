//! Experiments and runs: found by their tag before they are made, so that every machine writes to one run.

use std::collections::HashMap;

use serde_json::{Value as Json, json};

use super::MlflowSink;
use super::names;
use crate::adapters::tracking::TrackingError;
use crate::job::delivery::RunRef;

/// Tag that says which run this is.
pub(super) const INSTANCE: &str = "boxwright.instance";
/// Tag with the fencing number of the owner.
pub(super) const FENCE: &str = "boxwright.fence";
/// Tag with the machine of the owner.
pub(super) const MACHINE: &str = "boxwright.machine";
/// Parameter that says whether a run is the one of its instance. Parameters can be written once only.
const DECISION: &str = "boxwright.run";
/// It is.
const KEPT: &str = "kept";
/// It is not, another is.
const DROPPED: &str = "dropped";
/// Looks for a run on which machines agree.
const LOOKS_MAX: usize = 8;
/// Runs of one instance that are looked at (one is right, a second is an accident).
const RUNS_MAX: usize = 50;
/// Tags or parameters of one request.
const ITEMS_MAX: usize = 100;

/// The newest point of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Latest {
    pub(super) step: i64,
    pub(super) at_unix_ms: i64,
}

/// A run as the server shows it.
#[derive(Debug, Default)]
pub(super) struct RunView {
    pub(super) id: String,
    pub(super) experiment_id: String,
    pub(super) status: String,
    pub(super) artifact_uri: String,
    pub(super) tags: HashMap<String, String>,
    pub(super) params: HashMap<String, String>,
    pub(super) latest: HashMap<String, Latest>,
    end_unix_ms: Option<i64>,
    is_active: bool,
    start_unix_ms: i64,
}

/// Runs of one instance.
struct Runs {
    /// In the order in which they are preferred.
    active: Vec<RunView>,
    /// One that was deleted, and not by us.
    deleted: Option<String>,
}

/// A whole number; some servers write large ones as text.
pub(super) fn whole(value: &Json) -> Option<i64> {
    value.as_i64().or_else(|| value.as_str().and_then(|text| text.parse().ok()))
}

fn text(value: &Json) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// A list of `{"key", "value"}` as a map.
pub(super) fn pairs(list: &Json) -> HashMap<String, String> {
    let items = list.as_array().map(Vec::as_slice).unwrap_or_default();
    items.iter().map(|item| (text(&item["key"]), text(&item["value"]))).collect()
}

/// The reverse, in order.
pub(super) fn items<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Vec<Json> {
    pairs.into_iter().map(|(key, value)| json!({ "key": key, "value": value })).collect()
}

impl RunView {
    fn read(run: &Json) -> Option<Self> {
        let (info, data) = (&run["info"], &run["data"]);
        let metrics = data["metrics"].as_array().map(Vec::as_slice).unwrap_or_default();
        let latest = metrics.iter().filter_map(|metric| {
            let latest = Latest { step: whole(&metric["step"])?, at_unix_ms: whole(&metric["timestamp"])? };
            Some((metric["key"].as_str()?.to_owned(), latest))
        });
        let id = info["run_id"].as_str().or_else(|| info["run_uuid"].as_str())?.to_owned();
        Some(Self {
            id,
            experiment_id: text(&info["experiment_id"]),
            status: text(&info["status"]),
            artifact_uri: text(&info["artifact_uri"]),
            tags: pairs(&data["tags"]),
            params: pairs(&data["params"]),
            latest: latest.collect(),
            end_unix_ms: whole(&info["end_time"]),
            is_active: info["lifecycle_stage"].as_str() != Some("deleted"),
            start_unix_ms: whole(&info["start_time"]).unwrap_or(i64::MAX),
        })
    }

    /// True when this was decided about it.
    fn is(&self, word: &str) -> bool {
        self.params.get(DECISION).is_some_and(|decided| decided == word)
    }

    /// The fencing number of the owner; 0 when nobody said one.
    fn fence(&self) -> u64 {
        self.tags.get(FENCE).and_then(|text| text.parse().ok()).unwrap_or(0)
    }
}

fn unexpected(operation: &'static str, what: &str) -> TrackingError {
    TrackingError::Failed { operation, status: 200, said: format!("its answer has no {what}") }
}

/// What a run is called and where it comes from.
fn identity(run: &RunRef) -> Vec<(&'static str, String)> {
    let mut tags = vec![
        (INSTANCE, run.instance.clone()),
        (FENCE, run.fence.to_string()),
        (MACHINE, run.machine_id.clone()),
        ("task_id", run.task_id.to_string()),
        ("experiment_name", run.study_name.clone()),
        ("registered_model_name", run.study_name.clone()),
        ("trial_number", run.trial_number.to_string()),
        ("experiment_type", "object_detection".to_owned()),
        ("model_type", run.kind.clone()),
        ("framework", "boxwright".to_owned()),
        ("mlflow.source.name", "boxwright".to_owned()),
        ("mlflow.source.type", "JOB".to_owned()),
    ];
    tags.extend(run.version.map(|version| ("version", version.to_string())));
    tags
}

impl MlflowSink {
    /// The run of `run`, made at `started_unix_ms` when there is none, with us as its owner.
    ///
    /// It is read anew each time: that shows whether another machine took it over, and which points are there.
    pub(super) async fn open(
        &self,
        run: &RunRef,
        started_unix_ms: i64,
        is_start: bool,
    ) -> Result<RunView, TrackingError> {
        let view = match self.known(&run.instance).await? {
            Some(view) => view,
            None => self.found_or_made(run, started_unix_ms, is_start).await?,
        };
        self.remember(&run.instance, &view.id);
        let fence = view.fence();
        let owner = view.tags.get(MACHINE).cloned().unwrap_or_default();
        if fence > run.fence {
            return Err(TrackingError::Fenced { owner, fence });
        }
        if fence < run.fence || (is_start && owner != run.machine_id) {
            let fence = run.fence.to_string();
            let tags = items([(FENCE, fence.as_str()), (MACHINE, run.machine_id.as_str())]);
            self.log_tags(&view.id, tags).await?;
        }
        Ok(view)
    }

    /// The run that we have seen before, if it is still there.
    async fn known(&self, instance: &str) -> Result<Option<RunView>, TrackingError> {
        let Some(id) = self.remembered(instance) else { return Ok(None) };
        let answer = match self.client.get("runs/get", &[("run_id", &id)]).await {
            Ok(answer) => RunView::read(&answer["run"]).filter(|view| view.is_active),
            // The server was set up anew, say.
            Err(TrackingError::Missing { .. }) => None,
            Err(error) => return Err(error),
        };
        if answer.is_none() {
            self.forget(instance);
        }
        Ok(answer)
    }

    /// The run that all machines use.
    ///
    /// Two may look, find none, and make one each. The server lets a parameter be written once only, and that decides: a run is
    /// kept when somebody, after a look, has had all others of that look dropped and then this one kept. Of two runs the
    /// later one's maker sees both, so no two are kept, and a kept one is never deleted.
    async fn found_or_made(
        &self,
        run: &RunRef,
        started_unix_ms: i64,
        is_start: bool,
    ) -> Result<RunView, TrackingError> {
        let experiment_id = self.experiment(&run.study_name, is_start).await?;
        for _ in 0..LOOKS_MAX {
            let mut there = self.runs_of(&experiment_id, run).await?;
            if let Some(at) = there.active.iter().position(|view| view.is(KEPT)) {
                let kept = there.active.swap_remove(at);
                self.drop_runs(&there.active).await?;
                return Ok(kept);
            }
            if there.active.is_empty() {
                if let Some(id) = there.deleted {
                    return Err(TrackingError::Deleted { what: format!("run {id}") });
                }
                self.make_run(&experiment_id, run, started_unix_ms).await?;
                continue;
            }
            let first = there.active.remove(0);
            if self.drop_runs(&there.active).await? && self.decide(&first.id, KEPT).await? {
                return Ok(first);
            }
        }
        let said = format!("other machines make and drop runs of {} all the time", run.task_id);
        Err(TrackingError::Failed { operation: "runs/create", status: 200, said })
    }

    async fn make_run(
        &self,
        experiment_id: &str,
        run: &RunRef,
        started_unix_ms: i64,
    ) -> Result<(), TrackingError> {
        let tags = identity(run);
        let body = json!({
            "experiment_id": experiment_id,
            "run_name": run.task_id.as_str(),
            "start_time": started_unix_ms.max(0),
            "tags": items(tags.iter().map(|(key, value)| (*key, value.as_str()))),
        });
        self.client.post("runs/create", &body).await.map(|_| ())
    }

    /// Drops and deletes runs; false when one of them is kept.
    async fn drop_runs(&self, views: &[RunView]) -> Result<bool, TrackingError> {
        for view in views {
            if !view.is(DROPPED) && !self.decide(&view.id, DROPPED).await? {
                return Ok(false);
            }
            match self.client.post("runs/delete", &json!({ "run_id": view.id })).await {
                // Somebody else was faster.
                Ok(_) | Err(TrackingError::Refused { .. } | TrackingError::Missing { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Writes the decision about a run, once for all; false when it was decided otherwise.
    async fn decide(&self, run_id: &str, word: &str) -> Result<bool, TrackingError> {
        match self.log_params(run_id, items([(DECISION, word)])).await {
            Ok(()) => return Ok(true),
            Err(TrackingError::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
        let answer = self.client.get("runs/get", &[("run_id", run_id)]).await?;
        let view = RunView::read(&answer["run"]).ok_or_else(|| unexpected("runs/get", "run"))?;
        Ok(view.is(word) || (word == DROPPED && !view.is_active))
    }

    /// Deletes the empty twins of a run: a request to make it that was given up may have been carried out later.
    pub(super) async fn drop_twins(&self, view: &RunView, run: &RunRef) -> Result<(), TrackingError> {
        let mut there = self.runs_of(&view.experiment_id, run).await?.active;
        there.retain(|twin| twin.id != view.id);
        self.drop_runs(&there).await.map(|_| ())
    }

    /// The runs of an instance.
    async fn runs_of(&self, experiment_id: &str, run: &RunRef) -> Result<Runs, TrackingError> {
        let instance = names::quoted(&run.instance).ok_or_else(|| TrackingError::Delivery {
            what: format!("the instance {:?} cannot be searched for", run.instance),
        })?;
        let body = json!({
            "experiment_ids": [experiment_id],
            "filter": format!("tags.`{INSTANCE}` = {instance}"),
            "run_view_type": "ALL",
            "max_results": RUNS_MAX,
        });
        let answer = self.client.post("runs/search", &body).await?;
        let runs = answer["runs"].as_array().map(Vec::as_slice).unwrap_or_default();
        let views = runs.iter().filter_map(RunView::read);
        let (mut active, deleted): (Vec<_>, Vec<_>) = views.partition(|view| view.is_active);
        active.sort_by(|a, b| {
            let key = |view: &RunView| (view.is(DROPPED), view.start_unix_ms);
            key(a).cmp(&key(b)).then_with(|| a.id.cmp(&b.id))
        });
        // One that was dropped and not deleted yet is no candidate.
        if let Some(dropped) = active.first().filter(|view| view.is(DROPPED)) {
            tracing::debug!(run_id = dropped.id, "dropped runs are deleted");
            self.drop_runs(&active).await?;
            active.clear();
        }
        let by_people = deleted.into_iter().find(|view| !view.is(DROPPED));
        Ok(Runs { active, deleted: by_people.map(|view| view.id) })
    }

    /// The experiment of a study, made when it is missing. A deleted one comes back when a run begins.
    async fn experiment(&self, study: &str, may_restore: bool) -> Result<String, TrackingError> {
        if let Some(id) = self.experiment_there(study, may_restore).await? {
            return Ok(id);
        }
        match self.client.post("experiments/create", &json!({ "name": study })).await {
            Ok(answer) => {
                let id = answer["experiment_id"].as_str().map(str::to_owned);
                id.ok_or_else(|| unexpected("experiments/create", "experiment_id"))
            }
            Err(error) if error.is_already_there() => {
                let found = self.experiment_there(study, may_restore).await?;
                found.ok_or_else(|| unexpected("experiments/get-by-name", "experiment"))
            }
            Err(error) => Err(error),
        }
    }

    async fn experiment_there(
        &self,
        study: &str,
        may_restore: bool,
    ) -> Result<Option<String>, TrackingError> {
        let operation = "experiments/get-by-name";
        let answer = match self.client.get(operation, &[("experiment_name", study)]).await {
            Ok(answer) => answer,
            Err(TrackingError::Missing { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let experiment = &answer["experiment"];
        let id =
            experiment["experiment_id"].as_str().ok_or_else(|| unexpected(operation, "experiment_id"))?;
        if experiment["lifecycle_stage"].as_str() == Some("deleted") {
            if !may_restore {
                return Err(TrackingError::Deleted { what: format!("experiment {study}") });
            }
            self.client.post("experiments/restore", &json!({ "experiment_id": id })).await?;
            tracing::info!(
                study,
                "the study's experiment was deleted on the tracking server and is restored"
            );
        }
        Ok(Some(id.to_owned()))
    }

    /// Sets tags, in order.
    pub(super) async fn log_tags(&self, run_id: &str, tags: Vec<Json>) -> Result<(), TrackingError> {
        self.log(run_id, "tags", tags, ITEMS_MAX).await
    }

    /// Sets those tags that the run does not have so, in order. A delivery that failed half-way goes on where it was.
    pub(super) async fn tag(&self, view: &RunView, tags: &[(&str, &str)]) -> Result<(), TrackingError> {
        let is_new = |(key, value): &(&str, &str)| view.tags.get(*key).is_none_or(|there| there != value);
        self.log_tags(&view.id, items(tags.iter().copied().filter(is_new))).await
    }

    /// Sets parameters, in order. They must be new.
    pub(super) async fn log_params(&self, run_id: &str, params: Vec<Json>) -> Result<(), TrackingError> {
        self.log(run_id, "params", params, ITEMS_MAX).await
    }

    /// Sends a list in as many requests as the server's limits ask for.
    pub(super) async fn log(
        &self,
        run_id: &str,
        list: &str,
        items: Vec<Json>,
        items_max: usize,
    ) -> Result<(), TrackingError> {
        for batch in names::batches(items, items_max) {
            self.client.post("runs/log-batch", &json!({ "run_id": run_id, list: batch })).await?;
        }
        Ok(())
    }

    /// Ends a run, unless it has ended so.
    pub(super) async fn close(
        &self,
        view: &RunView,
        status: &str,
        end_unix_ms: i64,
    ) -> Result<(), TrackingError> {
        if view.status == status && view.end_unix_ms == Some(end_unix_ms.max(0)) {
            return Ok(());
        }
        self.set_status(&view.id, status, Some(end_unix_ms)).await
    }

    /// Sets the status of a run, and its end when it has one.
    pub(super) async fn set_status(
        &self,
        run_id: &str,
        status: &str,
        end_unix_ms: Option<i64>,
    ) -> Result<(), TrackingError> {
        let mut body = json!({ "run_id": run_id, "status": status });
        if let Some(end) = end_unix_ms {
            body["end_time"] = end.max(0).into();
        }
        self.client.post("runs/update", &body).await.map(|_| ())
    }

    /// Where people see a run.
    pub(super) fn page(&self, view: &RunView) -> String {
        format!("{}/#/experiments/{}/runs/{}", self.client.base(), view.experiment_id, view.id)
    }
}
