//! What the journal forgets, and what must not come back for it.

use boxwright::adapters::queue::JobStore;
use boxwright::adapters::queue::journal::Journal;
use boxwright::job::state::JobState;

use crate::world::{World, job};

#[test]
fn old_jobs_are_forgotten_and_their_files_do_not_run_again() {
    let mut world = World::with("journal: {keep_days: 1}\nstore: {folder: null}\n");
    world.start();
    for name in ["lies", "gone", "young"] {
        world.drop_job(&format!("{name}.yaml"), job(name, "steps=1"));
    }
    for name in ["lies", "gone", "young"] {
        world.wait_state(name, JobState::Completed);
    }
    world.end_service(libc::SIGTERM);
    std::fs::remove_file(world.path("configs/gone.yaml")).expect("removed");
    let hand = rusqlite::Connection::open(Journal::path(&world.path("state"))).expect("opens");
    let days = "86400000 * 2";
    hand.execute_batch(&format!(
        "UPDATE jobs SET finished = finished - {days} WHERE task_id <> 'young'; \
         UPDATE intake SET at = at - {days} WHERE task_id <> 'young'"
    ))
    .expect("aged");
    world.start();
    world.wait_log("the journal forgets 2 old jobs and 1 verdicts on files that are gone");
    // The file that lies there is looked at, and known.
    world.wait_log("is unchanged");
    world.drop_job("last.yaml", job("last", "steps=1"));
    world.wait_state("last", JobState::Completed);
    let records = world.records();
    let ids: Vec<&str> = records.iter().map(|record| record.task_id.as_str()).collect();
    assert_eq!(ids, ["last", "young"]);
    let count = |text: &str| hand.query_row(text, [], |row| row.get::<_, i64>(0)).expect("reads");
    assert_eq!(count("SELECT count(*) FROM events WHERE seq NOT IN (SELECT seq FROM jobs)"), 0);
    assert_eq!(count("SELECT count(*) FROM intake WHERE task_id = 'lies'"), 1);
    assert_eq!(count("SELECT count(*) FROM intake WHERE task_id = 'gone'"), 0);
    let journal = Journal::open_existing(&world.path("state")).expect("opens").expect("is there");
    assert!(!journal.has_active().expect("reads"));
    world.end_service(libc::SIGTERM);
}
