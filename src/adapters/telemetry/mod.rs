//! What the machine does: processor, memory, disk, network and GPUs, under the names that the tracking server's page for system
//! metrics shows and under those of the progress hash.
//!
//! Everything here blocks: files of the kernel are read and the driver's management library is asked. Call it on a
//! thread that may wait (`spawn_blocking`). The management library (NVML) is not CUDA: it opens no context and takes no memory of
//! a GPU. Where it is missing there are no GPUs to tell of, which is no error.

mod gpus;
mod host;
mod identity;

use std::path::{Path, PathBuf};

use serde_json::json;

pub use gpus::{GpuMemory, GpuProcess, GpuSample};
pub use host::HostSample;
pub(crate) use host::disk;
pub use identity::worker_fields;

use self::gpus::Gpus;
use self::host::Host;
use crate::job::clock;
use crate::job::delivery::MetricPoint;

/// Prefix of the names on the tracking server.
const PREFIX: &str = "system/";
/// Bytes of a megabyte in system metrics.
const MEGABYTE: f64 = 1e6;
/// Bytes of a megabyte in progress fields, as the driver's own tool counts them.
const MEBIBYTE: u64 = 1 << 20;

/// Measures the machine. Keep one: the processor's load and the network's bytes are differences to an earlier look.
pub struct Sampler {
    host: Host,
    gpus: Gpus,
    disk_path: PathBuf,
}

/// One look at the machine.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample {
    /// When, Unix milliseconds.
    pub at_unix_ms: i64,
    /// Processor, memory, disk, network.
    pub host: HostSample,
    /// GPUs in the driver's order; none where there is no driver.
    pub gpus: Vec<GpuSample>,
}

impl Sampler {
    /// Begins to measure; `disk_path` says which file system is watched. Blocks.
    pub fn new(disk_path: &Path) -> Self {
        Self { host: Host::new(), gpus: Gpus::new(), disk_path: disk_path.to_owned() }
    }

    /// Looks. Blocks, usually for some milliseconds. The processor's load is that since the look before (or since
    /// [`Sampler::new`]).
    pub fn sample(&mut self) -> Sample {
        Sample {
            at_unix_ms: clock::now_unix_ms(),
            host: self.host.sample(&self.disk_path),
            gpus: self.gpus.sample(),
        }
    }
}

fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn percent(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| round(part as f64 / whole as f64 * 100.0))
}

fn megabytes(bytes: u64) -> f64 {
    round(bytes as f64 / MEGABYTE)
}

impl Sample {
    /// System metrics: `system/cpu_utilization_percentage`, `system/gpu_0_memory_usage_megabytes` and so on. Megabytes are
    /// 10^6 bytes. What could not be measured is left out.
    pub fn metric_points(&self, step: i64) -> Vec<MetricPoint> {
        let host = &self.host;
        let mut named: Vec<(String, Option<f64>)> = vec![
            ("cpu_utilization_percentage".into(), host.cpu_percent.map(round)),
            ("system_memory_usage_megabytes".into(), Some(megabytes(host.memory_used_bytes))),
            (
                "system_memory_usage_percentage".into(),
                percent(host.memory_used_bytes, host.memory_total_bytes),
            ),
        ];
        if let Some(disk) = host.disk {
            named.push((
                "disk_usage_percentage".into(),
                percent(disk.used_bytes, disk.used_bytes + disk.available_bytes),
            ));
            named.push(("disk_usage_megabytes".into(), Some(megabytes(disk.used_bytes))));
            named.push(("disk_available_megabytes".into(), Some(megabytes(disk.available_bytes))));
        }
        if let Some(network) = host.network {
            named.push(("network_receive_megabytes".into(), Some(megabytes(network.received_bytes))));
            named.push(("network_transmit_megabytes".into(), Some(megabytes(network.sent_bytes))));
        }
        for gpu in &self.gpus {
            let name = |what: &str| format!("gpu_{}_{what}", gpu.number);
            let memory = gpu.memory;
            named.push((
                name("memory_usage_percentage"),
                memory.and_then(|memory| percent(memory.used_bytes, memory.total_bytes)),
            ));
            named.push((name("memory_usage_megabytes"), memory.map(|memory| megabytes(memory.used_bytes))));
            named.push((name("utilization_percentage"), gpu.load_percent.map(f64::from)));
            named.push((name("power_usage_watts"), gpu.power_w.map(round)));
            let share = gpu.power_w.zip(gpu.power_limit_w.filter(|limit| *limit > 0.0));
            named.push((
                name("power_usage_percentage"),
                share.map(|(power, limit)| round(power / limit * 100.0)),
            ));
        }
        let point = |(key, value): (String, Option<f64>)| {
            let value = value.filter(|value| value.is_finite())?;
            Some(MetricPoint { key: format!("{PREFIX}{key}"), value, at_unix_ms: self.at_unix_ms, step })
        };
        named.into_iter().filter_map(point).collect()
    }

    /// Progress fields of the GPUs: `gpu_{i}_name`, `_uuid`, `_memoryTotal`, `_memoryFree`, `_memoryUsed` (MiB), `_load` (0 to 100),
    /// `_temperature` (°C), `_power` (W), and `processes`, a JSON list of `{"pid", "name", "memoryUsed"}` or a sentence.
    pub fn gpu_fields(&self) -> Vec<(String, String)> {
        let mut fields = Vec::new();
        for gpu in &self.gpus {
            let mut put = |what: &str, value: Option<String>| {
                fields.extend(value.map(|value| (format!("gpu_{}_{what}", gpu.number), value)));
            };
            let mebibytes = |bytes: u64| (bytes / MEBIBYTE).to_string();
            put("name", Some(gpu.name.clone()));
            put("uuid", Some(gpu.uuid.clone()));
            put("memoryTotal", gpu.memory.map(|memory| mebibytes(memory.total_bytes)));
            put("memoryFree", gpu.memory.map(|memory| mebibytes(memory.free_bytes)));
            put("memoryUsed", gpu.memory.map(|memory| mebibytes(memory.used_bytes)));
            put("load", gpu.load_percent.map(|load| load.to_string()));
            put("temperature", gpu.temperature_c.map(|degrees| degrees.to_string()));
            put("power", gpu.power_w.map(|power| format!("{power:.1}")));
        }
        fields.push(("processes".to_owned(), self.processes()));
        fields
    }

    fn processes(&self) -> String {
        if self.gpus.is_empty() {
            return "not available: no GPU was found".to_owned();
        }
        let known: Vec<&GpuProcess> =
            self.gpus.iter().flat_map(|gpu| gpu.processes.iter().flatten()).collect();
        if known.is_empty() && self.gpus.iter().all(|gpu| gpu.processes.is_none()) {
            return "not available: the driver does not tell".to_owned();
        }
        let entry = |process: &GpuProcess| {
            let memory = process.memory_bytes.map(|bytes| bytes / MEBIBYTE);
            json!({ "pid": process.pid, "name": process.name, "memoryUsed": memory })
        };
        serde_json::Value::from_iter(known.into_iter().map(entry)).to_string()
    }

    /// The fields of the machine in a progress hash: GPUs and [`worker_fields`].
    pub fn progress_fields(&self) -> Vec<(String, String)> {
        let mut fields = self.gpu_fields();
        fields.extend(worker_fields(&self.gpus, |name| std::env::var(name).ok()));
        fields
    }
}

#[cfg(test)]
mod tests {
    use super::host::{Disk, Network};
    use super::*;

    fn busy() -> Sample {
        let memory = GpuMemory { total_bytes: 8000 << 20, free_bytes: 6000 << 20, used_bytes: 2000 << 20 };
        Sample {
            at_unix_ms: 5,
            host: HostSample {
                cpu_percent: Some(12.34),
                memory_used_bytes: 3_000_000_000,
                memory_total_bytes: 4_000_000_000,
                disk: Some(Disk { used_bytes: 1_000_000_000, available_bytes: 3_000_000_000 }),
                network: Some(Network { received_bytes: 1_500_000, sent_bytes: 0 }),
            },
            gpus: vec![GpuSample {
                number: 0,
                name: "N".into(),
                uuid: "GPU-1".into(),
                memory: Some(memory),
                load_percent: Some(77),
                temperature_c: Some(40),
                power_w: Some(150.0),
                power_limit_w: Some(300.0),
                processes: Some(vec![GpuProcess { pid: 7, name: "x".into(), memory_bytes: Some(9 << 20) }]),
            }],
        }
    }

    #[test]
    fn the_names_are_those_of_the_servers_page() {
        let points = busy().metric_points(3);
        let found: Vec<(&str, f64)> = points.iter().map(|p| (p.key.as_str(), p.value)).collect();
        assert_eq!(
            found,
            [
                ("system/cpu_utilization_percentage", 12.3),
                ("system/system_memory_usage_megabytes", 3000.0),
                ("system/system_memory_usage_percentage", 75.0),
                ("system/disk_usage_percentage", 25.0),
                ("system/disk_usage_megabytes", 1000.0),
                ("system/disk_available_megabytes", 3000.0),
                ("system/network_receive_megabytes", 1.5),
                ("system/network_transmit_megabytes", 0.0),
                ("system/gpu_0_memory_usage_percentage", 25.0),
                ("system/gpu_0_memory_usage_megabytes", 2097.2),
                ("system/gpu_0_utilization_percentage", 77.0),
                ("system/gpu_0_power_usage_watts", 150.0),
                ("system/gpu_0_power_usage_percentage", 50.0),
            ]
        );
        assert!(points.iter().all(|p| p.step == 3 && p.at_unix_ms == 5));
    }

    #[test]
    fn progress_fields_are_the_documented_ones() {
        let fields = busy().gpu_fields();
        let expected = [
            ("gpu_0_name", "N"),
            ("gpu_0_uuid", "GPU-1"),
            ("gpu_0_memoryTotal", "8000"),
            ("gpu_0_memoryFree", "6000"),
            ("gpu_0_memoryUsed", "2000"),
            ("gpu_0_load", "77"),
            ("gpu_0_temperature", "40"),
            ("gpu_0_power", "150.0"),
            ("processes", r#"[{"pid":7,"name":"x","memoryUsed":9}]"#),
        ];
        assert_eq!(fields, expected.map(|(key, value)| (key.to_owned(), value.to_owned())));
        let none = Sample::default().gpu_fields();
        assert!(none.len() == 1 && none[0].1.starts_with("not available"), "{none:?}");
    }

    #[test]
    fn this_machine_can_be_measured() {
        let mut sampler = Sampler::new(Path::new("/"));
        let sample = sampler.sample();
        let host = &sample.host;
        assert!(host.memory_total_bytes > host.memory_used_bytes && host.memory_used_bytes > 0);
        assert!(host.cpu_percent.is_some_and(|load| (0.0..=100.0).contains(&load)), "{host:?}");
        assert!(host.disk.is_some_and(|disk| disk.available_bytes > 0), "{host:?}");
        assert!(host.network.is_some(), "{host:?}");
        assert!(sample.metric_points(0).len() >= 8);
        let fields = sample.progress_fields();
        assert!(
            fields.iter().any(|(key, value)| key == "WORKER_HOSTNAME" && !value.is_empty()),
            "{fields:?}"
        );
    }
}
