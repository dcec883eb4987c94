//! Where the time of a training step goes on a GPU: every kernel, every layer, against what the chip can give.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use super::bench::StepBench;
use super::error::TrainError;
use super::session::{Compute, Network, TimedLaunch};
use crate::detect::losses::detection::LossConfig;
use crate::engine::device::cuda::ceiling::{self, Ceilings};
use crate::engine::device::cuda::{Device, Precision};
use crate::engine::plan::{Cost, StepCost};

/// Kernels of one name.
#[derive(Clone, Debug, Serialize)]
pub struct KernelRow {
    /// Name of the kernel.
    pub kernel: String,
    /// Launches in a step.
    pub launches: usize,
    /// Milliseconds of a step.
    pub ms: f64,
}

/// One layer and pass.
#[derive(Clone, Debug, Serialize)]
pub struct LayerRow {
    /// Layer, or operation where it has no name.
    pub layer: String,
    /// `forward` or `backward`.
    pub pass: &'static str,
    /// Milliseconds of a step.
    pub ms: f64,
    /// Bytes it must move.
    pub bytes: u64,
    /// Operations it must do.
    pub flops: u64,
    /// The least milliseconds that the chip's ceilings allow.
    pub floor_ms: f64,
}

/// A profile of a training step.
#[derive(Clone, Debug, Serialize)]
pub struct StepProfile {
    /// The GPU.
    pub device: String,
    /// Storage of activations.
    pub precision: &'static str,
    /// True on the emulator of the tests: no time means anything then.
    pub emulated: bool,
    /// What the chip gives at most, measured.
    pub ceilings: Ceilings,
    /// Milliseconds of a whole step as training runs it (captured, update included), median.
    pub step_ms: f64,
    /// Sum of the kernels' times, launched one by one between events.
    pub kernels_ms: f64,
    /// Sum of the floors.
    pub floor_ms: f64,
    /// Bytes of device memory that training holds.
    pub held_bytes: usize,
    /// Kernels, slowest first.
    pub kernels: Vec<KernelRow>,
    /// Layers, furthest above their floor first.
    pub layers: Vec<LayerRow>,
}

/// Profiles a step of `bench` on a GPU.
///
/// # Errors
/// As [`StepBench::run`]; a fault of the device.
pub fn profile(
    bench: &StepBench,
    device: &Arc<Device>,
    precision: Precision,
) -> Result<StepProfile, TrainError> {
    let failed = |source| TrainError::Device { action: "measure its ceilings", source };
    let ceilings = ceiling::measure(device, precision).map_err(failed)?;
    let compute = Compute::Cuda { device: Arc::clone(device), precision };
    let mut trainer = bench.trainer(&compute)?;
    let batch = bench.random_batch();
    let mut times = Vec::with_capacity(bench.steps);
    for step in 0..bench.warmup + bench.steps {
        let began = Instant::now();
        trainer.step(&batch)?;
        if step >= bench.warmup {
            times.push(began.elapsed().as_secs_f64() * 1e3);
        }
    }
    times.sort_by(f64::total_cmp);
    let (launches, costs) = trainer.network.timed_step(&batch, bench.steps.clamp(1, 10))?;
    let floor = |cost: &Cost| {
        let memory = cost.bytes as f64 / ceilings.bytes_per_s;
        let products = ceilings.flops_per_s.map_or(0.0, |f| cost.flops as f64 / f);
        memory.max(products) * 1e3
    };
    let layers = layer_rows(&launches, &costs, floor);
    let chip = device.chip();
    Ok(StepProfile {
        device: format!("{} (sm_{}{})", chip.name, chip.major, chip.minor),
        precision: precision.suffix(),
        emulated: chip.is_emulated(),
        ceilings,
        step_ms: times.get(times.len() / 2).copied().unwrap_or(f64::NAN),
        kernels_ms: launches.iter().map(|l| l.ms).sum(),
        floor_ms: costs.iter().map(|c| floor(&c.cost)).sum(),
        held_bytes: trainer.network.device_bytes(),
        kernels: kernel_rows(&launches),
        layers,
    })
}

/// Measures the cuts of the convolutions of `bench` anew and keeps them for new runs; how many.
///
/// # Errors
/// As [`StepBench::run`]; a fault of the device.
pub fn tune(bench: &StepBench, compute: &Compute) -> Result<usize, TrainError> {
    let mut network = Network::new(&bench.model, bench.nc, LossConfig::new(bench.nc), compute)?;
    network.tune((bench.batch, bench.imgsz, bench.imgsz), true)
}

fn kernel_rows(launches: &[TimedLaunch]) -> Vec<KernelRow> {
    let mut by_name: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
    for launch in launches {
        let entry = by_name.entry(&launch.kernel).or_default();
        *entry = (entry.0 + 1, entry.1 + launch.ms);
    }
    let rows = by_name.into_iter();
    let mut rows: Vec<KernelRow> =
        rows.map(|(kernel, (launches, ms))| KernelRow { kernel: kernel.to_owned(), launches, ms }).collect();
    rows.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    rows
}

fn layer_rows(launches: &[TimedLaunch], costs: &[StepCost], floor: impl Fn(&Cost) -> f64) -> Vec<LayerRow> {
    let mut rows: Vec<LayerRow> = costs
        .iter()
        .map(|c| LayerRow {
            layer: c.name.clone(),
            pass: c.pass,
            ms: 0.0,
            bytes: c.cost.bytes,
            flops: c.cost.flops,
            floor_ms: floor(&c.cost),
        })
        .collect();
    for launch in launches {
        if let Some(row) = rows.get_mut(launch.part as usize) {
            row.ms += launch.ms;
        }
    }
    rows.retain(|r| r.ms > 0.0);
    rows.sort_by(|a, b| (b.ms - b.floor_ms).total_cmp(&(a.ms - a.floor_ms)));
    rows
}
