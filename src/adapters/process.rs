//! The process table: is this process still that one, end it, end what was left behind; and whose user this one runs as.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::job::record::ProcessId;

/// Start time of a process in clock ticks since boot; `None` when there is no such process or it is a zombie.
pub fn started_ticks(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold spaces and parentheses; the fields count from the last one.
    let rest = text.get(text.rfind(')')? + 2..)?;
    let mut fields = rest.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The identity of a running process.
pub fn identify(pid: u32) -> Option<ProcessId> {
    Some(ProcessId { pid, started_ticks: started_ticks(pid)? })
}

/// True while that very process runs.
pub fn is_alive(process: ProcessId) -> bool {
    started_ticks(process.pid) == Some(process.started_ticks)
}

/// For an error message about a path that was denied: whose it is, or the nearest folder above it that can be seen, and
/// who asks. Empty when they are the same.
pub fn foreign_owner(path: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    // SAFETY: only reads a number of this process.
    let user = unsafe { libc::geteuid() };
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let seen = absolute.ancestors().find_map(|place| Some((place, std::fs::metadata(place).ok()?.uid())));
    match seen {
        Some((place, owner)) if owner != user => {
            format!(" ({} belongs to user {owner}, this is user {user})", place.display())
        }
        _ => String::new(),
    }
}

/// Resident memory of a process in bytes.
pub fn resident_bytes(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
    Some(pages * 4096)
}

/// Sends a signal to the process group of `pid`; true when it could be sent.
pub fn signal_group(pid: u32, signal: i32) -> bool {
    let Ok(pid) = i32::try_from(pid) else { return false };
    if pid <= 1 {
        return false;
    }
    // SAFETY: killpg takes plain numbers and touches no memory of ours; the group is never 0 or 1 (checked above), so
    // neither our own group nor every process is meant.
    unsafe { libc::killpg(pid, signal) == 0 }
}

/// Sends a signal to one process; true when it could be sent.
pub fn signal(pid: u32, signal: i32) -> bool {
    let Ok(pid) = i32::try_from(pid) else { return false };
    if pid <= 1 {
        return false;
    }
    // SAFETY: kill takes plain numbers and touches no memory of ours; the process number is above 1 (checked above).
    unsafe { libc::kill(pid, signal) == 0 }
}

/// Kills that very process and its group and waits until it is gone; true when it is gone within `limit`.
pub fn kill_and_wait(process: ProcessId, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while is_alive(process) {
        if !signal_group(process.pid, libc::SIGKILL) {
            signal(process.pid, libc::SIGKILL);
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

/// Processes whose command line names the file `spec`: children that the journal never heard of.
pub fn with_argument(spec: &Path) -> Vec<ProcessId> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let wanted = spec.as_os_str().as_encoded_bytes();
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|&pid| pid != std::process::id())
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut arguments = line.split(|&byte| byte == 0);
            // Both must be there, so that an editor showing the file is left alone.
            arguments.clone().any(|argument| argument == b"train-child")
                && arguments.any(|argument| argument == wanted)
        })
        .filter_map(identify)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_of_a_foreign_path_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(foreign_owner(&folder.path().join("mine")), "");
        if std::os::unix::fs::chown(folder.path(), Some(12_345), None).is_err() {
            println!("skipped: this user may not give files away");
            return;
        }
        let said = foreign_owner(&folder.path().join("deeper/lock"));
        let place = folder.path().display();
        assert!(said.starts_with(&format!(" ({place} belongs to user 12345, this is user ")), "{said}");
    }

    #[test]
    fn a_process_is_known_by_number_and_start_and_can_be_ended() {
        use std::os::unix::process::CommandExt;
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .process_group(0)
            .spawn()
            .expect("sleep is everywhere");
        let process = identify(child.id()).expect("it runs");
        assert!(is_alive(process));
        assert!(
            !is_alive(ProcessId { started_ticks: process.started_ticks + 1, ..process }),
            "another start"
        );
        assert!(resident_bytes(child.id()).is_some());
        let reaper = std::thread::spawn(move || child.wait());
        assert!(kill_and_wait(process, Duration::from_secs(10)));
        assert!(!is_alive(process));
        reaper.join().expect("joins").expect("waits");
        assert!(kill_and_wait(process, Duration::ZERO), "gone is gone");
        assert!(!signal(0, 0) && !signal_group(1, 0), "never everybody");
    }
}
