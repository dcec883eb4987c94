//! `boxwright recommend`: what to train on a dataset first, and why.

mod shared;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;
use sha2::{Digest, Sha256};

use self::shared::SharedCache;
use super::CliError;
use super::common::ServiceArgs;
use crate::adapters::queue::JobStore;
use crate::adapters::queue::journal::Journal;
use crate::data::DatasetOptions;
use crate::data::metadata::{Described, Metadata, cache_folder, describe};
use crate::data::shelf::{SecondTier, Shelf, now_unix_ms};
use crate::detect::weights::safetensors;
use crate::job::record::JobRecord;
use crate::job::service::ServiceConfig;
use crate::job::state::JobState;
use crate::train::args::Device;
use crate::train::error::TrainError;
use crate::train::recommend::machine::Machine;
use crate::train::recommend::{CODE, EarlierRun, Goal, LIFETIME, Recommendation, job, recommend};

/// Earlier jobs that are looked through.
const JOBS_MAX: u32 = 1000;
/// The score that earlier runs are compared by.
const SCORE: &str = "metrics/mAP50-95(B)";

/// Say what to train on a dataset first, and why, as a job ready to submit
///
/// The same data and goal give the same answer, which is kept for half an hour; `--fresh` works it out anew. Machines
/// with one Redis share what is kept; nobody else is asked.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Dataset file, or a folder that holds one
    pub data: PathBuf,
    /// What matters most
    #[arg(long, default_value = "balanced", value_parser = ["fast", "balanced", "accurate"])]
    pub goal: String,
    /// The device that will train: cpu, cuda or cuda:N [default: the best one]
    #[arg(long)]
    pub device: Option<Device>,
    /// Write the job to this file, which must not exist
    #[arg(long, value_name = "FILE")]
    pub write: Option<PathBuf>,
    /// Use nothing that was kept
    #[arg(long)]
    pub fresh: bool,
    /// One line of JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub service: ServiceArgs,
}

/// A recommendation, and whether it was known.
struct Answer {
    recommended: Recommendation,
    is_hit: bool,
}

/// Recommends.
///
/// # Errors
/// The dataset or the device cannot be used, the journal cannot be read, the file exists or cannot be written.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    if let Some(path) = args.write.as_ref().filter(|path| path.symlink_metadata().is_ok()) {
        return Err(CliError::usage(format!("{} exists; it is not overwritten", path.display())));
    }
    let config = args.service.load()?;
    let second = SharedCache::open(&config);
    let second = second.as_ref().map(|shared| shared as &dyn SecondTier);
    let options = DatasetOptions::default();
    let described = describe(&args.data, &options, second, args.fresh)?;
    let history = history(&config, &described.metadata)?;
    let answer = answer(&args, &options, &described.metadata, &history, second)?;
    let data = std::path::absolute(&args.data).unwrap_or_else(|_| args.data.clone());
    let of = (data.as_path(), described.metadata.fingerprint.as_str());
    let device = args.device.and_then(device_word);
    if let Some(path) = &args.write {
        write_new(path, &job::yaml(of, &answer.recommended, device.as_deref(), true))?;
    }
    let plain = job::yaml(of, &answer.recommended, device.as_deref(), false);
    if args.json {
        print_json(&args, &described, &answer, &plain);
    } else {
        print!("{}\n{plain}", answer.recommended.text(&described.metadata));
        if let Some(path) = &args.write {
            println!("\nwritten to {}: `boxwright submit` takes it", path.display());
        }
    }
    // Apart from the answer, which is the same every time.
    let saved = described.metadata.counted_in_ms;
    let saved = if described.is_hit { format!(" ({saved} ms saved)") } else { String::new() };
    eprintln!(
        "metadata cache={}{saved}, recommendation cache={}",
        cache_word(described.is_hit),
        cache_word(answer.is_hit)
    );
    Ok(ExitCode::SUCCESS)
}

fn cache_word(is_hit: bool) -> &'static str {
    if is_hit { "hit" } else { "miss" }
}

fn device_word(device: Device) -> Option<String> {
    match device {
        Device::Default => None,
        Device::Cpu => Some("cpu".to_owned()),
        Device::Cuda(number) => Some(format!("cuda:{number}")),
    }
}

/// Runs on the same data that completed here and whose best weights are still there, newest first.
fn history(config: &ServiceConfig, data: &Metadata) -> Result<Vec<EarlierRun>, CliError> {
    let failed = |error| CliError::failed_from("the journal cannot be read", error);
    let Some(journal) = Journal::open_existing(&config.state_dir).map_err(failed)? else {
        return Ok(Vec::new());
    };
    let records = journal.recent(JOBS_MAX).map_err(failed)?;
    Ok(records.iter().filter_map(|record| earlier_run(record, &data.fingerprint)).collect())
}

fn earlier_run(record: &JobRecord, fingerprint: &str) -> Option<EarlierRun> {
    let result = record.result.as_ref().filter(|_| record.state == JobState::Completed)?;
    let data_fingerprint =
        result["data_fingerprint"].as_str().filter(|said| *said == fingerprint)?.to_owned();
    let weights = PathBuf::from(result["best"].as_str()?);
    // A file that cannot be read is no start for anything.
    let texts = safetensors::read_texts(&weights).ok()?;
    Some(EarlierRun {
        task_id: record.task_id.to_string(),
        model: texts.get("model")?.clone(),
        data_fingerprint,
        names: serde_json::from_str(texts.get("names")?).ok()?,
        map: result["metrics"][SCORE].as_f64()?,
        weights,
    })
}

fn answer(
    args: &Args,
    options: &DatasetOptions,
    data: &Metadata,
    history: &[EarlierRun],
    second: Option<&dyn SecondTier>,
) -> Result<Answer, CliError> {
    let goal = Goal::from_word(&args.goal).unwrap_or(Goal::Balanced);
    let boxes_max = data.train.boxes_per_image_max;
    let machine = Machine::open(args.device.unwrap_or_default(), data.names.len(), boxes_max);
    let machine = machine.map_err(|error| told(error, "the device cannot be used"))?;
    let folder = cache_folder(options);
    let shelf = folder.as_ref().map(|folder| Shelf::new(folder, "recommendation", LIFETIME, second));
    let key = key(data, goal, &machine, history);
    let known = shelf.as_ref().filter(|_| !args.fresh).and_then(|shelf| shelf.get(&key, now_unix_ms()));
    if let Some(recommended) = known.filter(|known: &Recommendation| known.is_sound(goal, history)) {
        return Ok(Answer { recommended, is_hit: true });
    }
    let recommended = recommend(data, &machine, history, goal);
    let recommended = recommended.map_err(|error| told(error, "nothing can be recommended"))?;
    if let Some(shelf) = &shelf {
        shelf.put(&key, &recommended, now_unix_ms());
    }
    Ok(Answer { recommended, is_hit: false })
}

/// Data, goal, code; and the device and the runs to start from, which an answer for others must not stand in for.
fn key(data: &Metadata, goal: Goal, machine: &Machine, history: &[EarlierRun]) -> String {
    let mut hash = Sha256::new();
    hash.update(machine.identity());
    for run in history {
        hash.update(format!("\n{} {} {:?} {}", run.task_id, run.model, run.weights, run.map));
    }
    let rest: String = hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}:{}:{CODE}:{rest}", data.fingerprint, goal.word())
}

fn told(error: TrainError, what: &str) -> CliError {
    match error {
        TrainError::Config { .. } => CliError::usage_from(what, error),
        _ => CliError::failed_from(what, error),
    }
}

fn write_new(path: &Path, text: &str) -> Result<(), CliError> {
    let failed = |error| CliError::failed_from(format!("cannot write {}", path.display()), error);
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(path).map_err(failed)?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    written.map_err(|error| {
        // Half a job must not be submitted; that it cannot be removed changes nothing about the failure.
        let _ = std::fs::remove_file(path);
        failed(error)
    })
}

fn print_json(args: &Args, described: &Described, answer: &Answer, yaml: &str) {
    let line = json!({
        "data": args.data.to_string_lossy(),
        "metadata": described.metadata,
        "recommendation": answer.recommended,
        "job": yaml,
        "written": args.write.as_ref().map(|path| path.to_string_lossy()),
        "cache": {
            "metadata": cache_word(described.is_hit),
            "recommendation": cache_word(answer.is_hit),
            "images_scanned": described.images_scanned,
            "saved_ms": if described.is_hit { described.metadata.counted_in_ms } else { 0 },
        },
    });
    println!("{line}");
}
