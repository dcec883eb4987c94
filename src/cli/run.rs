//! `boxwright run`: the service.

use std::path::PathBuf;
use std::process::ExitCode;

use super::common::ServiceArgs;
use super::console::Console;
use super::{CliError, EXIT_STOPPED};
use crate::actors::service::{Service, ServiceEnd};
use crate::adapters::logs::{self, LogFormat, LogOptions};
use crate::adapters::process;

/// Watch a folder and train what is dropped into it
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of dropped jobs [default: configs]
    pub configs_dir: Option<PathBuf>,
    /// Exit when the queue is empty: 0 if all jobs of this session completed, else 1
    #[arg(long)]
    pub once: bool,
    #[command(flatten)]
    pub service: ServiceArgs,
}

/// Runs the service until it is told to end.
///
/// # Errors
/// When it cannot start, or its actors fail for good.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    let mut config = args.service.load()?;
    if let Some(configs_dir) = args.configs_dir {
        config.configs_dir = configs_dir;
    }
    let console = Console::new();
    let logging = &config.logging;
    let _guard = logs::init(LogOptions {
        level: logging.level.clone(),
        format: LogFormat::parse(&logging.format),
        colour: console.is_terminal() && std::env::var_os("NO_COLOR").is_none(),
        console: console.writer(),
        dir: Some(logging.dir.clone()),
        files_max: logging.files_max,
        job_files_max: logging.job_files_max,
    })
    .map_err(|error| {
        // What a service under another user left behind is the usual reason; the lock would say it next.
        let owner = process::foreign_owner(&logging.dir);
        CliError::failed_from(format!("logging cannot be set up{owner}"), error)
    })?;
    tracing::info!(
        "boxwright {} watches {} (stop files: {}, state: {})",
        env!("CARGO_PKG_VERSION"),
        config.configs_dir.display(),
        config.stop_dir().display(),
        config.state_dir.display()
    );
    // Nothing is computed on a GPU here: a driver that fails takes a trainer with it, not the service.
    let service = Service::new(config, console)
        .map_err(|error| CliError::failed_from("the service cannot start", error))?;
    match service.run(args.once).map_err(|error| CliError::failed_from("the service ended", error))? {
        ServiceEnd::Empty { all_completed: true } => Ok(ExitCode::SUCCESS),
        ServiceEnd::Empty { all_completed: false } => Ok(ExitCode::FAILURE),
        ServiceEnd::Stopped => Ok(ExitCode::from(EXIT_STOPPED)),
    }
}
