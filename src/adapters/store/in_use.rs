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
const LOCK: &str = ".boxwright-lock";
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
const INTERVAL: Duration = Duration::from_millis(200);

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

/// Keeps the dataset in `folder` from changes, in the name of `user`. Waits while it is being changed.
///
/// # Errors
/// [`StoreError::Timeout`] when that takes 6 hours; those of the file system.
pub(super) async fn hold(folder: &Path, user: &str) -> Result<InUse, StoreError> {
    let (lock, path) = open(folder)?;
    let begun = Instant::now();
    while !taken(lock.try_lock_shared(), &path)? {
        check_fetch_limit(begun, &path)?;
        tokio::time::sleep(INTERVAL).await;
    }
    let name_path = folder.join(USERS).join(uuid::Uuid::new_v4().simple().to_string());
    Ok(InUse { _lock: lock, _name: write_name(&name_path, user), name_path })
}

/// The lock of a folder for whoever changes it, and whether it was waited for.
///
/// # Errors
/// [`StoreError::InUse`] when others use the folder for longer than `use_limit`, [`StoreError::Timeout`] when another
/// process changes it for 6 hours; those of the file system.
pub(super) async fn hold_alone(folder: &Path, use_limit: Duration) -> Result<(File, bool), StoreError> {
    let (lock, path) = open(folder)?;
    let begun = Instant::now();
    let mut has_waited = false;
    while !taken(lock.try_lock(), &path)? {
        if !has_waited {
            has_waited = true;
            tracing::info!(folder = %folder.display(), users = users(folder).join(", "), "waits to bring a dataset up to date");
        }
        if begun.elapsed() > use_limit {
            let users = users(folder);
            if !users.is_empty() {
                let waited_ms = begun.elapsed().as_millis() as u64;
                return Err(StoreError::InUse {
                    folder: folder.to_owned(),
                    users: users.join(", "),
                    waited_ms,
                });
            }
        }
        check_fetch_limit(begun, &path)?;
        tokio::time::sleep(INTERVAL).await;
    }
    Ok((lock, has_waited))
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

fn check_fetch_limit(begun: Instant, path: &Path) -> Result<(), StoreError> {
    if begun.elapsed() <= FETCH_LIMIT {
        return Ok(());
    }
    let limit_ms = FETCH_LIMIT.as_millis() as u64;
    Err(StoreError::Timeout { what: format!("lock {}", path.display()), limit_ms })
}

fn write_name(path: &Path, user: &str) -> Option<File> {
    fs::create_dir_all(path.parent()?).ok()?;
    let mut file = File::create_new(path).ok()?;
    file.try_lock().ok()?;
    file.write_all(user.as_bytes()).ok()?;
    Some(file)
}

/// Who uses a folder, as far as they said so.
fn users(folder: &Path) -> Vec<String> {
    let mut users = Vec::new();
    for entry in fs::read_dir(folder.join(USERS)).into_iter().flatten().flatten() {
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
        let alone = || hold_alone(folder.path(), Duration::ZERO);
        let first = hold(folder.path(), "the job a").await.expect("free");
        let second = hold(folder.path(), "the job b").await.expect("shared");
        let error = alone().await.expect_err("in use");
        assert!(
            matches!(&error, StoreError::InUse { users, .. } if users == "the job a, the job b"),
            "{error}"
        );
        drop(first);
        let error = alone().await.expect_err("in use");
        assert!(error.to_string().contains("used by the job b"), "{error}");
        drop(second);
        fs::write(folder.path().join(USERS).join("left"), "a job that died").expect("written");
        let (lock, has_waited) = alone().await.expect("free");
        assert!(!has_waited);
        let waits = tokio::time::timeout(INTERVAL, hold(folder.path(), "c")).await;
        assert!(waits.is_err(), "it is being changed");
        assert!(users(folder.path()).is_empty());
        drop(lock);
        hold(folder.path(), "c").await.expect("free");
    }
}
