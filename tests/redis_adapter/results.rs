//! Results and metrics: once each, and from the owner only.

use std::collections::BTreeMap;

use boxwright::adapters::queue::redis::{Acquired, Fleet, Published, RedisSink};
use boxwright::adapters::sink::{AfterFailure, DeliveryError, Receipt, Sink};
use boxwright::job::delivery::{
    Delivery, DeliveryBody, EpochBody, QueueEntry, ResultBody, RunMetricsBody, RunRef, SinkName,
};
use serde_json::{Map, Value as Json, json};

use super::{TOPIC, fleet, get, push, ready, task};
use crate::servers::redis::RedisServer;

pub fn run_ref(id: &str, machine: &str, fence: u64) -> RunRef {
    RunRef {
        task_id: task(id),
        instance: format!("{id}-instance"),
        study_name: "s".into(),
        version: None,
        trial_number: 4,
        kind: "yolo".into(),
        run_dir: "/r".into(),
        fence,
        machine_id: machine.into(),
    }
}

pub fn result(id: &str, machine: &str, fence: u64, fitness: Json, entry: Option<QueueEntry>) -> ResultBody {
    let message =
        json!({"task_id": id, "trial_number": 4, "attempt": 2, "status": "completed", "fitness": fitness});
    ResultBody { run: run_ref(id, machine, fence), message, entry }
}

async fn own(fleet: &Fleet, id: &str) -> u64 {
    match fleet.acquire(&task(id), &format!("{id}-instance"), 60_000).await.expect("an answer") {
        Acquired::Mine { fence, .. } => fence,
        held => panic!("{held:?}"),
    }
}

fn entries(server: &RedisServer) -> Vec<BTreeMap<String, String>> {
    let rows: Vec<(String, BTreeMap<String, String>)> = get(server, &["XRANGE", "results_queue", "-", "+"]);
    rows.into_iter().map(|(_, fields)| fields).collect()
}

#[tokio::test]
async fn a_result_is_published_once_and_settles_everything() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = ready(&server, "a").await;
    push(&server, "x", &[]);
    let entry = fleet.take(1, 0, &[]).await.expect("taken").remove(0).entry;
    let fence = own(&fleet, "t").await;
    assert!(!fleet.is_done("t-instance").await.expect("an answer"));
    let body = result("t", "a", fence, json!(0.1 + 0.2), Some(entry));
    assert_eq!(fleet.publish_result(&body, fence).await.expect("published"), Published::Published);
    assert_eq!(fleet.publish_result(&body, fence).await.expect("an answer"), Published::Duplicate);
    assert!(fleet.is_done("t-instance").await.expect("an answer"));
    let all = entries(&server);
    assert_eq!(all.len(), 1);
    let names: Vec<&str> = all[0].keys().map(String::as_str).collect();
    assert_eq!(names, ["attempt", "fitness", "result", "status", "task_id", "trial_number"]);
    assert_eq!(
        (all[0]["task_id"].as_str(), all[0]["trial_number"].as_str(), all[0]["attempt"].as_str()),
        ("t", "4", "2")
    );
    assert_eq!((all[0]["fitness"].as_str(), all[0]["status"].as_str()), ("0.30000000000000004", "completed"));
    assert_eq!(serde_json::from_str::<Json>(&all[0]["result"]).expect("JSON"), body.message);
    assert_eq!(get::<usize>(&server, &["XLEN", TOPIC]), 0, "the entry is done with");
    assert_eq!(fleet.holder(&task("t")).await.expect("an answer"), None, "the lease is free");
    let ttl: i64 = get(&server, &["PTTL", "{results_queue}:seen:t-instance"]);
    assert!(ttl > 29 * 24 * 3_600_000);

    for (id, fitness, text) in [("u", json!(null), ""), ("v", json!(1), "1.0"), ("w", json!(1e-7), "1e-7")] {
        let body = result(id, "a", 1, fitness, None);
        assert_eq!(fleet.publish_result(&body, 1).await.expect("published"), Published::Published);
        assert_eq!(entries(&server).last().expect("one")["fitness"], text);
    }
}

#[tokio::test]
async fn an_entry_of_a_list_is_settled_with_its_result() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = fleet(&server, "a");
    get::<i64>(&server, &["RPUSH", "recreate", "job"]);
    fleet.ensure_groups().await.expect("groups");
    let entry = fleet.take(1, 0, &[]).await.expect("taken").remove(0).entry;
    let body = result("t", "a", 5, json!(null), Some(entry));
    assert_eq!(fleet.publish_result(&body, 5).await.expect("published"), Published::Published);
    assert_eq!(get::<i64>(&server, &["EXISTS", "recreate:processing:a"]), 0);
}

#[tokio::test]
async fn the_old_owner_is_fenced_off_and_the_new_one_publishes() {
    let Some(server) = RedisServer::start() else { return };
    let (a, b) = (ready(&server, "a").await, ready(&server, "b").await);
    push(&server, "x", &[]);
    let entry = a.take(1, 0, &[]).await.expect("taken").remove(0).entry;
    let old = own(&a, "t").await;
    get::<i64>(&server, &["DEL", "lease:t"]);
    let new = own(&b, "t").await;
    let late = result("t", "a", old, json!(0.5), Some(entry.clone()));
    let fenced = Published::Fenced { owner: "b".into(), fence: new };
    assert_eq!(a.publish_result(&late, old).await.expect("an answer"), fenced);
    assert!(entries(&server).is_empty() && get::<usize>(&server, &["XLEN", TOPIC]) == 1);
    let body = result("t", "b", new, json!(0.5), Some(entry));
    assert_eq!(b.publish_result(&body, new).await.expect("published"), Published::Published);
    // Now that the lease is gone, the number alone fences.
    assert_eq!(a.publish_result(&late, old).await.expect("an answer"), fenced);
    assert_eq!(entries(&server).len(), 1);

    // A later run of the same task does not keep the result of this one from being published.
    let mut other = result("t", "a", old, json!(0.1), None);
    other.run.instance = "earlier".into();
    assert_eq!(a.publish_result(&other, old).await.expect("published"), Published::Published);
}

#[tokio::test]
async fn a_queue_that_changed_does_not_keep_a_result_back() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = fleet(&server, "a");
    get::<String>(&server, &["SET", TOPIC, "no stream"]);
    let entry = QueueEntry { queue: TOPIC.into(), id: "1-1".into(), is_list: false };
    let body = result("t", "a", 1, json!(0.5), Some(entry));
    assert_eq!(fleet.publish_result(&body, 1).await.expect("published"), Published::Published);
    assert_eq!(fleet.publish_result(&body, 1).await.expect("an answer"), Published::Duplicate);
}

#[tokio::test]
async fn metrics_of_an_epoch_replace_those_before() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = fleet(&server, "a");
    let fence = own(&fleet, "t").await;
    let epoch = |epoch: u32, value: f64, fence: u64| EpochBody {
        run: run_ref("t", "a", fence),
        epoch,
        metrics: Map::from_iter([("train/box_loss".to_owned(), json!(value))]),
        at_unix_ms: 1_700_000_000_123,
    };
    for (number, value) in [(1, 0.5), (2, 0.25), (2, 0.125), (10, 0.1)] {
        let noted = fleet.publish_metrics(&epoch(number, value, fence)).await.expect("noted");
        assert_eq!(noted, Published::Published);
    }
    assert!(matches!(
        fleet.publish_metrics(&epoch(3, 1.0, 1)).await.expect("an answer"),
        Published::Fenced { .. }
    ));
    let rows: Vec<String> = get(&server, &["ZRANGE", "metrics:t", "0", "-1"]);
    let rows: Vec<Json> = rows.iter().map(|row| serde_json::from_str(row).expect("JSON")).collect();
    assert_eq!(
        rows.iter().map(|row| row["epoch"].as_u64()).collect::<Vec<_>>(),
        [Some(1), Some(2), Some(10)]
    );
    assert_eq!(
        rows[1],
        json!({
            "epoch": 2,
            "metrics": {"train/box_loss": 0.125},
            "timestamp": "2023-11-14T22:13:20.123Z"
        })
    );
    assert!(get::<i64>(&server, &["PTTL", "metrics:t"]) > 29 * 24 * 3_600_000);
}

#[tokio::test]
async fn the_history_of_metrics_is_that_of_the_last_run() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = fleet(&server, "a");
    let note = async |instance: &str, fence: u64, epoch: u32| {
        let run = RunRef { instance: instance.into(), ..run_ref("t", "a", fence) };
        let body = EpochBody { run, epoch, metrics: Map::new(), at_unix_ms: i64::from(epoch) };
        fleet.publish_metrics(&body).await.expect("an answer")
    };
    let epochs = || -> Vec<u64> {
        let rows: Vec<String> = get(&server, &["ZRANGE", "metrics:t", "0", "-1"]);
        let epoch = |row: &String| serde_json::from_str::<Json>(row).expect("JSON")["epoch"].as_u64();
        rows.iter().filter_map(epoch).collect()
    };
    for epoch in 1..=6 {
        note("first", 10, epoch).await;
    }
    // The same task id again, with fewer epochs; a delivery that is repeated changes nothing.
    for epoch in [1, 1, 2, 3] {
        assert_eq!(note("second", 20, epoch).await, Published::Published);
    }
    assert_eq!(epochs(), [1, 2, 3]);
    assert_eq!(note("first", 10, 5).await, Published::Duplicate, "what was late of the first run");
    assert_eq!(epochs(), [1, 2, 3]);
    // A run that goes on from the second epoch of the one before keeps its first two.
    for epoch in [3, 4] {
        note("third", 30, epoch).await;
    }
    assert_eq!(epochs(), [1, 2, 3, 4]);
    assert_eq!(note("second", 20, 2).await, Published::Published);
    assert_eq!(note("second", 20, 3).await, Published::Duplicate);
    assert!(get::<i64>(&server, &["PTTL", "metrics:t:run"]) > 29 * 24 * 3_600_000);
}

#[tokio::test]
async fn deliveries_of_the_outbox_are_made_once_and_wait_for_what_can_be_put_right() {
    let Some(mut server) = RedisServer::start() else { return };
    let fleet = fleet(&server, "a");
    let fence = own(&fleet, "t").await;
    let sink = RedisSink::new(fleet.clone());
    let delivery = |body| Delivery {
        id: 1,
        sink: SinkName::Redis,
        lane: "t".into(),
        key: "t:1".into(),
        body,
        attempts: 0,
        at_unix_ms: 0,
    };
    let good = delivery(DeliveryBody::Result(result("t", "a", fence, json!(0.5), None)));
    get::<i64>(&server, &["LPUSH", "results_queue", "a list"]);
    let verdict = |answer: Result<Receipt, DeliveryError>| answer.expect_err("not made").verdict();
    assert_eq!(verdict(sink.deliver(&good).await), AfterFailure::AllWait);
    get::<i64>(&server, &["DEL", "results_queue"]);
    for _ in 0..2 {
        assert_eq!(sink.deliver(&good).await.expect("delivered"), Receipt::default());
    }
    assert_eq!(entries(&server).len(), 1);
    let epoch = EpochBody { run: run_ref("t", "a", fence), epoch: 1, metrics: Map::new(), at_unix_ms: 0 };
    sink.deliver(&delivery(DeliveryBody::EpochMetrics(epoch))).await.expect("delivered");
    assert_eq!(get::<i64>(&server, &["ZCARD", "metrics:t"]), 1);
    let shown: BTreeMap<String, String> = get(&server, &["HGETALL", "progress:t"]);
    let of = |name: &str| shown[name].as_str();
    assert_eq!((of("status"), of("progress"), of("eta_seconds")), ("completed", "100.0", ""));
    let old = delivery(DeliveryBody::Result(result("t", "a", fence - 1, json!(0.5), None)));
    assert!(matches!(sink.deliver(&old).await, Err(DeliveryError::Fenced { .. })));
    let alien = RunMetricsBody { run: run_ref("t", "a", fence), points: Vec::new() };
    assert_eq!(verdict(sink.deliver(&delivery(DeliveryBody::RunMetrics(alien))).await), AfterFailure::GiveUp);
    server.kill();
    assert_eq!(verdict(sink.deliver(&good).await), AfterFailure::AllWait);
}

#[tokio::test]
async fn a_key_of_another_type_holds_up_no_more_than_it_must() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = ready(&server, "a").await;
    let sink = RedisSink::new(fleet.clone());
    let delivery = |body| Delivery {
        id: 1,
        sink: SinkName::Redis,
        lane: "t".into(),
        key: "k".into(),
        body,
        attempts: 0,
        at_unix_ms: 0,
    };
    let verdict = |answer: Result<Receipt, DeliveryError>| answer.expect_err("not made").verdict();
    let fence = own(&fleet, "t").await;
    let good = delivery(DeliveryBody::Result(result("t", "a", fence, json!(0.5), None)));
    let epoch = |id: &str| {
        let run = run_ref(id, "a", fence);
        delivery(DeliveryBody::EpochMetrics(EpochBody { run, epoch: 1, metrics: Map::new(), at_unix_ms: 0 }))
    };
    // Metrics are given up alone.
    get::<String>(&server, &["SET", "metrics:t", "in the way"]);
    assert_eq!(verdict(sink.deliver(&epoch("t")).await), AfterFailure::GiveUp);
    sink.deliver(&epoch("u")).await.expect("delivered");
    // A key of one job lets that job wait.
    get::<String>(&server, &["SET", "fence:v", "in the way"]);
    let body = result("v", "a", 1, json!(0.5), None);
    assert_eq!(verdict(sink.deliver(&delivery(DeliveryBody::Result(body))).await), AfterFailure::LaneWaits);
    // That of the results lets all wait.
    get::<String>(&server, &["SET", "results_queue", "in the way"]);
    assert_eq!(verdict(sink.deliver(&good).await), AfterFailure::AllWait);
    get::<i64>(&server, &["DEL", "results_queue"]);
    // What is shown does not undo what was published.
    get::<String>(&server, &["SET", "progress:t", "in the way"]);
    sink.deliver(&good).await.expect("delivered");
    assert_eq!(entries(&server).len(), 1);
    assert!(fleet.is_done("t-instance").await.expect("an answer"));
}
