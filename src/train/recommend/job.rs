//! A recommendation as a job that can be submitted.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::Recommendation;

/// Longest task id made of a name, characters.
const NAME_MAX: usize = 80;

/// The job as YAML, with the reasons as comments above it where they are wanted. `data` is where the data lie and
/// `fingerprint` what they are; `device` is written when it is given.
pub fn yaml(
    (data, fingerprint): (&Path, &str),
    recommended: &Recommendation,
    device: Option<&str>,
    with_reasons: bool,
) -> String {
    let Recommendation { goal, imgsz, model, batch, epochs, warm_start, warnings, lines } = recommended;
    let mut out = format!("# Recommended by `boxwright recommend` for the goal {}.\n", goal.word());
    for line in lines.iter().filter(|_| with_reasons) {
        out.push_str(&comment(&format!("{}: {}", line.key, line.because)));
    }
    for warning in warnings.iter().filter(|_| with_reasons) {
        out.push_str(&comment(&format!("warning: {warning}")));
    }
    out.push_str(&format!(
        "model: {model}\ntype: yolo\ntask_id: {}_{}_{}\ntrain:\n  data: {}\n  imgsz: {imgsz}\n  batch: {batch}\n  \
         epochs: {epochs}\n",
        name_of(data),
        goal.word(),
        digits(fingerprint, recommended),
        quoted(&data.to_string_lossy())
    ));
    if let Some(warm) = warm_start {
        out.push_str(&format!("  pretrained: {}\n", quoted(&warm.weights.to_string_lossy())));
    }
    if let Some(device) = device {
        out.push_str(&format!("  device: {}\n", quoted(device)));
    }
    out
}

/// What tells this job from another on data of this name: the same data and values have the same digits. A job of the same
/// name would replace what is stored of the other, which may be the one that it starts from.
fn digits(fingerprint: &str, recommended: &Recommendation) -> String {
    let Recommendation { imgsz, model, batch, epochs, warm_start, .. } = recommended;
    let warm = warm_start.as_ref().map(|warm| (warm.task_id.as_str(), warm.map.to_bits()));
    let hash = Sha256::digest(format!("{fingerprint}\n{imgsz} {model} {batch} {epochs} {warm:?}"));
    hash[..4].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One line, whatever names and paths hold.
fn comment(text: &str) -> String {
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    format!("# {line}\n")
}

/// A text in JSON's quotes, which YAML reads alike.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// What to call a job on this data: the dataset file's name, or its folder's where the file has the usual one.
fn name_of(data: &Path) -> String {
    let part = |part: Option<&std::ffi::OsStr>| part.map(|p| p.to_string_lossy().into_owned());
    let stem = if data.is_dir() { part(data.file_name()) } else { part(data.file_stem()) };
    let is_usual = stem.as_deref().is_some_and(|stem| ["data", "dataset"].contains(&stem));
    let folder = data.parent().and_then(|folder| part(folder.file_name()));
    let name = if is_usual { folder.or(stem) } else { stem };
    let allowed = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let name: String = name.unwrap_or_default().chars().map(allowed).take(NAME_MAX).collect();
    if name.chars().any(|c| c.is_ascii_alphanumeric()) { name } else { "data".to_owned() }
}
