//! `boxwright logs`: the log of one job.

use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use super::CliError;
use super::common::{ServiceArgs, find, open_journal};
use crate::adapters::logs::job_log_path;

/// Between two looks at the file.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);

/// Print the log of a job
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The job
    pub task_id: String,
    /// Go on until the job has ended
    #[arg(long, short)]
    pub follow: bool,
    /// Only the last so many lines
    #[arg(long, short = 'n', value_name = "N")]
    pub lines: Option<usize>,
    #[command(flatten)]
    pub service: ServiceArgs,
}

/// Prints the log.
///
/// # Errors
/// When the job is not known or its log cannot be read.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    let config = args.service.load()?;
    let journal = open_journal(&config)?;
    let record = find(&journal, &args.task_id)?;
    let path = job_log_path(&config.logging.dir, record.task_id.as_str());
    if !path.exists() && !args.follow {
        return Err(CliError::failed(format!("{} has no log yet ({})", record.task_id, path.display())));
    }
    let failed = |error| CliError::failed_from(format!("the log {} cannot be read", path.display()), error);
    let mut position = skip(&path, args.lines).map_err(failed)?;
    loop {
        // The state is read before the file, so that the last lines of an ended job are not missed.
        let ended = find(&journal, &args.task_id)?.state.is_terminal();
        position = copy(&path, position).map_err(failed)?;
        if !args.follow || ended {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(FOLLOW_INTERVAL);
    }
}

/// Where the last `lines` lines begin.
fn skip(path: &Path, lines: Option<usize>) -> std::io::Result<u64> {
    let Some(lines) = lines.filter(|_| path.exists()) else { return Ok(0) };
    let mut starts = std::collections::VecDeque::from([0u64]);
    let (mut reader, mut position, mut line) = (BufReader::new(File::open(path)?), 0, Vec::new());
    loop {
        line.clear();
        let bytes = reader.read_until(b'\n', &mut line)? as u64;
        if bytes == 0 {
            break;
        }
        position += bytes;
        starts.push_back(position);
        while starts.len() > lines + 1 {
            starts.pop_front();
        }
    }
    Ok(starts.front().copied().unwrap_or(0))
}

/// Prints the file from `position` on and returns the new end; a file that was set aside is read afresh.
fn copy(path: &Path, position: u64) -> std::io::Result<u64> {
    let Ok(mut file) = File::open(path) else { return Ok(0) };
    let position = if file.metadata()?.len() < position { 0 } else { position };
    file.seek(SeekFrom::Start(position))?;
    let mut output = std::io::stdout().lock();
    let copied = std::io::copy(&mut file, &mut output)?;
    output.flush()?;
    Ok(position + copied)
}
