//! Faults between a store and its server, with counted outcomes: what was promised is there whole, or the error says
//! what to do.

use std::io::Write;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use boxwright::adapters::sink::{AfterFailure, DeliveryError};
use boxwright::adapters::store::archive::StoreSink;
use boxwright::adapters::store::{Content, LocalFile, ObjectStore, StoreError, found};
use boxwright::job::delivery::FilesMoment;
use boxwright::job::secret::Secret;
use boxwright::job::service::StoreConfig;

use super::archive::{body, checkpoint, deliver, first_files, manifest, note};
use super::proxy::{Proxy, Weather, wait};
use super::s3::S3Server;
use super::{bucket, folder_store, key, noise, open, s3, write};

const MIB: usize = 1 << 20;

/// A server behind a network.
fn behind() -> Option<(S3Server, Proxy, StoreConfig)> {
    let server = s3::server()?;
    let proxy = Proxy::new(server.address());
    let config = StoreConfig { endpoint: Some(format!("http://{}", proxy.address)), ..server.config() };
    Some((server, proxy, config))
}

fn verdict(error: StoreError) -> AfterFailure {
    DeliveryError::from(error).verdict()
}

#[tokio::test]
async fn a_server_that_is_not_there_or_silent_is_an_outage() {
    let Some((_server, proxy, config)) = behind() else { return };
    let store = open(&config);
    let models = bucket("models");
    store.prepare(&models).await.expect("prepared");
    // Idle connections of the time before must not carry the next request.
    let store = open(&config);
    proxy.set(Weather::Refusing);
    let begun = Instant::now();
    let error = store.put_bytes(&models, &key("a"), vec![1; 100]).await.expect_err("closed");
    assert!(begun.elapsed().as_secs() < 35, "{:?}", begun.elapsed());
    assert_eq!(verdict(error), AfterFailure::AllWait);
    let nobody = StoreConfig { endpoint: Some("http://127.0.0.1:1".into()), ..config.clone() };
    let begun = Instant::now();
    let error = open(&nobody).head(&models, &key("a")).await.expect_err("nobody listens");
    assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error:?}");
    proxy.set(Weather::BlackHole);
    let begun = Instant::now();
    let error = open(&config).head(&models, &key("a")).await.expect_err("silent");
    assert!(begun.elapsed().as_secs() < 25, "{:?}", begun.elapsed());
    assert!(matches!(error, StoreError::Timeout { .. }), "{error:?}");
    assert_eq!(verdict(error), AfterFailure::AllWait);
    proxy.set(Weather::Fine);
    open(&config).put_bytes(&models, &key("a"), vec![1; 100]).await.expect("it works again");
}

#[tokio::test]
async fn wrong_credentials_are_said_without_being_shown() {
    let Some(server) = s3::server() else { return };
    let wrong = [("boxwright-test", "wr0ng-secret-of-it"), ("wr0ng-user-of-it", "boxwright-test-secret")];
    for (id, secret) in wrong {
        let config =
            StoreConfig { id: Some(Secret::new(id)), secret: Some(Secret::new(secret)), ..server.config() };
        let store = open(&config);
        let error = store.prepare(&bucket("models")).await.expect_err("denied");
        assert!(matches!(error, StoreError::Denied { .. }), "{error:?}");
        let sink = StoreSink::new(&config, store.clone()).expect("a sink");
        let folder = tempfile::tempdir().expect("a folder");
        let error = deliver(&sink, body(folder.path(), "i", 1, FilesMoment::End)).await.expect_err("denied");
        assert_eq!(error.verdict(), AfterFailure::AllWait);
        let shown = format!("{} {error:?}", error.chain());
        assert!(!shown.contains("wr0ng-secret"), "{shown}");
    }
}

#[tokio::test]
async fn a_certificate_of_an_own_authority_is_trusted_when_it_is_named() {
    let Some(server) = s3::server().filter(S3Server::is_minio) else { return };
    let Some(server) = server.with_tls() else {
        eprintln!("SKIPPED: no openssl to make certificates with");
        return;
    };
    let models = bucket("models");
    let store = open(&server.config());
    let deadline = Instant::now() + Duration::from_secs(60);
    // Over TLS the helper cannot see when the server is ready.
    while let Err(error) = store.prepare(&models).await {
        assert!(Instant::now() < deadline, "{error:?}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = write(folder.path(), "a", &noise(11 * MIB, 1));
    let file = LocalFile::open(&path, Content::Replaced).expect("opened");
    store.put_file(&models, &key("a"), &file).await.expect("stored");
    store.get_to_file(&models, &key("a"), &path, Some(&file.sha256)).await.expect("fetched");
    assert!(store.url(&models, &key("a")).starts_with("https://"));
    let stranger = StoreConfig { ca_file: None, ..server.config() };
    let error = open(&stranger).head(&models, &key("a")).await.expect_err("not trusted");
    assert!(DeliveryError::from(error).chain().to_lowercase().contains("certificate"));
}

#[tokio::test]
async fn one_failed_request_in_three_costs_nothing_but_time() {
    let Some((_server, proxy, config)) = behind() else { return };
    proxy.set(Weather::Failing(3));
    let store = open(&config);
    let sink = StoreSink::new(&config, store.clone()).expect("a sink");
    let folder = tempfile::tempdir().expect("a folder");
    first_files(folder.path());
    checkpoint(folder.path(), 30, 23 * MIB);
    let receipt = deliver(&sink, body(folder.path(), "i", 1, FilesMoment::End)).await.expect("delivered");
    assert!(note(&receipt, "promotion").starts_with("promoted"), "{receipt:?}");
    let kept = manifest(store.as_ref()).await;
    assert!(proxy.failed() >= 10, "{} requests failed", proxy.failed());
    let back = folder.path().join("back");
    for file in &kept.files {
        let at = key(&file.key);
        store.get_to_file(&bucket("models"), &at, &back, Some(&file.sha256)).await.expect("fetched");
    }
    eprintln!("{} of the requests failed, {} files are whole", proxy.failed(), kept.files.len());
}

#[tokio::test]
async fn cut_and_slow_connections_are_survived() {
    let Some((_server, proxy, config)) = behind() else { return };
    let store = open(&config);
    let (models, folder) = (bucket("models"), tempfile::tempdir().expect("a folder"));
    store.prepare(&models).await.expect("prepared");
    let bytes = noise(21 * MIB, 7);
    let file = LocalFile::open(&write(folder.path(), "a", &bytes), Content::Replaced).expect("opened");
    proxy.set(Weather::Cut(2 * MIB as u64, 6));
    store.put_file(&models, &key("cut"), &file).await.expect("stored");
    assert_eq!(proxy.cuts(), 6);
    proxy.set(Weather::Slow(4 * MIB as u64));
    let begun = Instant::now();
    store.put_file(&models, &key("slow"), &file).await.expect("stored");
    assert!(begun.elapsed().as_millis() > 1000, "{:?}", begun.elapsed());
    proxy.set(Weather::Fine);
    for name in ["cut", "slow"] {
        let back = folder.path().join("back");
        store.get_to_file(&models, &key(name), &back, Some(&file.sha256)).await.expect("fetched");
    }
}

#[tokio::test]
async fn a_server_killed_in_mid_upload_gets_it_after_its_return() {
    let Some((mut server, proxy, config)) = behind() else { return };
    let store = open(&config);
    let sink = Arc::new(StoreSink::new(&config, store.clone()).expect("a sink"));
    let folder = tempfile::tempdir().expect("a folder");
    store.prepare(&bucket("models")).await.expect("prepared");
    checkpoint(folder.path(), 30, 32 * MIB);
    let mut outages = 0;
    for _ in 0..2 {
        proxy.set(Weather::Slow(8 * MIB as u64));
        let sent = proxy.bytes_up();
        let killer = thread::scope(|scope| {
            let server = &mut server;
            let proxy = &proxy;
            let killed = scope.spawn(move || {
                wait("half of the upload", || proxy.bytes_up() > sent + 11 * MIB as u64);
                server.kill();
            });
            // The delivery runs on this thread, the kill on the other.
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let sink = sink.clone();
            let body = body(folder.path(), "i", 1, FilesMoment::Checkpoint);
            let delivered = scope.spawn(move || runtime.block_on(deliver(&sink, body)));
            killed.join().expect("killed");
            delivered.join().expect("ended")
        });
        let error = killer.expect_err("the server is gone");
        assert_eq!(error.verdict(), AfterFailure::AllWait, "{error:?}");
        outages += 1;
        server.run();
        proxy.set(Weather::Fine);
        let at = key("plants/task-1/state/step-000000030.ckpt");
        let half = open(&server.config()).head(&bucket("models"), &at).await;
        assert_eq!(found(half).expect("answers"), None, "nothing half is there");
    }
    deliver(&sink, body(folder.path(), "i", 1, FilesMoment::Checkpoint)).await.expect("delivered");
    assert_eq!((manifest(store.as_ref()).await.files.len(), outages), (1, 2));
}

#[tokio::test]
async fn a_file_replaced_during_its_upload_is_sent_as_it_was() {
    let Some((_server, proxy, config)) = behind() else { return };
    let store = open(&config);
    let (models, folder) = (bucket("models"), tempfile::tempdir().expect("a folder"));
    store.prepare(&models).await.expect("prepared");
    let old = noise(16 * MIB, 1);
    let path = write(folder.path(), "last.safetensors", &old);
    let file = LocalFile::open(&path, Content::Replaced).expect("opened");
    proxy.set(Weather::Slow(8 * MIB as u64));
    let sent = proxy.bytes_up();
    let at = key("last");
    let replaced = tokio::task::spawn_blocking({
        let (folder, up) = (folder.path().to_owned(), Arc::new(proxy));
        move || {
            wait("some of the upload", || up.bytes_up() > sent + 2 * MIB as u64);
            write(&folder, "last.safetensors", &noise(16 * MIB, 2));
            up
        }
    });
    store.put_file(&models, &at, &file).await.expect("stored");
    let proxy = replaced.await.expect("replaced");
    proxy.set(Weather::Fine);
    assert!(store.get_bytes(&models, &at, 99 << 20).await.expect("there") == old);
    // Written in place before all of it was read: nothing is stored, what was there stays.
    write(folder.path(), "last.safetensors", &noise(44 * MIB, 2));
    proxy.set(Weather::Slow(8 * MIB as u64));
    let file = LocalFile::open(&path, Content::InPlace).expect("opened");
    let sent = proxy.bytes_up();
    let changed = tokio::task::spawn_blocking(move || {
        wait("some of the upload", || proxy.bytes_up() > sent + 2 * MIB as u64);
        let mut file = std::fs::File::options().write(true).open(&path).expect("opened");
        std::io::Seek::seek(&mut file, std::io::SeekFrom::End(-10)).expect("seeks");
        file.write_all(b"0123456789").expect("written");
        proxy
    });
    let error = store.put_file(&models, &at, &file).await.expect_err("it changed");
    let proxy = changed.await.expect("changed");
    proxy.set(Weather::Fine);
    assert!(matches!(error, StoreError::Changed { .. }), "{error:?}");
    assert!(store.get_bytes(&models, &at, 99 << 20).await.expect("there") == old);
}

/// A small file system of its own, gone with the value.
struct Small(tempfile::TempDir);

impl Small {
    fn new(megabytes: u32) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let size = format!("size={megabytes}m");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(folder.path())
            .stderr(std::process::Stdio::null())
            .status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self(folder));
        }
        eprintln!("SKIPPED: a small file system cannot be mounted here (needs root)");
        None
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_full_store_is_an_outage_and_works_again_with_room() {
    let Some(small) = Small::new(20) else { return };
    let config = StoreConfig { folder: Some(small.0.path().join("store")), ..StoreConfig::default() };
    let store = open(&config);
    full(store, small.0.path()).await;
}

#[tokio::test]
async fn a_full_server_is_an_outage_and_works_again_with_room() {
    let Some(program) = s3::program().filter(|program| program.ends_with("minio")) else {
        eprintln!("SKIPPED: no MinIO");
        return;
    };
    let Some(small) = Small::new(300) else { return };
    let server = S3Server::start_in(&program, &small.0.path().join("data"));
    full(open(&server.config()), small.0.path()).await;
}

/// Others take the room of the file system `root`, up to 2 MiB, and give it back.
async fn full(store: Arc<dyn ObjectStore>, root: &std::path::Path) {
    let (models, folder) = (bucket("models"), tempfile::tempdir().expect("a folder"));
    store.prepare(&models).await.expect("prepared");
    let bytes = noise(7 * MIB, 1);
    let ballast = root.join("ballast");
    let mut taken = std::fs::File::create(&ballast).expect("made");
    let mut length = 0;
    while taken.write_all(&bytes[..MIB / 4]).is_ok() {
        length += MIB as u64 / 4;
    }
    taken.set_len(length.saturating_sub(2 * MIB as u64)).expect("cut");
    let names = [("small", 4 * MIB), ("in parts", 7 * MIB)];
    let open =
        |length: usize| LocalFile::open(&write(folder.path(), "a", &bytes[..length]), Content::InPlace);
    for (name, length) in names {
        let file = open(length).expect("opened");
        let error = store.put_file(&models, &key(name), &file).await.expect_err("no room");
        assert!(matches!(error, StoreError::Full { .. }), "{error:?}");
        assert_eq!(verdict(error), AfterFailure::AllWait);
        assert_eq!(found(store.head(&models, &key(name)).await).expect("answers"), None);
    }
    drop(taken);
    std::fs::remove_file(&ballast).expect("removed");
    // A server may look at its disk from time to time only.
    let deadline = Instant::now() + Duration::from_secs(30);
    for (name, length) in names {
        let file = open(length).expect("opened");
        while let Err(error) = store.put_file(&models, &key(name), &file).await {
            assert!(matches!(error, StoreError::Full { .. }) && Instant::now() < deadline, "{error:?}");
        }
    }
}

#[tokio::test]
async fn a_damaged_object_is_noticed() {
    let (folder, _, store) = folder_store();
    let models = bucket("models");
    store.prepare(&models).await.expect("prepared");
    store.put_bytes(&models, &key("a"), b"good".to_vec()).await.expect("stored");
    let sha256 = store.head(&models, &key("a")).await.expect("there").sha256.expect("known");
    std::fs::write(folder.path().join("store/models/a"), b"goof").expect("written");
    let head = store.head(&models, &key("a")).await.expect("there");
    assert_ne!(head.sha256.as_ref(), Some(&sha256));
    let back = folder.path().join("back");
    let error = store.get_to_file(&models, &key("a"), &back, Some(&sha256)).await.expect_err("damaged");
    assert!(matches!(error, StoreError::Integrity { .. }), "{error:?}");
    assert!(!back.exists());
}
