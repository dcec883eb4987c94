//! The command line: one file per command, errors with their causes on standard error, documented exit codes.

pub mod console;
pub mod signals;
pub mod train;
pub mod train_child;
pub mod val;

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
    Train(train::Args),
    TrainChild(train_child::Args),
    Val(val::Args),
}

fn run(command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Train(args) => train::run(args),
        Command::TrainChild(args) => train_child::run(args),
        Command::Val(args) => val::run(args),
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
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", with_causes(&error));
            ExitCode::from(error.exit_code())
        }
    }
}
