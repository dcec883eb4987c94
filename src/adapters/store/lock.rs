//! Locks between the writers of one folder, on this machine and on others that mount it.

use std::fs::{self, File, TryLockError};
use std::io::{Error, ErrorKind};
use std::path::Path;
use std::sync::Once;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::folder::fault;
use super::{BucketName, ObjectKey, StoreError};

/// Where locks lie, below the folder. No bucket has such a name.
const LOCKS: &str = ".locks";
/// Files of locks; one stands for many keys.
const LOCKS_MAX: u8 = 64;
/// A lock is asked for so often, [`PAUSE`] apart: whoever has one holds it for one small object.
const TRIES_MAX: u32 = 1_000;
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(10);

/// Missing locks are said once.
static SAID: Once = Once::new();

/// The lock of a key, let go with the value or with the process. `None` on a file system that has no locks. Blocks.
///
/// # Errors
/// [`StoreError::Unavailable`] when others hold it for 10 s; those of the file system.
pub(super) fn lock_key(
    root: &Path,
    bucket: &BucketName,
    key: &ObjectKey,
) -> Result<Option<File>, StoreError> {
    let folder = root.join(LOCKS);
    fs::create_dir_all(&folder).map_err(fault("make", &folder))?;
    let number = Sha256::digest(format!("{bucket}/{key}"))[0] % LOCKS_MAX;
    let path = folder.join(number.to_string());
    let opened = File::options().create(true).truncate(false).write(true).open(&path);
    let file = opened.map_err(fault("open", &path))?;
    for _ in 0..TRIES_MAX {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::WouldBlock) => std::thread::sleep(PAUSE),
            Err(TryLockError::Error(error)) if has_no_locks(&error) => {
                SAID.call_once(|| {
                    let folder = root.display();
                    tracing::warn!(%folder, %error, "the store's file system has no locks: manifests are guarded by a look only");
                });
                return Ok(None);
            }
            Err(TryLockError::Error(error)) => return Err(fault("lock", &path)(error)),
        }
    }
    Err(StoreError::Unavailable { what: format!("lock {}", path.display()), source: None })
}

fn has_no_locks(error: &Error) -> bool {
    error.kind() == ErrorKind::Unsupported || error.raw_os_error() == Some(libc::ENOLCK)
}
