//! Cancelling by key, caches, counts of the queue, and what is dangerous in the server's configuration.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use redis::{Cmd, Value, cmd};

use super::keys::{CANCELLATIONS, QUEUE_STATS};
use super::{Fleet, FleetError};
use crate::job::ids::TaskId;

/// How often the caches answered since the handle was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheCounts {
    /// It was there.
    pub hits: u64,
    /// It was not.
    pub misses: u64,
}

/// A remark on the server's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Warning {
    /// Work may be lost; the sentence says what to set.
    Danger(String),
    /// Good to know.
    Note(String),
}

impl Warning {
    /// The sentence.
    pub fn text(&self) -> &str {
        match self {
            Self::Danger(text) | Self::Note(text) => text,
        }
    }
}

impl Fleet {
    /// Those of `task_ids` that somebody asked to cancel: by a key `study:{task_id}:cancel` or `cancel:{task_id}`, or by
    /// the set `ai:job:cancellations`.
    ///
    /// # Errors
    /// As every call.
    pub async fn cancelled(&self, task_ids: &[TaskId]) -> Result<Vec<TaskId>, FleetError> {
        let mut commands = Vec::with_capacity(task_ids.len() * 3);
        for task_id in task_ids {
            let keys = self.keys().cancels(task_id.as_str());
            commands.extend(keys.iter().map(|key| cmd("EXISTS").arg(key).to_owned()));
            commands.push(cmd("SISMEMBER").arg(CANCELLATIONS).arg(task_id.as_str()).to_owned());
        }
        let answers: Vec<bool> = self.many("look for cancellations", commands).await?;
        let asked = task_ids.iter().zip(answers.chunks(3)).filter(|(_, answers)| answers.contains(&true));
        Ok(asked.map(|(task_id, _)| task_id.clone()).collect())
    }

    /// Removes the request to cancel a task, which was obeyed: the task can be submitted again.
    ///
    /// # Errors
    /// As every call.
    pub async fn forget_cancel(&self, task_id: &TaskId) -> Result<(), FleetError> {
        let keys = self.keys().cancels(task_id.as_str());
        let mut commands: Vec<Cmd> = keys.iter().map(|key| cmd("DEL").arg(key).to_owned()).collect();
        commands.push(cmd("SREM").arg(CANCELLATIONS).arg(task_id.as_str()).to_owned());
        self.many::<Value>("forget a cancellation", commands).await.map(drop)
    }

    /// What is cached under `key`.
    ///
    /// # Errors
    /// As every call.
    pub async fn cache_get(&self, key: &str) -> Result<Option<String>, FleetError> {
        let found: Option<String> = self.command("read a cache", cmd("GET").arg(key)).await?;
        let counter = if found.is_some() { &self.inner.cache_hits } else { &self.inner.cache_misses };
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(found)
    }

    /// Caches `value` under `key` for `ttl_ms`.
    ///
    /// # Errors
    /// As every call.
    pub async fn cache_set(&self, key: &str, value: &str, ttl_ms: u64) -> Result<(), FleetError> {
        let mut command = cmd("SET");
        command.arg(key).arg(value).arg("PX").arg(ttl_ms.max(1));
        self.command::<Value>("write a cache", &command).await.map(drop)
    }

    /// How often the caches answered.
    pub fn cache_counts(&self) -> CacheCounts {
        CacheCounts {
            hits: self.inner.cache_hits.load(Ordering::Relaxed),
            misses: self.inner.cache_misses.load(Ordering::Relaxed),
        }
    }

    /// Mirrors counts of the queue into the hash `queue:stats`.
    ///
    /// # Errors
    /// As every call.
    pub async fn queue_stats(&self, stats: &BTreeMap<String, String>) -> Result<(), FleetError> {
        if stats.is_empty() {
            return Ok(());
        }
        self.command::<Value>("show the queue", cmd("HSET").arg(QUEUE_STATS).arg(stats)).await.map(drop)
    }

    /// What in the server's configuration may lose work, in sentences with the setting to change.
    ///
    /// # Errors
    /// As every call; a server that does not show its configuration is a note.
    pub async fn warnings(&self) -> Result<Vec<Warning>, FleetError> {
        let mut settings = BTreeMap::new();
        for name in ["appendonly", "maxmemory-policy", "maxmemory"] {
            let mut command = cmd("CONFIG");
            command.arg("GET").arg(name);
            match self.command::<BTreeMap<String, String>>("read the configuration", &command).await {
                Ok(found) => settings.extend(found),
                Err(error @ (FleetError::NoPermission { .. } | FleetError::Refused { .. })) => {
                    return Ok(vec![Warning::Note(format!(
                        "redis at {} does not show its configuration ({}); make sure that `appendonly` is yes and \
                         `maxmemory-policy` is noeviction",
                        self.address(),
                        error.chain()
                    ))]);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(judge(self.address(), &settings))
    }
}

fn judge(address: &str, settings: &BTreeMap<String, String>) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let set = |name: &str| settings.get(name).map(String::as_str).unwrap_or_default();
    if set("appendonly") == "no" {
        warnings.push(Warning::Danger(format!(
            "redis at {address} keeps no append-only file: queued jobs may be lost when it restarts; \
             set `CONFIG SET appendonly yes` and `appendonly yes` in redis.conf"
        )));
    }
    let (policy, limit) = (set("maxmemory-policy"), set("maxmemory"));
    let is_limited = !matches!(limit, "" | "0");
    if policy.starts_with("allkeys-") {
        let when = if is_limited {
            format!("when it reaches maxmemory = {limit} bytes")
        } else {
            "as soon as maxmemory is set".to_owned()
        };
        warnings.push(Warning::Danger(format!(
            "redis at {address} may evict the queue {when} (maxmemory-policy is {policy}); \
             set `CONFIG SET maxmemory-policy noeviction` and the same in redis.conf"
        )));
    } else if policy.starts_with("volatile-") && is_limited {
        warnings.push(Warning::Note(format!(
            "redis at {address} may evict leases and marks of results when it reaches maxmemory = {limit} bytes \
             (maxmemory-policy is {policy}); the queue itself is safe; noeviction is safer"
        )));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dangerous_settings_are_named_with_what_to_set() {
        let judged = |append: &str, policy: &str, limit: &str| {
            let settings = [("appendonly", append), ("maxmemory-policy", policy), ("maxmemory", limit)];
            judge("h:1", &settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into())
        };
        assert_eq!(judged("yes", "noeviction", "0"), []);
        let two = judged("no", "allkeys-lru", "1000");
        assert!(matches!(&two[..], [Warning::Danger(a), Warning::Danger(b)]
            if a.contains("CONFIG SET appendonly yes") && b.contains("maxmemory = 1000 bytes")));
        assert!(matches!(&judged("yes", "volatile-ttl", "5")[..], [Warning::Note(_)]));
        assert_eq!(judged("yes", "volatile-ttl", "0"), []);
        assert!(matches!(&judged("yes", "allkeys-random", "0")[..], [Warning::Danger(_)]));
    }
}
