//! `boxwright submit`: jobs from the command line, with or without a running service.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value as Json, json};

use super::common::{ServiceArgs, running_slots, wake_service};
use super::console::final_metrics;
use super::{CliError, EXIT_STOPPED, EXIT_USAGE};
use crate::actors::intake::{self, Submission, Verdict};
use crate::adapters::queue::JobStore;
use crate::adapters::queue::journal::Journal;
use crate::job::clock::unix_ms;
use crate::job::ids::TaskId;
use crate::job::record::JobRecord;
use crate::job::service::ServiceConfig;
use crate::job::spec::Overlay;
use crate::job::state::JobState;

/// Largest file read, and one byte more so that the refusal can be exact.
const BYTES_MAX: u64 = (1 << 20) + 1;
/// Between two looks at the journal while waiting.
const WAIT_INTERVAL: Duration = Duration::from_millis(200);

/// Queue one or more jobs
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Job files
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// Wait until they have ended: 0 if all completed, 130 if one was cancelled, else 1
    #[arg(long)]
    pub wait: bool,
    /// Run again what has completed with this very content
    #[arg(long)]
    pub again: bool,
    /// One JSON object per file, with `--wait` when its job has ended
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub service: ServiceArgs,
}

/// Queues the files.
///
/// # Errors
/// When the journal cannot be used.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    let config = args.service.load()?;
    let mut journal = Journal::open(&config.state_dir)
        .map_err(|error| CliError::failed_from("the journal cannot be used", error))?;
    let mut accepted = Vec::new();
    let mut refused = false;
    for file in &args.files {
        let name = file.to_string_lossy();
        match submit(&mut journal, &config, file, args.again)? {
            Outcome::Accepted(task_id, notes) => {
                for note in notes {
                    eprintln!("warning: {note}");
                }
                match (args.json, args.wait) {
                    (true, false) => {
                        println!("{}", json!({"file": name, "task_id": task_id, "state": "queued"}))
                    }
                    // The object of this file comes with the end of its job.
                    (true, true) => eprintln!("{name}: queued as {task_id}"),
                    (false, _) => println!("{name}: queued as {task_id}"),
                }
                accepted.push((file.as_path(), task_id));
            }
            Outcome::Valid if args.json => println!("{}", json!({"file": name, "state": "valid"})),
            Outcome::Valid => println!("{name}: valid; it asked for no run"),
            Outcome::Refused(reason) => {
                refused = true;
                if args.json {
                    println!("{}", json!({"file": name, "state": "rejected", "reason": reason}));
                }
                eprintln!("error: {name} is refused:\n{reason}");
            }
        }
    }
    wake_service(&config);
    let waited = if args.wait { wait(&journal, &accepted, args.json)? } else { ExitCode::SUCCESS };
    Ok(if refused { ExitCode::from(EXIT_USAGE) } else { waited })
}

enum Outcome {
    Accepted(TaskId, Vec<String>),
    Valid,
    Refused(String),
}

fn submit(
    journal: &mut Journal,
    config: &ServiceConfig,
    file: &Path,
    again: bool,
) -> Result<Outcome, CliError> {
    let (bytes, modified_unix_ms) = match read(file) {
        Ok(read) => read,
        Err(error) => return Ok(Outcome::Refused(format!("{}: cannot be read: {error}", file.display()))),
    };
    let working_dir = std::env::current_dir()
        .map_err(|error| CliError::failed_from("the working folder cannot be found", error))?;
    let submission = Submission {
        source: file.to_string_lossy().into_owned(),
        bytes,
        modified_unix_ms,
        keep_verdict: false,
        again,
        shared: None,
        overlay: Overlay::default(),
        taker: None,
    };
    let verdict = intake::decide(journal, &submission, &config.spec_context(working_dir))
        .map_err(|error| CliError::failed_from("the journal did not take the job", error))?;
    Ok(match verdict {
        Verdict::Accepted(record) => {
            let notes = record.spec.ignored.iter().chain(&record.spec.overridden);
            let notes = notes.map(|note| format!("key `{}`: {}", note.key, note.reason)).collect();
            Outcome::Accepted(record.task_id, notes)
        }
        Verdict::DryRun(_) => Outcome::Valid,
        Verdict::Rejected(reason) => Outcome::Refused(reason),
        Verdict::Known(entry) => Outcome::Refused(entry.verdict),
    })
}

fn read(file: &Path) -> std::io::Result<(Vec<u8>, i64)> {
    use std::io::Read;
    let open = std::fs::File::open(file)?;
    let modified = open.metadata()?.modified().map(unix_ms).unwrap_or(0);
    let mut bytes = Vec::new();
    open.take(BYTES_MAX).read_to_end(&mut bytes)?;
    Ok((bytes, modified))
}

/// Waits until all of them have ended and shows how, each as it stands in the list.
fn wait(journal: &Journal, jobs: &[(&Path, TaskId)], as_json: bool) -> Result<ExitCode, CliError> {
    let mut code = ExitCode::SUCCESS;
    let mut is_told = false;
    for (file, task_id) in jobs {
        let record = loop {
            let record = journal
                .job(task_id)
                .map_err(|error| CliError::failed_from("the journal cannot be read", error))?
                .ok_or_else(|| CliError::failed(format!("job {task_id} is gone from the journal")))?;
            if record.state.is_terminal() {
                break record;
            }
            if !is_told && running_slots(journal)?.is_none() {
                is_told = true;
                eprintln!("no service runs here: the jobs wait until one is started (`boxwright run`)");
            }
            std::thread::sleep(WAIT_INTERVAL);
        };
        match record.state {
            JobState::Completed => {}
            JobState::Cancelled if code == ExitCode::SUCCESS => code = ExitCode::from(EXIT_STOPPED),
            JobState::Cancelled => {}
            _ => code = ExitCode::FAILURE,
        }
        match as_json {
            true => println!("{}", ended_json(file, &record)),
            false => show_ended(&record),
        }
    }
    Ok(code)
}

fn ended_json(file: &Path, record: &JobRecord) -> Json {
    json!({
        "file": file.to_string_lossy(),
        "task_id": record.task_id,
        "state": record.state,
        "class": record.class,
        "reason": record.reason,
        "result": record.result,
    })
}

fn show_ended(record: &JobRecord) {
    let (task_id, reason) = (&record.task_id, &record.reason);
    match record.state {
        JobState::Completed => println!("{}", final_metrics(record)),
        JobState::Failed => {
            let class = record.class.map_or("", |class| class.as_str());
            eprintln!("{task_id} failed ({class}): {reason}");
        }
        state => eprintln!("{task_id} was {state}: {reason}"),
    }
}
