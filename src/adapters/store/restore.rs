//! A run comes back from the store to a machine that does not have it, or has less of it.

use std::path::{Path, PathBuf};

use super::archive::{ManifestFile, Role, checkpoint_iteration, read_manifest, run_prefix};
use super::error::StoreError;
use super::local::LocalFile;
use super::{BucketName, Content, ObjectKey, ObjectStore, blocking};

/// Files that a run is continued with, beside checkpoint and weights. Not `result.json`: it says that the run ended.
const RUN_FILES: [&str; 4] = ["args.yaml", "config.effective.yaml", "results.csv", "events.jsonl"];

/// What came back.
#[derive(Debug, Clone, PartialEq)]
pub struct Restored {
    /// The checkpoint to continue from; `None` when the run has none yet.
    pub checkpoint: Option<PathBuf>,
    /// True when the store names checkpoints and none of them came back, nor is one here.
    pub is_lost: bool,
    /// True when the checkpoint was here already, as new or newer than the store's: then nothing was fetched.
    pub is_local_newer: bool,
    /// Files fetched.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Epochs finished when the manifest was written.
    pub epoch: u32,
    /// Steps taken by then.
    pub step: u64,
    /// The machine that wrote it.
    pub machine_id: String,
    /// Its fencing number.
    pub fence: u64,
    /// The run's state when it was written.
    pub status: String,
    /// What could not be brought back, and why.
    pub problems: Vec<String>,
}

/// Brings the files of a run back that it is continued with: weights, tables and arguments, and the checkpoint last, so
/// that a run folder with a checkpoint has the rest. Each file is verified and appears whole or not at all. When the
/// newest checkpoint is missing or damaged the next older one of the manifest is taken. `None` when the store has
/// nothing of these instances (one, and those that it continues). A checkpoint in `run_dir` that is as new is kept, with everything beside it.
///
/// # Errors
/// [`StoreError`]; it may be called again.
pub async fn restore(
    store: &dyn ObjectStore,
    bucket: &BucketName,
    study: &str,
    task_id: &str,
    instances: &[&str],
    run_dir: &Path,
) -> Result<Option<Restored>, StoreError> {
    let prefix = run_prefix(study, task_id)?;
    let there = read_manifest(store, bucket, &prefix).await?;
    if let Some(reason) = there.fault {
        return Err(StoreError::Integrity {
            object: format!("the manifest of {bucket}/{prefix}"),
            expected: "a manifest of this run".into(),
            found: reason,
        });
    }
    let Some(manifest) = there.manifest else { return Ok(None) };
    if !instances.contains(&manifest.instance.as_str()) {
        return Ok(None);
    }
    let mut restored = Restored {
        checkpoint: None,
        is_lost: false,
        is_local_newer: false,
        files: 0,
        bytes: 0,
        epoch: manifest.epoch,
        step: manifest.step,
        machine_id: manifest.machine_id.clone(),
        fence: manifest.fence,
        status: manifest.status.clone(),
        problems: Vec::new(),
    };
    let mut checkpoints: Vec<(u64, &ManifestFile)> =
        manifest.files.iter().filter_map(|file| Some((file.iteration()?, file))).collect();
    checkpoints.sort_by_key(|(iteration, _)| std::cmp::Reverse(*iteration));
    let here = newest_here(run_dir).await;
    let newest_there = checkpoints.first().map(|(iteration, _)| *iteration);
    if let Some((iteration, path)) = &here
        && newest_there.is_none_or(|there| *iteration >= there)
    {
        restored.checkpoint = Some(path.clone());
        restored.is_local_newer = true;
        return Ok(Some(restored));
    }
    let fetch = Fetch { store, bucket, run_dir };
    for file in manifest.files.iter().filter(|file| is_wanted(file)) {
        if let Err(error) = fetch.file(file, &mut restored).await {
            if error.is_outage() || matches!(error, StoreError::LocalFile { .. }) {
                return Err(error);
            }
            restored.problems.push(error.to_string());
        }
    }
    for (iteration, file) in checkpoints {
        if let Some((_, path)) = here.as_ref().filter(|(here, _)| *here >= iteration) {
            restored.checkpoint = Some(path.clone());
            break;
        }
        match fetch.file(file, &mut restored).await {
            Ok(path) => {
                restored.checkpoint = Some(path);
                break;
            }
            Err(error) if error.is_outage() || matches!(error, StoreError::LocalFile { .. }) => {
                return Err(error);
            }
            Err(error) => restored.problems.push(error.to_string()),
        }
    }
    if restored.checkpoint.is_none() {
        restored.checkpoint = here.map(|(_, path)| path);
        restored.is_lost = newest_there.is_some() && restored.checkpoint.is_none();
    }
    for problem in &restored.problems {
        tracing::warn!(task_id, problem, "a file of the run did not come back from the store");
    }
    Ok(Some(restored))
}

fn is_wanted(file: &ManifestFile) -> bool {
    match file.role {
        Role::Best | Role::Last | Role::Periodic => true,
        Role::Run => RUN_FILES.contains(&file.path.as_str()),
        Role::Checkpoint => false,
    }
}

/// True when a run folder has a checkpoint, by the names of its files. Blocks.
pub fn has_checkpoint(run_dir: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(run_dir.join("state")) else { return false };
    entries.flatten().any(|entry| entry.path().extension().is_some_and(|ending| ending == "ckpt"))
}

/// The newest checkpoint of a run folder that verifies.
async fn newest_here(run_dir: &Path) -> Option<(u64, PathBuf)> {
    let state = run_dir.join("state");
    let found = blocking(move || {
        let mut found: Vec<(u64, PathBuf)> = Vec::new();
        for entry in std::fs::read_dir(&state).into_iter().flatten().flatten() {
            let name = format!("state/{}", entry.file_name().to_string_lossy());
            if let Some(iteration) = checkpoint_iteration(&name) {
                found.push((iteration, entry.path()));
            }
        }
        found.sort_by(|a, b| b.cmp(a));
        Ok(found.into_iter().find(|(_, path)| super::archive::verifies(path)))
    });
    found.await.ok().flatten()
}

/// Fetches files into a run folder.
struct Fetch<'a> {
    store: &'a dyn ObjectStore,
    bucket: &'a BucketName,
    run_dir: &'a Path,
}

impl Fetch<'_> {
    async fn file(&self, file: &ManifestFile, restored: &mut Restored) -> Result<PathBuf, StoreError> {
        let path = self.run_dir.join(&file.path);
        let key = ObjectKey::new(&file.key)?;
        // What is here already is not fetched again.
        let here = path.clone();
        let local = blocking(move || LocalFile::open(&here, Content::InPlace)).await;
        if local.is_ok_and(|local| local.sha256 == file.sha256) {
            return Ok(path);
        }
        let fetched = match self.store.get_to_file(self.bucket, &key, &path, Some(&file.sha256)).await {
            // A delivery that wrote no manifest any more left a newer file, which is as good when it is whole.
            Err(error @ StoreError::Integrity { .. }) if file.role != Role::Checkpoint => {
                let head = self.store.head(self.bucket, &key).await?;
                match head.sha256.filter(|sha256| *sha256 != file.sha256) {
                    Some(sha256) => self.store.get_to_file(self.bucket, &key, &path, Some(&sha256)).await?,
                    None => return Err(error),
                }
            }
            fetched => fetched?,
        };
        restored.files += 1;
        restored.bytes += fetched.bytes;
        Ok(path)
    }
}
