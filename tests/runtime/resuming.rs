//! `resume` when the run folder is lost: from the store, or not at all.

use boxwright::job::record::JobRecord;
use boxwright::job::state::{FailureClass, JobState};

use crate::world::{World, job};

const MANIFEST: &str = "store/models/default/a/manifest.json";

/// A job that was stopped after a few steps, and whose service runs.
fn stopped(more: &str) -> (World, JobRecord) {
    let mut world = World::with(more);
    world.start();
    world.drop_job("a.yaml", job("a", "steps=100000,files=1"));
    world.wait_steps("a", 5);
    assert!(world.run(&["stop", "a"]).status.success());
    let record = world.wait_state("a", JobState::Cancelled);
    (world, record)
}

fn manifest(world: &World) -> Option<serde_json::Value> {
    serde_json::from_str(&world.read(MANIFEST)).ok()
}

/// The manifest once it is that of the end of a submission.
fn end(world: &World, instance: &str) -> serde_json::Value {
    world.wait("the end of the run in the store", || {
        manifest(world).filter(|said| said["status"] == "cancelled" && said["instance"] == instance)
    })
}

fn newest(manifest: &serde_json::Value) -> String {
    let files = manifest["files"].as_array().expect("files");
    let checkpoints = files.iter().filter(|file| file["role"] == "checkpoint");
    checkpoints.map(|file| file["path"].as_str().expect("a path").to_owned()).max().expect("a checkpoint")
}

#[test]
fn a_lost_run_folder_comes_back_from_the_store() {
    let (world, first) = stopped("store: {upload_interval_seconds: 0.1}\n");
    let before = end(&world, &first.instance);
    std::fs::remove_dir_all(&first.run_dir).expect("removed");
    let resumed = world.run(&["resume", "a"]);
    let said = String::from_utf8_lossy(&resumed.stdout).into_owned();
    assert!(resumed.status.success() && said.contains("in the object store is looked for first"), "{said}");
    world.wait_steps("a", 2);
    assert!(world.run(&["stop", "a"]).status.success());
    let second = world.wait_state("a", JobState::Cancelled);
    assert_eq!(second.generation, 2);
    let began: usize =
        world.stub("a", "attempts").trim().rsplit(' ').next().unwrap_or("0").parse().expect("a step");
    assert!(began >= 5, "it began at step {began}");
    let after = end(&world, &second.instance);
    assert!(newest(&after) > newest(&before), "{after}");

    // Neither here nor there: it is said, and nothing is trained.
    std::fs::remove_dir_all(&second.run_dir).expect("removed");
    std::fs::remove_dir_all(world.path("store")).expect("removed");
    assert!(world.run(&["resume", "a"]).status.success());
    let third = world.wait_state("a", JobState::Failed);
    assert_eq!((third.generation, third.class), (3, Some(FailureClass::Config)));
    assert!(third.reason.contains("no checkpoint to go on from is left"), "{}", third.reason);
    assert_eq!(world.stub("a", "steps"), "");
}

#[test]
fn without_a_store_a_lost_run_is_not_resumed() {
    let (world, record) = stopped("store: {folder: null}\n");
    std::fs::remove_dir_all(&record.run_dir).expect("removed");
    let refused = world.run(&["resume", "a"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("no checkpoint of a is left in") && said.contains("submit --again"), "{said}");
}
