//! `boxwright dataset check|stats|synth|preview`: what a dataset holds, what is wrong with it, and how it looks.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;

use crate::data::augment::{AugmentArgs, PixelBox};
use crate::data::config::{DataConfig, find_file};
use crate::data::draw::{DrawBox, DrawImage, MosaicArgs, mosaic};
use crate::data::probe::Verify;
use crate::data::synth::{Format, SynthArgs, provide_shapes, write_dataset};
use crate::data::{
    DataError, Dataset, DatasetOptions, DatasetReport, LoaderArgs, Split, SplitName, TrainLoader, decode,
    stats,
};
use crate::engine::rng::{Rng, Use};

/// Findings that `check` prints unless all are asked for.
const FINDINGS_SHOWN: usize = 50;

/// Arguments of `dataset`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Look at every image and label; print each fault with file, line and reason
    ///
    /// Exit code 0 when everything can be used, 1 when images or boxes were left out or the dataset cannot be used, 2
    /// when the dataset file is missing or faulty.
    Check(CheckArgs),
    /// Count images, classes and box sizes
    Stats(StatsArgs),
    /// Make a synthetic dataset of coloured shapes
    Synth(SynthCommand),
    /// Draw images with their boxes into one picture
    Preview(PreviewArgs),
}

#[derive(Debug, clap::Args)]
struct CheckArgs {
    /// Dataset file, or a folder that holds one
    data: PathBuf,
    /// Only look at headers and file structure instead of decoding every image
    #[arg(long)]
    fast: bool,
    /// Print all findings
    #[arg(long)]
    all: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct StatsArgs {
    /// Dataset file, or a folder that holds one
    data: PathBuf,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct SynthCommand {
    /// Folder to make
    out: PathBuf,
    /// Training images
    #[arg(long, default_value_t = 256)]
    images: usize,
    /// Validation images [default: a quarter of the training images]
    #[arg(long)]
    val_images: Option<usize>,
    /// Side of the images, pixels
    #[arg(long, default_value_t = 160)]
    imgsz: usize,
    /// Seed; the same seed gives the same files
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write PNG instead of JPEG
    #[arg(long)]
    png: bool,
}

#[derive(Debug, clap::Args)]
struct PreviewArgs {
    /// Dataset file, or a folder that holds one
    data: PathBuf,
    /// Picture to write; the suffix picks the format
    #[arg(long, default_value = "preview.png")]
    out: PathBuf,
    /// Split to show: train, val, test or minival
    #[arg(long, default_value = "train", value_parser = ["train", "val", "test", "minival"])]
    split: String,
    /// Images to show
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=400))]
    count: u16,
    /// Images per row [default: a square]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    columns: usize,
    /// Seed that picks the images
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Show the images as training sees them, augmented, at this input size
    #[arg(long, value_name = "IMGSZ")]
    augmented: Option<usize>,
}

/// Runs the command.
///
/// # Errors
/// [`DataError`]; those for which [`DataError::is_usage`] holds stand for exit code 2.
pub fn run(args: Args) -> Result<ExitCode, DataError> {
    match args.command {
        Command::Check(args) => check(&args),
        Command::Stats(args) => statistics(&args),
        Command::Synth(args) => synth(&args),
        Command::Preview(args) => preview(&args),
    }
}

/// Opens every split that the dataset file defines.
fn open_all(data: &Path, options: DatasetOptions) -> Result<Dataset, DataError> {
    provide_shapes(data, &options.shapes)?;
    let config = DataConfig::read(&find_file(data)?, &options.paths)?;
    let mut splits = vec![SplitName::Train, SplitName::Val];
    splits.extend((!config.test.is_empty()).then_some(SplitName::Test));
    splits.extend((!config.minival.is_empty()).then_some(SplitName::Minival));
    Dataset::open(data, &DatasetOptions { splits, ..options })
}

fn check(args: &CheckArgs) -> Result<ExitCode, DataError> {
    let options = DatasetOptions {
        verify: if args.fast { Verify::Structure } else { Verify::Decode },
        find_equal_images: true,
        ..DatasetOptions::default()
    };
    let report = open_all(&args.data, options)?.report;
    if args.json {
        print_json(&report);
    } else {
        print_findings(&report, args.all);
    }
    Ok(ExitCode::from(u8::from(report.has_losses())))
}

fn print_findings(report: &DatasetReport, all: bool) {
    let found = report.findings().count();
    let limit = if all { found } else { FINDINGS_SHOWN };
    for finding in report.findings().take(limit) {
        println!("{finding}");
    }
    let hidden =
        found.saturating_sub(limit) + report.splits.iter().map(|s| s.findings_uncounted).sum::<usize>();
    if hidden > 0 {
        println!("... and {hidden} more (--all shows them)");
    }
    for (first, second) in &report.equal_images {
        println!("{}: note: equal to {}", second.display(), first.display());
    }
    for note in &report.notes {
        println!("note: {note}");
    }
    for sentence in report.sentences() {
        println!("{sentence}");
    }
}

fn statistics(args: &StatsArgs) -> Result<ExitCode, DataError> {
    let report = open_all(&args.data, DatasetOptions::default())?.report;
    if args.json {
        print_json(&report);
    } else {
        print!("{}", stats::text(&report));
    }
    Ok(ExitCode::SUCCESS)
}

fn print_json(report: &DatasetReport) {
    println!("{}", serde_json::to_string(report).expect("a report has string keys and finite numbers only"));
}

fn synth(args: &SynthCommand) -> Result<ExitCode, DataError> {
    let made = SynthArgs {
        images: args.images,
        val_images: args.val_images.unwrap_or(args.images.div_ceil(4)),
        imgsz: args.imgsz,
        seed: args.seed,
        format: if args.png { Format::Png } else { Format::Jpeg },
    };
    write_dataset(&args.out, &made)?;
    println!("{}: {} + {} images of {} px", args.out.display(), made.images, made.val_images, made.imgsz);
    Ok(ExitCode::SUCCESS)
}

fn preview(args: &PreviewArgs) -> Result<ExitCode, DataError> {
    let name = SplitName::from_key(&args.split).unwrap_or(SplitName::Train);
    let dataset =
        Dataset::open(&args.data, &DatasetOptions { splits: vec![name], ..DatasetOptions::default() })?;
    let split = dataset.split(name)?;
    let images = match args.augmented {
        Some(imgsz) => augmented_images(split, imgsz, args)?,
        None => plain_images(split, args)?,
    };
    let picture =
        mosaic(&images, &dataset.names, MosaicArgs { columns: args.columns, ..MosaicArgs::default() });
    picture
        .save(&args.out)
        .map_err(|e| DataError::Write { path: args.out.clone(), source: std::io::Error::other(e) })?;
    println!("{}: {} images of split `{}`", args.out.display(), images.len(), name.key());
    Ok(ExitCode::SUCCESS)
}

fn plain_images(split: &Split, args: &PreviewArgs) -> Result<Vec<DrawImage>, DataError> {
    let mut order: Vec<usize> = (0..split.len()).collect();
    Rng::new(args.seed, Use::Shuffle, 0, 0).shuffle(&mut order);
    order
        .iter()
        .take(usize::from(args.count))
        .map(|&i| {
            let sample = &split.samples[i];
            let image = decode::decode_file(&sample.path)?;
            let (w, h) = (image.width as f32, image.height as f32);
            let boxes = sample.labels.iter().map(|l| PixelBox::from_cxcywh(l.class, l.cxcywh, w, h));
            Ok(draw_image(image.pixels, image.width, image.height, boxes, &sample.path))
        })
        .collect()
}

fn augmented_images(split: &Split, imgsz: usize, args: &PreviewArgs) -> Result<Vec<DrawImage>, DataError> {
    let loader_args = LoaderArgs { imgsz, batch: 1, seed: args.seed, ..LoaderArgs::default() };
    let mut loader = TrainLoader::new(split, loader_args, AugmentArgs::default())?;
    loader.start_epoch(0, 0, false);
    let mut out = Vec::new();
    while out.len() < usize::from(args.count)
        && let Some(batch) = loader.next()?
    {
        let (w, h) = (batch.w as f32, batch.h as f32);
        let boxes = batch.targets.iter().map(|t| PixelBox::from_cxcywh(t.class, t.cxcywh, w, h));
        let path = &split.samples[batch.samples[0] as usize].path;
        out.push(draw_image(batch.image(0).to_vec(), batch.w, batch.h, boxes, path));
        loader.recycle(batch);
    }
    Ok(out)
}

fn draw_image(
    pixels: Vec<u8>,
    width: usize,
    height: usize,
    boxes: impl Iterator<Item = PixelBox>,
    path: &Path,
) -> DrawImage {
    let image =
        image::RgbImage::from_raw(width as u32, height as u32, pixels).expect("three bytes per pixel");
    let boxes = boxes.map(|b| DrawBox { xyxy: b.xyxy, class: b.class as usize, score: None }).collect();
    let title = path.file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned());
    DrawImage { image, boxes, title }
}
