//! Files that are there whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::error::TrainError;

/// Writes `path` by way of a temporary file beside it: write, fsync, rename, fsync of the folder.
/// A reader sees the old content or the new, never a part, whatever happens in between.
///
/// # Errors
/// [`TrainError::Storage`]; the temporary file is then removed and `path` is as it was.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<(), TrainError> {
    let temporary = temporary_beside(path);
    let outcome = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&temporary)?;
        {
            let mut buffered = std::io::BufWriter::with_capacity(1 << 20, &mut file);
            write(&mut buffered)?;
            buffered.flush()?;
        }
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        sync_folder(path)
    })();
    outcome.map_err(|source| {
        // The failure to report is the first one; a temporary file left behind is overwritten later.
        let _ = fs::remove_file(&temporary);
        TrainError::storage("write", path, source)
    })
}

/// The temporary name of `path`: hidden, in the same folder, so that the rename stays in one file system.
fn temporary_beside(path: &Path) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.tmp"))
}

/// Makes renames in the folder of `path` durable.
fn sync_folder(path: &Path) -> std::io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

/// Creates a folder and those above it.
pub fn create_folder(path: &Path) -> Result<(), TrainError> {
    fs::create_dir_all(path).map_err(|source| TrainError::storage("create folder", path, source))
}
