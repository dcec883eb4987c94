//! The folder of a run: `args.yaml`, `results.csv`, `events.jsonl`, `weights/`, `state/`, plots.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::args::TrainArgs;
use super::error::TrainError;
use super::event::{SessionEvent, Stamped};
use super::files;

/// Names tried for one folder before giving up.
const NAMES_MAX: u32 = 100_000;

/// An open run folder.
pub struct RunFolder {
    path: PathBuf,
    events: File,
}

impl RunFolder {
    /// Claims a folder for a run in the foreground: `<project>/<name>`, by default `runs/detect/train`;
    /// when that exists `-2`, `-3` and so on, unless `exist_ok`.
    ///
    /// # Errors
    /// [`TrainError::Storage`].
    pub fn claim(project: Option<&str>, name: Option<&str>, exist_ok: bool) -> Result<PathBuf, TrainError> {
        let project = Path::new(project.unwrap_or("runs/detect"));
        let name = name.unwrap_or("train");
        files::create_folder(project)?;
        for number in 1..=NAMES_MAX {
            let folder = match number {
                1 => project.join(name),
                _ => project.join(format!("{name}-{number}")),
            };
            // Creating is the claim: two runs that start together get two folders.
            match fs::create_dir(&folder) {
                Ok(()) => return Ok(folder),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && exist_ok && folder.is_dir() => {
                    return Ok(folder);
                }
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(TrainError::storage("create folder", folder, e)),
            }
        }
        let source = std::io::Error::other(format!("{NAMES_MAX} folders of this name exist"));
        Err(TrainError::storage("create folder", project.join(name), source))
    }

    /// The newest folder of that name (`<name>`, `<name>-2`, ...) that holds checkpoints.
    pub fn newest(project: Option<&str>, name: Option<&str>) -> Option<PathBuf> {
        let project = Path::new(project.unwrap_or("runs/detect"));
        let name = name.unwrap_or("train");
        let mut found: Vec<(u32, PathBuf)> = Vec::new();
        for entry in fs::read_dir(project).ok()?.flatten() {
            let text = entry.file_name().to_string_lossy().into_owned();
            let Some(rest) = text.strip_prefix(name) else { continue };
            let number =
                if rest.is_empty() { Some(1) } else { rest.strip_prefix('-').and_then(|n| n.parse().ok()) };
            if let Some(number) = number.filter(|_| entry.path().join("state").is_dir()) {
                found.push((number, entry.path()));
            }
        }
        found.into_iter().max().map(|(_, path)| path)
    }

    /// Opens the folder, creating what is missing.
    ///
    /// # Errors
    /// [`TrainError::Storage`].
    pub fn open(path: &Path) -> Result<RunFolder, TrainError> {
        files::create_folder(&path.join("weights"))?;
        let events = path.join("events.jsonl");
        let file = OpenOptions::new().create(true).append(true).open(&events);
        let file = file.map_err(|e| TrainError::storage("open", &events, e))?;
        Ok(RunFolder { path: path.to_owned(), events: file })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A weights file: `last`, `best`, `epoch<n>`.
    pub fn weights(&self, name: &str) -> PathBuf {
        self.path.join("weights").join(format!("{name}.safetensors"))
    }

    /// The folder of the checkpoints.
    pub fn state(&self) -> PathBuf {
        self.path.join("state")
    }

    /// Writes `args.yaml`.
    pub fn write_args(&self, args: &TrainArgs) -> Result<(), TrainError> {
        let text = args.to_yaml();
        files::write_atomically(&self.file("args.yaml"), |out| out.write_all(text.as_bytes()))
    }

    /// Writes `results.csv` whole: the rows that the run has, none twice, whatever the file held.
    pub fn write_results(&self, columns: &[String], rows: &[String]) -> Result<(), TrainError> {
        files::write_atomically(&self.file("results.csv"), |out| {
            writeln!(out, "{}", columns.join(","))?;
            rows.iter().try_for_each(|row| writeln!(out, "{row}"))
        })
    }

    /// Appends to `events.jsonl`, one line in one write.
    pub fn log(&mut self, event: &SessionEvent) -> Result<(), TrainError> {
        let line = serde_json::to_string(&Stamped::now(event.clone()));
        let line = line.map_err(|e| TrainError::Internal { message: format!("event as JSON: {e}") })?;
        let written = self.events.write_all(format!("{line}\n").as_bytes());
        written.map_err(|e| TrainError::storage("write", self.file("events.jsonl"), e))
    }
}

/// Columns of `results.csv` for a detector whose optimiser has `groups` groups.
pub fn columns(groups: usize) -> Vec<String> {
    let fixed = [
        "epoch",
        "time",
        "train/box_loss",
        "train/cls_loss",
        "train/dfl_loss",
        "metrics/precision(B)",
        "metrics/recall(B)",
        "metrics/mAP50(B)",
        "metrics/mAP50-95(B)",
        "val/box_loss",
        "val/cls_loss",
        "val/dfl_loss",
    ];
    fixed.into_iter().map(str::to_owned).chain((0..groups).map(|i| format!("lr/pg{i}"))).collect()
}

/// The names of the four metrics of a detector, as in `results.csv`.
pub const METRIC_NAMES: [&str; 4] =
    ["metrics/precision(B)", "metrics/recall(B)", "metrics/mAP50(B)", "metrics/mAP50-95(B)"];

/// Rounded to five decimals, as losses and metrics are reported.
pub fn round5(value: f64) -> f64 {
    (value * 1e5).round_ties_even() / 1e5
}

/// A number as C's `%.6g` prints it: six significant digits, no trailing zeros, an exponent below 1e-4
/// and from 1e6 on.
pub fn format_g6(value: f64) -> String {
    if value == 0.0 {
        return if value.is_sign_negative() { "-0".into() } else { "0".into() };
    }
    if !value.is_finite() {
        return if value.is_nan() { "nan".into() } else { format!("{value}") };
    }
    let scientific = format!("{value:.5e}");
    let (mantissa, exponent) = scientific.split_once('e').expect("this format has an exponent");
    let exponent: i32 = exponent.parse().expect("the exponent is a small integer");
    if (-4..6).contains(&exponent) {
        let decimals = (5 - exponent) as usize;
        return trim_zeros(&format!("{value:.decimals$}")).to_owned();
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{}e{sign}{:02}", trim_zeros(mantissa), exponent.abs())
}

fn trim_zeros(text: &str) -> &str {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_print_as_in_c() {
        let table = [
            (0.0, "0"),
            (1.0, "1"),
            (100000.0, "100000"),
            (1000000.0, "1e+06"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (0.000119, "0.000119"),
            (2.345678912, "2.34568"),
            (1.23456789e-7, "1.23457e-07"),
            (123456.7, "123457"),
            (999999.5, "1e+06"),
            (0.1 + 0.2, "0.3"),
            (-2.5, "-2.5"),
            (12.30001, "12.3"),
        ];
        for (value, expected) in table {
            assert_eq!(format_g6(value), expected);
        }
    }

    #[test]
    fn folders_are_claimed_once() {
        let root = tempfile::tempdir().expect("a folder");
        let project = root.path().join("runs");
        let project = project.to_str().expect("plain text");
        let claim = |name, ok| RunFolder::claim(Some(project), name, ok).expect("claimed");
        assert_eq!(claim(None, false), Path::new(project).join("train"));
        assert_eq!(claim(None, false), Path::new(project).join("train-2"));
        assert_eq!(claim(None, false), Path::new(project).join("train-3"));
        assert_eq!(claim(None, true), Path::new(project).join("train"));
        assert_eq!(claim(Some("x"), true), Path::new(project).join("x"));
        fs::write(Path::new(project).join("file"), b"").expect("written");
        assert_eq!(claim(Some("file"), true), Path::new(project).join("file-2"));
    }

    #[test]
    fn results_are_rewritten_whole() {
        let root = tempfile::tempdir().expect("a folder");
        let folder = RunFolder::open(root.path()).expect("opened");
        let columns = columns(3);
        folder.write_results(&columns, &["1,a".into(), "2,b".into(), "3,c".into()]).expect("written");
        folder.write_results(&columns, &["1,a".into()]).expect("written");
        let text = fs::read_to_string(folder.file("results.csv")).expect("read");
        assert_eq!(text.lines().count(), 2);
        assert!(text.starts_with("epoch,time,train/box_loss"));
        assert!(text.lines().next().expect("a header").ends_with("lr/pg0,lr/pg1,lr/pg2"));
    }
}
