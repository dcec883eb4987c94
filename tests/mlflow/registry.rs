//! The model registry and its alias.

use boxwright::adapters::tracking::MlflowSink;
use boxwright::job::delivery::{DeliveryBody, RunEndBody, RunRef};
use boxwright::job::service::MlflowConfig;
use serde_json::Value as Json;

use crate::world::*;

/// A completed run of the study with a score.
async fn complete(sink: &MlflowSink, study: &str, change: impl FnOnce(&mut RunEndBody)) -> RunRef {
    let run = RunRef { study_name: study.to_owned(), ..run("registry") };
    deliver(sink, &start(&run, T0, &[])).await;
    let mut body = end(&run, "completed", T0 + 1, 1);
    change(&mut body);
    // Twice: it has the effect of once.
    for _ in 0..2 {
        deliver(sink, &wrap(DeliveryBody::RunEnd(body.clone()))).await;
    }
    run
}

async fn best(world: &World, study: &str) -> String {
    let answer = world.get("registered-models/alias", &[("name", study), ("alias", "best")]).await;
    answer["model_version"]["version"].as_str().unwrap_or("none").to_owned()
}

async fn versions(world: &World, study: &str) -> Vec<Json> {
    let answer = world.get("model-versions/search", &[("filter", &format!("name = '{study}'"))]).await;
    answer["model_versions"].as_array().cloned().unwrap_or_default()
}

#[test]
fn the_alias_moves_to_what_is_better_on_the_same_images() {
    with_server(async |world| {
        let (sink, study) = (world.sink(), run("alias").study_name);
        let mut first = None;
        type Change = fn(&mut RunEndBody);
        let cases: [(Change, &str); 7] = [
            (|end| end.fitness = Some(0.5), "1"),
            (|end| end.fitness = Some(0.4), "1"),
            (|end| end.fitness = Some(0.6), "3"),
            (|end| (end.fitness, end.val_fingerprint) = (Some(0.9), Some("v2".into())), "3"),
            (|end| (end.fitness, end.fitness_name) = (Some(0.9), "recall".into()), "3"),
            (|end| (end.fitness, end.val_fingerprint) = (Some(0.9), None), "3"),
            (|end| end.fitness = Some(0.61), "7"),
        ];
        for (number, (change, expected)) in cases.into_iter().enumerate() {
            let run = complete(&sink, &study, change).await;
            first.get_or_insert(run);
            assert_eq!(best(&world, &study).await, expected, "case {number}");
            assert_eq!(versions(&world, &study).await.len(), number + 1);
        }
        let first = first.expect("seven runs");
        let version =
            versions(&world, &study).await.into_iter().find(|v| v["version"] == "1").expect("there");
        let tag = |key: &str| {
            let tags = version["tags"].as_array().expect("tags");
            tags.iter()
                .find(|tag| tag["key"] == key)
                .map(|tag| tag["value"].as_str().expect("text").to_owned())
        };
        assert_eq!(tag("task_id").as_deref(), Some(first.task_id.as_str()));
        assert_eq!((tag("fitness").as_deref(), tag("val_fingerprint").as_deref()), (Some("0.5"), Some("v1")));
        assert_eq!(tag("fitness_name").as_deref(), Some("metrics/mAP50-95(B)"));
        assert_eq!(tag("model_name"), Some(format!("{study}_{}", first.task_id)));
        assert_eq!(tag("boxwright.instance").as_deref(), Some(first.instance.as_str()));
        let source = version["source"].as_str().expect("a source");
        assert!(source.starts_with("s3://models/") && source.ends_with("best.safetensors"), "{source}");
    });
}

#[test]
fn only_completed_runs_with_weights_are_entered() {
    with_server(async |world| {
        let (sink, study) = (world.sink(), run("entered").study_name);
        let run = complete(&sink, &study, |end| end.best_url = None).await;
        assert!(versions(&world, &study).await.is_empty());
        let shown = world.runs(&study).await.remove(0);
        assert!(shown.tag("boxwright.registry").is_some_and(|said| said.starts_with("not registered")));
        for status in ["failed", "cancelled"] {
            complete(&sink, &study, |end| end.status = status.into()).await;
        }
        assert!(versions(&world, &study).await.is_empty());
        let off = MlflowConfig { is_registering: false, ..config(&world.server.url) };
        complete(&MlflowSink::new(&off).expect("valid").with_deadline(PATIENT), &study, |_| ()).await;
        assert!(versions(&world, &study).await.is_empty());
        // The server refuses sources on its own disk: the run is closed all the same, and says so.
        let refused =
            complete(&sink, &study, |end| end.best_url = Some("file:///x/best.safetensors".into())).await;
        let runs = world.runs(&study).await;
        let shown = runs.iter().find(|shown| shown.tag("task_id") == Some(refused.task_id.as_str()));
        let shown = shown.expect("the run");
        assert_eq!(shown.status(), "FINISHED");
        assert!(shown.tag("boxwright.registry").is_some_and(|said| said.contains("source")), "{shown:?}");
        assert_ne!(run.task_id, refused.task_id);
    });
}

#[test]
fn runs_that_end_in_one_moment_leave_the_alias_on_the_best() {
    with_server(async |world| {
        let study = run("moment").study_name;
        let sinks: Vec<_> = (0..4).map(|_| world.sink()).collect();
        let all = sinks.iter().enumerate().map(|(number, sink)| {
            complete(sink, &study, move |end| end.fitness = Some(0.1 * (1 + number) as f64))
        });
        futures_util::future::join_all(all).await;
        let versions = versions(&world, &study).await;
        assert_eq!(versions.len(), 4);
        let best = best(&world, &study).await;
        let version = versions.iter().find(|version| version["version"] == best.as_str()).expect("the best");
        let text = version.to_string();
        assert!(text.contains(r#"{"key":"fitness","value":"0.4"}"#), "{text}");
    });
}
