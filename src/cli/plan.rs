//! `boxwright plan`: what a model is and what training it will need, before anything is allocated.

use std::process::ExitCode;

use super::CliError;
use crate::detect::models::Detector;
use crate::engine::params::ParamSet;
use crate::engine::plan::{Mode, Plan};

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
    input: usize,
    total_adamw: usize,
}

/// Runs the command.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    let model = Detector::build(&args.model, args.nc, args.imgsz, args.imgsz)
        .map_err(|source| CliError::usage(source.to_string()))?;
    let params = ParamSet::new(&model.graph);
    let batch = args.batch as usize;
    let memory = memory(&model, &params, batch);
    let macs = model.graph.macs();
    if args.json {
        let line = serde_json::json!({
            "model": model.name, "imgsz": args.imgsz, "batch": batch, "nc": args.nc,
            "layers": model.graph.summary().len(), "parameters": params.trainable_count(),
            "gmacs": macs as f64 / 1e9, "gflops": 2.0 * macs as f64 / 1e9,
            "anchors": model.anchor_count(), "bytes": memory,
        });
        println!("{line}");
        return Ok(ExitCode::SUCCESS);
    }
    print_table(&model, &params, args.imgsz, batch, &memory);
    Ok(ExitCode::SUCCESS)
}

fn memory(model: &Detector, params: &ParamSet, batch: usize) -> Memory {
    let train = Plan::new(&model.graph, batch, Mode::Train).bytes();
    let val = Plan::new(&model.graph, 2 * batch, Mode::Eval).bytes();
    let values = params.values.len() * 4;
    let ema = values + params.buffers.len() * 4;
    let parameters = ema;
    // Training and validation take turns in one arena.
    let arena = train.arena.max(val.arena);
    let input = train.input.max(val.input);
    Memory {
        parameters,
        gradients: values,
        optimiser_adamw: 2 * values,
        optimiser_sgd: values,
        ema,
        arena_train: train.arena,
        arena_val: val.arena,
        arena_train_unshared: train.unshared,
        input,
        total_adamw: parameters + values + 2 * values + ema + arena + input,
    }
}

fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / (1u64 << 20) as f64)
}

fn print_table(model: &Detector, params: &ParamSet, imgsz: usize, batch: usize, m: &Memory) {
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
    println!("  input               {}", mib(m.input));
    println!(
        "  together            {} with AdamW; training and validation share one arena",
        mib(m.total_adamw)
    );
}
