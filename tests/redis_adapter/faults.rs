//! A server that goes away, stands still, or comes back.

use std::time::{Duration, Instant};

use boxwright::adapters::queue::redis::{Fleet, FleetError, Retry};

use super::{TOPIC, fleet, get, names, push, ready};
use crate::servers::redis::RedisServer;

/// Calls until it works, as a caller with a delay would; how often it failed.
async fn until_alive(fleet: &Fleet) -> usize {
    let begin = Instant::now();
    let mut failures = 0;
    while let Err(error) = fleet.ping().await {
        assert!(matches!(error.retry(), Retry::Reconnect | Retry::After), "{}", error.chain());
        assert!(begin.elapsed() < crate::servers::LIMIT, "{}", error.chain());
        failures += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    failures
}

#[tokio::test]
async fn nobody_there_is_told_at_once() {
    let Some(mut server) = RedisServer::start() else { return };
    server.kill();
    let fleet = fleet(&server, "a");
    let begin = Instant::now();
    let error = fleet.take(1, 0, &[]).await.expect_err("nobody there");
    assert!(matches!(error, FleetError::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains(&format!("127.0.0.1:{}", server.port())), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(2));
    server.start_again();
    fleet.ping().await.expect("the next call works");
}

#[tokio::test]
async fn a_killed_server_is_found_again_with_everything_that_was_pushed() {
    let Some(mut server) = RedisServer::start_durable() else { return };
    let fleet = ready(&server, "a").await;
    let mut order = Vec::new();
    for round in 0..5 {
        push(&server, &format!("{round}"), &[]);
        let taken = fleet.take(5, 0, &[]).await.expect("taken");
        order.extend(names(&taken).into_iter().map(str::to_owned).collect::<Vec<_>>());
        let waiting = tokio::spawn({
            let fleet = fleet.clone();
            async move { fleet.wait_for_work(60_000, &[]).await }
        });
        if round % 2 == 0 {
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        server.kill();
        let error = waiting.await.expect("no panic").expect_err("the server is gone");
        assert_eq!(error.retry(), Retry::Reconnect, "{}", error.chain());
        server.start_again();
        until_alive(&fleet).await;
        assert_eq!(fleet.own_pending(10).await.expect("found").len(), 1);
        assert!(fleet.acknowledge(&taken[0].entry).await.expect("acknowledged"));
    }
    assert_eq!(order, ["0", "1", "2", "3", "4"]);
    assert_eq!(get::<usize>(&server, &["XLEN", TOPIC]), 0);
}

#[tokio::test]
async fn a_server_that_stands_still_costs_every_call_two_seconds() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = ready(&server, "a").await;
    fleet.ping().await.expect("alive");
    server.pause();
    let begin = Instant::now();
    let error = fleet.ping().await.expect_err("no answer");
    assert!(matches!(error, FleetError::Timeout { limit_ms: 2_000, .. }), "{error:?}");
    assert!((1_900..6_000).contains(&begin.elapsed().as_millis()), "{:?}", begin.elapsed());
    // Now without a connection: the system accepts it, nobody greets. Many calls at once wait no longer than one.
    let begin = Instant::now();
    let calls = (0..5).map(|_| fleet.ping());
    for answer in futures_util::future::join_all(calls).await {
        assert_eq!(answer.expect_err("no answer").retry(), Retry::Reconnect);
    }
    assert!(begin.elapsed() < Duration::from_millis(8_000), "{:?}", begin.elapsed());
    server.resume();
    until_alive(&fleet).await;
    push(&server, "x", &[]);
    assert_eq!(names(&fleet.take(1, 0, &[]).await.expect("taken")), ["x"]);
}

#[tokio::test]
async fn a_server_without_memory_is_not_ready() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = ready(&server, "a").await;
    get::<String>(&server, &["CONFIG", "SET", "maxmemory", "1"]);
    let error = fleet.cache_set("k", "v", 1_000).await.expect_err("no memory");
    assert!(matches!(error, FleetError::NotReady { .. }), "{error:?}");
    let error = fleet.acquire(&super::task("t"), "i", 1_000).await.expect_err("no memory");
    assert!(matches!(error, FleetError::NotReady { .. }), "{error:?}");
    get::<String>(&server, &["CONFIG", "SET", "maxmemory", "0"]);
    fleet.cache_set("k", "v", 1_000).await.expect("memory");
}

#[tokio::test]
async fn a_replica_is_not_written_to() {
    let Some(server) = RedisServer::start() else { return };
    let fleet = ready(&server, "a").await;
    get::<String>(&server, &["REPLICAOF", "127.0.0.1", "1"]);
    let error = fleet.cache_set("k", "v", 1_000).await.expect_err("read only");
    assert!(matches!(error, FleetError::NotReady { .. }) && error.retry() == Retry::Reconnect, "{error:?}");
}
