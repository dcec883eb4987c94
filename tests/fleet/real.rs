//! The real trainer on data from the store: a run that another machine finishes ends in the bits of an undisturbed one.

use std::path::Path;
use std::time::Duration;

use boxwright::adapters::process;
use boxwright::adapters::store::{self, BucketName, Content, LocalFile, ObjectKey, ObjectStore};
use boxwright::data::synth::{SynthArgs, write_dataset};
use boxwright::job::state::JobState;
use serde_json::Value as Json;
use sha2::{Digest, Sha256};

use crate::park::Park;
use crate::world::World;

const EPOCHS: usize = 2;
/// 4 images in batches of 2.
const BATCHES: usize = 2;

/// Uploads a small set as `s3://datasets/shapes/shapes.yaml`.
async fn upload(store: &dyn ObjectStore, folder: &Path) {
    let bucket = BucketName::new("datasets").expect("a bucket");
    store.prepare(&bucket).await.expect("prepared");
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(folder).expect("below").to_string_lossy();
            let key = ObjectKey::new(format!("shapes/{}", name.replace("data.yaml", "shapes.yaml")));
            let file = LocalFile::open(&path, Content::Replaced).expect("opens");
            store.put_file(&bucket, &key.expect("a key"), &file).await.expect("stored");
        }
    }
}

/// The manifest of a completed run, whose files are read and verified.
pub async fn verified(store: &dyn ObjectStore, task_id: &str) -> Option<Json> {
    let models = BucketName::new("models").expect("a bucket");
    let key = |key: String| ObjectKey::new(key).expect("a key");
    let bytes =
        store.get_bytes(&models, &key(format!("default/{task_id}/manifest.json")), 1 << 20).await.ok()?;
    let manifest: Json = serde_json::from_slice(&bytes).expect("JSON");
    if manifest["status"] != "completed" {
        return None;
    }
    for file in manifest["files"].as_array().expect("a list") {
        let name = file["key"].as_str().expect("a key").to_owned();
        let bytes =
            store.get_bytes(&models, &key(name), 1 << 30).await.expect("what a manifest names is there");
        assert_eq!(Some(bytes.len() as u64), file["bytes"].as_u64(), "{file}");
        let sum: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(Some(sum.as_str()), file["sha256"].as_str(), "{file}");
    }
    Some(manifest)
}

fn job(task_id: &str) -> String {
    format!(
        "model: yolov8n\ntype: yolo\ntask_id: {task_id}\ntrain:\n  data: s3://datasets/shapes/shapes.yaml\n  \
         epochs: {EPOCHS}\n  imgsz: 64\n  batch: 2\n  nbs: 4\n  workers: 1\n  plots: false\n  pretrained: false\n"
    )
}

/// Stops the trainer at its first checkpoint, waits until that is in the store, and kills everything.
fn die_after_the_first_stored_checkpoint(world: &mut World, task_id: &str) {
    let name = format!("state/step-{BATCHES:09}.ckpt");
    let trainer = world.wait("the checkpoint of the first epoch", || {
        let record = world.record(task_id)?;
        let is_there = record.run_dir.join(&name).is_file();
        record.process.filter(|_| is_there)
    });
    process::signal(trainer.pid, libc::SIGSTOP);
    world.wait("the stored checkpoint", || {
        world.record(task_id)?.notes.get("last_checkpoint_url")?.ends_with(&name).then_some(())
    });
    world.kill_service();
    world.wait("the end of the trainer", || (!process::is_alive(trainer)).then_some(()));
}

#[test]
fn a_run_that_another_machine_finishes_from_the_store_ends_in_the_same_bits() {
    let Some(mut park) = Park::with_store() else { return };
    park.more = "trainer: {program: null}\n".to_owned();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let config = park.store.as_ref().expect("is there").config();
    let store = store::open(&config).expect("opens").expect("a store");
    let folder = tempfile::tempdir().expect("a folder");
    let set = SynthArgs { images: BATCHES * 2, val_images: 2, imgsz: 64, ..SynthArgs::default() };
    write_dataset(&folder.path().join("set"), &set).expect("a small set");
    runtime.block_on(upload(&*store, &folder.path().join("set")));

    let limit = Duration::from_secs(600);
    let (mut one, mut two) = (park.machine("one"), park.machine("two"));
    for world in [&mut one, &mut two] {
        world.set_limit(limit);
        let cache = world.path("cache");
        world.set("BOXWRIGHT_CACHE_DIR", cache);
    }
    one.start();
    park.push(&[("config", &job("calm"))]);
    let calm = park.wait_result(&one, "calm");
    assert_eq!((calm["status"].as_str(), calm["attempt"].as_i64()), (Some("completed"), Some(1)), "{calm}");

    park.push(&[("config", &job("moved"))]);
    die_after_the_first_stored_checkpoint(&mut one, "moved");
    two.start();
    let moved = park.wait_result(&two, "moved");
    let told = (moved["status"].as_str(), moved["machine_id"].as_str(), moved["attempt"].as_i64());
    assert_eq!(told, (Some("completed"), Some("two"), Some(2)), "{moved}\n{}", two.logs());
    let brought = format!("as the machine one left it (step-{BATCHES:09}.ckpt)");
    assert!(two.logs().contains(&brought), "{}", two.logs());
    for file in ["best_checkpoint", "last_checkpoint"] {
        let sum = |result: &Json| result[file]["sha256"].as_str().map(str::to_owned);
        assert!(sum(&calm).is_some_and(|sum| sum.len() == 64), "{calm}");
        assert_eq!(sum(&moved), sum(&calm), "{file} of a run on two machines");
    }
    assert_eq!((&moved["metrics"], &moved["fitness"]), (&calm["metrics"], &calm["fitness"]));
    let rows = |world: &World, id: &str| -> Vec<Vec<String>> {
        let folder = world.wait_state(id, JobState::Completed).run_dir;
        let text = std::fs::read_to_string(folder.join("results.csv")).expect("results");
        // The second column is time.
        let row = |line: &str| -> Vec<String> {
            line.split(',').enumerate().filter(|(i, _)| *i != 1).map(|(_, field)| field.to_owned()).collect()
        };
        text.lines().map(row).collect()
    };
    let (calm_rows, moved_rows) = (rows(&one, "calm"), rows(&two, "moved"));
    assert_eq!(calm_rows.len(), EPOCHS + 1);
    assert_eq!(moved_rows, calm_rows, "one row for each epoch, the same figures");

    for task_id in ["calm", "moved"] {
        let manifest =
            two.wait("the whole run in the store", || runtime.block_on(verified(&*store, task_id)));
        let result = if task_id == "calm" { &calm } else { &moved };
        let of = |role: &str| {
            let files = manifest["files"].as_array().expect("a list");
            files
                .iter()
                .find(|file| file["role"] == role)
                .unwrap_or_else(|| panic!("{role}: {manifest}"))
                .clone()
        };
        for (role, file) in [("best", "best_checkpoint"), ("last", "last_checkpoint")] {
            assert_eq!(of(role)["sha256"], result[file]["sha256"], "{task_id} {file}");
        }
        assert!(of("checkpoint")["path"].as_str().is_some_and(|path| path.starts_with("state/step-")));
    }
    two.end_service(libc::SIGTERM);
}
