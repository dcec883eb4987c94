//! The object store: where checkpoints, weights and run files outlive the machine.
//!
//! [`ObjectStore`] is the port. [`folder`] keeps objects as files (the default, needs nothing), [`minio`] speaks to a
//! server of the S3 protocol. Above the port: [`archive`] decides what of a run is kept and writes the manifest,
//! [`restore`] brings a run back to an empty machine, [`stage`] brings a dataset here.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;

use crate::job::service::StoreConfig;

pub mod archive;
pub mod error;
pub mod folder;
mod in_use;
mod listing;
pub mod local;
mod lock;
pub mod minio;
pub mod names;
pub mod restore;
pub mod stage;

pub use error::{Retry, StoreError, found};
pub use listing::{Listed, Refused};
pub use local::{Content, LocalFile};
pub use names::{BucketName, ObjectKey};

/// What a store knows of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectHead {
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of its content in hexadecimal, when whoever stored it left it.
    pub sha256: Option<String>,
    /// The store's own mark of the content.
    pub etag: Option<String>,
}

/// An object in a list.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectEntry {
    /// Its key.
    pub key: ObjectKey,
    /// Its size.
    pub bytes: u64,
    /// The store's own mark of the content; empty when it has none.
    pub etag: String,
}

/// A small object, and the version of it that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versioned {
    /// Its content.
    pub bytes: Vec<u8>,
    /// What [`ObjectStore::put_if`] compares; nobody else reads it. `None` from a store that has no such mark.
    pub version: Option<String>,
}

/// What a key has to hold for [`ObjectStore::put_if`] to store there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected<'a> {
    /// No object.
    Nothing,
    /// This version of an object.
    Version(&'a str),
    /// Anything or nothing.
    Anything,
}

impl<'a> Expected<'a> {
    /// What was seen at the key: it has to be there still.
    pub fn of(seen: Option<&'a Versioned>) -> Self {
        match seen {
            None => Self::Nothing,
            Some(object) => object.version.as_deref().map_or(Self::Anything, Self::Version),
        }
    }
}

/// A store of objects. Every method may be called again after any failure. An object is there whole or not at all.
#[async_trait]
pub trait ObjectStore: Send + Sync {
    /// Makes sure that the bucket is there, making it where that is allowed.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn prepare(&self, bucket: &BucketName) -> Result<(), StoreError>;

    /// Stores a file's content as it was when the file was opened, and verifies that it is stored.
    ///
    /// # Errors
    /// [`StoreError::Changed`] when the file was changed in place meanwhile; others. Nothing is then stored.
    async fn put_file(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        file: &LocalFile,
    ) -> Result<ObjectHead, StoreError>;

    /// Stores a small object.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn put_bytes(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes: Vec<u8>,
    ) -> Result<ObjectHead, StoreError>;

    /// Stores a small object where the key holds what is expected; `None` where it holds something else: nothing is then
    /// stored. Comparing and storing are one act, of several callers on one version one succeeds. Where a server does not
    /// know conditions it stores without, and the caller's own look is all there is.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn put_if(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes: Vec<u8>,
        expected: Expected<'_>,
    ) -> Result<Option<ObjectHead>, StoreError>;

    /// What is known of an object.
    ///
    /// # Errors
    /// [`StoreError::Missing`]; others.
    async fn head(&self, bucket: &BucketName, key: &ObjectKey) -> Result<ObjectHead, StoreError>;

    /// Brings an object to `path`, whole or not at all. The content must have the SHA-256 `expected` when that is
    /// given, else the one that the store knows, if any.
    ///
    /// # Errors
    /// [`StoreError::Integrity`] when it has not; others. `path` is then as it was.
    async fn get_to_file(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        path: &Path,
        expected: Option<&str>,
    ) -> Result<ObjectHead, StoreError>;

    /// The content of an object of at most `bytes_max`.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`]; others.
    async fn get_bytes(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes_max: u64,
    ) -> Result<Vec<u8>, StoreError> {
        self.get_versioned(bucket, key, bytes_max).await.map(|read| read.bytes)
    }

    /// The same with the version that was read.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`]; others.
    async fn get_versioned(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes_max: u64,
    ) -> Result<Versioned, StoreError>;

    /// The objects whose keys begin with `prefix`, in the order of their keys. What [`ObjectKey`] refuses is left out,
    /// and the list says so.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`] when there are more than `items_max`; others.
    async fn list(&self, bucket: &BucketName, prefix: &str, items_max: usize) -> Result<Listed, StoreError>;

    /// Removes an object; it need not be there.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn delete(&self, bucket: &BucketName, key: &ObjectKey) -> Result<(), StoreError>;

    /// Copies an object inside the store.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn copy(
        &self,
        from: (&BucketName, &ObjectKey),
        to: (&BucketName, &ObjectKey),
    ) -> Result<(), StoreError>;

    /// Where an object lies, for people and other programs.
    fn url(&self, bucket: &BucketName, key: &ObjectKey) -> String;
}

/// The store of a configuration, `None` when it names none. Nothing is asked over the network.
///
/// # Errors
/// [`StoreError::Config`] for an address, a certificate or credentials that cannot be used.
pub fn open(config: &StoreConfig) -> Result<Option<Arc<dyn ObjectStore>>, StoreError> {
    if config.endpoint.is_some() {
        return Ok(Some(Arc::new(minio::MinioStore::new(config)?)));
    }
    match &config.folder {
        Some(folder) => Ok(Some(Arc::new(folder::FolderStore::new(folder)?))),
        None => Ok(None),
    }
}

/// Runs what blocks on the thread pool.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(StoreError::Unavailable { what: "finish the work".into(), source: Some(Box::new(error)) })
    })
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
