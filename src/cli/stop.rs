//! `boxwright stop`: end a job, whether the service runs or not.

use std::process::ExitCode;

use super::CliError;
use super::common::{ServiceArgs, find, open_journal, wake_service};
use crate::actors::outgoing;
use crate::actors::supervisor::request_stop;
use crate::adapters::queue::lock::{LockError, ProcessLock};
use crate::adapters::queue::{JobStore, QueueError};
use crate::job::record::CommandKind;
use crate::job::state::JobState;

/// Stop jobs; each saves a checkpoint and is cancelled
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The jobs
    #[arg(required = true)]
    pub task_ids: Vec<String>,
    #[command(flatten)]
    pub service: ServiceArgs,
}

/// Asks the jobs to stop.
///
/// # Errors
/// When a job is not known or the journal cannot be written.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    let config = args.service.load()?;
    let mut journal = open_journal(&config)?;
    // A job that is cancelled here is told of when a service starts.
    journal.set_dispatcher(outgoing::dispatcher(std::sync::Arc::new(config.clone())));
    let failed = |error: QueueError| CliError::failed_from("the journal cannot be written", error);
    // With the lock in hand there is no service, so a waiting job can be cancelled here and now.
    let lock = match ProcessLock::acquire(&config.state_dir) {
        Ok(lock) => Some(lock),
        Err(LockError::Held { .. }) => None,
        Err(error) => return Err(CliError::failed_from("the state folder cannot be used", error)),
    };
    let mut code = ExitCode::SUCCESS;
    for id in &args.task_ids {
        let record = find(&journal, id)?;
        match (record.state, &lock) {
            (state, _) if state.is_terminal() => {
                eprintln!("{id} is already {state}; nothing to stop");
                code = ExitCode::FAILURE;
            }
            (JobState::Queued | JobState::Interrupted, Some(_)) => {
                request_stop(&mut journal, &record, "stop was asked for on the command line")
                    .map_err(failed)?;
                println!("{id} is cancelled");
            }
            (state, lock) => {
                journal.push_command(&record.task_id, CommandKind::Stop).map_err(failed)?;
                match lock {
                    None => println!("{id} is {state}; the service was asked to stop it"),
                    Some(_) => println!("{id} is {state} and no service runs; it is stopped when one starts"),
                }
            }
        }
    }
    drop(lock);
    wake_service(&config);
    Ok(code)
}
