//! One service per state folder.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::adapters::process;

/// Held as long as this value lives; the system lets go when the process ends, however it ends.
#[derive(Debug)]
pub struct ProcessLock {
    _file: File,
}

/// Why the lock is not ours.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("another boxwright service{} already uses the state folder {state_dir}", holder(*pid))]
    Held {
        /// The folder.
        state_dir: PathBuf,
        /// Its process number, when it could be read.
        pid: Option<u32>,
    },
    /// The file system refused.
    #[error("cannot lock {path}{}", owner(path, source))]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or(String::new(), |pid| format!(" (process {pid})"))
}

fn owner(path: &Path, source: &std::io::Error) -> String {
    let is_denied = source.kind() == std::io::ErrorKind::PermissionDenied;
    if is_denied { process::foreign_owner(path) } else { String::new() }
}

impl ProcessLock {
    /// Takes the lock of a state folder, making the folder when needed.
    ///
    /// # Errors
    /// [`LockError::Held`] when another process has it.
    pub fn acquire(state_dir: &Path) -> Result<Self, LockError> {
        let path = state_dir.join("lock");
        let failed = |source| LockError::Io { path: path.clone(), source };
        std::fs::create_dir_all(state_dir).map_err(failed)?;
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                let mut text = String::new();
                let pid = file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
                return Err(LockError::Held { state_dir: state_dir.to_owned(), pid });
            }
            Err(std::fs::TryLockError::Error(source)) => return Err(failed(source)),
        }
        // The number is for messages only, so a full disk is no reason to stay down.
        let _ = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| write!(file, "{}", std::process::id()));
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_has_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = ProcessLock::acquire(folder.path()).expect("free");
        let error = ProcessLock::acquire(folder.path()).expect_err("taken").to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        drop(first);
        ProcessLock::acquire(folder.path()).expect("free again");
    }
}
