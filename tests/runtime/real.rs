//! The real trainer under `kill -9`: whatever dies, and when, the weights end in the bits of an undisturbed run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use boxwright::adapters::process;
use boxwright::data::synth::{SynthArgs, write_dataset};
use boxwright::detect::weights::{Tensor, safetensors};
use boxwright::job::record::JobRecord;
use boxwright::job::state::JobState;

use crate::world::World;

const EPOCHS: usize = 6;
/// 24 images in batches of 8.
const BATCHES: usize = 3;

/// A world with the program itself as trainer, a tiny set, and a job of so many epochs that is dropped.
fn world(epochs: usize) -> World {
    // Kills must not exhaust the budget: this test counts losses, not retries.
    let mut world = World::with("trainer: {program: null}\n");
    let service = world.read("service.yaml").replace("killed: {budget: 3", "killed: {budget: 100");
    world.write("service.yaml", service);
    let set = SynthArgs { images: BATCHES * 8, val_images: 4, imgsz: 64, ..SynthArgs::default() };
    write_dataset(&world.path("data/tiny"), &set).expect("a tiny set");
    world.start();
    world.drop_job(
        "real.yaml",
        format!(
            "model: yolov8n\ntype: yolo\ntask_id: real\ntrain:\n  data: data/tiny/data.yaml\n  epochs: {epochs}\n  \
             imgsz: 64\n  batch: 8\n  nbs: 16\n  workers: 1\n  plots: false\n  pretrained: false\n"
        ),
    );
    world
}

fn run_dir(world: &World) -> Option<PathBuf> {
    world.record("real").map(|record| record.run_dir)
}

/// True when the checkpoint of the end of an epoch is there.
fn epoch_saved(run_dir: &Path, epoch: usize) -> bool {
    let name = format!("state/step-{:09}.ckpt", epoch * BATCHES);
    run_dir.join(name).is_file()
}

fn weights(world: &World, name: &str) -> BTreeMap<String, Tensor> {
    let path = run_dir(world).expect("the job is known").join("weights").join(name);
    safetensors::read_file(&path).expect("weights that verify").tensors
}

#[test]
fn kills_of_the_real_trainer_and_service_leave_the_same_weights() {
    let undisturbed = world(EPOCHS);
    undisturbed.wait_state("real", JobState::Completed);

    let mut world = world(EPOCHS);
    // (epoch after whose checkpoint to strike, the trainer, the service, milliseconds later)
    let strikes = [(1, true, false, 0), (2, false, true, 15), (3, true, true, 40), (4, false, true, 5)];
    let mut struck = 0;
    for (epoch, trainer, service, later_ms) in strikes {
        let over = world.wait("the checkpoint of an epoch", || {
            let record = world.record("real")?;
            let over = record.state == JobState::Completed;
            (over || epoch_saved(&record.run_dir, epoch)).then_some(over)
        });
        if over {
            break;
        }
        // Not a wait for something: it moves the blow to another moment of the next epoch.
        std::thread::sleep(Duration::from_millis(later_ms));
        if trainer && let Some(pid) = world.record("real").and_then(|record| record.process).map(|p| p.pid) {
            process::signal(pid, libc::SIGKILL);
        }
        if service {
            world.kill_service();
            world.start();
        }
        struck += 1;
    }
    let record = world.wait_state("real", JobState::Completed);
    assert!(struck >= 2, "the run was over before it could be disturbed");
    assert!(record.attempts >= 2, "{} attempts after {struck} kills", record.attempts);
    for name in ["last.safetensors", "best.safetensors"] {
        assert!(weights(&world, name) == weights(&undisturbed, name), "{name} differs after {struck} kills");
    }
    let rows = |world: &World| {
        let path = run_dir(world).expect("the job is known").join("results.csv");
        let text = std::fs::read_to_string(path).expect("results");
        // The second column is time; all others must agree.
        let row = |line: &str| -> Vec<String> {
            line.split(',').enumerate().filter(|(i, _)| *i != 1).map(|(_, field)| field.to_owned()).collect()
        };
        text.lines().map(row).collect::<Vec<_>>()
    };
    assert_eq!(rows(&world), rows(&undisturbed), "one row for each epoch, the same figures");
}

#[test]
fn an_evaluation_is_a_job_like_any_other() {
    let world = world(1);
    let trained = world.wait_state("real", JobState::Completed);
    let weights = trained.run_dir.join("weights/best.safetensors");
    world.drop_job(
        "measure.yaml",
        format!(
            "model: {}\ntype: yolo\ntask_id: measure\ntrain: {{mode: val, data: data/tiny/data.yaml, workers: 1, plots: false}}\n",
            weights.display()
        ),
    );
    let record = world.wait_state("measure", JobState::Completed);
    let figures = |record: &JobRecord| record.result.clone().expect("a result")["metrics"].clone();
    assert_eq!(figures(&record), figures(&trained), "the same weights, the same images");
    assert_eq!(record.progress.expect("progress")["batches"], 1);
    assert!(record.run_dir.join("config.effective.yaml").is_file());
}
