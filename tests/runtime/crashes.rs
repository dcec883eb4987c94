//! `kill -9` of the service, of the trainer, of both, at any moment: nothing lost, nothing run twice to completion.

use std::time::Duration;

use boxwright::adapters::process;
use boxwright::job::state::{FailureClass, JobState};

use crate::world::{World, job};

/// The stub's process.
#[test]
fn a_killed_trainer_is_tried_again_from_its_checkpoint() {
    let mut world = World::new();
    world.start();
    world.drop_job("a.yaml", job("a", "steps=30"));
    world.wait_steps("a", 5);
    process::signal(world.stub_pid("a").expect("it runs"), libc::SIGKILL);
    let record = world.wait_state("a", JobState::Completed);
    assert_eq!((record.attempts, record.retries[&FailureClass::Killed]), (2, 1));
    assert!(!world.stub("a", "attempts").contains("2 from 0"), "{}", world.stub("a", "attempts"));
    world.assert_no_violation("a");
}

#[test]
fn a_killed_service_takes_its_trainer_along_and_the_job_continues() {
    let mut world = World::new();
    world.start();
    world.drop_job("a.yaml", job("a", "steps=60"));
    world.drop_job("b.yaml", job("b", "steps=2"));
    world.wait_steps("a", 5);
    let pid = world.stub_pid("a").expect("it runs");
    world.kill_service();
    world.wait("the trainer to die with the service", || process::started_ticks(pid).is_none().then_some(()));
    assert!(!world.record("a").expect("known").state.is_terminal());
    world.start();
    let record = world.wait_state("a", JobState::Completed);
    assert_eq!((record.attempts, record.retries.len(), record.interruptions), (2, 0, 1), "no budget is used");
    world.wait_state("b", JobState::Completed);
    world.assert_no_violation("a");
}

#[test]
fn a_trainer_that_finished_unheard_is_not_run_again() {
    let mut world = World::new();
    world.start();
    world.drop_job("a.yaml", job("a", "steps=8,pause=0.05"));
    world.wait_steps("a", 2);
    // The service sleeps while the trainer finishes, and never wakes.
    process::signal(world.pid(), libc::SIGSTOP);
    world.wait("the trainer to finish", || (!world.stub("a", "complete").is_empty()).then_some(()));
    world.kill_service();
    assert!(world.record("a").is_some_and(|record| record.state == JobState::Running));
    world.start();
    let record = world.wait_state("a", JobState::Completed);
    assert_eq!((record.attempts, world.stub("a", "attempts").lines().count()), (1, 1));
    assert_eq!(record.result.expect("from the file")["fitness"].as_f64(), Some(0.5));
    world.assert_no_violation("a");
}

#[test]
fn a_stop_survives_the_service() {
    let mut world = World::with("stop: {grace_seconds: 60}\n");
    world.start();
    world.drop_job("a.yaml", job("a", "steps=100000,deaf=1"));
    world.wait_steps("a", 2);
    world.write("configs/stop/stop_training_a.txt", "");
    world.wait_state("a", JobState::Stopping);
    world.kill_service();
    world.start();
    let record = world.wait_state("a", JobState::Cancelled);
    assert_eq!(record.attempts, 1);
    world.wait("the stop file to be put aside", || {
        world.path("configs/stop/stop_training_a.txt.done").exists().then_some(())
    });
    // Asked on the command line while no service runs, of a job that a dead service left running.
    world.drop_job("b.yaml", job("b", "steps=100000"));
    world.wait_steps("b", 2);
    world.kill_service();
    assert!(world.run(&["stop", "b"]).status.success());
    world.start();
    world.wait_state("b", JobState::Cancelled);
}

/// Splitmix64: the moments differ from round to round and are the same in every run.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[test]
fn kills_at_random_moments_lose_nothing_and_repeat_nothing() {
    const JOBS: usize = 5;
    const ROUNDS: usize = 14;
    let mut world = World::with("slots: {cpu: 2}\n");
    // Kills of the trainer must not exhaust the budget: this test counts losses, not retries.
    let service = world.read("service.yaml").replace("killed: {budget: 3", "killed: {budget: 100");
    world.write("service.yaml", service);
    for index in 0..JOBS {
        world.write(&format!("configs/j{index}.yaml"), job(&format!("j{index}"), "steps=40,pause=0.03"));
    }
    let mut seed = 0x00b0_c5ed;
    let (mut service_kills, mut trainer_kills) = (0, 0);
    world.start();
    for _ in 0..ROUNDS {
        std::thread::sleep(Duration::from_millis(40 + random(&mut seed) % 700));
        let which = random(&mut seed) % 3;
        if which != 0 {
            let victim = world.wait("a trainer to kill, or the end of all jobs", || {
                let running = (0..JOBS).find_map(|index| world.stub_pid(&format!("j{index}")));
                let over = world.records().iter().filter(|record| record.state.is_terminal()).count() == JOBS;
                running.map(Some).or(over.then_some(None))
            });
            trainer_kills += usize::from(victim.is_some_and(|pid| process::signal(pid, libc::SIGKILL)));
        }
        if which != 1 {
            world.kill_service();
            service_kills += 1;
            world.start();
        }
    }
    for index in 0..JOBS {
        let id = format!("j{index}");
        let record = world.wait_state(&id, JobState::Completed);
        assert_eq!(record.generation, 1, "{id} was accepted once");
        world.assert_no_violation(&id);
        // The result file counts, and the record says that it was read; a kill right behind it leaves no mark of the stub's.
        assert!(world.stub(&id, "complete").lines().count() <= 1, "{id} completed once");
        let mut steps: Vec<u32> =
            world.stub(&id, "steps").lines().map(|line| line.parse().expect("a number")).collect();
        steps.dedup();
        steps.sort_unstable();
        steps.dedup();
        assert_eq!(steps, (1..=40).collect::<Vec<_>>(), "{id} did every step");
    }
    assert_eq!(world.records().len(), JOBS, "nothing lost, nothing doubled");
    println!(
        "{JOBS} jobs completed once each through {service_kills} kills of the service and {trainer_kills} of trainers"
    );
    assert!(service_kills >= 3 && trainer_kills >= 3);
}
