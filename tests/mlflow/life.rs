//! One run from its start to its end.

use boxwright::adapters::sink::{DeliveryError, Sink};
use boxwright::adapters::telemetry::Sampler;
use boxwright::job::delivery::{Delivery, MetricPoint};
use serde_json::json;

use crate::world::*;

#[test]
fn a_run_is_shown_as_it_was_and_repeats_change_nothing() {
    with_server(async |world| {
        let (sink, run) = (world.sink(), run("life"));
        let mut all = vec![start(&run, T0, &[("batch", "16"), ("data.path", "/x"), ("empty", "")])];
        all.extend((1..=20).map(|e| epoch(&run, e, T0 + 1000 * e)));
        all.push(ended(&run, "completed", T0 + 30_000, 20));
        let mut receipts = Vec::new();
        for delivery in &all {
            receipts.push(deliver(&sink, delivery).await);
        }
        let id = note(&receipts[0], "mlflow_run_id");
        assert!(receipts.iter().all(|receipt| note(receipt, "mlflow_run_id") == id));
        let experiment = world.experiment(&run.study_name).await;
        let page = format!("{}/#/experiments/{experiment}/runs/{id}", world.server.url);
        assert_eq!(note(&receipts[3], "mlflow_run_url"), page);

        let shown = world.only_run(&run.study_name).await;
        let info = &shown.0["info"];
        assert_eq!((shown.status(), info["run_name"].as_str()), ("FINISHED", Some(run.task_id.as_str())));
        assert_eq!((info["start_time"].as_i64(), info["end_time"].as_i64()), (Some(T0), Some(T0 + 30_000)));
        assert_eq!((shown.param("batch"), shown.param("empty")), (Some("16"), Some("")));
        for (key, value) in [
            ("boxwright.instance", run.instance.as_str()),
            ("boxwright.machine", "machine-a"),
            ("boxwright.fence", "1"),
            ("boxwright.reason", "it completed"),
            ("task_id", run.task_id.as_str()),
            ("experiment_name", &run.study_name),
            ("model_type", "yolo"),
            ("version", "2"),
            ("author", "somebody"),
            ("mlflow.note.content", "a note"),
        ] {
            assert_eq!(shown.tag(key), Some(value), "{key}");
        }
        let expected: Vec<_> = (1..=20).map(|e| (e, T0 + 1000 * e, e as f64 / 100.0)).collect();
        assert_eq!(world.history(&id, "metrics/mAP50B").await, expected);
        assert_eq!(world.history(&id, "train/box_loss").await.len(), 20);
        assert!(world.history(&id, "val/box_loss").await.is_empty(), "not finite");
        assert_eq!(world.history(&id, "metrics-map50-b").await, [(20, T0 + 30_000, 0.2)]);
        assert_eq!(world.history(&id, "fitness").await, [(20, T0 + 30_000, 0.5)]);

        // Again each, again all, and by a process that remembers nothing.
        let keys = ["metrics/mAP50B", "train/box_loss", "metrics-map50-b", "fitness"];
        for sink in [sink, world.sink()] {
            for delivery in all.iter().flat_map(|delivery| [delivery, delivery]) {
                deliver(&sink, delivery).await;
            }
            assert_eq!(world.only_run(&run.study_name).await, shown);
            for (key, count) in keys.iter().zip([20, 20, 1, 1]) {
                assert_eq!(world.history(&id, key).await.len(), count, "{key}");
            }
        }
    });
}

#[test]
fn the_status_is_true_to_the_end() {
    with_server(async |world| {
        let sink = world.sink();
        for (status, expected) in [("completed", "FINISHED"), ("failed", "FAILED"), ("cancelled", "KILLED")] {
            let run = run("status");
            deliver(&sink, &start(&run, T0, &[])).await;
            assert_eq!(world.only_run(&run.study_name).await.status(), "RUNNING");
            deliver(&sink, &ended(&run, status, T0 + 1, 1)).await;
            assert_eq!(world.only_run(&run.study_name).await.status(), expected);
        }
        let run = run("status");
        let error = sink.deliver(&ended(&run, "running", T0, 1)).await.expect_err("no end");
        assert!(matches!(error, DeliveryError::Refused { .. }), "{error:?}");
    });
}

#[test]
fn a_later_attempt_goes_on_in_the_same_run() {
    with_server(async |world| {
        let (sink, run) = (world.sink(), run("attempts"));
        let first = [
            start(&run, T0, &[("batch", "16"), ("imgsz", "640")]),
            epoch(&run, 1, T0 + 1000),
            epoch(&run, 2, T0 + 2000),
            epoch(&run, 3, T0 + 3000),
            ended(&run, "failed", T0 + 4000, 3),
        ];
        deliver_all(&sink, &first, 0).await;
        assert_eq!(world.only_run(&run.study_name).await.status(), "FAILED");
        // It resumes from the checkpoint after epoch 2, in a smaller batch.
        let start_again = start(&run, T0 + 10_000, &[("batch", "8"), ("imgsz", "640"), ("new", "1")]);
        deliver(&sink, &start_again).await;
        let shown = world.only_run(&run.study_name).await;
        assert_eq!((shown.status(), shown.param("batch")), ("RUNNING", Some("16")));
        assert_eq!(shown.param("new"), Some("1"));
        assert_eq!(shown.tag("boxwright.changed_params"), Some("batch: 16 -> 8"));
        let rest = [
            epoch(&run, 3, T0 + 11_000),
            epoch(&run, 4, T0 + 12_000),
            ended(&run, "completed", T0 + 13_000, 4),
        ];
        deliver_all(&sink, &rest, 0).await;
        let shown = world.only_run(&run.study_name).await;
        assert_eq!(shown.status(), "FINISHED");
        let id = shown.0["info"]["run_id"].as_str().expect("an identity");
        let history = world.history(id, "metrics/mAP50B").await;
        let times: Vec<_> = history.iter().map(|(step, at, _)| (*step, *at - T0)).collect();
        assert_eq!(times, [(1, 1000), (2, 2000), (3, 3000), (4, 12_000)]);
        assert_eq!(world.history(id, "metrics-map50-b").await.len(), 2);
    });
}

#[test]
fn what_is_large_goes_in_parts() {
    with_server(async |world| {
        let (sink, run) = (world.sink(), run("large"));
        let names: Vec<(String, String)> = (0..250)
            .map(|i| (format!("p{i}"), if i % 2 == 0 { "ü".repeat(7000) } else { i.to_string() }))
            .collect();
        let params: Vec<(&str, &str)> = names.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        deliver(&sink, &start(&run, T0, &params)).await;
        let points: Vec<MetricPoint> = (0..2500)
            .map(|step| MetricPoint {
                key: "train/loss_step".into(),
                value: 1.0,
                at_unix_ms: T0 + step,
                step,
            })
            .collect();
        let receipt = deliver(&sink, &metrics(&run, points)).await;
        let shown = world.only_run(&run.study_name).await;
        let is_there = |(key, _): &(String, String)| shown.param(key).is_some();
        assert_eq!(names.iter().filter(|name| is_there(name)).count(), 250);
        assert_eq!(shown.param("p0").map(|value| value.chars().count()), Some(6000));
        assert!(shown.tag("boxwright.cut").is_some_and(|cut| cut.starts_with("p0, p2, ")));
        let history = world.history(&note(&receipt, "mlflow_run_id"), "train/loss_step").await;
        assert!(history.iter().map(|(step, _, _)| *step).eq(0..2500), "{}", history.len());
    });
}

#[test]
fn odd_names_and_values_are_no_obstacle() {
    with_server(async |world| {
        let (sink, run) = (world.sink(), run("odd"));
        let params = [("a:b", "1"), ("a(b)", "2"), ("../x", "3"), ("", "4"), ("größe", "5"), ("a(b", "6")];
        deliver(&sink, &start(&run, T0, &params)).await;
        let point = |key: &str, value: f64| MetricPoint { key: key.into(), value, at_unix_ms: -5, step: -1 };
        let points = ["a//b", "%", "x y", "/", "()"].map(|key| point(key, -1e308)).to_vec();
        let receipt = deliver(&sink, &metrics(&run, points)).await;
        let id = note(&receipt, "mlflow_run_id");
        for key in ["a/b", "_", "x y"] {
            assert_eq!(world.history(&id, key).await, [(-1, 0, -1e308)], "{key}");
        }
        let shown = world.only_run(&run.study_name).await;
        assert_eq!(
            (shown.param("a_b"), shown.param("ab"), shown.param("_/x")),
            (Some("1"), Some("2"), Some("3"))
        );
    });
}

#[test]
fn system_metrics_are_kept_under_their_names() {
    with_server(async |world| {
        let (sink, run) = (world.sink(), run("system"));
        let mut sampler = Sampler::new(std::path::Path::new("/"));
        let mut samples: Vec<Vec<MetricPoint>> = Vec::new();
        for number in 0..4_i64 {
            let mut sample = sampler.sample();
            sample.at_unix_ms = T0 + number * 15_000;
            // The process begins anew after two samples, and so do its steps.
            samples.push(sample.metric_points(number % 2));
        }
        let deliveries: Vec<Delivery> = samples.into_iter().map(|points| metrics(&run, points)).collect();
        deliver_all(&sink, &deliveries, 0).await;
        deliver_all(&world.sink(), &deliveries[2..], 0).await;
        let shown = world.only_run(&run.study_name).await;
        let id = shown.0["info"]["run_id"].as_str().expect("an identity");
        for key in ["system/cpu_utilization_percentage", "system/network_receive_megabytes"] {
            let history = world.history(id, key).await;
            let times: Vec<i64> = history.iter().map(|(_, at, _)| (*at - T0) / 1000).collect();
            assert_eq!(times, [0, 15, 30, 45], "{key}");
        }
    });
}

#[test]
fn what_was_deleted_there_is_respected_or_comes_back() {
    with_server(async |world| {
        let (sink, run) = (world.sink(), run("deleted"));
        let receipt = deliver(&sink, &start(&run, T0, &[])).await;
        let id = note(&receipt, "mlflow_run_id");
        world.post("runs/delete", json!({ "run_id": id })).await;
        for delivery in [epoch(&run, 1, T0), start(&run, T0 + 1, &[]), ended(&run, "failed", T0, 1)] {
            let error = sink.deliver(&delivery).await.expect_err("it was deleted");
            assert!(matches!(error, DeliveryError::Refused { .. }), "{error:?}");
            assert!(error.to_string().contains("deleted"), "{error}");
        }
        // A study whose experiment was deleted comes back with its next run.
        let experiment = world.experiment(&run.study_name).await;
        world.post("experiments/delete", json!({ "experiment_id": experiment })).await;
        let next = boxwright::job::delivery::RunRef { instance: "another".into(), ..run.clone() };
        let error = sink.deliver(&epoch(&next, 1, T0)).await.expect_err("it was deleted");
        assert!(matches!(error, DeliveryError::Refused { .. }), "{error:?}");
        deliver(&sink, &start(&next, T0, &[])).await;
        deliver(&sink, &epoch(&next, 1, T0)).await;
        let answer = world.get("experiments/get-by-name", &[("experiment_name", &run.study_name)]).await;
        assert_eq!(answer["experiment"]["lifecycle_stage"], "active");
    });
}
