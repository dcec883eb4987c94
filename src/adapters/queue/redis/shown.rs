//! What is shown of a running job: its progress and its log.

use redis::{Cmd, Value, cmd};
use serde_json::{Map, Value as Json};

use super::keys::{MACHINES, PROGRESS_CHANNEL, QUEUE_STATS};
use super::{Fleet, FleetError, scripts};
use crate::job::ids::TaskId;

/// Lifetime of the hashes of the transposed form, in seconds.
const TRANSPOSED_TTL_S: u64 = 1200;

/// What became of lines of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logged {
    /// They are in the stream, which now reaches to this offset of the log.
    Appended {
        /// Byte offset.
        offset: u64,
    },
    /// The stream reaches to another offset; nothing was appended. It is 0 when the server lost it.
    ContinueAt {
        /// Byte offset.
        offset: u64,
    },
}

impl Fleet {
    /// Shows the progress of a job: the hash `progress:{task_id}`, and messages on the channels. The hash stays while the job runs
    /// and, with `is_final`, for the configured time.
    ///
    /// # Errors
    /// As every call.
    pub async fn progress(
        &self,
        task_id: &TaskId,
        fields: &[(String, String)],
        is_final: bool,
    ) -> Result<(), FleetError> {
        if fields.is_empty() {
            return Ok(());
        }
        let key = self.keys().progress(task_id.as_str());
        let mut commands = vec![cmd("HSET").arg(&key).arg(fields).to_owned()];
        if is_final {
            commands.push(cmd("PEXPIRE").arg(&key).arg(self.inner.config.progress_ttl_ms).to_owned());
        } else {
            commands.push(cmd("PERSIST").arg(&key).to_owned());
        }
        let mut message = Map::from_iter([("task_id".to_owned(), Json::from(task_id.as_str()))]);
        message.extend(fields.iter().map(|(name, value)| (name.clone(), Json::from(value.as_str()))));
        commands.extend(publications(task_id, message));
        if self.inner.config.transposed_progress {
            commands.extend(self.transposed(&key, fields));
        }
        self.many::<Value>("show progress", commands).await.map(drop)
    }

    /// One hash for each name, as the older workers write it. Names of keys that are ours are left out.
    fn transposed(&self, key: &str, fields: &[(String, String)]) -> Vec<Cmd> {
        let keys = self.keys();
        let is_ours = |name: &str| {
            name == keys.topic || name == keys.results || name == MACHINES || name == QUEUE_STATS
        };
        let mut commands = Vec::new();
        for (name, value) in fields.iter().filter(|(name, _)| !name.is_empty() && !is_ours(name)) {
            commands.push(cmd("HSET").arg(name).arg(key).arg(value).to_owned());
            commands.push(cmd("EXPIRE").arg(name).arg(TRANSPOSED_TTL_S).to_owned());
        }
        commands
    }

    /// Removes what is shown of a job that was removed, and says so on the channels.
    ///
    /// # Errors
    /// As every call.
    pub async fn job_gone(&self, task_id: &TaskId) -> Result<(), FleetError> {
        let keys = self.keys();
        let id = task_id.as_str();
        let gone = [keys.progress(id), keys.log(id), keys.log_offset(id), keys.metrics(id)];
        let mut commands: Vec<Cmd> = gone.iter().map(|key| cmd("DEL").arg(key).to_owned()).collect();
        let message =
            [("task_id", id), ("status", "gone")].map(|(name, value)| (name.to_owned(), Json::from(value)));
        commands.extend(publications(task_id, Map::from_iter(message)));
        self.many::<Value>("remove a job", commands).await.map(drop)
    }

    /// Appends lines (each with its line end) to the log stream of a job, which keeps the configured number of them. They are the
    /// bytes from `from_offset` to `to_offset` of this machine's log; every byte is appended once, also when an answer was lost
    /// and the call is repeated.
    ///
    /// # Errors
    /// As every call.
    pub async fn log_lines(
        &self,
        task_id: &TaskId,
        from_offset: u64,
        to_offset: u64,
        lines: &[String],
    ) -> Result<Logged, FleetError> {
        let (stream, offset) = (self.keys().log(task_id.as_str()), self.keys().log_offset(task_id.as_str()));
        let (from, to) = (from_offset.to_string(), to_offset.to_string());
        let kept = self.inner.config.log_lines_max.max(1).to_string();
        let mut arguments: Vec<&[u8]> =
            vec![self.inner.machine_id.as_bytes(), from.as_bytes(), to.as_bytes(), kept.as_bytes()];
        arguments.extend(lines.iter().map(|line| line.as_bytes()));
        let (is_appended, offset): (bool, u64) =
            self.script("append to a log", &scripts::LOG, &[&stream, &offset], &arguments).await?;
        Ok(if is_appended { Logged::Appended { offset } } else { Logged::ContinueAt { offset } })
    }

    /// The log of a job is complete: its lifetime begins. Lines after it would end the lifetime again.
    ///
    /// # Errors
    /// As every call.
    pub async fn log_end(&self, task_id: &TaskId) -> Result<(), FleetError> {
        let ttl = self.inner.config.log_ttl_ms;
        let keys = [self.keys().log(task_id.as_str()), self.keys().log_offset(task_id.as_str())];
        let commands = keys.iter().map(|key| cmd("PEXPIRE").arg(key).arg(ttl).to_owned()).collect();
        self.many::<Value>("end a log", commands).await.map(drop)
    }
}

/// The message on the channel of all jobs and on that of this one.
fn publications(task_id: &TaskId, message: Map<String, Json>) -> [Cmd; 2] {
    let message = Json::Object(message).to_string();
    let own = format!("{PROGRESS_CHANNEL}:{task_id}");
    [PROGRESS_CHANNEL, &own].map(|channel| cmd("PUBLISH").arg(channel).arg(&message).to_owned())
}
