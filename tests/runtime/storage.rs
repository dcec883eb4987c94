//! Full disks and folders that cannot be written.

use boxwright::job::state::{FailureClass, JobState};

use crate::world::{Mount, World, fill, job};

/// Says loudly that a test needs rights that this user lacks.
fn skip(test: &str) {
    eprintln!("SKIPPED {test}: mounting a small file system needs root and a kernel that allows it");
}

#[test]
fn a_run_folder_that_cannot_be_made_is_a_storage_failure() {
    let mut world = World::new();
    world.write("blocked", "a file, not a folder");
    world.start();
    world.drop_job("a.yaml", format!("{}tempfile: blocked\n", job("a", "steps=1")));
    let record = world.wait_state("a", JobState::Failed);
    assert_eq!(
        (record.class, record.attempts),
        (Some(FailureClass::Storage), 2),
        "tried again, then given up"
    );
    assert!(record.reason.contains("cannot make the run folder"), "{}", record.reason);
    world.drop_job("b.yaml", job("b", "steps=1"));
    world.wait_state("b", JobState::Completed);
}

#[test]
fn a_read_only_run_folder_is_a_storage_failure() {
    let mut world = World::new();
    let runs = world.path("readonly");
    let Some(_mount) = Mount::tmpfs(&runs, "ro,size=1m") else {
        return skip("a_read_only_run_folder_is_a_storage_failure");
    };
    world.start();
    world.drop_job("a.yaml", format!("{}tempfile: readonly\n", job("a", "steps=1")));
    let record = world.wait_state("a", JobState::Failed);
    assert_eq!(record.class, Some(FailureClass::Storage));
    assert!(record.reason.contains("Read-only file system"), "{}", record.reason);
}

#[test]
fn a_full_disk_under_the_run_folder_is_tried_again_when_there_is_room() {
    let mut world = World::new();
    let runs = world.path("small");
    let Some(_mount) = Mount::tmpfs(&runs, "size=256k") else {
        return skip("a_full_disk_under_the_run_folder_is_tried_again_when_there_is_room");
    };
    std::fs::write(runs.join("filler"), vec![0u8; 255 << 10]).unwrap_or_default();
    let service = world.read("service.yaml").replace(
        "storage: {budget: 1, delay_seconds: 0.05}",
        "storage: {budget: 50, delay_seconds: 0.2, delay_seconds_max: 0.3}",
    );
    world.write("service.yaml", service);
    world.start();
    world.drop_job("a.yaml", format!("{}tempfile: small\n", job("a", "steps=2")));
    let record = world.wait("a retry for want of room", || {
        world.record("a").filter(|record| record.retries.contains_key(&FailureClass::Storage))
    });
    assert!(!record.state.is_terminal());
    std::fs::remove_file(runs.join("filler")).expect("is there");
    world.wait_state("a", JobState::Completed);
}

#[test]
fn a_full_disk_under_the_journal_loses_nothing() {
    let mut world = World::new();
    let state = world.path("state");
    let Some(_mount) = Mount::tmpfs(&state, "size=2m") else {
        return skip("a_full_disk_under_the_journal_loses_nothing");
    };
    world.start();
    world.drop_job("a.yaml", job("a", "steps=60,pause=0.05"));
    world.wait_steps("a", 2);
    let filler = fill(&state);
    world.drop_job("b.yaml", job("b", "steps=2"));
    world.wait("the trainer to finish all the same", || {
        (!world.stub("a", "complete").is_empty()).then_some(())
    });
    world.wait_log("could not");
    std::fs::remove_file(filler).expect("is there");
    let record = world.wait_state("a", JobState::Completed);
    assert_eq!(record.attempts, 1, "the end was written down when there was room");
    world.wait_state("b", JobState::Completed);
    world.assert_no_violation("a");
}
