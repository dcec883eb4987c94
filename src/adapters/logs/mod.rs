//! Logs: a readable console, one file a day for the service, one file for each job.
//!
//! Every event goes to the console and to the service's file; one that carries a `task_id` goes to that job's file
//! too. Three formats: `simple`, `detailed` (time | level | module:line - message) and `json` (one object a line).
//! The [`LogGuard`] must be kept until the end: dropping it writes out what waits.

mod jobs;
mod layer;
mod line;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing_appender::non_blocking::WorkerGuard;
use tracing_appender::rolling::{RollingFileAppender, Rotation};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;

pub use jobs::{JobLogs, job_log_begin, job_log_path, keep_job_log, let_job_log_go, set_job_log};
pub use layer::{LogLayer, Sink};
pub use line::{LogFormat, LogLine};

/// Writes one finished line to the console; a progress bar can step aside while it does.
pub type ConsoleWriter = Arc<dyn Fn(&str) + Send + Sync>;

/// What is logged and where.
pub struct LogOptions {
    /// Least level, when RUST_LOG does not say: TRACE, DEBUG, INFO, WARNING, ERROR.
    pub level: String,
    /// Format of all lines.
    pub format: LogFormat,
    /// Colours on the console.
    pub colour: bool,
    /// Where console lines go.
    pub console: ConsoleWriter,
    /// Folder of the files; `None` writes none.
    pub dir: Option<PathBuf>,
    /// Daily files kept.
    pub files_max: usize,
    /// Job files kept. Those of jobs that have begun and not ended are, also beyond the number.
    pub job_files_max: usize,
}

/// Why there are no log files.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The folder or the file cannot be made.
    #[error("cannot write logs in {dir}")]
    Open {
        /// The folder.
        dir: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Logging was already set up.
    #[error("logging is already set up")]
    Twice,
}

/// Keeps the writers alive; dropping it writes out what waits.
#[derive(Default)]
pub struct LogGuard {
    _service: Option<WorkerGuard>,
    _jobs: Option<JobLogs>,
}

/// The console writer that prints to standard error.
pub fn stderr_console() -> ConsoleWriter {
    Arc::new(|line| {
        use std::io::Write;
        // A closed console is no reason to fail.
        let _ = writeln!(std::io::stderr().lock(), "{line}");
    })
}

/// Sets up logging for the whole process. Call it before any thread starts, so that local time is known.
///
/// # Errors
/// [`LogError`] when the files cannot be written.
pub fn init(options: LogOptions) -> Result<LogGuard, LogError> {
    let offset = line::local_offset();
    let mut guard = LogGuard::default();
    let mut sinks =
        vec![Sink::Console { format: options.format, colour: options.colour, write: options.console }];
    if let Some(dir) = &options.dir {
        let (writer, worker) = service_file(dir, options.files_max)?;
        guard._service = Some(worker);
        sinks.push(Sink::File { format: options.format, writer });
        let jobs = JobLogs::start(dir.join("jobs"), options.format, options.job_files_max)
            .map_err(|source| LogError::Open { dir: dir.join("jobs"), source: source.into() })?;
        sinks.push(Sink::Jobs(jobs.sender()));
        guard._jobs = Some(jobs);
    }
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(filter_of(&options.level)));
    let subscriber = tracing_subscriber::registry().with(filter).with(LogLayer::new(sinks, offset));
    tracing::subscriber::set_global_default(subscriber).map_err(|_| LogError::Twice)?;
    Ok(guard)
}

/// The daily file of the service, written by its own thread.
fn service_file(
    dir: &Path,
    files_max: usize,
) -> Result<(tracing_appender::non_blocking::NonBlocking, WorkerGuard), LogError> {
    let failed =
        |source: Box<dyn std::error::Error + Send + Sync>| LogError::Open { dir: dir.to_owned(), source };
    std::fs::create_dir_all(dir).map_err(|error| failed(error.into()))?;
    let appender = RollingFileAppender::builder()
        .rotation(Rotation::DAILY)
        .filename_prefix("boxwright")
        .filename_suffix("log")
        .max_log_files(files_max)
        .build(dir)
        .map_err(|error| failed(error.into()))?;
    Ok(tracing_appender::non_blocking(appender))
}

/// The filter of a level. Libraries speak from warnings on: what they say of every connection is for RUST_LOG.
fn filter_of(level: &str) -> &'static str {
    match level.to_ascii_uppercase().as_str() {
        "TRACE" => "warn,boxwright=trace",
        "DEBUG" => "warn,boxwright=debug",
        "WARNING" | "WARN" => "warn",
        "ERROR" => "error",
        _ => "warn,boxwright=info",
    }
}
