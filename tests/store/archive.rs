//! Runs in the store: what is kept, what is sent twice (nothing), who may write, what is promoted, what comes back.

use std::path::Path;
use std::sync::Arc;

use boxwright::adapters::sink::{DeliveryError, Receipt, Sink};
use boxwright::adapters::store::archive::{Manifest, Pointer, Role, StoreSink, run_prefix};
use boxwright::adapters::store::restore::restore;
use boxwright::adapters::store::{ObjectStore, StoreError, found};
use boxwright::job::delivery::{Delivery, DeliveryBody, FilesBody, FilesMoment, RunRef, SinkName};
use boxwright::job::service::StoreConfig;
use sha2::{Digest, Sha256};

use super::{bucket, folder_store, key, noise, open, s3, write};

/// A checkpoint file that verifies.
pub fn checkpoint(run: &Path, iteration: u64, bytes: usize) {
    let mut content = noise(bytes, iteration);
    let digest = Sha256::digest(&content);
    content.extend_from_slice(b"BXWRCK01");
    content.extend_from_slice(&digest);
    write(run, &format!("state/step-{iteration:09}.ckpt"), &content);
}

pub fn body(run: &Path, instance: &str, fence: u64, moment: FilesMoment) -> FilesBody {
    FilesBody {
        run: RunRef {
            task_id: "task-1".parse().expect("an id"),
            instance: instance.to_owned(),
            study_name: "plants".into(),
            version: Some(3),
            trial_number: 1,
            kind: "yolo".into(),
            run_dir: run.to_owned(),
            fence,
            machine_id: format!("machine-{fence}"),
        },
        continues: Vec::new(),
        moment,
        status: if moment == FilesMoment::End { "completed" } else { "running" }.into(),
        epoch: 4,
        step: 40,
        metrics: serde_json::Map::new(),
        fitness: Some(0.5),
        fitness_name: "fitness".into(),
        val_fingerprint: Some("images-1".into()),
    }
}

pub async fn deliver(sink: &StoreSink, body: FilesBody) -> Result<Receipt, DeliveryError> {
    let delivery = Delivery {
        id: 1,
        sink: SinkName::Store,
        lane: "task-1".into(),
        key: "files".into(),
        body: DeliveryBody::Files(body),
        attempts: 0,
        at_unix_ms: 0,
    };
    sink.deliver(&delivery).await
}

pub fn note<'a>(receipt: &'a Receipt, name: &str) -> &'a str {
    receipt.notes.iter().find(|(other, _)| *other == name).map_or("", |(_, value)| value.as_str())
}

/// The manifest; everything that it names is there with its checksum, and nothing else of the run is.
pub async fn manifest(store: &dyn ObjectStore) -> Manifest {
    let prefix = run_prefix("plants", "task-1").expect("a prefix");
    let at = prefix.join("manifest.json").expect("a key");
    let bytes = store.get_bytes(&bucket("models"), &at, 1 << 20).await.expect("a manifest");
    let manifest = Manifest::parse(&bytes, &prefix).expect("a good manifest");
    for file in &manifest.files {
        let head = store.head(&bucket("models"), &key(&file.key)).await.expect("it is there");
        assert_eq!((head.bytes, head.sha256.as_ref()), (file.bytes, Some(&file.sha256)), "{}", file.path);
    }
    let mut named: Vec<String> = manifest.files.iter().map(|file| file.key.clone()).collect();
    named.push(at.as_str().to_owned());
    named.sort();
    let there = store.list(&bucket("models"), &format!("{prefix}/"), 1000).await.expect("listed").entries;
    assert_eq!(there.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(), named);
    manifest
}

fn paths(manifest: &Manifest, role: Role) -> Vec<&str> {
    let mut paths: Vec<&str> =
        manifest.files.iter().filter(|file| file.role == role).map(|file| file.path.as_str()).collect();
    paths.sort();
    paths
}

/// A run folder after four epochs.
pub fn first_files(run: &Path) {
    write(run, "args.yaml", b"epochs: 9");
    write(run, "results.csv", b"epoch,time\n4,1\n");
    write(run, "events.jsonl", b"{}\n");
    write(run, "plots/labels.png", b"png");
    write(run, "weights/best.safetensors", &noise(40_000, 1));
    write(run, "weights/last.safetensors", &noise(40_000, 1));
    write(run, "weights/epoch4.safetensors", &noise(40_000, 2));
    write(run, "weights/epoch3.safetensors", &noise(40_000, 3));
    checkpoint(run, 10, 100_000);
    checkpoint(run, 20, 100_000);
}

async fn keeping(store: Arc<dyn ObjectStore>, config: &StoreConfig) {
    let config = StoreConfig { keep_last: 2, keep_every_epochs: 2, ..config.clone() };
    let sink = StoreSink::new(&config, store.clone()).expect("a sink");
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path();
    first_files(run);
    let going = || body(run, "i1", 1, FilesMoment::Checkpoint);
    let receipt = deliver(&sink, going()).await.expect("delivered");
    // Six of seven: the newest weights are the best ones and are copied in the store.
    assert_eq!(note(&receipt, "store_files_sent"), "6");
    assert!(note(&receipt, "store_manifest").ends_with("models/plants/task-1/manifest.json"));
    assert!(note(&receipt, "best_url").ends_with("plants/task-1/weights/best.safetensors"));
    let kept = manifest(store.as_ref()).await;
    assert_eq!(paths(&kept, Role::Checkpoint), ["state/step-000000020.ckpt"]);
    assert_eq!(paths(&kept, Role::Periodic), ["weights/epoch4.safetensors"]);
    assert_eq!(paths(&kept, Role::Run), ["args.yaml", "events.jsonl", "results.csv"]);
    assert_eq!((kept.epoch, kept.fence, kept.parent.clone()), (4, 1, None));
    assert_eq!(
        kept.newest(Role::Checkpoint).map(|file| file.sha256.as_str()),
        Some(note(&receipt, "last_checkpoint_sha256"))
    );

    // Again: nothing is sent. By a process that remembers nothing, too.
    let receipt = deliver(&sink, going()).await.expect("delivered");
    assert_eq!(note(&receipt, "store_bytes_sent"), "0");
    let sink = StoreSink::new(&config, store.clone()).expect("a sink");
    let receipt = deliver(&sink, going()).await.expect("delivered");
    assert_eq!(note(&receipt, "store_bytes_sent"), "0");

    // The run goes on: a log grew, there are new weights and checkpoints; one of them is damaged.
    use std::io::Write;
    let mut log = std::fs::File::options().append(true).open(run.join("events.jsonl")).expect("opened");
    log.write_all(b"{}\n").expect("appended");
    write(run, "weights/last.safetensors", &noise(40_000, 5));
    for iteration in [30, 40, 50] {
        checkpoint(run, iteration, 100_000);
        let receipt = deliver(&sink, going()).await.expect("delivered");
        let sent = if iteration == 30 { "3" } else { "1" };
        assert_eq!(note(&receipt, "store_files_sent"), sent);
        let kept = manifest(store.as_ref()).await;
        let names = [iteration - 10, iteration].map(|iteration| format!("state/step-{iteration:09}.ckpt"));
        assert_eq!(paths(&kept, Role::Checkpoint), names);
        assert!(kept.parent.is_some());
    }
    write(run, "state/step-000000060.ckpt", b"damaged");
    let receipt = deliver(&sink, going()).await.expect("delivered");
    assert_eq!(note(&receipt, "store_files_sent"), "0");
    assert_eq!(paths(&manifest(store.as_ref()).await, Role::Checkpoint).len(), 2);

    // The end: everything, and what no manifest names of old checkpoints goes.
    let stray = key("plants/task-1/state/step-000000001.ckpt");
    store
        .put_bytes(&bucket("models"), &stray, b"left by a delivery that died".to_vec())
        .await
        .expect("stored");
    write(run, "result.json", b"{}");
    write(run, "weights/epoch4.safetensors", &noise(40_000, 4));
    let receipt = deliver(&sink, body(run, "i1", 1, FilesMoment::End)).await.expect("delivered");
    assert_eq!(note(&receipt, "store_files_sent"), "3");
    let kept = manifest(store.as_ref()).await;
    assert_eq!(kept.status, "completed");
    assert_eq!(
        paths(&kept, Role::Run),
        ["args.yaml", "events.jsonl", "plots/labels.png", "result.json", "results.csv"]
    );
    let receipt = deliver(&sink, body(run, "i1", 1, FilesMoment::End)).await.expect("delivered");
    assert_eq!(note(&receipt, "store_bytes_sent"), "0");
    // The folder went away: what is stored stays.
    let gone = deliver(&sink, body(&run.join("none"), "i1", 1, FilesMoment::End)).await;
    assert!(matches!(gone, Err(DeliveryError::Refused { .. })), "{gone:?}");
    manifest(store.as_ref()).await;
}

async fn fencing(store: Arc<dyn ObjectStore>, config: &StoreConfig) {
    let sink = StoreSink::new(config, store.clone()).expect("a sink");
    let (old, new) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    first_files(old.path());
    checkpoint(new.path(), 30, 1000);
    deliver(&sink, body(old.path(), "q/1-0", 1, FilesMoment::Checkpoint)).await.expect("delivered");
    deliver(&sink, body(new.path(), "q/1-0", 2, FilesMoment::Checkpoint)).await.expect("delivered");
    checkpoint(old.path(), 40, 1000);
    let late = deliver(&sink, body(old.path(), "q/1-0", 1, FilesMoment::Checkpoint)).await;
    assert!(
        matches!(&late, Err(DeliveryError::Fenced { owner, fence: 2 }) if owner == "machine-2"),
        "{late:?}"
    );
    let kept = manifest(store.as_ref()).await;
    assert_eq!(kept.machine_id, "machine-2");
    // What the first owner stored and the second does not have is still there.
    assert_eq!(paths(&kept, Role::Checkpoint), ["state/step-000000020.ckpt", "state/step-000000030.ckpt"]);
    assert_eq!(paths(&kept, Role::Best).len(), 1);
    // Another submission of the same job begins anew; nothing of the earlier one stays.
    let again = tempfile::tempdir().expect("a folder");
    checkpoint(again.path(), 5, 1000);
    deliver(&sink, body(again.path(), "q/2-0", 3, FilesMoment::Checkpoint)).await.expect("delivered");
    let kept = manifest(store.as_ref()).await;
    assert_eq!(kept.files.iter().map(|f| f.path.as_str()).collect::<Vec<_>>(), ["state/step-000000005.ckpt"]);
    assert_eq!((kept.instance.as_str(), kept.parent), ("q/2-0", None));
    // A machine that is late with the earlier submission does not replace the newer one.
    let late = deliver(&sink, body(again.path(), "q/1-0", 2, FilesMoment::End)).await;
    assert!(matches!(late, Err(DeliveryError::Fenced { fence: 3, .. })), "{late:?}");
    // A machine's own run of the task counts by another clock, which may be slow.
    deliver(&sink, body(again.path(), "own", 1, FilesMoment::Checkpoint)).await.expect("delivered");
    assert_eq!(manifest(store.as_ref()).await.instance, "own");
}

async fn promoting(store: Arc<dyn ObjectStore>, config: &StoreConfig) {
    let sink = StoreSink::new(config, store.clone()).expect("a sink");
    let folder = tempfile::tempdir().expect("a folder");
    first_files(folder.path());
    let better = bucket("better-models");
    let pointer = async || {
        let text = store.get_bytes(&better, &key("plants-v3.json"), 9999).await;
        found(text).expect("answers").map(|text| serde_json::from_slice::<Pointer>(&text).expect("a pointer"))
    };
    let end = |seed: u64, fitness: f64, images: Option<&str>| {
        write(folder.path(), "weights/best.safetensors", &noise(50_000, seed));
        FilesBody {
            fitness: Some(fitness),
            val_fingerprint: images.map(str::to_owned),
            ..body(folder.path(), &format!("i{seed}"), 1, FilesMoment::End)
        }
    };
    let failed = FilesBody { status: "failed".into(), ..end(10, 0.9, Some("v")) };
    let receipt = deliver(&sink, failed).await.expect("delivered");
    assert_eq!((note(&receipt, "promotion"), pointer().await), ("", None));
    let receipt = deliver(&sink, end(11, 0.5, Some("v"))).await.expect("delivered");
    assert!(note(&receipt, "promotion").starts_with("promoted: "), "{receipt:?}");
    for (seed, fitness, images) in
        [(12, 0.4, Some("v")), (13, 0.9, Some("w")), (14, 0.9, None), (15, f64::NAN, Some("v"))]
    {
        let receipt = deliver(&sink, end(seed, fitness, images)).await.expect("delivered");
        assert!(note(&receipt, "promotion").starts_with("left: "), "{receipt:?}");
        assert_eq!(pointer().await.map(|pointer| pointer.instance), Some("i11".into()));
    }
    let receipt = deliver(&sink, end(16, 0.6, Some("v"))).await.expect("delivered");
    assert!(note(&receipt, "promotion").starts_with("promoted: "), "{receipt:?}");
    let promoted = pointer().await.expect("a pointer");
    assert_eq!((promoted.fitness, promoted.instance.as_str(), promoted.version), (0.6, "i16", 3));
    let weights = store.get_bytes(&better, &key("plants-v3.safetensors"), 99_999).await.expect("weights");
    assert!(weights == noise(50_000, 16));
    let text = store.get_bytes(&better, &key("plants-v3.txt"), 999).await.expect("a text");
    assert_eq!(text, b"models/plants/task-1/weights/best.safetensors\n");
    let receipt = deliver(&sink, end(16, 0.6, Some("v"))).await.expect("delivered");
    assert!(note(&receipt, "promotion").starts_with("left: these weights"), "{receipt:?}");
}

async fn restoring(store: Arc<dyn ObjectStore>, config: &StoreConfig) {
    let models = bucket("models");
    let sink = StoreSink::new(config, store.clone()).expect("a sink");
    let (here, there) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let run = here.path();
    let back = async |to: &Path, instance: &str| {
        restore(store.as_ref(), &models, "plants", "task-1", &[instance], to).await
    };
    store.prepare(&models).await.expect("prepared");
    assert_eq!(back(there.path(), "i1").await.expect("answers"), None);
    first_files(run);
    write(run, "result.json", b"{}");
    for iteration in [30, 40] {
        checkpoint(run, iteration, 100_000);
        deliver(&sink, body(run, "i1", 1, FilesMoment::Checkpoint)).await.expect("delivered");
    }
    deliver(&sink, body(run, "i1", 1, FilesMoment::End)).await.expect("delivered");
    assert_eq!(back(there.path(), "another").await.expect("answers"), None);

    let restored = back(there.path(), "i1").await.expect("answers").expect("restored");
    assert_eq!(restored.checkpoint, Some(there.path().join("state/step-000000040.ckpt")));
    assert_eq!((restored.files, restored.problems.len(), restored.epoch), (6, 0, 4));
    for name in [
        "args.yaml",
        "results.csv",
        "events.jsonl",
        "weights/last.safetensors",
        "weights/best.safetensors",
        "state/step-000000040.ckpt",
    ] {
        let read = |folder: &Path| std::fs::read(folder.join(name)).expect("there");
        assert!(read(run) == read(there.path()), "{name}");
    }
    assert!(!there.path().join("result.json").exists());

    // It went on here: what is here is newer, and nothing is fetched.
    checkpoint(there.path(), 50, 1000);
    write(there.path(), "results.csv", b"newer");
    let restored = back(there.path(), "i1").await.expect("answers").expect("restored");
    assert!(restored.is_local_newer && restored.files == 0);
    assert_eq!(std::fs::read(there.path().join("results.csv")).expect("there"), b"newer");
    // A newer one that is damaged does not count.
    write(there.path(), "state/step-000000050.ckpt", b"damaged");
    std::fs::remove_file(there.path().join("state/step-000000040.ckpt")).expect("removed");
    let restored = back(there.path(), "i1").await.expect("answers").expect("restored");
    assert!(!restored.is_local_newer && restored.files == 2, "{restored:?}");

    // The newest in the store is another object by now: the one before it.
    let empty = tempfile::tempdir().expect("a folder");
    let newest = key("plants/task-1/state/step-000000040.ckpt");
    store.put_bytes(&models, &newest, b"something else".to_vec()).await.expect("stored");
    let weights = key("plants/task-1/weights/last.safetensors");
    store.put_bytes(&models, &weights, b"newer than the manifest".to_vec()).await.expect("stored");
    let restored = back(empty.path(), "i1").await.expect("answers").expect("restored");
    assert_eq!(restored.checkpoint, Some(empty.path().join("state/step-000000030.ckpt")));
    assert_eq!(restored.problems.len(), 1);
    let last = std::fs::read(empty.path().join("weights/last.safetensors")).expect("there");
    assert_eq!(last, b"newer than the manifest");
    // And gone altogether.
    let empty = tempfile::tempdir().expect("a folder");
    store.delete(&models, &newest).await.expect("deleted");
    let restored = back(empty.path(), "i1").await.expect("answers").expect("restored");
    assert_eq!(restored.checkpoint, Some(empty.path().join("state/step-000000030.ckpt")));
    store.delete(&models, &key("plants/task-1/state/step-000000030.ckpt")).await.expect("deleted");
    let empty = tempfile::tempdir().expect("a folder");
    let restored = back(empty.path(), "i1").await.expect("answers").expect("restored");
    assert_eq!((restored.checkpoint, restored.problems.len(), restored.is_lost), (None, 2, true));
    // A manifest that cannot be read is said, not taken for none.
    store.put_bytes(&models, &key("plants/task-1/manifest.json"), b"{".to_vec()).await.expect("stored");
    let broken = back(empty.path(), "i1").await;
    assert!(matches!(broken, Err(StoreError::Integrity { .. })), "{broken:?}");
}

#[tokio::test]
async fn runs_are_kept_in_files() {
    for number in 0..4 {
        let (_folder, config, store) = folder_store();
        every(number, store, &config).await;
    }
}

#[tokio::test]
async fn runs_are_kept_on_an_s3_server() {
    for number in 0..4 {
        let Some(server) = s3::server() else { return };
        every(number, open(&server.config()), &server.config()).await;
    }
}

async fn every(number: u32, store: Arc<dyn ObjectStore>, config: &StoreConfig) {
    match number {
        0 => keeping(store, config).await,
        1 => fencing(store, config).await,
        2 => promoting(store, config).await,
        _ => restoring(store, config).await,
    }
}
