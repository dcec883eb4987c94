//! Datasets in the store are brought to a folder of this machine: complete, or not used.
//!
//! `s3://bucket/prefix[/data.yaml]` lies in `{datasets_dir}/{bucket}/{prefix}`, and in `{datasets_dir}/.copies/{n}/..` where jobs
//! train on another state of it. Beside the files, `.boxwright-staged.jsonl`
//! tells what was fetched (one line each, so that an interrupted fetch goes on), and `.boxwright-complete` the fingerprint of
//! the objects that the folder is complete for. Files that the store no longer has are removed; others are left alone.
//! Nothing changes while somebody trains on it ([`InUse`]).

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
use super::in_use::{INTERVAL, LOCK, USE_LIMIT, hold, try_alone, try_hold, users};
use super::local::write_whole;
use super::names::fault_of_path;
use super::{BucketName, ObjectEntry, ObjectKey, ObjectStore, Refused, blocking, hex};
use crate::adapters::telemetry::disk;

pub use super::in_use::InUse;

const SCHEME: &str = "s3://";
const JOURNAL: &str = ".boxwright-staged.jsonl";
const COMPLETE: &str = ".boxwright-complete";
/// Beside the buckets, whose names begin with no dot.
const COPIES: &str = ".copies";
/// States of one dataset that jobs may use at one time.
const COPIES_MAX: u32 = 4;
/// How files begin that have not arrived yet.
const ARRIVING: &str = ".arriving-";
/// Objects of a dataset.
const OBJECTS_MAX: usize = 2_000_000;
/// Objects fetched at one time.
const PARALLEL: usize = 8;
/// A dataset is brought up to date so often while others change it again.
const CHANGES_MAX: u32 = 5;
/// Whoever looks at a folder lets go of it at once: after so long it is somebody who uses it.
const UNNAMED_LIMIT: Duration = Duration::from_secs(60);
/// What the store has is believed for so long.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// Bytes of the file system that a fetch leaves free: the journal may lie there, too.
const RESERVE_BYTES: u64 = 512 << 20;

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

/// Brings a dataset to `datasets_dir`, fetching only what is not there yet. It stays as it is while the second value
/// lives; `user` is named to others that wait to change it.
///
/// Where others train on another state of it, a copy beside theirs is made. When the store cannot be asked, an earlier copy
/// that is complete is used. May be called again after any failure; goes on where it was.
///
/// # Errors
/// [`StoreError::Missing`] when the store has no such folder or file, [`StoreError::Name`] when it has a file there that
/// cannot be staged, [`StoreError::NoRoom`], [`StoreError::InUse`] when others use as many states as there may be copies;
/// others.
pub async fn stage(
    store: &dyn ObjectStore,
    datasets_dir: &Path,
    dataset: &DatasetRef,
    user: &str,
) -> Result<(Staged, InUse), StoreError> {
    let at = |root: &Path| root.join(dataset.bucket.as_str()).join(dataset.prefix.as_str());
    let copies = (1..COPIES_MAX).map(|number| at(&datasets_dir.join(COPIES).join(number.to_string())));
    let folders: Vec<PathBuf> = std::iter::once(at(datasets_dir)).chain(copies).collect();
    let staging = Staging { store, dataset, user };
    let wanted = match look(store, dataset).await {
        Err(error) if error.is_outage() => return staging.keep(&folders[0]).await?.ok_or(error),
        wanted => wanted?,
    };
    // A state that is here whole is used where it lies.
    for folder in folders.iter().filter(|folder| folder.exists()) {
        if let Some(held) = try_hold(folder)?
            && let Some(staged) = staging.complete(folder, &wanted, Done::default()).await?
        {
            return Ok((staged, held.named(user)));
        }
    }
    for (number, folder) in folders.iter().enumerate() {
        match staging.bring_to(folder, Duration::ZERO).await {
            Err(StoreError::InUse { .. }) => {}
            // There may be when the others have ended.
            Err(StoreError::NoRoom { .. }) if number > 0 => break,
            outcome => return outcome,
        }
    }
    staging.bring_to(&folders[0], USE_LIMIT).await
}

/// A dataset on its way to somebody.
struct Staging<'a> {
    store: &'a dyn ObjectStore,
    dataset: &'a DatasetRef,
    user: &'a str,
}

impl Staging<'_> {
    /// Brings it to this folder. Whoever uses another state of it there is waited for.
    async fn bring_to(&self, folder: &Path, use_limit: Duration) -> Result<(Staged, InUse), StoreError> {
        let mut known: Option<(Instant, Arc<Wanted>)> = None;
        let mut blocked_since: Option<Instant> = None;
        let mut done = Done::default();
        let mut changes = 0;
        // Each turn ends with a pause or a change; both are limited.
        loop {
            let (looked, wanted) = match known.take().filter(|(looked, _)| looked.elapsed() < LOOK_AGAIN) {
                Some(known) => known,
                None => match look(self.store, self.dataset).await {
                    Err(error) if error.is_outage() => return self.keep(folder).await?.ok_or(error),
                    wanted => (Instant::now(), wanted?),
                },
            };
            let (held, has_waited) = hold(folder).await?;
            if has_waited {
                // It was changed meanwhile, by whoever brings what is wanted here, say.
                blocked_since = None;
            }
            if let Some(staged) = self.complete(folder, &wanted, done).await? {
                return Ok((staged, held.named(self.user)));
            }
            drop(held);
            if let Some(_alone) = try_alone(folder)? {
                if changes >= CHANGES_MAX {
                    let object = format!("the dataset in {}", folder.display());
                    return Err(StoreError::Busy { object });
                }
                changes += 1;
                done.add(bring(self.store, self.dataset, folder, &wanted).await?);
                // Between the two locks another process may change it again.
                known = Some((looked, wanted));
                continue;
            }
            let is_news = blocked_since.is_none();
            let waited = blocked_since.get_or_insert_with(Instant::now).elapsed();
            let mut users = users(folder);
            if users.is_empty() {
                if waited < UNNAMED_LIMIT {
                    // Others look at it, as this does.
                    known = Some((looked, wanted));
                    tokio::time::sleep(INTERVAL).await;
                    continue;
                }
                users.push("a job that could not write its name".to_owned());
            }
            let users = users.join(", ");
            if waited >= use_limit {
                let waited_ms = waited.as_millis() as u64;
                return Err(StoreError::InUse { folder: folder.to_owned(), users, waited_ms });
            }
            if is_news {
                tracing::info!(folder = %folder.display(), users, "waits to bring a dataset up to date");
            }
            known = Some((looked, wanted));
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// What lies in a folder that is held, when it is what is wanted.
    async fn complete(
        &self,
        folder: &Path,
        wanted: &Arc<Wanted>,
        done: Done,
    ) -> Result<Option<Staged>, StoreError> {
        let (at, of) = (folder.to_owned(), wanted.clone());
        if !blocking(move || Ok(is_complete(&at, &of))).await? {
            return Ok(None);
        }
        let file = self.dataset.file.as_ref();
        let Done { fetched, bytes_fetched, removed } = done;
        Ok(Some(Staged {
            path: file.map_or_else(|| folder.to_owned(), |file| folder.join(file)),
            folder: folder.to_owned(),
            fingerprint: wanted.fingerprint.clone(),
            files: wanted.files.len(),
            fetched,
            bytes_fetched,
            removed,
            is_current: true,
        }))
    }

    /// A copy of an earlier time that is complete.
    async fn keep(&self, folder: &Path) -> Result<Option<(Staged, InUse)>, StoreError> {
        let (held, _) = hold(folder).await?;
        let kept = kept(folder.to_owned(), self.dataset).await;
        Ok(kept.map(|staged| (staged, held.named(self.user))))
    }
}

/// What was done to a folder.
#[derive(Default, Clone, Copy)]
struct Done {
    fetched: usize,
    bytes_fetched: u64,
    removed: usize,
}

impl Done {
    fn add(&mut self, more: Done) {
        self.fetched += more.fetched;
        self.bytes_fetched += more.bytes_fetched;
        self.removed += more.removed;
    }
}

/// The files of a dataset as the store has them.
struct Wanted {
    files: BTreeMap<String, ObjectEntry>,
    fingerprint: String,
}

/// Looks at what the store has. A file that cannot be staged is an error: without it the dataset would be another one.
async fn look(store: &dyn ObjectStore, dataset: &DatasetRef) -> Result<Arc<Wanted>, StoreError> {
    let prefix = format!("{}/", dataset.prefix);
    let listed = store.list(&dataset.bucket, &prefix, OBJECTS_MAX).await?;
    if let Some(Refused { name, reason }) = listed.refused {
        return Err(StoreError::Name { what: "file", name: format!("{}/{name}", dataset.bucket), reason });
    }
    let object = || format!("{}/{}", dataset.bucket, dataset.prefix);
    let entries = listed.entries.into_iter();
    let files: BTreeMap<String, ObjectEntry> = entries
        .filter_map(|entry| Some((inside(entry.key.as_str().strip_prefix(&prefix)?)?, entry)))
        .collect();
    if files.is_empty() {
        return Err(StoreError::Missing { object: object() });
    }
    if let Some(file) = dataset.file.as_ref().filter(|file| !files.contains_key(*file)) {
        return Err(StoreError::Missing { object: format!("{}/{file}", object()) });
    }
    let fingerprint = fingerprint(&files);
    Ok(Arc::new(Wanted { files, fingerprint }))
}

/// Makes the folder what the store has. The folder is locked for this alone.
async fn bring(
    store: &dyn ObjectStore,
    dataset: &DatasetRef,
    folder: &Path,
    wanted: &Arc<Wanted>,
) -> Result<Done, StoreError> {
    let (at, of) = (folder.to_owned(), wanted.clone());
    let plan = blocking(move || plan(&at, &of)).await?;
    let Plan { is_complete: false, missing, removed } = plan else { return Ok(Done::default()) };
    let fetched = missing.len();
    let bytes_fetched = missing.iter().map(|(_, entry)| entry.bytes).sum();
    fetch(store, dataset, folder, missing).await?;
    let (at, of) = (folder.to_owned(), wanted.clone());
    blocking(move || finish(&at, &of)).await?;
    Ok(Done { fetched, bytes_fetched, removed })
}

/// Removes what fetches that were killed left behind. Nobody else writes here.
fn sweep(folder: &Path) -> Result<(), StoreError> {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(StoreError::local("read", &folder))?.flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                // A dataset inside this one has a lock of its own.
                if !entry.path().join(LOCK).exists() {
                    folders.push(entry.path());
                }
            } else if entry.file_name().to_string_lossy().starts_with(ARRIVING) {
                remove(&entry.path())?;
            }
        }
    }
    Ok(())
}

/// Bytes that a fetch needs at most: a file that is replaced goes when the new one is there, and so many arrive at one time.
fn needed_bytes(folder: &Path, missing: &[(String, ObjectEntry)]) -> u64 {
    let more = missing.iter().map(|(path, entry)| entry.bytes.saturating_sub(size_of(&folder.join(path))));
    let mut sizes: Vec<u64> = missing.iter().map(|(_, entry)| entry.bytes).collect();
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    let arriving: u64 = sizes.iter().take(PARALLEL).sum();
    let whole: u64 = sizes.iter().sum();
    more.sum::<u64>().saturating_add(arriving).min(whole)
}

fn size_of(path: &Path) -> u64 {
    fs::symlink_metadata(path).map_or(0, |metadata| metadata.len())
}

/// Looks whether there is room, before anything is changed.
fn check_room(folder: &Path, needed_bytes: u64) -> Result<(), StoreError> {
    // A file system that does not say fails when it is full.
    let free_bytes = disk(folder).map_or(u64::MAX, |disk| disk.available_bytes);
    if needed_bytes == 0 || needed_bytes.saturating_add(RESERVE_BYTES) <= free_bytes {
        return Ok(());
    }
    let folder = folder.to_owned();
    Err(StoreError::NoRoom { folder, needed_bytes, reserve_bytes: RESERVE_BYTES, free_bytes })
}

/// The path of an object inside the folder; `None` for our own files and for what is no good path.
fn inside(path: &str) -> Option<String> {
    let is_ours = path.split('/').any(|part| part.starts_with(".boxwright-") || part.starts_with(ARRIVING));
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

/// What of the dataset is not in the folder yet, by the journal and the sizes of the files.
fn missing(folder: &Path, there: &BTreeMap<String, Line>, wanted: &Wanted) -> Vec<(String, ObjectEntry)> {
    let is_here = |path: &String, entry: &ObjectEntry| {
        let line = there.get(path).is_some_and(|line| line.bytes == entry.bytes && line.etag == entry.etag);
        let size =
            || fs::symlink_metadata(folder.join(path)).ok().filter(fs::Metadata::is_file).map(|m| m.len());
        line && size() == Some(entry.bytes)
    };
    let missing = wanted.files.iter().filter(|(path, entry)| !is_here(path, entry));
    missing.map(|(path, entry)| (path.clone(), entry.clone())).collect()
}

fn is_marked(folder: &Path, wanted: &Wanted) -> bool {
    fs::read_to_string(folder.join(COMPLETE)).is_ok_and(|mark| mark.trim() == wanted.fingerprint)
}

fn is_complete(folder: &Path, wanted: &Wanted) -> bool {
    is_marked(folder, wanted) && missing(folder, &journal(folder), wanted).is_empty()
}

/// Looks at the folder, and removes what the store no longer has.
fn plan(folder: &Path, wanted: &Wanted) -> Result<Plan, StoreError> {
    let there = journal(folder);
    let missing = missing(folder, &there, wanted);
    if missing.is_empty() && is_marked(folder, wanted) {
        return Ok(Plan { is_complete: true, missing, removed: 0 });
    }
    sweep(folder)?;
    let gone = there.iter().filter(|(path, _)| !wanted.files.contains_key(*path));
    let freed_bytes: u64 = gone.map(|(path, _)| size_of(&folder.join(path))).sum();
    check_room(folder, needed_bytes(folder, &missing).saturating_sub(freed_bytes))?;
    // From here on the folder is not what the mark says.
    remove(&folder.join(COMPLETE))?;
    let mut removed = 0;
    for path in there.keys().filter(|path| !wanted.files.contains_key(*path)) {
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
fn finish(folder: &Path, wanted: &Wanted) -> Result<(), StoreError> {
    let mut text = String::new();
    for (path, entry) in &wanted.files {
        let line = Line { path: path.clone(), bytes: entry.bytes, etag: entry.etag.clone() };
        let line = serde_json::to_string(&line).map_err(std::io::Error::other);
        text.push_str(&line.map_err(StoreError::local("write", &folder.join(JOURNAL)))?);
        text.push('\n');
    }
    write_whole(&folder.join(JOURNAL), text.as_bytes())?;
    write_whole(&folder.join(COMPLETE), format!("{}\n", wanted.fingerprint).as_bytes())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_replaced_makes_room() {
        let folder = tempfile::tempdir().expect("a folder");
        let entry = |name: &str, bytes| {
            let key = ObjectKey::new(format!("cells/{name}")).expect("a key");
            (name.to_owned(), ObjectEntry { key, bytes, etag: "e".into() })
        };
        let mut files: Vec<_> = (0..100).map(|number| entry(&format!("{number}.jpg"), 10)).collect();
        assert_eq!(needed_bytes(folder.path(), &files), 1000);
        for (name, _) in &files {
            fs::write(folder.path().join(name), [0; 10]).expect("written");
        }
        assert_eq!(needed_bytes(folder.path(), &files), 80, "those that arrive at one time");
        files.truncate(1);
        assert_eq!(needed_bytes(folder.path(), &files), 10);
    }

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
