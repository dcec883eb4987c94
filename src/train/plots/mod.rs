//! Plots of a training run as PNG: curves, confusion matrix, label statistics, batches with boxes.
//!
//! Every plot is a function from a plain struct to a picture on disk; the structs are filled by the
//! session and the evaluator. A picture appears whole or not at all (temporary file, then rename).
//! A plot that fails is worth a warning, never the end of a run: the caller decides.
//!
//! The names in a run folder: `results.png`, `BoxPR_curve.png`, `BoxF1_curve.png`, `BoxP_curve.png`,
//! `BoxR_curve.png`, `confusion_matrix.png`, `confusion_matrix_normalized.png`, `labels.png`,
//! `train_batch0.png`, `val_batch0_labels.png`, `val_batch0_pred.png` and so on.

mod axes;
mod batches;
mod confusion;
mod curves;
mod labels;
mod results;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use image::RgbImage;

pub use batches::{BatchPlot, batch};
pub use confusion::{ConfusionPlot, confusion_matrix};
pub use curves::{ClassCurves, CurveKind, CurvesPlot, curve, curves};
pub use labels::{LabelsPlot, labels};
pub use results::{ResultsColumn, ResultsPlot, results};

/// A plot could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    /// The picture could not be written.
    #[error("cannot write plot {path}")]
    Write {
        /// The picture's final path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The picture could not be encoded.
    #[error("cannot encode plot {path}")]
    Encode {
        /// The picture's final path.
        path: PathBuf,
        /// What the encoder said.
        #[source]
        source: image::ImageError,
    },
    /// A table of results could not be read back.
    #[error("cannot read results table {path}, line {line}: {reason}")]
    Table {
        /// The table.
        path: PathBuf,
        /// Line, 1-based; 0 when the file could not be read at all.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
}

/// Encodes `image` as PNG and puts it at `path` in one step: a reader sees the old picture or the new.
///
/// # Errors
/// [`PlotError::Encode`] or [`PlotError::Write`]; the temporary file is removed.
pub fn save_png(image: &RgbImage, path: &Path) -> Result<(), PlotError> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image
        .write_to(&mut bytes, image::ImageFormat::Png)
        .map_err(|source| PlotError::Encode { path: path.to_path_buf(), source })?;
    let write_error = |source| PlotError::Write { path: path.to_path_buf(), source };
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    // The process number keeps two writers of one folder apart.
    let temporary = path.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let written =
        std::fs::write(&temporary, bytes.into_inner()).and_then(|()| std::fs::rename(&temporary, path));
    if let Err(source) = written {
        // The first error is the one to report; a left-over temporary file is only untidy.
        let _ = std::fs::remove_file(&temporary);
        return Err(write_error(source));
    }
    Ok(())
}
