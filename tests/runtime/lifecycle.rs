//! Order, stops, retries, shutdown, the command line.

use std::time::{Duration, Instant};

use boxwright::job::state::{FailureClass, JobState};

use crate::world::{World, job};

#[test]
fn jobs_run_in_order_and_waiting_ones_say_why() {
    let mut world = World::new();
    for (index, priority) in ["medium", "medium", "low", "high"].iter().enumerate() {
        let text = format!("{}priority: {priority}\n", job(&format!("j{index}"), "steps=4,pause=0.05"));
        let file = world.write(&format!("{index}.yaml"), text);
        let submitted = world.run(&["submit", file.to_str().expect("UTF-8")]);
        assert!(submitted.status.success());
    }
    world.start();
    world.wait_state("j3", JobState::Running);
    let waiting = world.wait("a reason", || {
        let record = world.record("j2")?;
        record.reason.contains("waits for a free CPU slot").then_some(record)
    });
    assert_eq!(waiting.reason, "waits for a free CPU slot (1 of 1 busy: j3)");
    let mut started: Vec<(i64, String)> = (0..4)
        .map(|index| {
            let record = world.wait_state(&format!("j{index}"), JobState::Completed);
            (record.started_unix_ms.expect("started"), record.task_id.to_string())
        })
        .collect();
    started.sort();
    let order: Vec<&str> = started.iter().map(|(_, id)| id.as_str()).collect();
    assert_eq!(order, ["j3", "j0", "j1", "j2"]);
}

#[test]
fn two_slots_train_two_jobs() {
    let mut world = World::with("slots: {cpu: 2}\n");
    world.start();
    world.drop_job("a.yaml", job("a", "steps=400,pause=0.02"));
    world.drop_job("b.yaml", job("b", "steps=400,pause=0.02"));
    world.wait_state("a", JobState::Running);
    world.wait_state("b", JobState::Running);
    assert_eq!(world.end_service(libc::SIGTERM).code(), Some(130));
}

#[test]
fn stop_files_for_queued_running_finished_unknown_and_stale() {
    let mut world = World::new();
    world.write("configs/stop/stop_training_stale.txt", "");
    world.start();
    world.drop_job("first.yaml", job("first", "steps=2"));
    world.wait_state("first", JobState::Completed);
    world.drop_job("running.yaml", job("running", "steps=100000"));
    world.wait_state("running", JobState::Running);
    world.drop_job("queued.yaml", job("queued", "steps=3"));
    world.wait_state("queued", JobState::Queued);
    // Queued: cancelled without ever starting.
    world.write("configs/stop/stop_training_queued.txt", "");
    assert_eq!(world.wait_state("queued", JobState::Cancelled).attempts, 0);
    // Unknown and badly named: warned, left.
    world.write("configs/stop/stop_training_nobody.txt", "");
    world.write("configs/stop/stop_training_a b.txt", "");
    world.wait_log("no job of this task id is known");
    // Finished: warned and put aside.
    world.write("configs/stop/stop_training_first.txt", "");
    world.wait("the file of a finished job to be put aside", || {
        world.path("configs/stop/stop_training_first.txt.done").exists().then_some(())
    });
    world.wait_log("the job is already completed; nothing to stop");
    // Running: saved, cancelled, put aside.
    world.write("configs/stop/stop_training_running.txt", "");
    let asked = Instant::now();
    let record = world.wait_state("running", JobState::Cancelled);
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    assert!(record.reason.contains("stopped on request") && record.attempts == 1, "{}", record.reason);
    world.wait("the file to be put aside", || {
        world.path("configs/stop/stop_training_running.txt.done").exists().then_some(())
    });
    // The next run of the same id is not affected by the old file.
    world.drop_job("running.yaml", job("running", "steps=2"));
    world.wait("the second generation", || world.record("running").filter(|record| record.generation == 2));
    let again = world.wait_state("running", JobState::Completed);
    assert!(again.run_dir.ends_with("train_running-2"), "the old results are kept");
    // Older than its job: not obeyed.
    world.drop_job("stale.yaml", job("stale", "steps=2"));
    world.wait_state("stale", JobState::Completed);
    assert!(world.path("configs/stop/stop_training_nobody.txt").exists());
    assert!(world.path("configs/stop/stop_training_a b.txt").exists());
}

#[test]
fn a_stop_file_without_an_event_is_found_however_rarely_the_folders_are_read() {
    let mut world = World::new();
    world.write(
        "service.yaml",
        world.read("service.yaml").replace("poll_interval_ms: 200", "poll_interval_ms: 3600000"),
    );
    world.start();
    world.drop_job("a.yaml", job("a", "steps=100000"));
    world.wait_steps("a", 2);
    // Events come from the folder that was there at the start.
    std::fs::rename(world.path("configs/stop"), world.path("configs/stop-before")).expect("moved");
    std::fs::create_dir(world.path("configs/stop")).expect("created");
    world.write("configs/stop/stop_training_a.txt", "");
    world.wait_state("a", JobState::Cancelled);
    world.end_service(libc::SIGTERM);
}

#[test]
fn a_deaf_trainer_is_ended_by_force() {
    let mut world = World::with("stop: {grace_seconds: 0.2}\n");
    world.start();
    world.drop_job("a.yaml", job("a", "steps=100000,deaf=1"));
    world.wait_steps("a", 2);
    world.write("configs/stop/stop_training_a.txt", "");
    // SIGTERM after the grace, SIGKILL ten seconds later.
    world.wait_state("a", JobState::Cancelled);
}

#[test]
fn every_failure_has_its_class_and_only_four_are_tried_again() {
    let mut world = World::with("slots: {cpu: 4}\n");
    world.start();
    let cases = [
        (10, FailureClass::Config, 1),
        (11, FailureClass::Data, 1),
        (12, FailureClass::Memory, 3),
        (13, FailureClass::Diverged, 1),
        (14, FailureClass::Device, 2),
        (15, FailureClass::Storage, 2),
        (16, FailureClass::Internal, 1),
        (101, FailureClass::Internal, 1),
        (7, FailureClass::Internal, 1),
    ];
    for (code, ..) in cases {
        world.drop_job(
            &format!("c{code}.yaml"),
            job(&format!("c{code}"), &format!("steps=50,always={code}@5")),
        );
    }
    for (code, class, attempts) in cases {
        let record = world.wait_state(&format!("c{code}"), JobState::Failed);
        assert_eq!(
            (record.class, record.attempts),
            (Some(class), attempts),
            "exit code {code}: {}",
            record.reason
        );
        assert!(record.reason.contains("the stub failed on purpose at step"), "{}", record.reason);
    }
    world.drop_job("once.yaml", job("once", "steps=6,fail=12@3"));
    let record = world.wait_state("once", JobState::Completed);
    assert_eq!((record.attempts, record.retries[&FailureClass::Memory]), (2, 1));
    assert_eq!(world.stub("once", "attempts"), "1 from 0\n2 from 3\n", "continues from its checkpoint");
    let text = format!("{}default: {{max_retries: 0}}\n", job("never", "steps=50,always=12@1"));
    world.drop_job("never.yaml", text);
    assert_eq!(world.wait_state("never", JobState::Failed).attempts, 1, "the job's own budget");
    world.drop_job("segv.yaml", job("segv", "steps=5,signal=SEGV@2"));
    let record = world.wait_state("segv", JobState::Failed);
    assert_eq!(record.class, Some(FailureClass::Internal));
    assert!(record.reason.contains("SIGSEGV"), "{}", record.reason);
}

#[test]
fn a_trainer_that_cannot_be_started_fails_its_job() {
    let mut world = World::with("trainer: {program: /nowhere/trainer}\n");
    world.start();
    world.drop_job("a.yaml", job("a", "steps=1"));
    let record = world.wait_state("a", JobState::Failed);
    assert!(record.reason.contains("cannot start the trainer /nowhere/trainer"), "{}", record.reason);
}

#[test]
fn a_silent_trainer_is_killed_and_tried_again() {
    let mut world = World::with("trainer: {program: STUB, stall_timeout_seconds: 1}\n");
    world.start();
    world.drop_job("a.yaml", job("a", "steps=4,hang=2"));
    let record = world.wait_state("a", JobState::Completed);
    assert_eq!((record.attempts, record.retries[&FailureClass::Killed]), (2, 1));
    assert!(world.logs().contains("the trainer is stuck; killing it"));
    world.assert_no_violation("a");
}

#[test]
fn shutdown_interrupts_and_the_next_start_continues() {
    let mut world = World::new();
    world.start();
    world.drop_job("a.yaml", job("a", "steps=60,pause=0.03"));
    world.wait_steps("a", 3);
    let asked = Instant::now();
    assert_eq!(world.end_service(libc::SIGTERM).code(), Some(130));
    assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
    let record = world.record("a").expect("known");
    assert_eq!((record.state, record.interruptions, record.process), (JobState::Interrupted, 1, None));
    world.start();
    let record = world.wait_state("a", JobState::Completed);
    assert_eq!((record.attempts, record.retries.len()), (2, 0), "an interruption costs no budget");
    let steps: Vec<String> = (1..=60).map(|step| step.to_string()).collect();
    assert_eq!(world.stub("a", "steps").lines().collect::<Vec<_>>(), steps, "no step lost, none done twice");
}

#[test]
fn a_second_signal_kills_and_the_limit_holds() {
    let mut world = World::new();
    world.start();
    world.drop_job("a.yaml", job("a", "steps=100000,deaf=1"));
    world.wait_steps("a", 1);
    boxwright::adapters::process::signal(world.pid(), libc::SIGINT);
    world.wait_log("shutting down");
    let asked = Instant::now();
    assert_eq!(world.end_service(libc::SIGINT).code(), Some(130));
    assert!(asked.elapsed() < Duration::from_secs(10));
    assert_eq!(world.record("a").map(|record| record.state), Some(JobState::Interrupted));
    // By itself: a deaf trainer is ended within the limit.
    std::fs::write(
        world.path("service.yaml"),
        format!("{}shutdown: {{limit_seconds: 2}}\n", world.read("service.yaml")),
    )
    .expect("writable");
    world.start();
    world.wait("the second attempt", || (world.stub("a", "attempts").lines().count() == 2).then_some(()));
    let asked = Instant::now();
    assert_eq!(world.end_service(libc::SIGTERM).code(), Some(130));
    assert!(asked.elapsed() < Duration::from_secs(15), "{:?}", asked.elapsed());
    assert_eq!(world.record("a").map(|record| record.state), Some(JobState::Interrupted));
}

#[test]
fn the_command_line_works_with_and_without_a_service() {
    let mut world = World::new();
    let status = world.run(&["status"]);
    assert_eq!(String::from_utf8_lossy(&status.stdout), "no jobs\n");
    assert_eq!(world.run(&["status", "a"]).status.code(), Some(1));
    let file = world.write("a.yaml", job("a", "steps=100000"));
    let file = file.to_str().expect("UTF-8");
    assert_eq!(world.run(&["submit", file]).status.code(), Some(0));
    let again = world.run(&["submit", file]);
    assert_eq!(again.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&again.stderr).contains("the job a that this file became is queued"));
    let bad = world.write("bad.yaml", "model: 3\n");
    let refused = world.run(&["submit", bad.to_str().expect("UTF-8"), "--json"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stdout).contains("\"state\":\"rejected\""));
    // Without a service a waiting job is cancelled at once.
    assert!(world.run(&["stop", "a"]).status.success());
    assert_eq!(world.record("a").map(|record| record.state), Some(JobState::Cancelled));
    assert_eq!(world.run(&["stop", "a"]).status.code(), Some(1), "nothing to stop");
    // Resumed: the same id, the same folder, the next generation.
    assert!(world.run(&["resume", "a"]).status.success());
    world.start();
    world.wait_state("a", JobState::Running);
    assert_eq!(world.run(&["resume", "a"]).status.code(), Some(1), "it goes on by itself");
    assert!(world.run(&["stop", "a"]).status.success());
    let record = world.wait_state("a", JobState::Cancelled);
    assert_eq!(record.generation, 2);
    // Submit and wait: the exit code tells.
    for (id, stub, code) in [("w1", "steps=2", 0), ("w2", "steps=2,always=13@1", 1)] {
        let file = world.write(&format!("{id}.yaml"), job(id, stub));
        let waited = world.run(&["submit", file.to_str().expect("UTF-8"), "--wait"]);
        assert_eq!(waited.status.code(), Some(code), "{id}: {}", String::from_utf8_lossy(&waited.stderr));
    }
    let followed = world.run(&["logs", "w1", "--follow"]);
    assert!(String::from_utf8_lossy(&followed.stdout).contains("epoch 2/2"));
    let list = world.run(&["status", "--json"]);
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).expect("JSON");
    assert_eq!(list.as_array().map(Vec::len), Some(4));
    let doctor = world.run(&["doctor"]);
    assert!(doctor.status.success(), "{}", String::from_utf8_lossy(&doctor.stdout));
    assert!(String::from_utf8_lossy(&doctor.stdout).contains("training on "));
    let help = world.command(&["run", "--help"]).output().expect("runs");
    assert!(String::from_utf8_lossy(&help.stdout).contains("Exit codes: 0 done"));
}

#[test]
fn waiting_for_submitted_jobs_gives_json_alone_and_says_that_nobody_works() {
    let mut world = World::new();
    let files: Vec<_> = [("w1", "steps=2"), ("w2", "steps=2,always=13@1")]
        .iter()
        .map(|(id, stub)| world.write(&format!("{id}.yaml"), job(id, stub)).to_string_lossy().into_owned())
        .collect();
    let mut command = world.command(&["submit", "--wait", "--json", &files[0], &files[1]]);
    let (out, err) = (world.path("out.json"), world.path("err.txt"));
    let create = |path: &std::path::Path| std::fs::File::create(path).expect("writable");
    let mut child = command.stdout(create(&out)).stderr(create(&err)).spawn().expect("the program runs");
    world.wait("a word about the service", || {
        world.read("err.txt").contains("no service runs here").then_some(())
    });
    world.start();
    let status = world.wait("both ends", || child.try_wait().expect("waits"));
    assert_eq!(status.code(), Some(1), "one failed");
    let rows: Vec<serde_json::Value> =
        world.read("out.json").lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let states: Vec<_> = rows.iter().map(|row| (row["task_id"].as_str(), row["state"].as_str())).collect();
    assert_eq!(states, [(Some("w1"), Some("completed")), (Some("w2"), Some("failed"))]);
    assert_eq!(rows[0]["result"]["fitness"].as_f64(), Some(0.5));
    assert_eq!((rows[1]["class"].as_str(), rows[1]["file"].as_str()), (Some("diverged"), Some(&*files[1])));
    assert!(rows[1]["reason"].as_str().is_some_and(|reason| !reason.is_empty()));
    assert_eq!(world.read("err.txt").matches("no service runs here").count(), 1);
}

#[test]
fn a_drain_does_not_wait_for_a_service_that_was_killed() {
    let mut world = World::new();
    world.start();
    world.drop_job("a.yaml", job("a", "steps=100000"));
    world.wait_steps("a", 2);
    let unknown = world.run(&["undrain", "GPU 7"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("allowed: cpu 0"));
    let mut waits = world.command(&["drain", "--wait"]).spawn().expect("the program runs");
    world.wait_log("drained: all");
    assert!(waits.try_wait().expect("waits").is_none(), "a job runs");
    // The journal goes on saying that the job has the slot.
    world.kill_service();
    let status = world.wait("the end of the wait", || waits.try_wait().expect("waits"));
    assert_eq!(status.code(), Some(0));
    assert_eq!(world.run(&["undrain", "cpu 0"]).status.code(), Some(2), "the whole machine is drained");
    assert!(world.run(&["undrain"]).status.success());
}

#[test]
fn one_service_to_a_state_folder() {
    let mut world = World::new();
    world.start();
    world.wait_log("watches");
    world.wait("the lock", || world.path("state/lock").exists().then_some(()));
    world.drop_job("a.yaml", job("a", "steps=1"));
    world.wait_state("a", JobState::Completed);
    let second = world.run(&["run", "--once"]);
    assert_eq!(second.status.code(), Some(1));
    let text = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(text.contains("another boxwright service") && text.contains(&world.pid().to_string()), "{text}");
}

#[test]
fn an_idle_service_rests() {
    let mut world = World::new();
    world.start();
    world.drop_job("a.yaml", job("a", "steps=1"));
    world.wait_state("a", JobState::Completed);
    let ticks = |pid: u32| -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
        let fields: Vec<&str> = text[text.rfind(')').expect("has a name") + 2..].split(' ').collect();
        fields[11].parse::<u64>().expect("a number") + fields[12].parse::<u64>().expect("a number")
    };
    let before = ticks(world.pid());
    std::thread::sleep(Duration::from_secs(3));
    let used = ticks(world.pid()) - before;
    let resident = boxwright::adapters::process::resident_bytes(world.pid()).expect("it runs");
    println!(
        "idle service: {used} ticks (10 ms) in 3 s, {:.1} MiB resident",
        resident as f64 / f64::from(1 << 20)
    );
    assert!(used <= 15, "{used} ticks of 10 ms in 3 s");
    assert!(resident < 80 << 20, "{resident} bytes");
}
