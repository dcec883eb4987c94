//! Progress, logs, machines, GPUs, cancelling, caches, warnings.

use std::collections::BTreeMap;

use boxwright::adapters::queue::redis::{
    Acquired, Announced, CacheCounts, Fleet, GpuOwner, LogPart, Logged, SlotReport, Warning,
};
use boxwright::job::delivery::RunRef;
use boxwright::job::service::{RedisConfig, RedisKind};
use serde_json::Value as Json;

use super::kinds::cluster;
use super::results::run_ref;
use super::{config, fleet, get, task};
use crate::servers::redis::RedisServer;
use crate::servers::wait;

const NOTHING: LogPart<'_> =
    LogPart { from_offset: 0, to_offset: 0, begin_offset: 0, lines: &[], is_final: false };

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
    let run = run_ref("t", "a", 7);
    plain.progress(&run, &fields(&[("EPOCH", "3"), ("status", "running")]), false).await.expect("shown");
    let shown: BTreeMap<String, String> = get(&server, &["HGETALL", "progress:t"]);
    let of = |name: &str| shown[name].as_str();
    assert_eq!((of("EPOCH"), of("MACHINE_ID"), of("fence"), of("instance")), ("3", "a", "7", "t-instance"));
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
    plain.progress_end(&run, &fields(&[("status", "completed")])).await.expect("shown");
    let ttl: i64 = get(&server, &["PTTL", "progress:t"]);
    assert!((1..=30 * 60_000).contains(&ttl), "{ttl}");
    assert_eq!(get::<String>(&server, &["HGET", "progress:t", "EPOCH"]), "3", "the rest stays");
    let late = plain.progress(&run, &fields(&[("status", "running")]), false).await.expect("an answer");
    assert!(!late, "what was on its way at the end comes too late");
    assert!(get::<i64>(&server, &["PTTL", "progress:t"]) > 0);
    let again = RunRef { instance: "again".into(), fence: 8, ..run.clone() };
    assert!(plain.progress(&again, &fields(&[("status", "running")]), false).await.expect("shown"));
    assert_eq!(get::<i64>(&server, &["PTTL", "progress:t"]), -1, "it runs again");
    assert_eq!(get::<i64>(&server, &["HLEN", "progress:t"]), 4, "nothing of the run before");
    let earlier = fields(&[("status", "completed")]);
    assert!(!plain.progress_end(&run, &earlier).await.expect("an answer"), "a late end of the run before");
    assert_eq!(get::<String>(&server, &["HGET", "progress:t", "status"]), "running");
    assert_eq!(get::<i64>(&server, &["EXISTS", "EPOCH"]), 0);
    assert!(!plain.progress(&again, &[], false).await.expect("nothing to show"));
    let brief = RedisConfig { progress_ttl_ms: 0, ..config(&server) };
    let brief = Fleet::new(&brief, "a", "1").expect("a handle");
    assert!(brief.progress(&run_ref("u", "a", 1), &earlier, true).await.expect("shown"));
    wait("no lifetime at all", || (get::<i64>(&server, &["EXISTS", "progress:u"]) == 0).then_some(()));

    let both = RedisConfig { transposed_progress: true, ..config(&server) };
    let both = Fleet::new(&both, "a", "1").expect("a handle");
    let shown = fields(&[("EPOCH", "4"), ("training_queue", "no")]);
    both.progress(&again, &shown, false).await.expect("shown");
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
    let run = run_ref("t", "a", 1);
    let append = async |from: usize, to: usize| {
        let offsets = (from as u64 * 11, to as u64 * 11);
        let part =
            LogPart { from_offset: offsets.0, to_offset: offsets.1, lines: &lines(from, to), ..NOTHING };
        a.log_lines(&run, part).await.expect("an answer")
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
    let part = LogPart { to_offset: 2, lines: &["b\n".to_owned()], ..NOTHING };
    let appended = b.log_lines(&run, part).await.expect("an answer");
    assert_eq!(appended, Logged::Appended { offset: 2 });
    assert_eq!(append(2_000, 2_001).await, Logged::Appended { offset: 22_011 });

    assert!(a.log_end(&run).await.expect("ended"));
    for key in ["stream:t", "stream:t:offset"] {
        assert!((1..=5_000).contains(&get::<i64>(&server, &["PTTL", key])));
    }
    assert_eq!(append(2_001, 2_002).await, Logged::Appended { offset: 22_022 });
    assert_eq!(get::<i64>(&server, &["PTTL", "stream:t"]), -1, "the job goes on");
    let words = [String::from("the end\n")];
    let last = LogPart { from_offset: 22_022, to_offset: 22_030, lines: &words, is_final: true, ..NOTHING };
    assert_eq!(a.log_lines(&run, last).await.expect("an answer"), Logged::Appended { offset: 22_030 });
    for key in ["stream:t", "stream:t:offset"] {
        assert!(
            (1..=5_000).contains(&get::<i64>(&server, &["PTTL", key])),
            "the last words keep nothing alive"
        );
    }
    get::<String>(&server, &["FLUSHALL"]);
    assert_eq!(append(2_002, 2_003).await, Logged::ContinueAt { offset: 0 }, "the server lost it");
    assert_eq!(append(0, 5).await, Logged::Appended { offset: 55 });
    // A run that begins behind what earlier ones left in the file does not send that again.
    get::<String>(&server, &["FLUSHALL"]);
    let begun = LogPart { begin_offset: 44, to_offset: 11, lines: &lines(0, 1), ..NOTHING };
    assert_eq!(a.log_lines(&run, begun).await.expect("an answer"), Logged::ContinueAt { offset: 44 });
    let begun = LogPart { from_offset: 44, to_offset: 55, begin_offset: 44, lines: &lines(4, 5), ..NOTHING };
    assert_eq!(a.log_lines(&run, begun).await.expect("an answer"), Logged::Appended { offset: 55 });
}

/// One machine is cut off while another takes its job over and completes it.
async fn cut_off(server: &RedisServer, config: &RedisConfig, fence_key: &str) {
    let [a, b] = ["a", "b"].map(|name| Fleet::new(config, name, "1").expect("a handle"));
    let own = async |fleet: &Fleet, instance: &str| {
        let answer = fleet.acquire(&task("t"), instance, 60_000).await.expect("an answer");
        let Acquired::Mine { fence, .. } = answer else { panic!("{answer:?}") };
        RunRef { instance: instance.into(), ..run_ref("t", fleet.machine_id(), fence) }
    };
    let running = fields(&[("status", "running"), ("EPOCH", "9")]);
    let words = ["word\n".to_owned()];
    let part = LogPart { to_offset: 5, lines: &words, ..NOTHING };
    let cut = own(&a, "training_queue/1-1").await;
    assert!(a.progress(&cut, &running, false).await.expect("shown"));
    assert_eq!(a.log_lines(&cut, part).await.expect("sent"), Logged::Appended { offset: 5 });
    get::<i64>(server, &["DEL", "lease:t"]);
    let heir = own(&b, "training_queue/1-1").await;
    assert_eq!(
        b.log_lines(&heir, LogPart { is_final: true, ..part }).await.expect("sent"),
        Logged::Appended { offset: 5 }
    );
    assert!(b.progress(&heir, &fields(&[("status", "completed")]), true).await.expect("shown"));
    let assert_unharmed = || {
        let shown: BTreeMap<String, String> = get(server, &["HGETALL", "progress:t"]);
        assert_eq!((shown["status"].as_str(), shown["MACHINE_ID"].as_str()), ("completed", "b"));
        assert!(["progress:t", "stream:t"].iter().all(|key| get::<i64>(server, &["PTTL", key]) > 0));
        assert_eq!(get::<usize>(server, &["XLEN", "stream:t"]), 2);
    };
    // The link of the first is back before its heartbeat has told it.
    let more = LogPart { from_offset: 5, to_offset: 10, ..part };
    for _ in 0..2 {
        assert!(!a.progress(&cut, &running, false).await.expect("an answer"));
        assert!(!a.progress_end(&cut, &running).await.expect("an answer"));
        assert_eq!(a.log_lines(&cut, more).await.expect("an answer"), Logged::Fenced);
        assert!(!a.log_end(&cut).await.expect("an answer"));
        assert_unharmed();
        // The same when the task id was submitted again meanwhile, and that run has ended on the other machine too.
        get::<i64>(server, &["HSET", fence_key, "instance", "training_queue/2-1"]);
    }
    // The progress may have ended its time; the number is remembered for longer.
    get::<i64>(server, &["DEL", "progress:t"]);
    assert!(!a.progress(&cut, &running, false).await.expect("an answer"));
    assert_eq!(get::<i64>(server, &["EXISTS", "progress:t"]), 0);
    // A job of a folder has numbers of another clock: it is shown.
    let own_job = RunRef { instance: "of a folder".into(), ..run_ref("t", "a", 1) };
    assert!(a.progress(&own_job, &running, false).await.expect("shown"));
}

#[tokio::test]
async fn a_machine_that_was_cut_off_shows_nothing_over_the_job_of_another() {
    let Some(server) = RedisServer::start() else { return };
    cut_off(&server, &config(&server), "fence:t").await;
}

#[tokio::test]
async fn on_a_cluster_it_shows_nothing_either() {
    let Some(server) = cluster() else { return };
    let config = RedisConfig { kind: RedisKind::Cluster, ..config(&server) };
    cut_off(&server, &config, "{lease:t}:fence").await;
}

#[tokio::test]
async fn an_end_that_was_shown_is_not_shown_again_by_the_next_start() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = fleet(&server, "a");
    let (run, poor) = (run_ref("t", "a", 7), fields(&[("status", "completed")]));
    let whole = fields(&[("status", "completed"), ("gpu_0_name", "N")]);
    assert!(fleet.progress(&run, &fields(&[("status", "running")]), false).await.expect("shown"));
    assert!(fleet.progress_again(&run, &poor, true).await.expect("shown"), "its end was not shown yet");
    assert!(fleet.progress(&run, &whole, true).await.expect("shown"));
    assert!(!fleet.progress_again(&run, &poor, true).await.expect("an answer"));
    assert_eq!(get::<String>(&server, &["HGET", "progress:t", "gpu_0_name"]), "N");
}

#[tokio::test]
async fn a_waiting_job_is_shown_unless_a_machine_works_on_its_task_id() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = fleet(&server, "a");
    let waits = fields(&[("status", "queued")]);
    assert!(fleet.progress_of_waiting(&task("t"), &waits).await.expect("shown"));
    assert!(get::<i64>(&server, &["PTTL", "progress:t"]) > 0);
    fleet.acquire(&task("t"), "q/1-1", 60_000).await.expect("an answer");
    assert!(!fleet.progress_of_waiting(&task("t"), &waits).await.expect("an answer"));
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
