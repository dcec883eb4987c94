//! `boxwright bench`: figures that anyone can measure again.

use std::process::ExitCode;

use super::CliError;
use crate::train::args::{Amp, Device};
use crate::train::bench::{StepBench, StepTimes};
use crate::train::device;

/// Measures speed on this machine.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// What to measure.
    #[command(subcommand)]
    pub what: What,
}

/// What to measure.
#[derive(clap::Subcommand, Debug)]
pub enum What {
    /// Training steps on random images, no data loading.
    Step(StepArgs),
    /// Decoding and augmentation of a dataset, no training.
    Loader(super::bench_loader::Args),
    /// Reaction of the service: dropped file to first step, stop file to cancelled, idle cost.
    Reaction(super::bench_reaction::Args),
    /// Jobs a second through the shared queue or the folder, with a trainer that does nothing.
    Queue(super::bench_queue::Args),
}

/// Arguments of `bench step`.
#[derive(clap::Args, Debug)]
pub struct StepArgs {
    /// Model name.
    #[arg(long, default_value = "yolov8n")]
    pub model: String,
    /// Classes.
    #[arg(long, default_value_t = 80)]
    pub nc: usize,
    /// Side of the square input, pixels; a multiple of 32.
    #[arg(long, default_value_t = 320)]
    pub imgsz: usize,
    /// Images of a batch.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub batch: u32,
    /// Boxes of an image.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub boxes: u32,
    /// Threads; 0 for all cores.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// cpu, cuda or cuda:N; the best device there is when not given.
    #[arg(long, value_name = "DEVICE", default_value = "", hide_default_value = true)]
    pub device: Device,
    /// Precision on a GPU: true (mixed), false (f32), bf16, fp16 or fp32.
    #[arg(long, default_value = "true", value_parser = parse_amp)]
    pub amp: Amp,
    /// Steps before the clock starts.
    #[arg(long, default_value_t = 3)]
    pub warmup: u32,
    /// Timed steps.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub steps: u32,
    /// One line of JSON.
    #[arg(long)]
    pub json: bool,
}

/// `amp` as it is written in a job.
pub(super) fn parse_amp(text: &str) -> Result<Amp, String> {
    let json = match text {
        "true" | "false" => serde_json::Value::Bool(text == "true"),
        other => serde_json::Value::from(other),
    };
    Amp::try_from(json)
}

/// Runs the command.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    match args.what {
        What::Step(args) => step(args),
        What::Reaction(args) => super::bench_reaction::run(args),
        What::Queue(args) => super::bench_queue::run(args),
        What::Loader(args) => super::bench_loader::run(args).map_err(CliError::from),
    }
}

fn step(args: StepArgs) -> Result<ExitCode, CliError> {
    let failed = |e| CliError::usage_from("the device cannot be used", e);
    let compute = device::open(args.device, args.amp, args.threads).map_err(failed)?;
    let bench = StepBench {
        model: args.model.clone(),
        nc: args.nc,
        imgsz: args.imgsz,
        batch: args.batch as usize,
        boxes: args.boxes as usize,
        warmup: args.warmup as usize,
        steps: args.steps as usize,
    };
    let times = bench.run(&compute).map_err(|e| CliError::usage_from("the steps could not be timed", e))?;
    let mut sorted = times.seconds.clone();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let median =
        if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 };
    let img_s = bench.batch as f64 / median;
    let peak_mib = peak_mib().unwrap_or(f64::NAN);
    if args.json {
        let line = serde_json::json!({
            "model": args.model, "imgsz": args.imgsz, "batch": args.batch, "threads": times.threads,
            "steps": args.steps, "img_s": round(img_s, 2), "median_ms": round(median * 1e3, 2),
            "min_ms": round(sorted[0] * 1e3, 2), "max_ms": round(sorted[sorted.len() - 1] * 1e3, 2),
            "peak_mib": round(peak_mib, 1), "simd": crate::engine::simd::level().name(),
            "parts_ms": parts(&times).into_iter().map(|(k, v)| (k, round(v, 2).into())).collect::<serde_json::Map<_, _>>(),
        });
        println!("{line}");
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{} at {} px, batch {}, {} threads, {}",
        args.model,
        args.imgsz,
        args.batch,
        times.threads,
        crate::engine::simd::level().name()
    );
    println!(
        "  {img_s:.1} images/s, step {:.1} ms (median of {}; {:.1} to {:.1})",
        median * 1e3,
        sorted.len(),
        sorted[0] * 1e3,
        sorted[sorted.len() - 1] * 1e3
    );
    // Forward, data gradient and weight gradient: three times the forward products, two operations each.
    let flops = 6.0 * times.macs as f64 * bench.batch as f64;
    println!("  {:.0} GFLOP/s over the whole step, peak memory {peak_mib:.0} MiB", flops / median / 1e9);
    for (what, ms) in parts(&times) {
        println!("  {what:<28} {ms:>8.2} ms  {:>5.1} %", 0.1 * ms / median);
    }
    Ok(ExitCode::SUCCESS)
}

/// Milliseconds of each kind of work, mean over the timed steps.
fn parts(times: &StepTimes) -> Vec<(String, f64)> {
    let steps = times.seconds.len() as f64;
    let engine = times
        .profile
        .rows
        .iter()
        .map(|(what, time, _)| ((*what).to_owned(), time.as_secs_f64() * 1e3 / steps));
    let rest = [("loss", times.loss_seconds), ("clip, optimiser, average", times.optimiser_seconds)];
    engine.chain(rest.map(|(what, s)| (what.to_owned(), s * 1e3 / steps))).collect()
}

fn round(x: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (x * scale).round() / scale
}

/// Largest resident memory of this process so far.
fn peak_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<f64>().ok().map(|kib| kib / 1024.0)
}
