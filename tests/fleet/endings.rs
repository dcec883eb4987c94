//! Jobs that have ended and whose result cannot be told yet: they stay with their machine, and nobody runs them again.

use std::time::{Duration, Instant};

use boxwright::job::state::JobState;
use redis::Commands;

use crate::park::{BEAT_MS, Park, stub_job};
use crate::world::World;

/// A machine is dead after this long without a sign of life.
const LEASE: Duration = Duration::from_millis(BEAT_MS * 3);

/// Waits until the machine `two` has looked for entries of the dead for several leases.
fn wait_looks(park: &Park, two: &World) {
    let seen = || park.hash("machine:two").get("seen").and_then(|text| text.parse::<u128>().ok());
    let first = two.wait("a sign of life", seen);
    two.wait("several leases", || seen().filter(|now| *now > first + LEASE.as_millis() * 5).map(drop));
}

fn assert_one_result_from(park: &Park, one: &World, two: &World) {
    let result = park.wait_result(one, "a");
    assert_eq!((result["status"].as_str(), result["machine_id"].as_str()), (Some("completed"), Some("one")));
    assert_eq!(result["attempt"].as_i64(), Some(1));
    wait_looks(park, two);
    assert_eq!(park.results_of("a").len(), 1);
    assert!(two.record("a").is_none(), "{}", two.logs());
    one.assert_no_violation("a");
    one.wait("an empty queue", || (park.queue_length() == 0).then_some(()));
    one.wait("a free lease", || (!park.client().exists::<_, bool>("lease:a").expect("reads")).then_some(()));
}

#[test]
fn a_job_that_has_ended_stays_this_machines_until_its_result_is_out() {
    let Some(park) = Park::new() else { return };
    let (mut one, mut two) = (park.machine("one"), park.machine("two"));
    one.start();
    park.push(&[("config", &stub_job("a", "steps=20,pause=0.05"))]);
    one.wait_steps("a", 3);
    two.start();
    two.wait_log("takes jobs from");
    // No result can be published, and all else works.
    let () = park.client().set("results_queue", "in the way").expect("set");
    one.wait_state("a", JobState::Completed);
    wait_looks(&park, &two);
    assert!(two.record("a").is_none(), "{}", two.logs());
    assert_eq!(park.hash("lease:a").get("owner").map(String::as_str), Some("one"));
    let () = park.client().del("results_queue").expect("deleted");
    assert_one_result_from(&park, &one, &two);
    for world in [&mut one, &mut two] {
        world.end_service(libc::SIGTERM);
    }
}

#[test]
fn a_job_that_ends_while_redis_is_away_has_one_result_from_its_machine() {
    let Some(mut park) = Park::new() else { return };
    // A courier that found Redis away by itself would be asleep for longer than any lease.
    park.more = "outbox: {delay_seconds: 3600, delay_seconds_max: 3600}\n".into();
    let (mut one, mut two) = (park.machine("one"), park.machine("two"));
    one.start();
    park.push(&[("config", &stub_job("a", "steps=30,pause=0.05"))]);
    one.wait_steps("a", 3);
    two.start();
    two.wait_log("takes jobs from");
    park.redis.kill();
    let began = Instant::now();
    one.wait_state("a", JobState::Completed);
    one.wait_log("redis does not work; what is for it waits");
    one.wait("an outage that is longer than the lease", || (began.elapsed() > LEASE * 3).then_some(()));
    park.redis.start_again();
    assert_one_result_from(&park, &one, &two);
    for world in [&mut one, &mut two] {
        world.end_service(libc::SIGTERM);
    }
}
