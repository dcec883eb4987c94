//! `boxwright drain` and `boxwright undrain`: slots that take no more jobs, and those that do again.

use std::process::ExitCode;
use std::time::Duration;

use super::CliError;
use super::common::{ServiceArgs, running_slots, wake_service};
use crate::actors::supervisor::{DRAINED_FLAG, drained};
use crate::adapters::process;
use crate::adapters::queue::JobStore;
use crate::adapters::queue::journal::Journal;
use crate::job::slot::{SlotRecord, SlotState};

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
    let mut names = drained(journal.flag(DRAINED_FLAG).map_err(failed)?.as_deref());
    check(&journal, &args.slots, &names)?;
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
        // Slots that were drained before may be given back meanwhile.
        let asked = if args.slots.is_empty() { &names } else { &args.slots };
        wait(&journal, asked)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Lets slots take jobs again.
///
/// # Errors
/// When the journal cannot be used, a slot is not known, or slots are named while the whole machine is drained.
pub fn undrain(args: UndrainArgs) -> Result<ExitCode, CliError> {
    let config = args.service.load()?;
    let journal = Journal::open(&config.state_dir).map_err(failed)?;
    let mut names = drained(journal.flag(DRAINED_FLAG).map_err(failed)?.as_deref());
    if args.slots.is_empty() {
        names.clear();
    } else if names.iter().any(|name| name == "all") {
        return Err(CliError::usage("the whole machine is drained; undrain it without naming a slot"));
    }
    check(&journal, &args.slots, &names)?;
    names.retain(|name| !args.slots.contains(name));
    store(&journal, &names)?;
    wake_service(&config);
    match names.is_empty() {
        true => println!("no slot is drained"),
        false => println!("still drained: {}", names.join(", ")),
    }
    Ok(ExitCode::SUCCESS)
}

/// A slot that is not there would be drained in vain. One that was drained before may have gone since.
fn check(journal: &Journal, slots: &[String], drained: &[String]) -> Result<(), CliError> {
    let known: Vec<String> = journal
        .board()
        .map_err(failed)?
        .map(|board| board.slots.into_iter().map(|slot| slot.name).collect())
        .unwrap_or_default();
    match slots.iter().find(|slot| !known.contains(slot) && !drained.contains(slot)) {
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

/// Waits until nothing runs in these slots and the service will start nothing more there.
fn wait(journal: &Journal, names: &[String]) -> Result<(), CliError> {
    loop {
        let now = drained(journal.flag(DRAINED_FLAG).map_err(failed)?.as_deref());
        if !now.iter().any(|name| name == "all") && names.iter().any(|name| !now.contains(name)) {
            return Err(CliError::failed("the drain was taken back while it was waited for"));
        }
        let is_over = match running_slots(journal)? {
            Some(slots) => is_empty(&slots, names),
            // Of a service that was killed the trainers may still be saving.
            None => {
                let records = journal.active().map_err(failed)?;
                !records.iter().filter_map(|record| record.process).any(process::is_alive)
            }
        };
        if is_over {
            return Ok(());
        }
        std::thread::sleep(WAIT_INTERVAL);
    }
}

/// True when none of these slots has a job or may still be given one: before a service has read the order, it may.
fn is_empty(slots: &[SlotRecord], names: &[String]) -> bool {
    let is_meant = |slot: &SlotRecord| names.iter().any(|name| name == "all" || *name == slot.name);
    slots
        .iter()
        .filter(|slot| is_meant(slot))
        .all(|slot| slot.task_id.is_none() && slot.state != SlotState::Free)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_that_is_taken_back_is_not_waited_for() {
        let journal = Journal::in_memory().expect("opens");
        let all = ["all".to_owned()];
        assert!(wait(&journal, &all).is_err(), "nothing is drained");
        store(&journal, &all).expect("stored");
        wait(&journal, &all).expect("nothing runs");
        wait(&journal, &["cpu 0".to_owned()]).expect("a drain of the machine is one of each slot");
    }

    #[test]
    fn a_slot_that_is_free_may_still_be_given_a_job() {
        let slot = |name: &str, state, task_id: Option<&str>| SlotRecord {
            name: name.into(),
            device: "cpu".into(),
            uuid: None,
            model: None,
            state,
            task_id: task_id.map(|id| id.parse().expect("an id")),
            reason: String::new(),
            faults: 0,
            back_off_ms: 0,
            until_unix_ms: None,
        };
        let (all, one) = (["all".to_owned()], ["cpu 0".to_owned()]);
        let drained = slot("cpu 0", SlotState::Drained, None);
        let free = slot("cpu 1", SlotState::Free, None);
        let busy = slot("cpu 1", SlotState::Busy, Some("a"));
        let quarantined = slot("GPU 0", SlotState::Quarantined, None);
        assert!(is_empty(&[drained.clone(), quarantined], &all));
        for other in [free, busy] {
            let slots = [drained.clone(), other];
            assert!(!is_empty(&slots, &all) && is_empty(&slots, &one));
        }
    }
}
