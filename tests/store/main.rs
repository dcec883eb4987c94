//! The object store: one contract for every store, the archive of runs, restoring and staging, and faults of a real
//! S3 server.

#[path = "../common/servers/s3.rs"]
mod s3;

mod archive;
mod continued;
mod contract;
mod faults;
mod owners;
mod plain;
mod proxy;
mod stage;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use boxwright::adapters::store::{self, BucketName, ObjectKey, ObjectStore};
use boxwright::job::service::StoreConfig;

/// A store of files in a folder of its own.
pub fn folder_store() -> (tempfile::TempDir, StoreConfig, Arc<dyn ObjectStore>) {
    let folder = tempfile::tempdir().expect("a folder");
    let config = StoreConfig { folder: Some(folder.path().join("store")), ..StoreConfig::default() };
    let store = store::open(&config).expect("opens").expect("a store");
    (folder, config, store)
}

/// A store on a server.
pub fn open(config: &StoreConfig) -> Arc<dyn ObjectStore> {
    store::open(config).expect("opens").expect("a store")
}

pub fn bucket(name: &str) -> BucketName {
    BucketName::new(name).expect("a bucket")
}

pub fn key(name: &str) -> ObjectKey {
    ObjectKey::new(name).expect("a key")
}

/// Bytes that do not repeat, the same for the same seed.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

pub fn write(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    // As the program does: beside it, then renamed.
    let temporary = path.with_file_name(".new.tmp");
    std::fs::write(&temporary, bytes).expect("written");
    std::fs::rename(&temporary, &path).expect("renamed");
    path
}
