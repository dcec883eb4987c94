//! `boxwright bench reaction`: how fast the service reacts, measured from outside on a service of its own.
//!
//! A service is started in a temporary folder on a small shapes set. For each round a job file is dropped
//! (written beside, then renamed) and the clock runs until its first training step is reported; then its stop
//! file is touched and the clock runs until the journal says `cancelled`. Between rounds the service is idle:
//! its memory and processor time are read from the system.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use super::CliError;
use crate::adapters::queue::JobStore;
use crate::adapters::queue::journal::Journal;
use crate::data::synth::{SynthArgs, write_dataset};
use crate::job::state::JobState;

/// Longest wait for anything.
const WAIT_MAX: Duration = Duration::from_secs(120);
/// How often a condition is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Measures reaction times and the idle cost of the service.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Jobs dropped and stopped.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Seconds of idleness watched.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub idle_seconds: u32,
    /// One line of JSON.
    #[arg(long)]
    pub json: bool,
}

/// A service that ends with its owner.
struct ServiceProcess(Child);

impl Drop for ServiceProcess {
    fn drop(&mut self) {
        // It may be gone already; there is nobody left to tell.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A temporary folder that goes with its owner.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn failed<E>(what: &str) -> impl Fn(E) -> CliError
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    move |source| CliError::failed_from(what.to_owned(), source)
}

/// Runs the command.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    let root = std::env::temp_dir().join(format!("boxwright-reaction-{}", std::process::id()));
    let scratch = Scratch(root);
    let root = scratch.0.as_path();
    let configs = root.join("configs");
    std::fs::create_dir_all(&configs).map_err(failed("the temporary folder cannot be made"))?;
    let data = root.join("datasets/shapes");
    write_dataset(&data, &SynthArgs::default()).map_err(failed("the shapes set cannot be made"))?;
    let mut service = start(root, &configs)?;
    let state = root.join("state");
    wait("the service to make its journal", || Ok(Journal::path(&state).is_file().then_some(())))?;

    let (mut first_step, mut cancelled) = (Vec::new(), Vec::new());
    let mut idle = None;
    for round in 0..=args.rounds {
        let (step, stop) = one_job(root, &configs, &state, &data, round, &mut service)?;
        // The first job pays for the scan of the set and cold files.
        if round > 0 {
            first_step.push(step);
            cancelled.push(stop);
        }
        if round == args.rounds {
            idle = Some(watch_idle(service.0.id(), Duration::from_secs(args.idle_seconds.into()))?);
        }
    }
    let (idle_mib, idle_cpu) = idle.expect("the last round measures it");
    print(&args, &mut first_step, &mut cancelled, idle_mib, idle_cpu);
    Ok(ExitCode::SUCCESS)
}

fn start(root: &Path, configs: &Path) -> Result<ServiceProcess, CliError> {
    let program = std::env::current_exe().map_err(failed("this program cannot find itself"))?;
    let mut command = Command::new(program);
    command.arg("run").arg(configs).current_dir(root).stdin(Stdio::null());
    for (name, folder) in
        [("STATE_DIR", "state"), ("RESULT_PATH", "runs"), ("LOG_DIR", "logs"), ("STOP_DIR", "stop")]
    {
        command.env(name, root.join(folder));
    }
    std::fs::create_dir_all(root.join("stop")).map_err(failed("the stop folder cannot be made"))?;
    command.env_remove("CONFIGS_DIR").stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().map(ServiceProcess).map_err(failed("the service cannot be started"))
}

/// Seconds from drop to first step, and from stop file to `cancelled`.
fn one_job(
    root: &Path,
    configs: &Path,
    state: &Path,
    data: &Path,
    round: u32,
    service: &mut ServiceProcess,
) -> Result<(f64, f64), CliError> {
    let id = format!("reaction-{round}");
    let text = format!(
        "model: yolov8n\ntype: yolo\ntask_id: {id}\ntrain:\n  data: {}\n  epochs: 1000\n  imgsz: 160\n  batch: 8\n  plots: false\n",
        data.join("data.yaml").display()
    );
    let beside = root.join("job.part");
    std::fs::write(&beside, text).map_err(failed("the job file cannot be written"))?;
    let start = Instant::now();
    std::fs::rename(&beside, configs.join(format!("{id}.yaml")))
        .map_err(failed("the job file cannot be dropped"))?;
    let task = id.parse().map_err(failed("the task id"))?;
    let journal = Journal::open_existing(state)
        .map_err(failed("the journal cannot be opened"))?
        .ok_or_else(|| CliError::failed("the service has no journal"))?;
    let mut events = None;
    wait("the first training step", || {
        alive(service)?;
        if events.is_none() {
            let job = journal.job(&task).map_err(failed("the journal cannot be read"))?;
            events = job.map(|job| job.run_dir.join("events.jsonl"));
        }
        let seen = events.as_ref().and_then(|path| std::fs::read_to_string(path).ok());
        Ok(seen.is_some_and(|text| text.contains("\"event\":\"step\"")).then_some(()))
    })?;
    let step = start.elapsed().as_secs_f64();
    let start = Instant::now();
    std::fs::write(root.join("stop").join(format!("stop_training_{id}.txt")), "")
        .map_err(failed("the stop file cannot be written"))?;
    wait("the job to be cancelled", || {
        alive(service)?;
        let job = journal.job(&task).map_err(failed("the journal cannot be read"))?;
        match job.map(|job| (job.state, job.reason)) {
            Some((JobState::Cancelled, _)) => Ok(Some(())),
            Some((JobState::Failed, reason)) => Err(CliError::failed(format!("the job failed: {reason}"))),
            _ => Ok(None),
        }
    })?;
    Ok((step, start.elapsed().as_secs_f64()))
}

fn alive(service: &mut ServiceProcess) -> Result<(), CliError> {
    match service.0.try_wait() {
        Ok(None) => Ok(()),
        Ok(Some(status)) => Err(CliError::failed(format!("the service ended: {status}"))),
        Err(error) => Err(CliError::failed_from("the service cannot be watched", error)),
    }
}

/// Waits until `look` has something, at most [`WAIT_MAX`].
fn wait<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>, CliError>) -> Result<T, CliError> {
    let start = Instant::now();
    while start.elapsed() < WAIT_MAX {
        if let Some(found) = look()? {
            return Ok(found);
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Err(CliError::failed(format!("waited {} s in vain for {what}", WAIT_MAX.as_secs())))
}

/// Resident memory in MiB, and the share of one core used, over `span` of idleness.
fn watch_idle(pid: u32, span: Duration) -> Result<(f64, f64), CliError> {
    let read = |name: &str| {
        std::fs::read_to_string(format!("/proc/{pid}/{name}"))
            .map_err(failed("the system does not tell of processes"))
    };
    let ticks = || -> Result<f64, CliError> {
        let stat = read("stat")?;
        // Fields after the name in parentheses: user and system time are the 12th and 13th.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        let number = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(f64::NAN);
        Ok(number(11) + number(12))
    };
    // The child of the last job has just ended; its end is still being written down.
    std::thread::sleep(Duration::from_secs(1));
    let before = ticks()?;
    std::thread::sleep(span);
    let used = ticks()? - before;
    let status = read("status")?;
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap_or("");
    let kib = line.split_whitespace().nth(1).and_then(|n| n.parse::<f64>().ok()).unwrap_or(f64::NAN);
    // SAFETY: asks the system for a number; touches no memory of ours.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
    Ok((kib / 1024.0, used / per_second / span.as_secs_f64()))
}

fn print(args: &Args, first_step: &mut [f64], cancelled: &mut [f64], idle_mib: f64, idle_cpu: f64) {
    let summary = |times: &mut [f64]| {
        times.sort_by(f64::total_cmp);
        [times[0], times[times.len() / 2], times[times.len() - 1]].map(|t| (t * 1e4).round() / 10.0)
    };
    let (step, stop) = (summary(first_step), summary(cancelled));
    if args.json {
        let line = serde_json::json!({
            "rounds": args.rounds, "drop_to_first_step_ms": {"min": step[0], "median": step[1], "max": step[2]},
            "stop_to_cancelled_ms": {"min": stop[0], "median": stop[1], "max": stop[2]},
            "idle_mib": (idle_mib * 10.0).round() / 10.0, "idle_core_share": idle_cpu,
        });
        println!("{line}");
        return;
    }
    println!(
        "dropped file to first training step: median {} ms ({} to {}, {} rounds)",
        step[1], step[0], step[2], args.rounds
    );
    println!("stop file to cancelled:              median {} ms ({} to {})", stop[1], stop[0], stop[2]);
    println!("idle service:                        {idle_mib:.1} MiB, {:.2} % of one core", idle_cpu * 100.0);
}
