//! The index of a split on disk: what scanning found of each image, kept until that image or its labels change.
//!
//! One file per split in a cache folder of the user's (never in the dataset, which may be read-only): a first line
//! with the SHA-256 of the rest, then JSON. A file that does not verify is as good as none.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::labels::Label;
use super::report::Finding;

/// Changes when the meaning of the index changes.
const VERSION: u32 = 2;
/// Bytes of a stamp: enough that no two of a dataset are equal by chance.
const STAMP_BYTES: usize = 16;

/// One usable or unusable image as the scan saw it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Width and height as displayed; `None` when the image was dropped.
    pub size: Option<(u32, u32)>,
    /// Its boxes.
    pub labels: Vec<Label>,
    /// Whether there is no label file.
    pub label_missing: bool,
    /// What was found wrong.
    pub findings: Vec<Finding>,
}

#[derive(Serialize, Deserialize)]
struct Index {
    settings: String,
    stamps: Vec<String>,
    entries: Vec<Entry>,
}

/// Size in bytes and time of change in nanoseconds since 1970 of a file; `None` when it is not there.
pub(super) fn size_and_time(path: &Path) -> Option<(u64, u128)> {
    let meta = std::fs::metadata(path).ok()?;
    let time = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    Some((meta.len(), time.as_nanos()))
}

/// For each image a hash of what its entry depends on: names, sizes and times of the image and its label file.
pub(super) fn stamps(images: &[PathBuf], labels: &[PathBuf]) -> Vec<String> {
    let stamp = |(image, label): (&PathBuf, &PathBuf)| {
        let mut hash = Sha256::new();
        for path in [image, label] {
            hash.update(path.as_os_str().as_encoded_bytes());
            if let Some((size, time)) = size_and_time(path) {
                hash.update(size.to_le_bytes());
                hash.update(time.to_le_bytes());
            }
            hash.update(b"\n");
        }
        hex(&hash.finalize()[..STAMP_BYTES])
    };
    images.par_iter().zip(labels).map(stamp).collect()
}

/// Where the index of a split of a dataset file lies in a cache folder.
pub(super) fn path_in(folder: &Path, dataset: &Path, split: &str) -> PathBuf {
    let whole = std::path::absolute(dataset).unwrap_or_else(|_| dataset.to_owned());
    let id = hex(&Sha256::digest(whole.as_os_str().as_encoded_bytes()));
    folder.join("index").join(format!("{}-{split}.json", &id[..16]))
}

/// Loads the entries by stamp if the file verifies and was made with these settings.
pub(super) fn load(path: &Path, settings: &str) -> Option<HashMap<String, Entry>> {
    let text = std::fs::read_to_string(path).ok()?;
    let (checksum, body) = text.split_once('\n')?;
    if hex(&Sha256::digest(body)) != checksum {
        tracing::warn!(file = %path.display(), "the dataset index is damaged; the images are scanned anew");
        return None;
    }
    let index: Index = serde_json::from_str(body).ok()?;
    let is_ours = index.settings == versioned(settings) && index.entries.len() == index.stamps.len();
    is_ours.then(|| index.stamps.into_iter().zip(index.entries).collect())
}

fn versioned(settings: &str) -> String {
    format!("boxwright index {VERSION}: {settings}")
}

/// Stores the entries; a cache that cannot be written is no fault.
pub(super) fn store(path: &Path, settings: &str, stamps: &[String], entries: &[Entry]) {
    let index = Index { settings: versioned(settings), stamps: stamps.to_vec(), entries: entries.to_vec() };
    let written = serde_json::to_string(&index).map_err(std::io::Error::other).and_then(|body| {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let temporary = path.with_extension(format!("{}.part", std::process::id()));
        std::fs::write(&temporary, format!("{}\n{body}", hex(&Sha256::digest(&body))))?;
        std::fs::rename(&temporary, path)
    });
    if let Err(error) = written {
        tracing::debug!(file = %path.display(), %error, "the dataset index is not kept");
    }
}

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The folder for caches: `BOXWRIGHT_CACHE_DIR`, else `boxwright` in `XDG_CACHE_HOME` or `~/.cache`, else in the
/// temporary folder.
pub(super) fn default_cache_folder() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("BOXWRIGHT_CACHE_DIR")
        .or_else(|| set("XDG_CACHE_HOME").map(|folder| folder.join("boxwright")))
        .or_else(|| set("HOME").map(|folder| folder.join(".cache").join("boxwright")))
        .unwrap_or_else(|| std::env::temp_dir().join("boxwright-cache"))
}
