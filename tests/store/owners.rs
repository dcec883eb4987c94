//! One owner at a time: what an earlier owner still does changes nothing of what the later one has.

use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use boxwright::adapters::sink::DeliveryError;
use boxwright::adapters::store::archive::{Claimed, Manifest, Pointer, Role, StoreSink, claim};
use boxwright::adapters::store::{
    BucketName, Content, Expected, Listed, LocalFile, ObjectEntry, ObjectHead, ObjectKey, ObjectStore,
    StoreError, Versioned, found,
};
use boxwright::job::delivery::{FilesBody, FilesMoment};
use boxwright::job::service::StoreConfig;
use sha2::{Digest, Sha256};

use super::archive::{body, checkpoint, deliver, first_files, manifest, note};
use super::{bucket, folder_store, key, noise, open, s3, write};

type Act = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Where something happens in between.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Moment {
    /// Before a file whose key ends so is sent.
    File(&'static str),
    /// After one was.
    FileSent(&'static str),
    /// Before the manifest is written, after it was looked at.
    Manifest,
    /// After it was written.
    ManifestWritten,
    /// Before the pointer to promoted weights is written, after they were copied.
    Pointer,
}

/// A store in which something happens between two acts of its user, once.
struct Between {
    inner: Arc<dyn ObjectStore>,
    act: Mutex<Option<(Moment, Act)>>,
}

impl Between {
    fn new(
        inner: &Arc<dyn ObjectStore>,
        moment: Moment,
        act: impl Future<Output = ()> + Send + 'static,
    ) -> Arc<Self> {
        Arc::new(Self { inner: inner.clone(), act: Mutex::new(Some((moment, Box::pin(act)))) })
    }

    async fn now(&self, is_it: impl Fn(Moment) -> bool) {
        let act = {
            let mut act = self.act.lock().expect("no poison");
            if act.as_ref().is_some_and(|(moment, _)| is_it(*moment)) { act.take() } else { None }
        };
        if let Some((_, act)) = act {
            act.await;
        }
    }

    fn happened(&self) -> bool {
        self.act.lock().expect("no poison").is_none()
    }
}

#[async_trait]
impl ObjectStore for Between {
    async fn prepare(&self, bucket: &BucketName) -> Result<(), StoreError> {
        self.inner.prepare(bucket).await
    }
    async fn put_file(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        file: &LocalFile,
    ) -> Result<ObjectHead, StoreError> {
        self.now(|moment| matches!(moment, Moment::File(end) if key.as_str().ends_with(end))).await;
        let stored = self.inner.put_file(bucket, key, file).await;
        self.now(|moment| matches!(moment, Moment::FileSent(end) if key.as_str().ends_with(end))).await;
        stored
    }
    async fn put_bytes(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes: Vec<u8>,
    ) -> Result<ObjectHead, StoreError> {
        self.inner.put_bytes(bucket, key, bytes).await
    }
    async fn put_if(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes: Vec<u8>,
        expected: Expected<'_>,
    ) -> Result<Option<ObjectHead>, StoreError> {
        self.now(|moment| moment == Moment::Manifest).await;
        let is_pointer = bucket.as_str() == "better-models";
        self.now(|moment| moment == Moment::Pointer && is_pointer).await;
        let stored = self.inner.put_if(bucket, key, bytes, expected).await;
        self.now(|moment| moment == Moment::ManifestWritten).await;
        stored
    }
    async fn head(&self, bucket: &BucketName, key: &ObjectKey) -> Result<ObjectHead, StoreError> {
        self.inner.head(bucket, key).await
    }
    async fn get_to_file(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        path: &Path,
        expected: Option<&str>,
    ) -> Result<ObjectHead, StoreError> {
        self.inner.get_to_file(bucket, key, path, expected).await
    }
    async fn get_versioned(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes_max: u64,
    ) -> Result<Versioned, StoreError> {
        self.inner.get_versioned(bucket, key, bytes_max).await
    }
    async fn list(&self, bucket: &BucketName, prefix: &str, items_max: usize) -> Result<Listed, StoreError> {
        self.inner.list(bucket, prefix, items_max).await
    }
    async fn delete(&self, bucket: &BucketName, key: &ObjectKey) -> Result<(), StoreError> {
        self.inner.delete(bucket, key).await
    }
    async fn copy(
        &self,
        from: (&BucketName, &ObjectKey),
        to: (&BucketName, &ObjectKey),
    ) -> Result<(), StoreError> {
        self.inner.copy(from, to).await
    }
    fn url(&self, bucket: &BucketName, key: &ObjectKey) -> String {
        self.inner.url(bucket, key)
    }
}

/// Every object of the bucket of runs with its mark, and whether something was promoted.
async fn everything(store: &dyn ObjectStore) -> (Vec<ObjectEntry>, bool) {
    let promoted = store.list(&bucket("better-models"), "", 99).await;
    let promoted = found(promoted).expect("answers").is_some_and(|list| !list.entries.is_empty());
    (store.list(&bucket("models"), "", 999).await.expect("listed").entries, promoted)
}

fn is_fenced<T: std::fmt::Debug>(delivered: &Result<T, DeliveryError>) -> bool {
    matches!(delivered, Err(DeliveryError::Fenced { owner, fence: 2 }) if owner == "machine-2")
}

/// The claim of the second owner.
async fn take(store: &dyn ObjectStore) {
    let run = body(Path::new("nowhere"), "i1", 2, FilesMoment::Checkpoint).run;
    claim(store, &bucket("models"), &run).await.expect("claimed");
}

/// From the claim on, which needs no upload, the first owner changes nothing.
async fn claiming(store: Arc<dyn ObjectStore>, config: &StoreConfig) {
    let sink = StoreSink::new(config, store.clone()).expect("a sink");
    let models = bucket("models");
    let folder = tempfile::tempdir().expect("a folder");
    first_files(folder.path());
    let run = |instance: &str, fence| body(folder.path(), instance, fence, FilesMoment::Checkpoint).run;
    deliver(&sink, body(folder.path(), "i1", 1, FilesMoment::Checkpoint)).await.expect("delivered");
    let before = manifest(store.as_ref()).await;
    for _ in 0..2 {
        let left_by = claim(store.as_ref(), &models, &run("i1", 2)).await.expect("claimed").left_by;
        assert!(left_by.is_some_and(|machine| machine.starts_with("machine-")));
    }
    let claimed = manifest(store.as_ref()).await;
    assert_eq!(
        (claimed.fence, claimed.machine_id.as_str(), claimed.status.as_str()),
        (2, "machine-2", "running")
    );
    assert_eq!((&claimed.files, claimed.epoch, claimed.step), (&before.files, before.epoch, before.step));
    assert!(claimed.parent.is_some());
    let there = everything(store.as_ref()).await;
    // It is further by now, has better weights, has finished.
    checkpoint(folder.path(), 40, 1000);
    write(folder.path(), "weights/best.safetensors", &noise(40_000, 9));
    write(folder.path(), "results.csv", b"epoch,time\n9,1\n");
    for moment in [FilesMoment::Checkpoint, FilesMoment::End] {
        let late = deliver(&sink, body(folder.path(), "i1", 1, moment)).await;
        assert!(is_fenced(&late), "{late:?}");
        assert_eq!(everything(store.as_ref()).await, there);
    }
    let late = claim(store.as_ref(), &models, &run("i1", 1)).await;
    assert!(matches!(late, Err(StoreError::Fenced { fence: 2, .. })), "{late:?}");
    // The next submission is another run: what there is of the former one keeps its state until there is more.
    let ended = deliver(&sink, body(folder.path(), "i1", 2, FilesMoment::End)).await.expect("delivered");
    assert!(note(&ended, "promotion").starts_with("promoted"), "{ended:?}");
    let claimed = claim(store.as_ref(), &models, &run("i2", 3)).await.expect("claimed");
    assert_eq!(claimed, Claimed { left_by: None });
    let kept = manifest(store.as_ref()).await;
    assert_eq!((kept.fence, kept.instance.as_str(), kept.status.as_str()), (3, "i1", "completed"));
    // Of a run that has nothing yet, too.
    let other = FilesBody { run: run("i1", 2), ..body(folder.path(), "i1", 2, FilesMoment::End) };
    let other = |fence| {
        let mut body = other.clone();
        body.run.task_id = "task-2".parse().expect("an id");
        (body.run.fence, body.run.machine_id) = (fence, format!("machine-{fence}"));
        body
    };
    assert_eq!(
        claim(store.as_ref(), &models, &other(2).run).await.expect("claimed"),
        Claimed { left_by: None }
    );
    let late = deliver(&sink, other(1)).await;
    assert!(is_fenced(&late), "{late:?}");
    assert_eq!(store.list(&models, "plants/task-2/", 9).await.expect("listed").entries.len(), 1);
    deliver(&sink, other(2)).await.expect("delivered");
}

/// The run is taken over at every moment of the first owner's last delivery.
async fn straddling(store: Arc<dyn ObjectStore>, config: &StoreConfig) {
    let (first, second) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let moments = [
        Moment::File("weights/best.safetensors"),
        Moment::FileSent("weights/best.safetensors"),
        Moment::File("step-000000040.ckpt"),
        Moment::Manifest,
        Moment::ManifestWritten,
    ];
    let config = &StoreConfig { keep_last: 1, ..config.clone() };
    let newest = key("plants/task-1/state/step-000000040.ckpt");
    store.prepare(&bucket("models")).await.expect("prepared");
    let direct = StoreSink::new(config, store.clone()).expect("a sink");
    for (number, moment) in moments.into_iter().enumerate() {
        let instance = format!("i{number}");
        store.delete(&bucket("models"), &newest).await.expect("deleted");
        let fence = |owner: u64| number as u64 * 10 + owner;
        let of = |run: &Path, owner: u64, moment| FilesBody {
            fitness: Some(number as f64 + owner as f64 / 10.0),
            ..body(run, &instance, fence(owner), moment)
        };
        for folder in [first.path(), second.path()] {
            let _ = std::fs::remove_dir_all(folder.join("state"));
            first_files(folder);
        }
        deliver(&direct, of(first.path(), 1, FilesMoment::Checkpoint)).await.expect("delivered");
        checkpoint(first.path(), 40, 1000);
        write(first.path(), "weights/best.safetensors", &noise(40_000, 90 + number as u64));
        write(first.path(), "result.json", b"{\"first\":1}");
        let taken = {
            let (store, run) = (store.clone(), of(second.path(), 2, FilesMoment::Checkpoint).run);
            async move {
                claim(store.as_ref(), &bucket("models"), &run).await.expect("claimed");
            }
        };
        let between = Between::new(&store, moment, taken);
        let sink = StoreSink::new(config, between.clone()).expect("a sink");
        let late = deliver(&sink, of(first.path(), 1, FilesMoment::End)).await;
        assert!(between.happened(), "{moment:?}");
        assert!(matches!(late, Err(DeliveryError::Fenced { .. })), "{moment:?}: {late:?}");
        let prefix = "plants/task-1/";
        let there = store.list(&bucket("models"), prefix, 999).await.expect("listed").entries;
        let has = |end: &str| there.iter().any(|entry| entry.key.as_str().ends_with(end));
        // What had begun is there; no large file that comes after it is.
        let is_early = matches!(moment, Moment::File(end) | Moment::FileSent(end) if end.contains("best"));
        assert_eq!(has("step-000000040.ckpt"), !is_early, "{moment:?}");
        assert!(has("step-000000020.ckpt"), "{moment:?}: nothing that the later owner needs was removed");
        let promoted = found(store.get_bytes(&bucket("better-models"), &key("plants-v3.json"), 9999).await);
        let promoted = promoted.ok().flatten().unwrap_or_default();
        let promoted = String::from_utf8(promoted).expect("text");
        assert!(!promoted.contains(&format!("\"machine-{}\"", fence(1))), "{moment:?}: {promoted}");
        // The later owner ends: all is its own.
        checkpoint(second.path(), 30, 1000);
        write(second.path(), "result.json", b"{\"second\":1}");
        deliver(&direct, of(second.path(), 2, FilesMoment::End)).await.expect("delivered");
        let kept = manifest_named(store.as_ref()).await;
        assert_eq!((kept.machine_id, kept.status), (format!("machine-{}", fence(2)), "completed".into()));
    }
}

/// The manifest; all that it names is there.
async fn manifest_named(store: &dyn ObjectStore) -> Manifest {
    let prefix = key("plants/task-1");
    let bytes = store.get_bytes(&bucket("models"), &key("plants/task-1/manifest.json"), 1 << 20).await;
    let kept = Manifest::parse(&bytes.expect("there"), &prefix);
    let kept = kept.expect("a good manifest");
    for file in &kept.files {
        let head = store.head(&bucket("models"), &key(&file.key)).await.expect("it is there");
        assert_eq!(head.sha256.as_ref(), Some(&file.sha256), "{}", file.path);
    }
    kept
}

/// An upload of the first owner, begun before it lost the run, ends after the second one has sent its last.
async fn repairing(store: Arc<dyn ObjectStore>, config: &StoreConfig) {
    let (first, second) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    for folder in [first.path(), second.path()] {
        first_files(folder);
    }
    write(first.path(), "weights/best.safetensors", &noise(40_000, 9));
    let models = bucket("models");
    store.prepare(&models).await.expect("prepared");
    take(store.as_ref()).await;
    let late = {
        let (store, path) = (store.clone(), first.path().join("weights/best.safetensors"));
        async move {
            let file = LocalFile::open(&path, Content::InPlace).expect("opened");
            let at = key("plants/task-1/weights/best.safetensors");
            store.put_file(&bucket("models"), &at, &file).await.expect("stored");
        }
    };
    let between = Between::new(&store, Moment::Manifest, late);
    let sink = StoreSink::new(config, between.clone()).expect("a sink");
    deliver(&sink, body(second.path(), "i1", 2, FilesMoment::End)).await.expect("delivered");
    assert!(between.happened());
    let kept = manifest(store.as_ref()).await;
    assert_eq!((kept.machine_id.as_str(), paths_of(&kept, Role::Best)), ("machine-2", 1));
}

fn paths_of(manifest: &Manifest, role: Role) -> usize {
    manifest.files.iter().filter(|file| file.role == role).count()
}

/// A checkpoint file that says how far the run was.
fn telling(run: &Path, iteration: u64, epoch: u32, step: u64) {
    let progress = format!(r#"{{"epoch":{epoch},"step":{step}}}"#);
    let header = serde_json::json!({"__metadata__": {"progress": progress}}).to_string();
    let mut content = (header.len() as u64).to_le_bytes().to_vec();
    content.extend_from_slice(header.as_bytes());
    content.extend_from_slice(&noise(5000, iteration));
    let digest = Sha256::digest(&content);
    content.extend_from_slice(b"BXWRCK01");
    content.extend_from_slice(&digest);
    write(run, &format!("state/step-{iteration:09}.ckpt"), &content);
}

/// The manifest says how far the checkpoint is that it names, not how far the run was when the delivery was made.
async fn telling_how_far(store: Arc<dyn ObjectStore>, config: &StoreConfig) {
    let sink = StoreSink::new(config, store.clone()).expect("a sink");
    let folder = tempfile::tempdir().expect("a folder");
    first_files(folder.path());
    telling(folder.path(), 70, 7, 700);
    deliver(&sink, body(folder.path(), "i1", 1, FilesMoment::Checkpoint)).await.expect("delivered");
    let kept = manifest(store.as_ref()).await;
    assert_eq!((kept.epoch, kept.step), (7, 700));
    // A newer one that is damaged is not sent, and is not asked.
    write(folder.path(), "state/step-000000080.ckpt", b"damaged");
    deliver(&sink, body(folder.path(), "i1", 1, FilesMoment::Checkpoint)).await.expect("delivered");
    let kept = manifest(store.as_ref()).await;
    assert_eq!((kept.epoch, kept.step), (7, 700));
    let ended = FilesBody { epoch: 8, ..body(folder.path(), "i1", 1, FilesMoment::End) };
    deliver(&sink, ended).await.expect("delivered");
    assert_eq!(manifest(store.as_ref()).await.epoch, 8);
}

async fn every(number: u32, store: Arc<dyn ObjectStore>, config: &StoreConfig) {
    match number {
        0 => claiming(store, config).await,
        1 => straddling(store, config).await,
        2 => repairing(store, config).await,
        _ => telling_how_far(store, config).await,
    }
}

#[tokio::test]
async fn a_run_has_one_owner_in_files() {
    for number in 0..4 {
        let (_folder, config, store) = folder_store();
        every(number, store, &config).await;
    }
}

#[tokio::test]
async fn a_run_has_one_owner_on_an_s3_server() {
    for number in 0..4 {
        let Some(server) = s3::server() else { return };
        every(number, open(&server.config()), &server.config()).await;
    }
}

/// Two jobs of one study end at the same time: the better one is promoted, and its weights are those in the place.
#[tokio::test]
async fn of_two_runs_that_end_together_the_better_is_promoted() {
    let scores = [(0.5, 0.6, "task-2"), (0.6, 0.5, "task-1")];
    for (ours, theirs, promoted) in scores {
        let (_folder, config, store) = folder_store();
        let (first, second) =
            (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        for (run, seed) in [(&first, 1), (&second, 2)] {
            write(run.path(), "weights/best.safetensors", &noise(40_000, seed));
        }
        let mut other = FilesBody { fitness: Some(theirs), ..body(second.path(), "i2", 2, FilesMoment::End) };
        other.run.task_id = "task-2".parse().expect("an id");
        let direct = StoreSink::new(&config, store.clone()).expect("a sink");
        let meanwhile = async move {
            let receipt = deliver(&direct, other).await.expect("delivered");
            assert!(note(&receipt, "promotion").starts_with("promoted"), "{receipt:?}");
        };
        let between = Between::new(&store, Moment::Pointer, meanwhile);
        let sink = StoreSink::new(&config, between.clone()).expect("a sink");
        let mine = FilesBody { fitness: Some(ours), ..body(first.path(), "i1", 1, FilesMoment::End) };
        let receipt = deliver(&sink, mine).await.expect("delivered");
        assert!(between.happened());
        let said = note(&receipt, "promotion");
        assert_eq!(said.starts_with("promoted"), promoted == "task-1", "{said}");
        let better = bucket("better-models");
        let text = store.get_bytes(&better, &key("plants-v3.json"), 9999).await.expect("a pointer");
        let pointer: Pointer = serde_json::from_slice(&text).expect("a pointer");
        assert_eq!(pointer.task_id, promoted);
        let head = store.head(&better, &key("plants-v3.safetensors")).await.expect("weights");
        assert_eq!(head.sha256, Some(pointer.sha256), "the weights are those of {promoted}");
        let text = store.get_bytes(&better, &key("plants-v3.txt"), 999).await.expect("a text");
        assert_eq!(String::from_utf8(text).expect("text").trim(), pointer.source);
    }
}
