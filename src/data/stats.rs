//! A dataset report as text.

use std::fmt::Write;

use super::report::{DatasetReport, SplitReport};

/// Width of the longest bar.
const BAR: usize = 30;

/// Counts of images, classes and box sizes, one table per split, for a terminal.
pub fn text(report: &DatasetReport) -> String {
    let mut out = String::new();
    for split in &report.splits {
        split_text(report, split, &mut out);
    }
    out
}

fn split_text(report: &DatasetReport, split: &SplitReport, out: &mut String) {
    let backgrounds = split.labels_missing + split.labels_empty;
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "{}: {} images ({} without boxes, {} dropped), {} boxes (at most {} in one image)",
        split.split,
        split.images_kept,
        backgrounds,
        split.images_dropped,
        split.boxes,
        split.boxes_per_image_max
    );
    if let Some([(h0, w0), (h1, w1)]) = split.image_sizes {
        let _ = writeln!(out, "  image sizes: {w0}x{h0} to {w1}x{h1}");
    }
    let widest = report.names.iter().map(|name| name.chars().count()).max().unwrap_or(0).max(5);
    let _ = writeln!(out, "  {:<widest$}  {:>8}  {:>8}", "class", "boxes", "images");
    let most = split.class_counts.iter().copied().max().unwrap_or(0);
    for (name, (&boxes, &images)) in
        report.names.iter().zip(split.class_counts.iter().zip(&split.class_images))
    {
        let _ = writeln!(out, "  {name:<widest$}  {boxes:>8}  {images:>8}  {}", bar(boxes, most));
    }
    let _ = writeln!(out, "  box size (square root of the area, share of the image)");
    let most = split.box_sizes.iter().copied().max().unwrap_or(0);
    for (bin, &count) in split.box_sizes.iter().enumerate() {
        let range = format!("{:.1}..{:.1}", bin as f64 / 10.0, (bin + 1) as f64 / 10.0);
        let _ = writeln!(out, "  {range:<widest$}  {count:>8}  {:>8}  {}", "", bar(count, most));
    }
}

fn bar(count: usize, most: usize) -> String {
    "#".repeat((count * BAR).div_ceil(most.max(1)))
}
