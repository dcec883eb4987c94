//! A resumed run is another submission over the same stored files.

use boxwright::adapters::store::archive::{Role, StoreSink};
use boxwright::adapters::store::restore::{has_checkpoint, restore};
use boxwright::job::delivery::{FilesBody, FilesMoment};

use super::archive::{body, checkpoint, deliver, first_files, manifest};
use super::{bucket, folder_store, key, noise};

#[tokio::test]
async fn a_resumed_run_keeps_what_was_stored_of_it() {
    let (_folder, config, store) = folder_store();
    let sink = StoreSink::new(&config, store.clone()).expect("a sink");
    let first = tempfile::tempdir().expect("a folder");
    first_files(first.path());
    let failed = FilesBody { status: "failed".into(), ..body(first.path(), "i1", 1, FilesMoment::End) };
    deliver(&sink, failed).await.expect("delivered");

    // The folder is lost. Another submission finds nothing of its own; one that goes on from this one does.
    let second = tempfile::tempdir().expect("a folder");
    assert!(!has_checkpoint(second.path()));
    let back = async |instances: &[&str]| {
        restore(store.as_ref(), &bucket("models"), "plants", "task-1", instances, second.path()).await
    };
    assert_eq!(back(&["i3"]).await.expect("answers"), None);
    let restored = back(&["i3", "i2", "i1"]).await.expect("answers").expect("restored");
    assert_eq!(restored.checkpoint, Some(second.path().join("state/step-000000020.ckpt")));
    assert!(has_checkpoint(second.path()) && !restored.is_lost);

    // Its first delivery removes nothing that a run of its own would keep.
    std::fs::remove_file(second.path().join("weights/best.safetensors")).expect("removed");
    checkpoint(second.path(), 30, 1000);
    let goes_on = FilesBody {
        continues: vec!["i2".into(), "i1".into()],
        ..body(second.path(), "i3", 2, FilesMoment::Checkpoint)
    };
    deliver(&sink, goes_on).await.expect("delivered");
    let kept = manifest(store.as_ref()).await;
    assert_eq!((kept.instance.as_str(), kept.status.as_str()), ("i3", "running"));
    assert!(kept.parent.is_some() && kept.newest(Role::Best).is_some());
    let checkpoints: Vec<_> = kept.files.iter().filter(|file| file.role == Role::Checkpoint).collect();
    assert_eq!(checkpoints.len(), 2);

    // None of its checkpoints is there any more.
    for iteration in [20, 30] {
        let at = key(&format!("plants/task-1/state/step-{iteration:09}.ckpt"));
        store.put_bytes(&bucket("models"), &at, b"something else".to_vec()).await.expect("stored");
    }
    std::fs::remove_dir_all(second.path().join("state")).expect("removed");
    let restored = back(&["i3"]).await.expect("answers").expect("restored");
    assert!(restored.is_lost && restored.checkpoint.is_none(), "{restored:?}");
}

/// Two writers of one object: the checksum that is filed is never that of the other one's content.
#[tokio::test]
async fn the_checksum_in_files_is_that_of_the_content() {
    use sha2::{Digest, Sha256};
    let (_folder, _, store) = folder_store();
    let (models, at) = (bucket("models"), key("m/object"));
    store.prepare(&models).await.expect("prepared");
    for round in 0..150u64 {
        let writers: Vec<_> = (0..3u64)
            .map(|writer| {
                let (store, models, at) = (store.clone(), models.clone(), at.clone());
                let content = noise(100, 7 + round * 3 + writer);
                tokio::task::spawn(async move { store.put_bytes(&models, &at, content).await.map(|_| ()) })
            })
            .collect();
        for writer in writers {
            writer.await.expect("ends").expect("stored");
        }
        let content = store.get_versioned(&models, &at, 999).await.expect("read").bytes;
        let sum: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
        let head = store.head(&models, &at).await.expect("there");
        assert_eq!(head.sha256, Some(sum), "round {round}");
    }
}
