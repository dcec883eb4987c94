//! What a machine holds of the queue: kept while it works on it, given back when it cannot, never lost and never doubled.

use boxwright::adapters::process;
use boxwright::job::state::JobState;
use redis::Commands;

use crate::park::{Park, job_file, stub_job};
use crate::servers::proxy::{Fault, Proxy};
use crate::world::{Mount, World, fill};

/// A message for a list.
fn element(world: &World, task_id: &str, stub: &str, more: &str) -> String {
    let path = job_file(&world.path(""), &format!("{task_id}.yaml"), &(stub_job(task_id, stub) + more));
    serde_json::json!({"task_id": task_id, "config_path": path}).to_string()
}

/// Lets a machine take this many jobs ahead.
fn set_prefetch(world: &World, jobs: usize) {
    let text = world.read("service.yaml");
    world.write("service.yaml", text.replace("redis: {", &format!("redis: {{prefetch: {jobs}, ")));
}

#[test]
fn elements_of_a_machine_that_was_cut_off_are_worked_on_once() {
    let Some(mut park) = Park::new() else { return };
    let proxy = Proxy::tcp(([127, 0, 0, 1], park.redis.port()).into());
    park.more = "slots: {cpu: 2}\n".into();
    let mut cut = park.machine_at("cut", &format!("redis://{}", proxy.address()));
    park.more = "slots: {cpu: 1}\n".into();
    let mut other = park.machine("other");
    cut.start();
    for task_id in ["one", "two"] {
        let text = element(&cut, task_id, "steps=150,pause=0.05", "");
        let _: i64 = park.client().rpush("training_queue", text).expect("pushed");
    }
    for task_id in ["one", "two"] {
        cut.wait_steps(task_id, 3);
    }
    other.start();
    other.wait_log("takes jobs from");
    proxy.set(Fault::BlackHole);
    let taken = other.wait("one of the jobs on the other machine", || {
        ["one", "two"].into_iter().find(|task_id| other.record(task_id).is_some())
    });
    proxy.set(Fault::None);
    cut.wait_state(taken, JobState::Moved);
    for task_id in ["one", "two"] {
        let result = park.wait_result(&cut, task_id);
        let owner = if task_id == taken { "other" } else { "cut" };
        assert_eq!(
            (result["status"].as_str(), result["machine_id"].as_str()),
            (Some("completed"), Some(owner))
        );
    }
    // What is left in the queue would be worked on again.
    cut.wait("nothing in the queue and in hand", || {
        let names = ["training_queue", "training_queue:processing:cut", "training_queue:processing:other"];
        let left: Vec<i64> = names.iter().map(|name| park.client().llen(name).expect("reads")).collect();
        (left == [0, 0, 0]).then_some(())
    });
    for world in [&mut cut, &mut other] {
        world.end_service(libc::SIGTERM);
    }
}

#[test]
fn what_a_drained_machine_had_taken_before_it_started_is_looked_at_when_it_is_undrained() {
    let Some(park) = Park::new() else { return };
    let mut machine = park.machine("machine");
    // As a service leaves it that is killed between taking an element and accepting it.
    let text = element(&machine, "a", "steps=1", "");
    let _: i64 = park.client().rpush("training_queue:processing:machine", text).expect("pushed");
    assert!(machine.run(&["drain"]).status.success());
    machine.start();
    machine.wait_log("takes jobs from");
    assert!(machine.record("a").is_none());
    assert!(machine.run(&["undrain"]).status.success());
    machine.wait_state("a", JobState::Completed);
    machine.end_service(libc::SIGTERM);
}

#[test]
fn a_machine_whose_journal_cannot_be_written_leaves_jobs_to_others() {
    let Some(park) = Park::new() else { return };
    let (mut full, mut other) = (park.machine("full"), park.machine("other"));
    let state = full.path("state");
    let Some(_mount) = Mount::tmpfs(&state, "size=2m") else {
        return eprintln!("SKIPPED: mounting a small file system needs root and a kernel that allows it");
    };
    full.start();
    full.wait_log("takes jobs from");
    let filler = fill(&state);
    park.push(&[("config", &stub_job("a", "steps=2"))]);
    full.wait_log("the journal does not take entries of the shared queue");
    other.start();
    assert_eq!(park.wait_result(&other, "a")["machine_id"], "other");
    other.end_service(libc::SIGTERM);
    park.push(&[("config", &stub_job("b", "steps=2"))]);
    std::fs::remove_file(filler).expect("is there");
    assert_eq!(park.wait_result(&full, "b")["machine_id"], "full");
    let dead: i64 = park.client().xlen("training_queue:dead").expect("reads");
    assert_eq!(dead, 0);
    full.end_service(libc::SIGTERM);
}

#[test]
fn elements_that_cannot_run_here_or_not_yet_do_not_hold_up_the_rest() {
    let Some(park) = Park::new() else { return };
    let mut world = park.machine("plain");
    let late = world.path("late.yaml");
    let of_late = serde_json::json!({"task_id": "late", "config_path": late}).to_string();
    let gifted = element(&world, "gifted", "steps=2", "requires_gpu: true\n");
    let plain = element(&world, "plain", "steps=2", "");
    let _: i64 = park.client().rpush("training_queue", &[&of_late, &gifted, &plain]).expect("pushed");
    world.start();
    assert_eq!(park.wait_result(&world, "plain")["status"], "completed");
    world.wait("several looks at the missing file", || {
        (world.logs().matches("cannot be read yet").count() >= 3).then_some(())
    });
    std::fs::write(late, stub_job("late", "steps=2")).expect("writable");
    assert_eq!(park.wait_result(&world, "late")["status"], "completed");
    // One look a heartbeat: the machine asks twelve times before it gives up, over several seconds.
    assert_eq!(park.client().exists("training_queue:dead"), Ok(false));
    let left: Vec<String> = park.client().lrange("training_queue", 0, -1).expect("reads");
    assert_eq!(left, [gifted], "left to a machine with a GPU");
    world.end_service(libc::SIGTERM);
}

#[test]
fn what_waits_on_a_drained_machine_is_given_back() {
    let Some(park) = Park::new() else { return };
    let (mut drained, mut other) = (park.machine("drained"), park.machine("other"));
    set_prefetch(&drained, 3);
    drained.start();
    park.push(&[("config", &stub_job("a", "steps=100000"))]);
    drained.wait_state("a", JobState::Running);
    for task_id in ["b", "c"] {
        park.push(&[("config", &stub_job(task_id, "steps=2"))]);
        drained.wait_state(task_id, JobState::Queued);
    }
    assert!(drained.run(&["drain"]).status.success());
    for task_id in ["b", "c"] {
        let record = drained.wait_state(task_id, JobState::Moved);
        assert_eq!(record.reason, "given back to the queue: every slot here is drained");
    }
    other.start();
    for task_id in ["b", "c"] {
        let result = park.wait_result(&other, task_id);
        assert_eq!((result["status"].as_str(), result["attempt"].as_i64()), (Some("completed"), Some(1)));
        assert_eq!(result["machine_id"], "other");
    }
    other.end_service(libc::SIGTERM);
    // What was given back may come again.
    assert!(drained.run(&["stop", "a"]).status.success());
    park.wait_result(&drained, "a");
    assert!(drained.run(&["undrain"]).status.success());
    park.push(&[("config", &stub_job("d", "steps=2"))]);
    assert_eq!(park.wait_result(&drained, "d")["machine_id"], "drained");
    drained.end_service(libc::SIGTERM);
}

#[test]
fn a_job_whose_gpu_is_out_of_use_goes_to_another_machine() {
    let Some(park) = Park::with_store() else { return };
    let (mut broken, mut sound) = (park.machine("broken"), park.machine("sound"));
    for (world, number) in [(&broken, 0), (&sound, 1)] {
        let gpu =
            format!(r#"{{"number":{number},"uuid":"GPU-{number}","name":"T","memory_bytes":8589934592}}"#);
        world.write("gpus.json", format!(r#"{{"gpus":[{gpu}],"obstacle":null}}"#));
    }
    broken.start();
    broken.wait_slot("GPU 0", "free");
    broken.write("gpu_faults", "GPU-0\n");
    park.push(&[("config", &stub_job("a", "steps=3,gpu_fail=0"))]);
    broken.wait_slot("GPU 0", "quarantined");
    let record = broken.wait_state("a", JobState::Moved);
    assert_eq!(record.reason, "given back to the queue: no slot here can take it for now");
    sound.start();
    let result = park.wait_result(&sound, "a");
    assert_eq!(
        (result["status"].as_str(), result["machine_id"].as_str()),
        (Some("completed"), Some("sound"))
    );
    assert_eq!(result["attempt"].as_i64(), Some(2), "{result}");
    for world in [&mut broken, &mut sound] {
        world.end_service(libc::SIGTERM);
    }
}

#[test]
fn a_service_keeps_its_jobs_while_it_ends_and_leaves_nothing_behind() {
    let Some(mut park) = Park::new() else { return };
    // Three leases long.
    park.more = "shutdown: {limit_seconds: 4}\n".into();
    let (mut ending, mut other) = (park.machine("ending"), park.machine("other"));
    ending.start();
    park.push(&[("config", &stub_job("a", "steps=100000,deaf=1"))]);
    ending.wait_steps("a", 2);
    other.start();
    other.wait_log("takes jobs from");
    let trainer = ending.stub_pid("a").expect("it runs");
    process::signal(ending.pid(), libc::SIGTERM);
    other.wait("the job", || other.record("a"));
    let is_there = std::path::Path::new(&format!("/proc/{trainer}")).exists();
    assert!(!is_there, "not while the first one might still save");
    ending.wait_service();
    assert_eq!(park.client().exists("machine:ending"), Ok(false), "others know at once");
    other.wait_steps("a", 2);
    other.end_service(libc::SIGKILL);
}

#[test]
fn hundreds_of_jobs_taken_ahead_keep_their_leases() {
    let Some(park) = Park::new() else { return };
    let mut hoarder = park.machine("hoarder");
    set_prefetch(&hoarder, 150);
    hoarder.start();
    park.push(&[("config", &stub_job("first", "steps=100000"))]);
    hoarder.wait_state("first", JobState::Running);
    for number in 0..150 {
        park.push(&[("config", &stub_job(&format!("ahead-{number}"), "steps=1"))]);
    }
    hoarder.wait("all taken ahead", || (hoarder.records().len() == 151).then_some(()));
    let mut other = park.machine("other");
    other.start();
    other.wait_log("takes jobs from");
    // Over many leases nothing becomes the other's, and no lease runs out.
    let begun = std::time::Instant::now();
    other.wait("six leases", || {
        let taken = other.records();
        assert!(taken.is_empty(), "{} was taken", taken[0].task_id);
        (begun.elapsed().as_millis() as u64 > 6 * 3 * crate::park::BEAT_MS).then_some(())
    });
    let gone = (0..150).filter(|number| {
        let exists: bool = park.client().exists(format!("lease:ahead-{number}")).expect("reads");
        !exists
    });
    assert_eq!(gone.count(), 0);
    hoarder.end_service(libc::SIGKILL);
    other.end_service(libc::SIGKILL);
}
