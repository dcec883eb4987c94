//! Progress, logs, machines, GPUs, cancelling, caches, warnings.

use std::collections::BTreeMap;

use boxwright::adapters::queue::redis::{
    Announced, CacheCounts, Fleet, GpuOwner, Logged, SlotReport, Warning,
};
use boxwright::job::service::RedisConfig;
use serde_json::Value as Json;

use super::{config, fleet, get, task};
use crate::servers::redis::RedisServer;
use crate::servers::wait;

fn fields(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[tokio::test]
async fn progress_is_a_hash_and_a_message() {
    let Some(server) = RedisServer::start() else { return };
    let plain = fleet(&server, "a");
    let client = redis::Client::open(server.url()).expect("a client");
    let mut link = client.get_connection().expect("a connection");
    link.set_read_timeout(Some(std::time::Duration::from_secs(20))).expect("a limit");
    let mut channel = link.as_pubsub();
    channel.subscribe(&["progress:updates", "progress:updates:t"]).expect("subscribed");
    plain
        .progress(&task("t"), &fields(&[("EPOCH", "3"), ("status", "running")]), false)
        .await
        .expect("shown");
    let shown: BTreeMap<String, String> = get(&server, &["HGETALL", "progress:t"]);
    assert_eq!((shown["EPOCH"].as_str(), shown.len()), ("3", 2));
    assert_eq!(get::<i64>(&server, &["PTTL", "progress:t"]), -1, "a running job's progress does not end");
    let mut channels = Vec::new();
    for _ in 0..2 {
        let message = channel.get_message().expect("a message");
        channels.push(message.get_channel_name().to_owned());
        let text: String = message.get_payload().expect("text");
        let json: Json = serde_json::from_str(&text).expect("JSON");
        assert_eq!((json["task_id"].as_str(), json["EPOCH"].as_str()), (Some("t"), Some("3")));
    }
    channels.sort();
    assert_eq!(channels, ["progress:updates", "progress:updates:t"]);
    plain.progress(&task("t"), &fields(&[("status", "completed")]), true).await.expect("shown");
    let ttl: i64 = get(&server, &["PTTL", "progress:t"]);
    assert!((1..=30 * 60_000).contains(&ttl), "{ttl}");
    plain.progress(&task("t"), &fields(&[("status", "running")]), false).await.expect("shown");
    assert_eq!(get::<i64>(&server, &["PTTL", "progress:t"]), -1, "it runs again");
    assert_eq!(get::<i64>(&server, &["EXISTS", "EPOCH"]), 0);
    plain.progress(&task("t"), &[], false).await.expect("nothing to show");

    let both = RedisConfig { transposed_progress: true, ..config(&server) };
    let both = Fleet::new(&both, "a", "1").expect("a handle");
    let shown = fields(&[("EPOCH", "4"), ("training_queue", "no")]);
    both.progress(&task("t"), &shown, false).await.expect("shown");
    assert_eq!(get::<String>(&server, &["HGET", "EPOCH", "progress:t"]), "4");
    assert!((1..=1200).contains(&get::<i64>(&server, &["TTL", "EPOCH"])));
    assert_eq!(get::<String>(&server, &["TYPE", "training_queue"]), "none", "no key of ours is overwritten");
    plain.job_gone(&task("t")).await.expect("gone");
    assert_eq!(get::<i64>(&server, &["EXISTS", "progress:t"]), 0);
}

#[tokio::test]
async fn every_line_of_a_log_arrives_once() {
    let Some(server) = RedisServer::start() else { return };
    let small = RedisConfig { log_lines_max: 100, log_ttl_ms: 5_000, ..config(&server) };
    let a = Fleet::new(&small, "a", "1").expect("a handle");
    let lines = |from: usize, to: usize| (from..to).map(|i| format!("line {i:05}\n")).collect::<Vec<_>>();
    let append = async |from: usize, to: usize| {
        let offsets = (from as u64 * 11, to as u64 * 11);
        a.log_lines(&task("t"), offsets.0, offsets.1, &lines(from, to)).await.expect("an answer")
    };
    assert_eq!(append(0, 3).await, Logged::Appended { offset: 33 });
    assert_eq!(append(0, 3).await, Logged::ContinueAt { offset: 33 }, "a repeated call appends nothing");
    assert_eq!(append(3, 4).await, Logged::Appended { offset: 44 });
    let rows: Vec<(String, BTreeMap<String, String>)> = get(&server, &["XRANGE", "stream:t", "-", "+"]);
    let values: Vec<&str> = rows.iter().map(|(_, fields)| fields["value"].as_str()).collect();
    assert_eq!(values, ["line 00000\n", "line 00001\n", "line 00002\n", "line 00003\n"]);
    assert_eq!(get::<i64>(&server, &["PTTL", "stream:t"]), -1);
    append(4, 2_000).await;
    let length: usize = get(&server, &["XLEN", "stream:t"]);
    assert!((100..400).contains(&length), "{length} lines are kept");

    // Another machine continues the job with a log of its own.
    let b = Fleet::new(&small, "b", "1").expect("a handle");
    let appended = b.log_lines(&task("t"), 0, 2, &["b\n".to_owned()]).await.expect("an answer");
    assert_eq!(appended, Logged::Appended { offset: 2 });
    assert_eq!(append(2_000, 2_001).await, Logged::Appended { offset: 22_011 });

    a.log_end(&task("t")).await.expect("ended");
    for key in ["stream:t", "stream:t:offset"] {
        assert!((1..=5_000).contains(&get::<i64>(&server, &["PTTL", key])));
    }
    assert_eq!(append(2_001, 2_002).await, Logged::Appended { offset: 22_022 });
    assert_eq!(get::<i64>(&server, &["PTTL", "stream:t"]), -1, "the job goes on");
    get::<String>(&server, &["FLUSHALL"]);
    assert_eq!(append(2_002, 2_003).await, Logged::ContinueAt { offset: 0 }, "the server lost it");
    assert_eq!(append(0, 5).await, Logged::Appended { offset: 55 });
}

#[tokio::test]
async fn machines_and_slots_are_listed_and_lost() {
    let Some(server) = RedisServer::start() else { return };
    let quick = RedisConfig { heartbeat_interval_ms: 100, ..config(&server) };
    let a = Fleet::new(&config(&server), "a", "1").expect("a handle");
    let b = Fleet::new(&quick, "b", "1").expect("a handle");
    let slots = [
        SlotReport { slot: "cpu:0".into(), task_id: Some("t".into()), fields: fields(&[("state", "busy")]) },
        SlotReport { slot: "gpu:0".into(), task_id: None, fields: fields(&[("state", "free")]) },
    ];
    assert_eq!(a.announce(&slots).await.expect("alive"), Announced::Mine);
    assert_eq!(b.announce(&slots[..1]).await.expect("alive"), Announced::Mine);
    let since: String = get(&server, &["HGET", "machine:a", "since"]);
    assert_eq!(a.announce(&slots).await.expect("alive"), Announced::Mine);
    assert_eq!(get::<String>(&server, &["HGET", "machine:a", "since"]), since);

    let second = Fleet::new(&config(&server), "a", "2").expect("a handle");
    let Announced::TakenBy { incarnation, since_unix_ms, .. } =
        second.announce(&[]).await.expect("an answer")
    else {
        panic!("two services with one name");
    };
    assert_eq!((incarnation.as_str(), since_unix_ms.to_string()), ("1", since));
    second.leave(&[]).await.expect("nothing to take back");
    assert!(!second.succeed("0").await.expect("another one"));
    assert_eq!(get::<i64>(&server, &["EXISTS", "machine:a"]), 1);

    wait("the loss of b", || (get::<i64>(&server, &["EXISTS", "machine:b"]) == 0).then_some(()));
    let workers = a.workers().await.expect("listed");
    assert_eq!(
        workers.iter().map(|m| (m.machine_id.as_str(), m.is_lost)).collect::<Vec<_>>(),
        [("a", false), ("b", true)]
    );
    assert_eq!(workers[0].slots.len(), 2);
    assert_eq!(
        (workers[0].slots[0].slot.as_str(), workers[0].slots[0].fields["task_id"].as_str()),
        ("cpu:0", "t")
    );
    assert_eq!(
        (workers[0].fields["jobs"].as_str(), workers[0].fields["version"].as_str()),
        (r#"["t"]"#, env!("CARGO_PKG_VERSION"))
    );
    assert!(workers[1].slots.is_empty() && workers[1].seen_unix_ms > 1_700_000_000_000);
    let ttl: i64 = get(&server, &["PTTL", "worker:a:cpu:0"]);
    assert!((1..=60_000).contains(&ttl));

    get::<i64>(&server, &["ZADD", "machines", "1", "ancient"]);
    a.announce(&slots).await.expect("alive");
    assert_eq!(
        get::<Vec<String>>(&server, &["ZRANGE", "machines", "0", "-1"]).len(),
        2,
        "the oldest are forgotten"
    );
    assert!(second.succeed("1").await.expect("its earlier start"));
    assert_eq!(second.announce(&[]).await.expect("alive"), Announced::Mine);
}

#[tokio::test]
async fn a_gpu_has_one_owner() {
    let Some(server) = RedisServer::start() else { return };
    let [a, b] = ["a", "b"].map(|name| fleet(&server, name));
    assert_eq!(a.own_gpu("GPU-1").await.expect("an answer"), GpuOwner::Mine);
    assert_eq!(b.own_gpu("GPU-1").await.expect("an answer"), GpuOwner::HeldBy("a".into()));
    assert_eq!(a.own_gpu("GPU-1").await.expect("an answer"), GpuOwner::Mine);
    assert!(!b.free_gpu("GPU-1").await.expect("not its own"));
    assert!(a.free_gpu("GPU-1").await.expect("given up"));
    let quick = RedisConfig { heartbeat_interval_ms: 100, ..config(&server) };
    let b = Fleet::new(&quick, "b", "2").expect("a handle");
    assert_eq!(b.own_gpu("GPU-1").await.expect("an answer"), GpuOwner::Mine);
    wait("the end of b's hold", || (get::<i64>(&server, &["EXISTS", "gpu:GPU-1"]) == 0).then_some(()));
    assert_eq!(a.own_gpu("GPU-1").await.expect("an answer"), GpuOwner::Mine);
}

#[tokio::test]
async fn a_task_is_cancelled_by_any_of_the_keys() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = fleet(&server, "a");
    let tasks = ["a", "b", "c", "d"].map(task);
    assert!(fleet.cancelled(&tasks).await.expect("none").is_empty());
    assert!(fleet.cancelled(&[]).await.expect("none").is_empty());
    get::<String>(&server, &["SET", "study:a:cancel", "1", "EX", "3600"]);
    get::<String>(&server, &["SET", "cancel:c", "1"]);
    get::<i64>(&server, &["SADD", "ai:job:cancellations", "d"]);
    assert_eq!(fleet.cancelled(&tasks).await.expect("three"), ["a", "c", "d"].map(task));
    for task in &tasks {
        fleet.forget_cancel(task).await.expect("forgotten");
    }
    assert!(fleet.cancelled(&tasks).await.expect("none").is_empty());
}

#[tokio::test]
async fn caches_count_and_the_queue_is_mirrored() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = fleet(&server, "a");
    assert_eq!(fleet.cache_get("metadata:1").await.expect("an answer"), None);
    fleet.cache_set("metadata:1", "{}", 60_000).await.expect("set");
    assert_eq!(fleet.cache_get("metadata:1").await.expect("an answer").as_deref(), Some("{}"));
    assert!((1..=60_000).contains(&get::<i64>(&server, &["PTTL", "metadata:1"])));
    assert_eq!(fleet.cache_counts(), CacheCounts { hits: 1, misses: 1 });
    fleet.queue_stats(&BTreeMap::from([("queued".to_owned(), "3".to_owned())])).await.expect("mirrored");
    fleet.queue_stats(&BTreeMap::new()).await.expect("nothing");
    assert_eq!(get::<String>(&server, &["HGET", "queue:stats", "queued"]), "3");
}

#[tokio::test]
async fn dangerous_settings_are_told() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = fleet(&server, "a");
    let texts = |warnings: Vec<Warning>| warnings.iter().map(|w| w.text().to_owned()).collect::<Vec<_>>();
    let warnings = texts(fleet.warnings().await.expect("an answer"));
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].contains("CONFIG SET appendonly yes"), "{warnings:?}");
    get::<String>(&server, &["CONFIG", "SET", "appendonly", "yes"]);
    get::<String>(&server, &["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]);
    get::<String>(&server, &["CONFIG", "SET", "maxmemory", "100mb"]);
    let warnings = texts(fleet.warnings().await.expect("an answer"));
    assert_eq!(warnings.len(), 1);
    assert!(
        warnings[0].contains("maxmemory-policy noeviction") && warnings[0].contains("104857600"),
        "{warnings:?}"
    );
}

#[tokio::test]
async fn machines_are_forgotten_when_nothing_of_theirs_is_left() {
    let Some(server) = RedisServer::start() else { return };
    // Long ago, and one of them had taken something from a list.
    get::<i64>(&server, &["ZADD", "machines", "1", "gone", "2", "holds"]);
    get::<i64>(&server, &["RPUSH", "evaluate:processing:holds", "1"]);
    let a = fleet(&server, "a");
    a.ensure_groups().await.expect("made");
    assert_eq!(a.announce(&[]).await.expect("alive"), Announced::Mine);
    assert_eq!(get::<Vec<String>>(&server, &["ZRANGE", "machines", "0", "-1"]), ["holds", "a"]);
    assert_eq!(a.steal(0, 5).await.expect("returned").returned, 1);
    assert_eq!(a.announce(&[]).await.expect("alive"), Announced::Mine);
    assert_eq!(get::<Vec<String>>(&server, &["ZRANGE", "machines", "0", "-1"]), ["a"]);
}
