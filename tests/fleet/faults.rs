//! Side services that die, stall, lose everything, come back: training goes on, and everything is delivered afterwards,
//! once and in order.

use std::time::{Duration, Instant};

use boxwright::job::state::JobState;
use redis::Commands;

use crate::park::{Park, stub_job};
use crate::servers::proxy::{Fault, Proxy};
use crate::world::World;

/// Lines of a service's log that speak of trouble.
fn complaints(world: &World) -> usize {
    world.logs().lines().filter(|line| line.contains("WARN") || line.contains("ERROR")).count()
}

#[test]
fn redis_killed_twenty_times_in_a_run_loses_nothing_and_heats_nothing() {
    let Some(mut park) = Park::new() else { return };
    let mut world = park.machine("box-1");
    world.start();
    for number in 0..6 {
        park.push(&[("config", &stub_job(&format!("job-{number}"), "steps=30,pause=0.03"))]);
    }
    world.wait_state("job-0", JobState::Running);
    let began = Instant::now();
    for round in 0..20 {
        park.redis.kill();
        // Some deaths are short, some longer than a heartbeat.
        std::thread::sleep(Duration::from_millis(20 + 30 * (round % 5)));
        park.redis.start_again();
        world.wait("Redis to be used again", || {
            let machine = park.hash("machine:box-1");
            (!machine.is_empty()).then_some(())
        });
    }
    for number in 0..6 {
        let result = park.wait_result(&world, &format!("job-{number}"));
        assert_eq!((result["status"].as_str(), result["attempt"].as_i64()), (Some("completed"), Some(1)));
        let steps = world.stub(&format!("job-{number}"), "steps");
        assert_eq!(steps.lines().count(), 30, "trained once");
        world.assert_no_violation(&format!("job-{number}"));
    }
    world.wait("an empty queue", || (park.queue_length() == 0).then_some(()));
    let seconds = began.elapsed().as_secs() as usize + 1;
    assert!(complaints(&world) <= 60 + seconds, "{} complaints in {seconds} s", complaints(&world));
    for number in 0..6 {
        let epochs: i64 = park.client().zcard(format!("metrics:job-{number}")).expect("reads");
        assert_eq!(epochs, 30, "the history of job-{number} is complete\n{}", world.logs());
    }
    world.end_service(libc::SIGTERM);
}

#[test]
fn a_paused_an_emptied_and_a_mutilated_redis_are_lived_through() {
    let Some(park) = Park::new() else { return };
    let mut world = park.machine("box-1");
    world.start();
    let disturb: [(&str, &dyn Fn()); 4] = [
        ("paused", &|| {
            park.redis.pause();
            let steps = world.stub("paused", "steps").lines().count();
            world.wait_steps("paused", steps + 10);
            park.redis.resume();
        }),
        ("emptied", &|| redis::cmd("FLUSHALL").query::<()>(&mut park.client()).expect("done")),
        ("ungrouped", &|| {
            let mut command = redis::cmd("XGROUP");
            command.arg("DESTROY").arg("training_queue").arg("training_group");
            assert_eq!(command.query::<i64>(&mut park.client()).expect("done"), 1);
        }),
        ("deleted", &|| assert_eq!(park.client().del::<_, i64>("training_queue").expect("done"), 1)),
    ];
    for (task_id, disturb) in disturb {
        park.push(&[("config", &stub_job(task_id, "steps=80,pause=0.03"))]);
        world.wait_steps(task_id, 5);
        disturb();
        let result = park.wait_result(&world, task_id);
        assert_eq!(
            (result["status"].as_str(), result["attempt"].as_i64()),
            (Some("completed"), Some(1)),
            "{task_id}"
        );
        world.assert_no_violation(task_id);
        let shown = world.wait("the end in the hash", || {
            let shown = park.hash(&format!("progress:{task_id}"));
            (shown.get("status").is_some_and(|state| state == "completed")).then_some(shown)
        });
        assert!(shown.len() >= 20, "all fields are there again: {shown:?}");
    }
    // And the queue works as before.
    park.push(&[("config", &stub_job("after", "steps=2"))]);
    park.wait_result(&world, "after");
    world.end_service(libc::SIGTERM);
}

#[test]
fn without_redis_the_folder_works_and_what_happened_is_told_when_redis_comes() {
    let Some(mut park) = Park::new() else { return };
    park.redis.kill();
    let mut world = park.machine("box-1");
    world.start();
    world.drop_job("a.yaml", stub_job("a", "steps=5"));
    world.wait_state("a", JobState::Completed);
    let status = world.run(&["status", "--services", "--json"]);
    let services: serde_json::Value = serde_json::from_slice(&status.stdout).expect("JSON");
    let redis = services
        .as_array()
        .expect("a list")
        .iter()
        .find(|line| line["service"] == "redis")
        .expect("is there");
    assert!(redis["waiting"].as_u64() >= Some(1) && redis["oldest_age_ms"].is_number(), "{services}");
    park.redis.start_again();
    assert_eq!(park.wait_result(&world, "a")["status"], "completed");
    world.wait("the hash of the job", || park.hash("progress:a").contains_key("status").then_some(()));
    let status = world.run(&["status", "--services"]);
    let text = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(text.contains("redis") && text.contains("up"), "{text}");
    world.end_service(libc::SIGTERM);
}

#[test]
fn a_store_that_is_down_for_the_whole_run_gets_everything_afterwards() {
    let Some(mut park) = Park::with_store() else { return };
    if let Some(store) = &mut park.store {
        store.kill();
    }
    let mut world = park.machine("box-1");
    world.start();
    park.push(&[("config", &stub_job("a", "steps=30,pause=0.02"))]);
    let result = park.wait_result(&world, "a");
    assert_eq!(result["status"], "completed", "the end does not wait for the store");
    world.wait_log("store does not work");
    if let Some(store) = &mut park.store {
        store.run();
    }
    world.wait("an empty outbox", || {
        let status = world.run(&["status", "--services", "--json"]);
        let services: serde_json::Value = serde_json::from_slice(&status.stdout).ok()?;
        services.as_array()?.iter().all(|line| line["waiting"] == 0).then_some(())
    });
    let status = world.run(&["status", "a", "--json"]);
    let detail = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(detail.contains("store_manifest") && detail.contains("best_url"), "{detail}");
    world.end_service(libc::SIGTERM);
}

#[test]
fn a_store_that_fails_one_request_in_three_or_is_slow_does_not_slow_the_training() {
    let Some(park) = Park::with_store() else { return };
    let proxy = Proxy::http(park.store.as_ref().expect("is there").address());
    let mut world = park.machine_with("box-1", &park.redis.url(), Some(&proxy.url()));
    world.start();
    let mut seconds = Vec::new();
    for (task_id, fault) in [
        ("calm", Fault::None),
        ("flaky", Fault::Answer { status: 503, one_in: 3, part: "" }),
        ("slow", Fault::Throttle(20_000)),
        ("black", Fault::BlackHole),
    ] {
        proxy.set(fault);
        let began = Instant::now();
        park.push(&[("config", &stub_job(task_id, "steps=60,pause=0.02"))]);
        assert_eq!(park.wait_result(&world, task_id)["status"], "completed");
        seconds.push((task_id, began.elapsed().as_secs_f64()));
    }
    proxy.set(Fault::None);
    for (task_id, taken) in &seconds[1..] {
        // The stub's own noise on a busy machine is larger than anything else; a wait of a request's limit would show.
        assert!(*taken < seconds[0].1 * 3.0 + 5.0, "{task_id}: {seconds:?}");
    }
    world.wait("an empty outbox", || {
        let status = world.run(&["status", "--services", "--json"]);
        let services: serde_json::Value = serde_json::from_slice(&status.stdout).ok()?;
        services.as_array()?.iter().all(|line| line["waiting"] == 0).then_some(())
    });
    for task_id in ["calm", "flaky", "slow", "black"] {
        let status = world.run(&["status", task_id, "--json"]);
        assert!(String::from_utf8_lossy(&status.stdout).contains("store_manifest"), "{task_id}");
    }
    world.end_service(libc::SIGTERM);
}
