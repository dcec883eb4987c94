//! What a list of objects gives, and the list of a store of files.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use super::folder::{fault, mark};
use super::local::FileIdentity;
use super::{BucketName, ObjectEntry, ObjectKey, StoreError};

/// Folders inside folders that a list follows.
const DEPTH_MAX: usize = 64;

/// Objects, and whether there are some that cannot be named.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listed {
    /// The objects, in the order of their keys.
    pub entries: Vec<ObjectEntry>,
    /// The first of those that were left out; `None` when the list is all there is.
    pub refused: Option<Refused>,
}

/// Something in a store that no [`ObjectKey`] can name, or that is no object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Its name in the bucket.
    pub name: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl Listed {
    /// Adds an object by its name, or notes that the name is refused.
    pub(super) fn add(&mut self, name: String, bytes: u64, etag: String) {
        match ObjectKey::new(name) {
            Ok(key) => self.entries.push(ObjectEntry { key, bytes, etag }),
            Err(StoreError::Name { name, reason, .. }) => self.refuse(name, reason),
            // A key fails by its name only.
            Err(_) => {}
        }
    }

    /// Notes something that is left out.
    pub(super) fn refuse(&mut self, name: String, reason: &'static str) {
        self.refused.get_or_insert(Refused { name, reason });
    }

    /// The error of a list that is longer than it may be.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`].
    pub(super) fn check(
        &self,
        bucket: &BucketName,
        prefix: &str,
        items_max: usize,
    ) -> Result<(), StoreError> {
        if self.entries.len() <= items_max {
            return Ok(());
        }
        Err(StoreError::TooLarge {
            object: format!("the list of {bucket}/{prefix}"),
            bytes: self.entries.len() as u64,
            bytes_max: items_max as u64,
        })
    }
}

/// The objects of a store of files whose keys begin with `prefix`. Links are not followed: below a folder of the store
/// there may be anything behind them. Blocks.
///
/// # Errors
/// [`StoreError::Missing`] when there is no such bucket, [`StoreError::TooLarge`]; those of the file system.
pub(super) fn list_folder(
    root: &Path,
    bucket: &BucketName,
    prefix: &str,
    items_max: usize,
) -> Result<Listed, StoreError> {
    let root = root.join(bucket.as_str());
    if !root.is_dir() {
        return Err(StoreError::Missing { object: format!("bucket {bucket}") });
    }
    // The deepest folder that the prefix names; below it, the rest is compared.
    let start = prefix.rfind('/').map_or("", |at| &prefix[..at]);
    let mut found = Listed::default();
    if !start.is_empty() && ObjectKey::new(start).is_err() {
        return Ok(found);
    }
    let mut folders = vec![(root.join(start), start.to_owned(), 0)];
    while let Some((folder, name, depth)) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                continue;
            }
            Err(error) => return Err(fault("read", &folder)(error)),
        };
        for entry in entries {
            let entry = entry.map_err(fault("read", &folder))?;
            let (file_name, is_text) = match entry.file_name().into_string() {
                Ok(text) => (text, true),
                Err(other) => (other.to_string_lossy().into_owned(), false),
            };
            let key = if name.is_empty() { file_name } else { format!("{name}/{file_name}") };
            // What went away meanwhile is not there.
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() && is_text && depth < DEPTH_MAX {
                folders.push((entry.path(), key, depth + 1));
                continue;
            }
            if !key.starts_with(prefix) {
                continue;
            }
            if !is_text {
                found.refuse(key, "it is not UTF-8");
            } else if metadata.is_dir() {
                found.refuse(key, "it lies more than 64 folders deep");
            } else if metadata.is_symlink() {
                found.refuse(key, "it is a symbolic link, which a store of files does not follow");
            } else if metadata.is_file() {
                found.add(key, metadata.len(), mark(&FileIdentity::of(&metadata)));
            } else {
                found.refuse(key, "it is no plain file");
            }
            found.check(bucket, prefix, items_max)?;
        }
    }
    found.entries.sort();
    Ok(found)
}
