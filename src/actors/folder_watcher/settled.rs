//! When a file may be taken: it was closed or renamed, or size and time have not changed for a while.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::listing::{Listing, Seen};
use crate::job::clock::now_unix_ms;
use crate::job::service::WatchConfig;

/// What is known about the writer of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settle {
    /// It closed the file, or moved it into place.
    Closed,
    /// It wrote and has not closed.
    Open,
    /// Nothing: the file was found by reading the folder.
    Unknown,
}

impl Settle {
    fn rest(self, config: &WatchConfig) -> Duration {
        Duration::from_millis(match self {
            Self::Closed => config.closed_settle_ms,
            Self::Open => config.open_settle_ms,
            Self::Unknown => config.settle_ms,
        })
    }
}

/// A file that nobody has touched for long has no writer; it is still looked at twice.
fn first_guess(seen: Seen, config: &WatchConfig) -> Settle {
    let age_ms = now_unix_ms() - seen.modified_unix_ms;
    if age_ms >= config.open_settle_ms as i64 { Settle::Closed } else { Settle::Unknown }
}

#[derive(Debug)]
struct Known {
    seen: Seen,
    since: Instant,
    settle: Settle,
    decided: bool,
    /// When it may be taken.
    due: Instant,
}

/// What was seen of each file of a folder.
#[derive(Debug, Default)]
pub(super) struct SettleTable {
    files: HashMap<PathBuf, Known>,
    /// Events of files that no listing has shown yet.
    heard: HashMap<PathBuf, Settle>,
}

impl SettleTable {
    /// Notes an event and says how long to rest before looking.
    pub(super) fn heard(&mut self, path: &Path, settle: Settle, config: &WatchConfig) -> Duration {
        match self.files.get_mut(path) {
            // A mere change of attributes tells nothing about the writer.
            Some(_) if settle == Settle::Unknown => {}
            Some(known) => known.settle = settle,
            None => {
                if self.heard.len() < super::FILES_MAX {
                    self.heard.insert(path.to_owned(), settle);
                }
            }
        }
        settle.rest(config)
    }

    /// Takes in a listing; returns the files that may be taken, in the listing's order.
    pub(super) fn update(&mut self, listing: Listing, config: &WatchConfig, now: Instant) -> Listing {
        let mut before = std::mem::take(&mut self.files);
        let mut ready = Vec::new();
        for (path, seen) in listing {
            let heard = self.heard.remove(&path);
            let mut known = match before.remove(&path) {
                Some(known) if known.seen == seen => known,
                Some(known) => Known { seen, since: now, settle: known.settle, decided: false, due: now },
                None => {
                    Known { seen, since: now, settle: first_guess(seen, config), decided: false, due: now }
                }
            };
            if let Some(settle) = heard {
                known.settle = settle;
            }
            known.due = known.since + known.settle.rest(config);
            if !known.decided && now >= known.due {
                ready.push((path.clone(), seen));
            }
            self.files.insert(path, known);
        }
        self.heard.clear();
        ready
    }

    /// Notes that a file, as it was seen, has its verdict.
    pub(super) fn decided(&mut self, path: &Path, seen: Seen) {
        if let Some(known) = self.files.get_mut(path).filter(|known| known.seen == seen) {
            known.decided = true;
        }
    }

    /// How long until the next file may be taken; `None` when every file has its verdict.
    pub(super) fn next_due(&self, now: Instant) -> Option<Duration> {
        let waiting = self.files.values().filter(|known| !known.decided);
        // A file that is due but could not be decided (the journal refused) is tried again a little later.
        waiting.map(|known| known.due.saturating_duration_since(now).max(Duration::from_millis(10))).min()
    }
}

#[cfg(test)]
mod tests {
    use super::super::listing;
    use super::*;

    const CONFIG: WatchConfig = WatchConfig {
        poll_interval_ms: 2000,
        closed_settle_ms: 100,
        settle_ms: 1000,
        open_settle_ms: 10_000,
    };

    fn listing_of(folder: &Path) -> Listing {
        listing::jobs(folder, 100).expect("reads")
    }

    #[test]
    fn a_file_rests_as_long_as_its_writer_is_unsure() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.yaml");
        std::fs::write(&path, "1").expect("writable");
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut table = SettleTable::default();
        assert!(table.update(listing_of(folder.path()), &CONFIG, at(0)).is_empty(), "just seen");
        assert!(table.update(listing_of(folder.path()), &CONFIG, at(999)).is_empty());
        assert_eq!(table.update(listing_of(folder.path()), &CONFIG, at(1000)).len(), 1, "unchanged twice");
        table.heard(&path, Settle::Open, &CONFIG);
        std::fs::write(&path, "12").expect("writable");
        assert!(table.update(listing_of(folder.path()), &CONFIG, at(1100)).is_empty());
        assert!(table.update(listing_of(folder.path()), &CONFIG, at(9000)).is_empty(), "still open");
        assert_eq!(table.heard(&path, Settle::Closed, &CONFIG), Duration::from_millis(100));
        table.heard(&path, Settle::Unknown, &CONFIG);
        let ready = table.update(listing_of(folder.path()), &CONFIG, at(9001));
        assert_eq!(ready.len(), 1, "closed, and at rest for long");
        table.decided(&path, ready[0].1);
        assert!(table.update(listing_of(folder.path()), &CONFIG, at(99_000)).is_empty(), "decided");
        assert_eq!(table.next_due(at(99_000)), None);
        std::fs::write(&path, "123").expect("writable");
        assert!(
            table.update(listing_of(folder.path()), &CONFIG, at(99_500)).is_empty(),
            "changed: rests again"
        );
        assert_eq!(table.next_due(at(99_500)), Some(Duration::from_millis(100)));
    }
}
