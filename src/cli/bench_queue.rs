//! `boxwright bench queue`: jobs a second through the shared queue or the folder, measured from outside on a service of
//! its own.
//!
//! A service is started in a temporary folder with a trainer that does nothing (BOXWRIGHT_TRAINER, e.g. the one that
//! `tests/support/noop_trainer.c` makes). The jobs are pushed, or dropped, at once; the clock runs until the journal has
//! all of them, and until all have ended (with the stream: until all results are out). Memory is that of the service
//! and its children, read from the system all the while.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use redis::Commands;
use serde_json::json;

use super::CliError;
use crate::adapters::process::resident_bytes;
use crate::adapters::queue::journal::Journal;

/// Longest time for all of it.
const WAIT_MAX: Duration = Duration::from_secs(3600);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Measures how many jobs a second the service takes and ends.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Jobs.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub jobs: u32,
    /// Jobs at a time; 0 accepts files of the folder and runs none (nothing is taken from a stream without a slot).
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=64))]
    pub slots: u32,
    /// The way in; the stream needs REDIS_URL.
    #[arg(long, value_enum, default_value = "stream")]
    pub intake: Intake,
    /// One line of JSON.
    #[arg(long)]
    pub json: bool,
}

/// A way in.
#[derive(clap::ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intake {
    /// Entries of a Redis stream.
    Stream,
    /// Files in the watched folder.
    Folder,
}

/// A service that ends with its owner.
struct Service(Child);

impl Drop for Service {
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

/// What was measured.
#[derive(Debug, Default)]
struct Measured {
    accepted_s: f64,
    ended_s: f64,
    /// Of the service and all its children, at most.
    peak_bytes: u64,
    /// Of the service after a tenth of the jobs, and at the end.
    early_bytes: u64,
    late_bytes: u64,
}

fn failed<E>(what: &str) -> impl Fn(E) -> CliError
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    move |source| CliError::failed_from(what.to_owned(), source)
}

/// Runs the command.
///
/// # Errors
/// Without Redis for the stream, or when the service does not do it in time.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    let url = std::env::var("REDIS_URL").ok();
    if args.intake == Intake::Stream && url.is_none() {
        return Err(CliError::usage("the stream needs REDIS_URL; --intake folder does without"));
    }
    if args.intake == Intake::Stream && args.slots == 0 {
        return Err(CliError::usage(
            "without a slot nothing is taken from the stream; --slots 0 is for --intake folder",
        ));
    }
    let scratch = Scratch(std::env::temp_dir().join(format!("boxwright-queue-{}", std::process::id())));
    let root = scratch.0.as_path();
    for folder in ["configs", "aside"] {
        std::fs::create_dir_all(root.join(folder)).map_err(failed("the temporary folder cannot be made"))?;
    }
    let topic = format!("bench-{}", std::process::id());
    let mut client = match (&url, args.intake) {
        (Some(url), Intake::Stream) => {
            let client = redis::Client::open(url.as_str()).map_err(failed("REDIS_URL cannot be used"))?;
            Some(client.get_connection().map_err(failed("Redis does not answer"))?)
        }
        _ => None,
    };
    let mut service = start(root, &args, &topic)?;
    let state = root.join("state");
    wait(&mut service, "the service to make its journal", || Ok(Journal::path(&state).is_file()))?;
    let journal = Journal::open_existing(&state)
        .map_err(failed("the journal cannot be opened"))?
        .ok_or_else(|| CliError::failed("the service has no journal"))?;
    let began = Instant::now();
    match &mut client {
        Some(client) => push(client, &topic, args.jobs)?,
        None => drop_files(root, args.jobs)?,
    }
    let measured = watch(&args, &topic, &journal, client.as_mut(), &mut service, began)?;
    if let Some(client) = &mut client {
        let keys =
            [topic.clone(), format!("{topic}:high"), format!("{topic}:low"), format!("{topic}-results")];
        let _: i64 = client.del(&keys).map_err(failed("the benchmark's keys cannot be removed"))?;
    }
    print(&args, &measured);
    Ok(ExitCode::SUCCESS)
}

fn start(root: &Path, args: &Args, topic: &str) -> Result<Service, CliError> {
    let program = std::env::current_exe().map_err(failed("this program cannot find itself"))?;
    let text = format!(
        "slots: {{cpu: {}, gpus: none}}\nstore: {{folder: null}}\nlogging: {{level: WARNING}}\n\
         redis: {{topic: {topic}, result_topic: {topic}-results, log_ttl_seconds: 60, \
         progress_ttl_seconds: 60}}\nmachine_id: {topic}\n",
        args.slots
    );
    std::fs::write(root.join("service.yaml"), text).map_err(failed("the configuration cannot be written"))?;
    let mut command = Command::new(program);
    command.args(["run", "configs", "--service", "service.yaml"]).current_dir(root);
    for name in ["CONFIGS_DIR", "STATE_DIR", "RESULT_PATH", "LOG_DIR", "STOP_DIR", "MACHINE_ID", "TOPIC"] {
        command.env_remove(name);
    }
    for name in ["RESULT_TOPIC", "MINIO_ENDPOINT", "MLFLOW_TRACKING_URI"] {
        command.env_remove(name);
    }
    if args.intake == Intake::Folder {
        command.env_remove("REDIS_URL").env_remove("REDIS_HOST");
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().map(Service).map_err(failed("the service cannot be started"))
}

fn job(number: u32) -> String {
    format!("model: yolov8n\ntype: yolo\ntask_id: bench-{number}\ntrain: {{data: 'stub:steps=1,pause=0'}}\n")
}

fn push(client: &mut redis::Connection, topic: &str, jobs: u32) -> Result<(), CliError> {
    let numbers: Vec<u32> = (0..jobs).collect();
    for part in numbers.chunks(1000) {
        let mut pipe = redis::pipe();
        for number in part {
            pipe.xadd(topic, "*", &[("config", job(*number))]).ignore();
        }
        pipe.query::<()>(client).map_err(failed("the jobs cannot be pushed"))?;
    }
    Ok(())
}

fn drop_files(root: &Path, jobs: u32) -> Result<(), CliError> {
    for number in 0..jobs {
        let name = format!("bench-{number}.yaml");
        let aside = root.join("aside").join(&name);
        std::fs::write(&aside, job(number))
            .and_then(|()| std::fs::rename(&aside, root.join("configs").join(&name)))
            .map_err(failed("the jobs cannot be dropped"))?;
    }
    Ok(())
}

/// Looks until all have ended; memory all the while.
fn watch(
    args: &Args,
    topic: &str,
    journal: &Journal,
    mut client: Option<&mut redis::Connection>,
    service: &mut Service,
    began: Instant,
) -> Result<Measured, CliError> {
    let jobs = u64::from(args.jobs);
    let mut measured = Measured::default();
    let pid = service.0.id();
    while began.elapsed() < WAIT_MAX {
        alive(service)?;
        let own = resident_bytes(pid).unwrap_or(0);
        measured.peak_bytes = measured.peak_bytes.max(own + children_bytes(pid));
        let counts = journal.counts().map_err(failed("the journal cannot be read"))?;
        let (all, completed) = (counts.values().sum::<u64>(), counts.get("completed").copied().unwrap_or(0));
        if measured.accepted_s == 0.0 && all >= jobs {
            measured.accepted_s = began.elapsed().as_secs_f64();
        }
        if measured.early_bytes == 0 && (completed >= jobs / 10 || args.slots == 0 && all >= jobs / 10) {
            measured.early_bytes = own;
        }
        measured.late_bytes = own;
        let is_done = match &mut client {
            _ if args.slots == 0 => all >= jobs,
            None => completed >= jobs,
            Some(client) => {
                let results: u64 =
                    client.xlen(format!("{topic}-results")).map_err(failed("Redis does not answer"))?;
                results >= jobs && completed >= jobs
            }
        };
        if is_done {
            measured.ended_s = began.elapsed().as_secs_f64();
            return Ok(measured);
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Err(CliError::failed(format!("waited {} s in vain for the jobs to end", WAIT_MAX.as_secs())))
}

/// Resident memory of all processes whose parent is `pid`.
fn children_bytes(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|child| resident_bytes(child.parse().ok()?)).sum()
}

fn alive(service: &mut Service) -> Result<(), CliError> {
    match service.0.try_wait() {
        Ok(None) => Ok(()),
        Ok(Some(status)) => Err(CliError::failed(format!("the service ended: {status}"))),
        Err(error) => Err(CliError::failed_from("the service cannot be watched", error)),
    }
}

fn wait(
    service: &mut Service,
    what: &str,
    mut look: impl FnMut() -> Result<bool, CliError>,
) -> Result<(), CliError> {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(60) {
        alive(service)?;
        if look()? {
            return Ok(());
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Err(CliError::failed(format!("waited in vain for {what}")))
}

fn print(args: &Args, measured: &Measured) {
    let jobs = f64::from(args.jobs);
    let mib = |bytes: u64| (bytes as f64 / f64::from(1 << 20) * 10.0).round() / 10.0;
    if args.json {
        let line = json!({
            "jobs": args.jobs,
            "slots": args.slots,
            "intake": format!("{:?}", args.intake).to_lowercase(),
            "accepted_seconds": measured.accepted_s,
            "accepted_per_second": jobs / measured.accepted_s,
            "seconds": measured.ended_s,
            "jobs_per_second": jobs / measured.ended_s,
            "peak_rss_bytes": measured.peak_bytes,
            "service_rss_early_bytes": measured.early_bytes,
            "service_rss_late_bytes": measured.late_bytes,
        });
        println!("{line}");
        return;
    }
    println!(
        "accepted: {} jobs in {:.2} s, {:.0} a second",
        args.jobs,
        measured.accepted_s,
        jobs / measured.accepted_s
    );
    if args.slots > 0 {
        println!("ended:    {:.2} s, {:.1} jobs a second", measured.ended_s, jobs / measured.ended_s);
    }
    println!(
        "memory:   {} MiB at most with all processes; the service {} MiB after a tenth, {} MiB at the end",
        mib(measured.peak_bytes),
        mib(measured.early_bytes),
        mib(measured.late_bytes)
    );
}
