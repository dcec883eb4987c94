//! What `boxwright doctor` says about GPUs, their driver, the compiler of the kernels and its cache.

use std::path::Path;

use serde_json::{Value as Json, json};

use super::{Check, gib};
use crate::engine::device::cuda::{Device, Finding, Memory, Probe, cache, probe};

/// Loaded by the driver's kernel module, also where its library is missing.
const KERNEL_MODULE: &str = "/proc/driver/nvidia/version";

/// The checks: one, or with a driver one per GPU, the compiler and the cache.
pub(super) fn checks() -> Vec<Check> {
    let found = probe();
    let memory: Vec<Result<Memory, String>> = found.devices.iter().map(memory_of).collect();
    let cache = Cache::look();
    let mut checks = vec![summary(&found, &memory, &cache)];
    if found.driver_version.is_none() {
        return checks;
    }
    checks.extend(found.devices.iter().zip(&memory).map(|(device, memory)| gpu(device, memory)));
    checks.push(compiler(&found, &cache));
    checks.push(cache.check());
    checks
}

/// Memory of a GPU that can be used. Opening it is the only way to ask.
fn memory_of(device: &Finding) -> Result<Memory, String> {
    if let Some(reason) = &device.refused {
        return Err(reason.clone());
    }
    Device::open(device.ordinal).and_then(|d| d.memory()).map_err(|error| error.to_string())
}

/// `580.82` of CUDA 13.0 is 13000 to the driver.
fn version(driver: u32) -> String {
    format!("{}.{}", driver / 1000, driver % 1000 / 10)
}

/// Whether jobs train on a GPU, with everything in `data`.
fn summary(found: &Probe, memory: &[Result<Memory, String>], cache: &Cache) -> Check {
    let usable = found.devices.iter().zip(memory).filter(|(_, memory)| memory.is_ok()).map(|(d, _)| d);
    let usable: Vec<String> = usable.map(|d| format!("cuda:{}", d.ordinal)).collect();
    let unopened = memory.iter().find_map(|memory| memory.as_ref().err().cloned());
    let obstacle = found.obstacle.clone().or(unopened.filter(|_| usable.is_empty()));
    let says = match &obstacle {
        None => {
            let driver = found.driver_version.map_or("unknown".to_owned(), version);
            format!("training on {} (driver for CUDA {driver})", usable.join(", "))
        }
        Some(reason) => format!("{reason}{}: training on the CPU", hint(found)),
    };
    Check {
        name: "graphics",
        verdict: if obstacle.is_none() { "ok" } else { "note" },
        says,
        data: json!({
            "usable": obstacle.is_none(),
            "obstacle": obstacle,
            "driver_cuda_version": found.driver_version.map(version),
            "compiler": found.compiler.as_ref().ok(),
            "kernel_cache": cache.json(),
            "devices": found.devices.iter().zip(memory).map(|(d, m)| device_json(d, m)).collect::<Json>(),
        }),
    }
}

/// What to do where the machine has a driver that this program cannot reach.
fn hint(found: &Probe) -> &'static str {
    if found.driver_version.is_none() && Path::new(KERNEL_MODULE).exists() {
        " although its kernel module is loaded (a container must be started with its GPUs: --gpus all)"
    } else {
        ""
    }
}

fn device_json(device: &Finding, memory: &Result<Memory, String>) -> Json {
    let chip = &device.chip;
    json!({
        "device": format!("cuda:{}", device.ordinal),
        "name": chip.name,
        "uuid": chip.identity(),
        "compute_capability": format!("{}.{}", chip.major, chip.minor),
        "multiprocessors": chip.multiprocessors,
        "memory_total_bytes": memory.as_ref().map_or(chip.memory_bytes, |m| m.total_bytes),
        "memory_free_bytes": memory.as_ref().ok().map(|m| m.free_bytes),
        "refused": memory.as_ref().err(),
    })
}

fn gpu(device: &Finding, memory: &Result<Memory, String>) -> Check {
    let chip = &device.chip;
    let about = format!(
        "cuda:{} {}, compute capability {}.{}, {} multiprocessors",
        device.ordinal, chip.name, chip.major, chip.minor, chip.multiprocessors
    );
    let says = match memory {
        Ok(m) => format!("{about}, {} of {} free", gib(m.free_bytes), gib(m.total_bytes)),
        Err(reason) => format!("{about}, {}: {reason}", gib(chip.memory_bytes)),
    };
    let verdict = if memory.is_ok() { "ok" } else { "note" };
    Check { name: "gpu", verdict, says, data: device_json(device, memory) }
}

fn compiler(found: &Probe, cache: &Cache) -> Check {
    let (verdict, says) = match &found.compiler {
        Ok(text) => ("ok", text.clone()),
        Err(reason) if cache.files > 0 => {
            ("note", format!("NVRTC was not found, only kernels of the cache run: {reason}"))
        }
        Err(reason) => ("note", format!("NVRTC was not found: {reason}")),
    };
    Check { name: "kernel compiler", verdict, says, data: json!({"found": found.compiler.as_ref().ok()}) }
}

/// The folder of compiled kernels.
struct Cache {
    path: std::path::PathBuf,
    files: usize,
    bytes: u64,
}

impl Cache {
    fn look() -> Cache {
        let path = cache::folder();
        let entries = std::fs::read_dir(&path).into_iter().flatten().flatten();
        let metadata = entries.filter_map(|entry| entry.metadata().ok()).filter(|m| m.is_file());
        let (files, bytes) = metadata.fold((0, 0), |(files, bytes), m| (files + 1, bytes + m.len()));
        Cache { path, files, bytes }
    }

    fn json(&self) -> Json {
        json!({"path": self.path.to_string_lossy(), "files": self.files, "bytes": self.bytes})
    }

    fn check(&self) -> Check {
        let mib = self.bytes as f64 / f64::from(1u32 << 20);
        let says = match self.files {
            0 => format!("{}: empty; the first run compiles the kernels", self.path.display()),
            files => format!("{}: {files} compiled files, {mib:.1} MiB", self.path.display()),
        };
        Check { name: "kernel cache", verdict: "ok", says, data: self.json() }
    }
}
