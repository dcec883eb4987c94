//! Measured cuts on disk, beside the compiled kernels: one file for each kind of chip, precision and text of kernels.
//!
//! A file that is damaged, or made for something else, counts as none and is replaced by the next that is written.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::tuning::{Tuning, made_for};
use crate::engine::device::cuda::sources::{HEADERS, SOURCES};
use crate::engine::device::cuda::{Chip, Precision};

/// Version of the form of the file.
const FORM: u32 = 1;
/// Largest file that is taken for a table, bytes.
const FILE_BYTES_MAX: u64 = 64 << 20;

#[derive(Serialize, Deserialize)]
struct Content {
    form: u32,
    /// [`kernels_hash`].
    kernels: String,
    /// [`Tuning::identity`], against damage.
    identity: String,
    tuning: Tuning,
}

/// A hash of the text of every kernel of convolution and of what they include.
fn kernels_hash() -> String {
    let mut hash = Sha256::new();
    let sources = SOURCES.iter().filter(|s| s.stem.starts_with("conv2d")).map(|s| (s.stem, s.text));
    for (name, text) in sources.chain(HEADERS.iter().copied()) {
        for part in [name, text] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
    }
    hash.finalize()[..8].iter().map(|b| format!("{b:02x}")).collect()
}

/// The file in `folder` for a chip and precision.
pub fn path(folder: &Path, chip: &Chip, precision: Precision) -> PathBuf {
    folder.join(format!("tuning-{}-{}.json", made_for(chip, precision), kernels_hash()))
}

/// The table in `folder` for a chip and precision; an empty one where there is none that can be used.
pub fn read(folder: &Path, chip: &Chip, precision: Precision) -> Tuning {
    let path = path(folder, chip, precision);
    let found = match text(&path) {
        Ok(text) => parse(&text, chip, precision),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Tuning::new(chip, precision),
        Err(error) => Err(error.to_string()),
    };
    found.unwrap_or_else(|damage| {
        tracing::warn!(file = %path.display(), "measured cuts of convolutions cannot be used ({damage})");
        Tuning::new(chip, precision)
    })
}

fn text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if read as u64 > FILE_BYTES_MAX {
        return Err(io::Error::other(format!("more than {FILE_BYTES_MAX} bytes long")));
    }
    Ok(text)
}

fn parse(text: &str, chip: &Chip, precision: Precision) -> Result<Tuning, String> {
    let content: Content = serde_json::from_str(text).map_err(|e| e.to_string())?;
    if content.form != FORM || content.kernels != kernels_hash() || !content.tuning.fits(chip, precision) {
        return Err("made for something else".into());
    }
    if content.identity != content.tuning.identity() {
        return Err("its checksum differs".into());
    }
    Ok(content.tuning)
}

/// Adds `measured` to the table in `folder`, replacing entries of the same cases; returns the file.
///
/// # Errors
/// The folder or the file cannot be written; what was there before is then as it was.
pub fn merge(folder: &Path, chip: &Chip, precision: Precision, measured: &Tuning) -> io::Result<PathBuf> {
    fs::create_dir_all(folder)?;
    let path = path(folder, chip, precision);
    // Held to the end: two that merge at a time must not lose each other's entries.
    let lock =
        OpenOptions::new().create(true).truncate(false).write(true).open(path.with_extension("lock"))?;
    lock.lock()?;
    let mut tuning = read(folder, chip, precision);
    tuning.extend(measured);
    let content = Content { form: FORM, kernels: kernels_hash(), identity: tuning.identity(), tuning };
    let beside = path.with_extension(format!("{}.part", std::process::id()));
    let written = serde_json::to_vec(&content).map_err(io::Error::other);
    let written =
        written.and_then(|bytes| fs::write(&beside, bytes)).and_then(|()| fs::rename(&beside, &path));
    written.inspect_err(|_| {
        fs::remove_file(&beside).ok();
    })?;
    Ok(path)
}
