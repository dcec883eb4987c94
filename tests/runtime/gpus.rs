//! Slots on GPUs, with a trainer that says which there are and how they fail.

use boxwright::job::state::{FailureClass, JobState};

use crate::world::{World, job};

/// What the stub answers when it is asked for GPUs.
fn show(world: &World, numbers: &[usize]) {
    let gpu = |n: &usize| {
        format!("{{\"number\":{n},\"uuid\":\"GPU-{n}\",\"name\":\"Stub {n}\",\"memory_bytes\":8589934592}}")
    };
    let gpus: Vec<String> = numbers.iter().map(gpu).collect();
    let obstacle = if gpus.is_empty() { "\"the driver shows no GPU\"" } else { "null" };
    // Moved in, so that a look never reads half of it.
    let aside = world.write("gpus.new", format!("{{\"gpus\":[{}],\"obstacle\":{obstacle}}}", gpus.join(",")));
    std::fs::rename(aside, world.path("gpus.json")).expect("same file system");
}

fn world(more: &str, numbers: &[usize]) -> World {
    let mut world = World::with(more);
    show(&world, numbers);
    world.start();
    world
}

/// A job for the stub on a device.
fn on(task_id: &str, stub: &str, device: &str) -> String {
    job(task_id, stub).replace("train: {", &format!("train: {{device: {device}, "))
}

/// Ends a job that would go on for ever.
fn stop(world: &World, task_id: &str) {
    assert!(world.run(&["stop", task_id]).status.success());
    world.wait_state(task_id, JobState::Cancelled);
}

#[test]
fn every_gpu_is_a_slot_and_jobs_go_where_they_ask() {
    let world = world("", &[0, 1]);
    world.drop_job("named.yaml", on("named", "steps=100000", "'1'"));
    world.wait_state("named", JobState::Running);
    world.drop_job("also.yaml", on("also", "steps=2", "cuda:1"));
    let waiting = world.wait_reason("also", "waits for GPU 1");
    assert_eq!(waiting.reason, "waits for GPU 1, which trains named");
    world.drop_job("any.yaml", job("any", "steps=100000"));
    world.wait_state("any", JobState::Running);
    assert_eq!(world.stub("any", "devices"), "cuda:0 GPU-0\n");
    world.drop_job("slow.yaml", on("slow", "steps=3", "cpu"));
    world.wait_state("slow", JobState::Completed);
    assert_eq!(world.stub("slow", "devices"), "cpu \n");
    world.drop_job("more.yaml", job("more", "steps=2"));
    let waiting = world.wait_reason("more", "waits for a free GPU");
    assert_eq!(waiting.reason, "waits for a free GPU (2 of 2 busy: any, named)");
    world.drop_job("gone.yaml", on("gone", "steps=2", "cuda:5"));
    let gone = world.wait_state("gone", JobState::Failed);
    assert_eq!((gone.class, gone.attempts), (Some(FailureClass::Config), 0));
    assert_eq!(gone.reason, "cuda:5 was asked for: this service has GPU 0, GPU 1");
    let slots = world.slots();
    let seen = |slot: &serde_json::Value| {
        ["name", "device", "state", "task_id"]
            .map(|key| slot[key].as_str().unwrap_or("-").to_owned())
            .join(" ")
    };
    let seen: Vec<String> = slots.iter().map(seen).collect();
    assert_eq!(seen, ["cpu 0 cpu free -", "GPU 0 cuda:0 busy any", "GPU 1 cuda:1 busy named"]);
    assert_eq!((slots[1]["uuid"].as_str(), slots[1]["model"].as_str()), (Some("GPU-0"), Some("Stub 0")));
    let shown = world.run(&["status"]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(
        shown.contains("Stub 1, GPU-1") && shown.contains("waits for GPU 1, which trains named"),
        "{shown}"
    );
    stop(&world, "named");
    world.wait_state("also", JobState::Completed);
    stop(&world, "any");
    world.wait_state("more", JobState::Completed);
}

#[test]
fn without_a_gpu_the_cpu_trains_and_a_named_gpu_is_refused() {
    let mut world = world("", &[]);
    world.drop_job("a.yaml", job("a", "steps=2"));
    world.wait_state("a", JobState::Completed);
    assert_eq!(world.stub("a", "devices"), "cpu \n");
    world.drop_job("b.yaml", on("b", "steps=2", "cuda"));
    let record = world.wait_state("b", JobState::Failed);
    assert_eq!(record.reason, "cuda:0 was asked for: the driver shows no GPU");
    assert_eq!(world.end_service(libc::SIGTERM).code(), Some(130));
    let slots = world.run(&["status", "--slots"]);
    assert_eq!(String::from_utf8_lossy(&slots.stdout), "no service runs here\n");
}

#[test]
fn the_service_uses_the_gpus_that_it_was_given() {
    let chosen = world("slots: {cpu: 0, gpus: [1]}\n", &[0, 1]);
    chosen.drop_job("a.yaml", job("a", "steps=2"));
    chosen.wait_state("a", JobState::Completed);
    assert_eq!(chosen.stub("a", "devices"), "cuda:1 GPU-1\n");
    for (id, device, reason) in [
        ("b", "cuda:0", "cuda:0 was asked for: `slots.gpus` leaves it out"),
        ("c", "cpu", "the CPU was asked for: this service has no CPU slots (`slots.cpu` is 0)"),
    ] {
        chosen.drop_job(&format!("{id}.yaml"), on(id, "steps=2", device));
        assert_eq!(chosen.wait_state(id, JobState::Failed).reason, reason);
    }
    let none = world("slots: {gpus: none}\n", &[0]);
    none.drop_job("a.yaml", job("a", "steps=2"));
    none.wait_state("a", JobState::Completed);
    assert_eq!((none.stub("a", "devices").as_str(), none.read("probes").as_str()), ("cpu \n", ""));
}

#[test]
fn a_bad_gpu_is_quarantined_and_its_jobs_go_on_elsewhere() {
    let world = world("", &[0, 1]);
    // Holds the good one, so that the bad one is taken again and again.
    world.drop_job("hold.yaml", on("hold", "steps=100000", "cuda:1"));
    world.wait_state("hold", JobState::Running);
    let retries = "default: {max_retries: 9, retry_delay: 0.01}\n";
    world.drop_job("a.yaml", format!("{}{retries}", job("a", "steps=4,gpu_fail=0")));
    let slot = world.wait_slot("GPU 0", "quarantined");
    assert_eq!(slot["faults"], 3);
    let reason = slot["reason"].as_str().expect("a reason");
    assert!(reason.starts_with("3 faults in a row, last: the stub failed on purpose"), "{reason}");
    world.wait_log("GPU 0 is out of use until ");
    let waiting = world.wait_reason("a", "waits for a free GPU");
    assert!(waiting.reason.contains("1 of 2 busy: hold; GPU 0 is out of use until "), "{}", waiting.reason);
    assert_eq!(waiting.retries[&FailureClass::Device], 3, "its own budget");
    world.drop_job("b.yaml", on("b", "steps=2", "cuda:0"));
    world.wait_reason("b", "waits for GPU 0, which is out of use until ");
    stop(&world, "hold");
    let record = world.wait_state("a", JobState::Completed);
    assert_eq!(record.attempts, 4);
    assert_eq!(world.stub("a", "devices").lines().last(), Some("cuda:1 GPU-1"));
    // Tested at the start and after each of the first two faults, not while it rests.
    let probes = world.read("probes");
    assert_eq!(probes.lines().filter(|line| *line == "probe --test GPU-0").count(), 3, "{probes}");
}

#[test]
fn a_fault_is_retried_on_another_gpu_and_success_forgives() {
    let world = world("", &[0, 1]);
    world.drop_job("a.yaml", job("a", "steps=3,gpu_fail=0"));
    let record = world.wait_state("a", JobState::Completed);
    assert_eq!((record.attempts, record.retries[&FailureClass::Device]), (2, 1));
    assert_eq!(world.stub("a", "devices"), "cuda:0 GPU-0\ncuda:1 GPU-1\n");
    assert_eq!(world.wait_slot("GPU 0", "free")["faults"], 1);
    world.drop_job("b.yaml", on("b", "steps=2", "cuda:0"));
    world.wait_state("b", JobState::Completed);
    assert_eq!(world.wait_slot("GPU 0", "free")["faults"], 0);
    // A crash on a GPU is a fault of the device, not of the program.
    world.drop_job("c.yaml", on("c", "steps=4,signal=SEGV@2", "cuda:0"));
    let record = world.wait_state("c", JobState::Completed);
    assert_eq!(record.retries[&FailureClass::Device], 1);
}

#[test]
fn a_gpu_must_pass_its_test_before_it_takes_a_job() {
    let mut world = World::new();
    show(&world, &[0]);
    world.write("gpu_slow", "");
    world.start();
    world.drop_job("a.yaml", job("a", "steps=2"));
    world.wait_reason("a", "waits for GPU 0, which is being tested");
    world.write("gpu_faults", "GPU-0\n");
    std::fs::remove_file(world.path("gpu_slow")).expect("it is there");
    let slot = world.wait_slot("GPU 0", "quarantined");
    assert_eq!(slot["reason"], "it failed its test: wrong numbers");
    world.wait_reason("a", "waits for GPU 0, which is out of use until ");
    assert_eq!(world.record("a").map(|record| record.attempts), Some(0));
    // A restarted service asks anew.
    assert_eq!(world.end_service(libc::SIGTERM).code(), Some(130));
    std::fs::remove_file(world.path("gpu_faults")).expect("it is there");
    world.start();
    world.wait_state("a", JobState::Completed);
}

#[test]
fn a_gpu_that_vanishes_is_missing_and_its_job_waits() {
    let world = world("", &[0]);
    world.drop_job("a.yaml", job("a", "steps=100000"));
    world.wait_state("a", JobState::Running);
    show(&world, &[]);
    // A crash makes the service look again.
    let trainer = world.wait("the process", || world.record("a")?.process);
    boxwright::adapters::process::signal(trainer.pid, libc::SIGSEGV);
    let slot = world.wait_slot("GPU 0", "missing");
    assert_eq!(slot["reason"], "the driver shows no GPU");
    world.wait_reason("a", "waits for GPU 0, which is missing: the driver shows no GPU");
}
