//! `boxwright profile`: where the time of a training step goes on a GPU.

use std::process::ExitCode;
use std::sync::Arc;

use super::CliError;
use super::bench::parse_amp;
use crate::engine::device::cuda::cache;
use crate::train::args::{Amp, Device};
use crate::train::bench::StepBench;
use crate::train::device;
use crate::train::profile::{StepProfile, profile, tune};
use crate::train::session::Compute;

/// Times every kernel and layer of a training step on a GPU, and holds them against what the chip can give.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The model.
    #[arg(default_value = "yolov8n")]
    pub model: String,
    /// Classes.
    #[arg(long, default_value_t = 80)]
    pub nc: usize,
    /// Side of the square input, pixels; a multiple of 32.
    #[arg(long, default_value_t = 640)]
    pub imgsz: usize,
    /// Images of a batch.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: u32,
    /// Boxes of an image.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub boxes: u32,
    /// cuda or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "cuda")]
    pub device: Device,
    /// Precision: true (mixed), false (f32), bf16, fp16 or fp32.
    #[arg(long, default_value = "true", value_parser = parse_amp)]
    pub amp: Amp,
    /// Steps before the clock starts.
    #[arg(long, default_value_t = 5)]
    pub warmup: u32,
    /// Timed steps.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub steps: u32,
    /// First time the best few cuts of every convolution, and keep the fastest for new runs of this shape.
    #[arg(long)]
    pub tune: bool,
    /// Rows of each table.
    #[arg(long, default_value_t = 25)]
    pub rows: usize,
    /// One JSON object with every row.
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// No GPU, an unknown model, memory refused.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    let failed = |e| CliError::usage_from("the step cannot be profiled", e);
    let compute = device::open(args.device, args.amp, 0).map_err(failed)?;
    let Compute::Cuda { device, precision } = compute else {
        return Err(CliError::usage("a profile is taken on a GPU; `bench step` times the CPU"));
    };
    let bench = StepBench {
        model: args.model.clone(),
        nc: args.nc,
        imgsz: args.imgsz,
        batch: args.batch as usize,
        boxes: args.boxes as usize,
        warmup: args.warmup as usize,
        steps: args.steps as usize,
    };
    if args.tune {
        let compute = Compute::Cuda { device: Arc::clone(&device), precision };
        let tuned = tune(&bench, &compute).map_err(failed)?;
        if !args.json {
            println!("{} convolutions measured, kept below {}", tuned, cache::folder().display());
        }
    }
    let profile = profile(&bench, &device, precision).map_err(failed)?;
    if args.json {
        println!("{}", serde_json::to_string(&profile).map_err(|e| CliError::usage(e.to_string()))?);
    } else {
        print(&args, &profile);
    }
    Ok(ExitCode::SUCCESS)
}

fn print(args: &Args, p: &StepProfile) {
    println!("{} at {} px, batch {}, {} on {}", args.model, args.imgsz, args.batch, p.precision, p.device);
    if p.emulated {
        println!("this device is an emulation on the CPU: no time below means anything");
    }
    let mathematics =
        p.ceilings.flops_per_s.map_or("not used".to_owned(), |f| format!("{:.0} TFLOP/s", f / 1e12));
    println!("ceilings: memory {:.0} GB/s, mma.sync {mathematics}", p.ceilings.bytes_per_s / 1e9);
    let images = f64::from(args.batch) / p.step_ms * 1e3;
    println!(
        "step {:.3} ms = {images:.0} images/s; kernels one by one {:.3} ms; floor of forward and backward {:.3} ms",
        p.step_ms, p.kernels_ms, p.floor_ms
    );
    println!("memory held {:.1} MiB", p.held_bytes as f64 / f64::from(1u32 << 20));
    println!("\n{:<46} {:>8} {:>10} {:>6}", "kernel", "launches", "ms", "share");
    for row in p.kernels.iter().take(args.rows) {
        let share = 100.0 * row.ms / p.kernels_ms;
        println!("{:<46} {:>8} {:>10.4} {share:>5.1}%", row.kernel, row.launches, row.ms);
    }
    println!(
        "\n{:<28} {:<9} {:>9} {:>9} {:>7} {:>9} {:>9}",
        "layer", "pass", "ms", "floor ms", "times", "GB/s", "TFLOP/s"
    );
    for row in p.layers.iter().take(args.rows) {
        let (bandwidth, flops) = (row.bytes as f64 / row.ms / 1e6, row.flops as f64 / row.ms / 1e9);
        println!(
            "{:<28} {:<9} {:>9.4} {:>9.4} {:>7.1} {bandwidth:>9.0} {flops:>9.1}",
            row.layer,
            row.pass,
            row.ms,
            row.floor_ms,
            row.ms / row.floor_ms.max(1e-9)
        );
    }
}
