//! `boxwright probe`: which GPUs there are, or whether one works, in one line of JSON for the service.
//!
//! The service asks in a process of its own because a driver may crash or stand still.

use std::process::ExitCode;

use super::CliError;
use crate::adapters::gpu::{Found, Gpu, Tested};
use crate::engine::device::cuda::{Finding, Probe, probe, self_test};

/// Say which GPUs there are, or test one (not meant for people)
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Copy to the GPU of this identity, compute there, and compare
    #[arg(long, value_name = "UUID")]
    pub test: Option<String>,
}

/// Answers in one line of JSON; a fault of a GPU is an answer too.
///
/// # Errors
/// The answer cannot be written.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    let found = probe();
    let line = match args.test {
        None => serde_json::to_string(&shown(&found)),
        Some(uuid) => serde_json::to_string(&Tested { fault: fault_of(&found, &uuid) }),
    };
    println!("{}", line.map_err(|error| CliError::failed_from("the answer cannot be written", error))?);
    Ok(ExitCode::SUCCESS)
}

fn shown(found: &Probe) -> Found {
    let gpu = |device: &Finding| Gpu {
        number: device.ordinal,
        uuid: device.chip.identity(),
        name: device.chip.name.clone(),
        memory_bytes: device.chip.memory_bytes,
        refused: device.refused.clone().or(found.obstacle.clone()),
    };
    Found { gpus: found.devices.iter().map(gpu).collect(), obstacle: found.obstacle.clone() }
}

fn fault_of(found: &Probe, uuid: &str) -> Option<String> {
    let device = found.devices.iter().find(|device| device.chip.identity() == uuid);
    let Some(device) = device else {
        return Some(found.obstacle.clone().unwrap_or_else(|| "the driver does not show it".to_owned()));
    };
    if let Some(reason) = device.refused.as_ref().or(found.obstacle.as_ref()) {
        return Some(reason.clone());
    }
    self_test(device.ordinal).unwrap_or_else(|error| Some(error.to_string()))
}
