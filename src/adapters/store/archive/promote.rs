//! The best weights of a study: replaced only by better ones on the same validation images.

use serde::{Deserialize, Serialize};

use super::manifest::{Manifest, Role};
use super::{StoreError, StoreSink, WRITE_TRIES_MAX, now_unix_ms};
use crate::adapters::store::{Expected, ObjectKey, Versioned, found};
use crate::job::delivery::FilesBody;

/// Bytes of a pointer.
const BYTES_MAX: u64 = 1 << 20;

/// What the promoted weights of a study are and where they come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pointer {
    /// Version of this form.
    pub format: u32,
    /// `bucket/key` of the weights that were copied.
    pub source: String,
    /// The same as an address.
    pub source_url: String,
    /// `bucket/key` of the copy.
    pub weights: String,
    /// SHA-256 of the weights.
    pub sha256: String,
    /// Their size.
    pub bytes: u64,
    /// Their score.
    pub fitness: f64,
    /// Its name.
    pub fitness_name: String,
    /// Identity of the validation images, when known.
    pub val_fingerprint: Option<String>,
    /// The study.
    pub study: String,
    /// Its version.
    pub version: i64,
    /// The job.
    pub task_id: String,
    /// The submission of it.
    pub instance: String,
    /// Type of the model.
    pub kind: String,
    /// Epochs that the run finished.
    pub epoch: u32,
    /// The machine that the run ended on.
    pub machine_id: String,
    /// When, Unix milliseconds.
    pub promoted_unix_ms: i64,
}

/// Whether `new` takes the place of `old`; the reason when not.
fn is_better(new: &Pointer, old: Option<&Pointer>) -> Result<(), String> {
    let Some(old) = old else { return Ok(()) };
    if old.sha256 == new.sha256 && old.task_id == new.task_id {
        return Err("these weights are the promoted ones".into());
    }
    if old.fitness_name != new.fitness_name {
        return Err(format!("the promoted weights are judged by {}", old.fitness_name));
    }
    if new.val_fingerprint.is_none() || old.val_fingerprint != new.val_fingerprint {
        return Err("the promoted weights were validated on other images".into());
    }
    if new.fitness <= old.fitness {
        return Err(format!("{} of {} is better or equal", old.fitness, old.task_id));
    }
    Ok(())
}

impl StoreSink {
    /// Promotes the best weights of a completed run where they are better. Says what was done, or why nothing was.
    pub(super) async fn promote(
        &self,
        body: &FilesBody,
        prefix: &ObjectKey,
        manifest: &Manifest,
    ) -> Result<String, StoreError> {
        match self.try_promote(body, prefix, manifest).await {
            Ok(outcome) => Ok(outcome),
            // The run itself is stored; a bucket that is not ours to write to is no reason to send it again.
            Err(
                error @ (StoreError::Denied { .. } | StoreError::Refused { .. } | StoreError::Name { .. }),
            ) => {
                tracing::warn!(task_id = %body.run.task_id, %error, "the weights are not promoted");
                Ok(format!("failed: {error}"))
            }
            Err(error) => Err(error),
        }
    }

    async fn try_promote(
        &self,
        body: &FilesBody,
        prefix: &ObjectKey,
        manifest: &Manifest,
    ) -> Result<String, StoreError> {
        let Some(fitness) = manifest.fitness else { return Ok("left: the run has no score".into()) };
        let Some(weights) = manifest.newest(Role::Best).or_else(|| manifest.newest(Role::Last)) else {
            return Ok("left: the run has no weights in the store".into());
        };
        let run = &body.run;
        let version = run.version.unwrap_or(1);
        let name = ObjectKey::new(format!("{}-v{version}", run.study_name))?;
        let with = |suffix: &str| ObjectKey::new(format!("{name}{suffix}"));
        let (target, pointer_key, text_key) = (with(".safetensors")?, with(".json")?, with(".txt")?);
        let source = ObjectKey::new(&weights.key)?;
        let new = Pointer {
            format: 1,
            source: format!("{}/{source}", self.bucket),
            source_url: self.store.url(&self.bucket, &source),
            weights: format!("{}/{target}", self.better_bucket),
            sha256: weights.sha256.clone(),
            bytes: weights.bytes,
            fitness,
            fitness_name: body.fitness_name.clone(),
            val_fingerprint: body.val_fingerprint.clone(),
            study: run.study_name.clone(),
            version,
            task_id: run.task_id.to_string(),
            instance: run.instance.clone(),
            kind: run.kind.clone(),
            epoch: body.epoch,
            machine_id: run.machine_id.clone(),
            promoted_unix_ms: now_unix_ms(),
        };
        self.store.prepare(&self.better_bucket).await?;
        let place = Place { target, pointer_key, text_key };
        let mut has_copied = false;
        for _ in 0..WRITE_TRIES_MAX {
            let seen =
                found(self.store.get_versioned(&self.better_bucket, &place.pointer_key, BYTES_MAX).await)?;
            let old = read_pointer(seen.as_ref(), &place.pointer_key);
            if let Err(reason) = is_better(&new, old.as_ref()) {
                if let Some(old) = old.filter(|old| old.sha256 != new.sha256) {
                    self.repair(&old, &new, &place, has_copied).await?;
                }
                return Ok(format!("left: {reason}"));
            }
            self.there(prefix).await?.fence(run)?;
            // The pointer is written after the weights: until then the old one stands, and this is done again.
            has_copied = true;
            self.place(&new, &place).await?;
            let text = serde_json::to_vec_pretty(&new).map_err(|error| StoreError::Refused {
                what: format!("write {}", place.pointer_key),
                source: Some(Box::new(error)),
            })?;
            let expected = Expected::of(seen.as_ref());
            let written = self.store.put_if(&self.better_bucket, &place.pointer_key, text, expected).await?;
            if written.is_some() {
                tracing::info!(task_id = new.task_id, fitness, weights = new.weights, "weights promoted");
                return Ok(format!("promoted: {}", self.store.url(&self.better_bucket, &place.target)));
            }
        }
        Err(StoreError::Busy { object: format!("{}/{}", self.better_bucket, place.pointer_key) })
    }

    /// Puts the weights that were promoted back where those of this run took their place: another run of the study was promoted
    /// meanwhile, or an earlier try ended between its copy and this. Where the store knows no checksum, only what this try copied
    /// is.
    async fn repair(
        &self,
        old: &Pointer,
        new: &Pointer,
        place: &Place,
        has_copied: bool,
    ) -> Result<(), StoreError> {
        let Some(there) = found(self.store.head(&self.better_bucket, &place.target).await)? else {
            return Ok(());
        };
        if !there.sha256.map_or(has_copied, |sha256| sha256 == new.sha256) {
            return Ok(());
        }
        match self.place(old, place).await {
            Err(error @ (StoreError::Missing { .. } | StoreError::Integrity { .. })) => {
                let weights = &old.weights;
                tracing::warn!(%error, "{weights} is not what its pointer says, and cannot be put back");
                Ok(())
            }
            outcome => outcome,
        }
    }

    /// Copies the weights of a pointer to their place, and says beside them where they come from.
    async fn place(&self, pointer: &Pointer, place: &Place) -> Result<(), StoreError> {
        let source = pointer.source.strip_prefix(self.bucket.as_str()).unwrap_or(&pointer.source);
        let source = ObjectKey::new(source.trim_start_matches('/'))?;
        let target = (&self.better_bucket, &place.target);
        self.store.copy((&self.bucket, &source), target).await?;
        let head = self.store.head(target.0, target.1).await?;
        if head.sha256.as_ref().is_some_and(|sha256| *sha256 != pointer.sha256) || head.bytes != pointer.bytes
        {
            return Err(StoreError::Integrity {
                object: pointer.weights.clone(),
                expected: format!("{} bytes of sha256 {}", pointer.bytes, pointer.sha256),
                found: format!("{} bytes of sha256 {}", head.bytes, head.sha256.unwrap_or_default()),
            });
        }
        let text = format!("{}\n", pointer.source).into_bytes();
        self.store.put_bytes(&self.better_bucket, &place.text_key, text).await.map(|_| ())
    }
}

/// Where the promoted weights of a study lie.
struct Place {
    target: ObjectKey,
    pointer_key: ObjectKey,
    text_key: ObjectKey,
}

fn read_pointer(seen: Option<&Versioned>, key: &ObjectKey) -> Option<Pointer> {
    match serde_json::from_slice(&seen?.bytes) {
        Ok(pointer) => Some(pointer),
        Err(error) => {
            tracing::warn!(%key, %error, "the pointer to promoted weights cannot be read and is replaced");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_better_weights_on_the_same_images_are_promoted() {
        let pointer = |task: &str, fitness: f64, images: Option<&str>| Pointer {
            format: 1,
            source: String::new(),
            source_url: String::new(),
            weights: String::new(),
            sha256: task.repeat(3),
            bytes: 1,
            fitness,
            fitness_name: "fitness".into(),
            val_fingerprint: images.map(str::to_owned),
            study: "s".into(),
            version: 1,
            task_id: task.into(),
            instance: "i".into(),
            kind: "yolo".into(),
            epoch: 1,
            machine_id: "m".into(),
            promoted_unix_ms: 0,
        };
        let old = pointer("a", 0.5, Some("v"));
        assert!(is_better(&pointer("b", 0.1, None), None).is_ok());
        assert!(is_better(&pointer("b", 0.6, Some("v")), Some(&old)).is_ok());
        for worse in [
            pointer("b", 0.5, Some("v")),
            pointer("b", 0.9, Some("w")),
            pointer("b", 0.9, None),
            old.clone(),
            Pointer { fitness_name: "mAP".into(), ..pointer("b", 0.9, Some("v")) },
        ] {
            assert!(is_better(&worse, Some(&old)).is_err(), "{worse:?}");
        }
        let unknown = pointer("a", 0.5, None);
        assert!(is_better(&pointer("b", 0.9, None), Some(&unknown)).is_err());
    }
}
