//! What of a run is kept in the store, over any [`ObjectStore`]: checkpoints, weights, run files, and the manifest last.
//!
//! Keys are `{study_name}/{task_id}/<path in the run folder>` in the bucket of runs. A delivery looks at what there is,
//! sends what is new, writes the manifest, and then removes what the manifest no longer names: a manifest never names
//! an object that was deleted. Everything can be done again after any failure.
//!
//! A run has one owner at a time, known by the fencing number in the manifest. A manifest replaces only the very one that
//! its writer has seen, and never one of a higher number. A new owner puts its number there before it begins ([`claim`]);
//! from then on an earlier one writes no manifest, begins no upload, removes and promotes nothing.

mod choose;
mod claim;
mod manifest;
mod promote;
mod sending;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use sha2::{Digest, Sha256};

use super::error::StoreError;
use super::{BucketName, ObjectKey, ObjectStore, blocking, hex};
use crate::adapters::sink::{DeliveryError, Receipt, Sink};
use crate::job::delivery::{Delivery, DeliveryBody, FilesBody, FilesMoment, SinkName};
use crate::job::service::StoreConfig;

pub use choose::{Policy, verifies};
pub use claim::{Claimed, claim};
pub use manifest::{
    Manifest, ManifestFile, Role, There, checkpoint_iteration, manifest_key, prefix_of, read_manifest,
    run_prefix,
};
pub use promote::Pointer;

use choose::{Hashes, periodic_epoch};
use manifest::text_of;
use sending::{Sending, Sent};

/// Checkpoints of a run that are looked at for ones that no manifest names.
const STATE_LIST_MAX: usize = 10_000;
/// Tries of a manifest that others write at the same time.
const WRITE_TRIES_MAX: u32 = 10;

/// The sink that keeps runs in a store.
pub struct StoreSink {
    store: Arc<dyn ObjectStore>,
    bucket: BucketName,
    better_bucket: BucketName,
    policy: Policy,
    hashes: Arc<Hashes>,
}

impl StoreSink {
    /// A sink into `store` with the policy of a configuration.
    ///
    /// # Errors
    /// [`StoreError::Name`] for the name of a bucket.
    pub fn new(config: &StoreConfig, store: Arc<dyn ObjectStore>) -> Result<Self, StoreError> {
        Ok(Self {
            store,
            bucket: BucketName::new(&config.bucket)?,
            better_bucket: BucketName::new(&config.better_bucket)?,
            policy: Policy {
                keep_last: config.keep_last.max(1),
                keep_every_epochs: config.keep_every_epochs,
                keep_best: config.keep_best,
            },
            hashes: Arc::default(),
        })
    }

    /// The store.
    pub fn store(&self) -> &Arc<dyn ObjectStore> {
        &self.store
    }

    /// The bucket of runs.
    pub fn bucket(&self) -> &BucketName {
        &self.bucket
    }

    /// Sends what a delivery is about.
    async fn send(&self, body: &FilesBody) -> Result<Receipt, DeliveryError> {
        let prefix = prefix_of(&body.run)?;
        self.store.prepare(&self.bucket).await?;
        let there = self.there(&prefix).await?;
        there.fence(&body.run)?;
        let mut sending = Sending::new(self, &prefix, there, body);
        let choice = self.choose(body).await?;
        let sent = sending.send(&choice).await?;
        let mut manifest = self.write(body, &prefix, &sent).await?;
        if body.moment == FilesMoment::End {
            // An upload that an earlier owner had begun may have ended on top of these: what differs is sent again.
            let again = sending.send(&choice).await?;
            if again != sent {
                manifest = self.write(body, &prefix, &again).await?;
            }
        }
        let (files_sent, bytes_sent) = (sending.files_sent, sending.bytes_sent);
        let key = manifest_key(&prefix)?;

        let mut receipt = Receipt::default();
        let mut note = |name, value: String| receipt.notes.push((name, value));
        note("store_manifest", self.store.url(&self.bucket, &key));
        if let Some(best) = manifest.newest(Role::Best) {
            note("best_url", self.store.url(&self.bucket, &ObjectKey::new(&best.key)?));
            note("best_sha256", best.sha256.clone());
        }
        if let Some(last) = manifest.newest(Role::Checkpoint) {
            note("last_checkpoint_url", self.store.url(&self.bucket, &ObjectKey::new(&last.key)?));
            note("last_checkpoint_sha256", last.sha256.clone());
        }
        note("store_files_sent", files_sent.to_string());
        note("store_bytes_sent", bytes_sent.to_string());
        if body.moment == FilesMoment::End && body.status == "completed" {
            note("promotion", self.promote(body, &prefix, &manifest).await?);
        }
        Ok(receipt)
    }

    async fn choose(&self, body: &FilesBody) -> Result<choose::Choice, DeliveryError> {
        let (run_dir, moment, policy) = (body.run.run_dir.clone(), body.moment, self.policy.clone());
        let chosen = blocking(move || choose::choose(&run_dir, moment, &policy)).await;
        chosen.map_err(|error| match error {
            // Nothing will bring it back; what was stored before stays.
            StoreError::LocalFile { source, path, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                let what = format!("the run folder {} is gone", path.display());
                DeliveryError::Refused { what, source: Some(Box::new(source)) }
            }
            error => error.into(),
        })
    }

    /// What lies at the key of the manifest. One that cannot be read is as good as none, but for a word in the log.
    async fn there(&self, prefix: &ObjectKey) -> Result<There, StoreError> {
        let there = read_manifest(self.store.as_ref(), &self.bucket, prefix).await?;
        if let Some(reason) = &there.fault {
            tracing::warn!(%prefix, reason, "the manifest in the store cannot be read and is replaced");
        }
        Ok(there)
    }

    /// Writes the manifest of what was sent in place of the one that is there, then removes what it no longer names.
    async fn write(&self, body: &FilesBody, prefix: &ObjectKey, sent: &Sent) -> Result<Manifest, StoreError> {
        let key = manifest_key(prefix)?;
        for _ in 0..WRITE_TRIES_MAX {
            // Whoever took the run over meanwhile wrote a manifest of its own.
            let there = self.there(prefix).await?;
            there.fence(&body.run)?;
            let same_run = there.manifest.as_ref().filter(|old| body.is_of(&old.instance));
            let parent = same_run.and(there.sha256.clone());
            let mut manifest = Manifest::of(body, parent, now_unix_ms());
            if let Some(position) = sent.position {
                let is_end = body.moment == FilesMoment::End;
                manifest.epoch = if is_end { body.epoch.max(position.epoch) } else { position.epoch };
                manifest.step = position.step;
            }
            let old_files = same_run.map(|old| old.files.as_slice()).unwrap_or_default();
            manifest.files = self.retained(sent.files.clone(), old_files);
            let text = text_of(&manifest, prefix)?;
            let sha256 = hex(&Sha256::digest(&text));
            if self.store.put_if(&self.bucket, &key, text, there.expected()).await?.is_some() {
                let old_files = there.manifest.map(|old| old.files).unwrap_or_default();
                self.remove_unnamed(prefix, (&manifest, &sha256), &old_files, body.moment).await;
                return Ok(manifest);
            }
        }
        Err(StoreError::Busy { object: format!("{}/{key}", self.bucket) })
    }

    /// The files of the new manifest: what was sent, and of what the old one named, what is kept.
    fn retained(&self, sent: Vec<ManifestFile>, old: &[ManifestFile]) -> Vec<ManifestFile> {
        let mut files = sent;
        let named: HashSet<String> = files.iter().map(|file| file.path.clone()).collect();
        let kept = old.iter().filter(|file| !named.contains(&file.path));
        files.extend(kept.filter(|file| self.keeps(file)).cloned());
        let mut iterations: Vec<u64> = files.iter().filter_map(ManifestFile::iteration).collect();
        iterations.sort_unstable_by(|a, b| b.cmp(a));
        let oldest_kept = iterations.get(self.policy.keep_last - 1).copied().unwrap_or(0);
        files.retain(|file| file.iteration().is_none_or(|iteration| iteration >= oldest_kept));
        files.truncate(manifest::FILES_MAX);
        files
    }

    fn keeps(&self, file: &ManifestFile) -> bool {
        match file.role {
            Role::Best => self.policy.keep_best,
            Role::Periodic => periodic_epoch(&file.path).is_some_and(|epoch| self.policy.keeps_epoch(epoch)),
            Role::Checkpoint | Role::Last | Role::Run => true,
        }
    }

    /// Removes objects that the old manifest named and the new one does not, and at the end older checkpoints that
    /// no manifest names. Nothing once the manifest is another one: its owner may need them. What cannot be removed costs
    /// room and nothing else.
    async fn remove_unnamed(
        &self,
        prefix: &ObjectKey,
        (manifest, sha256): (&Manifest, &str),
        old_files: &[ManifestFile],
        moment: FilesMoment,
    ) {
        let named: HashSet<&str> = manifest.files.iter().map(|file| file.key.as_str()).collect();
        let mut unnamed: Vec<String> = old_files.iter().map(|file| file.key.clone()).collect();
        if moment == FilesMoment::End {
            let newest = manifest.newest(Role::Checkpoint).and_then(ManifestFile::iteration).unwrap_or(0);
            let listed = self.store.list(&self.bucket, &format!("{prefix}/state/"), STATE_LIST_MAX).await;
            let is_older = |key: &str| {
                let path = key.strip_prefix(prefix.as_str()).and_then(|path| path.strip_prefix('/'));
                path.and_then(checkpoint_iteration).is_some_and(|iteration| iteration < newest)
            };
            let keys =
                listed.unwrap_or_default().entries.into_iter().map(|entry| entry.key.as_str().to_owned());
            unnamed.extend(keys.filter(|key| is_older(key)));
        }
        unnamed.sort();
        unnamed.dedup();
        unnamed.retain(|key| !named.contains(key.as_str()));
        if unnamed.is_empty() {
            return;
        }
        let there = self.there(prefix).await.ok().and_then(|there| there.sha256);
        if there.as_deref() != Some(sha256) {
            tracing::info!(%prefix, "the manifest is another one by now: what it may need is not removed");
            return;
        }
        for key in &unnamed {
            let Ok(key) = ObjectKey::new(key) else { continue };
            if let Err(error) = self.store.delete(&self.bucket, &key).await {
                tracing::warn!(%key, %error, "an object that is no longer needed stays in the store");
            }
        }
    }
}

pub(super) fn now_unix_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_millis() as i64)
}

#[async_trait]
impl Sink for StoreSink {
    fn name(&self) -> SinkName {
        SinkName::Store
    }

    async fn deliver(&self, delivery: &Delivery) -> Result<Receipt, DeliveryError> {
        match &delivery.body {
            DeliveryBody::Files(body) => self.send(body).await,
            _ => Err(DeliveryError::Refused { what: "the store takes files only".into(), source: None }),
        }
    }
}
