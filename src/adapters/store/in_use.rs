//! The folder of a staged dataset is used or changed, never both at one time.
//!
//! Whoever trains on it holds its lock with others, for as long as the training lasts; whoever changes it holds the lock
//! alone. Locks are of the file system: they end with the process that holds them. A file for each user says who it is,
//! and is locked as well, so that one left by a process that died is known.

use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::StoreError;

/// The lock, in the folder of the dataset.
pub(super) const LOCK: &str = ".boxwright-lock";
/// Where users are named, in the folder of the dataset.
const USERS: &str = ".boxwright-users";
/// Users that an error names.
const NAMED_MAX: usize = 8;
/// Bytes read of a user's name.
const NAME_BYTES_MAX: usize = 200;
/// Longest wait for another process that fetches the same dataset.
const FETCH_LIMIT: Duration = Duration::from_secs(6 * 3600);
/// Longest wait for those that train on a dataset that has to be changed.
pub(super) const USE_LIMIT: Duration = Duration::from_secs(600);
/// Between two looks at a lock.
pub(super) const INTERVAL: Duration = Duration::from_millis(200);

/// A dataset stays as it is while this value lives.
#[derive(Debug)]
pub struct InUse {
    _lock: File,
    /// Says who it is; not there when it cannot be written, which only costs the name.
    _name: Option<File>,
    name_path: PathBuf,
}

impl Drop for InUse {
    fn drop(&mut self) {
        // One that stays is known by its lock, which is gone.
        let _ = fs::remove_file(&self.name_path);
    }
}

/// A dataset stays as it is while this value lives; nobody is told who wants it.
pub(super) struct Held {
    lock: File,
    folder: PathBuf,
}

impl Held {
    /// The same in the name of `user`, for as long as it is used.
    pub(super) fn named(self, user: &str) -> InUse {
        let name_path = self.folder.join(USERS).join(uuid::Uuid::new_v4().simple().to_string());
        InUse { _lock: self.lock, _name: write_name(&name_path, user), name_path }
    }
}

/// Keeps the dataset in `folder` from changes; `None` while it is being changed.
///
/// # Errors
/// Those of the file system.
pub(super) fn try_hold(folder: &Path) -> Result<Option<Held>, StoreError> {
    let (lock, path) = open(folder)?;
    Ok(taken(lock.try_lock_shared(), &path)?.then(|| Held { lock, folder: folder.to_owned() }))
}

/// The same, waiting while it is being changed, and whether that was so.
///
/// # Errors
/// [`StoreError::Timeout`] when that takes 6 hours; those of the file system.
pub(super) async fn hold(folder: &Path) -> Result<(Held, bool), StoreError> {
    let begun = Instant::now();
    let mut has_waited = false;
    loop {
        if let Some(held) = try_hold(folder)? {
            return Ok((held, has_waited));
        }
        has_waited = true;
        if begun.elapsed() > FETCH_LIMIT {
            let limit_ms = FETCH_LIMIT.as_millis() as u64;
            return Err(StoreError::Timeout { what: format!("lock {}", folder.display()), limit_ms });
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// The lock of a folder for whoever changes it; `None` while others use, change or look at it.
///
/// # Errors
/// Those of the file system.
pub(super) fn try_alone(folder: &Path) -> Result<Option<File>, StoreError> {
    let (lock, path) = open(folder)?;
    Ok(taken(lock.try_lock(), &path)?.then_some(lock))
}

fn open(folder: &Path) -> Result<(File, PathBuf), StoreError> {
    let path = folder.join(LOCK);
    fs::create_dir_all(folder).map_err(StoreError::local("make the folder", folder))?;
    // For reading too: some file systems give no shared lock otherwise.
    let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
    Ok((file.map_err(StoreError::local("open", &path))?, path))
}

fn taken(tried: Result<(), TryLockError>, path: &Path) -> Result<bool, StoreError> {
    match tried {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(StoreError::local("lock", path)(error)),
    }
}

fn write_name(path: &Path, user: &str) -> Option<File> {
    fs::create_dir_all(path.parent()?).ok()?;
    // Locked before others see it: one that is not is taken for a dead one's.
    let hidden = path.with_file_name(format!(".{}", path.file_name()?.to_str()?));
    let mut file = File::create_new(&hidden).ok()?;
    let is_written = file.try_lock().is_ok() && file.write_all(user.as_bytes()).is_ok();
    if !is_written || fs::rename(&hidden, path).is_err() {
        fs::remove_file(&hidden).ok();
        return None;
    }
    Some(file)
}

/// Who uses a folder, as far as they said so.
pub(super) fn users(folder: &Path) -> Vec<String> {
    let mut users = Vec::new();
    for entry in fs::read_dir(folder.join(USERS)).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        let Ok(file) = File::open(entry.path()) else { continue };
        match file.try_lock_shared() {
            // Left by a process that died.
            Ok(()) => drop(fs::remove_file(entry.path())),
            Err(_) if users.len() < NAMED_MAX => {
                let name = fs::read(entry.path()).unwrap_or_default();
                users.push(String::from_utf8_lossy(&name[..name.len().min(NAME_BYTES_MAX)]).into_owned());
            }
            Err(_) => {}
        }
    }
    users.sort();
    users
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_folder_that_is_used_is_not_changed_and_the_users_are_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let is_free = || try_alone(folder.path()).expect("a lock").is_some();
        let hold = async || hold(folder.path()).await.map(|(held, _)| held);
        let first = hold().await.expect("free").named("the job a");
        let second = hold().await.expect("shared").named("the job b");
        let third = hold().await.expect("shared");
        assert!(!is_free());
        assert_eq!(users(folder.path()), ["the job a", "the job b"], "who only looks is no user");
        drop((first, third));
        assert!(!is_free());
        assert_eq!(users(folder.path()), ["the job b"]);
        drop(second);
        fs::write(folder.path().join(USERS).join("left"), "a job that died").expect("written");
        let alone = try_alone(folder.path()).expect("a lock").expect("free");
        let waits = tokio::time::timeout(INTERVAL, hold()).await;
        assert!(waits.is_err(), "it is being changed");
        assert!(users(folder.path()).is_empty());
        drop(alone);
        hold().await.expect("free");
    }
}
