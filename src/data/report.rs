//! What a dataset holds, and what was found wrong with it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, Serializer};

/// Findings kept per split; further ones are only counted.
pub const FINDINGS_MAX: usize = 10_000;

/// What became of the thing a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// The whole image is left out.
    ImageDropped,
    /// One box is left out.
    BoxDropped,
    /// One box was changed to lie within the image.
    BoxClipped,
    /// A row that stands twice in the file counts once.
    DuplicateRemoved,
    /// Nothing was changed; worth a look.
    Note,
}

impl FindingKind {
    /// The kind in words, as in the report.
    pub fn words(self) -> &'static str {
        match self {
            FindingKind::ImageDropped => "image dropped",
            FindingKind::BoxDropped => "box dropped",
            FindingKind::BoxClipped => "box clipped",
            FindingKind::DuplicateRemoved => "duplicate removed",
            FindingKind::Note => "note",
        }
    }
}

/// A name that is no UTF-8 has replacement characters where that shows: a report is read by people.
fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

fn lossy_pairs<S: Serializer>(pairs: &[(PathBuf, PathBuf)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(pairs.iter().map(|(a, b)| (a.to_string_lossy(), b.to_string_lossy())))
}

/// One thing found wrong, with its place and the reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The image or label file.
    #[serde(serialize_with = "lossy")]
    pub file: PathBuf,
    /// Line, from 1; 0 when the whole file is meant.
    pub line: usize,
    /// What became of it.
    pub kind: FindingKind,
    /// What is wrong, with the value seen.
    pub reason: String,
}

impl Finding {
    /// A finding about a file (`line` 0) or one of its lines.
    pub fn new(file: &Path, line: usize, kind: FindingKind, reason: impl Into<String>) -> Finding {
        Finding { file: file.to_owned(), line, kind, reason: reason.into() }
    }
}

impl std::fmt::Display for Finding {
    /// `file:line: box dropped: reason`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        write!(f, ": {}: {}", self.kind.words(), self.reason)
    }
}

/// What one split holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SplitReport {
    /// Name of the split.
    pub split: String,
    /// Files with an image suffix.
    pub images_found: usize,
    /// Images that can be used.
    pub images_kept: usize,
    /// Images that were left out.
    pub images_dropped: usize,
    /// Used images without a label file.
    pub labels_missing: usize,
    /// Used images whose label file holds no box.
    pub labels_empty: usize,
    /// Used boxes.
    pub boxes: usize,
    /// Boxes left out.
    pub boxes_dropped: usize,
    /// Boxes changed.
    pub boxes_clipped: usize,
    /// Rows removed because they stood twice.
    pub duplicates_removed: usize,
    /// Used boxes of each class.
    pub class_counts: Vec<usize>,
    /// Images that hold each class.
    pub class_images: Vec<usize>,
    /// Used boxes by `sqrt(w * h)` as a fraction of the image, in ten equal bins of 0..1.
    pub box_sizes: [usize; 10],
    /// Largest number of boxes in one image.
    pub boxes_per_image_max: usize,
    /// Smallest and largest image: height and width of each, by area.
    pub image_sizes: Option<[(u32, u32); 2]>,
    /// Findings, in the order of the files.
    pub findings: Vec<Finding>,
    /// Findings beyond [`FINDINGS_MAX`].
    pub findings_uncounted: usize,
    /// Images that were looked at; of the others the index knew everything.
    #[serde(default)]
    pub images_scanned: usize,
    /// Whether everything came from the index.
    pub from_cache: bool,
}

/// What a dataset holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DatasetReport {
    /// Class names.
    pub names: Vec<String>,
    /// One report per split that was read.
    pub splits: Vec<SplitReport>,
    /// Remarks on the dataset file.
    pub notes: Vec<String>,
    /// Images of equal content, by pairs; filled only when it was asked for.
    #[serde(serialize_with = "lossy_pairs")]
    pub equal_images: Vec<(PathBuf, PathBuf)>,
}

impl DatasetReport {
    /// All findings of all splits.
    pub fn findings(&self) -> impl Iterator<Item = &Finding> {
        self.splits.iter().flat_map(|split| &split.findings)
    }

    /// True when an image or a box was left out.
    pub fn has_losses(&self) -> bool {
        self.splits.iter().any(|split| split.images_dropped + split.boxes_dropped > 0)
    }

    /// A sentence for the log, one per split.
    pub fn sentences(&self) -> Vec<String> {
        self.splits
            .iter()
            .map(|s| {
                format!(
                    "{}: {} images ({} dropped, {} without boxes), {} boxes ({} dropped, {} clipped, {} duplicates)",
                    s.split,
                    s.images_kept,
                    s.images_dropped,
                    s.labels_missing + s.labels_empty,
                    s.boxes,
                    s.boxes_dropped,
                    s.boxes_clipped,
                    s.duplicates_removed
                )
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn names_that_are_no_text_are_written_all_the_same() {
        let file = Path::new(std::ffi::OsStr::from_bytes(b"a\xff.jpg"));
        let findings = vec![Finding::new(file, 0, FindingKind::ImageDropped, "cut short")];
        let report = DatasetReport {
            splits: vec![SplitReport { findings, ..SplitReport::default() }],
            equal_images: vec![(file.to_owned(), "b.jpg".into())],
            ..DatasetReport::default()
        };
        let json = serde_json::to_value(&report).expect("JSON");
        assert_eq!(json["splits"][0]["findings"][0]["file"], "a\u{fffd}.jpg");
        assert_eq!(json["equal_images"][0], serde_json::json!(["a\u{fffd}.jpg", "b.jpg"]));
        let back: DatasetReport = serde_json::from_value(json).expect("a report");
        assert_eq!(back.equal_images[0].1, Path::new("b.jpg"));
    }
}
