//! The manifest of a run in the store: what there is of it, written last, so that all it names is there.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};
use sha2::{Digest, Sha256};

use crate::adapters::store::error::StoreError;
use crate::adapters::store::names::fault_of_path;
use crate::adapters::store::{BucketName, Expected, ObjectKey, ObjectStore, Versioned, found, hex};
use crate::job::delivery::{FilesBody, RunRef, is_shared_instance};

/// Version of the form of manifests.
const FORMAT: u32 = 1;
/// Name of the manifest below the run's prefix.
const NAME: &str = "manifest.json";
/// Bytes of a manifest.
const BYTES_MAX: u64 = 8 << 20;
/// Files of a manifest.
pub const FILES_MAX: usize = 10_000;

/// What a file of a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A checkpoint that the run can be continued from.
    Checkpoint,
    /// The best weights.
    Best,
    /// The newest weights.
    Last,
    /// The weights of an epoch.
    Periodic,
    /// Anything else of the run folder.
    Run,
}

/// A file of a run in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Relative to the run folder.
    pub path: String,
    /// Key in the bucket of runs.
    pub key: String,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of its content, hexadecimal.
    pub sha256: String,
    /// What it is.
    pub role: Role,
}

impl ManifestFile {
    /// The iteration of a checkpoint, by its name.
    pub fn iteration(&self) -> Option<u64> {
        (self.role == Role::Checkpoint).then(|| checkpoint_iteration(&self.path)).flatten()
    }
}

/// The iteration of `state/step-<n>.ckpt`.
pub fn checkpoint_iteration(path: &str) -> Option<u64> {
    path.strip_prefix("state/step-")?.strip_suffix(".ckpt")?.parse().ok()
}

/// What there is of a run in the store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this form.
    pub format: u32,
    /// The job.
    pub task_id: String,
    /// The submission of it.
    pub instance: String,
    /// The study.
    pub study: String,
    /// Type of the model.
    pub kind: String,
    /// The machine that wrote it.
    pub machine_id: String,
    /// Fencing number of that machine.
    pub fence: u64,
    /// `running`, `completed`, `failed` or `cancelled`.
    pub status: String,
    /// Epochs finished.
    pub epoch: u32,
    /// Optimiser steps taken.
    pub step: u64,
    /// The newest metrics.
    pub metrics: Map<String, Json>,
    /// The score, when there is one.
    pub fitness: Option<f64>,
    /// Its name.
    pub fitness_name: String,
    /// Identity of the validation images, when known.
    pub val_fingerprint: Option<String>,
    /// The files.
    pub files: Vec<ManifestFile>,
    /// SHA-256 of the manifest that this one replaced, of the same run.
    pub parent: Option<String>,
    /// When it was written, Unix milliseconds.
    pub written_unix_ms: i64,
}

impl Manifest {
    /// The manifest of a delivery, without files.
    pub fn of(body: &FilesBody, parent: Option<String>, written_unix_ms: i64) -> Self {
        let run = &body.run;
        Self {
            format: FORMAT,
            task_id: run.task_id.to_string(),
            instance: run.instance.clone(),
            study: run.study_name.clone(),
            kind: run.kind.clone(),
            machine_id: run.machine_id.clone(),
            fence: run.fence,
            status: body.status.clone(),
            epoch: body.epoch,
            step: body.step,
            metrics: body.metrics.clone(),
            fitness: body.fitness.filter(|fitness| fitness.is_finite()),
            fitness_name: body.fitness_name.clone(),
            val_fingerprint: body.val_fingerprint.clone(),
            files: Vec::new(),
            parent,
            written_unix_ms,
        }
    }

    /// The file of a role; of several checkpoints the newest.
    pub fn newest(&self, role: Role) -> Option<&ManifestFile> {
        let files = self.files.iter().filter(|file| file.role == role);
        files.max_by_key(|file| file.iteration())
    }

    /// Parses a manifest and checks that it speaks of this run's files only.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8], prefix: &ObjectKey) -> Result<Self, String> {
        let manifest: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if manifest.format != FORMAT {
            return Err(format!("its form is {}, this program knows {FORMAT}", manifest.format));
        }
        if manifest.files.len() > FILES_MAX {
            return Err(format!("it names {} files, at most {FILES_MAX} are allowed", manifest.files.len()));
        }
        for file in &manifest.files {
            let is_below = file.key == format!("{prefix}/{}", file.path);
            if fault_of_path(&file.path).is_some() || !is_below || file.sha256.len() != 64 {
                return Err(format!("it names {:?} at {:?}", file.path, file.key));
            }
        }
        Ok(manifest)
    }
}

/// Where a run lies in its bucket: `{study_name}/{task_id}`.
///
/// # Errors
/// [`StoreError::Name`].
pub fn run_prefix(study: &str, task_id: &str) -> Result<ObjectKey, StoreError> {
    // A study or a job is one part of a key each.
    for name in [study, task_id] {
        if name.contains('/') {
            let reason = "it is one part of a key";
            return Err(StoreError::Name { what: "key", name: name.to_owned(), reason });
        }
    }
    ObjectKey::new(format!("{study}/{task_id}"))
}

/// The same of a reference.
///
/// # Errors
/// [`StoreError::Name`].
pub fn prefix_of(run: &RunRef) -> Result<ObjectKey, StoreError> {
    run_prefix(&run.study_name, run.task_id.as_str())
}

/// The key of a run's manifest.
///
/// # Errors
/// [`StoreError::Name`].
pub fn manifest_key(prefix: &ObjectKey) -> Result<ObjectKey, StoreError> {
    prefix.join(NAME)
}

impl Manifest {
    /// Whether it is that of a later owner or run. Numbers are compared only where one clock gave them out: Redis for the
    /// instances of a shared queue, the machine for its own jobs. Otherwise whoever comes later replaces what is there.
    pub fn is_later_than(&self, run: &RunRef) -> bool {
        let (ours, theirs) = (is_shared_instance(&run.instance), is_shared_instance(&self.instance));
        let is_own = !ours && !theirs && self.machine_id == run.machine_id;
        (self.instance == run.instance || ours && theirs || is_own) && self.fence > run.fence
    }
}

/// What lies at the key of a run's manifest.
#[derive(Debug)]
pub struct There {
    /// The manifest, when there is one that can be read.
    pub manifest: Option<Manifest>,
    /// Why the one that is there cannot be read.
    pub fault: Option<String>,
    /// SHA-256 of what is there, hexadecimal.
    pub sha256: Option<String>,
    object: Option<Versioned>,
}

impl There {
    /// What has to be there still when the manifest is written.
    pub fn expected(&self) -> Expected<'_> {
        Expected::of(self.object.as_ref())
    }

    /// A manifest of the same run by a later owner, or of a later run of the task, ends what this one does.
    ///
    /// # Errors
    /// [`StoreError::Fenced`].
    pub fn fence(&self, run: &RunRef) -> Result<(), StoreError> {
        match self.manifest.as_ref().filter(|there| there.is_later_than(run)) {
            Some(there) => Err(StoreError::Fenced { owner: there.machine_id.clone(), fence: there.fence }),
            None => Ok(()),
        }
    }
}

/// Looks at the key of a run's manifest.
///
/// # Errors
/// [`StoreError`].
pub async fn read_manifest(
    store: &dyn ObjectStore,
    bucket: &BucketName,
    prefix: &ObjectKey,
) -> Result<There, StoreError> {
    let object = found(store.get_versioned(bucket, &manifest_key(prefix)?, BYTES_MAX).await)?;
    let parsed = object.as_ref().map(|object| Manifest::parse(&object.bytes, prefix));
    let (manifest, fault) = match parsed.transpose() {
        Ok(manifest) => (manifest, None),
        Err(reason) => (None, Some(reason)),
    };
    let sha256 = object.as_ref().map(|object| hex(&Sha256::digest(&object.bytes)));
    Ok(There { manifest, fault, sha256, object })
}

/// The text of a manifest.
///
/// # Errors
/// [`StoreError::Refused`].
pub fn text_of(manifest: &Manifest, prefix: &ObjectKey) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec_pretty(manifest).map_err(|error| StoreError::Refused {
        what: format!("write the manifest of {prefix}"),
        source: Some(Box::new(error)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::delivery::FilesMoment;

    fn text(path: &str, key: &str) -> String {
        format!(
            r#"{{"format":1,"task_id":"t","instance":"i","study":"s","kind":"yolo","machine_id":"m","fence":1,
            "status":"running","epoch":1,"step":2,"metrics":{{}},"fitness":null,"fitness_name":"f",
            "val_fingerprint":null,"parent":null,"written_unix_ms":0,
            "files":[{{"path":"{path}","key":"{key}","bytes":1,"sha256":"{}","role":"run"}}]}}"#,
            "0".repeat(64)
        )
    }

    #[test]
    fn a_manifest_speaks_of_its_own_run_only() {
        let prefix = run_prefix("s", "t").expect("a key");
        assert!(Manifest::parse(text("a/b", "s/t/a/b").as_bytes(), &prefix).is_ok());
        for (path, key) in
            [("../b", "s/t/../b"), ("/etc/x", "s/t//etc/x"), ("a", "s/other/a"), ("a", "s/t/b")]
        {
            assert!(Manifest::parse(text(path, key).as_bytes(), &prefix).is_err(), "{path} {key}");
        }
        assert!(Manifest::parse(b"{", &prefix).is_err());
        assert!(run_prefix("a/b", "t").is_err() && run_prefix("..", "t").is_err());
        assert_eq!(checkpoint_iteration("state/step-000000120.ckpt"), Some(120));
        assert_eq!(checkpoint_iteration("state/x.ckpt"), None);
    }

    fn body(instance: &str, machine: &str, fence: u64) -> FilesBody {
        FilesBody {
            run: RunRef { fence, machine_id: machine.into(), ..RunRef::sample(instance) },
            continues: Vec::new(),
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
        let is_fenced =
            |there: FilesBody, late: FilesBody| Manifest::of(&there, None, 0).is_later_than(&late.run);
        assert!(is_fenced(body("q/1-0", "a", 9), body("q/1-0", "b", 8)), "the same run, an earlier owner");
        assert!(is_fenced(body("q/2-0", "a", 9), body("q/1-0", "b", 8)), "an earlier submission");
        assert!(is_fenced(body("u2", "a", 9), body("u1", "a", 8)), "an earlier run on the same machine");
        assert!(!is_fenced(body("u1", "a", 9), body("u2", "b", 8)), "a machine whose clock is slow");
        assert!(!is_fenced(body("q/1-0", "a", 9), body("u2", "a", 8)), "the clock of Redis is ahead");
        assert!(!is_fenced(body("u1", "a", 9), body("q/1-0", "a", 8)), "the clock of Redis is slow");
        assert!(!is_fenced(body("u1", "a", 9), body("u2", "a", 10)), "a later run");
    }
}
