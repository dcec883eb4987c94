//! GPUs by the driver's management library (NVML), which is looked up at run time.

use std::time::{Duration, Instant};

use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::{Device, Nvml};

/// Between two attempts to load a library that was not there.
const RETRY_INTERVAL: Duration = Duration::from_secs(60);
/// GPUs that are looked at.
const GPUS_MAX: u32 = 64;
/// Processes of one GPU that are named.
const PROCESSES_MAX: usize = 32;

/// What a GPU does. What it does not tell is `None`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GpuSample {
    /// Its number in the driver's order.
    pub number: u32,
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uuid: String,
    /// Its memory.
    pub memory: Option<GpuMemory>,
    /// Share of time in which a kernel ran, 0 to 100.
    pub load_percent: Option<u32>,
    /// Temperature, °C.
    pub temperature_c: Option<u32>,
    /// Power, W.
    pub power_w: Option<f64>,
    /// Limit of the power, W.
    pub power_limit_w: Option<f64>,
    /// Processes that compute on it.
    pub processes: Option<Vec<GpuProcess>>,
}

/// Memory of a GPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GpuMemory {
    /// All of it.
    pub total_bytes: u64,
    /// Not in use.
    pub free_bytes: u64,
    /// In use.
    pub used_bytes: u64,
}

/// A process on a GPU.
#[derive(Debug, Clone, PartialEq)]
pub struct GpuProcess {
    /// Its number, as the driver sees it (inside a container it may be another).
    pub pid: u32,
    /// Its name, empty when it is not visible from here.
    pub name: String,
    /// Memory that it holds.
    pub memory_bytes: Option<u64>,
}

/// Asks the library, once it is there.
pub(super) struct Gpus {
    library: Option<Nvml>,
    tried: Instant,
}

impl Gpus {
    pub(super) fn new() -> Self {
        Self { library: load(), tried: Instant::now() }
    }

    pub(super) fn sample(&mut self) -> Vec<GpuSample> {
        if self.library.is_none() && self.tried.elapsed() >= RETRY_INTERVAL {
            (self.library, self.tried) = (load(), Instant::now());
        }
        let Some(library) = &self.library else { return Vec::new() };
        let Ok(count) = library.device_count() else {
            // After a change of the driver the library must be loaded anew.
            (self.library, self.tried) = (None, Instant::now());
            return Vec::new();
        };
        let numbers = 0..count.min(GPUS_MAX);
        numbers.filter_map(|number| Some(look(number, &library.device_by_index(number).ok()?))).collect()
    }
}

fn load() -> Option<Nvml> {
    Nvml::init().inspect_err(|error| tracing::debug!(%error, "no GPU telemetry")).ok()
}

fn look(number: u32, device: &Device<'_>) -> GpuSample {
    let watts = |milliwatts: u32| f64::from(milliwatts) / 1000.0;
    let memory = device.memory_info().ok().map(|memory| GpuMemory {
        total_bytes: memory.total,
        free_bytes: memory.free,
        used_bytes: memory.used,
    });
    GpuSample {
        number,
        name: device.name().unwrap_or_default(),
        uuid: device.uuid().unwrap_or_default(),
        memory,
        load_percent: device.utilization_rates().ok().map(|rates| rates.gpu),
        temperature_c: device.temperature(TemperatureSensor::Gpu).ok(),
        power_w: device.power_usage().ok().map(watts),
        power_limit_w: device.enforced_power_limit().ok().map(watts),
        processes: processes(device),
    }
}

fn processes(device: &Device<'_>) -> Option<Vec<GpuProcess>> {
    let running = device.running_compute_processes().ok()?;
    let known = running.into_iter().take(PROCESSES_MAX).map(|process| GpuProcess {
        pid: process.pid,
        name: name(process.pid),
        memory_bytes: match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        },
    });
    Some(known.collect())
}

fn name(pid: u32) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/comm"));
    text.map(|text| text.trim_end().to_owned()).unwrap_or_default()
}
