//! What is shown of a running job: its progress and its log.

use redis::{Cmd, FromRedisValue, Script, Value, cmd};
use serde_json::{Map, Value as Json};

use super::keys::{MACHINES, PROGRESS_CHANNEL, QUEUE_STATS};
use super::{Fleet, FleetError, scripts};
use crate::job::delivery::{RunRef, is_shared_instance};
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
    /// The stream reaches to another offset; nothing was appended. It is that of the run's begin when the server lost it.
    ContinueAt {
        /// Byte offset.
        offset: u64,
    },
    /// Another machine has the run by now, or a later run of the task is known: nothing was appended.
    Fenced,
}

/// Lines of a machine's log of a job.
#[derive(Debug, Clone, Copy)]
pub struct LogPart<'a> {
    /// Byte offset in the log at which they begin.
    pub from_offset: u64,
    /// At which they end.
    pub to_offset: u64,
    /// At which the log of this run begins: what is before it is of earlier runs of the task. Where the stream begins when
    /// the server knows of none of it.
    pub begin_offset: u64,
    /// The lines, each with its line end.
    pub lines: &'a [String],
    /// The job has ended: the lifetime of the stream begins.
    pub is_final: bool,
}

/// Whose word something shown is.
struct Speaker<'a> {
    task_id: &'a TaskId,
    /// Empty for a job that is nobody's yet.
    instance: &'a str,
    fence: u64,
}

impl<'a> From<&'a RunRef> for Speaker<'a> {
    fn from(run: &'a RunRef) -> Self {
        Self { task_id: &run.task_id, instance: &run.instance, fence: run.fence }
    }
}

impl Fleet {
    /// Shows the progress of a job: the hash `progress:{task_id}` has these fields and no others, and there are messages on the
    /// channels. The hash stays while the job runs and, with `is_final`, for the configured time. False when nothing was
    /// shown: another machine has the run by now, a later run of the task is known, or the run is shown to have ended.
    ///
    /// # Errors
    /// As every call.
    pub async fn progress(
        &self,
        run: &RunRef,
        fields: &[(String, String)],
        is_final: bool,
    ) -> Result<bool, FleetError> {
        self.put_progress(run.into(), fields, "whole", self.ttl_ms(is_final)).await
    }

    /// The same for a job of an earlier start of the service, of which it is not known whether it was shown: nothing changes
    /// when it is shown to have ended.
    ///
    /// # Errors
    /// As every call.
    pub async fn progress_again(
        &self,
        run: &RunRef,
        fields: &[(String, String)],
        is_final: bool,
    ) -> Result<bool, FleetError> {
        self.put_progress(run.into(), fields, "again", self.ttl_ms(is_final)).await
    }

    /// Shows how a job has ended beside what is shown of its run already. False as for [`Fleet::progress`].
    ///
    /// # Errors
    /// As every call.
    pub async fn progress_end(&self, run: &RunRef, fields: &[(String, String)]) -> Result<bool, FleetError> {
        self.put_progress(run.into(), fields, "part", self.ttl_ms(true)).await
    }

    /// Shows something of a job that waits in the queue, for the configured time. False when a machine works on its task id.
    ///
    /// # Errors
    /// As every call.
    pub async fn progress_of_waiting(
        &self,
        task_id: &TaskId,
        fields: &[(String, String)],
    ) -> Result<bool, FleetError> {
        if self.holder(task_id).await?.is_some() {
            return Ok(false);
        }
        let nobody = Speaker { task_id, instance: "", fence: 0 };
        self.put_progress(nobody, fields, "whole", self.ttl_ms(true)).await
    }

    /// Lifetime of what is shown, counted from the end: 0 while the job goes on.
    fn ttl_ms(&self, is_final: bool) -> u64 {
        if is_final { self.inner.config.progress_ttl_ms.max(1) } else { 0 }
    }

    async fn put_progress(
        &self,
        speaker: Speaker<'_>,
        fields: &[(String, String)],
        extent: &str,
        ttl_ms: u64,
    ) -> Result<bool, FleetError> {
        let what = "show progress";
        if fields.is_empty() || self.is_outdone(what, &speaker).await? {
            return Ok(false);
        }
        let task_id = speaker.task_id;
        let key = self.keys().progress(task_id.as_str());
        let (fence, ttl) = (speaker.fence.to_string(), ttl_ms.to_string());
        let mut arguments: Vec<&[u8]> = vec![
            self.inner.machine_id.as_bytes(),
            fence.as_bytes(),
            speaker.instance.as_bytes(),
            extent.as_bytes(),
            ttl.as_bytes(),
        ];
        for (name, value) in fields {
            arguments.extend([name.as_bytes(), value.as_bytes()]);
        }
        let names = self.with_fence(&[&key], task_id);
        if !self.shown_script(what, &scripts::PROGRESS, &names, &arguments).await? {
            return Ok(false);
        }
        let mut message = Map::from_iter([("task_id".to_owned(), Json::from(task_id.as_str()))]);
        message.extend(fields.iter().map(|(name, value)| (name.clone(), Json::from(value.as_str()))));
        let mut commands = publications(task_id, message).to_vec();
        if self.inner.config.transposed_progress {
            commands.extend(self.transposed(&key, fields));
        }
        self.many::<Value>(what, commands).await.map(|_| true)
    }

    /// The keys of a script, and that of the fencing number where it lies in reach.
    fn with_fence(&self, keys: &[&str], task_id: &TaskId) -> Vec<String> {
        let fence = (!self.is_cluster()).then(|| self.keys().fence(task_id.as_str()));
        keys.iter().map(|key| (*key).to_owned()).chain(fence).collect()
    }

    async fn shown_script<T: FromRedisValue>(
        &self,
        what: &'static str,
        script: &Script,
        names: &[String],
        arguments: &[&[u8]],
    ) -> Result<T, FleetError> {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.script(what, script, &names, arguments).await
    }

    /// On a cluster: true when a later owner of the run or a later run of the task is known. On one server the scripts look
    /// themselves (`is_later` of `shared.lua`).
    async fn is_outdone(&self, what: &'static str, speaker: &Speaker<'_>) -> Result<bool, FleetError> {
        if !self.is_cluster() {
            return Ok(false);
        }
        let mut command = cmd("HMGET");
        command.arg(self.keys().fence(speaker.task_id.as_str())).arg("owner").arg("fence").arg("instance");
        let (owner, fence, instance): (Option<String>, Option<u64>, Option<String>) =
            self.command(what, &command).await?;
        let Some(instance) = instance.filter(|_| fence.is_some_and(|fence| fence > speaker.fence)) else {
            return Ok(false);
        };
        let is_own = owner.as_deref() == Some(self.machine_id());
        let (theirs, ours) = (is_shared_instance(&instance), is_shared_instance(speaker.instance));
        Ok(if instance == speaker.instance { !is_own } else { theirs && ours || is_own && !theirs && !ours })
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
        let gone =
            [keys.progress(id), keys.log(id), keys.log_offset(id), keys.metrics(id), keys.metrics_run(id)];
        let mut commands: Vec<Cmd> = gone.iter().map(|key| cmd("DEL").arg(key).to_owned()).collect();
        let message =
            [("task_id", id), ("status", "gone")].map(|(name, value)| (name.to_owned(), Json::from(value)));
        commands.extend(publications(task_id, Map::from_iter(message)));
        self.many::<Value>("remove a job", commands).await.map(drop)
    }

    /// Appends lines to the log stream of a job, which keeps the configured number of them. They are a part of this machine's
    /// log; every byte is appended once, also when an answer was lost and the call is repeated.
    ///
    /// # Errors
    /// As every call.
    pub async fn log_lines(&self, run: &RunRef, part: LogPart<'_>) -> Result<Logged, FleetError> {
        let what = "append to a log";
        let speaker = Speaker::from(run);
        if self.is_outdone(what, &speaker).await? {
            return Ok(Logged::Fenced);
        }
        let config = &self.inner.config;
        let numbers = [
            speaker.fence,
            part.from_offset,
            part.to_offset,
            part.begin_offset,
            config.log_lines_max.max(1) as u64,
            if part.is_final { config.log_ttl_ms.max(1) } else { 0 },
        ];
        let [fence, from, to, begin, kept, ttl] = numbers.map(|number| number.to_string());
        let mut arguments = vec![self.inner.machine_id.as_bytes(), fence.as_bytes(), run.instance.as_bytes()];
        arguments.extend([&from, &to, &begin, &kept, &ttl].map(|text| text.as_bytes()));
        arguments.extend(part.lines.iter().map(|line| line.as_bytes()));
        let names = self.log_keys(&run.task_id);
        let (outcome, offset): (u8, u64) = self.shown_script(what, &scripts::LOG, &names, &arguments).await?;
        Ok(match outcome {
            0 => Logged::ContinueAt { offset },
            1 => Logged::Appended { offset },
            _ => Logged::Fenced,
        })
    }

    /// The log of a job is complete: its lifetime begins. False when another machine has the run by now, or a later run of the
    /// task is known.
    ///
    /// # Errors
    /// As every call.
    pub async fn log_end(&self, run: &RunRef) -> Result<bool, FleetError> {
        let what = "end a log";
        let speaker = Speaker::from(run);
        if self.is_outdone(what, &speaker).await? {
            return Ok(false);
        }
        let (fence, ttl) = (speaker.fence.to_string(), self.inner.config.log_ttl_ms.to_string());
        let arguments =
            [self.inner.machine_id.as_bytes(), fence.as_bytes(), run.instance.as_bytes(), ttl.as_bytes()];
        let names = self.log_keys(&run.task_id);
        self.shown_script(what, &scripts::END_LOG, &names, &arguments).await
    }

    fn log_keys(&self, task_id: &TaskId) -> Vec<String> {
        let keys = self.keys();
        self.with_fence(&[&keys.log(task_id.as_str()), &keys.log_offset(task_id.as_str())], task_id)
    }
}

/// The message on the channel of all jobs and on that of this one.
fn publications(task_id: &TaskId, message: Map<String, Json>) -> [Cmd; 2] {
    let message = Json::Object(message).to_string();
    let own = format!("{PROGRESS_CHANNEL}:{task_id}");
    [PROGRESS_CHANNEL, &own].map(|channel| cmd("PUBLISH").arg(channel).arg(&message).to_owned())
}
