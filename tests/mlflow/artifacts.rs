//! The files of a run.

use boxwright::adapters::tracking::MlflowSink;
use boxwright::job::delivery::{FilesMoment, RunRef};
use boxwright::job::service::MlflowConfig;
use serde_json::json;

use crate::world::*;

#[test]
fn files_come_back_byte_for_byte() {
    with_server(async |world| {
        let folder = tempfile::tempdir().expect("a folder");
        let picture: Vec<u8> =
            (0..3_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let contents: [(&str, &[u8]); 5] = [
            ("args.yaml", b"batch: 16\n"),
            ("config.effective.yaml", b"model: x\n"),
            ("results.csv", b"epoch,time\n1,2\n"),
            ("odd name +%.png", b"\x89PNG"),
            ("results.png", &picture),
        ];
        for (name, bytes) in contents {
            std::fs::write(folder.path().join(name), bytes).expect("writable");
        }
        std::fs::write(folder.path().join("events.jsonl"), "{}").expect("writable");
        let (sink, run) = (world.sink(), RunRef { run_dir: folder.path().to_owned(), ..run("files") });
        deliver(&sink, &start(&run, T0, &[])).await;
        let receipt = deliver(&sink, &files(&run, FilesMoment::Checkpoint)).await;
        assert!(receipt.notes.is_empty() && list(&world, &run).await.is_empty());
        for _ in 0..2 {
            deliver(&sink, &files(&run, FilesMoment::End)).await;
            let mut names = list(&world, &run).await;
            names.sort();
            let mut expected = contents.map(|(name, _)| name.to_owned());
            expected.sort();
            assert_eq!(names, expected);
        }
        let shown = world.only_run(&run.study_name).await;
        assert_eq!(shown.tag("boxwright.artifacts"), Some("5 files sent"));
        for (name, bytes) in contents {
            let id = shown.0["info"]["run_id"].as_str().expect("an identity");
            let url = format!("{}/get-artifact", world.server.url);
            let answer = world.http.get(url).query(&[("run_uuid", id), ("path", name)]).send().await;
            let answer = answer.expect("an answer").bytes().await.expect("bytes");
            assert!(answer == bytes, "{name}: {} bytes of {}", answer.len(), bytes.len());
        }
    });
}

async fn list(world: &World, run: &RunRef) -> Vec<String> {
    let shown = world.only_run(&run.study_name).await;
    let id = shown.0["info"]["run_id"].as_str().expect("an identity");
    let answer = world.get("artifacts/list", &[("run_id", id)]).await;
    let files = answer["files"].as_array().cloned().unwrap_or_default();
    files.iter().map(|file| file["path"].as_str().expect("a path").to_owned()).collect()
}

#[test]
fn a_server_that_takes_no_files_is_told_where_they_are() {
    with_server(async |world| {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("results.csv"), "epoch").expect("writable");
        let run = RunRef { run_dir: folder.path().to_owned(), ..run("proxyless") };
        let place = "s3://mlflow-artifacts/x";
        world.post("experiments/create", json!({ "name": run.study_name, "artifact_location": place })).await;
        let sink = world.sink().with_store_url("http://me:hunter2@store:9000/models");
        deliver(&sink, &files(&run, FilesMoment::End)).await;
        let shown = world.only_run(&run.study_name).await;
        let said = shown.tag("boxwright.artifacts").expect("a word");
        let expected = format!("http://store:9000/models/{}/{}/", run.study_name, run.task_id);
        assert!(said.contains(&expected) && said.contains(place), "{said}");
        let off = MlflowConfig { is_sending_artifacts: false, ..config(&world.server.url) };
        let other = RunRef { instance: "other".into(), ..run.clone() };
        deliver(&MlflowSink::new(&off).expect("valid"), &files(&other, FilesMoment::End)).await;
        assert_eq!(world.runs(&run.study_name).await.len(), 1);
    });
}
