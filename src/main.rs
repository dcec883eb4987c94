//! Arguments to command to exit code; nothing else.

fn main() -> std::process::ExitCode {
    boxwright::cli::main()
}
