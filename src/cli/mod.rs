//! The command line: one file per command.

pub mod bench_loader;
pub mod predict;

/// Parses the arguments, runs the command and returns its exit code.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
