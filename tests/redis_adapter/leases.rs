//! Leases and their fencing numbers.

use boxwright::adapters::queue::redis::{Acquired, Fleet, Renewed};

use super::{config, fleet, get, task};
use crate::servers::redis::RedisServer;
use crate::servers::wait;

const TTL: u64 = 60_000;

async fn acquire(fleet: &Fleet, id: &str, ttl: u64) -> (u64, u32) {
    match fleet.acquire(&task(id), "i1", ttl).await.expect("an answer") {
        Acquired::Mine { fence, attempts_before } => (fence, attempts_before),
        held => panic!("{held:?}"),
    }
}

#[tokio::test]
async fn a_task_has_one_owner_and_numbers_grow() {
    let Some(server) = RedisServer::start() else { return };
    let (a, b) = (fleet(&server, "a"), fleet(&server, "b"));
    let (first, before) = acquire(&a, "t", TTL).await;
    assert_eq!(before, 0);
    assert_eq!(
        b.acquire(&task("t"), "i1", TTL).await.expect("an answer"),
        Acquired::Held { owner: "a".into(), fence: first }
    );
    assert_eq!(b.holder(&task("t")).await.expect("an answer"), Some(("a".into(), first)));
    let lease: std::collections::BTreeMap<String, String> = get(&server, &["HGETALL", "lease:t"]);
    assert_eq!(
        (lease["owner"].as_str(), lease["incarnation"].as_str(), lease["instance"].as_str()),
        ("a", "a-1", "i1")
    );
    assert_eq!(a.renew(&task("t"), "i1", first, 2, TTL).await.expect("renewed"), Renewed::Mine);
    assert!(!b.let_go(&task("t"), first + 1).await.expect("not this one"));

    // A restart of the same machine gets it at once, and the earlier start is fenced off.
    let again = Fleet::new(&config(&server), "a", "a-2").expect("a handle");
    let (second, before) = acquire(&again, "t", TTL).await;
    assert!(second > first);
    assert_eq!(before, 2, "attempts are kept");
    assert_eq!(
        a.renew(&task("t"), "i1", first, 2, TTL).await.expect("an answer"),
        Renewed::Lost { owner: "a".into(), fence: second }
    );
    assert!(again.let_go(&task("t"), second).await.expect("given up"));
    assert_eq!(b.holder(&task("t")).await.expect("an answer"), None);
    let (third, _) = acquire(&b, "t", TTL).await;
    assert!(third > second);
    // Another run of the same task begins with no attempts.
    b.let_go(&task("t"), third).await.expect("given up");
    let other = b.acquire(&task("t"), "i2", TTL).await.expect("an answer");
    assert!(matches!(other, Acquired::Mine { attempts_before: 0, fence } if fence > third));
}

#[tokio::test]
async fn an_expired_lease_is_taken_over_and_the_old_owner_hears_it() {
    let Some(server) = RedisServer::start() else { return };
    let (a, b) = (fleet(&server, "a"), fleet(&server, "b"));
    let (first, _) = acquire(&a, "t", 100).await;
    a.renew(&task("t"), "i1", first, 3, 100).await.expect("renewed");
    wait("the end of the lease", || (get::<i64>(&server, &["EXISTS", "lease:t"]) == 0).then_some(()));
    let (second, before) = acquire(&b, "t", TTL).await;
    assert!(second > first && before == 3);
    for _ in 0..2 {
        let renewed = a.renew(&task("t"), "i1", first, 3, TTL).await.expect("an answer");
        assert_eq!(renewed, Renewed::Lost { owner: "b".into(), fence: second });
        // Also when the new owner has finished by then.
        b.let_go(&task("t"), second).await.expect("given up");
    }
    let c = fleet(&server, "c");
    let (third, _) = acquire(&c, "t", 50).await;
    wait("the end of the lease", || (get::<i64>(&server, &["EXISTS", "lease:t"]) == 0).then_some(()));
    assert_eq!(
        c.renew(&task("t"), "i1", third, 0, TTL).await.expect("renewed"),
        Renewed::Mine,
        "nobody came between"
    );
    assert_eq!(a.holder(&task("t")).await.expect("an answer"), Some(("c".into(), third)));
}

#[tokio::test]
async fn an_emptied_server_costs_no_owner_its_task() {
    let Some(server) = RedisServer::start() else { return };
    let (a, b) = (fleet(&server, "a"), fleet(&server, "b"));
    let (first, _) = acquire(&a, "t", TTL).await;
    get::<String>(&server, &["FLUSHALL"]);
    assert_eq!(a.renew(&task("t"), "i1", first, 1, TTL).await.expect("taken again"), Renewed::Mine);
    assert!(matches!(b.acquire(&task("t"), "i1", TTL).await.expect("an answer"), Acquired::Held { .. }));
    // Numbers stay greater than those before, also when the one that knew is gone.
    get::<String>(&server, &["FLUSHALL"]);
    let (second, _) = acquire(&b, "t", TTL).await;
    assert!(second > first);
    assert!(matches!(a.renew(&task("t"), "i1", first, 1, TTL).await.expect("lost"), Renewed::Lost { .. }));
    // And when they are ahead of the server's clock.
    get::<i64>(&server, &["HSET", "fence:t", "fence", "9000000000000"]);
    b.let_go(&task("t"), second).await.expect("given up");
    assert_eq!(acquire(&a, "t", TTL).await.0, 9_000_000_000_001);
}

#[tokio::test]
async fn one_of_many_gets_it() {
    let Some(server) = RedisServer::start() else { return };
    let fleets: Vec<Fleet> = (0..8).map(|i| fleet(&server, &format!("m{i}"))).collect();
    for round in 0..20 {
        let id = task(&format!("t{round}"));
        let asked = fleets.iter().map(|fleet| fleet.acquire(&id, "i", TTL));
        let answers = futures_util::future::join_all(asked).await;
        let mine = answers.into_iter().filter(|answer| matches!(answer, Ok(Acquired::Mine { .. })));
        assert_eq!(mine.count(), 1);
    }
}
