//! What was worked out once and may be used again for a while: files with a checksum and a lifetime.
//!
//! Owns `<cache folder>/<name>/`. A value is a file named after the hash of its key: a first line with the SHA-256 of
//! the rest, then JSON with the key, the time it was made, and the value. A file that does not verify, is of another
//! key, too old, or from the future is as good as none. A [`SecondTier`] behind the files lets machines share values;
//! what comes from there is held to the same checks. Nothing here ever fails: a cache that cannot be read or written
//! costs time only.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::index::hex;

/// Largest value that is read, bytes.
const TEXT_BYTES_MAX: u64 = 64 << 20;
/// Values kept on one shelf; the oldest go first.
const VALUES_MAX: usize = 512;
/// Clocks of machines that share values may differ by this much.
const SKEW_MS: i64 = 60_000;

/// A store behind the files that several machines share.
///
/// `set` has to let the value go after `lifetime`. Faults are the implementation's to log: a value that cannot be had
/// is `None`, one that cannot be stored is not there next time. Both have to answer within a limit of time.
pub trait SecondTier {
    /// The text stored under a key.
    fn get(&self, key: &str) -> Option<String>;

    /// Stores a text under a key for so long.
    fn set(&self, key: &str, text: &str, lifetime: Duration);
}

/// A pair of closures, `get` and `set`.
impl<G, S> SecondTier for (G, S)
where
    G: Fn(&str) -> Option<String>,
    S: Fn(&str, &str, Duration),
{
    fn get(&self, key: &str) -> Option<String> {
        (self.0)(key)
    }

    fn set(&self, key: &str, text: &str, lifetime: Duration) {
        (self.1)(key, text, lifetime);
    }
}

/// Values of one kind.
pub struct Shelf<'a> {
    folder: PathBuf,
    name: &'static str,
    lifetime: Duration,
    second: Option<&'a dyn SecondTier>,
}

#[derive(Deserialize)]
struct Stored<T> {
    key: String,
    made_unix_ms: i64,
    value: T,
}

#[derive(Serialize)]
struct Storing<'v, T> {
    key: &'v str,
    made_unix_ms: i64,
    value: &'v T,
}

impl<'a> Shelf<'a> {
    /// The shelf `name` in a cache folder, whose values live so long. Keys of the second tier are `<name>:<key>`.
    pub fn new(
        cache_folder: &Path,
        name: &'static str,
        lifetime: Duration,
        second: Option<&'a dyn SecondTier>,
    ) -> Shelf<'a> {
        Shelf { folder: cache_folder.join(name), name, lifetime, second }
    }

    /// The value of a key, from the files or else from the second tier.
    pub fn get<T: DeserializeOwned>(&self, key: &str, now_unix_ms: i64) -> Option<T> {
        let file = self.file(key);
        let is_small = std::fs::metadata(&file).is_ok_and(|meta| meta.len() <= TEXT_BYTES_MAX);
        let local = is_small.then(|| std::fs::read_to_string(&file).ok()).flatten();
        if let Some(value) = local.and_then(|text| self.read(&text, key, now_unix_ms)) {
            return Some(value);
        }
        let text = self.second?.get(&self.shared_key(key))?;
        let value = self.read(&text, key, now_unix_ms)?;
        self.write(&file, &text);
        Some(value)
    }

    /// Stores the value of a key in the files and the second tier.
    pub fn put<T: Serialize>(&self, key: &str, value: &T, now_unix_ms: i64) {
        let stored = Storing { key, made_unix_ms: now_unix_ms, value };
        let body = match serde_json::to_string(&stored) {
            Ok(body) => body,
            Err(error) => return tracing::debug!(key, %error, "a value is not kept"),
        };
        let text = format!("{}\n{body}", hex(&Sha256::digest(&body)));
        self.write(&self.file(key), &text);
        if let Some(second) = self.second {
            second.set(&self.shared_key(key), &text, self.lifetime);
        }
    }

    fn shared_key(&self, key: &str) -> String {
        format!("{}:{key}", self.name)
    }

    fn file(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{}.json", &hex(&Sha256::digest(key))[..32]))
    }

    fn read<T: DeserializeOwned>(&self, text: &str, key: &str, now_unix_ms: i64) -> Option<T> {
        if text.len() as u64 > TEXT_BYTES_MAX {
            return None;
        }
        let (checksum, body) = text.split_once('\n')?;
        if hex(&Sha256::digest(body)) != checksum {
            tracing::warn!(shelf = self.name, key, "a cached value is damaged; it is worked out anew");
            return None;
        }
        let stored: Stored<T> = serde_json::from_str(body).ok()?;
        let age_ms = now_unix_ms.saturating_sub(stored.made_unix_ms);
        let is_fresh = age_ms >= -SKEW_MS && i128::from(age_ms) < self.lifetime.as_millis() as i128;
        (stored.key == key && is_fresh).then_some(stored.value)
    }

    fn write(&self, file: &Path, text: &str) {
        let temporary = file.with_extension(format!("{}.part", std::process::id()));
        let written = std::fs::create_dir_all(&self.folder)
            .and_then(|()| std::fs::write(&temporary, text))
            .and_then(|()| std::fs::rename(&temporary, file));
        match written {
            Ok(()) => self.prune(),
            Err(error) => tracing::debug!(file = %file.display(), %error, "a value is not kept"),
        }
    }

    /// Removes files past their lifetime, and the oldest beyond the limit.
    fn prune(&self) {
        let Ok(entries) = std::fs::read_dir(&self.folder) else { return };
        let mut files: Vec<(SystemTime, PathBuf)> = entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                Some((entry.metadata().ok()?.modified().ok()?, entry.path()))
            })
            .collect();
        files.sort();
        let excess = files.len().saturating_sub(VALUES_MAX);
        for (at, (time, path)) in files.iter().enumerate() {
            let is_old = time.elapsed().is_ok_and(|age| age > self.lifetime);
            if at < excess || is_old {
                // Another process may have been quicker.
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

/// Milliseconds since 1970.
pub fn now_unix_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as i64)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::HashMap;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const HOUR_MS: i64 = 3_600_000;

    #[test]
    fn values_live_their_time_and_are_of_their_key() {
        let dir = tempfile::tempdir().expect("a folder");
        let shelf = Shelf::new(dir.path(), "things", HOUR, None);
        assert_eq!(shelf.get::<Vec<u32>>("a", 0), None);
        shelf.put("a", &vec![1, 2], 1000);
        assert_eq!(shelf.get("a", 1000), Some(vec![1, 2]));
        assert_eq!(shelf.get("a", 1000 + HOUR_MS - 1), Some(vec![1, 2]));
        assert_eq!(shelf.get::<Vec<u32>>("a", 1000 + HOUR_MS), None, "its time is over");
        assert_eq!(shelf.get("a", 1000 - SKEW_MS), Some(vec![1, 2]), "clocks differ a little");
        assert_eq!(shelf.get::<Vec<u32>>("a", 999 - SKEW_MS), None, "made in the future");
        assert_eq!(shelf.get::<Vec<u32>>("b", 1000), None);
        assert_eq!(shelf.get::<String>("a", 1000), None, "of another form");
        let (from, to) = (shelf.file("a"), shelf.file("b"));
        std::fs::copy(from, to).expect("copied");
        assert_eq!(shelf.get::<Vec<u32>>("b", 1000), None, "a file of another key");
    }

    #[test]
    fn any_damage_is_a_miss_and_never_a_crash() {
        let dir = tempfile::tempdir().expect("a folder");
        let shelf = Shelf::new(dir.path(), "things", HOUR, None);
        shelf.put("a", &"value", 0);
        let file = shelf.file("a");
        let whole = std::fs::read(&file).expect("there");
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x15;
            std::fs::write(&file, &damaged).expect("written");
            assert_eq!(shelf.get::<String>("a", 0), None, "byte {at}");
            std::fs::write(&file, &whole[..at]).expect("written");
            assert_eq!(shelf.get::<String>("a", 0), None, "cut at {at}");
        }
        shelf.put("a", &"value", 0);
        assert_eq!(shelf.get("a", 0), Some("value".to_owned()), "made anew");
        let nowhere = Shelf::new(&file, "things", HOUR, None);
        nowhere.put("a", &"value", 0);
        assert_eq!(nowhere.get::<String>("a", 0), None, "no folder can be made inside a file");
    }

    #[test]
    fn a_second_tier_is_asked_last_filled_always_and_not_trusted() {
        let shared: RefCell<HashMap<String, String>> = RefCell::default();
        let asked = RefCell::new(0);
        let get = |key: &str| {
            *asked.borrow_mut() += 1;
            shared.borrow().get(key).cloned()
        };
        let set = |key: &str, text: &str, lifetime: Duration| {
            assert_eq!(lifetime, HOUR);
            shared.borrow_mut().insert(key.to_owned(), text.to_owned());
        };
        let second = (get, set);
        let [one, other] = [tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder")];
        Shelf::new(one.path(), "things", HOUR, Some(&second)).put("a", &7, 0);
        assert!(shared.borrow().contains_key("things:a"));
        let shelf = Shelf::new(other.path(), "things", HOUR, Some(&second));
        assert_eq!((shelf.get("a", 0), *asked.borrow()), (Some(7), 1));
        assert_eq!((shelf.get("a", 0), *asked.borrow()), (Some(7), 1), "the file is there now");
        let text = shared.borrow()["things:a"].replace(":7", ":8");
        shared.borrow_mut().insert("things:b".into(), text);
        assert_eq!(shelf.get::<i32>("b", 0), None);
    }

    #[test]
    fn a_shelf_has_a_limit() {
        let dir = tempfile::tempdir().expect("a folder");
        let shelf = Shelf::new(dir.path(), "things", HOUR, None);
        for i in 0..VALUES_MAX + 5 {
            shelf.put(&i.to_string(), &i, 0);
        }
        let files = std::fs::read_dir(dir.path().join("things")).expect("listed").count();
        assert_eq!(files, VALUES_MAX);
        assert_eq!(shelf.get(&(VALUES_MAX + 4).to_string(), 0), Some(VALUES_MAX + 4));
    }
}
