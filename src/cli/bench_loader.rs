//! `boxwright bench loader`: decoding and augmentation, images per second.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use serde_json::json;

use crate::data::augment::AugmentArgs;
use crate::data::cache::{CacheArgs, CacheMode};
use crate::data::{DataError, Dataset, DatasetOptions, LoaderArgs, SplitName, TrainLoader};

/// Arguments of `bench loader`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Dataset file, or a folder that holds one
    #[arg(long)]
    pub data: PathBuf,
    /// Network input size in pixels, a multiple of 32
    #[arg(long, default_value_t = 640)]
    pub imgsz: usize,
    /// Images per batch
    #[arg(long, default_value_t = 16)]
    pub batch: usize,
    /// Loader threads; 0 makes the batches on the measuring thread, which gives the speed of one core
    #[arg(long, default_value_t = 0)]
    pub workers: usize,
    /// Timed passes over the training images, after one that is not timed
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub epochs: u32,
    /// Probability of a mosaic
    #[arg(long, default_value_t = 1.0)]
    pub mosaic: f64,
    /// Keep decoded images in memory (`ram`), on disk (`disk`), or only the recent ones (`recent`)
    #[arg(long, default_value = "recent", value_parser = ["recent", "ram", "disk"])]
    pub cache: String,
    /// Decode each image anew once per pass although it may be kept: decoding and augmentation are both measured
    #[arg(long)]
    pub decode_always: bool,
    /// Print one line of JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs the benchmark.
///
/// # Errors
/// [`DataError`] when the dataset cannot be opened or an image cannot be read.
pub fn run(args: Args) -> Result<ExitCode, DataError> {
    let options = DatasetOptions { splits: vec![SplitName::Train], ..DatasetOptions::default() };
    let dataset = Dataset::open(&args.data, &options)?;
    let mode = match args.cache.as_str() {
        "ram" => CacheMode::Ram,
        "disk" => CacheMode::Disk,
        _ => CacheMode::Recent,
    };
    let loader_args = LoaderArgs {
        imgsz: args.imgsz,
        batch: args.batch,
        workers: args.workers,
        cache: CacheArgs { mode, ..CacheArgs::default() },
        decode_always: args.decode_always,
        ..LoaderArgs::default()
    };
    let augment = AugmentArgs { mosaic: args.mosaic, ..AugmentArgs::default() };
    let mut loader = TrainLoader::new(dataset.split(SplitName::Train)?, loader_args, augment)?;
    let (mut speeds, mut per_cpu) = (Vec::new(), Vec::new());
    for epoch in 0..=args.epochs {
        let (begun, cpu_begun) = (Instant::now(), processor_seconds());
        let mut images = 0;
        loader.start_epoch(epoch, 0, false);
        while let Some(batch) = loader.next()? {
            images += batch.n;
            loader.recycle(batch);
        }
        if epoch > 0 {
            speeds.push(images as f64 / begun.elapsed().as_secs_f64());
            per_cpu.push(images as f64 / (processor_seconds() - cpu_begun));
        }
    }
    let (median, cpu_median) = (median(&speeds), median(&per_cpu));
    if args.json {
        let line = json!({
            "loader": "boxwright", "imgsz": args.imgsz, "batch": args.batch, "workers": args.workers,
            "epochs": args.epochs, "mosaic": args.mosaic, "cache": args.cache, "decode_always": args.decode_always,
            "img_s": tenths(median), "img_s_per_core": tenths(cpu_median),
            "img_s_each": speeds.iter().map(|&v| tenths(v)).collect::<Vec<_>>(),
        });
        println!("{line}");
    } else {
        println!(
            "{median:.0} images/s at {} px; {cpu_median:.0} per second of processor time (medians of {} passes)",
            args.imgsz, args.epochs
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// Processor time of all threads so far: unlike the clock on the wall it does not count what other programs take.
fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the result; the clock exists on every Unix.
    let status = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    assert_eq!(status, 0, "the processor clock can be read");
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
