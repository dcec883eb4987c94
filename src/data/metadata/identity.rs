//! Which data it is: two hashes.
//!
//! [`fingerprint`] tells whether anything changed on this machine: class names, and of every image of train and val the
//! name, size and time of change, and those of its label file. [`val_fingerprint`] tells whether two runs were measured
//! on the same images and labels, on whatever machine: class names, and of every image the name, its size in bytes and
//! the content of its label file. Names count from the folder that all images of a split have in common, so a dataset
//! that was moved or is mounted elsewhere stays what it is.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::data::config::{DataConfig, find_file};
use crate::data::dataset::split_images;
use crate::data::index::{default_cache_folder, hex, size_and_time};
use crate::data::labels::LABEL_BYTES_MAX;
use crate::data::list::label_path;
use crate::data::shelf::{Shelf, now_unix_ms};
use crate::data::{DataError, DatasetOptions, SplitName, synth};

/// Changes when the meaning of a fingerprint changes.
const VERSION: u32 = 1;
/// How long the fingerprint of a validation set is remembered for files that have not changed.
const VAL_LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);

/// The images of one split, by path.
struct Listed {
    name: SplitName,
    images: Vec<PathBuf>,
}

/// The fingerprint of training and validation data: 64 hexadecimal digits. Looks at no file's content.
///
/// # Errors
/// [`DataError`]: the dataset file is missing or faulty, a place does not exist, a folder cannot be read.
pub fn fingerprint(data: &Path, options: &DatasetOptions) -> Result<String, DataError> {
    let (config, splits) = list(data, options, &[SplitName::Train, SplitName::Val])?;
    let mut hash = Sha256::new();
    hash.update(format!("boxwright data {VERSION}\n{}\n", view(&config, options)));
    for split in &splits {
        hash.update(format!("{}\n", split.name.key()));
        state_of(split, &mut hash);
    }
    Ok(hex(&hash.finalize()))
}

/// The identity of the validation images and labels of a dataset: 64 hexadecimal digits, equal on all machines.
///
/// # Errors
/// As [`fingerprint`], or a label file cannot be read.
pub fn val_fingerprint(data: &Path) -> Result<String, DataError> {
    val_fingerprint_of(data, &DatasetOptions::default(), SplitName::Val)
}

/// [`val_fingerprint`] of the split that a run measures on, and of what it sees of it: `single_cls`, `classes` and
/// `fraction` count. Label files that did not change since the last time are not read again.
///
/// # Errors
/// As [`val_fingerprint`].
pub fn val_fingerprint_of(
    data: &Path,
    options: &DatasetOptions,
    split: SplitName,
) -> Result<String, DataError> {
    let (config, mut splits) = list(data, options, &[split])?;
    let Some(listed) = splits.pop() else { return Ok(String::new()) };
    let view = view(&config, options);
    let mut state = Sha256::new();
    state.update(format!("boxwright val {VERSION}\n{view}\n"));
    // Not only the relative names: two sets may have been made in the same nanosecond.
    let folder = common_folder(&listed.images);
    let whole = std::path::absolute(&folder).unwrap_or(folder);
    state.update(whole.as_os_str().as_encoded_bytes());
    state_of(&listed, &mut state);
    let key = hex(&state.finalize());
    let folder = options.cache_folder.clone().unwrap_or_else(default_cache_folder);
    let shelf = Shelf::new(&folder, "val-fingerprint", VAL_LIFETIME, None);
    let now = now_unix_ms();
    if let Some(known) = (!options.no_index).then(|| shelf.get(&key, now)).flatten() {
        return Ok(known);
    }
    let found = content_of(&listed, &view)?;
    if !options.no_index {
        shelf.put(&key, &found, now);
    }
    Ok(found)
}

/// What of the labels is used and how it is called.
fn view(config: &DataConfig, options: &DatasetOptions) -> String {
    let names: String = config.names.iter().map(|name| format!("{} {name}\n", name.len())).collect();
    let part = if options.single_cls { "one class\n" } else { "" };
    match &options.classes {
        Some(classes) => format!("{names}{part}classes {classes:?}\n"),
        None => format!("{names}{part}"),
    }
}

fn list(
    data: &Path,
    options: &DatasetOptions,
    names: &[SplitName],
) -> Result<(DataConfig, Vec<Listed>), DataError> {
    synth::provide_shapes(data, &options.shapes)?;
    let config = DataConfig::read(&find_file(data)?, &options.paths)?;
    let list = |&name: &SplitName| Ok(Listed { name, images: split_images(&config, name, options)? });
    let splits = names.iter().map(list).collect::<Result<Vec<Listed>, DataError>>()?;
    Ok((config, splits))
}

/// The deepest folder that holds all images.
fn common_folder(images: &[PathBuf]) -> PathBuf {
    let mut folder = images.first().and_then(|image| image.parent()).unwrap_or(Path::new("")).to_owned();
    for image in images {
        while !image.starts_with(&folder) && folder.pop() {}
    }
    folder
}

fn relative<'p>(image: &'p Path, folder: &Path) -> &'p [u8] {
    image.strip_prefix(folder).unwrap_or(image).as_os_str().as_encoded_bytes()
}

/// Adds names, sizes and times of the images and label files.
fn state_of(split: &Listed, hash: &mut Sha256) {
    let folder = common_folder(&split.images);
    let states: Vec<[Option<(u64, u128)>; 2]> = split
        .images
        .par_iter()
        .map(|image| [size_and_time(image), size_and_time(&label_path(image))])
        .collect();
    for (image, state) in split.images.iter().zip(states) {
        hash.update(relative(image, &folder));
        hash.update(format!("\n{state:?}\n"));
    }
}

/// Hash of names, image sizes and label contents.
fn content_of(split: &Listed, view: &str) -> Result<String, DataError> {
    let folder = common_folder(&split.images);
    let parts: Vec<[u8; 32]> =
        split.images.par_iter().map(|image| part_of(image, &folder)).collect::<Result<_, DataError>>()?;
    let mut hash = Sha256::new();
    hash.update(format!("boxwright val content {VERSION}\n{view}\n"));
    parts.iter().for_each(|part| hash.update(part));
    Ok(hex(&hash.finalize()))
}

fn part_of(image: &Path, folder: &Path) -> Result<[u8; 32], DataError> {
    let mut hash = Sha256::new();
    hash.update(relative(image, folder));
    let size = std::fs::metadata(image).map_err(|e| DataError::read(image, e))?.len();
    hash.update(format!("\n{size}\n"));
    let label = label_path(image);
    match std::fs::metadata(&label) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => hash.update("no labels"),
        Err(error) => return Err(DataError::read(&label, error)),
        // Too large to be used by anybody; its size says enough.
        Ok(meta) if meta.len() > LABEL_BYTES_MAX => hash.update(format!("{} bytes", meta.len())),
        Ok(_) => {
            let bytes = std::fs::read(&label).map_err(|e| DataError::read(&label, e))?;
            hash.update(format!("labels {}\n", bytes.len()));
            hash.update(bytes);
        }
    }
    Ok(hash.finalize().into())
}
