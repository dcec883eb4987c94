//! `boxwright resume`: go on with a job that failed or was cancelled, from its last checkpoint.

use std::process::ExitCode;

use super::CliError;
use super::common::{ServiceArgs, find, open_journal, wake_service};
use crate::adapters::queue::JobStore;
use crate::adapters::store::restore::has_checkpoint;
use crate::job::record::{Continued, NewJob};
use crate::job::state::JobState;
use crate::train::child::JobMode;

/// Go on with a failed or cancelled job from its last checkpoint
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The job
    pub task_id: String,
    #[command(flatten)]
    pub service: ServiceArgs,
}

/// Queues the job again, in its old run folder.
///
/// # Errors
/// When the job is not known, is active, has completed, or no checkpoint of it can be left.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    let config = args.service.load()?;
    let mut journal = open_journal(&config)?;
    let record = find(&journal, &args.task_id)?;
    match record.state {
        JobState::Failed | JobState::Cancelled => {}
        JobState::Completed => {
            return Err(CliError::failed(format!(
                "{} has completed; use `boxwright submit --again` to train it anew",
                record.task_id
            )));
        }
        state => {
            return Err(CliError::failed(format!("{} is {state}; it goes on by itself", record.task_id)));
        }
    }
    let continues = Continued::from(&record);
    let is_here = has_checkpoint(&record.run_dir) || record.spec.mode != JobMode::Train;
    let is_stored = config.store.is_on();
    if !is_here && !is_stored && continues.has_checkpoint {
        return Err(CliError::failed(format!(
            "no checkpoint of {} is left in {}, and there is no object store; use `boxwright submit --again` to train it \
             from its beginning",
            record.task_id,
            record.run_dir.display()
        )));
    }
    let job = NewJob {
        source: record.source,
        content_sha256: record.content_sha256,
        run_dir: record.run_dir,
        reason: format!("resumed on the command line after it was {}", record.state),
        spec: record.spec.as_ref().clone(),
        shared: None,
        continues: Some(continues),
    };
    let accepted = journal
        .accept(job, None)
        .map_err(|error| CliError::failed_from("the journal did not take the job", error))?;
    wake_service(&config);
    println!("{} is queued again (generation {})", accepted.task_id, accepted.generation);
    match (is_here, is_stored) {
        (true, _) => {}
        (false, true) => {
            println!("its run folder has no checkpoint: the newest in the object store is looked for first")
        }
        (false, false) => println!("it has no checkpoint yet: it starts from its beginning"),
    }
    Ok(ExitCode::SUCCESS)
}
