//! Checkpoints from which a run goes on exactly, to the step.
//!
//! A checkpoint file is a safetensors file followed by a trailer of 40 bytes: eight bytes of magic and
//! the SHA-256 of everything before. It holds the live model, its average, the optimiser's state, the
//! gradients summed so far within an accumulation window, and [`Progress`] as JSON. All random draws
//! of training are functions of (seed, epoch, index), so a position is enough to repeat them.
//!
//! [`Store`] keeps the newest few as `step-<iteration>.ckpt`; a damaged one is named and passed over.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::early_stop::EarlyStop;
use super::error::TrainError;
use super::files;
use crate::engine::ops::conv2d::cuda::Tuning;
use crate::engine::optim::{OptimizerState, OptimizerStateRef};

/// Magic of the trailer; the digit is the version of the format.
pub(crate) const TRAILER_MAGIC: &[u8; 8] = b"BXWRCK01";
/// Bytes of the trailer.
pub(crate) const TRAILER_LEN: usize = 8 + 32;
/// A checkpoint larger than this is not one of ours.
const FILE_BYTES_MAX: u64 = 64 << 30;
/// A header larger than this is damage, not data.
const HEADER_BYTES_MAX: usize = 64 << 20;

/// Where a run is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Fingerprint of what must be equal for the checkpoint to fit: network, classes, seed, recipe.
    pub fingerprint: String,
    /// The resolved choices that the run keeps, whatever a resume would choose anew.
    pub resolved: Resolved,
    /// Epoch in hand, from 0; equals the number of finished epochs.
    pub epoch: u32,
    /// Next batch of that epoch, from 0: the data cursor.
    pub batch: usize,
    /// Epochs of the run (moves only with a time budget).
    pub epochs: u32,
    /// Optimiser steps taken.
    pub step: u64,
    /// Iteration (batches since the start) of the last optimiser step; -1 before the first.
    pub last_step: i64,
    /// Updates of the averaged model.
    pub ema_updates: u64,
    /// Sums of the loss items over the batches of this epoch.
    pub loss_sums: [f64; 3],
    /// Best fitness so far.
    pub best_fitness: Option<f64>,
    /// The early-stop watch.
    pub stopper: EarlyStop,
    /// True once the early stop has decided.
    pub is_stopping: bool,
    /// Precision, recall, mAP50, mAP50-95 of the last validation.
    pub metrics: [f64; 4],
    /// Loss items of the last validation.
    pub val_losses: [f64; 3],
    /// Rows of `results.csv` so far, formatted.
    pub rows: Vec<String>,
    /// Seconds of training over all sessions.
    pub elapsed_s: f64,
    /// Returns to a checkpoint because of a loss that was not finite.
    pub rollbacks: u32,
    /// Factor of the loss and steps since it changed, where activations are kept in half precision.
    #[serde(default)]
    pub loss_scale: Option<(f32, u32)>,
    /// Measured cuts of convolutions that the run began with: they fix the order of sums. Without, the model's.
    #[serde(default)]
    pub tuning: Tuning,
}

/// What the session chose at its first start and keeps on resume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Resolved {
    /// Name of the model table.
    pub model: String,
    /// Images per batch.
    pub batch: usize,
    /// Batches whose gradients make up one that was asked for and did not fit; usually 1.
    #[serde(default = "one")]
    pub passes: usize,
    /// Images per batch that the configuration asked for; 0 for an automatic choice.
    pub asked_batch: usize,
    /// Name of the optimiser.
    pub optimizer: String,
    /// Initial learning rate.
    pub lr0: f64,
    /// Momentum or beta1.
    pub momentum: f64,
    /// Start of the biases' warm-up.
    pub warmup_bias_lr: f64,
}

fn one() -> usize {
    1
}

impl Resolved {
    /// Images whose gradients are summed at least before a step.
    pub fn step_images(&self) -> usize {
        self.batch * self.passes
    }
}

/// Everything a run is, at one point between two batches.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Where it is.
    pub progress: Progress,
    /// Live parameters.
    pub values: Vec<f32>,
    /// Live running statistics.
    pub buffers: Vec<f32>,
    /// Averaged parameters.
    pub ema_values: Vec<f32>,
    /// Averaged running statistics.
    pub ema_buffers: Vec<f32>,
    /// Gradients summed so far; absent between two steps.
    pub grads: Option<Vec<f32>>,
    /// State of the optimiser.
    pub optimizer: OptimizerState,
}

/// The same by reference, so that saving copies nothing.
pub struct CheckpointRef<'a> {
    /// Where it is.
    pub progress: &'a Progress,
    /// Live parameters.
    pub values: &'a [f32],
    /// Live running statistics.
    pub buffers: &'a [f32],
    /// Averaged parameters.
    pub ema_values: &'a [f32],
    /// Averaged running statistics.
    pub ema_buffers: &'a [f32],
    /// Gradients summed so far; absent between two steps.
    pub grads: Option<&'a [f32]>,
    /// State of the optimiser.
    pub optimizer: OptimizerStateRef<'a>,
}

/// A checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file cannot be read.
    #[error("cannot read checkpoint {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The content is not what was written.
    #[error("checkpoint {path} is damaged: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was seen.
        reason: String,
    },
}

/// A file was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    /// The file.
    pub path: PathBuf,
    /// SHA-256 of the content, hexadecimal.
    pub sha256: String,
}

/// Passes bytes on and hashes them.
struct Hashing<'a> {
    inner: &'a mut dyn Write,
    hash: Sha256,
}

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hash.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// Optimiser scalars as they stand in the header.
#[derive(Serialize, Deserialize)]
struct OptimizerScalars {
    steps: u64,
    mu_product_bits: u64,
    vectors: Vec<String>,
}

const OPTIMIZER_PREFIX: &str = "optimizer.";

/// Writes a checkpoint atomically to `path`.
pub fn save(path: &Path, checkpoint: &CheckpointRef) -> Result<Saved, TrainError> {
    let fault = |e: serde_json::Error| TrainError::Internal { message: format!("progress as JSON: {e}") };
    let scalars = OptimizerScalars {
        steps: checkpoint.optimizer.steps,
        mu_product_bits: checkpoint.optimizer.mu_product.to_bits(),
        vectors: checkpoint.optimizer.vectors.iter().map(|&(n, _)| n.to_owned()).collect(),
    };
    let mut metadata = serde_json::Map::new();
    metadata.insert("format".into(), "boxwright-checkpoint".into());
    metadata.insert("progress".into(), serde_json::to_string(checkpoint.progress).map_err(fault)?.into());
    metadata.insert("optimizer".into(), serde_json::to_string(&scalars).map_err(fault)?.into());
    let mut arrays: Vec<(String, &[f32])> = vec![
        ("model.values".into(), checkpoint.values),
        ("model.buffers".into(), checkpoint.buffers),
        ("ema.values".into(), checkpoint.ema_values),
        ("ema.buffers".into(), checkpoint.ema_buffers),
    ];
    arrays.extend(checkpoint.grads.map(|g| ("grads".to_owned(), g)));
    let vectors = &checkpoint.optimizer.vectors;
    arrays.extend(vectors.iter().map(|&(n, v)| (format!("{OPTIMIZER_PREFIX}{n}"), v)));

    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), metadata.into());
    let mut at = 0;
    for (name, array) in &arrays {
        let end = at + array.len() * 4;
        let entry = serde_json::json!({"dtype": "F32", "shape": [array.len()], "data_offsets": [at, end]});
        header.insert(name.clone(), entry);
        at = end;
    }
    let mut header = serde_json::to_string(&header).map_err(fault)?;
    while header.len() % 8 != 0 {
        header.push(' ');
    }
    let mut digest = [0u8; 32];
    files::write_atomically(path, |file| {
        let mut out = Hashing { inner: file, hash: Sha256::new() };
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        for (_, array) in &arrays {
            out.write_all(bytemuck::cast_slice(array))?;
        }
        digest = out.hash.finalize().into();
        file.write_all(TRAILER_MAGIC)?;
        file.write_all(&digest)
    })?;
    Ok(Saved { path: path.to_owned(), sha256: hex(&digest) })
}

/// The folder of the checkpoints that belong to a run folder, or to a file in it or in one of its folders
/// (`weights/last.safetensors`).
pub fn folder_of(path: &Path) -> Option<PathBuf> {
    path.ancestors().take(3).map(|folder| folder.join("state")).find(|folder| folder.is_dir())
}

/// True when `train.resume` can go on from this path: it is a checkpoint, or one belongs to it. Nothing is verified.
pub fn can_resume_from(path: &Path) -> bool {
    let is_checkpoint = |path: &Path| path.extension().is_some_and(|ending| ending == "ckpt");
    if is_checkpoint(path) {
        return path.is_file();
    }
    let entries = folder_of(path).and_then(|folder| fs::read_dir(folder).ok());
    path.exists() && entries.is_some_and(|mut e| e.any(|e| e.is_ok_and(|e| is_checkpoint(&e.path()))))
}

/// Reads and verifies a checkpoint.
pub fn load(path: &Path) -> Result<Checkpoint, CheckpointError> {
    let read = |source| CheckpointError::Read { path: path.to_owned(), source };
    let damaged = |reason: String| CheckpointError::Damaged { path: path.to_owned(), reason };
    let bytes_len = fs::metadata(path).map_err(read)?.len();
    if bytes_len > FILE_BYTES_MAX {
        return Err(damaged(format!("{bytes_len} bytes, above the limit of {FILE_BYTES_MAX}")));
    }
    let bytes = fs::read(path).map_err(read)?;
    parse(&bytes).map_err(damaged)
}

/// How far a run was at a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Position {
    /// Epochs finished.
    pub epoch: u32,
    /// Optimiser steps taken.
    pub step: u64,
}

/// How far a run was, by the header of a checkpoint file; its arrays are neither read nor verified. `None` for a file that
/// has no such header.
pub fn position(file: &fs::File) -> Option<Position> {
    let mut length = [0u8; 8];
    file.read_exact_at(&mut length, 0).ok()?;
    let length = usize::try_from(u64::from_le_bytes(length)).ok()?;
    if length > HEADER_BYTES_MAX || length as u64 > file.metadata().ok()?.len() {
        return None;
    }
    let mut header = vec![0; length];
    file.read_exact_at(&mut header, 8).ok()?;
    let header: serde_json::Value = serde_json::from_slice(&header).ok()?;
    serde_json::from_str(header["__metadata__"]["progress"].as_str()?).ok()
}

/// Verifies the trailer and takes the parts out; the error says what was seen.
fn parse(bytes: &[u8]) -> Result<Checkpoint, String> {
    let content_len =
        bytes.len().checked_sub(TRAILER_LEN).filter(|&n| n >= 8).ok_or("the file is too short")?;
    let (content, trailer) = bytes.split_at(content_len);
    if &trailer[..8] != TRAILER_MAGIC {
        return Err("the trailer is missing: the file was cut off or is not a checkpoint".into());
    }
    if Sha256::digest(content).as_slice() != &trailer[8..] {
        return Err("the checksum does not match".into());
    }
    let header_len = u64::from_le_bytes(content[..8].try_into().map_err(|_| "no header length")?) as usize;
    if header_len > HEADER_BYTES_MAX || header_len > content.len() - 8 {
        return Err(format!("a header of {header_len} bytes"));
    }
    let (header, data) = content[8..].split_at(header_len);
    let header: serde_json::Value = serde_json::from_slice(header).map_err(|e| format!("header: {e}"))?;
    let text =
        |key: &str| header["__metadata__"][key].as_str().ok_or_else(|| format!("the header has no {key}"));
    let progress: Progress = serde_json::from_str(text("progress")?).map_err(|e| format!("progress: {e}"))?;
    let scalars: OptimizerScalars =
        serde_json::from_str(text("optimizer")?).map_err(|e| format!("optimizer: {e}"))?;
    let array = |name: &str| -> Result<Vec<f32>, String> {
        let offset = |i: usize| header[name]["data_offsets"][i].as_u64().map(|v| v as usize);
        let range = offset(0).zip(offset(1)).ok_or_else(|| format!("no array {name}"))?;
        let bytes = data.get(range.0..range.1).ok_or_else(|| format!("array {name} is outside the file"))?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    };
    let vectors = scalars.vectors.iter();
    let vectors = vectors.map(|n| Ok((n.clone(), array(&format!("{OPTIMIZER_PREFIX}{n}"))?)));
    Ok(Checkpoint {
        values: array("model.values")?,
        buffers: array("model.buffers")?,
        ema_values: array("ema.values")?,
        ema_buffers: array("ema.buffers")?,
        grads: header.get("grads").map(|_| array("grads")).transpose()?,
        optimizer: OptimizerState {
            steps: scalars.steps,
            mu_product: f64::from_bits(scalars.mu_product_bits),
            vectors: vectors.collect::<Result<_, String>>()?,
        },
        progress,
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The checkpoints of one run: a folder of `step-<iteration>.ckpt`.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
    kept: usize,
}

/// The newest checkpoint that verifies, and what was found on the way.
#[derive(Debug)]
pub struct Found {
    /// The checkpoint and its file.
    pub newest: Option<(PathBuf, Checkpoint)>,
    /// Newer ones that could not be used.
    pub damaged: Vec<CheckpointError>,
}

impl Store {
    /// The store in `folder`, which keeps the newest `kept` (at least two).
    pub fn new(folder: impl Into<PathBuf>, kept: usize) -> Store {
        Store { folder: folder.into(), kept: kept.max(2) }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Saves at `iteration` (batches since the start) and then removes all but the newest.
    pub fn save(&self, iteration: u64, checkpoint: &CheckpointRef) -> Result<Saved, TrainError> {
        files::create_folder(&self.folder)?;
        let saved = save(&self.folder.join(format!("step-{iteration:09}.ckpt")), checkpoint)?;
        for (_, old) in self.list()?.into_iter().skip(self.kept) {
            // Only space is lost when this fails, and the next save tries again.
            let _ = fs::remove_file(old);
        }
        Ok(saved)
    }

    /// The newest checkpoint that verifies.
    pub fn newest(&self) -> Result<Found, TrainError> {
        let mut damaged = Vec::new();
        for (_, path) in self.list()? {
            match load(&path) {
                Ok(checkpoint) => return Ok(Found { newest: Some((path, checkpoint)), damaged }),
                Err(error) => damaged.push(error),
            }
        }
        Ok(Found { newest: None, damaged })
    }

    /// Removes every checkpoint (a run that starts anew in an old folder).
    pub fn clear(&self) -> Result<(), TrainError> {
        for (_, path) in self.list()? {
            fs::remove_file(&path).map_err(|e| TrainError::storage("remove", &path, e))?;
        }
        Ok(())
    }

    /// Checkpoint files, newest first.
    fn list(&self) -> Result<Vec<(u64, PathBuf)>, TrainError> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(TrainError::storage("read folder", &self.folder, e)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(|e| TrainError::storage("read folder", &self.folder, e))?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let number = name.strip_prefix("step-").and_then(|n| n.strip_suffix(".ckpt"));
            if let Some(iteration) = number.and_then(|n| n.parse::<u64>().ok()) {
                found.push((iteration, path));
            }
        }
        found.sort_by(|a, b| b.cmp(a));
        Ok(found)
    }
}

#[cfg(test)]
#[path = "checkpoint_tests.rs"]
mod tests;
