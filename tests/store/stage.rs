//! Datasets come from the store: complete or not used, and only what changed is fetched.

use std::path::Path;
use std::sync::Arc;

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
        stage(store.as_ref(), cache.path(), &dataset).await
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
    stage(store.as_ref(), cache.path(), &dataset).await.expect("staged");
    server.kill();
    let kept = stage(store.as_ref(), cache.path(), &dataset).await.expect("kept");
    assert!(!kept.is_current && kept.files == 41);
    std::fs::remove_file(cache.path().join("datasets/cells/.boxwright-complete")).expect("removed");
    let none = stage(store.as_ref(), cache.path(), &dataset).await;
    assert!(matches!(none, Err(StoreError::Unavailable { .. })), "{none:?}");
}
