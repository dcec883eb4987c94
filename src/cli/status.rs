//! `boxwright status`: what the jobs are doing.

use std::process::ExitCode;

use serde_json::{Value as Json, json};

use super::common::{ServiceArgs, find, open_journal, running_slots};
use super::console::shorten;
use super::{CliError, services_status};
use crate::adapters::queue::JobStore;
use crate::adapters::queue::journal::Journal;
use crate::job::clock::{human_ms, now_unix_ms, rfc3339};
use crate::job::record::JobRecord;
use crate::job::slot::SlotRecord;

/// Events shown for one job.
const EVENTS_MAX: u32 = 5_000;

/// Show jobs and slots
#[derive(Debug, clap::Args)]
pub struct Args {
    /// One job in detail; without it, all that are active and the last that ended
    pub task_id: Option<String>,
    /// Jobs listed at most
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub limit: u32,
    /// JSON: an object for one job, a list otherwise
    #[arg(long)]
    pub json: bool,
    /// The slots of the running service alone: device, state, job, reason
    #[arg(long, conflicts_with = "task_id")]
    pub slots: bool,
    /// The side services alone: Redis, the object store, the tracking server; what waits for them, and since when
    #[arg(long, conflicts_with_all = ["task_id", "slots"])]
    pub services: bool,
    #[command(flatten)]
    pub service: ServiceArgs,
}

/// Shows jobs and slots.
///
/// # Errors
/// When the journal cannot be read or the job is not known.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    let config = args.service.load()?;
    let failed = |error| CliError::failed_from("the journal cannot be read", error);
    if let Some(id) = &args.task_id {
        let journal = open_journal(&config)?;
        let record = find(&journal, id)?;
        if args.json {
            println!("{}", detail(&journal, &record)?);
        } else {
            show(&journal, &record)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let journal = Journal::open_existing(&config.state_dir).map_err(failed)?;
    if args.services {
        services_status::show(journal.as_ref(), &config, args.json)?;
        return Ok(ExitCode::SUCCESS);
    }
    let slots = journal.as_ref().map(running_slots).transpose()?.flatten();
    if args.slots {
        show_slots(slots.as_deref(), args.json);
        return Ok(ExitCode::SUCCESS);
    }
    let records = match journal {
        Some(journal) => {
            let mut records = journal.active().map_err(failed)?;
            let recent = journal.recent(args.limit).map_err(failed)?;
            records.extend(recent.into_iter().filter(|record| record.state.is_terminal()));
            records
        }
        None => Vec::new(),
    };
    if args.json {
        println!("{}", records.iter().map(brief).collect::<Json>());
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(slots) = slots.filter(|slots| !slots.is_empty()) {
        show_slots(Some(&slots), false);
        println!();
    }
    if records.is_empty() {
        println!("no jobs");
    } else {
        table(&records);
    }
    Ok(ExitCode::SUCCESS)
}

fn show_slots(slots: Option<&[SlotRecord]>, as_json: bool) {
    match slots {
        _ if as_json => println!("{}", slots.unwrap_or_default().iter().map(slot_json).collect::<Json>()),
        None => println!("no service runs here"),
        Some(slots) => {
            println!("{:<8}  {:<8}  {:<11}  {:<36}  why", "slot", "device", "state", "task id");
            for slot in slots {
                let task_id = slot.task_id.as_ref().map_or("", |id| id.as_str());
                println!(
                    "{:<8}  {:<8}  {:<11}  {:<36}  {}",
                    slot.name,
                    slot.device,
                    slot.state,
                    shorten(task_id, 36),
                    slot_why(slot)
                );
            }
        }
    }
}

/// The reason, the end of a quarantine, and what the GPU is.
fn slot_why(slot: &SlotRecord) -> String {
    let until = slot.until_unix_ms.map(|until| format!("until {}", rfc3339(until)));
    let reason = Some(slot.reason.clone()).filter(|reason| !reason.is_empty());
    let said: Vec<String> = until.into_iter().chain(reason).collect();
    let said = shorten(&said.join(": "), 100);
    match (&slot.model, &slot.uuid) {
        (Some(model), Some(uuid)) if said.is_empty() => format!("{model}, {uuid}"),
        (Some(model), Some(uuid)) => format!("{said} ({model}, {uuid})"),
        _ => said,
    }
}

fn slot_json(slot: &SlotRecord) -> Json {
    json!({
        "name": slot.name,
        "device": slot.device,
        "uuid": slot.uuid,
        "model": slot.model,
        "state": slot.state,
        "task_id": slot.task_id,
        "reason": slot.reason,
        "faults": slot.faults,
        "quarantined_until": slot.until_unix_ms.map(rfc3339),
    })
}

fn brief(record: &JobRecord) -> Json {
    json!({
        "task_id": record.task_id,
        "generation": record.generation,
        "state": record.state,
        "reason": record.reason,
        "class": record.class,
        "priority": record.spec.priority,
        "source": record.source,
        "run_dir": record.run_dir.to_string_lossy(),
        "attempts": record.attempts,
        "retries": record.retries,
        "interruptions": record.interruptions,
        "accepted_at": rfc3339(record.accepted_unix_ms),
        "started_at": record.started_unix_ms.map(rfc3339),
        "finished_at": record.finished_unix_ms.map(rfc3339),
        "pid": record.process.map(|process| process.pid),
        "progress": record.progress,
        "result": record.result,
    })
}

fn detail(journal: &Journal, record: &JobRecord) -> Result<Json, CliError> {
    let events = journal
        .events(record.seq, 0, EVENTS_MAX)
        .map_err(|error| CliError::failed_from("the journal cannot be read", error))?;
    let mut json = brief(record);
    json["instance"] = json!(record.instance);
    json["fence"] = json!(record.fence);
    json["attempts_before"] = json!(record.attempts_before);
    json["notes"] = json!(record.notes);
    json["understood"] = json!(record.spec.understood);
    json["ignored"] = json!(record.spec.ignored);
    json["overridden"] = json!(record.spec.overridden);
    json["events"] = events
        .into_iter()
        .map(|event| json!({"at": rfc3339(event.at_unix_ms), "kind": event.kind, "detail": event.detail}))
        .collect();
    Ok(json)
}

fn table(records: &[JobRecord]) {
    println!("{:<36}  {:<11}  {:>9}  {:>8}  {:>10}  why", "task id", "state", "epoch", "attempts", "for");
    for record in records {
        println!(
            "{:<36}  {:<11}  {:>9}  {:>8}  {:>10}  {}",
            shorten(record.task_id.as_str(), 36),
            record.state,
            epoch(record),
            record.attempts,
            human_ms(duration_ms(record)),
            shorten(record.reason.lines().next().unwrap_or_default(), 100)
        );
    }
}

/// `3/50`, or nothing before the first epoch.
fn epoch(record: &JobRecord) -> String {
    let progress = record.progress.clone().unwrap_or_default();
    match (progress["epoch"].as_i64(), progress["epochs"].as_i64()) {
        (Some(epoch), Some(epochs)) => format!("{epoch}/{epochs}"),
        (Some(epoch), None) => epoch.to_string(),
        _ => String::new(),
    }
}

/// How long it has trained, or waited when it has not started.
fn duration_ms(record: &JobRecord) -> i64 {
    let from = record.started_unix_ms.unwrap_or(record.accepted_unix_ms);
    record.finished_unix_ms.unwrap_or_else(now_unix_ms) - from
}

fn show(journal: &Journal, record: &JobRecord) -> Result<(), CliError> {
    let line = |name: &str, value: String| println!("{name:<14} {value}");
    line("task id", format!("{} (generation {})", record.task_id, record.generation));
    line("state", record.state.to_string());
    line("why", record.reason.clone());
    if let Some(class) = record.class {
        line("class", class.to_string());
    }
    line("from", record.source.clone());
    line("run folder", record.run_dir.display().to_string());
    line("accepted", rfc3339(record.accepted_unix_ms));
    if let Some(at) = record.started_unix_ms {
        line("started", rfc3339(at));
    }
    if let Some(at) = record.finished_unix_ms {
        line("finished", rfc3339(at));
    }
    line("attempts", format!("{} ({} interruptions)", record.attempts, record.interruptions));
    if let Some(progress) = &record.progress {
        for key in
            ["epoch", "epochs", "batch", "batches", "box_loss", "cls_loss", "dfl_loss", "images_per_second"]
        {
            if !progress[key].is_null() {
                line(key, progress[key].to_string());
            }
        }
    }
    for (name, value) in record.result.iter().flat_map(|result| result["metrics"].as_object()).flatten() {
        line(name, value.to_string());
    }
    for (word, notes) in [("ignored", &record.spec.ignored), ("overridden", &record.spec.overridden)] {
        for note in notes {
            line(word, format!("{}: {}", note.key, note.reason));
        }
    }
    let events = journal
        .events(record.seq, 0, EVENTS_MAX)
        .map_err(|error| CliError::failed_from("the journal cannot be read", error))?;
    for event in events.iter().filter(|event| event.kind == "state") {
        let (to, reason) = (event.detail["to"].as_str(), event.detail["reason"].as_str());
        println!(
            "  {}  {:<11} {}",
            rfc3339(event.at_unix_ms),
            to.unwrap_or_default(),
            reason.unwrap_or_default()
        );
    }
    Ok(())
}
