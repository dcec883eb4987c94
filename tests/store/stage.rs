//! Datasets come from the store: complete or not used, and only what changed is fetched.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use boxwright::adapters::store::stage::{Staged, dataset_ref, stage};
use boxwright::adapters::store::{BucketName, ObjectStore, StoreError};

use super::{bucket, folder_store, key, open, s3};

async fn put(store: &dyn ObjectStore, bucket: &BucketName, name: &str, text: &str) {
    store.put_bytes(bucket, &key(name), text.as_bytes().to_vec()).await.expect("stored");
}

fn text(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path).expect("there")
}

async fn staging(store: Arc<dyn ObjectStore>) {
    let datasets = bucket("datasets");
    store.prepare(&datasets).await.expect("prepared");
    let cache = tempfile::tempdir().expect("a folder");
    let bring = async |data: &str| -> Result<Staged, StoreError> {
        let dataset = dataset_ref(data).expect("an address").expect("in the store");
        stage(store.as_ref(), cache.path(), &dataset, "the job a").await.map(|(staged, _)| staged)
    };
    let none = bring("s3://datasets/cells").await;
    assert!(matches!(none, Err(StoreError::Missing { .. })), "{none:?}");
    for number in 0..40 {
        put(store.as_ref(), &datasets, &format!("cells/images/{number}.jpg"), &format!("image {number}"))
            .await;
    }
    put(store.as_ref(), &datasets, "cells/data.yaml", "nc: 1").await;
    put(store.as_ref(), &datasets, "cells-other/data.yaml", "not ours").await;
    let staged = bring("s3://datasets/cells/data.yaml").await.expect("staged");
    assert_eq!((staged.files, staged.fetched, staged.removed, staged.is_current), (41, 41, 0, true));
    assert_eq!(staged.path, cache.path().join("datasets/cells/data.yaml"));
    assert_eq!(text(staged.folder.join("images/7.jpg")), "image 7");
    assert!(!cache.path().join("datasets/cells-other").exists());
    let missing = bring("s3://datasets/cells/other.yaml").await;
    assert!(matches!(missing, Err(StoreError::Missing { .. })), "{missing:?}");

    // Again: nothing. Changed, removed and new ones: those. Files of others are left alone.
    let again = bring("s3://datasets/cells").await.expect("staged");
    assert_eq!((again.fetched, &again.fingerprint), (0, &staged.fingerprint));
    assert_eq!(again.path, again.folder);
    std::fs::write(again.folder.join("mine.cache"), "kept").expect("written");
    put(store.as_ref(), &datasets, "cells/images/1.jpg", "another image").await;
    put(store.as_ref(), &datasets, "cells/images/new/40.jpg", "new").await;
    store.delete(&datasets, &key("cells/images/2.jpg")).await.expect("deleted");
    let changed = bring("s3://datasets/cells").await.expect("staged");
    assert_eq!((changed.files, changed.fetched, changed.removed), (41, 2, 1));
    assert_ne!(changed.fingerprint, staged.fingerprint);
    assert_eq!(text(changed.folder.join("images/1.jpg")), "another image");
    assert!(!changed.folder.join("images/2.jpg").exists());
    assert_eq!(text(changed.folder.join("mine.cache")), "kept");

    // Interrupted: the mark is gone and a file is cut; what is whole is not fetched again.
    std::fs::remove_file(changed.folder.join(".boxwright-complete")).expect("removed");
    std::fs::write(changed.folder.join("images/5.jpg"), "ima").expect("written");
    let resumed = bring("s3://datasets/cells").await.expect("staged");
    assert_eq!((resumed.fetched, resumed.bytes_fetched), (1, 7));
    assert_eq!(text(resumed.folder.join("images/5.jpg")), "image 5");
}

#[tokio::test]
async fn datasets_are_staged_from_files() {
    let (_folder, _, store) = folder_store();
    staging(store).await;
}

#[tokio::test]
async fn datasets_are_staged_from_an_s3_server() {
    let Some(mut server) = s3::server() else { return };
    let store = open(&server.config());
    staging(store.clone()).await;
    // Without the server an earlier copy is used, when it is complete.
    let cache = tempfile::tempdir().expect("a folder");
    let dataset = dataset_ref("s3://datasets/cells/data.yaml").expect("good").expect("in the store");
    stage(store.as_ref(), cache.path(), &dataset, "the job a").await.expect("staged");
    server.kill();
    let (kept, _) = stage(store.as_ref(), cache.path(), &dataset, "the job a").await.expect("kept");
    assert!(!kept.is_current && kept.files == 41);
    std::fs::remove_file(cache.path().join("datasets/cells/.boxwright-complete")).expect("removed");
    let none = stage(store.as_ref(), cache.path(), &dataset, "the job a").await;
    assert!(matches!(none, Err(StoreError::Unavailable { .. })), "{none:?}");
}

/// A dataset of two files, and the folder that it is staged in.
async fn pair() -> (tempfile::TempDir, Arc<dyn ObjectStore>, tempfile::TempDir) {
    let (folder, _, store) = folder_store();
    store.prepare(&bucket("datasets")).await.expect("prepared");
    for name in ["cells/data.yaml", "cells/images/1.jpg"] {
        put(store.as_ref(), &bucket("datasets"), name, "old").await;
    }
    (folder, store, tempfile::tempdir().expect("a folder"))
}

#[tokio::test]
async fn a_dataset_does_not_change_while_a_job_trains_on_it() {
    let (_folder, store, cache) = pair().await;
    let datasets = bucket("datasets");
    let dataset = dataset_ref("s3://datasets/cells").expect("an address").expect("in the store");
    let bring = |user: &'static str| stage(store.as_ref(), cache.path(), &dataset, user);
    let (staged, in_use) = bring("the job a").await.expect("staged");
    let (_, second) = bring("the job b").await.expect("the same state is shared");
    put(store.as_ref(), &datasets, "cells/data.yaml", "another").await;
    store.delete(&datasets, &key("cells/images/1.jpg")).await.expect("deleted");
    put(store.as_ref(), &datasets, "cells/images/2.jpg", "new").await;
    drop(second);
    // The next job trains on a copy of the new state, beside the job a.
    let (copy, c) = bring("the job c").await.expect("staged");
    assert_ne!(copy.folder, staged.folder);
    assert_eq!((copy.fetched, copy.files), (2, 2));
    assert_eq!(text(copy.folder.join("data.yaml")), "another");
    assert_eq!(text(staged.folder.join("data.yaml")), "old");
    assert_eq!(text(staged.folder.join("images/1.jpg")), "old");
    let (shared, _d) = bring("the job d").await.expect("staged");
    assert_eq!((shared.folder, shared.fetched), (copy.folder, 0));
    // The folder itself is brought up to date once nobody trains on it.
    drop((in_use, c));
    put(store.as_ref(), &datasets, "cells/data.yaml", "third").await;
    let (changed, _in_use) = bring("the job e").await.expect("staged");
    assert_eq!((changed.fetched, changed.removed), (2, 1));
    assert_eq!(changed.folder, staged.folder);
    assert!(!staged.folder.join("images/1.jpg").exists());
}

#[tokio::test]
async fn jobs_that_begin_together_share_one_fetch() {
    let (_folder, store, cache) = pair().await;
    let dataset = dataset_ref("s3://datasets/cells").expect("an address").expect("in the store");
    let bring = |user: &'static str| stage(store.as_ref(), cache.path(), &dataset, user);
    // Each goes on using it while the others still wait.
    let (a, b, c) = tokio::join!(bring("the job a"), bring("the job b"), bring("the job c"));
    let all = [a, b, c].map(|staged| staged.expect("staged"));
    assert_eq!(all.iter().map(|(staged, _)| staged.fetched).sum::<usize>(), 2);
    assert!(all.iter().all(|(staged, _)| staged.folder == all[0].0.folder));
    assert!(!cache.path().join(".copies").exists());
}

#[tokio::test]
async fn a_dataset_has_a_limited_number_of_copies() {
    let (_folder, store, cache) = pair().await;
    let datasets = bucket("datasets");
    let dataset = dataset_ref("s3://datasets/cells").expect("an address").expect("in the store");
    let mut users = Vec::new();
    for state in ["1", "2", "3", "4"] {
        put(store.as_ref(), &datasets, "cells/data.yaml", state).await;
        users.push(stage(store.as_ref(), cache.path(), &dataset, state).await.expect("staged"));
    }
    for (state, (staged, _)) in ["1", "2", "3", "4"].into_iter().zip(&users) {
        assert_eq!(text(staged.folder.join("data.yaml")), state);
    }
    // What lies there whole is used, though the first folder is free to be changed.
    let (_, first) = users.remove(0);
    drop(first);
    let (again, _user) = stage(store.as_ref(), cache.path(), &dataset, "4").await.expect("staged");
    assert_eq!((&again.folder, again.fetched), (&users[2].0.folder, 0));
    put(store.as_ref(), &datasets, "cells/data.yaml", "1").await;
    users.push(stage(store.as_ref(), cache.path(), &dataset, "1").await.expect("staged"));
    put(store.as_ref(), &datasets, "cells/data.yaml", "5").await;
    let fifth = stage(store.as_ref(), cache.path(), &dataset, "5");
    tokio::pin!(fifth);
    let waits = tokio::time::timeout(Duration::from_secs(1), &mut fifth).await;
    assert!(waits.is_err(), "four states are used: {waits:?}");
    drop(users.pop());
    assert_eq!(text(fifth.await.expect("staged").0.folder.join("data.yaml")), "5");
}

#[tokio::test]
async fn a_file_that_cannot_be_staged_is_named() {
    let (folder, store, cache) = pair().await;
    let dataset = dataset_ref("s3://datasets/cells").expect("an address").expect("in the store");
    let bring = || stage(store.as_ref(), cache.path(), &dataset, "the job a");
    let images = folder.path().join("store/datasets/cells/images");
    let long = "x".repeat(250);
    put(store.as_ref(), &bucket("datasets"), &format!("cells/images/{long}"), "long").await;
    assert_eq!(bring().await.expect("staged").0.files, 3);
    for (name, reason) in [("a\\b.jpg", "no backslash"), ("a\nb.jpg", "no control characters")] {
        std::fs::write(images.join(name), "odd").expect("written");
        let error = bring().await.expect_err("refused");
        assert!(matches!(error, StoreError::Name { .. }), "{error:?}");
        let said = error.to_string();
        assert!(said.contains(&format!("{:?}", format!("datasets/cells/images/{name}"))), "{said}");
        assert!(said.contains(reason), "{said}");
        std::fs::remove_file(images.join(name)).expect("removed");
    }
    std::os::unix::fs::symlink(images.join("1.jpg"), images.join("link.jpg")).expect("linked");
    let said = bring().await.expect_err("refused").to_string();
    assert!(said.contains("cells/images/link.jpg") && said.contains("symbolic link"), "{said}");
    std::fs::remove_file(images.join("link.jpg")).expect("removed");
    bring().await.expect("staged");
}

#[tokio::test]
async fn room_is_looked_for_first_and_leftovers_are_removed() {
    let (folder, store, cache) = pair().await;
    let dataset = dataset_ref("s3://datasets/cells").expect("an address").expect("in the store");
    let bring = || stage(store.as_ref(), cache.path(), &dataset, "the job a");
    let (staged, _) = bring().await.expect("staged");
    let left = staged.folder.join("images/.arriving-0123");
    std::fs::write(&left, "left by a fetch that was killed").expect("written");
    // A file that takes no room in the store and more than there is outside it.
    let large = folder.path().join("store/datasets/cells/images/large.jpg");
    let file = std::fs::File::create(&large).expect("made");
    file.set_len(8 << 40).expect("a sparse file");
    let error = bring().await.expect_err("no room");
    let bytes = 8u64 << 40;
    assert!(matches!(&error, StoreError::NoRoom { needed_bytes, .. } if *needed_bytes == bytes), "{error:?}");
    let said = error.to_string();
    assert!(said.contains(&format!("needs {bytes} bytes")) && said.contains("are free"), "{said}");
    assert!(!left.exists() && !staged.folder.join("images/large.jpg").exists());
    std::fs::remove_file(large).expect("removed");
    bring().await.expect("staged");
}
