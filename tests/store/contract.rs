//! What every store does, asked of every store.

use std::sync::Arc;

use boxwright::adapters::store::{Content, Expected, LocalFile, ObjectStore, StoreError, found};

use super::{bucket, folder_store, key, noise, open, s3, write};

async fn contract(store: &dyn ObjectStore, part_bytes: usize) {
    let folder = tempfile::tempdir().expect("a folder");
    let (models, other) = (bucket("models"), bucket("better-models"));
    // Before the bucket is there.
    assert!(matches!(store.head(&models, &key("a")).await, Err(StoreError::Missing { .. })));
    assert!(matches!(store.list(&models, "", 9).await, Err(StoreError::Missing { .. })));
    assert!(matches!(
        store.put_bytes(&models, &key("a"), b"x".to_vec()).await,
        Err(StoreError::Missing { .. })
    ));
    for _ in 0..2 {
        store.prepare(&models).await.expect("prepared");
        store.prepare(&other).await.expect("prepared");
    }
    assert!(matches!(store.head(&models, &key("a")).await, Err(StoreError::Missing { .. })));
    assert_eq!(found(store.get_bytes(&models, &key("a/b"), 10).await).expect("answers"), None);
    assert_eq!(store.list(&models, "", 9).await.expect("listed").entries, []);
    store.delete(&models, &key("a/b")).await.expect("nothing to delete");

    // Small, empty, exactly a part, more than a part, more than two; odd names; twice, and replaced.
    let sizes = [0, 1, 1000, part_bytes, part_bytes + 1, 2 * part_bytes + 12_345];
    for (seed, size) in sizes.into_iter().enumerate() {
        for (content, name) in [(Content::Replaced, "replaced"), (Content::InPlace, "in place")] {
            let bytes = noise(size, seed as u64 + 1);
            let file = LocalFile::open(&write(folder.path(), "source", &bytes), content).expect("opened");
            let at = key(&format!("stüdy +1/100%/{name}&{size}.bin"));
            for _ in 0..2 {
                let head = store.put_file(&models, &at, &file).await.expect("stored");
                assert_eq!((head.bytes, head.sha256.as_deref()), (size as u64, Some(file.sha256.as_str())));
            }
            let head = store.head(&models, &at).await.expect("there");
            assert_eq!((head.bytes, head.sha256.as_deref()), (size as u64, Some(file.sha256.as_str())));
            let back = folder.path().join("deep/back");
            store.get_to_file(&models, &at, &back, Some(&file.sha256)).await.expect("fetched");
            assert!(std::fs::read(&back).expect("read") == bytes, "{at}");
            let wrong = store.get_to_file(&models, &at, &back, Some(&"0".repeat(64))).await;
            assert!(matches!(wrong, Err(StoreError::Integrity { .. })), "{wrong:?}");
            assert_eq!(std::fs::read_dir(folder.path().join("deep")).expect("read").count(), 1);
            let copied = key(&format!("copy of/{name} {size}"));
            store.copy((&models, &at), (&other, &copied)).await.expect("copied");
            assert_eq!(
                store.head(&other, &copied).await.expect("there").sha256.as_deref(),
                head.sha256.as_deref()
            );
        }
    }
    // A source that is replaced afterwards does not touch what is stored.
    let path = write(folder.path(), "w", b"first");
    let file = LocalFile::open(&path, Content::Replaced).expect("opened");
    store.put_file(&models, &key("w"), &file).await.expect("stored");
    write(folder.path(), "w", b"second!");
    assert_eq!(store.get_bytes(&models, &key("w"), 99).await.expect("read"), b"first");
    // The file that was opened is sent, not the one of the same name.
    store.put_file(&models, &key("w2"), &file).await.expect("stored");
    assert_eq!(store.get_bytes(&models, &key("w2"), 99).await.expect("read"), b"first");
    let missing = store.copy((&models, &key("none")), (&models, &key("w3"))).await;
    assert!(matches!(missing, Err(StoreError::Missing { .. })), "{missing:?}");

    // Small objects and limits.
    store.put_bytes(&models, &key("m/manifest.json"), b"{}".to_vec()).await.expect("stored");
    store.put_bytes(&models, &key("m/manifest.json"), b"{\"a\":1}".to_vec()).await.expect("stored");
    assert_eq!(store.get_bytes(&models, &key("m/manifest.json"), 7).await.expect("read"), b"{\"a\":1}");
    let large = store.get_bytes(&models, &key("m/manifest.json"), 6).await;
    assert!(matches!(large, Err(StoreError::TooLarge { bytes: 7, bytes_max: 6, .. })), "{large:?}");

    conditions(store).await;

    // Lists.
    for name in ["l/a", "l/b/c", "l/b/d", "l2", "l/ü +%&"] {
        store.put_bytes(&models, &key(name), name.as_bytes().to_vec()).await.expect("stored");
    }
    let names = |prefix: &'static str| {
        let models = models.clone();
        async move {
            let listed = store.list(&models, prefix, 100).await.expect("listed").entries;
            assert!(listed.iter().all(|entry| entry.bytes == entry.key.as_str().len() as u64));
            assert!(listed.iter().all(|entry| !entry.etag.is_empty()));
            listed.into_iter().map(|entry| entry.key.as_str().to_owned()).collect::<Vec<_>>()
        }
    };
    assert_eq!(names("l/").await, ["l/a", "l/b/c", "l/b/d", "l/ü +%&"]);
    assert_eq!(names("l/b").await, ["l/b/c", "l/b/d"]);
    assert_eq!(names("l").await.len(), 5);
    assert_eq!(names("none/").await.len(), 0);
    assert!(matches!(store.list(&models, "l/", 3).await, Err(StoreError::TooLarge { .. })));

    // Deleting.
    store.delete(&models, &key("l/b/c")).await.expect("deleted");
    store.delete(&models, &key("l/b/c")).await.expect("not there any more");
    assert_eq!(names("l/b").await, ["l/b/d"]);
    assert!(store.url(&models, &key("l/a")).ends_with("/models/l/a"));
}

/// An object replaces only the version that its writer has seen.
async fn conditions(store: &dyn ObjectStore) {
    let (models, at) = (bucket("models"), key("c/manifest.json"));
    let read = async || store.get_versioned(&models, &at, 99).await.expect("read");
    let put = async |text: &str, expected: Expected<'_>| {
        let stored = store.put_if(&models, &at, text.as_bytes().to_vec(), expected).await.expect("answers");
        let is_there = read().await.bytes == text.as_bytes();
        assert_eq!(stored.is_some(), is_there, "{text}");
        is_there
    };
    let absent = store.put_if(&models, &at, b"x".to_vec(), Expected::Version("0123456789abcdef")).await;
    assert_eq!(absent.expect("answers"), None);
    assert_eq!(found(store.head(&models, &at).await).expect("answers"), None);
    assert!(put("one", Expected::Nothing).await);
    assert!(!put("two", Expected::Nothing).await);
    let first = read().await.version.expect("a version");
    assert!(put("three", Expected::Version(&first)).await);
    assert!(!put("four", Expected::Version(&first)).await);
    let second = read().await.version.expect("a version");
    assert!(first != second && put("five", Expected::Version(&second)).await);
    assert!(put("six", Expected::Anything).await);
    let nowhere = store.put_if(&bucket("none-such"), &at, b"x".to_vec(), Expected::Nothing).await;
    assert!(matches!(nowhere, Err(StoreError::Missing { .. })), "{nowhere:?}");
}

/// Of several writers of one version one succeeds, so that a counter counts all of them.
async fn counting(store: Arc<dyn ObjectStore>) {
    const WRITERS: u32 = 6;
    const TIMES: u32 = 20;
    let (models, at) = (bucket("models"), key("c/counter"));
    store.prepare(&models).await.expect("prepared");
    store.put_bytes(&models, &at, b"0".to_vec()).await.expect("stored");
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (store, models, at) = (store.clone(), models.clone(), at.clone());
            tokio::spawn(async move {
                let mut done = 0;
                while done < TIMES {
                    let seen = store.get_versioned(&models, &at, 99).await.expect("read");
                    let text = String::from_utf8(seen.bytes).expect("text");
                    let number: u32 = text.split(' ').next().expect("a number").parse().expect("a number");
                    // No two writers write the same.
                    let next = format!("{} {writer}", number + 1).into_bytes();
                    let version = seen.version.expect("a version");
                    let stored = store.put_if(&models, &at, next, Expected::Version(&version)).await;
                    done += u32::from(stored.is_ok_and(|stored| stored.is_some()));
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.expect("ends");
    }
    let text = store.get_bytes(&models, &at, 99).await.expect("read");
    assert!(
        text.starts_with(format!("{} ", WRITERS * TIMES).as_bytes()),
        "{}",
        String::from_utf8_lossy(&text)
    );
}

#[tokio::test]
async fn no_write_on_a_condition_is_lost_in_files() {
    let (_folder, _, store) = folder_store();
    counting(store).await;
}

#[tokio::test]
async fn no_write_on_a_condition_is_lost_on_a_server() {
    let Some(server) = s3::server() else { return };
    if !server.is_minio() {
        eprintln!("skipped: the small S3 server compares first and writes then; MinIO does both at once");
        return;
    }
    counting(open(&server.config())).await;
}

#[tokio::test]
async fn files_keep_the_contract() {
    let (_folder, _, store) = folder_store();
    contract(store.as_ref(), 5 << 20).await;
}

#[tokio::test]
async fn an_s3_server_keeps_the_contract() {
    let Some(server) = s3::server() else { return };
    contract(open(&server.config()).as_ref(), 5 << 20).await;
}

#[tokio::test]
async fn long_lists_come_in_pages() {
    let Some(server) = s3::server() else { return };
    let store = open(&server.config());
    let models = bucket("models");
    store.prepare(&models).await.expect("prepared");
    for number in 0..1_050 {
        store.put_bytes(&models, &key(&format!("p/{number:05}")), vec![b'x']).await.expect("stored");
    }
    let listed = store.list(&models, "p/", 5_000).await.expect("listed").entries;
    assert_eq!(listed.len(), 1_050);
    assert!(listed.is_sorted());
}

/// Readers see the old object or the new one, never a mixture and never a failure, while it is replaced.
#[tokio::test]
async fn an_object_that_is_replaced_while_it_is_read_is_whole() {
    let Some(server) = s3::server() else { return };
    if !server.is_minio() {
        // It writes objects in place, so that readers may see half of one.
        eprintln!("skipped: the small S3 server does not replace objects whole; MinIO does");
        return;
    }
    let store = open(&server.config());
    let (models, at) = (bucket("models"), key("manifest.json"));
    store.prepare(&models).await.expect("prepared");
    let content = |number: u8| vec![number; 300_000 + usize::from(number)];
    store.put_bytes(&models, &at, content(0)).await.expect("stored");
    let writer = {
        let (store, models, at) = (store.clone(), models.clone(), at.clone());
        tokio::spawn(async move {
            for number in 1..60 {
                store.put_bytes(&models, &at, content(number)).await.expect("stored");
            }
        })
    };
    let mut reads = 0;
    while !writer.is_finished() {
        let read = store.get_bytes(&models, &at, 1 << 20).await.expect("read");
        assert!(read == content(read[0]), "a mixture of {} bytes", read.len());
        reads += 1;
    }
    writer.await.expect("written");
    eprintln!("{reads} reads during 59 writes");
}
