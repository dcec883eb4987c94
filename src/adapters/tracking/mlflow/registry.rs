//! The model registry: one registered model per study, one version per completed run, the alias `best` on the best.
//!
//! Scores are compared only when they are the same score on the same validation images; more is better. Whether the alias moves is
//! read and written in two requests. Of machines that end runs in the same moment, each makes its version before it looks,
//! and looks for a better one after it wrote: whoever writes last has seen them all.

use std::collections::HashMap;

use serde_json::{Value as Json, json};

use super::runs::{INSTANCE, RunView, items, pairs};
use super::{MlflowSink, names};
use crate::adapters::tracking::TrackingError;
use crate::job::delivery::{RunEndBody, RunRef};

/// Tag of a run: what became of its entry in the registry.
pub(super) const REGISTRY: &str = "boxwright.registry";
/// The alias.
const BEST: &str = "best";
/// Looks at the alias before it is left as it is.
const LOOKS_MAX: usize = 4;
/// Runs whose versions were made within so long may have looked at the alias at one time.
const MOMENT_MS: i64 = 600_000;
/// The newest versions of a study that are looked at after the alias was moved.
const VERSIONS_MAX: &str = "1000";

/// A version's score.
#[derive(Debug, Clone, PartialEq)]
struct Score {
    fitness: f64,
    name: String,
    val_fingerprint: String,
}

impl Score {
    fn read(tags: &HashMap<String, String>) -> Option<Self> {
        let fitness = tags.get("fitness")?.parse().ok().filter(|value: &f64| value.is_finite())?;
        let name = tags.get("fitness_name")?.clone();
        Some(Self { fitness, name, val_fingerprint: tags.get("val_fingerprint")?.clone() })
    }

    /// True when both can be compared and this one is better.
    fn is_better_than(&self, other: &Score) -> bool {
        self.name == other.name
            && self.val_fingerprint == other.val_fingerprint
            && self.fitness > other.fitness
    }
}

impl MlflowSink {
    /// Enters a completed run and says what was done; a registry that refuses, or fails again and again at this
    /// `delivery`, is no failure of the run.
    pub(super) async fn register(
        &self,
        view: &RunView,
        end: &RunEndBody,
        delivery: i64,
    ) -> Result<String, TrackingError> {
        let Some(url) = &end.best_url else {
            return Ok("not registered: its best weights are in no store".to_owned());
        };
        match self.enter(view, end, url).await {
            Ok(said) => Ok(said),
            Err(error)
                if matches!(error, TrackingError::Delivery { .. }) || self.does_without(delivery, &error) =>
            {
                tracing::warn!(task_id = %end.run.task_id, %error, "the run is not entered in the model registry");
                Ok(format!("not registered: {error}"))
            }
            Err(error) => Err(error),
        }
    }

    async fn enter(&self, view: &RunView, end: &RunEndBody, url: &str) -> Result<String, TrackingError> {
        let study = &end.run.study_name;
        let (version, tags) = self.version(view, end, url).await?;
        let stands = self.settle_best(study, &version, Score::read(&tags)).await?;
        Ok(format!("version {version} of {study}{}", if stands { ", best" } else { "" }))
    }

    /// The version of this run and its tags, made when it is missing.
    async fn version(
        &self,
        view: &RunView,
        end: &RunEndBody,
        url: &str,
    ) -> Result<(String, HashMap<String, String>), TrackingError> {
        let run = &end.run;
        if let Some(found) = self.version_there(run).await? {
            return Ok(found);
        }
        let made = self.client.post("registered-models/create", &json!({ "name": run.study_name })).await;
        if let Err(error) = made
            && !error.is_already_there()
        {
            return Err(error);
        }
        let mut tags = vec![
            (INSTANCE, run.instance.clone()),
            ("task_id", run.task_id.to_string()),
            ("model_name", format!("{}_{}", run.study_name, run.task_id)),
            ("model_type", run.kind.clone()),
        ];
        if let Some(fitness) = end.fitness.filter(|value| value.is_finite()) {
            tags.push(("fitness", fitness.to_string()));
            tags.push(("fitness_name", end.fitness_name.clone()));
        }
        tags.extend(end.val_fingerprint.clone().map(|print| ("val_fingerprint", print)));
        let body = json!({
            "name": run.study_name,
            "source": url,
            "run_id": view.id,
            "tags": items(tags.iter().map(|(key, value)| (*key, value.as_str()))),
        });
        self.client.post("model-versions/create", &body).await?;
        // Read back: had two machines made one each, both go on with the first.
        self.version_there(run).await?.ok_or(TrackingError::Missing {
            operation: "model-versions/search",
            said: format!("the version just made for {}", run.task_id),
        })
    }

    async fn version_there(
        &self,
        run: &RunRef,
    ) -> Result<Option<(String, HashMap<String, String>)>, TrackingError> {
        let (Some(study), Some(instance)) = (names::quoted(&run.study_name), names::quoted(&run.instance))
        else {
            let what = format!("{:?} or {:?} cannot be searched for", run.study_name, run.instance);
            return Err(TrackingError::Delivery { what });
        };
        let filter = format!("name = {study} and tags.`{INSTANCE}` = {instance}");
        let answer = self.client.get("model-versions/search", &[("filter", &filter)]).await?;
        let versions = answer["model_versions"].as_array().map(Vec::as_slice).unwrap_or_default();
        let numbered = versions.iter().filter_map(|version| {
            let number: u64 = version["version"].as_str()?.parse().ok()?;
            Some((number, pairs(&version["tags"])))
        });
        Ok(numbered.min_by_key(|(number, _)| *number).map(|(number, tags)| (number.to_string(), tags)))
    }

    /// Moves the alias to `version` if it is due to it, and says whether it stands there.
    async fn settle_best(
        &self,
        study: &str,
        version: &str,
        score: Option<Score>,
    ) -> Result<bool, TrackingError> {
        for _ in 0..LOOKS_MAX {
            let seen = self.best_of(study).await?;
            let is_there = seen.as_deref() == Some(version);
            let is_due = match seen.as_deref() {
                None => true,
                Some(_) if is_there => true,
                Some(best) => match (&score, self.score_of(study, best).await?) {
                    (Some(own), Some(other)) => own.is_better_than(&other),
                    // A best without a comparable score was set by a person, or is the first.
                    _ => false,
                },
            };
            if !is_due {
                return Ok(false);
            }
            if !is_there {
                self.set_best(study, version).await?;
            }
            if let Some(score) = &score
                && let Some(better) = self.better_of_the_moment(study, version, score).await?
            {
                self.set_best(study, &better).await?;
                return Ok(false);
            }
            if is_there {
                return Ok(true);
            }
        }
        Ok(self.best_of(study).await?.as_deref() == Some(version))
    }

    async fn set_best(&self, study: &str, version: &str) -> Result<(), TrackingError> {
        let body = json!({ "name": study, "alias": BEST, "version": version });
        self.client.post("registered-models/alias", &body).await.map(|_| ())
    }

    /// The best version with a better score than this one, of those that were made shortly before it or since. Older ones
    /// were weighed already, by a run or by a person.
    async fn better_of_the_moment(
        &self,
        study: &str,
        version: &str,
        score: &Score,
    ) -> Result<Option<String>, TrackingError> {
        let Some(name) = names::quoted(study) else { return Ok(None) };
        let filter = format!("name = {name}");
        let query =
            [("filter", filter.as_str()), ("max_results", VERSIONS_MAX), ("order_by", "version_number DESC")];
        let answer = self.client.get("model-versions/search", &query).await?;
        let versions = answer["model_versions"].as_array().map(Vec::as_slice).unwrap_or_default();
        let made = |version: &Json| version["creation_timestamp"].as_i64();
        let own = versions.iter().find(|other| other["version"].as_str() == Some(version));
        let Some(since) = own.and_then(made).map(|at| at - MOMENT_MS) else { return Ok(None) };
        let mut best: Option<(Score, String)> = None;
        for other in versions.iter().filter(|other| made(other).is_some_and(|at| at >= since)) {
            let Some(number) = other["version"].as_str() else { continue };
            let Some(other) = Score::read(&pairs(&other["tags"])) else { continue };
            if other.is_better_than(best.as_ref().map_or(score, |(best, _)| best)) {
                best = Some((other, number.to_owned()));
            }
        }
        Ok(best.map(|(_, number)| number))
    }

    /// The version under the alias.
    async fn best_of(&self, study: &str) -> Result<Option<String>, TrackingError> {
        let answer = self.client.get("registered-models/get", &[("name", study)]).await?;
        let aliases = answer["registered_model"]["aliases"].as_array().map(Vec::as_slice).unwrap_or_default();
        let best = aliases.iter().find(|alias| alias["alias"].as_str() == Some(BEST));
        Ok(best.and_then(|alias| alias["version"].as_str()).map(str::to_owned))
    }

    async fn score_of(&self, study: &str, version: &str) -> Result<Option<Score>, TrackingError> {
        let query = [("name", study), ("version", version)];
        match self.client.get("model-versions/get", &query).await {
            Ok(answer) => Ok(Score::read(&pairs(&answer["model_version"]["tags"]))),
            Err(TrackingError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_compared_on_the_same_images_only() {
        let score = |fitness, name: &str, print: &str| Score {
            fitness,
            name: name.to_owned(),
            val_fingerprint: print.to_owned(),
        };
        assert!(score(0.5, "f", "v").is_better_than(&score(0.4, "f", "v")));
        assert!(!score(0.4, "f", "v").is_better_than(&score(0.4, "f", "v")));
        assert!(!score(0.5, "f", "w").is_better_than(&score(0.4, "f", "v")));
        assert!(!score(0.5, "g", "v").is_better_than(&score(0.4, "f", "v")));
        let tags = |fitness: &str| {
            let all = [("fitness", fitness), ("fitness_name", "f"), ("val_fingerprint", "v")];
            all.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
        };
        assert_eq!(Score::read(&tags("0.25")), Some(score(0.25, "f", "v")));
        assert_eq!(Score::read(&tags("NaN")), None);
        assert_eq!(Score::read(&HashMap::new()), None);
    }
}
