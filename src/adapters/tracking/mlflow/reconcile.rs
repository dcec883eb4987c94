//! Runs that this machine left open.

use serde_json::{Value as Json, json};

use super::MlflowSink;
use super::names;
use super::runs::{INSTANCE, MACHINE, items, pairs};
use crate::adapters::tracking::TrackingError;
use crate::job::clock;

/// Tag of a run: why it ended.
pub(super) const REASON: &str = "boxwright.reason";
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
                let reason = format!("{machine_id} started anew and knows no such job that goes on");
                self.log_tags(id, items([(REASON, reason.as_str())])).await?;
                self.set_status(id, "KILLED", Some(clock::now_unix_ms())).await?;
                closed.push(id.to_owned());
            }
        }
        Ok(closed)
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
