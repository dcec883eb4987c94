//! A real MLflow server beside the fleet: what it has of a run after whatever happened to it, to the network before it, and to
//! the service.

use std::time::{Duration, Instant};

use boxwright::adapters::process;
use boxwright::job::state::JobState;
use redis::Commands;
use serde_json::{Value as Json, json};

use crate::park::{Park, stub_job};
use crate::servers::mlflow::{self, MlflowServer};
use crate::servers::proxy::{Fault, Proxy};
use crate::world::World;

/// A look at what the server has, past every proxy.
struct Tracking {
    server: &'static MlflowServer,
    http: reqwest::Client,
    runtime: tokio::runtime::Runtime,
}

impl Tracking {
    fn new() -> Option<Self> {
        let server = mlflow::shared()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        Some(Self { server, http: reqwest::Client::new(), runtime })
    }

    /// Lines for the configuration of machines that use it under this address.
    fn lines(url: &str) -> String {
        format!("mlflow: {{tracking_uri: '{url}', system_metrics_interval_seconds: 0}}\n")
    }

    fn proxy(&self) -> Proxy {
        Proxy::http(([127, 0, 0, 1], self.server.port).into())
    }

    fn ask(&self, request: reqwest::RequestBuilder) -> Json {
        let again = request.try_clone().expect("a body in memory");
        self.runtime.block_on(async {
            // The server may close an idle connection in the moment in which it is used again.
            let answer = match request.send().await {
                Ok(answer) => answer,
                Err(_) => again.send().await.expect("an answer"),
            };
            answer.json().await.expect("JSON")
        })
    }

    fn get(&self, path: &str, query: &[(&str, &str)]) -> Json {
        self.ask(self.http.get(format!("{}/api/2.0/mlflow/{path}", self.server.url)).query(query))
    }

    fn post(&self, path: &str, body: Json) -> Json {
        self.ask(self.http.post(format!("{}/api/2.0/mlflow/{path}", self.server.url)).json(&body))
    }

    /// The only run of a task, when there is one.
    fn run(&self, task_id: &str) -> Option<Json> {
        let experiments = self.post("experiments/search", json!({ "max_results": 500 }));
        let ids: Vec<&Json> =
            experiments["experiments"].as_array()?.iter().map(|known| &known["experiment_id"]).collect();
        let filter = format!("tags.task_id = '{task_id}'");
        let found = self.post("runs/search", json!({ "experiment_ids": ids, "filter": filter }));
        let runs = found["runs"].as_array().cloned().unwrap_or_default();
        assert!(runs.len() <= 1, "one run for a job: {runs:?}");
        runs.into_iter().next()
    }

    /// Waits until the run of a task has this status.
    fn wait_run(&self, world: &World, task_id: &str, status: &str) -> Json {
        world.wait(&format!("the run of {task_id} to be {status}"), || {
            self.run(task_id).filter(|run| run["info"]["status"] == status)
        })
    }

    /// Asserts that a metric has every step once, in order, each not before the last.
    fn assert_history(&self, run: &Json, key: &str, epochs: i64) {
        let run_id = run["info"]["run_id"].as_str().expect("an id");
        let answer = self.get("metrics/get-history", &[("run_id", run_id), ("metric_key", key)]);
        let points = answer["metrics"].as_array().cloned().unwrap_or_default();
        let of = |name: &str| points.iter().filter_map(|point| point[name].as_i64()).collect::<Vec<_>>();
        assert_eq!(of("step"), (1..=epochs).collect::<Vec<_>>(), "{key} of {run_id}");
        assert!(of("timestamp").is_sorted(), "{points:?}");
    }
}

/// The value under a key of one of the lists of a run.
fn item<'a>(run: &'a Json, list: &str, key: &str) -> Option<&'a str> {
    run["data"][list].as_array()?.iter().find(|item| item["key"] == key)?["value"].as_str()
}

fn with_store() -> Option<(Park, Tracking)> {
    let park = Park::with_store()?;
    Some((park, Tracking::new()?))
}

/// Waits until the journal knows the run's id.
fn wait_run_id(world: &World, task_id: &str) {
    world.wait("the id in the journal", || {
        world.record(task_id).filter(|record| record.notes.contains_key("mlflow_run_id"))
    });
}

#[test]
fn a_run_is_there_whole_with_its_files_and_its_place_in_the_registry() {
    let Some((mut park, tracking)) = with_store() else { return };
    park.more = Tracking::lines(&tracking.server.url);
    let mut world = park.machine("mlflow-whole");
    world.start();
    let study = format!("study-{}", std::process::id());
    let more =
        format!("sweeper: {{study_name: {study}, version: 3}}\nmetadata: {{author: me, content: a note}}\n");
    let job = stub_job("mlflow-whole", "steps=20,pause=0.05") + &more;
    park.push(&[("config", &job), ("trial_number", "7")]);
    // The server may take longer than this short job.
    let trainer = world.wait("the trainer", || world.record("mlflow-whole")?.process).pid;
    process::signal(trainer, libc::SIGSTOP);
    wait_run_id(&world, "mlflow-whole");
    process::signal(trainer, libc::SIGCONT);
    let result = park.wait_result(&world, "mlflow-whole");
    assert_eq!(result["status"], "completed", "{result}");
    let run = tracking.wait_run(&world, "mlflow-whole", "FINISHED");
    let run_id = run["info"]["run_id"].as_str().expect("an id");
    assert_eq!(result["mlflow_run_id"].as_str(), Some(run_id), "known long before the end");
    assert_eq!(run["info"]["run_name"], "mlflow-whole");
    tracking.assert_history(&run, "train/box_loss", 20);
    for (key, value) in
        [("type", "yolo"), ("trial_number", "7"), ("data", "stub:files=1,steps=20,pause=0.05")]
    {
        assert_eq!(item(&run, "params", key), Some(value), "{key}");
    }
    let best_url = format!("s3://models/{study}/mlflow-whole/weights/best.safetensors");
    for (key, value) in [
        ("author", "me"),
        ("mlflow.note.content", "a note"),
        ("version", "3"),
        ("experiment_name", &study),
        ("model_type", "yolo"),
        ("boxwright.machine", "mlflow-whole"),
        ("boxwright.best_url", &best_url),
    ] {
        assert_eq!(item(&run, "tags", key), Some(value), "{key}");
    }
    for key in ["WORKER_HOSTNAME", "WORKER_KERNEL_VERSION", "WORKER_CPU_CORES", "WORKER_CURRENT_DATE"] {
        assert!(item(&run, "tags", key).is_some_and(|value| !value.is_empty()), "{key}: {run}");
    }
    // The status is told before the rest.
    world.wait("the files", || item(&tracking.run("mlflow-whole")?, "tags", "boxwright.artifacts").map(drop));
    let listed = tracking.get("artifacts/list", &[("run_id", run_id)]);
    let files = listed["files"].as_array().cloned().unwrap_or_default();
    let table = files.iter().find(|file| file["path"] == "results.csv").expect("the table is there");
    let folder = world.record("mlflow-whole").expect("known").run_dir;
    let length = std::fs::metadata(folder.join("results.csv")).expect("there").len();
    assert_eq!(table["file_size"].as_u64(), Some(length));
    let version = world.wait("the alias", || {
        let answer = tracking.get("registered-models/alias", &[("name", &study), ("alias", "best")]);
        Some(answer["model_version"].clone()).filter(|version| version.is_object())
    });
    assert_eq!((version["run_id"].as_str(), version["version"].as_str()), (Some(run_id), Some("1")));
    assert_eq!(version["source"].as_str(), Some(best_url.as_str()));
    world.end_service(libc::SIGTERM);
}

#[test]
fn failed_and_cancelled_runs_end_as_such_also_over_a_death_of_the_service() {
    let Some((mut park, tracking)) = with_store() else { return };
    park.more = Tracking::lines(&tracking.server.url);
    let mut world = park.machine("mlflow-ends");
    world.start();
    park.push(&[("config", &stub_job("mlflow-failed", "steps=20,always=10@3"))]);
    assert_eq!(park.wait_result(&world, "mlflow-failed")["status"], "failed");
    let run = tracking.wait_run(&world, "mlflow-failed", "FAILED");
    assert!(item(&run, "tags", "boxwright.reason").is_some_and(|why| why.contains("stub failed")), "{run}");
    tracking.assert_history(&run, "train/box_loss", 3);

    park.push(&[("config", &stub_job("mlflow-killed", "steps=100000"))]);
    world.wait_steps("mlflow-killed", 5);
    tracking.wait_run(&world, "mlflow-killed", "RUNNING");
    // The server knows the run a moment before the journal knows its id. A kill between the two leaves a result that
    // cannot name the run, and this test is of the kills after it.
    wait_run_id(&world, "mlflow-killed");
    world.kill_service();
    let _: () = park.client().set_ex("study:mlflow-killed:cancel", "1", 3600).expect("set");
    world.start();
    let result = park.wait_result(&world, "mlflow-killed");
    assert_eq!(result["status"], "cancelled", "{result}");
    let run = tracking.wait_run(&world, "mlflow-killed", "KILLED");
    assert_eq!(result["mlflow_run_id"], run["info"]["run_id"]);
    let reason = item(&run, "tags", "boxwright.reason").unwrap_or_default();
    assert!(!reason.contains("knows no such job"), "its own end, not that of a forgotten one: {reason}");
    world.end_service(libc::SIGTERM);
}

#[test]
fn a_server_that_is_away_or_flaps_costs_no_time_and_no_epoch() {
    let Some((mut park, tracking)) = with_store() else { return };
    let proxy = tracking.proxy();
    park.more = Tracking::lines(&proxy.url());
    let mut world = park.machine("mlflow-faults");
    world.start();
    let mut seconds = Vec::new();
    for task_id in ["mlflow-calm", "mlflow-black", "mlflow-flaps"] {
        if task_id == "mlflow-black" {
            proxy.set(Fault::BlackHole);
        }
        let began = Instant::now();
        park.push(&[("config", &stub_job(task_id, "steps=60,pause=0.03"))]);
        let mut is_up = false;
        let result = world.wait(task_id, || {
            if task_id == "mlflow-flaps" {
                is_up = !is_up;
                proxy.set(if is_up { Fault::None } else { Fault::Refuse });
                // Not a wait for something: the time between two changes.
                std::thread::sleep(Duration::from_millis(if is_up { 60 } else { 120 }));
            }
            park.results_of(task_id).into_iter().next()
        });
        seconds.push((task_id, began.elapsed().as_secs_f64()));
        assert_eq!((result["status"].as_str(), result["attempt"].as_i64()), (Some("completed"), Some(1)));
        if task_id == "mlflow-black" {
            assert!(result["mlflow_run_id"].is_null(), "nobody could know it: {result}");
        }
        proxy.set(Fault::None);
        // What one fault left is done before the next, so that each run meets its own.
        let run = tracking.wait_run(&world, task_id, "FINISHED");
        tracking.assert_history(&run, "train/box_loss", 60);
        assert_eq!(item(&run, "params", "trial_number"), Some("1"), "{run}");
        let tag = item(&run, "tags", "boxwright.machine");
        assert_eq!(tag, Some("mlflow-faults"), "{run}");
    }
    for (task_id, taken) in &seconds[1..] {
        // A wait of a request's limit (30 s) would show; the noise of a busy machine must not.
        assert!(*taken < seconds[0].1 * 3.0 + 5.0, "{task_id}: {seconds:?}");
    }
    world.end_service(libc::SIGTERM);
}

#[test]
fn runs_that_nobody_goes_on_with_are_closed_at_the_next_start() {
    let Some((mut park, tracking)) = with_store() else { return };
    park.more = Tracking::lines(&tracking.server.url);
    let (mut world, mut other) = (park.machine("mlflow-lost"), park.machine("mlflow-other"));
    for world in [&mut world, &mut other] {
        world.start();
        world.wait_log("takes jobs from");
    }
    // One of each: a job that is lost, one that goes on over the start, one of another machine.
    assert!(other.run(&["drain"]).status.success());
    other.wait_log("drain");
    park.push(&[("config", &stub_job("mlflow-lost", "steps=100000"))]);
    world.wait_steps("mlflow-lost", 3);
    other.drop_job("a.yaml", stub_job("mlflow-others", "steps=100000"));
    assert!(other.run(&["undrain"]).status.success());
    other.wait_steps("mlflow-others", 3);
    tracking.wait_run(&world, "mlflow-lost", "RUNNING");
    tracking.wait_run(&other, "mlflow-others", "RUNNING");
    world.kill_service();
    std::fs::remove_dir_all(world.path("state")).expect("removed");
    let _: i64 = park.client().del("training_queue").expect("deleted");
    world.start();
    let run = tracking.wait_run(&world, "mlflow-lost", "KILLED");
    let reason = item(&run, "tags", "boxwright.reason").unwrap_or_default();
    assert!(reason.contains("mlflow-lost started anew"), "{reason}");
    assert!(run["info"]["end_time"].as_i64() > run["info"]["start_time"].as_i64());
    assert_eq!(tracking.run("mlflow-others").expect("is there")["info"]["status"], "RUNNING");
    // A job that goes on keeps its run open over the start of its service.
    other.kill_service();
    other.start();
    let steps = other.stub("mlflow-others", "steps").lines().count();
    other.wait_steps("mlflow-others", steps + 5);
    other.write("configs/stop/stop_training_mlflow-others.txt", "");
    other.wait_state("mlflow-others", JobState::Cancelled);
    let run = tracking.wait_run(&other, "mlflow-others", "KILLED");
    let reason = item(&run, "tags", "boxwright.reason").unwrap_or_default();
    assert!(!reason.contains("started anew"), "{reason}");
    for world in [&mut world, &mut other] {
        world.end_service(libc::SIGTERM);
    }
}
