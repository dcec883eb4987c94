//! `boxwright recommend` on machines that share a Redis, and when that does not answer.

use std::path::Path;

use boxwright::data::synth::{SynthArgs, write_dataset};
use serde_json::Value as Json;

use crate::park::Park;
use crate::servers::proxy::{Fault, Proxy};
use crate::world::World;

/// The answer of a machine with a cache folder of its own.
fn recommend(world: &mut World, data: &Path) -> Json {
    let cache = world.path("cache");
    world.set("BOXWRIGHT_CACHE_DIR", cache);
    let data = data.to_string_lossy();
    let output = world.run(&["recommend", &data, "--device", "cpu", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn cache(answer: &Json) -> [&str; 2] {
    ["metadata", "recommendation"].map(|which| answer["cache"][which].as_str().expect("a word"))
}

#[test]
fn what_one_machine_worked_out_is_known_to_the_next() {
    let Some(park) = Park::new() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("set");
    let set = SynthArgs { images: 8, val_images: 4, imgsz: 64, ..SynthArgs::default() };
    write_dataset(&data, &set).expect("a dataset");
    let (mut one, mut two) = (park.machine("one"), park.machine("two"));
    let first = recommend(&mut one, &data);
    assert_eq!(cache(&first), ["miss", "miss"]);
    let second = recommend(&mut two, &data);
    assert_eq!(cache(&second), ["hit", "hit"], "{second}");
    assert_eq!(
        (&second["recommendation"], &second["metadata"]),
        (&first["recommendation"], &first["metadata"])
    );

    // The documented keys, with their lifetimes.
    for (pattern, seconds) in [("metadata:*", 7 * 24 * 3600), ("recommendation:*", 1800)] {
        let mut client = park.client();
        let keys: Vec<String> = redis::cmd("KEYS").arg(pattern).query(&mut client).expect("reads");
        assert_eq!(keys.len(), 1, "{keys:?}");
        let left: i64 = redis::cmd("TTL").arg(&keys[0]).query(&mut client).expect("reads");
        assert!((seconds - 120..=seconds).contains(&left), "{pattern}: {left} s");
        // Whoever can write to Redis can write anything.
        redis::cmd("SET").arg(&keys[0]).arg("junk\n{}").query::<()>(&mut client).expect("set");
    }
    let mut three = park.machine("three");
    let third = recommend(&mut three, &data);
    assert_eq!(cache(&third), ["miss", "miss"]);
    assert_eq!(third["recommendation"], first["recommendation"]);
}

#[test]
fn a_redis_that_does_not_answer_is_asked_once_and_changes_nothing() {
    let Some(mut park) = Park::new() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("set");
    let set = SynthArgs { images: 8, val_images: 4, imgsz: 64, ..SynthArgs::default() };
    write_dataset(&data, &set).expect("a dataset");
    let proxy = Proxy::tcp(([127, 0, 0, 1], park.redis.port()).into());
    let url = format!("redis://{}", proxy.address());
    proxy.set(Fault::BlackHole);
    let mut slow = park.machine_at("slow", &url);
    let answer = recommend(&mut slow, &data);
    assert_eq!(cache(&answer), ["miss", "miss"]);
    assert_eq!(proxy.counts().connections, 1, "of four questions only the first is asked");
    assert_eq!(cache(&recommend(&mut slow, &data)), ["hit", "hit"], "its own files are enough");
    assert_eq!(proxy.counts().connections, 1);
    park.redis.kill();
    let mut alone = park.machine("alone");
    let again = recommend(&mut alone, &data);
    assert_eq!((cache(&again), &again["recommendation"]), (["miss", "miss"], &answer["recommendation"]));
}
