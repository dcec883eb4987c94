//! `boxwright plan`: what a model is and what training it will need, before anything is allocated.

use std::process::ExitCode;
use std::sync::Arc;

use super::CliError;
use crate::detect::losses::detection::LossConfig;
use crate::detect::losses::detection_cuda::{DeviceDetectionLoss, LossCapacity};
use crate::detect::models::Detector;
use crate::engine::device::cuda::executor::DeviceParams;
use crate::engine::device::cuda::{Chip, Precision};
use crate::engine::params::ParamSet;
use crate::engine::plan::{Cost, Mode, Plan, Target};

/// Prints layers, parameters, multiply-accumulates and exact bytes.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The model, for example yolov8n.
    pub model: String,
    /// Side of the square input, pixels; a multiple of 32.
    #[arg(long, default_value_t = 640)]
    pub imgsz: usize,
    /// Images of a batch.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: u32,
    /// Classes.
    #[arg(long, default_value_t = 80)]
    pub nc: usize,
    /// Plan for a GPU that stores activations so: f32, bf16 or fp16; for the CPU when not given.
    #[arg(long, value_name = "PRECISION", value_parser = ["f32", "bf16", "fp16"])]
    pub gpu: Option<String>,
    /// Multiprocessors of that GPU: how far work is split, and so the scratch, depends on them.
    #[arg(long, default_value_t = 132, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub multiprocessors: u32,
    /// One line of JSON instead of the table.
    #[arg(long)]
    pub json: bool,
}

/// Bytes of a training run, by what they are for.
#[derive(serde::Serialize)]
struct Memory {
    parameters: usize,
    gradients: usize,
    optimiser_adamw: usize,
    optimiser_sgd: usize,
    ema: usize,
    arena_train: usize,
    arena_val: usize,
    arena_train_unshared: usize,
    loss: usize,
    input: usize,
    total_adamw: usize,
}

/// Runs the command.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    let model = Detector::build(&args.model, args.nc, args.imgsz, args.imgsz)
        .map_err(|source| CliError::usage(source.to_string()))?;
    let params = ParamSet::new(&model.graph);
    let batch = args.batch as usize;
    let target = target(&args);
    let (memory, cost) = memory(&model, &params, batch, &target);
    let macs = model.graph.macs();
    if args.json {
        let line = serde_json::json!({
            "model": model.name, "imgsz": args.imgsz, "batch": batch, "nc": args.nc,
            "layers": model.graph.summary().len(), "parameters": params.trainable_count(),
            "gmacs": macs as f64 / 1e9, "gflops": 2.0 * macs as f64 / 1e9,
            "anchors": model.anchor_count(), "bytes": memory,
            "step": {"bytes": cost.bytes, "flops": cost.flops},
        });
        println!("{line}");
        return Ok(ExitCode::SUCCESS);
    }
    print_table(&model, &params, &args, &memory, &cost);
    Ok(ExitCode::SUCCESS)
}

/// What to plan for.
fn target(args: &Args) -> Target {
    let precision = match args.gpu.as_deref() {
        None => return Target::Cpu,
        Some("bf16") => Precision::Bf16,
        Some("fp16") => Precision::F16,
        Some(_) => Precision::F32,
    };
    let chip = Chip {
        name: "planned for".into(),
        uuid: String::new(),
        major: 9,
        minor: 0,
        multiprocessors: args.multiprocessors,
        shared_bytes_max: 232_448,
        l2_bytes: 50 << 20,
        memory_bytes: 0,
    };
    Target::Cuda { precision, chip, tuning: Arc::default() }
}

/// Bytes of a run, and what one training step must move and compute.
fn memory(model: &Detector, params: &ParamSet, batch: usize, target: &Target) -> (Memory, Cost) {
    let plan = Plan::for_target(&model.graph, params, batch, Mode::Train, target);
    let train = plan.bytes();
    let val = Plan::for_target(&model.graph, params, 2 * batch, Mode::Eval, target).bytes();
    let values = params.values.len() * 4;
    let ema = values + params.buffers.len() * 4;
    let (parameters, loss) = match target {
        Target::Cpu => (ema, 0),
        Target::Cuda { precision, .. } => {
            let capacity =
                LossCapacity { max_batch: batch, max_anchors: model.anchor_count(), max_boxes: 64 * batch };
            let config = LossConfig { reg_max: model.reg_max, ..LossConfig::new(model.nc) };
            let all = DeviceParams::bytes(params.values.len(), params.buffers.len(), *precision);
            (all - values, DeviceDetectionLoss::bytes(&config, &capacity))
        }
    };
    // Training and validation take turns in one arena.
    let arena = train.arena.max(val.arena);
    let input = train.input.max(val.input);
    let memory = Memory {
        parameters,
        gradients: values,
        optimiser_adamw: 2 * values,
        optimiser_sgd: values,
        ema,
        arena_train: train.arena,
        arena_val: val.arena,
        arena_train_unshared: train.unshared,
        loss,
        input,
        total_adamw: parameters + values + 2 * values + ema + arena + loss + input,
    };
    (memory, plan.total_cost(&model.graph))
}

fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / (1u64 << 20) as f64)
}

fn print_table(model: &Detector, params: &ParamSet, args: &Args, m: &Memory, cost: &Cost) {
    let (imgsz, batch) = (args.imgsz, args.batch as usize);
    println!(
        "{:<4} {:<28} {:<28} {:>16} {:>12} {:>12}",
        "#", "name", "operation", "h x w x c", "parameters", "MMACs"
    );
    for (i, layer) in model.graph.summary().iter().enumerate() {
        let [h, w, c] = layer.shape;
        let shape = format!("{h} x {w} x {c}");
        let macs = layer.macs as f64 / 1e6;
        let name = if layer.name.is_empty() { "-" } else { &layer.name };
        println!("{i:<4} {name:<28} {:<28} {shape:>16} {:>12} {macs:>12.1}", layer.kind, layer.parameters);
    }
    let macs = model.graph.macs() as f64 / 1e9;
    println!();
    println!("{}, {imgsz} px, batch {batch}, {} classes", model.name, model.nc);
    println!("  parameters          {}", params.trainable_count());
    println!("  multiply-adds       {macs:.3} G per image, forward ({:.2} GFLOPs)", 2.0 * macs);
    println!("  cells               {}", model.anchor_count());
    println!("  parameters          {}", mib(m.parameters));
    println!("  gradients           {}", mib(m.gradients));
    println!("  optimiser           {} (AdamW), {} (SGD)", mib(m.optimiser_adamw), mib(m.optimiser_sgd));
    println!("  moving average      {}", mib(m.ema));
    println!(
        "  arena, training     {} ({} without sharing)",
        mib(m.arena_train),
        mib(m.arena_train_unshared)
    );
    println!("  arena, validation   {} (batch {})", mib(m.arena_val), 2 * batch);
    if m.loss > 0 {
        println!("  loss                {} (64 boxes an image)", mib(m.loss));
    }
    println!("  input               {}", mib(m.input));
    println!(
        "  together            {} with AdamW; training and validation share one arena",
        mib(m.total_adamw)
    );
    println!(
        "  a step must move    {:.2} GB and compute {:.3} TFLOP ({:.1} MB and {:.1} GFLOP per image)",
        cost.bytes as f64 / 1e9,
        cost.flops as f64 / 1e12,
        cost.bytes as f64 / 1e6 / batch as f64,
        cost.flops as f64 / 1e9 / batch as f64
    );
}
