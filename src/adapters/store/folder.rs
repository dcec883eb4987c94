//! A store of files: `{folder}/{bucket}/{key}`. The default; it needs nothing but a disk (or a share).
//!
//! An object is written beside its place and renamed, so that it is there whole or not at all. Its SHA-256 lies in
//! `{folder}/.sha256/{bucket}/{key}` together with the identity of the file that it was computed of: when that does not
//! fit, the object is read again. A source that is never written in place is linked instead of copied.
//!
//! What is stored on a condition is compared and replaced under a lock of the file system (`{folder}/.locks`), which is let
//! go with the process.
//!
//! One limit comes from file systems: `a` and `a/b` cannot both be objects.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::StoreError;
use super::listing::list_folder;
use super::local::{Arriving, FileIdentity, read_through, sync_folder, write_whole};
use super::lock::lock_key;
use super::{
    BucketName, Content, Expected, Listed, LocalFile, ObjectHead, ObjectKey, ObjectStore, Versioned,
    blocking, hex,
};

/// Where objects wait until they are whole. No bucket has such a name.
const INCOMING: &str = ".incoming";
/// Where checksums lie.
const SUMS: &str = ".sha256";
/// What an interrupted process left is removed when it is this old.
const INCOMING_AGE_MAX: Duration = Duration::from_secs(24 * 3600);
/// Bytes of a checksum file.
const SUM_BYTES_MAX: u64 = 4096;

/// A store of files.
#[derive(Debug, Clone)]
pub struct FolderStore {
    root: PathBuf,
}

/// Content of a checksum file.
#[derive(Serialize, Deserialize)]
struct Sum {
    sha256: String,
    identity: String,
}

/// The mark of a file's content, as far as it can be told without reading it.
pub(super) fn mark(identity: &FileIdentity) -> String {
    hex(&Sha256::digest(format!("{identity:?}"))[..12])
}

impl FolderStore {
    /// The store in a folder, which need not be there yet.
    ///
    /// # Errors
    /// [`StoreError::LocalFile`] when the current folder is unknown and the path is relative.
    pub fn new(folder: &Path) -> Result<Self, StoreError> {
        let root = std::path::absolute(folder).map_err(StoreError::local("find", folder))?;
        Ok(Self { root })
    }

    fn path(&self, bucket: &BucketName, key: &ObjectKey) -> PathBuf {
        self.root.join(bucket.as_str()).join(key.as_str())
    }

    fn sum_path(&self, bucket: &BucketName, key: &ObjectKey) -> PathBuf {
        self.root.join(SUMS).join(bucket.as_str()).join(key.as_str())
    }

    /// A new name on the store's file system.
    fn incoming(&self) -> Result<PathBuf, StoreError> {
        let folder = self.root.join(INCOMING);
        fs::create_dir_all(&folder).map_err(fault("make", &folder))?;
        Ok(folder.join(uuid::Uuid::new_v4().simple().to_string()))
    }

    /// The folder of an object; the bucket has to be there.
    fn make_room(&self, bucket: &BucketName, path: &Path) -> Result<(), StoreError> {
        if !self.root.join(bucket.as_str()).is_dir() {
            return Err(StoreError::Missing { object: format!("bucket {bucket}") });
        }
        let folder = path.parent().unwrap_or(&self.root);
        fs::create_dir_all(folder).map_err(fault("make a folder for", path))
    }

    fn put(&self, bucket: &BucketName, key: &ObjectKey, file: &LocalFile) -> Result<ObjectHead, StoreError> {
        let path = self.path(bucket, key);
        self.make_room(bucket, &path)?;
        let temporary = self.incoming()?;
        let identity = if file.content == Content::Replaced && link_same(file, &temporary)? {
            file.file.sync_all().map_err(StoreError::local("sync", &file.path))?;
            let renamed = fs::rename(&temporary, &path);
            // A rename between two links of one file does nothing and leaves both.
            let _ = fs::remove_file(&temporary);
            renamed.map_err(fault("write", &path))?;
            sync_folder(&path).map_err(unlocal)?;
            file.identity
        } else {
            let mut arriving = Arriving::begin_at(&path, temporary).map_err(unlocal)?;
            read_through(&file.file, &file.path, file.bytes, |_, bytes| {
                arriving.write(bytes).map_err(unlocal)
            })?;
            if arriving.seen().1 != file.sha256 {
                return Err(file.changed());
            }
            arriving.finish().map_err(unlocal)?
        };
        self.keep_sum(bucket, key, &identity, &file.sha256)
    }

    fn put_small(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes: &[u8],
    ) -> Result<ObjectHead, StoreError> {
        let path = self.path(bucket, key);
        self.make_room(bucket, &path)?;
        let mut arriving = Arriving::begin_at(&path, self.incoming()?).map_err(unlocal)?;
        arriving.write(bytes).map_err(unlocal)?;
        let (_, sha256) = arriving.seen();
        let identity = arriving.finish().map_err(unlocal)?;
        self.keep_sum(bucket, key, &identity, &sha256)
    }

    /// Compares and stores under a lock. The version of a file is the checksum of its content: its identity may come
    /// again.
    fn put_expected(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes: &[u8],
        expected: Option<&str>,
    ) -> Result<Option<ObjectHead>, StoreError> {
        let _lock = lock_key(&self.root, bucket, key)?;
        let here = match self.opened(bucket, key) {
            Ok((file, metadata)) => Some(hash_of(&file, &self.path(bucket, key), metadata.len())?),
            Err(StoreError::Missing { .. }) => None,
            Err(error) => return Err(error),
        };
        if here.as_deref() != expected {
            return Ok(None);
        }
        self.put_small(bucket, key, bytes).map(Some)
    }

    /// Files the checksum of the very file that it was computed of: another writer may have replaced it by now.
    fn keep_sum(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        file: &FileIdentity,
        sha256: &str,
    ) -> Result<ObjectHead, StoreError> {
        let identity = mark(file);
        let sum = Sum { sha256: sha256.to_owned(), identity: identity.clone() };
        let text = serde_json::to_vec(&sum).map_err(|error| StoreError::Refused {
            what: format!("write the checksum of {bucket}/{key}"),
            source: Some(Box::new(error)),
        })?;
        write_whole(&self.sum_path(bucket, key), &text).map_err(unlocal)?;
        Ok(ObjectHead { bytes: file.bytes(), sha256: Some(sha256.to_owned()), etag: Some(identity) })
    }

    fn opened(&self, bucket: &BucketName, key: &ObjectKey) -> Result<(File, fs::Metadata), StoreError> {
        let path = self.path(bucket, key);
        LocalFile::open_only(&path).map_err(|error| match error {
            error if error.is_missing() => StoreError::Missing { object: format!("{bucket}/{key}") },
            // A part of the key that is a file, or the key of a folder: nothing is stored there.
            StoreError::LocalFile { ref source, .. }
                if source.kind() == ErrorKind::NotADirectory || path.is_dir() =>
            {
                StoreError::Missing { object: format!("{bucket}/{key}") }
            }
            error => unlocal(error),
        })
    }

    fn look(&self, bucket: &BucketName, key: &ObjectKey) -> Result<ObjectHead, StoreError> {
        let (file, metadata) = self.opened(bucket, key)?;
        let opened = FileIdentity::of(&metadata);
        let identity = mark(&opened);
        let kept =
            fs::read(self.sum_path(bucket, key)).ok().filter(|text| text.len() as u64 <= SUM_BYTES_MAX);
        let kept = kept.and_then(|text| serde_json::from_slice::<Sum>(&text).ok());
        if let Some(sum) = kept.filter(|sum| sum.identity == identity) {
            return Ok(ObjectHead { bytes: metadata.len(), sha256: Some(sum.sha256), etag: Some(identity) });
        }
        let path = self.path(bucket, key);
        let sha256 = hash_of(&file, &path, metadata.len())?;
        // Kept so that it is read once; a store that cannot be written to is read each time.
        let _ = self.keep_sum(bucket, key, &opened, &sha256);
        Ok(ObjectHead { bytes: metadata.len(), sha256: Some(sha256), etag: Some(identity) })
    }

    fn get(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        path: &Path,
        expected: Option<&str>,
    ) -> Result<ObjectHead, StoreError> {
        let known = match expected {
            Some(sha256) => Some(sha256.to_owned()),
            None => self.look(bucket, key)?.sha256,
        };
        let (file, metadata) = self.opened(bucket, key)?;
        let mut arriving = Arriving::begin(path)?;
        read_through(&file, &self.path(bucket, key), metadata.len(), |_, bytes| arriving.write(bytes))?;
        let (bytes, sha256) = arriving.seen();
        if let Some(expected) = known.filter(|known| *known != sha256) {
            return Err(StoreError::Integrity {
                object: format!("{bucket}/{key}"),
                expected: format!("sha256 {expected}"),
                found: format!("{bytes} bytes of sha256 {sha256}"),
            });
        }
        arriving.finish()?;
        Ok(ObjectHead { bytes, sha256: Some(sha256), etag: Some(mark(&FileIdentity::of(&metadata))) })
    }

    /// Removes what interrupted processes left behind.
    fn sweep(&self) {
        let Ok(entries) = fs::read_dir(self.root.join(INCOMING)) else { return };
        for entry in entries.flatten() {
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            let age = modified.ok().and_then(|time| SystemTime::now().duration_since(time).ok());
            if age.is_some_and(|age| age > INCOMING_AGE_MAX) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

fn hash_of(file: &File, path: &Path, bytes: u64) -> Result<String, StoreError> {
    let mut hash = Sha256::new();
    read_through(file, path, bytes, |_, piece| {
        hash.update(piece);
        Ok(())
    })
    .map_err(unlocal)?;
    Ok(hex(&hash.finalize()))
}

/// Links the opened file to `target`. False when it cannot be linked, or its name means another file by now.
fn link_same(file: &LocalFile, target: &Path) -> Result<bool, StoreError> {
    if fs::hard_link(&file.path, target).is_err() {
        return Ok(false);
    }
    let metadata = fs::symlink_metadata(target).map_err(fault("look at", target))?;
    if FileIdentity::of(&metadata) == file.identity {
        return Ok(true);
    }
    fs::remove_file(target).map_err(fault("remove", target))?;
    Ok(false)
}

/// The error of a file of the store, in the store's words.
pub(super) fn fault(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| unlocal(StoreError::LocalFile { action: what, path, source })
}

/// A file of the store is the store, not a file of this machine.
fn unlocal(error: StoreError) -> StoreError {
    let StoreError::LocalFile { action, path, source } = error else { return error };
    let what = format!("{action} {}", path.display());
    let kind = source.kind();
    let source = Some(source.into());
    match kind {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            StoreError::Full { what, source }
        }
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => StoreError::Denied { what, source },
        ErrorKind::NotADirectory | ErrorKind::IsADirectory | ErrorKind::InvalidFilename => {
            StoreError::Refused { what, source }
        }
        _ => StoreError::Unavailable { what, source },
    }
}

#[async_trait]
impl ObjectStore for FolderStore {
    async fn prepare(&self, bucket: &BucketName) -> Result<(), StoreError> {
        let (store, folder) = (self.clone(), self.root.join(bucket.as_str()));
        blocking(move || {
            store.sweep();
            fs::create_dir_all(&folder).map_err(fault("make", &folder))
        })
        .await
    }

    async fn put_file(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        file: &LocalFile,
    ) -> Result<ObjectHead, StoreError> {
        let (store, bucket, key, file) = (self.clone(), bucket.clone(), key.clone(), file.clone());
        blocking(move || store.put(&bucket, &key, &file)).await
    }

    async fn put_bytes(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes: Vec<u8>,
    ) -> Result<ObjectHead, StoreError> {
        let (store, bucket, key) = (self.clone(), bucket.clone(), key.clone());
        blocking(move || store.put_small(&bucket, &key, &bytes)).await
    }

    async fn put_if(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes: Vec<u8>,
        expected: Expected<'_>,
    ) -> Result<Option<ObjectHead>, StoreError> {
        let expected = match expected {
            Expected::Nothing => None,
            Expected::Version(version) => Some(version.to_owned()),
            Expected::Anything => return self.put_bytes(bucket, key, bytes).await.map(Some),
        };
        let (store, bucket, key) = (self.clone(), bucket.clone(), key.clone());
        blocking(move || store.put_expected(&bucket, &key, &bytes, expected.as_deref())).await
    }

    async fn head(&self, bucket: &BucketName, key: &ObjectKey) -> Result<ObjectHead, StoreError> {
        let (store, bucket, key) = (self.clone(), bucket.clone(), key.clone());
        blocking(move || store.look(&bucket, &key)).await
    }

    async fn get_to_file(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        path: &Path,
        expected: Option<&str>,
    ) -> Result<ObjectHead, StoreError> {
        let (store, bucket, key) = (self.clone(), bucket.clone(), key.clone());
        let (path, expected) = (path.to_owned(), expected.map(str::to_owned));
        blocking(move || store.get(&bucket, &key, &path, expected.as_deref())).await
    }

    async fn get_versioned(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes_max: u64,
    ) -> Result<Versioned, StoreError> {
        let (store, bucket, key) = (self.clone(), bucket.clone(), key.clone());
        blocking(move || {
            let (file, metadata) = store.opened(&bucket, &key)?;
            let bytes = metadata.len();
            if bytes > bytes_max {
                return Err(StoreError::TooLarge { object: format!("{bucket}/{key}"), bytes, bytes_max });
            }
            let mut content = Vec::with_capacity(bytes as usize);
            read_through(&file, &store.path(&bucket, &key), bytes, |_, piece| {
                content.extend_from_slice(piece);
                Ok(())
            })
            .map_err(unlocal)?;
            let version = Some(hex(&Sha256::digest(&content)));
            Ok(Versioned { bytes: content, version })
        })
        .await
    }

    async fn list(&self, bucket: &BucketName, prefix: &str, items_max: usize) -> Result<Listed, StoreError> {
        let (root, bucket, prefix) = (self.root.clone(), bucket.clone(), prefix.to_owned());
        blocking(move || list_folder(&root, &bucket, &prefix, items_max)).await
    }

    async fn delete(&self, bucket: &BucketName, key: &ObjectKey) -> Result<(), StoreError> {
        let (path, sum) = (self.path(bucket, key), self.sum_path(bucket, key));
        let top = self.root.join(bucket.as_str());
        blocking(move || {
            match fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
                Err(error) => return Err(fault("remove", &path)(error)),
            }
            let _ = fs::remove_file(&sum);
            // Keys have no folders: what is empty goes, but not the upper two, where another machine may just begin.
            let is_deep = |folder: &&Path| folder.strip_prefix(&top).is_ok_and(|p| p.iter().count() > 2);
            for folder in path.ancestors().skip(1).take_while(is_deep) {
                if fs::remove_dir(folder).is_err() {
                    break;
                }
            }
            Ok(())
        })
        .await
    }

    async fn copy(
        &self,
        from: (&BucketName, &ObjectKey),
        to: (&BucketName, &ObjectKey),
    ) -> Result<(), StoreError> {
        let source = self.path(from.0, from.1);
        let (from, to) = ((from.0.clone(), from.1.clone()), (to.0.clone(), to.1.clone()));
        let store = self.clone();
        blocking(move || {
            let head = store.look(&from.0, &from.1)?;
            let (file, metadata) = store.opened(&from.0, &from.1)?;
            let sha256 = head.sha256.unwrap_or_default();
            // Objects are replaced whole, so a link is as good as a copy.
            let file = LocalFile::hashed(&source, file, &metadata, sha256, Content::Replaced);
            store.put(&to.0, &to.1, &file).map(|_| ())
        })
        .await
    }

    fn url(&self, bucket: &BucketName, key: &ObjectKey) -> String {
        format!("file://{}", self.path(bucket, key).display())
    }
}
