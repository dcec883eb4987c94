//! `boxwright doctor`: what this machine has, and what is missing.

mod graphics;

use std::path::Path;
use std::process::ExitCode;

use serde_json::{Value as Json, json};

use super::CliError;
use super::common::ServiceArgs;
use crate::adapters::queue::journal::Journal;

/// Free space below which a folder is reported, bytes.
const FREE_BYTES_MIN: u64 = 1 << 30;
/// Free memory below which it is reported, bytes.
const MEMORY_BYTES_MIN: u64 = 2 << 30;

/// Say what this machine has and what is missing
#[derive(Debug, clap::Args)]
pub struct Args {
    /// One JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub service: ServiceArgs,
}

struct Check {
    name: &'static str,
    /// `ok`, `note` (a fact worth knowing) or `fault` (jobs will not run).
    verdict: &'static str,
    says: String,
    data: Json,
}

/// Looks at the machine; fails when something keeps jobs from running.
///
/// # Errors
/// When the service configuration cannot be read.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    let config = args.service.load()?;
    let mut checks = vec![processor(), memory()];
    checks.extend(graphics::checks());
    for (name, path) in [
        ("configs folder", config.configs_dir.as_path()),
        ("stop folder", &config.stop_dir()),
        ("state folder", &config.state_dir),
        ("runs folder", &config.runs_dir),
        ("logs folder", &config.logging.dir),
    ] {
        checks.push(folder(name, path));
    }
    checks.push(journal(&config.state_dir));
    let faults = checks.iter().filter(|check| check.verdict == "fault").count();
    if args.json {
        let list: Json = checks
            .iter()
            .map(|check| json!({"name": check.name, "verdict": check.verdict, "says": check.says, "data": check.data}))
            .collect();
        println!("{}", json!({"version": env!("CARGO_PKG_VERSION"), "faults": faults, "checks": list}));
    } else {
        for check in &checks {
            println!("{:<5}  {:<15}  {}", check.verdict, check.name, check.says);
        }
    }
    Ok(if faults == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn processor() -> Check {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let model = field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let flags = field("flags").unwrap_or_default();
    let wanted = ["avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"];
    let simd: Vec<&str> =
        wanted.into_iter().filter(|flag| flags.split(' ').any(|found| found == *flag)).collect();
    let (verdict, note) = match simd.contains(&"avx2") && simd.contains(&"fma") {
        true if simd.contains(&"avx512f") => ("ok", String::new()),
        true => ("note", "; no AVX-512: training takes about twice as long".to_owned()),
        false => ("note", "; no AVX2 and FMA: training is slow here".to_owned()),
    };
    Check {
        name: "processor",
        verdict,
        says: format!("{model}, {cores} cores for this program, {}{note}", simd.join(" ")),
        data: json!({"model": model, "cores": cores, "simd": simd}),
    }
}

fn memory() -> Check {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let (total, available) = (system.total_memory(), system.available_memory());
    let short = available < MEMORY_BYTES_MIN;
    let note = if short { "; larger models and batches will not fit" } else { "" };
    Check {
        name: "memory",
        verdict: if short { "note" } else { "ok" },
        says: format!("{} of {} available{note}", gib(available), gib(total)),
        data: json!({"total_bytes": total, "available_bytes": available}),
    }
}

/// Writes a file, or finds the nearest folder in which this one could be made.
fn folder(name: &'static str, path: &Path) -> Check {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let exists = absolute.is_dir();
    let place = absolute.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/")).to_owned();
    let probe = place.join(format!(".boxwright-doctor-{}", std::process::id()));
    let written = std::fs::write(&probe, b"probe").and_then(|()| std::fs::remove_file(&probe));
    let free = free_bytes(&place);
    let (verdict, says) = match (&written, free) {
        (Err(error), _) => ("fault", format!("{}: not writable: {error}", path.display())),
        (Ok(()), Some(free)) if free < FREE_BYTES_MIN => {
            ("note", format!("{}: only {} free; checkpoints may not fit", path.display(), gib(free)))
        }
        (Ok(()), free) => {
            let made = if exists { "" } else { "; it is made when needed" };
            let free = free.map_or(String::new(), |free| format!(", {} free", gib(free)));
            ("ok", format!("{}: writable{free}{made}", path.display()))
        }
    };
    Check {
        name,
        verdict,
        says,
        data: json!({"path": path.to_string_lossy(), "exists": exists, "free_bytes": free}),
    }
}

/// Free bytes of the file system that holds `path`.
fn free_bytes(path: &Path) -> Option<u64> {
    let disks = sysinfo::Disks::new_with_refreshed_list();
    let disk = disks
        .list()
        .iter()
        .filter(|disk| path.starts_with(disk.mount_point()))
        .max_by_key(|disk| disk.mount_point().as_os_str().len())?;
    Some(disk.available_space())
}

fn journal(state_dir: &Path) -> Check {
    let (verdict, says) = match Journal::open_existing(state_dir) {
        Ok(Some(_)) => ("ok", "it opens and its check passes".to_owned()),
        Ok(None) => ("ok", "none yet; it is made at the first start".to_owned()),
        Err(error) => ("fault", super::with_causes(&error)),
    };
    Check {
        name: "journal",
        verdict,
        says,
        data: json!({"path": Journal::path(state_dir).to_string_lossy()}),
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1u32 << 30))
}
