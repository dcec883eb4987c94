//! What services show of their jobs in Redis, and what is left of it when they end.

use redis::Commands;

use crate::park::{Park, stub_job};

#[test]
fn a_service_that_ends_at_once_leaves_nothing_in_redis_for_ever() {
    let Some(park) = Park::new() else { return };
    let mut world = park.machine("box-1");
    world.drop_job("a.yaml", stub_job("a", "steps=2"));
    world.start_with(&["run", "--once"]);
    assert!(world.wait_service().success(), "{}", world.logs());
    let shown = park.hash("progress:a");
    assert_eq!((shown["status"].as_str(), shown["progress"].as_str()), ("completed", "100.0"));
    for key in ["progress:a", "stream:a", "stream:a:offset"] {
        let ttl_ms: i64 = park.client().pttl(key).expect("reads");
        assert!(ttl_ms > 0, "{key}: {ttl_ms}");
    }
}

#[test]
fn the_end_of_a_job_is_shown_by_the_next_start_when_the_service_was_killed_before() {
    let Some(park) = Park::new() else { return };
    let mut world = park.machine("box-1");
    world.start();
    park.push(&[("config", &stub_job("a", "steps=2"))]);
    park.wait_result(&world, "a");
    let ttl_ms = |key: &str| park.client().pttl::<_, i64>(key).expect("reads");
    let is_ended = |key: &str| ttl_ms(key) > 0;
    let keys = ["progress:a", "stream:a", "stream:a:offset"];
    world.wait("the end to be shown", || keys.iter().all(|key| is_ended(key)).then_some(()));
    world.kill_service();
    // As it is when the last that was sent was on its way at the end.
    let () = park.client().hset("progress:a", "status", "running").expect("set");
    for key in keys {
        let _: i64 = park.client().persist(key).expect("done");
    }
    world.start();
    world.wait("the end to be shown again", || keys.iter().all(|key| is_ended(key)).then_some(()));
    assert_eq!(park.hash("progress:a")["status"], "completed");
    world.end_service(libc::SIGTERM);
}

#[test]
fn a_key_that_is_in_the_way_of_one_job_hides_no_other() {
    let Some(park) = Park::new() else { return };
    let mut world = park.machine("box-1");
    for key in ["progress:a", "stream:a"] {
        let () = park.client().set(key, "in the way").expect("set");
    }
    world.start();
    park.push(&[("config", &stub_job("a", "steps=100000"))]);
    world.wait_log("the job is not shown, or not all of it");
    world.wait_steps("a", 2);
    assert!(world.run(&["stop", "a"]).status.success());
    park.wait_result(&world, "a");
    park.push(&[("config", &stub_job("b", "steps=3"))]);
    park.wait_result(&world, "b");
    world.wait("all of b to be shown", || {
        let shown = park.hash("progress:b");
        let of = |name: &str| shown.get(name).map(String::as_str);
        (of("EPOCH") == Some("3") && of("status") == Some("completed")).then_some(())
    });
    world.wait("the log of b", || park.client().exists("stream:b").ok().filter(|there| *there));
    assert_eq!(world.logs().matches("the job is not shown").count(), 1, "{}", world.logs());
    world.end_service(libc::SIGTERM);
}

#[test]
fn a_task_that_runs_again_shows_nothing_of_its_last_run() {
    let Some(park) = Park::new() else { return };
    let mut world = park.machine("box-1");
    world.start();
    park.push(&[("config", &stub_job("a", "steps=6"))]);
    park.wait_result(&world, "a");
    world.wait("the end of the log", || {
        let ttl_ms: i64 = park.client().pttl("stream:a").expect("reads");
        (ttl_ms > 0).then_some(())
    });
    // An hour passes.
    let () = park.client().del(&["stream:a", "stream:a:offset"]).expect("deleted");
    park.push(&[("config", &(stub_job("a", "steps=2,fail=11@1") + "# again\n"))]);
    world.wait("a second result", || (park.results_of("a").len() == 2).then_some(()));
    let shown = world.wait("all of its end", || {
        let shown = park.hash("progress:a");
        (shown.get("status")? == "failed" && shown.get("EPOCH")? == "1").then_some(shown)
    });
    assert_eq!((shown["TOTAL_EPOCHS"].as_str(), shown.get("best")), ("2", None), "{shown:?}");
    assert!(!shown["error_class"].is_empty(), "{shown:?}");
    let epochs: i64 = park.client().zcard("metrics:a").expect("reads");
    assert_eq!(epochs, 1, "of the second run alone");
    world.wait("the log", || {
        let rows: redis::streams::StreamRangeReply = park.client().xrange_all("stream:a").ok()?;
        let lines: Vec<String> = rows.ids.iter().filter_map(|row| row.get("value")).collect();
        let accepted = lines.iter().filter(|line| line.contains("is accepted")).count();
        assert!(accepted <= 1, "{lines:?}");
        (accepted == 1 && lines.iter().any(|line| line.contains("failed on purpose"))).then_some(())
    });
    world.end_service(libc::SIGTERM);
}
