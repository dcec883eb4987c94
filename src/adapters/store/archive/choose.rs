//! Which files of a run folder are kept, and their checksums.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};

use super::manifest::{Role, checkpoint_iteration};
use crate::adapters::store::error::StoreError;
use crate::adapters::store::local::{FileIdentity, read_through};
use crate::adapters::store::names::fault_of_path;
use crate::adapters::store::{Content, LocalFile, hex};
use crate::job::delivery::FilesMoment;
use crate::train::checkpoint::{TRAILER_LEN, TRAILER_MAGIC};

/// Folders inside folders of a run.
const DEPTH_MAX: usize = 8;
/// Files of a run; beyond, the rest is left out with a word in the log.
const FILES_MAX: usize = 5_000;
/// Checksums remembered.
const HASHES_MAX: usize = 20_000;
/// What a running job's delivery holds of its small files.
const SMALL: [&str; 4] = ["args.yaml", "config.effective.yaml", "results.csv", "events.jsonl"];

/// What is kept of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Newest checkpoints.
    pub keep_last: usize,
    /// Weights of every so many epochs; 0 for none.
    pub keep_every_epochs: u32,
    /// The best weights.
    pub keep_best: bool,
}

impl Policy {
    /// True when the weights of an epoch are kept.
    pub fn keeps_epoch(&self, epoch: u32) -> bool {
        self.keep_every_epochs > 0 && epoch > 0 && epoch.is_multiple_of(self.keep_every_epochs)
    }
}

/// A file of a run folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// Relative to the run folder, with `/` between its parts.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// What it is.
    pub role: Role,
}

impl Chosen {
    fn new(run_dir: &Path, name: &str, role: Role) -> Self {
        Self { name: name.to_owned(), path: run_dir.join(name), role }
    }

    fn content(&self) -> Content {
        // Checkpoints and weights are replaced whole; anything else may be written in place.
        if self.role == Role::Run { Content::InPlace } else { Content::Replaced }
    }
}

/// The files of a run folder that a delivery is about.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// Best weights first, then those of epochs, the newest, and the rest.
    pub files: Vec<Chosen>,
    /// Checkpoints, newest first: the first that verifies is taken.
    pub checkpoints: Vec<Chosen>,
}

/// Chooses. What is not there is not chosen. Blocks.
///
/// # Errors
/// [`StoreError::LocalFile`] when the run folder cannot be read.
pub fn choose(run_dir: &Path, moment: FilesMoment, policy: &Policy) -> Result<Choice, StoreError> {
    let mut choice = Choice::default();
    let mut names = Vec::new();
    walk(run_dir, &mut names)?;
    for name in &names {
        if let Some(role) = role_of(name, policy) {
            let chosen = Chosen::new(run_dir, name, role);
            match role {
                Role::Checkpoint => choice.checkpoints.push(chosen),
                Role::Run if moment == FilesMoment::Checkpoint && !SMALL.contains(&name.as_str()) => {}
                _ => choice.files.push(chosen),
            }
        }
    }
    choice.checkpoints.sort_by_key(|chosen| std::cmp::Reverse(checkpoint_iteration(&chosen.name)));
    // What may be copied from an object that another file of this delivery replaces comes first.
    let place = |role: Role| match role {
        Role::Best => 0,
        Role::Periodic => 1,
        Role::Last => 2,
        Role::Checkpoint => 3,
        Role::Run => 4,
    };
    choice.files.sort_by(|a, b| (place(a.role), &a.name).cmp(&(place(b.role), &b.name)));
    Ok(choice)
}

/// What a file is by its name; `None` for one that is not kept.
fn role_of(name: &str, policy: &Policy) -> Option<Role> {
    if checkpoint_iteration(name).is_some() {
        return Some(Role::Checkpoint);
    }
    let Some(weights) = name.strip_prefix("weights/").and_then(|n| n.strip_suffix(".safetensors")) else {
        return Some(Role::Run);
    };
    match weights {
        "last" => Some(Role::Last),
        "best" => policy.keep_best.then_some(Role::Best),
        other => match other.strip_prefix("epoch").and_then(|number| number.parse().ok()) {
            Some(epoch) => policy.keeps_epoch(epoch).then_some(Role::Periodic),
            None => Some(Role::Run),
        },
    }
}

/// The epoch of `weights/epoch<n>.safetensors`.
pub fn periodic_epoch(path: &str) -> Option<u32> {
    path.strip_prefix("weights/epoch")?.strip_suffix(".safetensors")?.parse().ok()
}

/// The plain files below a folder, hidden ones and links left out.
fn walk(run_dir: &Path, names: &mut Vec<String>) -> Result<(), StoreError> {
    let mut folders = vec![(run_dir.to_owned(), String::new(), 0)];
    while let Some((folder, prefix, depth)) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            // A folder that went away meanwhile; the run folder itself is missed.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && depth > 0 => continue,
            Err(error) => return Err(StoreError::local("read", &folder)(error)),
        };
        for entry in entries.flatten() {
            let Ok(file_name) = entry.file_name().into_string() else { continue };
            let Ok(kind) = entry.file_type() else { continue };
            if file_name.starts_with('.') {
                continue;
            }
            let name = if prefix.is_empty() { file_name } else { format!("{prefix}/{file_name}") };
            if kind.is_dir() && depth < DEPTH_MAX {
                folders.push((entry.path(), name, depth + 1));
            } else if kind.is_file() && fault_of_path(&name).is_none() {
                names.push(name);
            }
            if names.len() >= FILES_MAX {
                tracing::warn!(run_dir = %run_dir.display(), FILES_MAX, "the run folder has more files than are stored");
                names.sort();
                return Ok(());
            }
        }
    }
    names.sort();
    Ok(())
}

/// Checksums of files that have not changed since.
#[derive(Default)]
pub struct Hashes {
    known: Mutex<HashMap<FileIdentity, String>>,
}

impl Hashes {
    /// Opens a file and gives its checksum, from memory when it is the same file. A checkpoint must verify by its
    /// trailer. Blocks.
    ///
    /// # Errors
    /// [`StoreError::LocalFile`], [`StoreError::Changed`]; [`StoreError::Integrity`] for a checkpoint that does not
    /// verify.
    pub fn open(&self, chosen: &Chosen) -> Result<LocalFile, StoreError> {
        let (file, metadata) = LocalFile::open_only(&chosen.path)?;
        let identity = FileIdentity::of(&metadata);
        let known = self.known.lock().ok().and_then(|known| known.get(&identity).cloned());
        if let Some(sha256) = known {
            return Ok(LocalFile::hashed(&chosen.path, file, &metadata, sha256, chosen.content()));
        }
        let is_checkpoint = chosen.role == Role::Checkpoint;
        let sha256 = if is_checkpoint {
            hash_checkpoint(&file, &chosen.path, metadata.len())?
        } else {
            let mut hash = Sha256::new();
            read_through(&file, &chosen.path, metadata.len(), |_, bytes| {
                hash.update(bytes);
                Ok(())
            })?;
            hex(&hash.finalize())
        };
        let now_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as i128);
        // A file written in place may change again within the same tick of its clock.
        if (chosen.content() == Content::Replaced || identity.is_settled(now_ns))
            && let Ok(mut known) = self.known.lock()
        {
            if known.len() >= HASHES_MAX {
                known.clear();
            }
            known.insert(identity, sha256.clone());
        }
        Ok(LocalFile::hashed(&chosen.path, file, &metadata, sha256, chosen.content()))
    }
}

/// True for a checkpoint file that is whole. Blocks.
pub fn verifies(path: &Path) -> bool {
    let opened = LocalFile::open_only(path);
    opened.and_then(|(file, metadata)| hash_checkpoint(&file, path, metadata.len())).is_ok()
}

/// The checksum of a checkpoint file, whose last bytes hold the one of all before.
fn hash_checkpoint(file: &fs::File, path: &Path, bytes: u64) -> Result<String, StoreError> {
    let damaged = |found: &str| StoreError::Integrity {
        object: path.display().to_string(),
        expected: "a checkpoint that verifies".to_owned(),
        found: found.to_owned(),
    };
    let Some(content) = bytes.checked_sub(TRAILER_LEN as u64) else { return Err(damaged("a short file")) };
    let mut trailer = [0u8; TRAILER_LEN];
    file.read_exact_at(&mut trailer, content).map_err(StoreError::local("read", path))?;
    if &trailer[..8] != TRAILER_MAGIC {
        return Err(damaged("no trailer"));
    }
    let mut hash = Sha256::new();
    read_through(file, path, content, |_, piece| {
        hash.update(piece);
        Ok(())
    })?;
    if hash.clone().finalize().as_slice() != &trailer[8..] {
        return Err(damaged("another checksum"));
    }
    hash.update(trailer);
    Ok(hex(&hash.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, name: &str, bytes: &[u8]) {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        fs::write(path, bytes).expect("written");
    }

    #[test]
    fn files_are_chosen_by_moment_and_policy() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = folder.path();
        for name in [
            "args.yaml",
            "results.csv",
            "events.jsonl",
            "result.json",
            "plots/a.png",
            ".hidden",
            "weights/.last.safetensors.tmp",
            "weights/last.safetensors",
            "weights/best.safetensors",
            "weights/epoch4.safetensors",
            "weights/epoch5.safetensors",
            "state/step-000000010.ckpt",
            "state/step-000000200.ckpt",
        ] {
            write(run, name, b"x");
        }
        std::os::unix::fs::symlink("/etc/passwd", run.join("link")).expect("linked");
        let policy = Policy { keep_last: 2, keep_every_epochs: 2, keep_best: true };
        let names = |choice: Choice| {
            let names = |chosen: Vec<Chosen>| chosen.into_iter().map(|c| c.name).collect::<Vec<_>>();
            (names(choice.files), names(choice.checkpoints))
        };
        let (files, checkpoints) = names(choose(run, FilesMoment::Checkpoint, &policy).expect("chosen"));
        assert_eq!(
            files,
            [
                "weights/best.safetensors",
                "weights/epoch4.safetensors",
                "weights/last.safetensors",
                "args.yaml",
                "events.jsonl",
                "results.csv"
            ]
        );
        assert_eq!(checkpoints, ["state/step-000000200.ckpt", "state/step-000000010.ckpt"]);
        let policy = Policy { keep_last: 2, keep_every_epochs: 0, keep_best: false };
        let (files, _) = names(choose(run, FilesMoment::End, &policy).expect("chosen"));
        assert_eq!(
            files,
            [
                "weights/last.safetensors",
                "args.yaml",
                "events.jsonl",
                "plots/a.png",
                "result.json",
                "results.csv"
            ]
        );
        let gone = choose(&run.join("none"), FilesMoment::End, &policy).expect_err("no folder");
        assert!(gone.is_missing());
    }

    #[test]
    fn checkpoints_verify_and_checksums_are_remembered() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut bytes = b"content of a checkpoint".to_vec();
        let digest = Sha256::digest(&bytes);
        bytes.extend_from_slice(TRAILER_MAGIC);
        bytes.extend_from_slice(&digest);
        write(folder.path(), "state/step-1.ckpt", &bytes);
        let hashes = Hashes::default();
        let chosen = Chosen::new(folder.path(), "state/step-1.ckpt", Role::Checkpoint);
        let file = hashes.open(&chosen).expect("verifies");
        assert_eq!(file.sha256, hex(&Sha256::digest(&bytes)));
        assert_eq!(hashes.known.lock().expect("no poison").len(), 1);
        assert_eq!(hashes.open(&chosen).expect("remembered").sha256, file.sha256);
        bytes[0] ^= 1;
        write(folder.path(), "state/step-2.ckpt", &bytes);
        let chosen = Chosen::new(folder.path(), "state/step-2.ckpt", Role::Checkpoint);
        assert!(matches!(hashes.open(&chosen), Err(StoreError::Integrity { .. })));
        write(folder.path(), "state/step-3.ckpt", &bytes[..bytes.len() - 1]);
        let chosen = Chosen::new(folder.path(), "state/step-3.ckpt", Role::Checkpoint);
        assert!(matches!(hashes.open(&chosen), Err(StoreError::Integrity { .. })));
    }
}
