use super::*;
use crate::adapters::queue::JobStore;
use crate::adapters::queue::journal::Journal;
use crate::adapters::store::ObjectKey;
use crate::adapters::store::folder::FolderStore;
use crate::job::delivery::QueueEntry;
use crate::job::record::{Continued, NewJob, SharedJob};
use crate::job::service::ServiceConfig;
use crate::job::spec::JobSpec;

/// A folder, a store in it, and a journal.
struct World {
    folder: tempfile::TempDir,
    supply: Supply,
    journal: Journal,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let store = FolderStore::new(&folder.path().join("store")).expect("opens");
        let supply = Supply {
            store: Arc::new(store),
            bucket: BucketName::new("models").expect("valid"),
            datasets_dir: folder.path().join("datasets"),
            machine_id: "m".into(),
        };
        Self { folder, supply, journal: Journal::in_memory().expect("opens") }
    }

    /// A job in an attempt.
    fn job(&mut self, id: &str, shared: Option<SharedJob>, continues: Option<Continued>) -> JobRecord {
        let text = format!(
            "model: yolov8n\ntype: yolo\ntask_id: {id}\ntrain: {{data: d}}\nsweeper: {{study_name: s}}\n"
        );
        let context = ServiceConfig::default().spec_context(self.folder.path().to_owned());
        let spec = JobSpec::load(text.as_bytes(), "t", &context).expect("valid").spec;
        let run_dir = self.folder.path().join("runs").join(id);
        let (source, content_sha256, reason) = ("t".into(), "0".into(), "waits".into());
        let new = NewJob { spec, source, content_sha256, run_dir, reason, shared, continues };
        let record = self.journal.accept(new, None).expect("accepted");
        self.journal.begin_attempt(record.seq, "starts").expect("legal")
    }

    /// What lies at the key of a job's manifest.
    async fn put_manifest(&self, id: &str, text: String) {
        self.supply.store.prepare(&self.supply.bucket).await.expect("made");
        let key = ObjectKey::new(format!("s/{id}/manifest.json")).expect("a key");
        self.supply.store.put_bytes(&self.supply.bucket, &key, text.into_bytes()).await.expect("stored");
    }

    async fn bring(&self, record: &JobRecord) -> Result<(), Ending> {
        bring(record, &self.supply).await.map(|_| ())
    }
}

fn from_elsewhere() -> SharedJob {
    let entry = QueueEntry { queue: "q".into(), id: "1-0".into(), is_list: false };
    SharedJob { instance: "q/1-0".into(), entry, fence: 5, attempts_before: 2 }
}

fn class(ending: Result<(), Ending>) -> Option<FailureClass> {
    match ending {
        Ok(()) => None,
        Err(Ending::Failed { class, .. }) => Some(class),
        Err(other) => panic!("{other:?}"),
    }
}

/// A manifest that names a checkpoint; the object is not there.
fn manifest(id: &str, instance: &str) -> String {
    let path = "state/step-000000010.ckpt";
    serde_json::json!({
        "format": 1, "task_id": id, "instance": instance, "study": "s", "kind": "yolo", "machine_id": "other",
        "fence": 4, "status": "running", "epoch": 1, "step": 10, "metrics": {}, "fitness": null,
        "fitness_name": "f", "val_fingerprint": null, "parent": null, "written_unix_ms": 0,
        "files": [{"path": path, "key": format!("s/{id}/{path}"), "bytes": 9, "sha256": "0".repeat(64),
            "role": "checkpoint"}],
    })
    .to_string()
}

#[tokio::test]
async fn work_that_lies_elsewhere_is_not_begun_anew() {
    let mut world = World::new();
    let record = world.job("a", Some(from_elsewhere()), None);
    assert_eq!(class(world.bring(&record).await), None, "the store has nothing of it: from its beginning");
    world.put_manifest("a", "{".into()).await;
    assert_eq!(
        class(world.bring(&record).await),
        Some(FailureClass::Storage),
        "a manifest that cannot be read"
    );
    world.put_manifest("a", manifest("a", "q/1-0")).await;
    let ending = world.bring(&record).await.expect_err("no checkpoint is whole");
    let Ending::Failed { class: FailureClass::Storage, reason } = ending else { panic!("{ending:?}") };
    assert!(reason.contains("step-000000010.ckpt is not in the store"), "{reason}");
    // Made here by this very owner, the newest lies here.
    world
        .journal
        .set_progress(record.seq, &serde_json::json!({"last_checkpoint": {"epoch": 2}}))
        .expect("noted");
    std::fs::create_dir_all(record.run_dir.join("state")).expect("made");
    std::fs::write(record.run_dir.join("state/step-000000020.ckpt"), "one").expect("written");
    world.put_manifest("a", "{".into()).await;
    let record = world.journal.record(record.seq).expect("known");
    assert_eq!(class(world.bring(&record).await), None);
}

#[tokio::test]
async fn a_job_that_has_nothing_yet_needs_no_store() {
    let mut world = World::new();
    let first = world.job("a", None, None);
    world.put_manifest("a", "{".into()).await;
    world.journal.retry(first.seq, FailureClass::Killed, "again", 0).expect("legal");
    let second = world.journal.begin_attempt(first.seq, "starts").expect("legal");
    assert_eq!((second.attempts_all(), class(world.bring(&second).await)), (2, None));
    // It made one in the first attempt, and its folder is gone.
    world
        .journal
        .set_progress(first.seq, &serde_json::json!({"last_checkpoint": {"epoch": 2}}))
        .expect("noted");
    let second = world.journal.record(first.seq).expect("known");
    assert_eq!(class(world.bring(&second).await), Some(FailureClass::Storage));
}

#[tokio::test]
async fn what_was_brought_for_this_owner_needs_no_store_again() {
    let mut world = World::new();
    let record = world.job("a", Some(from_elsewhere()), None);
    // The store had nothing but what is here already.
    std::fs::create_dir_all(record.run_dir.join("state")).expect("made");
    std::fs::write(record.run_dir.join("state/step-000000010.ckpt"), "one").expect("written");
    assert!(is_elsewhere(&record), "the newest may be another one");
    assert_eq!(class(world.bring(&record).await), None);
    assert!(!is_elsewhere(&record));
    world.put_manifest("a", "{".into()).await;
    assert_eq!(class(world.bring(&record).await), None, "what is here is the newest");
    let later = JobRecord { fence: record.fence + 1, ..record };
    assert!(is_elsewhere(&later), "another machine had it in between");
}

#[tokio::test]
async fn a_resumed_job_that_was_elsewhere_asks_the_store_whatever_lies_here() {
    let mut world = World::new();
    let continues = Continued { instances: vec!["i1".into()], has_checkpoint: true, was_elsewhere: true };
    let record = world.job("a", None, Some(continues));
    std::fs::create_dir_all(record.run_dir.join("state")).expect("made");
    std::fs::write(record.run_dir.join("state/step-000000010.ckpt"), "one").expect("written");
    world.put_manifest("a", "{".into()).await;
    assert!(must_restore(&record));
    assert_eq!(class(world.bring(&record).await), Some(FailureClass::Storage));
}

#[tokio::test]
async fn a_resumed_job_goes_on_from_something() {
    let mut world = World::new();
    let continues = |has_checkpoint| Continued {
        instances: vec!["i2".into(), "i1".into()],
        has_checkpoint,
        was_elsewhere: false,
    };
    let fresh = world.job("fresh", None, Some(continues(false)));
    assert_eq!(class(world.bring(&fresh).await), None, "it had no checkpoint");
    let resumed = world.job("a", None, Some(continues(true)));
    assert_eq!(resumed.continued(), Some(continues(true)));
    let ending = world.bring(&resumed).await.expect_err("nothing is left");
    let Ending::Failed { class: FailureClass::Config, reason } = ending else { panic!("{ending:?}") };
    assert!(reason.contains("no checkpoint to go on from is left"), "{reason}");
    // The store is asked for what the earlier submissions left there, in the first attempt.
    world.put_manifest("a", manifest("a", "i1")).await;
    assert_eq!(class(world.bring(&resumed).await), Some(FailureClass::Storage));
    // Without a store it is said, too.
    let (_orders, mut none) = mpsc::channel(1);
    let ending = provide(&resumed, None, &mut none).await.expect_err("nothing is left");
    assert!(matches!(ending, Ending::Failed { class: FailureClass::Config, .. }), "{ending:?}");
    assert!(provide(&fresh, None, &mut none).await.is_ok());
    // What goes on from it knows all of them, newest first.
    let next = Continued::from(&resumed);
    assert_eq!(next.instances, [resumed.instance.as_str(), "i2", "i1"]);
    assert!(next.has_checkpoint && !next.was_elsewhere);
}
