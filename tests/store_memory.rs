//! A large upload takes little memory: the parts on their way and no more.
//!
//! 256 MiB in the usual run; `BOXWRIGHT_STORE_MIB=1024` for the whole size. The only test of its binary, because what is
//! measured is the process.

#[path = "common/servers/s3.rs"]
mod s3;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use boxwright::adapters::store::{self, BucketName, Content, LocalFile, ObjectKey};
use boxwright::job::service::StoreConfig;

/// Growth that is allowed.
const GROWTH_BYTES_MAX: u64 = 64 << 20;

fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("readable");
    let pages: u64 = text.split(' ').nth(1).and_then(|n| n.parse().ok()).expect("a number");
    // SAFETY: sysconf takes no pointer and only answers.
    pages * unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64
}

#[tokio::test]
async fn a_large_upload_and_download_take_little_memory() {
    let Some(server) = s3::server() else { return };
    let mib: u64 = std::env::var("BOXWRIGHT_STORE_MIB").ok().and_then(|n| n.parse().ok()).unwrap_or(256);
    let config = StoreConfig { part_bytes: 8 << 20, ..server.config() };
    let store = store::open(&config).expect("opens").expect("a store");
    let bucket = BucketName::new("models").expect("a bucket");
    store.prepare(&bucket).await.expect("prepared");
    let key = ObjectKey::new("large").expect("a key");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("large");
    let mut file = std::fs::File::create(&path).expect("made");
    let begun = Instant::now();
    let mut piece: Vec<u8> = (0..1u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for number in 0..mib {
        piece[..8].copy_from_slice(&number.to_le_bytes());
        file.write_all(&piece).expect("written");
    }
    file.sync_all().expect("synced");
    let disk = begun.elapsed();
    drop((file, piece));

    let before = resident_bytes();
    let (peak, is_over) = (Arc::new(AtomicU64::new(before)), Arc::new(AtomicBool::new(false)));
    let watch = std::thread::spawn({
        let (peak, is_over) = (peak.clone(), is_over.clone());
        move || {
            while !is_over.load(Ordering::Relaxed) {
                peak.fetch_max(resident_bytes(), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    });
    let pace = |took: Duration| mib as f64 / took.as_secs_f64();
    let begun = Instant::now();
    let local = LocalFile::open(&path, Content::Replaced).expect("opened");
    let hashed = begun.elapsed();
    let begun = Instant::now();
    store.put_file(&bucket, &key, &local).await.expect("stored");
    let sent = begun.elapsed();
    let up = peak.load(Ordering::Relaxed) - before;
    let begun = Instant::now();
    store
        .get_to_file(&bucket, &key, &folder.path().join("back"), Some(&local.sha256))
        .await
        .expect("fetched");
    let fetched = begun.elapsed();
    is_over.store(true, Ordering::Relaxed);
    watch.join().expect("watched");
    let growth = peak.load(Ordering::Relaxed) - before;
    eprintln!(
        "{mib} MiB: written to disk at {:.0} MiB/s, hashed at {:.0}, sent at {:.0}, fetched at {:.0}; resident {} MiB before, \
         +{} MiB sending, +{} MiB in all",
        pace(disk),
        pace(hashed),
        pace(sent),
        pace(fetched),
        before >> 20,
        up >> 20,
        growth >> 20
    );
    assert!(growth < GROWTH_BYTES_MAX, "{} MiB", growth >> 20);
}
