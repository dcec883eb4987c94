//! `boxwright val`: the metrics of a trained detector on a dataset.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::session_console::{metrics_table, speed_line};
use super::train::cli_error;
use super::{CliError, EXIT_STOPPED, signals};
use crate::train::args::{Amp, Device};
use crate::train::session::{ValidateFileArgs, validate_file};

/// Validate a trained detector
#[derive(clap::Args)]
pub struct Args {
    /// Weights, `.safetensors` or `.pt`
    weights: PathBuf,
    /// Dataset YAML or folder
    #[arg(long)]
    data: PathBuf,
    /// Split of the dataset
    #[arg(long, default_value = "val")]
    split: String,
    /// Input size in pixels; that of the training, or 640, when not given
    #[arg(long)]
    imgsz: Option<usize>,
    /// Images per batch
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Score threshold
    #[arg(long, default_value_t = 0.001)]
    conf: f32,
    /// IoU threshold of the suppression
    #[arg(long, default_value_t = 0.7)]
    iou: f64,
    /// Detections kept per image
    #[arg(long, default_value_t = 300)]
    max_det: usize,
    /// Validate on squares instead of rectangles
    #[arg(long)]
    square: bool,
    /// Folder for curves, confusion matrices and pictures of the first batches
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
    /// Write the detections in the COCO results format
    #[arg(long, value_name = "FILE")]
    save_json: Option<PathBuf>,
    /// Loader threads
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// Compute threads; all cores when not given
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// cpu, cuda or cuda:N; the best device there is when not given
    #[arg(long, value_name = "DEVICE", default_value = "", hide_default_value = true)]
    device: Device,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
}

/// Validates and prints the metrics.
///
/// # Errors
/// Weights, data or arguments that cannot be used.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    if args.batch == 0 || !(0.0..=1.0).contains(&args.conf) || !(0.0..=1.0).contains(&args.iou) {
        let message = "allowed: --batch from 1, --conf and --iou from 0 to 1";
        return Err(CliError::usage(message));
    }
    signals::watch();
    let validated = validate_file(
        &ValidateFileArgs {
            weights: args.weights.clone(),
            data: args.data.clone(),
            split: args.split.clone(),
            imgsz: args.imgsz,
            batch: args.batch,
            conf: args.conf,
            iou: args.iou,
            max_det: args.max_det,
            agnostic: false,
            rect: !args.square,
            plots: args.plots.clone(),
            json: args.save_json.clone(),
            workers: args.workers,
            threads: args.threads,
            device: args.device,
            amp: Amp::On,
        },
        &mut signals::asked_to_end,
    )
    .map_err(cli_error)?;
    let Some((validation, names)) = validated else { return Ok(ExitCode::from(EXIT_STOPPED)) };
    let classes = validation.class_figures(&names);
    let m = &validation.metrics;
    let metrics = validation.metric_map();
    if args.json {
        let line = json!({
            "metrics": metrics,
            "fitness": m.fitness,
            "images": m.images,
            "boxes": m.targets,
            "losses": { "box": validation.losses[0], "cls": validation.losses[1], "dfl": validation.losses[2] },
            "speed_ms": validation.speed_ms,
            "seconds": validation.seconds,
            "classes": classes,
        });
        println!("{line}");
    } else {
        println!("{}", metrics_table(m.images, m.targets, &metrics, &classes));
        println!("{}", speed_line(&validation.speed_ms));
    }
    Ok(ExitCode::SUCCESS)
}
