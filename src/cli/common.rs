//! What several commands about jobs need.

use std::path::PathBuf;

use super::CliError;
use crate::actors::service::inbox;
use crate::adapters::process;
use crate::adapters::queue::JobStore;
use crate::adapters::queue::journal::Journal;
use crate::job::ids::TaskId;
use crate::job::record::JobRecord;
use crate::job::service::ServiceConfig;
use crate::job::slot::SlotRecord;

/// Where the service is described and where its state lies.
#[derive(Debug, Clone, clap::Args)]
pub struct ServiceArgs {
    /// Service configuration [default: configs/service/boxwright.yaml when it is there]
    #[arg(long, value_name = "FILE")]
    pub service: Option<PathBuf>,
    /// State folder, over the configuration
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

impl ServiceArgs {
    /// The configuration: the file, the environment over it, the arguments over both.
    ///
    /// # Errors
    /// A usage error with everything that is wrong.
    pub fn load(&self) -> Result<ServiceConfig, CliError> {
        let shipped = PathBuf::from("configs/service/boxwright.yaml");
        let path = match &self.service {
            Some(path) => Some(path.clone()),
            None => shipped.is_file().then_some(shipped),
        };
        let mut config = ServiceConfig::load(path.as_deref(), |name| std::env::var(name).ok())
            .map_err(|error| CliError::usage_from("the service configuration cannot be used", error))?;
        if let Some(state_dir) = &self.state_dir {
            config.state_dir = state_dir.clone();
        }
        Ok(config)
    }
}

/// Opens the journal of a service that has run at least once.
///
/// # Errors
/// When there is none, or it cannot be used.
pub fn open_journal(config: &ServiceConfig) -> Result<Journal, CliError> {
    Journal::open_existing(&config.state_dir)
        .map_err(|error| CliError::failed_from("the journal cannot be used", error))?
        .ok_or_else(|| {
            let place = Journal::path(&config.state_dir);
            CliError::failed(format!(
                "there is no journal at {}; no job was ever submitted here",
                place.display()
            ))
        })
}

/// The newest record of a task id given on the command line.
///
/// # Errors
/// When the text is no task id or the job is not known.
pub fn find(journal: &Journal, id: &str) -> Result<JobRecord, CliError> {
    let task_id: TaskId =
        id.parse().map_err(|error| CliError::usage_from("the task id cannot be used", error))?;
    journal
        .job(&task_id)
        .map_err(|error| CliError::failed_from("the journal cannot be read", error))?
        .ok_or_else(|| CliError::failed(format!("no job {task_id} is known here")))
}

/// The slots of the service that runs on this journal; `None` when none does.
///
/// # Errors
/// When the journal cannot be read.
pub fn running_slots(journal: &Journal) -> Result<Option<Vec<SlotRecord>>, CliError> {
    let board =
        journal.board().map_err(|error| CliError::failed_from("the journal cannot be read", error))?;
    Ok(board.filter(|board| process::is_alive(board.service)).map(|board| board.slots))
}

/// Lets a running service know that something was written to the journal. Without one nothing happens.
pub fn wake_service(config: &ServiceConfig) {
    // The service also looks once a second by itself.
    let _ = std::fs::write(inbox(&config.state_dir).join("wake"), b"");
}
