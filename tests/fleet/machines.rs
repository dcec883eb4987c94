//! Several machines: one owner for a job, whatever happens to machines and networks.

use std::process::Command;
use std::time::{Duration, Instant};

use boxwright::adapters::store::{self, BucketName, ObjectKey};
use boxwright::job::state::JobState;
use redis::Commands;
use serde_json::Value as Json;

use crate::park::{BEAT_MS, Park, stub_job};
use crate::real::verified;
use crate::servers::proxy::{Fault, Proxy};

#[test]
fn a_dead_machines_job_goes_on_elsewhere_from_its_stored_checkpoint() {
    let Some(park) = Park::with_store() else { return };
    let (mut one, mut two) = (park.machine("one"), park.machine("two"));
    one.start();
    park.push(&[("config", &stub_job("a", "steps=120,pause=0.05"))]);
    one.wait_steps("a", 25);
    // The store has something by now: the first checkpoint goes at once, the others every 0.2 s.
    one.wait("a stored checkpoint", || {
        let services = one.run(&["status", "a", "--json"]);
        String::from_utf8_lossy(&services.stdout).contains("last_checkpoint_sha256").then_some(())
    });
    two.start();
    two.wait_log("takes jobs from");
    let died = Instant::now();
    one.kill_service();
    let taken = two.wait("the job on the other machine", || two.record("a"));
    let claimed = died.elapsed();
    assert_eq!((taken.attempts_before, taken.instance.starts_with("training_queue/")), (1, true));
    let result = park.wait_result(&two, "a");
    assert_eq!((result["status"].as_str(), result["machine_id"].as_str()), (Some("completed"), Some("two")));
    assert_eq!(result["attempt"].as_i64(), Some(2), "attempts count over machines");
    let first = two.stub("a", "attempts");
    let from: usize = first.trim().rsplit(' ').next().expect("a step").parse().expect("a number");
    assert!(from >= 1, "it goes on from the store, not from its beginning: {first}");
    assert!(two.stub("a", "steps").lines().count() <= 120 - from);
    // Three heartbeats, and the time of a busy machine.
    assert!(claimed < Duration::from_millis(BEAT_MS * 3) + Duration::from_secs(20), "{claimed:?}");
    // The dead machine comes back: it is told, and does not train.
    one.start();
    let moved =
        one.wait("the old record to end", || one.record("a").filter(|record| record.state.is_terminal()));
    assert!(matches!(moved.state, JobState::Moved), "{} ({})", moved.state, moved.reason);
    assert_eq!(park.results_of("a").len(), 1);
    for world in [&mut one, &mut two] {
        world.end_service(libc::SIGTERM);
    }
}

#[test]
fn a_machine_cut_off_for_longer_than_the_lease_is_fenced_when_it_comes_back() {
    let Some(park) = Park::with_store() else { return };
    let proxy = Proxy::tcp(([127, 0, 0, 1], park.redis.port()).into());
    let url = format!("redis://{}", proxy.address());
    let (mut cut, mut other) = (park.machine_at("cut", &url), park.machine("other"));
    cut.start();
    park.push(&[("config", &stub_job("a", "steps=400,pause=0.05"))]);
    cut.wait_steps("a", 5);
    other.start();
    other.wait_log("takes jobs from");
    proxy.set(Fault::BlackHole);
    other.wait_steps("a", 1);
    // The one that is cut off cannot know, and goes on.
    let before = cut.stub("a", "steps").lines().count();
    cut.wait_steps("a", before + 3);
    proxy.set(Fault::None);
    cut.wait_state("a", JobState::Moved);
    let stopped_at = cut.stub("a", "steps").lines().count();
    let result = park.wait_result(&other, "a");
    assert_eq!(
        (result["status"].as_str(), result["machine_id"].as_str()),
        (Some("completed"), Some("other"))
    );
    assert_eq!(cut.stub("a", "steps").lines().count(), stopped_at, "its trainer is gone");
    other.wait("the end to be shown", || {
        let shown = park.hash("progress:a");
        let is_shown = shown["MACHINE_ID"] == "other" && shown["status"] == "completed";
        let ttl = |key: &str| park.client().pttl::<_, i64>(key).expect("reads");
        (is_shown && ttl("progress:a") > 0 && ttl("stream:a") > 0).then_some(())
    });
    for world in [&mut cut, &mut other] {
        world.end_service(libc::SIGTERM);
    }
}

/// The store is reached by both all the time. The second machine sends nothing before the end of the job.
#[test]
fn a_machine_that_is_cut_off_changes_nothing_in_the_store_from_the_takeover_on() {
    let Some(mut park) = Park::with_store() else { return };
    let proxy = Proxy::tcp(([127, 0, 0, 1], park.redis.port()).into());
    let url = format!("redis://{}", proxy.address());
    let mut cut = park.machine_at("cut", &url);
    park.upload_interval = 3600.0;
    let mut other = park.machine("other");
    let config = park.store.as_ref().expect("is there").config();
    let store = store::open(&config).expect("opens").expect("a store");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let models = BucketName::new("models").expect("a bucket");
    let manifest = || -> Option<Json> {
        let key = ObjectKey::new("default/a/manifest.json").expect("a key");
        let text = runtime.block_on(store.get_bytes(&models, &key, 1 << 20)).ok()?;
        // The small S3 server shows half of what is being written.
        serde_json::from_slice(&text).ok()
    };
    let objects = || runtime.block_on(store.list(&models, "default/a/", 1000)).expect("listed").entries;

    cut.start();
    park.push(&[("config", &stub_job("a", "steps=300,pause=0.05"))]);
    let first = cut.wait("a stored checkpoint of a later step", || {
        manifest().filter(|there| there["step"].as_u64().is_some_and(|step| step > 3))
    });
    other.start();
    other.wait_log("takes jobs from");
    proxy.set(Fault::BlackHole);
    other.wait_steps("a", 1);
    let claimed = manifest().expect("a manifest");
    let told = |there: &Json| {
        let text = |name: &str| there[name].as_str().unwrap_or_default().to_owned();
        (text("machine_id"), text("status"), there["fence"].as_u64().unwrap_or(0))
    };
    let fence = other.record("a").expect("its job").fence;
    assert_eq!(told(&claimed), ("other".into(), "running".into(), fence), "{claimed}");
    assert!(fence > first["fence"].as_u64().expect("a number"));
    let kinds = |there: &Json| there["files"].as_array().expect("a list").len();
    assert!(kinds(&claimed) >= kinds(&first), "{claimed}");
    // The one that is cut off goes on, and sends; it hears from the store whose the run is.
    cut.wait_log("is not sent: ");
    let there = objects();
    let before = cut.stub("a", "steps").lines().count();
    cut.wait_steps("a", before + 10);
    assert_eq!(cut.record("a").map(|record| record.state), Some(JobState::Running));
    assert_eq!((manifest().expect("a manifest"), objects()), (claimed, there));
    proxy.set(Fault::None);
    cut.wait_state("a", JobState::Moved);
    let result = park.wait_result(&other, "a");
    assert_eq!(
        (result["status"].as_str(), result["machine_id"].as_str()),
        (Some("completed"), Some("other"))
    );
    let whole = other.wait("the whole run in the store", || runtime.block_on(verified(&*store, "a")));
    assert_eq!(told(&whole), ("other".into(), "completed".into(), fence), "{whole}");
    for world in [&mut cut, &mut other] {
        world.end_service(libc::SIGTERM);
    }
}

#[test]
fn a_second_service_of_the_same_name_ends_with_a_word_and_the_first_goes_on() {
    let Some(park) = Park::new() else { return };
    let (mut first, mut second) = (park.machine("same"), park.machine("same"));
    first.start();
    first.wait_log("takes jobs from");
    second.start();
    let status = second.wait_service();
    assert_eq!(status.code(), Some(1));
    assert!(second.logs().contains("another service uses the machine id same"), "{}", second.logs());
    park.push(&[("config", &stub_job("a", "steps=2"))]);
    park.wait_result(&first, "a");
    // A restart of the same service is no stranger.
    first.kill_service();
    first.start();
    park.push(&[("config", &stub_job("b", "steps=2"))]);
    park.wait_result(&first, "b");
    first.end_service(libc::SIGTERM);
}

/// Words that run the program on a host of this name.
fn on_host(name: &str) -> [String; 6] {
    let script = format!("hostname {name} && exec \"$@\"");
    ["unshare", "--uts", "sh", "-c", &script, "sh"].map(str::to_owned)
}

#[test]
fn a_machine_keeps_its_name_when_its_host_gets_another_and_a_copy_of_its_state_does_not_take_it() {
    if !Command::new("unshare").args(["--uts", "true"]).status().is_ok_and(|status| status.success()) {
        println!("skipped: this user may not name a host");
        return;
    }
    let Some(park) = Park::new() else { return };
    let (mut first, mut copy) = (park.machine("unused"), park.machine("unused"));
    for (world, host) in [(&mut first, "container-1"), (&mut copy, "container-3")] {
        world.set("MACHINE_ID", "");
        world.launch_by(&on_host(host).each_ref().map(String::as_str));
    }
    first.start();
    park.push(&[("config", &stub_job("a", "steps=60,pause=0.02"))]);
    first.wait_steps("a", 5);
    first.kill_service();
    first.launch_by(&on_host("container-2").each_ref().map(String::as_str));
    first.start();
    let result = park.wait_result(&first, "a");
    assert_eq!((result["machine_id"].as_str(), result["attempt"].as_i64()), (Some("container-1"), Some(2)));
    first.wait_log("the name of this machine is container-1, as at the first start");
    first.end_service(libc::SIGTERM);
    std::fs::create_dir(copy.path("state")).expect("created");
    for name in ["journal.sqlite", "journal.sqlite-wal"] {
        if first.path("state").join(name).exists() {
            std::fs::copy(first.path("state").join(name), copy.path("state").join(name)).expect("copied");
        }
    }
    let beats = first.logs().matches("takes jobs from").count();
    first.start();
    first.wait("it to be heard", || (first.logs().matches("takes jobs from").count() > beats).then_some(()));
    copy.start();
    assert_eq!(copy.wait_service().code(), Some(1));
    assert!(copy.logs().contains("another service uses the machine id container-1"), "{}", copy.logs());
    first.end_service(libc::SIGTERM);
}

#[test]
fn a_drained_machine_finishes_what_it_has_and_takes_nothing() {
    let Some(park) = Park::new() else { return };
    let (mut drained, mut other) = (park.machine("drained"), park.machine("other"));
    drained.start();
    park.push(&[("config", &stub_job("a", "steps=20,pause=0.05"))]);
    drained.wait_state("a", JobState::Running);
    assert!(drained.run(&["drain"]).status.success());
    drained.wait_log("drained: all");
    park.push(&[("config", &stub_job("b", "steps=2"))]);
    assert_eq!(park.wait_result(&drained, "a")["machine_id"], "drained");
    assert!(drained.run(&["drain", "--wait"]).status.success());
    assert!(drained.record("b").is_none() && park.results_of("b").is_empty());
    other.start();
    assert_eq!(park.wait_result(&other, "b")["machine_id"], "other");
    other.end_service(libc::SIGTERM);
    assert!(drained.run(&["undrain"]).status.success());
    park.push(&[("config", &stub_job("c", "steps=2"))]);
    assert_eq!(park.wait_result(&drained, "c")["machine_id"], "drained");
    drained.end_service(libc::SIGTERM);
}

/// A stub in place of the program's look for GPUs shows every service the same one.
#[test]
fn three_services_that_see_one_gpu_have_one_owner() {
    let Some(park) = Park::new() else { return };
    let gpu =
        r#"{"gpus":[{"number":0,"uuid":"GPU-shared","name":"T","memory_bytes":8589934592}],"obstacle":null}"#;
    let mut worlds: Vec<_> = ["one", "two", "three"].iter().map(|name| park.machine(name)).collect();
    for world in &mut worlds {
        world.write("gpus.json", gpu);
        world.start();
    }
    let state = |world: &crate::world::World| {
        let slots = world.slots();
        let slot = slots.into_iter().find(|slot| slot["name"] == "GPU 0")?;
        Some(slot["state"].as_str()?.to_owned())
    };
    worlds[0].wait("one owner, two on standby", || {
        let states: Vec<String> = worlds.iter().filter_map(state).collect();
        let of = |word: &str| states.iter().filter(|state| *state == word).count();
        (of("free") == 1 && of("standby") == 2).then_some(())
    });
    let owner = worlds.iter().position(|world| state(world).as_deref() == Some("free")).expect("one owner");
    park.push(&[("config", &stub_job("a", "steps=5"))]);
    let names = ["one", "two", "three"];
    assert_eq!(park.wait_result(&worlds[owner], "a")["machine_id"], names[owner]);
    assert_eq!(park.wait_result(&worlds[owner], "a")["gpu_uuid"], "GPU-shared");
    worlds[owner].kill_service();
    worlds[(owner + 1) % 3].wait("a new owner", || {
        let heirs =
            (0..3).filter(|&index| index != owner && state(&worlds[index]).as_deref() == Some("free"));
        (heirs.count() == 1).then_some(())
    });
    for (index, world) in worlds.iter_mut().enumerate() {
        if index != owner {
            world.end_service(libc::SIGTERM);
        }
    }
    // Who ends in an orderly way holds nothing any more.
    assert_eq!(park.client().exists("gpu:GPU-shared"), Ok(false));
}

#[test]
fn a_job_that_requires_a_gpu_waits_for_a_machine_that_has_one() {
    let Some(park) = Park::new() else { return };
    let (mut plain, mut gifted) = (park.machine("plain"), park.machine("gifted"));
    plain.start();
    park.push(&[("config", &stub_job("a", "steps=2")), ("requires_gpu", "true")]);
    plain.wait_log("requires a GPU, which this machine lacks");
    plain.wait("the reason to be shown", || {
        let shown = park.hash("progress:a");
        shown.get("reason")?.contains("waits for a machine with a GPU").then_some(())
    });
    park.push(&[("config", &stub_job("b", "steps=2"))]);
    assert_eq!(park.wait_result(&plain, "b")["machine_id"], "plain", "others pass it");
    gifted.write(
        "gpus.json",
        r#"{"gpus":[{"number":0,"uuid":"GPU-1","name":"T","memory_bytes":8589934592}],"obstacle":null}"#,
    );
    gifted.start();
    assert_eq!(park.wait_result(&gifted, "a")["machine_id"], "gifted");
    let left: i64 = park.client().xlen("training_queue:dead").expect("reads");
    assert_eq!(left, 0);
    for world in [&mut plain, &mut gifted] {
        world.end_service(libc::SIGTERM);
    }
}
