//! Lines of a job's log on their way to its stream.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::LOG_BYTES_MAX;
use crate::adapters::queue::redis::{Fleet, FleetError, LogPart, Logged};
use crate::job::delivery::RunRef;

/// Calls for one log in one flush.
const CALLS_MAX: usize = 64;
/// A line of a log, on average at most; what is further back than the stream keeps is not sent.
const LINE_BYTES: u64 = 400;

/// Whole lines of a part of a file.
struct Part {
    from: u64,
    to: u64,
    lines: Vec<String>,
    /// The file ends here.
    is_last: bool,
}

/// A log on this machine.
pub(super) struct JobLog {
    pub(super) path: PathBuf,
    /// Byte at which this run's part of it begins.
    pub(super) begin: u64,
    /// Lines that the stream keeps.
    pub(super) lines_max: usize,
    /// The job has ended.
    pub(super) is_final: bool,
}

/// Sends what the stream lacks of a log, of which it has the bytes before `from` as far as is known. Returns how far it
/// reaches now, and whether that is the end of the log (or another machine's matter by now).
pub(super) async fn send(
    fleet: &Fleet,
    run: &RunRef,
    log: &JobLog,
    from: u64,
) -> Result<(u64, bool), FleetError> {
    let (mut at, lines_max) = (from, log.lines_max);
    for _ in 0..CALLS_MAX {
        let file = log.path.clone();
        let part = tokio::task::spawn_blocking(move || read(&file, at, lines_max)).await;
        // A log that cannot be read is no reason to hold up anything; the file itself is there for people.
        let Ok(Ok(part)) = part else { return Ok((at, true)) };
        if part.lines.is_empty() {
            return Ok((part.to, true));
        }
        let lines = LogPart {
            from_offset: part.from,
            to_offset: part.to,
            begin_offset: log.begin,
            lines: &part.lines,
            is_final: log.is_final,
        };
        match fleet.log_lines(run, lines).await? {
            Logged::Appended { offset } => {
                at = offset;
                if part.is_last {
                    return Ok((at, true));
                }
            }
            Logged::ContinueAt { offset } => at = offset,
            Logged::Fenced => return Ok((at, true)),
        }
    }
    Ok((at, false))
}

/// The lines after `from`; those that the stream would not keep are left out, but counted as sent. A file that has become
/// shorter was set aside and begun anew: it is read from its beginning.
fn read(path: &Path, from: u64, lines_max: usize) -> std::io::Result<Part> {
    let mut file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    let claimed = from;
    let mut from = if from > length { 0 } else { from };
    let kept = lines_max as u64 * LINE_BYTES;
    let must_skip = length - from > kept;
    if must_skip {
        from = length - kept;
    }
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES_MAX as u64).read_to_end(&mut bytes)?;
    let mut start = 0;
    if must_skip {
        start = bytes.iter().position(|&byte| byte == b'\n').map_or(bytes.len(), |at| at + 1);
    }
    let end = match bytes.iter().rposition(|&byte| byte == b'\n') {
        Some(at) => at + 1,
        // A line longer than is read at once is cut.
        None if bytes.len() == LOG_BYTES_MAX => bytes.len(),
        None => start,
    };
    let end = end.max(start);
    let text = String::from_utf8_lossy(&bytes[start..end]);
    let lines = text.split_inclusive('\n').map(str::to_owned).collect();
    let to = from + end as u64;
    Ok(Part { from: claimed, to, lines, is_last: to == length })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_lines_are_read_once_and_old_ones_skipped() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.log");
        std::fs::write(&path, "one\ntwo\nhalf").expect("writable");
        let part = read(&path, 0, 10).expect("is there");
        assert_eq!((part.lines, part.to, part.is_last), (vec!["one\n".into(), "two\n".into()], 8, false));
        let part = read(&path, 8, 10).expect("is there");
        assert!(part.lines.is_empty() && part.to == 8);
        std::fs::write(&path, "new\n").expect("writable");
        let part = read(&path, 8, 10).expect("is there");
        assert_eq!((part.from, part.to, part.lines), (8, 4, vec!["new\n".to_owned()]));
        let long = format!("{}\n", "x".repeat(99)).repeat(100);
        std::fs::write(&path, &long).expect("writable");
        let part = read(&path, 0, 5).expect("is there");
        assert_eq!((part.from, part.to, part.lines.len()), (0, 10_000, 19), "about what the stream keeps");
        assert!(read(&folder.path().join("none"), 0, 5).is_err());
    }
}
