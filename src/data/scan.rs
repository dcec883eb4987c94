//! Looks at every image and label of a split, in parallel.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::dataset::Sample;
use super::index::{self, Entry};
use super::labels::{self, LABEL_BYTES_MAX};
use super::list::label_path;
use super::probe::{Verify, probe};
use super::report::{FINDINGS_MAX, Finding, FindingKind, SplitReport};

/// What a scan depends on besides the files.
#[derive(Clone, Debug)]
pub struct ScanSettings {
    /// Number of classes.
    pub class_count: usize,
    /// Read every class as 0.
    pub single_cls: bool,
    /// How closely images are looked at.
    pub verify: Verify,
    /// Folder for the index; `None` keeps none.
    pub cache_folder: Option<PathBuf>,
}

/// Scans the images of a split and reports on it. Of images that are as the index knows them the result is taken from
/// there.
pub fn scan(
    dataset: &Path,
    split: &str,
    images: &[PathBuf],
    settings: &ScanSettings,
) -> (Vec<Sample>, SplitReport) {
    let label_files: Vec<PathBuf> = images.iter().map(|image| label_path(image)).collect();
    let described = format!("{} {} {:?}", settings.class_count, settings.single_cls, settings.verify);
    let stamps = index::stamps(images, &label_files);
    let cache = settings.cache_folder.as_ref().map(|folder| index::path_in(folder, dataset, split));
    let index = cache.as_ref().and_then(|path| index::load(path, &described));
    let has_index = index.is_some();
    let mut known = index.unwrap_or_default();
    let found: Vec<Option<Entry>> = stamps.iter().map(|stamp| known.remove(stamp)).collect();
    let scanned = found.iter().filter(|entry| entry.is_none()).count();
    let entries: Vec<Entry> = (images, &label_files, found)
        .into_par_iter()
        .map(|(image, label, entry)| entry.unwrap_or_else(|| look(image, label, settings)))
        .collect();
    if let Some(path) = cache.filter(|_| !has_index || scanned > 0 || !known.is_empty()) {
        index::store(&path, &described, &stamps, &entries);
    }
    gather(split, images, entries, settings.class_count, (scanned, has_index && scanned == 0))
}

/// Looks at one image and its label file.
fn look(image: &Path, label_file: &Path, settings: &ScanSettings) -> Entry {
    let dropped = |findings: Vec<Finding>, file: &Path, reason: String| {
        let mut findings = findings;
        findings.push(Finding::new(file, 0, FindingKind::ImageDropped, reason));
        Entry { size: None, labels: Vec::new(), label_missing: false, findings }
    };
    let facts = match probe(image, settings.verify) {
        Ok(facts) => facts,
        Err(error) => return dropped(Vec::new(), image, reason_of(&error)),
    };
    let size = Some((facts.width, facts.height));
    let bytes = match std::fs::metadata(label_file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Entry { size, labels: Vec::new(), label_missing: true, findings: Vec::new() };
        }
        Ok(meta) if meta.len() > LABEL_BYTES_MAX => {
            let reason = format!("its label file has {} bytes; allowed: {LABEL_BYTES_MAX}", meta.len());
            return dropped(Vec::new(), image, reason);
        }
        Ok(_) | Err(_) => std::fs::read(label_file),
    };
    let bytes = match bytes {
        Ok(bytes) => bytes,
        Err(error) => {
            return dropped(
                Vec::new(),
                image,
                format!("its label file {} cannot be read: {error}", label_file.display()),
            );
        }
    };
    let parsed = labels::parse(label_file, &bytes, settings.class_count, settings.single_cls);
    if parsed.rows > 0 && parsed.labels.is_empty() {
        // To train on it as background would teach that its objects are not there.
        let reason = format!("none of the {} lines of its label file can be used", parsed.rows);
        return dropped(parsed.findings, image, reason);
    }
    Entry { size, labels: parsed.labels, label_missing: false, findings: parsed.findings }
}

/// The reason without the path, which the finding carries already.
fn reason_of(error: &super::DataError) -> String {
    match error {
        super::DataError::Image { reason, .. } => reason.clone(),
        super::DataError::Read { source, .. } => format!("cannot be read: {source}"),
        other => other.to_string(),
    }
}

fn gather(
    split: &str,
    images: &[PathBuf],
    entries: Vec<Entry>,
    class_count: usize,
    (images_scanned, from_cache): (usize, bool),
) -> (Vec<Sample>, SplitReport) {
    let mut report = SplitReport {
        split: split.to_owned(),
        images_found: images.len(),
        images_scanned,
        from_cache,
        ..Default::default()
    };
    let mut samples = Vec::with_capacity(images.len());
    for (path, entry) in images.iter().zip(entries) {
        for finding in entry.findings {
            match finding.kind {
                FindingKind::BoxDropped => report.boxes_dropped += 1,
                FindingKind::BoxClipped => report.boxes_clipped += 1,
                FindingKind::DuplicateRemoved => report.duplicates_removed += 1,
                FindingKind::ImageDropped | FindingKind::Note => {}
            }
            if report.findings.len() < FINDINGS_MAX {
                report.findings.push(finding);
            } else {
                report.findings_uncounted += 1;
            }
        }
        let Some((width, height)) = entry.size else {
            report.images_dropped += 1;
            continue;
        };
        report.labels_missing += usize::from(entry.label_missing);
        report.labels_empty += usize::from(!entry.label_missing && entry.labels.is_empty());
        samples.push(Sample { path: path.clone(), width, height, labels: entry.labels });
    }
    summarise(&samples, class_count, &mut report);
    (samples, report)
}

/// Fills in the counts that depend on the labels in use.
pub(super) fn summarise(samples: &[Sample], class_count: usize, report: &mut SplitReport) {
    report.images_kept = samples.len();
    report.boxes = samples.iter().map(|s| s.labels.len()).sum();
    report.boxes_per_image_max = samples.iter().map(|s| s.labels.len()).max().unwrap_or(0);
    report.class_counts = vec![0; class_count];
    report.class_images = vec![0; class_count];
    report.box_sizes = [0; 10];
    for sample in samples {
        let mut seen: Vec<u32> = Vec::new();
        for label in &sample.labels {
            let class = label.class as usize;
            report.class_counts[class] += 1;
            if !seen.contains(&label.class) {
                seen.push(label.class);
                report.class_images[class] += 1;
            }
            let side = (label.cxcywh[2] * label.cxcywh[3]).sqrt();
            report.box_sizes[((side * 10.0) as usize).min(9)] += 1;
        }
    }
    let area = |s: &&Sample| u64::from(s.width) * u64::from(s.height);
    report.image_sizes = samples
        .iter()
        .min_by_key(area)
        .zip(samples.iter().max_by_key(area))
        .map(|(small, large)| [(small.height, small.width), (large.height, large.width)]);
}
