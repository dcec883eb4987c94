//! Taking from streams and lists, priorities, waiting.

use std::time::{Duration, Instant};

use boxwright::adapters::queue::redis::{FleetError, QueueKind, Retry};

use super::{TOPIC, fleet, get, names, push, ready, run};
use crate::servers::redis::RedisServer;

#[tokio::test]
async fn the_documented_push_is_taken_in_order_and_once() {
    let Some(server) = RedisServer::start() else { return };
    let (a, b) = (ready(&server, "a").await, ready(&server, "b").await);
    let ids: Vec<String> = (0..5).map(|i| push(&server, &format!("/c/{i}.yaml"), &[])).collect();
    let first = a.take(2, 0, &[]).await.expect("taken");
    assert_eq!(names(&first), ["/c/0.yaml", "/c/1.yaml"]);
    assert_eq!(
        (first[0].entry.id.as_str(), first[0].original_id.as_str()),
        (ids[0].as_str(), ids[0].as_str())
    );
    assert_eq!(
        (first[0].entry.queue.as_str(), first[0].entry.is_list, first[0].deliveries),
        (TOPIC, false, 1)
    );
    assert_eq!(first[0].fields["trial_number"], "1");
    assert!(ids[0].starts_with(&format!("{}-", first[0].at_unix_ms)));
    assert_eq!(names(&b.take(10, 0, &[]).await.expect("taken")), ["/c/2.yaml", "/c/3.yaml", "/c/4.yaml"]);
    get::<i64>(&server, &["EXPIRE", TOPIC, "100"]);
    assert!(a.take(10, 0, &[]).await.expect("nothing").is_empty());
    assert_eq!(
        get::<i64>(&server, &["TTL", TOPIC]),
        -1,
        "the queue does not end with one message's lifetime"
    );
    assert!(a.take(0, 0, &[]).await.expect("nothing").is_empty());
}

#[tokio::test]
async fn urgent_entries_come_first_and_waiting_ones_rise() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = ready(&server, "a").await;
    let low = push(&server, "low", &["priority", "low"]);
    push(&server, "normal", &[]);
    push(&server, "odd", &["priority", "whatever"]);
    push(&server, "high", &["priority", "HIGH"]);
    let taken = fleet.take(10, 0, &[]).await.expect("taken");
    assert_eq!(names(&taken), ["high", "normal", "odd", "low"]);
    assert_eq!(
        (taken[0].entry.queue.as_str(), taken[3].entry.queue.as_str()),
        ("training_queue:high", "training_queue:low")
    );
    assert_eq!(
        (taken[3].original_id.as_str(), taken[3].fields["entry_id"].as_str()),
        (low.as_str(), low.as_str())
    );
    assert_eq!(taken[3].entry.id, low, "an entry keeps its id when it is sent to its class");

    // Two hours of waiting are worth more than two classes, when an hour is worth one.
    let hour = 3_600_000;
    let old = get::<Vec<u64>>(&server, &["TIME"])[0] * 1000 - 3 * hour;
    run::<i64>(&server, &["DEL", "training_queue:low"]).expect("deleted");
    get::<String>(&server, &["XADD", "training_queue:low", &format!("{old}-1"), "config_path", "waited"]);
    fleet.ensure_groups().await.expect("groups");
    push(&server, "urgent", &["priority", "high"]);
    assert_eq!(names(&fleet.take(2, hour, &[]).await.expect("taken")), ["waited", "urgent"]);
}

#[tokio::test]
async fn a_priority_far_behind_in_a_long_queue_is_seen_soon() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = ready(&server, "a").await;
    for i in 0..450 {
        push(&server, &format!("{i}"), &[]);
    }
    push(&server, "high", &["priority", "high"]);
    // Each look sees 200 new entries.
    let mut order = Vec::new();
    for _ in 0..4 {
        order.extend(
            names(&fleet.take(1, 0, &[]).await.expect("taken"))
                .into_iter()
                .map(str::to_owned)
                .collect::<Vec<_>>(),
        );
    }
    assert_eq!(order, ["0", "1", "high", "2"]);
}

#[tokio::test]
async fn with_another_group_on_the_topic_nothing_is_taken_from_it() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = ready(&server, "a").await;
    get::<String>(&server, &["XGROUP", "CREATE", TOPIC, "others", "0"]);
    push(&server, "normal", &[]);
    push(&server, "high", &["priority", "high"]);
    let taken = fleet.take(5, 0, &[]).await.expect("taken");
    assert_eq!(names(&taken), ["normal", "high"], "no class is told apart");
    for taken in &taken {
        assert!(fleet.acknowledge(&taken.entry).await.expect("acknowledged"));
    }
    assert_eq!(get::<usize>(&server, &["XLEN", TOPIC]), 2, "the other group still needs them");
}

#[tokio::test]
async fn odd_entries_do_no_harm() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = ready(&server, "a").await;
    let client = redis::Client::open(server.url()).expect("a client");
    let mut link = client.get_connection().expect("a connection");
    let mut many = redis::cmd("XADD");
    many.arg(TOPIC).arg("*");
    for i in 0..20_000 {
        many.arg(format!("f{i}")).arg(i);
    }
    many.arg("priority").arg("high").exec(&mut link).expect("added");
    redis::cmd("XADD")
        .arg(TOPIC)
        .arg("*")
        .arg("config_path")
        .arg(&b"\xff\xfe"[..])
        .exec(&mut link)
        .expect("added");
    let taken = fleet.take(10, 1, &[]).await.expect("taken");
    assert_eq!((taken.len(), taken[0].fields.len()), (2, 20_001));
    assert_eq!(taken[1].fields["config_path"], "\u{fffd}\u{fffd}");
    assert!(fleet.bury(&taken[0].entry, &taken[0].fields, "too many fields").await.expect("buried"));
}

#[tokio::test]
async fn lists_are_taken_in_the_order_of_pushing() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = fleet(&server, "a");
    assert_eq!(fleet.ensure_groups().await.expect("fine"), QueueKind::Missing);
    let plain = r#"{"task_id":"t1","config_path":"/c/1.yaml","user_code":"u"}"#;
    let double = serde_json::to_string(plain).expect("text");
    get::<i64>(&server, &["RPUSH", TOPIC, plain, &double]);
    assert_eq!(fleet.queue_kind().await.expect("kind"), QueueKind::List);
    assert_eq!(fleet.ensure_groups().await.expect("fine"), QueueKind::List);
    get::<i64>(&server, &["RPUSH", "recreate", "r1"]);
    get::<i64>(&server, &["RPUSH", "evaluate", "e1"]);
    let mut taken = fleet.take(3, 0, &[]).await.expect("taken");
    taken.extend(fleet.take(3, 0, &[]).await.expect("taken"));
    let queues: Vec<_> =
        taken.iter().map(|taken| (taken.entry.queue.as_str(), taken.fields["payload"].as_str())).collect();
    assert_eq!(queues, [(TOPIC, plain), (TOPIC, double.as_str()), ("recreate", "r1"), ("evaluate", "e1")]);
    assert!(taken.iter().all(|taken| taken.entry.is_list && taken.original_id.len() == 64));
    assert_eq!(
        get::<Vec<String>>(&server, &["LRANGE", "training_queue:processing:a", "0", "-1"]),
        [plain, &double]
    );
    assert_eq!(fleet.queue_kind().await.expect("kind"), QueueKind::Missing, "an emptied list is gone");
    assert_eq!(fleet.ensure_groups().await.expect("fine"), QueueKind::Missing);
    get::<i64>(&server, &["RPUSH", TOPIC, "again"]);
    assert_eq!(
        fleet.take(1, 0, &[]).await.expect("taken").len() + fleet.take(1, 0, &[]).await.expect("taken").len(),
        1
    );
    for taken in &taken {
        assert!(fleet.acknowledge(&taken.entry).await.expect("acknowledged"));
        assert!(!fleet.acknowledge(&taken.entry).await.expect("not twice"));
    }
    assert_eq!(get::<i64>(&server, &["LLEN", "training_queue:processing:a"]), 1);
}

#[tokio::test]
async fn the_topic_and_the_side_lists_take_turns() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = ready(&server, "a").await;
    for i in 0..3 {
        push(&server, &format!("{i}"), &[]);
        get::<i64>(&server, &["RPUSH", "evaluate", &format!("e{i}")]);
    }
    let mut queues = Vec::new();
    for _ in 0..6 {
        queues.push(fleet.take(1, 0, &[]).await.expect("taken").remove(0).entry.queue);
    }
    assert_eq!(queues, [TOPIC, "evaluate", TOPIC, "evaluate", TOPIC, "evaluate"]);
}

#[tokio::test]
async fn an_element_that_is_no_text_is_buried() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = fleet(&server, "a");
    let client = redis::Client::open(server.url()).expect("a client");
    let mut link = client.get_connection().expect("a connection");
    redis::cmd("RPUSH").arg(TOPIC).arg(&b"\xff"[..]).arg("good").exec(&mut link).expect("pushed");
    let taken = fleet.take(2, 0, &[]).await.expect("taken");
    assert_eq!((taken.len(), taken[0].fields["payload"].as_str()), (1, "good"));
    assert_eq!(get::<usize>(&server, &["XLEN", "training_queue:dead"]), 1);
    assert_eq!(get::<Vec<String>>(&server, &["LRANGE", "training_queue:processing:a", "0", "-1"]), ["good"]);
}

#[tokio::test]
async fn a_topic_that_is_no_queue_is_told() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = fleet(&server, "a");
    get::<String>(&server, &["SET", TOPIC, "x"]);
    assert_eq!(fleet.queue_kind().await.expect("kind"), QueueKind::Other("string".into()));
    let errors = [
        fleet.take(1, 0, &[]).await.expect_err("no queue"),
        fleet.ensure_groups().await.expect_err("no queue"),
    ];
    for error in errors {
        assert!(matches!(error, FleetError::WrongType { .. }), "{error}");
        assert_eq!(error.retry(), Retry::Never);
    }
}

#[tokio::test]
async fn waiting_ends_with_the_push_and_takes_nothing() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = ready(&server, "a").await;
    let begin = Instant::now();
    assert!(!fleet.wait_for_work(300, &[]).await.expect("waited"));
    assert!(begin.elapsed() >= Duration::from_millis(300) && begin.elapsed() < Duration::from_secs(3));
    let begin = Instant::now();
    let waiting = tokio::spawn({
        let fleet = fleet.clone();
        async move { fleet.wait_for_work(30_000, &[]).await }
    });
    // Other calls do not stand behind the one that waits.
    fleet.ping().await.expect("alive");
    push(&server, "x", &[]);
    assert!(waiting.await.expect("no panic").expect("waited"));
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert!(
        fleet.wait_for_work(0, &[]).await.expect("at once")
            || fleet.wait_for_work(100, &[]).await.expect("at once")
    );
    assert_eq!(fleet.take(5, 0, &[]).await.expect("taken").len(), 1);
    assert!(!fleet.wait_for_work(50, &[]).await.expect("waited"), "what was taken is no work");
    get::<i64>(&server, &["RPUSH", "recreate", "r"]);
    assert!(fleet.wait_for_work(30_000, &[]).await.expect("waited"));
}

#[tokio::test]
async fn waiting_sees_a_topic_appear_as_a_stream_or_a_list() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = fleet(&server, "a");
    fleet.ensure_groups().await.expect("groups");
    assert!(!fleet.wait_for_work(50, &[]).await.expect("waited"));
    push(&server, "x", &[]);
    let error = fleet.take(1, 0, &[]).await.expect_err("no group yet");
    assert!(error.is_no_group());
    let error = fleet.wait_for_work(1_000, &[]).await.expect_err("no group yet");
    assert!(error.is_no_group(), "{error}");
    fleet.ensure_groups().await.expect("groups");
    assert!(fleet.wait_for_work(1_000, &[]).await.expect("waited"));
    get::<i64>(&server, &["DEL", TOPIC]);
    get::<i64>(&server, &["LPUSH", TOPIC, "x"]);
    assert!(fleet.wait_for_work(1_000, &[]).await.expect("waited"));
}

#[tokio::test]
async fn a_group_that_was_destroyed_is_made_again_and_nothing_is_lost() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = ready(&server, "a").await;
    push(&server, "0", &[]);
    push(&server, "1", &[]);
    let taken = fleet.take(1, 0, &[]).await.expect("taken");
    assert!(fleet.acknowledge(&taken[0].entry).await.expect("done"));
    get::<i64>(&server, &["XGROUP", "DESTROY", TOPIC, "training_group"]);
    for error in [
        fleet.take(1, 0, &[]).await.expect_err("no group"),
        fleet.own_pending(10).await.expect_err("no group"),
        fleet.steal(0, 1).await.expect_err("no group"),
        fleet.wait_for_work(100, &[]).await.expect_err("no group"),
        fleet.renew_entries(&[taken[0].entry.clone()]).await.expect_err("no group"),
    ] {
        assert!(error.is_no_group() && error.retry() == Retry::After, "{}", error.chain());
    }
    fleet.ensure_groups().await.expect("groups");
    assert_eq!(
        names(&fleet.take(5, 0, &[]).await.expect("taken")),
        ["1"],
        "what was done does not come back"
    );

    let held = push(&server, "held", &[]);
    let held = fleet
        .take(1, 0, &[])
        .await
        .expect("taken")
        .into_iter()
        .find(|taken| taken.entry.id == held)
        .expect("it");
    get::<i64>(&server, &["DEL", TOPIC]);
    assert!(fleet.take(1, 0, &[]).await.expect("nothing").is_empty());
    let held_entries = std::slice::from_ref(&held.entry);
    assert_eq!(fleet.renew_entries(held_entries).await.expect("gone"), held_entries);
    assert!(
        !fleet.acknowledge(&held.entry).await.expect("gone")
            && !fleet.release(&held.entry).await.expect("gone")
    );
    assert!(fleet.own_pending(5).await.expect("nothing").is_empty());

    get::<String>(&server, &["FLUSHALL"]);
    assert!(fleet.take(1, 0, &[]).await.expect_err("no group").is_no_group());
    fleet.ensure_groups().await.expect("groups");
    assert!(fleet.take(1, 0, &[]).await.expect("empty").is_empty());
    push(&server, "2", &[]);
    assert!(fleet.take(1, 0, &[]).await.expect_err("no group").is_no_group());
    fleet.ensure_groups().await.expect("groups");
    assert_eq!(names(&fleet.take(1, 0, &[]).await.expect("taken")), ["2"]);
}
