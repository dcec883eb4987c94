//! Processor, memory, disk and network.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

/// What the host does.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct HostSample {
    /// Load of all processors together since the look before, 0 to 100.
    pub cpu_percent: Option<f64>,
    /// Memory that is not available to new programs.
    pub memory_used_bytes: u64,
    /// All of it.
    pub memory_total_bytes: u64,
    /// The watched file system.
    pub disk: Option<Disk>,
    /// Since the first look.
    pub network: Option<Network>,
}

/// Use of a file system.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Disk {
    /// In use.
    pub used_bytes: u64,
    /// Free for us (the system may keep some for itself).
    pub available_bytes: u64,
}

/// Traffic of all interfaces.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Network {
    /// In.
    pub received_bytes: u64,
    /// Out.
    pub sent_bytes: u64,
}

/// Measures the host.
pub(super) struct Host {
    system: System,
    network_first: Option<Network>,
}

impl Host {
    pub(super) fn new() -> Self {
        let wanted = RefreshKind::nothing()
            .with_cpu(CpuRefreshKind::nothing().with_cpu_usage())
            .with_memory(MemoryRefreshKind::nothing().with_ram());
        Self { system: System::new_with_specifics(wanted), network_first: network() }
    }

    pub(super) fn sample(&mut self, disk_path: &Path) -> HostSample {
        self.system.refresh_cpu_usage();
        self.system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
        let load = f64::from(self.system.global_cpu_usage());
        let total = self.system.total_memory();
        HostSample {
            cpu_percent: load.is_finite().then(|| load.clamp(0.0, 100.0)),
            memory_used_bytes: total.saturating_sub(self.system.available_memory()),
            memory_total_bytes: total,
            disk: disk(disk_path),
            network: network().map(|now| {
                let first = *self.network_first.get_or_insert(now);
                // An interface that went away takes its count with it.
                Network {
                    received_bytes: now.received_bytes.saturating_sub(first.received_bytes),
                    sent_bytes: now.sent_bytes.saturating_sub(first.sent_bytes),
                }
            }),
        }
    }
}

/// The file system that holds `path`.
#[allow(clippy::unnecessary_cast)] // The widths of these fields differ between systems.
pub(crate) fn disk(path: &Path) -> Option<Disk> {
    let name = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut facts = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `name` ends with a zero byte and `facts` has room for what the call writes.
    let is_known = unsafe { libc::statvfs(name.as_ptr(), facts.as_mut_ptr()) } == 0;
    if !is_known {
        return None;
    }
    // SAFETY: the call succeeded, so it has written all of it.
    let facts = unsafe { facts.assume_init() };
    let unit = facts.f_frsize as u64;
    let used = (facts.f_blocks as u64).saturating_sub(facts.f_bfree as u64);
    Some(Disk {
        used_bytes: used.saturating_mul(unit),
        available_bytes: (facts.f_bavail as u64).saturating_mul(unit),
    })
}

/// The kernel's counts, as far as it shows them as a file.
fn network() -> Option<Network> {
    Some(counts(&std::fs::read_to_string("/proc/net/dev").ok()?))
}

/// Sums the interfaces of `/proc/net/dev`: bytes in are the first number of a line, bytes out the ninth.
fn counts(text: &str) -> Network {
    let mut sum = Network { received_bytes: 0, sent_bytes: 0 };
    for (_, numbers) in text.lines().filter_map(|line| line.split_once(':')) {
        let numbers: Vec<u64> = numbers.split_whitespace().map_while(|word| word.parse().ok()).collect();
        if let (Some(received), Some(sent)) = (numbers.first(), numbers.get(8)) {
            sum.received_bytes = sum.received_bytes.saturating_add(*received);
            sum.sent_bytes = sum.sent_bytes.saturating_add(*sent);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_summed() {
        let text = "Inter-|   Receive                     |  Transmit\n \
                    face |bytes packets errs drop fifo frame compressed multicast|bytes packets\n    \
                    lo: 100 1 0 0 0 0 0 0 100 1 0 0 0 0 0 0\n  \
                    eth0:2000 1 0 0 0 0 0 0 30 1 0 0 0 0 0 0\n broken: x\n";
        assert_eq!(counts(text), Network { received_bytes: 2100, sent_bytes: 130 });
    }

    #[test]
    fn a_missing_path_has_no_disk() {
        assert!(disk(Path::new("/no/such/folder")).is_none());
        assert!(disk(Path::new("/")).is_some_and(|disk| disk.used_bytes > 0));
    }
}
