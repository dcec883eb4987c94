//! Label files: one box (or polygon) per line.
//!
//! `class cx cy w h` with the four numbers as fractions of the image, or `class x1 y1 x2 y2 x3 y3 ...`, a polygon whose
//! bounding box is taken. Every line is judged on its own: a small overshoot is clipped, a bad line is dropped, and
//! both are reported with file, line and reason.

use std::collections::HashSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::report::{Finding, FindingKind};

/// Coordinates may leave 0..1 by this much and are then clipped; beyond it the box is dropped.
pub const OVERSHOOT_MAX: f32 = 0.01;
/// Largest label file, bytes.
pub const LABEL_BYTES_MAX: u64 = 64 << 20;
/// A field is shown in a message up to this many characters.
const SHOWN_MAX: usize = 40;

/// One labelled object.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Label {
    /// Class index.
    pub class: u32,
    /// Centre and size as fractions of the image, each in 0..1.
    pub cxcywh: [f32; 4],
}

/// What a label file gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ParsedLabels {
    /// The boxes that can be used, in the order of the file, each once.
    pub labels: Vec<Label>,
    /// What was found wrong.
    pub findings: Vec<Finding>,
    /// Lines that are not blank.
    pub rows: usize,
}

/// Parses a label file. `class_count` is the number of classes; with `single_cls` any class is read as 0.
pub fn parse(file: &Path, bytes: &[u8], class_count: usize, single_cls: bool) -> ParsedLabels {
    let mut out = ParsedLabels::default();
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        out.rows = 1;
        out.findings.push(Finding::new(
            file,
            1,
            FindingKind::BoxDropped,
            "the file is UTF-16; allowed: UTF-8",
        ));
        return out;
    }
    let (mut boxes, mut polygons) = (0usize, 0usize);
    let mut seen = HashSet::new();
    for (i, line) in bytes.split(|&b| b == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        out.rows += 1;
        let mut drop = |reason: String| {
            out.findings.push(Finding::new(file, i + 1, FindingKind::BoxDropped, reason));
        };
        let Ok(text) = std::str::from_utf8(line) else {
            drop("the line is not UTF-8".to_owned());
            continue;
        };
        match parse_line(text, class_count, single_cls) {
            Err(reason) => drop(reason),
            Ok(row) => {
                if row.polygon {
                    polygons += 1
                } else {
                    boxes += 1
                }
                if !seen.insert((row.label.class, row.label.cxcywh.map(f32::to_bits))) {
                    let reason = "the same row stands above";
                    out.findings.push(Finding::new(file, i + 1, FindingKind::DuplicateRemoved, reason));
                    continue;
                }
                if let Some(reason) = row.clipped {
                    out.findings.push(Finding::new(file, i + 1, FindingKind::BoxClipped, reason));
                }
                out.labels.push(row.label);
            }
        }
    }
    if boxes > 0 && polygons > 0 {
        let reason =
            format!("{boxes} lines hold boxes and {polygons} hold polygons; each was read as what it is");
        out.findings.push(Finding::new(file, 0, FindingKind::Note, reason));
    }
    out
}

struct Row {
    label: Label,
    polygon: bool,
    clipped: Option<String>,
}

fn shown(text: &str) -> String {
    let cut: String = text.chars().take(SHOWN_MAX).collect();
    if cut.len() < text.len() { format!("{cut:?}...") } else { format!("{cut:?}") }
}

fn parse_line(text: &str, class_count: usize, single_cls: bool) -> Result<Row, String> {
    let fields: Vec<&str> = text.split_ascii_whitespace().collect();
    let polygon = fields.len() > 6;
    if fields.len() != 5 && (!polygon || fields.len().is_multiple_of(2)) {
        return Err(format!(
            "{} columns; allowed: 5 (class cx cy w h), or an odd number from 7 (class x1 y1 x2 y2 x3 y3 ...)",
            fields.len()
        ));
    }
    let class = parse_class(fields[0], class_count, single_cls)?;
    let mut numbers = Vec::with_capacity(fields.len() - 1);
    for field in &fields[1..] {
        let number: f32 = field.parse().map_err(|_| format!("{} is not a number", shown(field)))?;
        if !number.is_finite() {
            return Err(format!("{} is not a finite number", shown(field)));
        }
        numbers.push(number);
    }
    if !polygon && (numbers[2] <= 0.0 || numbers[3] <= 0.0) {
        return Err(format!("size {} x {}; allowed: above 0", numbers[2], numbers[3]));
    }
    let mut clipped = None;
    for (number, field) in numbers.iter_mut().zip(&fields[1..]) {
        let inside = number.clamp(0.0, 1.0);
        if (*number - inside).abs() > OVERSHOOT_MAX * 1.000_1 {
            return Err(format!("{} lies outside 0..1 by more than {OVERSHOOT_MAX}", shown(field)));
        }
        if *number != inside {
            clipped = Some(format!("{} was clipped to {inside}", shown(field)));
        }
        *number = inside;
    }
    let cxcywh =
        if polygon { bounding_box(&numbers) } else { [numbers[0], numbers[1], numbers[2], numbers[3]] };
    if cxcywh[2] <= 0.0 || cxcywh[3] <= 0.0 {
        return Err("the polygon has no area".to_owned());
    }
    Ok(Row { label: Label { class, cxcywh }, polygon, clipped })
}

fn parse_class(field: &str, class_count: usize, single_cls: bool) -> Result<u32, String> {
    let class: f64 = field.parse().map_err(|_| format!("class {} is not a number", shown(field)))?;
    if class.fract() != 0.0 || !(0.0..4e9).contains(&class) {
        return Err(format!("class {} is not a whole number from 0", shown(field)));
    }
    if single_cls {
        return Ok(0);
    }
    if class >= class_count as f64 {
        return Err(format!(
            "class {class} is out of range; allowed: 0 to {}",
            class_count.saturating_sub(1)
        ));
    }
    Ok(class as u32)
}

/// Centre and size of the smallest upright box around points (x, y, x, y, ...).
fn bounding_box(points: &[f32]) -> [f32; 4] {
    let (mut low, mut high) = ([f32::INFINITY; 2], [f32::NEG_INFINITY; 2]);
    for point in points.as_chunks::<2>().0 {
        for axis in 0..2 {
            low[axis] = low[axis].min(point[axis]);
            high[axis] = high[axis].max(point[axis]);
        }
    }
    [(low[0] + high[0]) / 2.0, (low[1] + high[1]) / 2.0, high[0] - low[0], high[1] - low[1]]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reasons(text: &[u8]) -> (usize, Vec<(usize, FindingKind, String)>) {
        let parsed = parse(Path::new("a.txt"), text, 3, false);
        (parsed.labels.len(), parsed.findings.into_iter().map(|f| (f.line, f.kind, f.reason)).collect())
    }

    #[test]
    fn a_bad_line_costs_only_itself() {
        let text = b"\xef\xbb\xbf0 0.5 0.5 0.2 0.2\r\n\n0 0.5 0.5 0.2\n1 nan 0.5 0.2 0.2\n3 0.5 0.5 0.2 0.2\n\
            1 1.005 0.5 0.2 0.2\n1 1.05 0.5 0.2 0.2\n1 0.5 0.5 0 0.2\n1 0.5 0.5 -0.1 0.2\n0.5 0.5 0.5 0.1 0.1\n\
            x 0.5 0.5 0.1 0.1\n2 0.5 \xff 0.1 0.1\n0 0.5 0.5 0.2 0.2\n-1 0.5 0.5 0.1 0.1\n2 0.1 0.1 0.3 0.1 0.3 0.4\n";
        let (kept, findings) = reasons(text);
        assert_eq!(kept, 3, "{findings:?}");
        let lines: Vec<usize> = findings.iter().map(|f| f.0).collect();
        assert_eq!(lines, [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0]);
        assert!(findings[0].2.starts_with("4 columns"));
        assert!(findings[1].2.contains("\"nan\""));
        assert!(findings[2].2.contains("class 3 is out of range; allowed: 0 to 2"));
        assert_eq!(findings[3].1, FindingKind::BoxClipped);
        assert_eq!(findings[10].1, FindingKind::DuplicateRemoved);
        assert_eq!(findings[12].1, FindingKind::Note);
        let labels = parse(Path::new("a"), text, 3, false).labels;
        assert_eq!(labels[1].cxcywh, [1.0, 0.5, 0.2, 0.2]);
        let [cx, cy, w, h] = labels[2].cxcywh;
        assert!((cx - 0.2).abs() + (cy - 0.25).abs() + (w - 0.2).abs() + (h - 0.3).abs() < 1e-6);
    }

    #[test]
    fn single_class_takes_any_class() {
        let parsed = parse(Path::new("a"), b"77 0.5 0.5 0.1 0.1", 1, true);
        assert_eq!(parsed.labels[0].class, 0);
        assert!(parsed.findings.is_empty());
        assert_eq!(reasons(b"\xff\xfe0\x00").1.len(), 1);
    }

    proptest! {
        #[test]
        fn any_bytes_give_boxes_in_range_or_findings(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let parsed = parse(Path::new("f"), &bytes, 5, false);
            prop_assert!(parsed.labels.len() <= parsed.rows);
        }

        #[test]
        fn any_numbers_give_boxes_in_range_or_findings(
            rows in proptest::collection::vec((0i32..6, proptest::array::uniform4(-0.1f32..1.2)), 0..8)
        ) {
            let text: String = rows.iter().map(|(c, v)| format!("{c} {} {} {} {}\n", v[0], v[1], v[2], v[3])).collect();
            let parsed = parse(Path::new("f"), text.as_bytes(), 5, false);
            prop_assert_eq!(parsed.rows, rows.len());
            for label in &parsed.labels {
                prop_assert!(label.class < 5);
                prop_assert!(label.cxcywh.iter().all(|v| (0.0..=1.0).contains(v)));
                prop_assert!(label.cxcywh[2] > 0.0 && label.cxcywh[3] > 0.0);
            }
            let dropped = parsed.findings.iter().filter(|f| f.kind != FindingKind::BoxClipped).count();
            prop_assert_eq!(parsed.labels.len() + dropped, rows.len());
        }
    }
}
