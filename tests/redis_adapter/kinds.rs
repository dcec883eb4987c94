//! Users and passwords, TLS, sentinels, a cluster.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use boxwright::adapters::queue::redis::{
    Acquired, Announced, Fleet, FleetError, LogPart, Logged, Published, Renewed, Retry, Warning,
};
use boxwright::job::delivery::EpochBody;
use boxwright::job::secret::Secret;
use boxwright::job::service::{RedisConfig, RedisKind};
use serde_json::json;

use super::results::{result, run_ref};
use super::{TOPIC, config, get, names, push, task};
use crate::servers::redis::RedisServer;
use crate::servers::{Port, missing};

fn handle(config: &RedisConfig) -> Fleet {
    Fleet::new(config, "a", "1").expect("a handle")
}

#[tokio::test]
async fn a_password_is_needed_and_never_shown() {
    let Some(server) = RedisServer::start_with(&["--save", "", "--requirepass", "s3cret"]) else { return };
    let none = handle(&config(&server)).ping().await.expect_err("no password");
    assert!(matches!(none, FleetError::Auth { .. }), "{none:?}");
    let wrong = RedisConfig { password: Some(Secret::new("wr0ng")), ..config(&server) };
    let wrong = handle(&wrong).ping().await.expect_err("a wrong password");
    assert!(matches!(wrong, FleetError::Auth { .. }), "{wrong:?}");
    assert_eq!(wrong.retry(), Retry::Reconnect);
    assert!(!format!("{wrong:?} {}", wrong.chain()).contains("wr0ng"));
    let right = RedisConfig { password: Some(Secret::new("s3cret")), ..config(&server) };
    handle(&right).ping().await.expect("let in");
    let url = format!("redis://:s3cret@127.0.0.1:{}/0", server.port());
    let fleet = handle(&RedisConfig { urls: vec![url], ..config(&server) });
    fleet.ping().await.expect("let in");
    assert!(!format!("{fleet:?} {}", fleet.address()).contains("s3cret"));
}

#[tokio::test]
async fn a_user_with_few_rights_is_enough_and_lacking_ones_are_named() {
    let Some(server) = RedisServer::start() else { return };
    let rules =
        ["ACL", "SETUSER", "worker", "on", ">pw", "~*", "&progress:*", "+@all", "-@admin", "-@dangerous"];
    get::<String>(&server, &rules);
    let user =
        RedisConfig { username: Some("worker".into()), password: Some(Secret::new("pw")), ..config(&server) };
    let fleet = handle(&user);
    get::<String>(&server, &["XGROUP", "CREATE", TOPIC, "training_group", "0", "MKSTREAM"]);
    fleet.ensure_groups().await.expect("groups");
    push(&server, "x", &[]);
    assert_eq!(fleet.take(1, 0, &[]).await.expect("taken").len(), 1);
    let run = run_ref("t", "a", 1);
    fleet.progress(&run, &[("EPOCH".into(), "1".into())], false).await.expect("shown");
    let warnings = fleet.warnings().await.expect("a note");
    assert!(matches!(&warnings[..], [Warning::Note(text)] if text.contains("does not show")), "{warnings:?}");
    get::<String>(&server, &["ACL", "SETUSER", "worker", "resetkeys", "~lease:*"]);
    let error = fleet.take(1, 0, &[]).await.expect_err("no permission");
    assert!(matches!(error, FleetError::NoPermission { .. }), "{error:?}");
    assert_eq!(error.retry(), Retry::Never);
    get::<String>(&server, &["ACL", "SETUSER", "worker", "off"]);
    fleet.disconnect();
    assert!(matches!(fleet.ping().await.expect_err("off"), FleetError::Auth { .. }));
}

/// An authority and a certificate for 127.0.0.1, made by the `openssl` program.
fn certificates(folder: &Path) -> Option<()> {
    let run = |arguments: &[&str]| {
        let mut command = Command::new("openssl");
        command
            .args(arguments)
            .current_dir(folder)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .stdout(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    std::fs::write(folder.join("ext"), "subjectAltName=IP:127.0.0.1,DNS:localhost\n").expect("writable");
    let made = run(&[
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=test authority",
        "-keyout",
        "ca.key",
        "-out",
        "ca.crt",
    ]) && run(&[
        "req",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=127.0.0.1",
        "-keyout",
        "server.key",
        "-out",
        "server.csr",
    ]) && run(&[
        "x509",
        "-req",
        "-in",
        "server.csr",
        "-CA",
        "ca.crt",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-days",
        "2",
        "-extfile",
        "ext",
        "-out",
        "server.crt",
    ]);
    if made { Some(()) } else { missing("openssl that makes certificates") }
}

#[tokio::test]
async fn tls_with_an_authority_of_ones_own() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(()) = certificates(folder.path()) else { return };
    let file = |name: &str| folder.path().join(name);
    let text = |name: &str| file(name).display().to_string();
    let (key, certificate, authority) = (text("server.key"), text("server.crt"), text("ca.crt"));
    let started = RedisServer::start_in(Port::free(), tempfile::tempdir().expect("a folder"), |port, _| {
        let port = port.to_string();
        let words = [
            "--port",
            "0",
            "--tls-port",
            &port,
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--tls-auth-clients",
            "no",
        ];
        let files =
            ["--tls-key-file", &key, "--tls-cert-file", &certificate, "--tls-ca-cert-file", &authority];
        words.iter().chain(&files).map(|word| (*word).to_owned()).collect()
    });
    let Some(server) = started else { return };
    let tls = |ca_file| RedisConfig {
        urls: vec![format!("rediss://127.0.0.1:{}/0", server.port())],
        ca_file,
        ..RedisConfig::default()
    };
    let trusted = handle(&tls(Some(file("ca.crt"))));
    trusted.ping().await.expect("trusted");
    trusted.ensure_groups().await.expect("groups");
    assert!(!trusted.wait_for_work(20, &[]).await.expect("waited"));
    let unknown = handle(&tls(None)).ping().await.expect_err("not trusted");
    assert!(matches!(unknown, FleetError::Unreachable { .. }), "{unknown:?}");
    let plain = RedisConfig { urls: vec![server.url()], ..RedisConfig::default() };
    handle(&plain).ping().await.expect_err("no TLS");
    for (config, word) in [
        (tls(Some(file("none.crt"))), "cannot read"),
        (tls(Some(file("ext"))), "no certificate"),
        (RedisConfig { ca_file: Some(file("ca.crt")), ..plain }, "not rediss"),
    ] {
        let error = Fleet::new(&config, "a", "1").expect_err("does not fit");
        assert!(
            matches!(error, FleetError::Config { .. }) && error.chain().contains(word),
            "{}",
            error.chain()
        );
    }
}

#[test]
fn addresses_that_cannot_work_are_refused_without_being_shown() {
    for (urls, kind) in [
        (vec![], RedisKind::Single),
        (vec!["redis://:pw@:x"], RedisKind::Single),
        (vec!["redis://a:1", "redis://b:2"], RedisKind::Single),
        (vec!["unix:///x/y"], RedisKind::Cluster),
        (vec!["http://:pw@h"], RedisKind::Sentinel),
    ] {
        let urls = urls.into_iter().map(str::to_owned).collect();
        let error =
            Fleet::new(&RedisConfig { urls, kind, ..RedisConfig::default() }, "a", "1").expect_err("refused");
        assert!(matches!(error, FleetError::Config { .. }) && error.retry() == Retry::Never, "{error:?}");
        assert!(!format!("{error:?} {}", error.chain()).contains("pw"));
    }
}

#[tokio::test]
async fn sentinels_lead_to_the_master() {
    let Some(mut master) = RedisServer::start() else { return };
    let port = master.port().to_string();
    let Some(replica) = RedisServer::start_with(&["--save", "", "--replicaof", "127.0.0.1", &port]) else {
        return;
    };
    let monitor = format!(
        "sentinel monitor fleet 127.0.0.1 {port} 1\nsentinel down-after-milliseconds fleet 500\n\
         sentinel failover-timeout fleet 2000\n"
    );
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("sentinel.conf"), monitor).expect("writable");
    let sentinel = RedisServer::start_in(Port::free(), folder, |port, folder| {
        let file = folder.join("sentinel.conf").display().to_string();
        let words = [file.as_str(), "--sentinel", "--port", &port.to_string(), "--bind", "127.0.0.1"]
            .map(str::to_owned);
        words.to_vec()
    });
    let Some(sentinel) = sentinel else { return };
    let config = RedisConfig {
        urls: vec!["redis://127.0.0.1:1".into(), sentinel.url()],
        kind: RedisKind::Sentinel,
        sentinel_service: "fleet".into(),
        ..RedisConfig::default()
    };
    let fleet = handle(&config);
    push(&master, "x", &[]);
    fleet.ensure_groups().await.expect("groups");
    assert!(fleet.wait_for_work(1_000, &[]).await.expect("waited"));
    assert_eq!(names(&fleet.take(1, 0, &[]).await.expect("taken")), ["x"]);

    // The master dies; the replica, which has everything, takes its place.
    crate::servers::wait("the sentinel to know the replica", || {
        let sentinels = get::<Vec<Vec<String>>>(&sentinel, &["SENTINEL", "REPLICAS", "fleet"]);
        (sentinels.len() == 1 && get::<usize>(&replica, &["XLEN", TOPIC]) == 1).then_some(())
    });
    master.kill();
    let begin = std::time::Instant::now();
    let found = loop {
        match fleet.own_pending(5).await {
            Ok(found) => break found,
            Err(error) => assert!(error.retry() != Retry::Never, "{}", error.chain()),
        }
        assert!(begin.elapsed() < crate::servers::LIMIT, "no new master was found");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!(names(&found), ["x"]);
    assert!(fleet.acknowledge(&found[0].entry).await.expect("acknowledged"));
    assert_eq!(get::<usize>(&replica, &["XLEN", TOPIC]), 0);
    let unknown = RedisConfig { sentinel_service: "unknown".into(), ..config };
    let error = handle(&unknown).ping().await.expect_err("no such master");
    assert_eq!(error.retry(), Retry::Reconnect, "{}", error.chain());
}

/// A cluster of one node that has all slots.
pub fn cluster() -> Option<RedisServer> {
    let server = RedisServer::start_cluster()?;
    get::<String>(&server, &["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]);
    crate::servers::wait("a whole cluster", || {
        get::<String>(&server, &["CLUSTER", "INFO"]).contains("cluster_state:ok").then_some(())
    });
    Some(server)
}

#[tokio::test]
async fn a_cluster_does_all_of_it() {
    let Some(server) = cluster() else { return };
    let config = RedisConfig { kind: RedisKind::Cluster, ..config(&server) };
    let (a, b) = (handle(&config), Fleet::new(&config, "b", "1").expect("a handle"));
    push(&server, "x", &[]);
    push(&server, "h", &["priority", "high"]);
    a.ensure_groups().await.expect("groups");
    assert!(a.wait_for_work(1_000, &[]).await.expect("waited"));
    let taken = a.take(5, 0, &[]).await.expect("taken");
    assert_eq!(names(&taken), ["h", "x"]);
    assert_eq!(taken[0].entry.queue, "{training_queue}:high");
    assert_eq!(a.own_pending(5).await.expect("found").len(), 2);
    assert_eq!(b.steal(0, 1).await.expect("stolen").entries.len(), 1);
    assert_eq!(a.renew_entries(&[taken[0].entry.clone()]).await.expect("lost").len(), 1);
    assert!(b.release(&taken[0].entry).await.expect("released"));
    assert_eq!(names(&a.steal(1_000, 5).await.expect("stolen").entries), ["h"]);
    assert!(a.bury(&taken[0].entry, &taken[0].fields, "why").await.expect("buried"));

    let Acquired::Mine { fence, .. } = a.acquire(&task("t"), "t-instance", 60_000).await.expect("an answer")
    else {
        panic!("held");
    };
    assert!(matches!(
        b.acquire(&task("t"), "t-instance", 60_000).await.expect("an answer"),
        Acquired::Held { .. }
    ));
    assert_eq!(a.renew(&task("t"), "t-instance", fence, 1, 60_000).await.expect("renewed"), Renewed::Mine);
    let old = result("t", "b", fence - 1, json!(0.5), None);
    assert!(matches!(b.publish_result(&old, fence - 1).await.expect("an answer"), Published::Fenced { .. }));
    let body = result("t", "a", fence, json!(0.5), Some(taken[1].entry.clone()));
    assert_eq!(a.publish_result(&body, fence).await.expect("published"), Published::Published);
    assert_eq!(a.publish_result(&body, fence).await.expect("an answer"), Published::Duplicate);
    assert!(a.is_done("t-instance").await.expect("an answer"));
    assert_eq!(a.holder(&task("t")).await.expect("an answer"), None);
    assert_eq!(get::<usize>(&server, &["XLEN", TOPIC]), 0);

    assert!(a.progress(&body.run, &[("EPOCH".into(), "1".into())], true).await.expect("shown"));
    let lines = ["a\n".to_owned()];
    let part = LogPart { from_offset: 0, to_offset: 2, begin_offset: 0, lines: &lines, is_final: false };
    assert_eq!(a.log_lines(&body.run, part).await.expect("logged"), Logged::Appended { offset: 2 });
    assert!(a.log_end(&body.run).await.expect("ended"));
    let epoch = EpochBody { run: body.run.clone(), epoch: 1, metrics: Default::default(), at_unix_ms: 0 };
    assert_eq!(a.publish_metrics(&epoch).await.expect("noted"), Published::Published);
    assert_eq!(a.announce(&[]).await.expect("alive"), Announced::Mine);
    assert_eq!(a.workers().await.expect("listed").len(), 1);
    assert!(a.cancelled(&[task("t")]).await.expect("none").is_empty());
    a.warnings().await.expect("an answer");
    a.job_gone(&task("t")).await.expect("gone");

    get::<i64>(&server, &["RPUSH", "evaluate", "1", "2"]);
    let mut held = Vec::new();
    while held.len() < 2 {
        held.extend(a.take(2, 0, &[]).await.expect("taken"));
    }
    assert!(a.bury(&held[0].entry, &held[0].fields, "why").await.expect("buried"));
    a.leave(&[]).await.expect("left");
    assert_eq!(b.steal(0, 5).await.expect("returned").returned, 1);
}

#[tokio::test]
async fn the_documented_rights_are_enough_on_a_cluster() {
    let Some(server) = cluster() else { return };
    let rights = "~* &progress:* -@all +@read +@write +@stream +@scripting +@connection +@pubsub +time";
    let mut words = vec!["ACL", "SETUSER", "worker", "on", ">pw"];
    words.extend(rights.split(' '));
    get::<String>(&server, &words);
    let config = RedisConfig {
        kind: RedisKind::Cluster,
        username: Some("worker".into()),
        password: Some(Secret::new("pw")),
        ..config(&server)
    };
    handle(&config).ping().await.expect_err("it may not ask which node has what");
    get::<String>(&server, &["ACL", "SETUSER", "worker", "+cluster|slots"]);
    let fleet = handle(&config);
    push(&server, "x", &[]);
    fleet.ensure_groups().await.expect("groups");
    let taken = fleet.take(1, 0, &[]).await.expect("taken");
    let Acquired::Mine { fence, .. } =
        fleet.acquire(&task("t"), "t-instance", 60_000).await.expect("an answer")
    else {
        panic!("held");
    };
    let body = result("t", "a", fence, json!(0.5), Some(taken[0].entry.clone()));
    assert!(fleet.progress(&body.run, &[("EPOCH".into(), "1".into())], false).await.expect("shown"));
    assert_eq!(fleet.announce(&[]).await.expect("alive"), Announced::Mine);
    assert_eq!(fleet.publish_result(&body, fence).await.expect("published"), Published::Published);
    assert!(fleet.log_end(&body.run).await.expect("ended"));
}

#[tokio::test]
async fn a_cluster_that_is_away_is_told_in_time() {
    let Some(mut server) = cluster() else { return };
    let fleet = handle(&RedisConfig { kind: RedisKind::Cluster, ..config(&server) });
    fleet.ping().await.expect("alive");
    server.kill();
    let begin = std::time::Instant::now();
    let error = fleet.ping().await.expect_err("away");
    assert_eq!(error.retry(), Retry::Reconnect, "{}", error.chain());
    assert!(begin.elapsed() < Duration::from_secs(6));
    let error = fleet.ping().await.expect_err("away");
    assert_eq!(error.retry(), Retry::Reconnect, "{}", error.chain());
    server.start_again();
    let mut tries = 0;
    while let Err(error) = fleet.ping().await {
        tries += 1;
        assert!(tries < 50, "{}", error.chain());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
