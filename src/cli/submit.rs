//! `boxwright submit`: jobs from the command line, with or without a running service.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use super::common::{ServiceArgs, wake_service};
use super::console::final_metrics;
use super::{CliError, EXIT_STOPPED, EXIT_USAGE};
use crate::actors::intake::{self, Submission, Verdict};
use crate::adapters::queue::JobStore;
use crate::adapters::queue::journal::Journal;
use crate::job::clock::unix_ms;
use crate::job::ids::TaskId;
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
    /// One JSON object per file
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
        match submit(&mut journal, &config, file, args.again)? {
            Outcome::Accepted(task_id, notes) => {
                for note in notes {
                    eprintln!("warning: {note}");
                }
                if args.json {
                    println!("{}", serde_json::json!({"file": file, "task_id": task_id, "state": "queued"}));
                } else {
                    println!("{}: queued as {task_id}", file.display());
                }
                accepted.push(task_id);
            }
            Outcome::Valid if args.json => {
                println!("{}", serde_json::json!({"file": file, "state": "valid"}))
            }
            Outcome::Valid => println!("{}: valid; it asked for no run", file.display()),
            Outcome::Refused(reason) => {
                refused = true;
                if args.json {
                    println!("{}", serde_json::json!({"file": file, "state": "rejected", "reason": reason}));
                }
                eprintln!("error: {} is refused:\n{reason}", file.display());
            }
        }
    }
    wake_service(&config);
    let waited = if args.wait { wait(&journal, &accepted)? } else { ExitCode::SUCCESS };
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

/// Waits until all of them have ended and shows how.
fn wait(journal: &Journal, task_ids: &[TaskId]) -> Result<ExitCode, CliError> {
    let mut code = ExitCode::SUCCESS;
    for task_id in task_ids {
        let record = loop {
            let record = journal
                .job(task_id)
                .map_err(|error| CliError::failed_from("the journal cannot be read", error))?
                .ok_or_else(|| CliError::failed(format!("job {task_id} is gone from the journal")))?;
            if record.state.is_terminal() {
                break record;
            }
            std::thread::sleep(WAIT_INTERVAL);
        };
        match record.state {
            JobState::Completed => println!("{}", final_metrics(&record)),
            JobState::Cancelled => {
                eprintln!("{task_id} was cancelled: {}", record.reason);
                if code == ExitCode::SUCCESS {
                    code = ExitCode::from(EXIT_STOPPED);
                }
            }
            _ => {
                let class = record.class.map_or("", |class| class.as_str());
                eprintln!("{task_id} failed ({class}): {}", record.reason);
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}
