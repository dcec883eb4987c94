//! The files of one delivery on their way to the store.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::choose::{Choice, Chosen, Hashes};
use super::manifest::{ManifestFile, Role, There, manifest_key, read_manifest};
use super::{StoreError, StoreSink};
use crate::adapters::store::{BucketName, LocalFile, ObjectKey, ObjectStore, blocking, found};
use crate::job::delivery::{FilesBody, FilesMoment, RunRef};
use crate::train::checkpoint::{self, Position};

/// Tries of a file that changes while it is sent.
const CHANGED_TRIES_MAX: u32 = 5;
/// A file of at least this size is looked for in the store before it is sent.
const LARGE_BYTES: u64 = 256 << 10;
/// How old the last look at the manifest may be when a small file is sent.
const LOOK_AGE_MAX: Duration = Duration::from_millis(500);

/// What of a run is in the store after sending.
#[derive(Debug, PartialEq)]
pub(super) struct Sent {
    /// The files.
    pub files: Vec<ManifestFile>,
    /// How far the run was, by the checkpoint among them.
    pub position: Option<Position>,
}

/// What is known to be in the store while files are sent.
pub(super) struct Sending<'a> {
    store: &'a dyn ObjectStore,
    bucket: &'a BucketName,
    prefix: &'a ObjectKey,
    hashes: Arc<Hashes>,
    moment: FilesMoment,
    /// The owner.
    run: &'a RunRef,
    /// Checksum of the manifest when it was looked at last, and when.
    manifest_sha256: Option<String>,
    looked: Instant,
    /// Checksum and size by key, and a key by checksum.
    by_key: HashMap<String, (String, u64)>,
    by_sha256: HashMap<String, String>,
    /// Files that were sent over the network or written.
    pub files_sent: u64,
    /// Their bytes.
    pub bytes_sent: u64,
}

impl<'a> Sending<'a> {
    pub(super) fn new(sink: &'a StoreSink, prefix: &'a ObjectKey, there: There, body: &'a FilesBody) -> Self {
        let mut sending = Self {
            store: sink.store.as_ref(),
            bucket: &sink.bucket,
            prefix,
            hashes: sink.hashes.clone(),
            moment: body.moment,
            run: &body.run,
            manifest_sha256: there.sha256,
            looked: Instant::now(),
            by_key: HashMap::new(),
            by_sha256: HashMap::new(),
            files_sent: 0,
            bytes_sent: 0,
        };
        for file in there.manifest.into_iter().flat_map(|manifest| manifest.files) {
            sending.know(&file.key, &file.sha256, file.bytes);
        }
        sending
    }

    /// The object of a key has this content now.
    fn know(&mut self, key: &str, sha256: &str, bytes: u64) {
        if let Some((before, _)) = self.by_key.insert(key.to_owned(), (sha256.to_owned(), bytes))
            && before != sha256
            && self.by_sha256.get(&before).is_some_and(|other| other == key)
        {
            self.by_sha256.remove(&before);
        }
        self.by_sha256.entry(sha256.to_owned()).or_insert_with(|| key.to_owned());
    }

    /// Sends the files of a choice, and of its checkpoints the first that is there and verifies. What vanished meanwhile
    /// is left out.
    pub(super) async fn send(&mut self, choice: &Choice) -> Result<Sent, StoreError> {
        let mut sent = Sent { files: Vec::with_capacity(choice.files.len() + 1), position: None };
        for chosen in &choice.files {
            match self.send_one(chosen).await {
                Ok((file, _)) => sent.files.push(file),
                Err(error @ StoreError::LocalFile { .. }) if error.is_missing() => {}
                Err(error) => return Err(error),
            }
        }
        for chosen in &choice.checkpoints {
            match self.send_one(chosen).await {
                Ok((file, local)) => {
                    sent.files.push(file);
                    sent.position = blocking(move || Ok(checkpoint::position(&local.file))).await?;
                    break;
                }
                Err(error @ StoreError::LocalFile { .. }) if error.is_missing() => {}
                Err(StoreError::Integrity { object, found, .. })
                    if object == chosen.path.display().to_string() =>
                {
                    tracing::warn!(object, found, "a checkpoint does not verify and is not stored");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(sent)
    }

    async fn send_one(&mut self, chosen: &Chosen) -> Result<(ManifestFile, LocalFile), StoreError> {
        let mut tries = 0;
        loop {
            let (hashes, opened) = (self.hashes.clone(), chosen.clone());
            let opened = blocking(move || hashes.open(&opened)).await;
            let placed = match opened {
                Ok(file) => self.place(chosen, &file).await.map(|key| {
                    let named = ManifestFile {
                        path: chosen.name.clone(),
                        key: key.as_str().to_owned(),
                        bytes: file.bytes,
                        sha256: file.sha256.clone(),
                        role: chosen.role,
                    };
                    (named, file)
                }),
                Err(error) => Err(error),
            };
            match placed {
                Err(StoreError::Changed { .. }) if tries < CHANGED_TRIES_MAX => tries += 1,
                placed => return placed,
            }
        }
    }

    /// Makes sure that the store has the file under its key.
    async fn place(&mut self, chosen: &Chosen, file: &LocalFile) -> Result<ObjectKey, StoreError> {
        let key = self.prefix.join(&chosen.name)?;
        let is_large = chosen.role != Role::Run || file.bytes >= LARGE_BYTES;
        let is_named = self.by_key.get(key.as_str()).is_some_and(|(sha256, _)| *sha256 == file.sha256);
        // While a run goes on, the manifest's word is enough for a small file.
        if is_named && !is_large && self.moment == FilesMoment::Checkpoint {
            return Ok(key);
        }
        if (is_named || is_large) && self.has(&key, file).await? {
            self.know(key.as_str(), &file.sha256, file.bytes);
            return Ok(key);
        }
        self.look(is_large).await?;
        if is_large && self.copy(&key, file).await? {
            self.know(key.as_str(), &file.sha256, file.bytes);
            return Ok(key);
        }
        self.store.put_file(self.bucket, &key, file).await?;
        self.files_sent += 1;
        self.bytes_sent += file.bytes;
        self.know(key.as_str(), &file.sha256, file.bytes);
        Ok(key)
    }

    /// Ends the delivery when a later owner of the run has written its manifest. An upload that has begun is not ended.
    async fn look(&mut self, is_large: bool) -> Result<(), StoreError> {
        if !is_large && self.looked.elapsed() < LOOK_AGE_MAX {
            return Ok(());
        }
        let head = found(self.store.head(self.bucket, &manifest_key(self.prefix)?).await)?;
        let is_known = match (&head, &self.manifest_sha256) {
            (Some(head), Some(known)) => head.sha256.as_ref() == Some(known),
            (head, known) => head.is_none() && known.is_none(),
        };
        if !is_known {
            let there = read_manifest(self.store, self.bucket, self.prefix).await?;
            there.fence(self.run)?;
            self.manifest_sha256 = there.sha256;
        }
        self.looked = Instant::now();
        Ok(())
    }

    async fn has(&self, key: &ObjectKey, file: &LocalFile) -> Result<bool, StoreError> {
        let head = found(self.store.head(self.bucket, key).await)?;
        Ok(head.is_some_and(|head| {
            head.bytes == file.bytes && head.sha256.as_deref() == Some(file.sha256.as_str())
        }))
    }

    /// Copies the content from another object that has it. False when there is none, or the copy is not it.
    async fn copy(&self, key: &ObjectKey, file: &LocalFile) -> Result<bool, StoreError> {
        let Some(other) = self.by_sha256.get(&file.sha256).filter(|other| *other != key.as_str()) else {
            return Ok(false);
        };
        let Ok(other) = ObjectKey::new(other) else { return Ok(false) };
        match self.store.copy((self.bucket, &other), (self.bucket, key)).await {
            Ok(()) => self.has(key, file).await,
            Err(error) if error.is_outage() => Err(error),
            Err(error) => {
                tracing::debug!(%key, %error, "an object cannot be copied in the store and is sent");
                Ok(false)
            }
        }
    }
}
