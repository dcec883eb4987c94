//! `boxwright drain` and `boxwright undrain`: slots that take no more jobs, and those that do again.

use std::process::ExitCode;
use std::time::Duration;

use super::CliError;
use super::common::{ServiceArgs, wake_service};
use crate::actors::supervisor::{DRAINED_FLAG, drained};
use crate::adapters::queue::JobStore;
use crate::adapters::queue::journal::Journal;

/// Between two looks at the journal while waiting.
const WAIT_INTERVAL: Duration = Duration::from_millis(200);

/// Take no more jobs; what runs goes on to its end
#[derive(Debug, clap::Args)]
pub struct DrainArgs {
    /// Slots, as `boxwright status` names them ("cpu 0", "GPU 1"); all when none is named
    pub slots: Vec<String>,
    /// Wait until nothing runs in them
    #[arg(long)]
    pub wait: bool,
    #[command(flatten)]
    pub service: ServiceArgs,
}

/// Take jobs again
#[derive(Debug, clap::Args)]
pub struct UndrainArgs {
    /// Slots; all when none is named
    pub slots: Vec<String>,
    #[command(flatten)]
    pub service: ServiceArgs,
}

fn failed(error: crate::adapters::queue::QueueError) -> CliError {
    CliError::failed_from("the journal cannot be used", error)
}

/// Drains slots. The order survives restarts of the service.
///
/// # Errors
/// When the journal cannot be used, or a slot is not known.
pub fn drain(args: DrainArgs) -> Result<ExitCode, CliError> {
    let config = args.service.load()?;
    let journal = Journal::open(&config.state_dir).map_err(failed)?;
    check(&journal, &args.slots)?;
    let mut names = drained(journal.flag(DRAINED_FLAG).map_err(failed)?.as_deref());
    if args.slots.is_empty() {
        names = vec!["all".to_owned()];
    }
    names.extend(args.slots.iter().cloned());
    names.sort();
    names.dedup();
    store(&journal, &names)?;
    wake_service(&config);
    println!("drained: {}", names.join(", "));
    if args.wait {
        wait(&journal, &names)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Lets slots take jobs again.
///
/// # Errors
/// When the journal cannot be used, or a slot is not drained by itself.
pub fn undrain(args: UndrainArgs) -> Result<ExitCode, CliError> {
    let config = args.service.load()?;
    let journal = Journal::open(&config.state_dir).map_err(failed)?;
    let mut names = drained(journal.flag(DRAINED_FLAG).map_err(failed)?.as_deref());
    if args.slots.is_empty() {
        names.clear();
    } else if names.iter().any(|name| name == "all") {
        return Err(CliError::usage("the whole machine is drained; undrain it without naming a slot"));
    }
    names.retain(|name| !args.slots.contains(name));
    store(&journal, &names)?;
    wake_service(&config);
    match names.is_empty() {
        true => println!("no slot is drained"),
        false => println!("still drained: {}", names.join(", ")),
    }
    Ok(ExitCode::SUCCESS)
}

/// A slot that is not there would be drained in vain.
fn check(journal: &Journal, slots: &[String]) -> Result<(), CliError> {
    let known: Vec<String> = journal
        .board()
        .map_err(failed)?
        .map(|board| board.slots.into_iter().map(|slot| slot.name).collect())
        .unwrap_or_default();
    match slots.iter().find(|slot| !known.contains(slot)) {
        Some(slot) if !known.is_empty() => {
            Err(CliError::usage(format!("got the slot {slot:?}; allowed: {}", known.join(", "))))
        }
        _ => Ok(()),
    }
}

fn store(journal: &Journal, names: &[String]) -> Result<(), CliError> {
    let text = serde_json::to_string(names)
        .map_err(|error| CliError::failed_from("the names cannot be written", error))?;
    let value = (!names.is_empty()).then_some(text.as_str());
    journal.set_flag(DRAINED_FLAG, value).map_err(failed)
}

fn wait(journal: &Journal, names: &[String]) -> Result<(), CliError> {
    let is_meant = |slot: &str| names.iter().any(|name| name == "all" || name == slot);
    loop {
        let board = journal.board().map_err(failed)?;
        let busy = board.is_some_and(|board| {
            board.slots.iter().any(|slot| slot.task_id.is_some() && is_meant(&slot.name))
        });
        if !busy {
            return Ok(());
        }
        std::thread::sleep(WAIT_INTERVAL);
    }
}
