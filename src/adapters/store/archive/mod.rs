//! What of a run is kept in the store, over any [`ObjectStore`]: checkpoints, weights, run files, and the manifest last.
//!
//! Keys are `{study_name}/{task_id}/<path in the run folder>` in the bucket of runs. A delivery looks at what there is,
//! sends what is new, writes the manifest, and then removes what the manifest no longer names: a manifest never names
//! an object that was deleted. Everything can be done again after any failure.

mod choose;
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
use crate::job::delivery::{Delivery, DeliveryBody, FilesBody, FilesMoment, SinkName, is_shared_instance};
use crate::job::service::StoreConfig;

pub use choose::{Policy, verifies};
pub use manifest::{
    Manifest, ManifestFile, Role, checkpoint_iteration, manifest_key, prefix_of, read_bytes, run_prefix,
};
pub use promote::Pointer;

use choose::{Hashes, periodic_epoch};
use sending::Sending;

/// Checkpoints of a run that are looked at for ones that no manifest names.
const STATE_LIST_MAX: usize = 10_000;

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
        let old = self.manifest(&prefix).await?;
        fence(body, old.as_ref().map(|(old, _)| old))?;
        let old_files = old.as_ref().map(|(old, _)| old.files.as_slice()).unwrap_or_default();
        let mut sending = Sending::new(self, &prefix, old_files, body.moment);
        let choice = self.choose(body).await?;
        let mut files = sending.send_all(&choice.files).await?;
        files.extend(sending.send_first(&choice.checkpoints).await?);
        let (files_sent, bytes_sent) = (sending.files_sent, sending.bytes_sent);

        // Whoever took the run over meanwhile wrote a manifest of its own.
        let old = self.manifest(&prefix).await?;
        fence(body, old.as_ref().map(|(old, _)| old))?;
        let same_run = old.as_ref().filter(|(old, _)| old.instance == body.run.instance);
        let parent = same_run.map(|(_, sha256)| sha256.clone());
        let mut manifest = Manifest::of(body, parent, now_unix_ms());
        manifest.files =
            self.retained(files, same_run.map(|(old, _)| old.files.as_slice()).unwrap_or_default());
        let text = serde_json::to_vec_pretty(&manifest).map_err(|error| DeliveryError::Refused {
            what: format!("the manifest of {prefix}"),
            source: Some(Box::new(error)),
        })?;
        let key = manifest_key(&prefix)?;
        self.store.put_bytes(&self.bucket, &key, text).await?;
        let old_files = old.map(|(old, _)| old.files).unwrap_or_default();
        self.remove_unnamed(&prefix, &manifest, &old_files, body.moment).await;

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
            note("promotion", self.promote(body, &manifest).await?);
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

    /// The run's manifest and its checksum. One that cannot be read is as good as none, but for a word in the log.
    async fn manifest(&self, prefix: &ObjectKey) -> Result<Option<(Manifest, String)>, StoreError> {
        let Some(bytes) = read_bytes(self.store.as_ref(), &self.bucket, prefix).await? else {
            return Ok(None);
        };
        match Manifest::parse(&bytes, prefix) {
            Ok(manifest) => Ok(Some((manifest, hex(&Sha256::digest(&bytes))))),
            Err(reason) => {
                tracing::warn!(%prefix, reason, "the manifest in the store cannot be read and is replaced");
                Ok(None)
            }
        }
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
    /// no manifest names. What cannot be removed costs room and nothing else.
    async fn remove_unnamed(
        &self,
        prefix: &ObjectKey,
        manifest: &Manifest,
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
            let keys = listed.unwrap_or_default().into_iter().map(|entry| entry.key.as_str().to_owned());
            unnamed.extend(keys.filter(|key| is_older(key)));
        }
        unnamed.sort();
        unnamed.dedup();
        for key in unnamed.iter().filter(|key| !named.contains(key.as_str())) {
            let Ok(key) = ObjectKey::new(key) else { continue };
            if let Err(error) = self.store.delete(&self.bucket, &key).await {
                tracing::warn!(%key, %error, "an object that is no longer needed stays in the store");
            }
        }
    }
}

/// A manifest of the same run by a later owner, or of a later run of the task, ends this one's deliveries. Numbers are compared
/// only where one clock gave them out: Redis for the instances of a shared queue, the machine for its own jobs. Otherwise
/// whoever comes later replaces what is there.
fn fence(body: &FilesBody, there: Option<&Manifest>) -> Result<(), DeliveryError> {
    let run = &body.run;
    let is_of_one_clock = |there: &&Manifest| {
        let (ours, theirs) = (is_shared_instance(&run.instance), is_shared_instance(&there.instance));
        let is_own = !ours && !theirs && there.machine_id == run.machine_id;
        there.instance == run.instance || ours && theirs || is_own
    };
    match there.filter(is_of_one_clock).filter(|there| there.fence > run.fence) {
        Some(there) => Err(DeliveryError::Fenced { owner: there.machine_id.clone(), fence: there.fence }),
        None => Ok(()),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::delivery::RunRef;

    fn body(instance: &str, machine: &str, fence: u64) -> FilesBody {
        FilesBody {
            run: RunRef {
                task_id: "t".parse().expect("an id"),
                instance: instance.into(),
                study_name: "s".into(),
                version: None,
                trial_number: 1,
                kind: "yolo".into(),
                run_dir: "/r".into(),
                fence,
                machine_id: machine.into(),
            },
            moment: FilesMoment::Checkpoint,
            status: "running".into(),
            epoch: 1,
            step: 1,
            metrics: serde_json::Map::new(),
            fitness: None,
            fitness_name: "fitness".into(),
            val_fingerprint: None,
        }
    }

    #[test]
    fn only_numbers_of_one_clock_fence() {
        let is_fenced = |there: FilesBody, late: FilesBody| {
            let there = Manifest::of(&there, None, 0);
            matches!(fence(&late, Some(&there)), Err(DeliveryError::Fenced { fence: 9, .. }))
        };
        assert!(is_fenced(body("q/1-0", "a", 9), body("q/1-0", "b", 8)), "the same run, an earlier owner");
        assert!(is_fenced(body("q/2-0", "a", 9), body("q/1-0", "b", 8)), "an earlier submission");
        assert!(is_fenced(body("u2", "a", 9), body("u1", "a", 8)), "an earlier run on the same machine");
        assert!(!is_fenced(body("u1", "a", 9), body("u2", "b", 8)), "a machine whose clock is slow");
        assert!(!is_fenced(body("q/1-0", "a", 9), body("u2", "a", 8)), "the clock of Redis is ahead");
        assert!(!is_fenced(body("u1", "a", 9), body("q/1-0", "a", 8)), "the clock of Redis is slow");
        assert!(!is_fenced(body("u1", "a", 9), body("u2", "a", 10)), "a later run");
        assert!(fence(&body("u1", "a", 1), None).is_ok());
    }
}
