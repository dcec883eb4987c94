//! What a dataset is like, in numbers, worked out once and kept: the ground that recommendations stand on.
//!
//! [`describe`] answers from the cache while the [`fingerprint`] is the same, for seven days; otherwise it opens the
//! dataset (whose index rescans changed images only), counts, and keeps the result. All numbers are whole, so that
//! what comes from the cache equals what went in.

mod identity;
mod measure;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::index::default_cache_folder;
use super::shelf::{SecondTier, Shelf, now_unix_ms};
use super::{DataError, Dataset, DatasetOptions, SplitName};

pub use identity::{fingerprint, val_fingerprint, val_fingerprint_of};

/// Changes when the meaning of the numbers changes; a part of the key.
const VERSION: u32 = 1;
/// How long the numbers are kept.
pub const LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);
/// Bins of [`SplitMetadata::side_bins`].
pub const SIDE_BINS: usize = 10;
/// Bins of [`SplitMetadata::aspect_bins`].
pub const ASPECT_BINS: usize = 8;
/// Bins of [`SplitMetadata::reach_bins`]: input sizes up to 1920 pixels.
pub const REACH_BINS: usize = 60;
/// Files named as examples.
const EXAMPLES_MAX: usize = 10;

/// What one split holds. The side of a box is the square root of its area.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitMetadata {
    /// Images that can be used.
    pub images: usize,
    /// Images that cannot: cut short, damaged, or with labels of which no line can be used.
    pub images_dropped: usize,
    /// The first of those, with the reason.
    pub dropped_examples: Vec<String>,
    /// Used images without a label file.
    pub labels_missing: usize,
    /// Used images whose label file holds no box.
    pub labels_empty: usize,
    /// Used boxes.
    pub boxes: usize,
    /// Boxes left out as faulty.
    pub boxes_dropped: usize,
    /// Boxes cut to lie within their image.
    pub boxes_clipped: usize,
    /// Largest number of boxes in one image.
    pub boxes_per_image_max: usize,
    /// Boxes of each class.
    pub class_counts: Vec<usize>,
    /// Images that hold each class.
    pub class_images: Vec<usize>,
    /// Boxes by side as a share of the image's longer side, in octaves: from 1/2 on, from 1/4, ... ; the last bin holds
    /// everything below 1/512.
    pub side_bins: Vec<usize>,
    /// Boxes by width over height: below 1/8, from 1/8, 1/4, 1/2, 1, 2, 4, from 8.
    pub aspect_bins: Vec<usize>,
    /// Boxes by the input size at which they first measure 8 pixels: bin `k` is `32 (k + 1)` pixels; the last bin
    /// also holds those that never do.
    pub reach_bins: Vec<usize>,
    /// Side that a tenth of the boxes does not exceed, millionths of the image's longer side.
    pub side_p10_ppm: u32,
    /// The median side.
    pub side_p50_ppm: u32,
    /// Side that nine tenths do not exceed.
    pub side_p90_ppm: u32,
    /// The longest width or height of a box, millionths of the image's longer side.
    pub widest_ppm: u32,
    /// Longer side of the smallest image, pixels.
    pub longer_min_px: u32,
    /// The median longer side.
    pub longer_p50_px: u32,
    /// Longer side of the largest image.
    pub longer_max_px: u32,
}

impl SplitMetadata {
    /// Mean number of boxes of an image.
    pub fn boxes_per_image(&self) -> f64 {
        self.boxes as f64 / self.images.max(1) as f64
    }

    /// Boxes that measure less than 8 pixels at an input of `imgsz`, a multiple of 32 below 1920.
    pub fn tiny_boxes(&self, imgsz: usize) -> usize {
        self.reach_bins.iter().skip(imgsz / 32).sum()
    }

    /// Images without any box.
    pub fn unlabelled(&self) -> usize {
        self.labels_missing + self.labels_empty
    }
}

/// Images of equal bytes; the later ones are counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Duplicates {
    /// Training images that equal an earlier training image.
    pub within_train: usize,
    /// Validation images that equal an earlier validation image.
    pub within_val: usize,
    /// Validation images that equal a training image.
    pub across: usize,
    /// Some of the pairs within a split.
    pub examples: Vec<[String; 2]>,
    /// Some of the pairs across: training image, validation image.
    pub across_examples: Vec<[String; 2]>,
}

/// What a dataset is like.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Which data, see [`fingerprint`].
    pub fingerprint: String,
    /// Which validation data, see [`val_fingerprint`].
    pub val_fingerprint: String,
    /// Class names.
    pub names: Vec<String>,
    /// What is trained on.
    pub train: SplitMetadata,
    /// What is measured on.
    pub val: SplitMetadata,
    /// Equal images.
    pub duplicates: Duplicates,
    /// How long the counting took, milliseconds: what a hit saves.
    pub counted_in_ms: u64,
}

/// Metadata, and where it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Described {
    /// The numbers.
    pub metadata: Metadata,
    /// Whether they were known.
    pub is_hit: bool,
    /// Images that were looked at this time.
    pub images_scanned: usize,
}

/// Where caches lie for these options; `None` when none is wanted.
pub fn cache_folder(options: &DatasetOptions) -> Option<PathBuf> {
    (!options.no_index).then(|| options.cache_folder.clone().unwrap_or_else(default_cache_folder))
}

/// Describes the training and validation splits of a dataset. The splits that `options` names do not matter. With
/// `fresh` what is cached is not read, but replaced.
///
/// # Errors
/// As [`Dataset::open`]; an image vanished meanwhile.
pub fn describe(
    data: &Path,
    options: &DatasetOptions,
    second: Option<&dyn SecondTier>,
    fresh: bool,
) -> Result<Described, DataError> {
    let started = Instant::now();
    let fingerprint = fingerprint(data, options)?;
    let folder = cache_folder(options);
    let shelf = folder.as_ref().map(|folder| Shelf::new(folder, "metadata", LIFETIME, second));
    let key = format!("{fingerprint}:{VERSION}");
    let known = shelf.as_ref().filter(|_| !fresh).and_then(|shelf| shelf.get(&key, now_unix_ms()));
    if let Some(metadata) = known.filter(|metadata: &Metadata| is_whole(metadata, &fingerprint)) {
        tracing::info!(cache = "hit", fingerprint, saved_ms = metadata.counted_in_ms, "dataset metadata");
        return Ok(Described { metadata, is_hit: true, images_scanned: 0 });
    }
    let splits = vec![SplitName::Train, SplitName::Val];
    let dataset = Dataset::open(data, &DatasetOptions { splits, ..options.clone() })?;
    let mut metadata = count(&dataset)?;
    metadata.val_fingerprint = val_fingerprint_of(data, options, SplitName::Val)?;
    metadata.fingerprint = fingerprint;
    metadata.counted_in_ms = started.elapsed().as_millis() as u64;
    let images_scanned = dataset.report.splits.iter().map(|split| split.images_scanned).sum();
    if let Some(shelf) = &shelf {
        shelf.put(&key, &metadata, now_unix_ms());
    }
    let (fingerprint, took_ms) = (&metadata.fingerprint, metadata.counted_in_ms);
    tracing::info!(cache = "miss", fingerprint, images_scanned, took_ms, "dataset metadata");
    Ok(Described { metadata, is_hit: false, images_scanned })
}

/// Counts an opened dataset with its training and validation split; the fingerprints are left empty.
///
/// # Errors
/// A split is missing; an image vanished meanwhile.
pub fn count(dataset: &Dataset) -> Result<Metadata, DataError> {
    let folder = &dataset.config.root;
    let of = |name: SplitName| -> Result<(SplitMetadata, &super::Split), DataError> {
        let split = dataset.split(name)?;
        let report = dataset.report.splits.iter().find(|report| report.split == name.key());
        Ok((measure::split(split, report.unwrap_or(&Default::default()), folder), split))
    };
    let ((train, train_split), (val, val_split)) = (of(SplitName::Train)?, of(SplitName::Val)?);
    let duplicates = measure::duplicates(train_split, val_split, folder)?;
    let names = dataset.names.clone();
    Ok(Metadata { names, train, val, duplicates, ..Metadata::default() })
}

/// Whether the lists have the lengths and sums that everything else relies on. What other machines share may be
/// anything.
fn is_whole(metadata: &Metadata, fingerprint: &str) -> bool {
    let classes = metadata.names.len();
    let adds_up = |counts: &[usize], length: usize, sum: usize| {
        counts.len() == length && counts.iter().try_fold(0usize, |a, n| a.checked_add(*n)) == Some(sum)
    };
    metadata.fingerprint == fingerprint
        && [&metadata.train, &metadata.val].iter().all(|split| {
            adds_up(&split.class_counts, classes, split.boxes)
                && adds_up(&split.side_bins, SIDE_BINS, split.boxes)
                && adds_up(&split.aspect_bins, ASPECT_BINS, split.boxes)
                && adds_up(&split.reach_bins, REACH_BINS, split.boxes)
                && split.class_images.len() == classes
                && split.labels_missing.checked_add(split.labels_empty).is_some_and(|n| n <= split.images)
        })
}
