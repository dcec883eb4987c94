//! Files of this machine that are sent, and files that arrive.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::error::StoreError;
use super::hex;

/// Bytes read at once.
pub(super) const CHUNK_BYTES: usize = 1 << 20;

/// How a file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Replaced whole by a rename, never written in place: its inode always holds the same content.
    Replaced,
    /// Written in place (a log that grows): only a copy keeps the content.
    InPlace,
}

/// What tells one state of a file from another without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified_ns: i128,
}

impl FileIdentity {
    /// The identity that a file has now.
    pub fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified_ns: i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec()),
        }
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// True when the file was written so long before `now_ns` that another write would have another time.
    pub fn is_settled(&self, now_ns: i128) -> bool {
        now_ns - self.modified_ns > 2_000_000_000
    }
}

/// A file that was opened and hashed: what is sent is what was hashed, whatever happens to its name.
#[derive(Debug, Clone)]
pub struct LocalFile {
    /// Its path when it was opened.
    pub path: PathBuf,
    /// The open file.
    pub file: Arc<File>,
    /// Its size when it was opened; what is appended later is not sent.
    pub bytes: u64,
    /// SHA-256 of these bytes in hexadecimal.
    pub sha256: String,
    /// How it is written.
    pub content: Content,
    /// What it was when it was opened.
    pub identity: FileIdentity,
}

impl LocalFile {
    /// Opens a plain file (no link, no device).
    ///
    /// # Errors
    /// [`StoreError::LocalFile`].
    pub fn open_only(path: &Path) -> Result<(File, fs::Metadata), StoreError> {
        let mut options = OpenOptions::new();
        // Without blocking, so that a pipe in place of the file is refused and not waited for.
        let options = options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC);
        let file = options.open(path).map_err(StoreError::local("open", path))?;
        let metadata = file.metadata().map_err(StoreError::local("look at", path))?;
        if !metadata.is_file() {
            let source = std::io::Error::other("it is not a plain file");
            return Err(StoreError::local("open", path)(source));
        }
        Ok((file, metadata))
    }

    /// Opens and hashes a file. Blocks.
    ///
    /// # Errors
    /// [`StoreError::LocalFile`]; [`StoreError::Changed`] when it became shorter meanwhile.
    pub fn open(path: &Path, content: Content) -> Result<Self, StoreError> {
        let (file, metadata) = Self::open_only(path)?;
        let mut hash = Sha256::new();
        read_through(&file, path, metadata.len(), |_, bytes| {
            hash.update(bytes);
            Ok(())
        })?;
        Ok(Self::hashed(path, file, &metadata, hex(&hash.finalize()), content))
    }

    /// A file whose hash is known from before.
    pub fn hashed(
        path: &Path,
        file: File,
        metadata: &fs::Metadata,
        sha256: String,
        content: Content,
    ) -> Self {
        let identity = FileIdentity::of(metadata);
        Self { path: path.to_owned(), file: Arc::new(file), bytes: metadata.len(), sha256, content, identity }
    }

    pub(super) fn changed(&self) -> StoreError {
        StoreError::Changed { path: self.path.clone() }
    }

    /// The bytes from `offset` on, at most `bytes_max`. Blocks.
    pub(super) fn read_at(&self, offset: u64, bytes_max: u64) -> Result<Vec<u8>, StoreError> {
        let length = bytes_max.min(self.bytes.saturating_sub(offset)) as usize;
        let mut buffer = vec![0; length];
        match self.file.read_exact_at(&mut buffer, offset) {
            Ok(()) => Ok(buffer),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Err(self.changed()),
            Err(error) => Err(StoreError::local("read", &self.path)(error)),
        }
    }
}

/// Passes the first `bytes` of a file on, piece by piece, with their offsets.
pub(super) fn read_through(
    file: &File,
    path: &Path,
    bytes: u64,
    mut piece: impl FnMut(u64, &[u8]) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut buffer = vec![0; CHUNK_BYTES.min(bytes.max(1) as usize)];
    let mut at = 0;
    while at < bytes {
        let want = (bytes - at).min(buffer.len() as u64) as usize;
        let n = match file.read_at(&mut buffer[..want], at) {
            Ok(0) => return Err(StoreError::Changed { path: path.to_owned() }),
            Ok(n) => n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(StoreError::local("read", path)(error)),
        };
        piece(at, &buffer[..n])?;
        at += n as u64;
    }
    Ok(())
}

/// A file on its way to `path`: hidden beside it until it is whole.
pub(super) struct Arriving {
    path: PathBuf,
    temporary: PathBuf,
    file: File,
    hash: Sha256,
    bytes: u64,
}

impl Arriving {
    /// Begins, making the folder when needed.
    pub(super) fn begin(path: &Path) -> Result<Self, StoreError> {
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).map_err(StoreError::local("make the folder", folder))?;
        let temporary = folder.join(format!(".arriving-{}", uuid::Uuid::new_v4().simple()));
        Self::begin_at(path, temporary)
    }

    /// Begins at a given temporary name on the same file system.
    pub(super) fn begin_at(path: &Path, temporary: PathBuf) -> Result<Self, StoreError> {
        let opened = OpenOptions::new().write(true).create_new(true).open(&temporary);
        let file = opened.map_err(StoreError::local("make", &temporary))?;
        Ok(Self { path: path.to_owned(), temporary, file, hash: Sha256::new(), bytes: 0 })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.file.write_all(bytes).map_err(StoreError::local("write", &self.path))?;
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Size and SHA-256 of what has arrived.
    pub(super) fn seen(&self) -> (u64, String) {
        (self.bytes, hex(&self.hash.clone().finalize()))
    }

    /// Makes it durable and gives it its name. The identity is that of what arrived, whoever replaces it afterwards.
    pub(super) fn finish(self) -> Result<FileIdentity, StoreError> {
        self.file.sync_all().map_err(StoreError::local("write", &self.path))?;
        let metadata = self.file.metadata().map_err(StoreError::local("look at", &self.path))?;
        fs::rename(&self.temporary, &self.path).map_err(StoreError::local("rename", &self.path))?;
        sync_folder(&self.path)?;
        Ok(FileIdentity::of(&metadata))
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        // After the rename there is nothing under this name.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Makes renames in the folder of `path` durable.
pub(super) fn sync_folder(path: &Path) -> Result<(), StoreError> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(StoreError::local("sync", folder))
}

/// Writes a small file whole. Blocks.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let mut arriving = Arriving::begin(path)?;
    arriving.write(bytes)?;
    arriving.finish().map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_is_sent_as_it_was_opened() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a");
        fs::write(&path, b"old").expect("written");
        let local = LocalFile::open(&path, Content::Replaced).expect("opened");
        write_whole(&path, b"the new one").expect("written");
        assert_eq!(local.read_at(0, 100).expect("read"), b"old");
        assert_eq!(local.sha256, hex(&Sha256::digest(b"old")));
        File::options().write(true).open(&path).expect("opened").set_len(1).expect("cut");
        let local = LocalFile { bytes: 9, ..LocalFile::open(&path, Content::InPlace).expect("opened") };
        assert!(matches!(local.read_at(0, 9), Err(StoreError::Changed { .. })));
    }

    #[test]
    fn only_plain_files_are_opened_and_nothing_half_arrives() {
        let folder = tempfile::tempdir().expect("a folder");
        let target = folder.path().join("deep/a");
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("link")).expect("linked");
        assert!(LocalFile::open(&folder.path().join("link"), Content::InPlace).is_err());
        assert!(LocalFile::open(folder.path(), Content::InPlace).is_err());
        let missing = LocalFile::open(&target, Content::InPlace).expect_err("nothing there");
        assert!(missing.is_missing());
        let mut arriving = Arriving::begin(&target).expect("begun");
        arriving.write(b"half").expect("written");
        drop(arriving);
        assert_eq!(fs::read_dir(folder.path().join("deep")).expect("a folder").count(), 0);
    }
}
