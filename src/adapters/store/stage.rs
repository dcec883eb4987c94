//! Datasets in the store are brought to a folder of this machine: complete, or not used.
//!
//! `s3://bucket/prefix[/data.yaml]` lies in `{datasets_dir}/{bucket}/{prefix}`. Beside the files, `.boxwright-staged.jsonl`
//! tells what was fetched (one line each, so that an interrupted fetch goes on), and `.boxwright-complete` the fingerprint of
//! the objects that the folder is complete for. Files that the store no longer has are removed; others are left alone.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::{FutureExt, StreamExt, stream};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::StoreError;
use super::local::write_whole;
use super::names::fault_of_path;
use super::{BucketName, ObjectEntry, ObjectKey, ObjectStore, blocking, hex};

const SCHEME: &str = "s3://";
const JOURNAL: &str = ".boxwright-staged.jsonl";
const COMPLETE: &str = ".boxwright-complete";
const LOCK: &str = ".boxwright-lock";
/// Objects of a dataset.
const OBJECTS_MAX: usize = 2_000_000;
/// Objects fetched at one time.
const PARALLEL: usize = 8;
/// Longest wait for another process that stages the same dataset.
const LOCK_LIMIT: Duration = Duration::from_secs(6 * 3600);
/// Between two looks at its lock.
const LOCK_INTERVAL: Duration = Duration::from_millis(200);

/// A dataset in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetRef {
    /// Its bucket.
    pub bucket: BucketName,
    /// The folder in it.
    pub prefix: ObjectKey,
    /// The dataset file inside the folder, when it was named.
    pub file: Option<String>,
}

/// A dataset that is complete on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staged {
    /// What `train.data` becomes: the dataset file when it was named, else the folder.
    pub path: PathBuf,
    /// The folder.
    pub folder: PathBuf,
    /// What tells this content from another.
    pub fingerprint: String,
    /// Files of it.
    pub files: usize,
    /// Files fetched now.
    pub fetched: usize,
    /// Their bytes.
    pub bytes_fetched: u64,
    /// Files removed because the store does not have them any more.
    pub removed: usize,
    /// False when the store could not be asked and an earlier complete copy is used.
    pub is_current: bool,
}

/// Reads `s3://bucket/prefix[/data.yaml]`; `None` for anything that is no such address.
///
/// # Errors
/// [`StoreError::Name`] for one that names no folder.
pub fn dataset_ref(data: &str) -> Result<Option<DatasetRef>, StoreError> {
    let Some(rest) = data.strip_prefix(SCHEME) else { return Ok(None) };
    let fault = |reason| StoreError::Name { what: "address", name: data.to_owned(), reason };
    let (bucket, path) = rest.split_once('/').ok_or_else(|| fault("a dataset is s3://bucket/folder"))?;
    let path = path.trim_end_matches('/');
    let is_file = [".yaml", ".yml"].iter().any(|end| path.ends_with(end));
    let (prefix, file) = match (is_file, path.rsplit_once('/')) {
        (true, Some((prefix, file))) => (prefix, Some(file.to_owned())),
        (true, None) => return Err(fault("the dataset file lies in a folder: s3://bucket/folder/data.yaml")),
        (false, _) => (path, None),
    };
    Ok(Some(DatasetRef { bucket: BucketName::new(bucket)?, prefix: ObjectKey::new(prefix)?, file }))
}

/// Brings a dataset to `datasets_dir`, fetching only what is not there yet.
///
/// When the store cannot be asked, an earlier copy that is complete is used. May be called again after any failure; goes
/// on where it was.
///
/// # Errors
/// [`StoreError::Missing`] when the store has no such folder or file; others.
pub async fn stage(
    store: &dyn ObjectStore,
    datasets_dir: &Path,
    dataset: &DatasetRef,
) -> Result<Staged, StoreError> {
    let folder = datasets_dir.join(dataset.bucket.as_str()).join(dataset.prefix.as_str());
    let _lock = lock(&folder).await?;
    let prefix = format!("{}/", dataset.prefix);
    let entries = match store.list(&dataset.bucket, &prefix, OBJECTS_MAX).await {
        Ok(entries) => entries,
        Err(error) if error.is_outage() => return kept(folder, dataset).await.ok_or(error),
        Err(error) => return Err(error),
    };
    let object = || format!("{}/{}", dataset.bucket, dataset.prefix);
    let wanted: BTreeMap<String, ObjectEntry> = entries
        .into_iter()
        .filter_map(|entry| Some((inside(entry.key.as_str().strip_prefix(&prefix)?)?, entry)))
        .collect();
    if wanted.is_empty() {
        return Err(StoreError::Missing { object: object() });
    }
    if let Some(file) = dataset.file.as_ref().filter(|file| !wanted.contains_key(*file)) {
        return Err(StoreError::Missing { object: format!("{}/{file}", object()) });
    }
    let fingerprint = fingerprint(&wanted);
    let plan = {
        let (folder, wanted) = (folder.clone(), wanted.clone());
        let fingerprint = fingerprint.clone();
        blocking(move || plan(&folder, &wanted, &fingerprint)).await?
    };
    let fetched = plan.missing.len();
    let bytes_fetched = plan.missing.iter().map(|(_, entry)| entry.bytes).sum();
    if !plan.is_complete {
        fetch(store, dataset, &folder, plan.missing).await?;
        let (folder, wanted) = (folder.clone(), wanted.clone());
        let fingerprint = fingerprint.clone();
        blocking(move || finish(&folder, &wanted, &fingerprint)).await?;
    }
    Ok(Staged {
        path: dataset.file.as_ref().map_or_else(|| folder.clone(), |file| folder.join(file)),
        folder,
        fingerprint,
        files: wanted.len(),
        fetched,
        bytes_fetched,
        removed: plan.removed,
        is_current: true,
    })
}

/// The path of an object inside the folder; `None` for our own files and for what is no good path.
fn inside(path: &str) -> Option<String> {
    let is_ours =
        path.split('/').any(|part| part.starts_with(".boxwright-") || part.starts_with(".arriving-"));
    (fault_of_path(path).is_none() && !is_ours).then(|| path.to_owned())
}

fn fingerprint(wanted: &BTreeMap<String, ObjectEntry>) -> String {
    let mut hash = Sha256::new();
    for (path, entry) in wanted {
        hash.update(format!("{path}\0{}\0{}\n", entry.bytes, entry.etag));
    }
    hex(&hash.finalize())
}

/// A file that was fetched.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Line {
    path: String,
    bytes: u64,
    etag: String,
}

/// What is there, by the journal; a line that was cut off is none.
fn journal(folder: &Path) -> BTreeMap<String, Line> {
    let text = fs::read_to_string(folder.join(JOURNAL)).unwrap_or_default();
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok());
    let lines = lines.filter(|line| inside(&line.path).is_some());
    lines.map(|line| (line.path.clone(), line)).collect()
}

/// What there is to do.
struct Plan {
    is_complete: bool,
    missing: Vec<(String, ObjectEntry)>,
    removed: usize,
}

/// Looks at the folder, and removes what the store no longer has.
fn plan(
    folder: &Path,
    wanted: &BTreeMap<String, ObjectEntry>,
    fingerprint: &str,
) -> Result<Plan, StoreError> {
    let there = journal(folder);
    let is_here = |path: &String, entry: &ObjectEntry| {
        let line = there.get(path).is_some_and(|line| line.bytes == entry.bytes && line.etag == entry.etag);
        let size =
            || fs::symlink_metadata(folder.join(path)).ok().filter(fs::Metadata::is_file).map(|m| m.len());
        line && size() == Some(entry.bytes)
    };
    let missing: Vec<(String, ObjectEntry)> = wanted
        .iter()
        .filter(|(path, entry)| !is_here(path, entry))
        .map(|(path, entry)| (path.clone(), entry.clone()))
        .collect();
    let mark = fs::read_to_string(folder.join(COMPLETE)).unwrap_or_default();
    if missing.is_empty() && mark.trim() == fingerprint {
        return Ok(Plan { is_complete: true, missing, removed: 0 });
    }
    // From here on the folder is not what the mark says.
    remove(&folder.join(COMPLETE))?;
    let mut removed = 0;
    for path in there.keys().filter(|path| !wanted.contains_key(*path)) {
        remove(&folder.join(path))?;
        removed += 1;
        for parent in folder.join(path).ancestors().skip(1).take_while(|parent| *parent != folder) {
            if fs::remove_dir(parent).is_err() {
                break;
            }
        }
    }
    Ok(Plan { is_complete: false, missing, removed })
}

fn remove(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(StoreError::local("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Fetches what is missing, several at one time, and notes each in the journal.
async fn fetch(
    store: &dyn ObjectStore,
    dataset: &DatasetRef,
    folder: &Path,
    missing: Vec<(String, ObjectEntry)>,
) -> Result<(), StoreError> {
    let journal_path = folder.join(JOURNAL);
    let journal = OpenOptions::new().create(true).append(true).open(&journal_path);
    let journal = journal.map_err(StoreError::local("open", &journal_path))?;
    let journal = Arc::new(Mutex::new(journal));
    let fetches = stream::iter(missing).map(|(path, entry)| {
        let journal = journal.clone();
        async move {
            let target = folder.join(&path);
            let head = store.get_to_file(&dataset.bucket, &entry.key, &target, None).await?;
            if head.bytes != entry.bytes {
                // It was replaced since the list was made; the next try sees it.
                return Err(StoreError::Integrity {
                    object: format!("{}/{}", dataset.bucket, entry.key),
                    expected: format!("{} bytes", entry.bytes),
                    found: format!("{} bytes", head.bytes),
                });
            }
            note(&journal, folder, Line { path, bytes: entry.bytes, etag: entry.etag })
        }
        .boxed()
    });
    let mut fetches = std::pin::pin!(fetches.buffer_unordered(PARALLEL));
    while let Some(fetched) = fetches.next().await {
        fetched?;
    }
    Ok(())
}

fn note(journal: &Mutex<File>, folder: &Path, line: Line) -> Result<(), StoreError> {
    let path = folder.join(JOURNAL);
    let written = serde_json::to_string(&line).map_err(std::io::Error::other).and_then(|text| {
        let mut journal = journal.lock().map_err(|_| std::io::Error::other("a writer panicked"))?;
        journal.write_all(format!("\n{text}").as_bytes())
    });
    written.map_err(StoreError::local("write", &path))
}

/// Writes the journal anew, without what was before, and then the mark.
fn finish(
    folder: &Path,
    wanted: &BTreeMap<String, ObjectEntry>,
    fingerprint: &str,
) -> Result<(), StoreError> {
    let mut text = String::new();
    for (path, entry) in wanted {
        let line = Line { path: path.clone(), bytes: entry.bytes, etag: entry.etag.clone() };
        let line = serde_json::to_string(&line).map_err(std::io::Error::other);
        text.push_str(&line.map_err(StoreError::local("write", &folder.join(JOURNAL)))?);
        text.push('\n');
    }
    write_whole(&folder.join(JOURNAL), text.as_bytes())?;
    write_whole(&folder.join(COMPLETE), format!("{fingerprint}\n").as_bytes())
}

/// A copy of an earlier time that is complete.
async fn kept(folder: PathBuf, dataset: &DatasetRef) -> Option<Staged> {
    let file = dataset.file.clone();
    let kept = blocking(move || {
        let fingerprint = fs::read_to_string(folder.join(COMPLETE)).unwrap_or_default().trim().to_owned();
        let there = journal(&folder);
        let path = file.map_or_else(|| folder.clone(), |file| folder.join(file));
        let is_whole = there.values().all(|line| {
            fs::symlink_metadata(folder.join(&line.path)).is_ok_and(|metadata| metadata.len() == line.bytes)
        });
        let is_usable = !fingerprint.is_empty() && !there.is_empty() && is_whole && path.exists();
        Ok(is_usable.then_some(Staged {
            path,
            folder,
            fingerprint,
            files: there.len(),
            fetched: 0,
            bytes_fetched: 0,
            removed: 0,
            is_current: false,
        }))
    });
    let kept = kept.await.ok().flatten();
    if let Some(staged) = &kept {
        tracing::warn!(folder = %staged.folder.display(), "the store cannot be asked; the dataset of an earlier time is used");
    }
    kept
}

/// Waits until no other process stages this dataset.
async fn lock(folder: &Path) -> Result<File, StoreError> {
    let path = folder.join(LOCK);
    fs::create_dir_all(folder).map_err(StoreError::local("make the folder", folder))?;
    let file = File::options().write(true).create(true).truncate(false).open(&path);
    let file = file.map_err(StoreError::local("open", &path))?;
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::Error(error)) => return Err(StoreError::local("lock", &path)(error)),
            Err(fs::TryLockError::WouldBlock) if begun.elapsed() > LOCK_LIMIT => {
                let limit_ms = LOCK_LIMIT.as_millis() as u64;
                return Err(StoreError::Timeout { what: format!("lock {}", path.display()), limit_ms });
            }
            Err(fs::TryLockError::WouldBlock) => tokio::time::sleep(LOCK_INTERVAL).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let read = |data: &str| {
            dataset_ref(data).map(|found| {
                found.map(|found| (found.bucket.to_string(), found.prefix.to_string(), found.file))
            })
        };
        let some = |b: &str, p: &str, f: Option<&str>| Some((b.into(), p.into(), f.map(str::to_owned)));
        assert_eq!(read("s3://datasets/a/b").expect("good"), some("datasets", "a/b", None));
        assert_eq!(read("s3://datasets/a/").expect("good"), some("datasets", "a", None));
        assert_eq!(read("s3://datasets/a/x.yaml").expect("good"), some("datasets", "a", Some("x.yaml")));
        assert_eq!(read("/data/a.yaml").expect("good"), None);
        for bad in
            ["s3://datasets", "s3://datasets/", "s3://datasets/x.yaml", "s3://B/a", "s3://datasets/../a"]
        {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert_eq!(inside("a/.boxwright-lock"), None);
        assert_eq!(inside("../a"), None);
    }
}
