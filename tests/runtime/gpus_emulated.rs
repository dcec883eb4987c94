//! The service with the real trainer on emulated GPUs: the driver and the kernels are stand-ins, all else is the program.

use std::time::Duration;

use boxwright::data::synth::{SynthArgs, write_dataset};
use boxwright::job::state::{FailureClass, JobState};

use crate::emulator;
use crate::world::World;

/// A service whose GPUs behave as `words` say.
fn world(words: &str) -> World {
    let folder = emulator::folder();
    let mut world = World::with("trainer: {program: null}\n");
    world.set_limit(Duration::from_secs(600));
    world.set("BOXWRIGHT_CUDA_DRIVER", &folder);
    world.set("BOXWRIGHT_NVRTC", &folder);
    world.set("BOXWRIGHT_KERNEL_CACHE", world.path("kernels"));
    world.set("BOXWRIGHT_EMULATOR", words);
    let set = SynthArgs { images: 4, val_images: 2, imgsz: 64, seed: 3, ..SynthArgs::default() };
    write_dataset(&world.path("tiny"), &set).expect("a tiny set");
    world.start();
    world
}

fn job(task_id: &str) -> String {
    format!(
        "task_id: {task_id}\ntype: yolo\nmodel: yolov8n\ntrain:\n  data: tiny\n  epochs: 1\n  batch: 2\n  imgsz: 64\n  \
         workers: 1\n  plots: false\n  pretrained: false\n"
    )
}

#[test]
fn two_jobs_take_turns_on_one_gpu() {
    let world = world("");
    world.drop_job("a.yaml", job("a"));
    world.wait_state("a", JobState::Running);
    world.drop_job("b.yaml", job("b"));
    assert_eq!(world.wait_reason("b", "waits for GPU").reason, "waits for GPU 0, which trains a");
    let first = world.wait_state("a", JobState::Completed);
    let second = world.wait_state("b", JobState::Completed);
    assert!(second.started_unix_ms >= first.finished_unix_ms, "one after the other");
    for record in [&first, &second] {
        assert_eq!(record.attempts, 1);
        let args = std::fs::read_to_string(record.run_dir.join("args.yaml")).expect("written");
        assert!(args.contains("device: cuda:0"), "{args}");
    }
    let slot = world.wait_slot("GPU 0", "free");
    assert_eq!((slot["device"].as_str(), slot["faults"].as_u64()), (Some("cuda:0"), Some(0)));
    // The service's own process never loads a driver.
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", world.pid())).expect("it runs");
    assert!(!maps.contains("libcuda"), "libcuda is loaded into the service");
}

#[test]
fn a_gpu_whose_launches_fail_is_quarantined_and_another_one_trains_the_job() {
    // The test of a GPU is one launch and passes; training fails at its fifth on the first GPU.
    let world = world("fail_launch=5;chip=90");
    let text = format!(
        "{}default: {{max_retries: 9, retry_delay: 0.01}}\n",
        job("a").replace("train:\n", "train:\n  device: 0\n")
    );
    world.drop_job("a.yaml", text);
    let slot = world.wait_slot("GPU 0", "quarantined");
    assert_eq!(slot["faults"], 3, "{slot}");
    let waiting = world.wait_reason("a", "waits for GPU 0, which is out of use until ");
    assert_eq!(waiting.retries[&FailureClass::Device], 3);
    assert!(waiting.reason.contains("launch"), "{}", waiting.reason);
    world.drop_job("b.yaml", job("b"));
    let record = world.wait_state("b", JobState::Completed);
    assert_eq!(record.attempts, 1, "the bad GPU took no other job");
    let args = std::fs::read_to_string(record.run_dir.join("args.yaml")).expect("written");
    assert!(args.contains("device: cuda:1"), "{args}");
}
