//! Redis behind TLS with an authority of one's own and a user with the documented rights: it works, and the password is
//! written nowhere.

use std::path::{Path, PathBuf};
use std::process::Command;

use boxwright::job::state::JobState;

use crate::park::stub_job;
use crate::servers::redis::RedisServer;
use crate::servers::{Port, missing, s3};
use crate::world::World;

const PASSWORD: &str = "pw-7c1f0e5a-never-shown";
const WRONG: &str = "pw-wrong-11aa-never-shown";
/// What `docs/redis-keys.md` says that a user needs.
const RIGHTS: &str = "~* &progress:* -@all +@read +@write +@stream +@scripting +@connection +@pubsub +time";

/// A server with TLS for the machines and a plain port for the test, and its folder of certificates.
fn server() -> Option<(RedisServer, Port, tempfile::TempDir)> {
    let folder = tempfile::tempdir().expect("a folder");
    if !s3::make_certificates(folder.path()) {
        return missing("openssl that makes certificates");
    }
    let file = |name: &str| folder.path().join(name).display().to_string();
    let (key, certificate, authority) = (file("private.key"), file("public.crt"), file("ca.crt"));
    let plain = Port::free();
    let plain_number = plain.number().to_string();
    let server =
        RedisServer::start_in(Port::free(), tempfile::tempdir().expect("a folder"), move |port, at| {
            let (port, at) = (port.to_string(), at.display().to_string());
            let mut words =
                vec!["--port", &plain_number, "--tls-port", &port, "--bind", "127.0.0.1", "--save", ""];
            words.extend(["--appendonly", "yes", "--dir", &at, "--tls-auth-clients", "no"]);
            words.extend(["--tls-key-file", &key, "--tls-cert-file", &certificate]);
            words.extend(["--tls-ca-cert-file", &authority]);
            words.into_iter().map(str::to_owned).collect()
        })?;
    Some((server, plain, folder))
}

/// Files below a folder that hold one of these texts.
fn holders(folder: &Path, texts: &[&str], found: &mut Vec<PathBuf>) -> usize {
    let mut looked_at = 0;
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let (path, kind) = (entry.path(), entry.file_type().expect("known"));
        if kind.is_dir() {
            looked_at += holders(&path, texts, found);
        } else if kind.is_file() {
            let bytes = std::fs::read(&path).unwrap_or_default();
            let holds = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
            if texts.iter().any(|text| holds(text)) {
                found.push(path);
            }
            looked_at += 1;
        }
    }
    looked_at
}

#[test]
fn a_user_with_the_documented_rights_behind_tls_works_and_its_password_is_written_nowhere() {
    let Some((redis, plain, folder)) = server() else { return };
    let client = redis::Client::open(format!("redis://{}", plain.address())).expect("an address");
    let mut client = client.get_connection().expect("the plain port answers");
    let mut user = redis::cmd("ACL");
    user.arg("SETUSER").arg("worker").arg("on").arg(format!(">{PASSWORD}"));
    user.arg(RIGHTS.split(' ').collect::<Vec<_>>());
    // One right is missing at first.
    user.arg("-time").query::<()>(&mut client).expect("a user");

    let secrets = tempfile::tempdir().expect("a folder");
    let password_file = secrets.path().join("password");
    std::fs::write(&password_file, format!("{PASSWORD}\n")).expect("written");
    let mut world = World::with(&format!(
        "redis: {{heartbeat_interval_ms: 300, ca_file: {}}}\nstore: {{folder: store}}\n\
         outbox: {{delay_seconds: 0.1, delay_seconds_max: 0.5}}\n",
        folder.path().join("ca.crt").display()
    ));
    world.set("MACHINE_ID", "box-1");
    world.set("REDIS_URL", format!("rediss://127.0.0.1:{}/0", redis.port()));
    world.set("REDIS_USERNAME", "worker");
    world.set("REDIS_PASSWORD_FILE", &password_file);
    world.set("RUST_LOG", "trace");
    world.start();
    let job = stub_job("a", "steps=5");
    let mut push = redis::cmd("XADD");
    push.arg("training_queue").arg("*").arg("config").arg(&job);
    push.query::<String>(&mut client).expect("added");
    // Down stays down, although every connection is made; and the log is not filled.
    let queue_state = |world: &World| {
        let output = world.run(&["status", "--services", "--json"]);
        let services: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let queue = services.as_array()?.iter().find(|line| line["service"] == "queue")?.clone();
        Some(queue["state"].as_str()?.to_owned())
    };
    world.wait_log("does not work");
    world.wait("the state", || (queue_state(&world)? == "down").then_some(()));
    let states: Vec<Option<String>> = (0..10).map(|_| queue_state(&world)).collect();
    let downs = states.iter().filter(|state| state.as_deref() == Some("down")).count();
    assert!(downs >= 5, "{states:?}");
    assert!(world.logs().matches("does not show its configuration").count() <= 2, "{}", world.logs());
    // It goes on by itself.
    redis::cmd("ACL").arg("SETUSER").arg("worker").arg("+time").query::<()>(&mut client).expect("a right");
    world.wait_state("a", JobState::Completed);
    let published = || {
        let rows: redis::streams::StreamRangeReply =
            redis::cmd("XRANGE").arg("results_queue").arg("-").arg("+").query(&mut client).ok()?;
        rows.ids.first()?.get::<String>("result")
    };
    let result = world.wait("the result", published);
    assert!(result.contains("\"completed\""), "{result}");

    let mut said = Vec::new();
    for arguments in [
        &["status"][..],
        &["status", "--json"],
        &["status", "a", "--json"],
        &["status", "--services"],
        &["status", "--services", "--json"],
        &["logs", "a"],
    ] {
        let output = world.run(arguments);
        said.push(format!("{arguments:?} {output:?}"));
    }
    assert!(said[3].contains("redis") && said[3].contains("up"), "{}", said[3]);
    let pid = world.pid().to_string();
    let listed = Command::new("ps").args(["-o", "args", "-p", &pid]).output();
    said.push(format!("{listed:?}"));
    // The wrong password is a fault with a reason, and is as secret.
    world.end_service(libc::SIGTERM);
    std::fs::write(&password_file, WRONG).expect("written");
    world.start();
    world.wait("the refusal", || {
        let output = world.run(&["status", "--services"]);
        let text = format!("{output:?}");
        said.push(text.clone());
        (text.contains("down") && text.contains("does not accept the user or the password")).then_some(())
    });
    world.end_service(libc::SIGTERM);
    for text in &said {
        assert!(!text.contains(PASSWORD) && !text.contains(WRONG), "{text}");
    }
    let mut found = Vec::new();
    let looked_at = holders(&world.path(""), &[PASSWORD, WRONG], &mut found);
    assert!(found.is_empty(), "{found:?}");
    assert!(looked_at >= 10, "the journal, the logs, the run, the store: {looked_at} files");
}
