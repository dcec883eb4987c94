//! Counting what a dataset holds.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::{ASPECT_BINS, Duplicates, EXAMPLES_MAX, REACH_BINS, SIDE_BINS, SplitMetadata};
use crate::data::dataset::Sample;
use crate::data::report::{FindingKind, SplitReport};
use crate::data::{DataError, Split, decode};

/// Counts of one split. `folder` is what file names are shortened by.
pub(super) fn split(split: &Split, report: &SplitReport, folder: &Path) -> SplitMetadata {
    let mut out = SplitMetadata {
        images: split.len(),
        images_dropped: report.images_dropped,
        labels_missing: report.labels_missing,
        labels_empty: report.labels_empty,
        boxes: report.boxes,
        boxes_dropped: report.boxes_dropped,
        boxes_clipped: report.boxes_clipped,
        boxes_per_image_max: report.boxes_per_image_max,
        class_counts: report.class_counts.clone(),
        class_images: report.class_images.clone(),
        side_bins: vec![0; SIDE_BINS],
        aspect_bins: vec![0; ASPECT_BINS],
        reach_bins: vec![0; REACH_BINS],
        ..SplitMetadata::default()
    };
    let dropped = report.findings.iter().filter(|finding| finding.kind == FindingKind::ImageDropped);
    out.dropped_examples = dropped
        .take(EXAMPLES_MAX)
        .map(|finding| format!("{}: {}", shown(&finding.file, folder), finding.reason))
        .collect();
    let mut sides: Vec<f64> = Vec::with_capacity(report.boxes);
    for sample in split.samples.iter() {
        boxes(sample, &mut out, &mut sides);
    }
    sides.sort_by(f64::total_cmp);
    let ppm = |share: f64| quantile(&sides, share).map_or(0, |side| (side * 1e6).round() as u32);
    [out.side_p10_ppm, out.side_p50_ppm, out.side_p90_ppm] = [ppm(0.1), ppm(0.5), ppm(0.9)];
    let mut longer: Vec<u32> = split.samples.iter().map(|s| s.width.max(s.height)).collect();
    longer.sort_unstable();
    let pixels = |share: f64| quantile(&longer, share).unwrap_or(0);
    [out.longer_min_px, out.longer_p50_px, out.longer_max_px] = [pixels(0.0), pixels(0.5), pixels(1.0)];
    out
}

/// The smallest value that at least this share of the (sorted) values does not exceed.
fn quantile<T: Copy>(sorted: &[T], share: f64) -> Option<T> {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

/// Adds the boxes of one image: side (square root of the area) as a share of the image's longer side, and form.
fn boxes(sample: &Sample, out: &mut SplitMetadata, sides: &mut Vec<f64>) {
    let (width, height) = (f64::from(sample.width), f64::from(sample.height));
    let longer = width.max(height);
    for label in &sample.labels {
        let (w, h) = (f64::from(label.cxcywh[2]) * width, f64::from(label.cxcywh[3]) * height);
        let side = (w * h).sqrt() / longer;
        sides.push(side);
        out.side_bins[side_bin(side)] += 1;
        out.aspect_bins[aspect_bin(w / h)] += 1;
        out.reach_bins[reach_bin(side)] += 1;
        out.widest_ppm = out.widest_ppm.max((w.max(h) / longer * 1e6).round() as u32);
    }
}

/// Octaves: bin 0 holds sides from a half on, bin 1 from a quarter on, the last everything below.
fn side_bin(side: f64) -> usize {
    ((-side.log2()).ceil() - 1.0).clamp(0.0, (SIDE_BINS - 1) as f64) as usize
}

/// Octaves around the square: below 1/8, 1/8 to 1/4, ... 4 to 8, above.
fn aspect_bin(aspect: f64) -> usize {
    (aspect.log2().floor() + 4.0).clamp(0.0, (ASPECT_BINS - 1) as f64) as usize
}

/// Bin `k` holds the boxes that measure 8 pixels first at an input of `32 (k + 1)` pixels.
fn reach_bin(side: f64) -> usize {
    let steps = (8.0 / (32.0 * side)).ceil();
    // Also where a side is so small that the quotient is infinite.
    if steps <= REACH_BINS as f64 { (steps as usize).saturating_sub(1) } else { REACH_BINS - 1 }
}

/// A file's name below `folder`.
fn shown(file: &Path, folder: &Path) -> String {
    file.strip_prefix(folder).unwrap_or(file).display().to_string()
}

/// Images with equal bytes. Only files of equal size are read.
pub(super) fn duplicates(train: &Split, val: &Split, folder: &Path) -> Result<Duplicates, DataError> {
    let paths: Vec<(&Path, bool)> = [(train, false), (val, true)]
        .into_iter()
        .flat_map(|(split, is_val)| split.samples.iter().map(move |s| (s.path.as_path(), is_val)))
        .collect();
    let sizes: Vec<u64> =
        paths.par_iter().map(|(path, _)| std::fs::metadata(path).map_or(0, |meta| meta.len())).collect();
    let mut of_size: HashMap<u64, usize> = HashMap::new();
    sizes.iter().for_each(|size| *of_size.entry(*size).or_default() += 1);
    let hashes = paths
        .par_iter()
        .zip(&sizes)
        .map(|((path, _), size)| {
            let is_alone = of_size.get(size).is_none_or(|count| *count < 2);
            if is_alone {
                Ok(None)
            } else {
                decode::read_limited(path).map(|b| Some(Sha256::digest(b).into()))
            }
        })
        .collect::<Result<Vec<Option<[u8; 32]>>, DataError>>()?;
    let mut out = Duplicates::default();
    let mut first_of: HashMap<[u8; 32], (&Path, bool)> = HashMap::new();
    let mut crossed: HashMap<[u8; 32], PathBuf> = HashMap::new();
    for (&(path, is_val), hash) in paths.iter().zip(&hashes) {
        let Some(hash) = hash else { continue };
        let Some(&(first, first_is_val)) = first_of.get(hash) else {
            first_of.insert(*hash, (path, is_val));
            continue;
        };
        if first == path {
            // Both splits name the same file.
            out.across += usize::from(is_val != first_is_val);
        } else if is_val && !first_is_val {
            out.across += 1;
            // A second copy within val is counted there too.
            if crossed.insert(*hash, path.to_owned()).is_some() {
                out.within_val += 1;
            }
        } else if is_val {
            out.within_val += 1;
        } else {
            out.within_train += 1;
        }
        let examples = if is_val && !first_is_val { &mut out.across_examples } else { &mut out.examples };
        if examples.len() < EXAMPLES_MAX {
            examples.push([shown(first, folder), shown(path, folder)]);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_hold_what_they_say() {
        assert_eq!([1.0, 0.5, 0.4999, 0.25, 1e-9].map(side_bin), [0, 0, 1, 1, SIDE_BINS - 1]);
        assert_eq!([0.1, 0.125, 0.9, 1.0, 7.9, 8.0, 1e9].map(aspect_bin), [0, 1, 3, 4, 6, 7, 7]);
        // 8 pixels of 32 are a quarter of the side; a tenth measures 8 pixels at 80, and so first at 96.
        assert_eq!(
            [1.0, 0.25, 0.2499, 0.1, 8.0 / 640.0, 1e-12, 0.0].map(reach_bin),
            [0, 0, 1, 2, 19, 59, 59]
        );
        assert_eq!(quantile(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 0.1), Some(1));
        assert_eq!(quantile(&[1, 2, 3], 0.5), Some(2));
        assert_eq!((quantile(&[1, 2, 3], 1.0), quantile::<u8>(&[], 0.5)), (Some(3), None));
    }
}
