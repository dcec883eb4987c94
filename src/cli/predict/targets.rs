//! The names of the results, chosen before anything is written, and never those of the user's own files.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Args, PredictError};
use crate::data::list;

/// The file with all results.
pub(super) const ALL: &str = "predictions.json";

/// Stems of the results of the images, in their order: the image's own, or with a number where another image of that
/// name was before it.
pub(super) fn stems(images: &[PathBuf]) -> Vec<String> {
    let mut taken = HashSet::new();
    let free = |path: &PathBuf| {
        let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let mut name = stem.clone();
        let mut number = 2;
        while !taken.insert(name.to_lowercase()) {
            name = format!("{stem}-{number}");
            number += 1;
        }
        name
    };
    images.iter().map(free).collect()
}

/// True for an image whose drawn copy is a JPEG; the others become PNG.
pub(super) fn is_jpeg(image: &Path) -> bool {
    let suffix = image.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    suffix == "jpg" || suffix == "jpeg"
}

/// The drawn copy of an image.
pub(super) fn drawn(folder: &Path, image: &Path, stem: &str) -> PathBuf {
    folder.join(format!("{stem}.{}", if is_jpeg(image) { "jpg" } else { "png" }))
}

/// The label file of an image.
pub(super) fn labels(folder: &Path, stem: &str) -> PathBuf {
    folder.join("labels").join(format!("{stem}.txt"))
}

/// Refuses when a result would be written over what was given: an image, its labels, a list, the weights.
///
/// # Errors
/// [`PredictError::Overwrites`] names the first such file.
pub(super) fn check(
    args: &Args,
    folder: &Path,
    images: &[PathBuf],
    stems: &[String],
) -> Result<(), PredictError> {
    let given = images.iter().cloned().chain(images.iter().map(|image| list::label_path(image)));
    let given = given.chain(args.sources.iter().cloned()).chain([args.weights.clone()]);
    let given: HashSet<_> = given.filter_map(|path| identity(&path)).collect();
    let results = images.iter().zip(stems).flat_map(|(image, stem)| {
        let drawn = (!args.no_draw).then(|| drawn(folder, image, stem));
        let labels = args.save_txt.then(|| labels(folder, stem));
        drawn.into_iter().chain(labels)
    });
    let mut results = results.chain([folder.join(ALL)]);
    match results.find(|path| identity(path).is_some_and(|file| given.contains(&file))) {
        Some(path) => Err(PredictError::Overwrites { path }),
        None => Ok(()),
    }
}

/// The file behind a path, whatever the names, links or letter cases that lead to it; `None` when there is none.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}
