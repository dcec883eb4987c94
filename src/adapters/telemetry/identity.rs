//! Who this machine is, for progress fields and tags: computed by the program that runs, not when somebody installed something.

use std::sync::OnceLock;

use sysinfo::System;
use time::OffsetDateTime;
use time::macros::format_description;

use super::MEBIBYTE;
use super::gpus::GpuSample;

/// What only the environment knows. A value there is passed on as it is.
const FROM_ENVIRONMENT: [&str; 12] = [
    "debug",
    "USER",
    "WORKER_HOST",
    "WORKER_NAME",
    "PRIVATE_QUEUE",
    "WORKER_GATEWAY",
    "WORKER_NETWORK_INTERFACE",
    "WORKER_DOCKER_VERSION",
    "WORKER_APP_BASE_PATH",
    "WORKER_APP_ENV",
    "WORKER_RAM_MEMORY",
    "WORKER_SHM_MEMORY",
];
/// Characters of one of them.
const VALUE_CHARS_MAX: usize = 256;

/// The identity of this worker: `WORKER_HOSTNAME`, `_OS`, `_KERNEL_VERSION`, `_CPU_CORES`, `_CPU_CORES_AVAILABLE`,
/// `_RAM_TOTAL` (MiB), `_HOME_DIR`, `_CURRENT_DATE`, `_CURRENT_TIME` (local), `_GPU_COUNT`, `_GPU_MODEL`, `_GPU_MEMORY` (MiB, of each),
/// and what the environment sets of the rest. `set` reads the environment. Blocks.
pub fn worker_fields(gpus: &[GpuSample], set: impl Fn(&str) -> Option<String>) -> Vec<(String, String)> {
    let environment = FROM_ENVIRONMENT.iter().filter_map(|name| {
        let value = set(name).filter(|value| !value.trim().is_empty())?;
        Some(((*name).to_owned(), value.chars().take(VALUE_CHARS_MAX).collect::<String>()))
    });
    let mut fields: Vec<(String, String)> = environment.collect();
    let now = OffsetDateTime::now_local().unwrap_or_else(|_| OffsetDateTime::now_utc());
    let models: Vec<&str> = gpus.iter().map(|gpu| gpu.name.as_str()).collect();
    let memories = gpus.iter().filter_map(|gpu| gpu.memory);
    let memories: Vec<String> = memories.map(|memory| (memory.total_bytes / MEBIBYTE).to_string()).collect();
    let machine = machine();
    let computed = [
        ("HOSTNAME", machine.host_name.clone()),
        ("OS", machine.os.clone()),
        ("KERNEL_VERSION", machine.kernel_version.clone()),
        ("CPU_CORES", Some(machine.cores.to_string())),
        ("CPU_CORES_AVAILABLE", Some(machine.cores_available.to_string())),
        ("RAM_TOTAL", Some((machine.memory_bytes / MEBIBYTE).to_string())),
        ("HOME_DIR", set("HOME")),
        ("CURRENT_DATE", now.format(format_description!("[year]-[month]-[day]")).ok()),
        ("CURRENT_TIME", now.format(format_description!("[hour]:[minute]:[second]")).ok()),
        ("GPU_COUNT", Some(gpus.len().to_string())),
        ("GPU_MODEL", Some(models.join(", ")).filter(|text| !text.is_empty())),
        ("GPU_MEMORY", Some(memories.join(", ")).filter(|text| !text.is_empty())),
    ];
    fields.extend(computed.into_iter().filter_map(|(name, value)| Some((format!("WORKER_{name}"), value?))));
    fields
}

/// What does not change while the program runs.
struct Machine {
    host_name: Option<String>,
    os: Option<String>,
    kernel_version: Option<String>,
    cores: usize,
    cores_available: usize,
    memory_bytes: u64,
}

/// Looked up once: the fields are written again with every sign of progress.
fn machine() -> &'static Machine {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    MACHINE.get_or_init(|| {
        let mut memory = System::new();
        memory.refresh_memory();
        let cores_available = std::thread::available_parallelism().map_or(1, usize::from);
        Machine {
            host_name: System::host_name(),
            os: System::long_os_version(),
            kernel_version: System::kernel_version(),
            cores: System::physical_core_count().unwrap_or(cores_available),
            cores_available,
            memory_bytes: memory.total_memory(),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_identity_is_computed_and_the_environment_adds_to_it() {
        let gpu = GpuSample { name: "N".into(), ..GpuSample::default() };
        let fields = worker_fields(&[gpu.clone(), gpu], |name| match name {
            "WORKER_NAME" => Some("w1".into()),
            "WORKER_CURRENT_DATE" => Some("2001-01-01".into()),
            "USER" => Some(" ".into()),
            _ => None,
        });
        let find = |name: &str| fields.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        assert_eq!((find("WORKER_NAME"), find("USER")), (Some("w1"), None));
        assert_eq!((find("WORKER_GPU_COUNT"), find("WORKER_GPU_MODEL")), (Some("2"), Some("N, N")));
        assert!(find("WORKER_CURRENT_DATE").is_some_and(|date| date != "2001-01-01" && date.len() == 10));
        assert!(find("WORKER_KERNEL_VERSION").is_some());
    }
}
