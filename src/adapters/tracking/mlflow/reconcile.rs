//! Runs that this machine left open.

use serde_json::{Value as Json, json};

use super::MlflowSink;
use super::names;
use super::runs::{INSTANCE, MACHINE, RunView, items, pairs};
use crate::adapters::tracking::TrackingError;
use crate::job::clock;

/// Tag of a run: why it ended.
pub(super) const REASON: &str = "boxwright.reason";
/// How the reason ends of a run that was closed because its machine knows of no such job.
const FORGOTTEN: &str = "started anew and knows no such job that goes on";
/// Entries of a page.
const PAGE_MAX: usize = 500;
/// Pages that are read of each list.
const PAGES_MAX: usize = 40;
/// Experiments of one search.
const EXPERIMENTS_MAX: usize = 100;

impl MlflowSink {
    /// Closes the runs of `machine_id` that the server takes for running and that nothing here will end: their status becomes
    /// `KILLED`. For the start of a service. Says which runs were closed.
    ///
    /// `live_instances` are the instances ([`RunRef::instance`](crate::job::delivery::RunRef::instance)) of all jobs that
    /// have not ended, and of those whose end still waits in the outbox.
    ///
    /// # Errors
    /// [`TrackingError`]; some may have been closed. It can be asked again.
    pub async fn reconcile(
        &self,
        machine_id: &str,
        live_instances: &[String],
    ) -> Result<Vec<String>, TrackingError> {
        let machine = names::quoted(machine_id).ok_or_else(|| TrackingError::Delivery {
            what: format!("the machine {machine_id:?} cannot be searched for"),
        })?;
        let experiments = self.experiments().await?;
        let mut closed = Vec::new();
        for some in experiments.chunks(EXPERIMENTS_MAX) {
            let search = json!({
                "experiment_ids": some,
                "filter": format!("attributes.status = 'RUNNING' and tags.`{MACHINE}` = {machine}"),
                "max_results": PAGE_MAX,
            });
            for run in self.pages("runs/search", "runs", search).await? {
                let instance = pairs(&run["data"]["tags"]).remove(INSTANCE).unwrap_or_default();
                let Some(id) = run["info"]["run_id"].as_str() else { continue };
                if live_instances.contains(&instance) {
                    continue;
                }
                match self.close_forgotten(id, &format!("{machine_id} {FORGOTTEN}")).await {
                    Ok(()) => closed.push(id.to_owned()),
                    Err(error @ (TrackingError::Silent { .. } | TrackingError::Busy { .. })) => {
                        return Err(error);
                    }
                    // One that may not be changed is no reason to leave the others open.
                    Err(error) => {
                        tracing::warn!(run_id = id, %error, "a run that nobody goes on with stays open")
                    }
                }
            }
        }
        Ok(closed)
    }

    async fn close_forgotten(&self, run_id: &str, reason: &str) -> Result<(), TrackingError> {
        self.log_tags(run_id, items([(REASON, reason)])).await?;
        self.set_status(run_id, "KILLED", Some(clock::now_unix_ms())).await
    }

    /// Sets a run `RUNNING` again that was closed as forgotten, since its job does go on: another service has the name of this
    /// machine.
    pub(super) async fn reopen(&self, view: &RunView) -> Result<(), TrackingError> {
        if is_forgotten(view) && view.status == "KILLED" {
            self.set_status(&view.id, "RUNNING", None).await?;
        }
        self.unmark(view).await
    }

    /// Removes the reason of a run that was closed as forgotten.
    pub(super) async fn unmark(&self, view: &RunView) -> Result<(), TrackingError> {
        if !is_forgotten(view) {
            return Ok(());
        }
        match self.client.post("runs/delete-tag", &json!({ "run_id": view.id, "key": REASON })).await {
            // Somebody else was faster.
            Ok(_) | Err(TrackingError::Missing { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// True when the server answers a question about nothing in particular.
    pub(super) async fn does_answer(&self) -> bool {
        let answer = self.client.post("experiments/search", &json!({ "max_results": 1 })).await;
        let is_list = |answer: Json| {
            answer["experiments"].is_array() || answer.as_object().is_some_and(serde_json::Map::is_empty)
        };
        answer.is_ok_and(is_list)
    }

    async fn experiments(&self) -> Result<Vec<String>, TrackingError> {
        let all = self.pages("experiments/search", "experiments", json!({ "max_results": PAGE_MAX })).await?;
        let ids = all.iter().filter_map(|experiment| experiment["experiment_id"].as_str());
        Ok(ids.map(str::to_owned).collect())
    }

    /// Everything of a list that comes in pages.
    async fn pages(
        &self,
        operation: &'static str,
        list: &str,
        mut search: Json,
    ) -> Result<Vec<Json>, TrackingError> {
        let mut all = Vec::new();
        for _ in 0..PAGES_MAX {
            let mut answer = self.client.post(operation, &search).await?;
            if let Some(page) = answer[list].as_array_mut() {
                all.append(page);
            }
            match answer["next_page_token"].as_str().filter(|token| !token.is_empty()) {
                Some(token) => search["page_token"] = token.into(),
                None => break,
            }
        }
        Ok(all)
    }
}

/// True for a run that was closed because its machine knew of no such job.
fn is_forgotten(view: &RunView) -> bool {
    view.tags.get(REASON).is_some_and(|reason| reason.ends_with(FORGOTTEN))
}
