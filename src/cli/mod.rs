//! The command line: one file per command, errors with their causes on standard error, documented exit codes.

mod bench;
mod bench_loader;
mod bench_queue;
mod bench_reaction;
mod common;
mod console;
mod dataset;
mod doctor;
mod drain;
mod logs;
mod plan;
mod predict;
mod probe;
mod profile;
mod recommend;
mod resume;
mod run;
mod services_status;
mod session_console;
mod signals;
mod status;
mod stop;
mod submit;
mod train;
mod train_child;
mod val;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

/// Exit code of a wrong use or a configuration fault.
pub const EXIT_USAGE: u8 = 2;
/// Exit code of something that was stopped or cancelled.
pub const EXIT_STOPPED: u8 = 130;

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The arguments or a configuration are wrong: exit code 2.
    #[error("{what}")]
    Usage {
        /// What is wrong.
        what: String,
        /// Why, when something else said so.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// It could not be done: exit code 1.
    #[error("{what}")]
    Failed {
        /// What could not be done.
        what: String,
        /// Why.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
}

impl CliError {
    /// A wrong use or a configuration fault, in words.
    pub fn usage(what: impl Into<String>) -> Self {
        Self::Usage { what: what.into(), source: None }
    }

    /// A configuration fault with its cause.
    pub fn usage_from(
        what: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Usage { what: what.into(), source: Some(source.into()) }
    }

    /// A failure, in words.
    pub fn failed(what: impl Into<String>) -> Self {
        Self::Failed { what: what.into(), source: None }
    }

    /// A failure with its cause.
    pub fn failed_from(
        what: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Failed { what: what.into(), source: Some(source.into()) }
    }

    /// The exit code it stands for.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage { .. } => EXIT_USAGE,
            Self::Failed { .. } => 1,
        }
    }
}

impl From<crate::data::DataError> for CliError {
    fn from(error: crate::data::DataError) -> CliError {
        let what = "the dataset cannot be used";
        if error.is_usage() { CliError::usage_from(what, error) } else { CliError::failed_from(what, error) }
    }
}

/// An error and all its causes, one a line.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!("\n  because: {error}"));
        cause = error.source();
    }
    text
}

const EXIT_CODES: &str =
    "Exit codes: 0 done, 1 failed, 2 wrong use or configuration, 130 stopped or cancelled.";

#[derive(Parser)]
#[command(name = "boxwright", version, about = "Trains object detectors: drop a YAML, get a detector", after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::Args),
    /// Train one job in the foreground
    Train(train::Args),
    /// Train one job for the service, speaking its protocol on standard input and output
    #[command(hide = true)]
    TrainChild(train_child::Args),
    /// Say which GPUs there are, or test one, for the service
    #[command(hide = true)]
    Probe(probe::Args),
    /// Measure a trained model on a dataset
    Val(val::Args),
    /// Find objects in images with a trained model
    Predict(predict::Args),
    Submit(submit::Args),
    Status(status::Args),
    Logs(logs::Args),
    Stop(stop::Args),
    Resume(resume::Args),
    Drain(drain::DrainArgs),
    Undrain(drain::UndrainArgs),
    /// Check, describe, draw and make datasets
    Dataset(dataset::Args),
    /// Layers, products and exact bytes of a model, before anything is allocated
    Plan(plan::Args),
    Profile(profile::Args),
    Recommend(recommend::Args),
    Doctor(doctor::Args),
    /// Measure speed on this machine
    Bench(bench::Args),
}

fn dispatch(command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Run(args) => run::run(args),
        Command::Train(args) => train::run(args),
        Command::TrainChild(args) => train_child::run(args),
        Command::Probe(args) => probe::run(args),
        Command::Val(args) => val::run(args),
        Command::Predict(args) => predict::run(args),
        Command::Submit(args) => submit::run(args),
        Command::Status(args) => status::run(args),
        Command::Logs(args) => logs::run(args),
        Command::Stop(args) => stop::run(args),
        Command::Resume(args) => resume::run(args),
        Command::Drain(args) => drain::drain(args),
        Command::Undrain(args) => drain::undrain(args),
        Command::Dataset(args) => dataset::run(args).map_err(CliError::from),
        Command::Plan(args) => plan::run(args),
        Command::Profile(args) => profile::run(args),
        Command::Recommend(args) => recommend::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Bench(args) => bench::run(args),
    }
}

/// `boxwright status | head` ends like any other program when the reader goes away. Commands that own or are
/// trainers keep the signal ignored: to them a closed pipe is an error to handle.
fn end_quietly_on_closed_output(command: &Command) {
    if matches!(command, Command::Run(_) | Command::Train(_) | Command::TrainChild(_) | Command::Bench(_)) {
        return;
    }
    #[cfg(unix)]
    // SAFETY: sets the default action before any thread of ours exists.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

/// Parses the arguments, runs the command and returns its exit code.
pub fn main() -> ExitCode {
    // The exit codes stand under the help of every command, not only of the program.
    let command = Cli::command().mut_subcommands(|command| command.after_help(EXIT_CODES));
    let matches = match command.try_get_matches() {
        Ok(matches) => matches,
        Err(error) => error.exit(),
    };
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    end_quietly_on_closed_output(&cli.command);
    match dispatch(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", with_causes(&error));
            ExitCode::from(error.exit_code())
        }
    }
}
