//! What becomes of entries that were taken.

use boxwright::adapters::queue::redis::{Announced, Fleet, Stolen, Taken};
use boxwright::job::delivery::QueueEntry;
use redis::Value;

use super::{TOPIC, fleet, get, names, push, ready};
use crate::servers::redis::RedisServer;
use crate::servers::wait;

/// Entries pending for a consumer of the topic.
fn pending(server: &RedisServer, consumer: &str) -> usize {
    get::<Vec<Value>>(server, &["XPENDING", TOPIC, "training_group", "-", "+", "100", consumer]).len()
}

fn idle_ms(server: &RedisServer, id: &str) -> u64 {
    get::<Vec<(String, String, u64, u64)>>(server, &["XPENDING", TOPIC, "training_group", id, id, "1"])[0].2
}

#[tokio::test]
async fn a_restarted_machine_finds_what_it_had_taken() {
    let Some(server) = RedisServer::start() else { return };
    let a = ready(&server, "a").await;
    for i in 0..120 {
        push(&server, &format!("{i}"), if i == 3 { &["priority", "high"] } else { &[] });
    }
    let taken = a.take(120, 0, &[]).await.expect("taken");
    assert_eq!(taken.len(), 120);
    get::<i64>(&server, &["RPUSH", "evaluate", "e"]);
    assert_eq!(a.take(1, 0, &[]).await.expect("taken").len(), 1);
    a.acknowledge(&taken[10].entry).await.expect("acknowledged");
    get::<i64>(&server, &["XDEL", TOPIC, &taken[20].entry.id]);

    let again = fleet(&server, "a");
    let found = again.own_pending(1_000).await.expect("found");
    assert_eq!(found.len(), 119, "one acknowledged, one deleted, one of a list");
    assert_eq!((found[0].fields["payload"].as_str(), found[0].entry.is_list), ("e", true));
    assert!(found[1..].iter().all(|taken| taken.deliveries == 2));
    assert_eq!(found[1].fields["config_path"], "3");
    assert_eq!(again.own_pending(7).await.expect("found").len(), 7);
    assert_eq!(pending(&server, "a"), 100, "of 117, as the reading is limited");
    assert!(fleet(&server, "b").own_pending(10).await.expect("nothing").is_empty());
}

#[tokio::test]
async fn a_dead_consumers_entry_is_stolen_and_not_before() {
    let Some(server) = RedisServer::start() else { return };
    let (a, b) = (ready(&server, "a").await, ready(&server, "b").await);
    push(&server, "x", &[]);
    push(&server, "deleted", &[]);
    push(&server, "h", &["priority", "high"]);
    let mine = a.take(3, 0, &[]).await.expect("taken");
    assert_eq!(names(&mine), ["h", "x", "deleted"]);
    get::<i64>(&server, &["XDEL", TOPIC, &mine[2].entry.id]);
    assert_eq!(b.steal(60_000, 10).await.expect("nothing"), Stolen::default());
    let stolen = wait_stolen(&b, 400, 2).await;
    let mut found = names(&stolen);
    found.sort_unstable();
    assert_eq!(found, ["h", "x"]);
    assert!(stolen.iter().all(|taken| taken.deliveries == 2));
    assert_eq!((pending(&server, "a"), pending(&server, "b")), (0, 1), "what was deleted is acknowledged");
    let entries: Vec<QueueEntry> = mine.iter().map(|taken| taken.entry.clone()).collect();
    assert_eq!(a.renew_entries(&entries).await.expect("all lost"), {
        let mut lost = vec![entries[1].clone(), entries[2].clone(), entries[0].clone()];
        lost.sort_by(|x, y| x.queue.cmp(&y.queue));
        lost
    });
    assert_eq!(b.steal(60_000, 10).await.expect("nothing"), Stolen::default());
}

/// Looks until `count` entries are stolen.
async fn wait_stolen(fleet: &Fleet, idle_ms: u64, count: usize) -> Vec<Taken> {
    let begin = std::time::Instant::now();
    let mut stolen = Vec::new();
    while stolen.len() < count {
        stolen.extend(fleet.steal(idle_ms, 10).await.expect("a look").entries);
        assert!(begin.elapsed() < crate::servers::LIMIT, "nothing was stolen");
    }
    stolen
}

#[tokio::test]
async fn an_entry_whose_delivery_was_lost_is_found_again() {
    let Some(server) = RedisServer::start() else { return };
    let a = ready(&server, "a").await;
    push(&server, "known", &[]);
    push(&server, "lost", &[]);
    let known = a.take(1, 0, &[]).await.expect("taken").remove(0).entry;
    let words = ["XREADGROUP", "GROUP", "training_group", "a", "COUNT", "1", "STREAMS", TOPIC, ">"];
    let lost: Value = get(&server, &words);
    assert_ne!(lost, Value::Nil);
    let begin = std::time::Instant::now();
    loop {
        assert!(a.renew_entries(std::slice::from_ref(&known)).await.expect("renewed").is_empty());
        let found = a.steal(1_500, 10).await.expect("a look").entries;
        if !found.is_empty() {
            assert_eq!(names(&found), ["lost"]);
            break;
        }
        assert!(begin.elapsed() < crate::servers::LIMIT, "it was not found");
    }
}

#[tokio::test]
async fn stealing_goes_through_a_long_list_of_pending_entries() {
    let Some(server) = RedisServer::start() else { return };
    let (a, b) = (ready(&server, "a").await, ready(&server, "b").await);
    for i in 0..450 {
        push(&server, &format!("{i}"), &[]);
    }
    assert_eq!(a.take(450, 0, &[]).await.expect("taken").len(), 450);
    let mut stolen = Vec::new();
    for round in 1..=10 {
        let found = b.steal(0, 45).await.expect("a look").entries;
        assert_eq!(found.len(), 45, "round {round}: each goes on where the last one stopped");
        stolen.extend(found);
    }
    let mut ids: Vec<&str> = stolen.iter().map(|taken| taken.entry.id.as_str()).collect();
    ids.dedup();
    assert_eq!(ids.len(), 450);
}

#[tokio::test]
async fn a_sign_of_life_neither_revives_nor_steals() {
    let Some(server) = RedisServer::start() else { return };
    let (a, b) = (ready(&server, "a").await, ready(&server, "b").await);
    for name in ["kept", "done", "stolen"] {
        push(&server, name, &[]);
    }
    let taken = a.take(3, 0, &[]).await.expect("taken");
    let entries: Vec<QueueEntry> = taken.iter().map(|taken| taken.entry.clone()).collect();
    a.acknowledge(&entries[1]).await.expect("acknowledged");
    get::<Vec<Value>>(&server, &["XCLAIM", TOPIC, "training_group", "b", "0", &entries[2].id]);
    wait("some idle time", || (idle_ms(&server, &entries[0].id) > 50).then_some(()));
    let before = idle_ms(&server, &entries[0].id);
    assert_eq!(a.renew_entries(&entries).await.expect("renewed"), entries[1..]);
    assert!(idle_ms(&server, &entries[0].id) < before);
    assert_eq!((pending(&server, "a"), pending(&server, "b")), (1, 1));
    let counts: Vec<(String, String, u64, u64)> =
        get(&server, &["XPENDING", TOPIC, "training_group", "-", "+", "10"]);
    assert_eq!(counts.iter().map(|row| row.3).collect::<Vec<_>>(), [1, 2], "a renewal is no delivery");
    assert!(b.renew_entries(&[]).await.expect("nothing").is_empty());

    get::<i64>(&server, &["RPUSH", "evaluate", "e"]);
    let held = loop {
        if let Some(taken) = a.take(1, 0, &[]).await.expect("taken").pop() {
            break taken.entry;
        }
    };
    assert!(a.renew_entries(std::slice::from_ref(&held)).await.expect("held").is_empty());
    assert_eq!(b.renew_entries(std::slice::from_ref(&held)).await.expect("not held"), [held]);
}

#[tokio::test]
async fn entries_are_handed_over_and_released() {
    let Some(server) = RedisServer::start() else { return };
    let (a, b) = (ready(&server, "a").await, ready(&server, "b").await);
    push(&server, "x", &[]);
    let entry = a.take(1, 0, &[]).await.expect("taken").remove(0).entry;
    assert!(!b.hand_over(&entry, "c").await.expect("not held"));
    assert!(a.hand_over(&entry, "b").await.expect("given"));
    assert!(!a.hand_over(&entry, "b").await.expect("not twice"));
    assert_eq!((pending(&server, "a"), pending(&server, "b")), (0, 1));
    assert!(!a.release(&entry).await.expect("not held"));
    assert!(b.release(&entry).await.expect("released"));
    let stolen = a.steal(3_600_000, 1).await.expect("stolen");
    // Who gave it back did not fail at it: its deliveries are counted anew.
    assert_eq!((names(&stolen.entries), stolen.entries[0].deliveries), (vec!["x"], 1));

    get::<i64>(&server, &["RPUSH", "recreate", "1", "2"]);
    let mut held = Vec::new();
    while held.is_empty() {
        held = a.take(1, 0, &[]).await.expect("taken");
    }
    let element = &held[0].entry;
    assert!(a.release(element).await.expect("released"));
    assert_eq!(get::<Vec<String>>(&server, &["LRANGE", "recreate", "0", "-1"]), ["2", "1"], "others first");
    assert!(!a.release(element).await.expect("not held"));
    let mut count = 0;
    while count < 2 {
        count += a.take(2, 0, &[]).await.expect("taken").len();
    }
    assert!(a.hand_over(element, "b").await.expect("given"));
    assert_eq!(b.own_pending(10).await.expect("found").len(), 1);
}

#[tokio::test]
async fn elements_of_dead_machines_go_back_to_the_head_in_order() {
    let Some(server) = RedisServer::start() else { return };
    let (a, b) = (fleet(&server, "a"), fleet(&server, "b"));
    get::<i64>(&server, &["RPUSH", TOPIC, "1", "2", "3"]);
    assert_eq!(a.announce(&[]).await.expect("alive"), Announced::Mine);
    let mut taken = 0;
    while taken < 2 {
        taken += a.take(2 - taken, 0, &[]).await.expect("taken").len();
    }
    assert_eq!(b.steal(0, 10).await.expect("alive"), Stolen::default());
    a.leave(&[]).await.expect("left");
    assert_eq!(b.steal(0, 10).await.expect("dead"), Stolen { entries: Vec::new(), returned: 2 });
    assert_eq!(get::<Vec<String>>(&server, &["LRANGE", TOPIC, "0", "-1"]), ["1", "2", "3"]);
    assert_eq!(b.steal(0, 10).await.expect("nothing"), Stolen::default());
}

#[tokio::test]
async fn what_is_done_with_leaves_the_stream() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = ready(&server, "a").await;
    for i in 0..4 {
        push(&server, &format!("{i}"), &[]);
    }
    let taken = fleet.take(3, 0, &[]).await.expect("taken");
    // One was acknowledged by a client that does not trim.
    get::<i64>(&server, &["XACK", TOPIC, "training_group", &taken[0].entry.id]);
    assert!(fleet.acknowledge(&taken[2].entry).await.expect("done"));
    assert_eq!(get::<usize>(&server, &["XLEN", TOPIC]), 2);
    assert!(fleet.acknowledge(&taken[1].entry).await.expect("done"));
    assert!(!fleet.acknowledge(&taken[1].entry).await.expect("not twice"));
    assert_eq!(get::<usize>(&server, &["XLEN", TOPIC]), 1);
    assert_eq!(names(&fleet.take(9, 0, &[]).await.expect("taken")), ["3"]);
}

#[tokio::test]
async fn poison_is_buried_with_its_reason() {
    let Some(server) = RedisServer::start() else { return };
    let (a, b) = (ready(&server, "a").await, ready(&server, "b").await);
    push(&server, "bad", &["user_code", "u"]);
    let taken = a.take(1, 0, &[]).await.expect("taken").remove(0);
    assert!(!b.bury(&taken.entry, &taken.fields, "no").await.expect("not held"));
    assert!(a.bury(&taken.entry, &taken.fields, "no such file").await.expect("buried"));
    assert!(!a.bury(&taken.entry, &taken.fields, "again").await.expect("not twice"));
    let dead: Vec<(String, std::collections::BTreeMap<String, String>)> =
        get(&server, &["XRANGE", "training_queue:dead", "-", "+"]);
    assert_eq!(dead.len(), 1);
    let fields = &dead[0].1;
    assert_eq!((fields["config_path"].as_str(), fields["reason"].as_str()), ("bad", "no such file"));
    assert_eq!(fields["machine_id"], "a");
    assert!(fields["buried_unix_ms"].parse::<i64>().expect("a time") > 1_700_000_000_000);
    assert_eq!((pending(&server, "a"), get::<usize>(&server, &["XLEN", TOPIC])), (0, 0));
}

#[tokio::test]
async fn what_is_pending_is_counted_once_a_start() {
    let Some(server) = RedisServer::start() else { return };
    let a = ready(&server, "a").await;
    push(&server, "x", &[]);
    assert_eq!(a.take(1, 0, &[]).await.expect("taken")[0].deliveries, 1);
    let again = fleet(&server, "a");
    for _ in 0..60 {
        // Reconnecting is no fault of the entry.
        assert_eq!(again.own_pending(10).await.expect("found")[0].deliveries, 2);
    }
    assert_eq!(fleet(&server, "a").own_pending(10).await.expect("found")[0].deliveries, 3);
}

#[tokio::test]
async fn elements_that_others_put_back_are_held_again() {
    let Some(server) = RedisServer::start() else { return };
    let (a, b) = (fleet(&server, "a"), fleet(&server, "b"));
    b.ensure_groups().await.expect("made");
    get::<i64>(&server, &["RPUSH", TOPIC, "1", "2", "3"]);
    assert_eq!(a.announce(&[]).await.expect("alive"), Announced::Mine);
    let mut held = Vec::new();
    while held.len() < 3 {
        held.extend(
            a.take(3 - held.len(), 0, &[]).await.expect("taken").into_iter().map(|taken| taken.entry),
        );
    }
    a.leave(&[]).await.expect("left");
    // No more than there is room for.
    assert_eq!(b.steal(0, 2).await.expect("dead").returned, 2);
    let mut theirs = b.take(1, 0, &[]).await.expect("taken");
    while theirs.is_empty() {
        theirs = b.take(1, 0, &[]).await.expect("taken");
    }
    let (theirs, ours): (Vec<_>, Vec<_>) = held.into_iter().partition(|entry| *entry == theirs[0].entry);
    assert_eq!(a.renew_entries(&ours).await.expect("asked").len(), 1, "put back, not asked for");
    a.hold_entries(&[ours.clone(), theirs].concat()).await.expect("held");
    assert_eq!(a.renew_entries(&ours).await.expect("asked"), []);
    let at = |name: &str| get::<Vec<String>>(&server, &["LRANGE", name, "0", "-1"]);
    assert_eq!((at(TOPIC).len(), at(&format!("{TOPIC}:processing:b")).len()), (0, 1), "theirs stays theirs");
}

#[tokio::test]
async fn lists_that_are_left_alone_wake_nobody() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = fleet(&server, "a");
    get::<i64>(&server, &["RPUSH", TOPIC, "1"]);
    assert!(fleet.wait_for_work(1_000, &[]).await.expect("asked"));
    assert!(!fleet.wait_for_work(50, &[TOPIC]).await.expect("asked"));
    for _ in 0..2 {
        assert!(fleet.take(1, 0, &[TOPIC]).await.expect("asked").is_empty());
    }
    get::<i64>(&server, &["RPUSH", "evaluate", "2"]);
    assert!(fleet.wait_for_work(1_000, &[TOPIC]).await.expect("asked"));
}
