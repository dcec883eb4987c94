//! Samples of metrics: each arrives once and in order.
//!
//! A point is sent when its step lies beyond the newest one of its name on the server. So what is delivered again, and what a
//! second machine trains again after the last checkpoint, is not there twice. Measurements of the machine (`system/...`)
//! count by their time, since their steps begin anew with each process.
//!
//! A name must therefore keep to one kind of step: samples by optimiser step need other names than those by epoch.

use std::collections::{HashMap, HashSet};

use serde_json::{Value as Json, json};

use super::MlflowSink;
use super::names;
use super::runs::{Latest, RunView};
use crate::adapters::tracking::TrackingError;
use crate::job::delivery::{MetricPoint, RunEndBody};

/// Points of one request.
const POINTS_MAX: usize = 1000;
/// Names that count by time.
const BY_TIME: &str = "system/";

/// The points that the server does not have, in order.
fn fresh(points: &[MetricPoint], latest: &HashMap<String, Latest>) -> Vec<Json> {
    let mut named: Vec<(String, &MetricPoint)> = points
        .iter()
        .filter(|point| point.value.is_finite())
        .filter_map(|point| Some((names::name(&point.key)?, point)))
        .collect();
    named.sort_by_key(|(_, point)| (point.step, point.at_unix_ms));
    let mut seen = HashMap::new();
    named.retain(|(key, point)| {
        let own = Latest { step: point.step, at_unix_ms: point.at_unix_ms.max(0) };
        let newest = seen.get(key).or_else(|| latest.get(key));
        let is_new = newest.is_none_or(|newest: &Latest| match key.starts_with(BY_TIME) {
            true => own.at_unix_ms > newest.at_unix_ms,
            false => own.step > newest.step,
        });
        if is_new {
            seen.insert(key.clone(), own);
        }
        is_new
    });
    named
        .into_iter()
        .map(|(key, point)| {
            json!({
                "key": key, "value": point.value, "timestamp": point.at_unix_ms.max(0), "step": point.step
            })
        })
        .collect()
}

/// The last metrics of a run under their usual names and under the older workers' names for the end.
///
/// Only names with a slash are metrics; the number of epochs is the step of all of them, 0 where none were trained.
pub(super) fn at_end(end: &RunEndBody) -> Vec<MetricPoint> {
    let (at_unix_ms, step) = (end.at_unix_ms, end.epochs.map_or(0, i64::from));
    let point = |key: String, value: f64| MetricPoint { key, value, at_unix_ms, step };
    let measured = end.metrics.iter().filter(|(key, _)| key.contains('/'));
    let measured = measured.filter_map(|(key, value)| Some((key, value.as_f64()?)));
    let mut points = Vec::new();
    let mut slugs = HashSet::new();
    for (key, value) in measured {
        points.push(point(key.clone(), value));
        if let Some(slug) = names::slug(key).filter(|slug| slugs.insert(slug.clone())) {
            points.push(point(slug, value));
        }
    }
    points.extend(end.fitness.map(|fitness| point("fitness".to_owned(), fitness)));
    points
}

impl MlflowSink {
    /// Sends the points that the run does not have.
    pub(super) async fn log_points(
        &self,
        view: &RunView,
        points: &[MetricPoint],
    ) -> Result<(), TrackingError> {
        self.log(&view.id, "metrics", fresh(points, &view.latest), POINTS_MAX).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::delivery::RunRef;

    fn point(key: &str, value: f64, step: i64, at_unix_ms: i64) -> MetricPoint {
        MetricPoint { key: key.to_owned(), value, at_unix_ms, step }
    }

    fn steps(points: &[Json]) -> Vec<(&str, i64)> {
        points
            .iter()
            .map(|p| (p["key"].as_str().expect("a key"), p["step"].as_i64().expect("a step")))
            .collect()
    }

    #[test]
    fn a_point_is_sent_once_and_in_order() {
        let latest = HashMap::from([("a".to_owned(), Latest { step: 2, at_unix_ms: 20 })]);
        let given = [
            point("a", 0.1, 4, 40),
            point("a", 0.1, 2, 99),
            point("a", 0.1, 3, 30),
            point("a", 0.2, 3, 31),
            point("a", f64::NAN, 5, 50),
            point("b(x)", 1.0, 0, -5),
            point("()", 1.0, 0, 0),
        ];
        let sent = fresh(&given, &latest);
        assert_eq!(steps(&sent), [("bx", 0), ("a", 3), ("a", 4)]);
        assert_eq!(sent[0]["timestamp"], 0);
    }

    #[test]
    fn measurements_of_the_machine_count_by_time() {
        let latest = HashMap::from([("system/x".to_owned(), Latest { step: 90, at_unix_ms: 900 })]);
        let given = [point("system/x", 1.0, 0, 900), point("system/x", 1.0, 1, 910)];
        assert_eq!(steps(&fresh(&given, &latest)), [("system/x", 1)]);
    }

    #[test]
    fn the_end_has_both_names() {
        let row = json!({"time": 9.5, "metrics/mAP50-95(B)": 0.25, "val/box_loss": null});
        let mut end = RunEndBody {
            run: RunRef::sample("i"),
            status: "completed".into(),
            reason: String::new(),
            at_unix_ms: 7,
            metrics: row.as_object().expect("an object").clone(),
            epochs: Some(3),
            fitness: Some(0.3),
            fitness_name: String::new(),
            best_url: None,
            val_fingerprint: None,
        };
        let points = at_end(&end);
        let keys: Vec<&str> = points.iter().map(|point| point.key.as_str()).collect();
        assert_eq!(keys, ["metrics/mAP50-95(B)", "metrics-map50-95-b", "fitness"]);
        assert!(points.iter().all(|point| point.step == 3 && point.at_unix_ms == 7));
        end.epochs = None;
        assert!(at_end(&end).iter().all(|point| point.step == 0), "an evaluation");
    }
}
