//! What becomes of an entry of the shared queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::files::Disk;
use super::{Consumer, LATER_MAX, TAKE_MAX, Trouble};
use crate::actors::intake::{self, Submission, Verdict};
use crate::actors::supervisor::{Notice, Standing, Wake, prepare_log};
use crate::adapters::queue::journal::Journal;
use crate::adapters::queue::redis::{Acquired, Taken};
use crate::adapters::queue::{JobStore, QueueError};
use crate::job::causes::chain;
use crate::job::clock::now_unix_ms;
use crate::job::delivery::QueueEntry;
use crate::job::ids::TaskId;
use crate::job::message::{self, ListKind, Message, MessageError};
use crate::job::record::{JobRecord, SharedJob};
use crate::job::spec::{JobSpec, LoadedSpec};
use crate::job::state::JobState;

/// Deliveries of an entry after which it is taken for one that brings the service down.
const DELIVERIES_MAX: u64 = 50;
/// Looks at a file that is not there before the entry goes to the dead.
const UNREADABLE_MAX: u32 = 12;
/// Limit of reading the file that an entry names; a share may hang.
const READ_LIMIT: Duration = Duration::from_secs(5);
/// Reads that may hang at once before no more are begun.
const HUNG_READS_MAX: usize = 8;
/// Longest list of files and entries that are remembered.
const REMEMBERED_MAX: usize = 10_000;

/// An entry that is a job as far as its text goes.
struct Readable {
    message: Message,
    spec: Box<JobSpec>,
}

/// Why an entry is no job.
enum Unreadable {
    /// It never will be.
    Never(String),
    /// A file is missing that may come, or may be on another machine.
    NotYet(String),
}

/// Counts itself while it lives.
struct Going(Arc<AtomicUsize>);

impl Going {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count.clone())
    }
}

impl Drop for Going {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Consumer {
    /// Looks again at entries that were put off, and gives the room of `later` back.
    pub(super) async fn reconsider(&mut self, standing: &Standing) -> Result<(), Trouble> {
        let later = std::mem::take(&mut self.later);
        self.consider_all(later, standing).await
    }

    /// Takes over what dead machines held, as far as there is room for it.
    pub(super) async fn steal(&mut self, standing: &Standing) -> Result<(), Trouble> {
        let room = self.room(standing).await?;
        if room == 0 || Instant::now() < self.no_steal_until {
            return Ok(());
        }
        let lease_ms = self.parts.config.redis.lease_ms();
        let stolen = self.parts.fleet.steal(lease_ms, room.min(TAKE_MAX)).await?;
        self.consider_all(stolen.entries, standing).await
    }

    /// Decides about one entry. It stays pending until its job has ended, unless it is refused or done with.
    pub(super) async fn consider(&mut self, taken: Taken, standing: &Standing) -> Result<(), Trouble> {
        let fleet = self.parts.fleet.clone();
        let place = name_of(&taken);
        if taken.entry.is_list
            && self.passed.get(&key_of(&taken)).is_some_and(|until| *until > Instant::now())
        {
            // Everything in the list was looked at since the last heartbeat.
            self.resting.insert(taken.entry.queue.clone(), self.next_beat);
            fleet.release(&taken.entry).await?;
            return Ok(());
        }
        let readable = match self.read(&taken).await? {
            Ok(readable) => readable,
            Err(unreadable) => return self.put_aside(taken, unreadable).await,
        };
        self.unreadable.remove(&key_of(&taken));
        let task_id = readable.spec.task_id.clone();
        if readable.spec.requires_gpu && !standing.has_gpu {
            return self.pass(taken, &task_id).await;
        }
        let known = self.job(&task_id).await?;
        if known.is_none() && taken.deliveries > DELIVERIES_MAX {
            let reason = format!("delivered {} times without becoming a job", taken.deliveries);
            tracing::error!("{place} goes to the dead: {reason}");
            fleet.bury(&taken.entry, &taken.fields, &reason).await?;
            return Ok(());
        }
        let instance = self.instance(&taken, &task_id, known.as_ref()).await?;
        // Both questions travel together.
        let (is_done, last) =
            futures_util::future::try_join(fleet.is_done(&instance), fleet.last_instance(&task_id)).await?;
        if is_done {
            tracing::info!(task_id = %task_id, "{place} has been worked on; it is acknowledged");
            fleet.acknowledge(&taken.entry).await?;
            return Ok(());
        }
        if let Some(known) = &known {
            let is_same = known.instance == instance;
            if is_same && known.state.is_terminal() && known.state != JobState::Moved {
                return self.tell_again(known, &instance).await;
            }
            if is_same && known.state != JobState::Moved {
                // It is in hand, and the heartbeat keeps its lease.
                return Ok(());
            }
            if !is_same
                && known.state == JobState::Completed
                && known.content_sha256 == readable.message.content_sha256()
            {
                let folder = known.run_dir.display();
                tracing::info!(task_id = %task_id, "{place} is acknowledged without a run: this very content has completed, see {folder}");
                fleet.acknowledge(&taken.entry).await?;
                return Ok(());
            }
            if !is_same && !known.state.is_terminal() {
                tracing::debug!(task_id = %task_id, "{place} waits for the end of the job that has its task id");
                return self.put_off(taken).await;
            }
        }
        let lease_ms = self.parts.config.redis.lease_ms();
        // Somebody had this very submission before, if only for a moment: there may be something of it in the store.
        let was_had = last.as_ref() == Some(&instance);
        match fleet.acquire(&task_id, &instance, lease_ms).await? {
            Acquired::Held { owner, .. } => {
                if was_had {
                    tracing::info!(task_id = %task_id, "{place} belongs to the machine {owner}, which works on it");
                    fleet.hand_over(&taken.entry, &owner).await?;
                    return Ok(());
                }
                tracing::debug!(task_id = %task_id, "{place} waits: the machine {owner} works on its task id");
                self.put_off(taken).await
            }
            Acquired::Mine { fence, attempts_before } => {
                let attempts_before = attempts_before.max(u32::from(was_had));
                let shared = SharedJob { instance, entry: taken.entry.clone(), fence, attempts_before };
                self.accept(taken, readable, shared).await
            }
        }
    }

    /// A job that has ended here, whose entry came back before its result was out: the result waits in the outbox, or was
    /// given up when another machine had the job, which is gone by now.
    async fn tell_again(&mut self, known: &JobRecord, instance: &str) -> Result<(), Trouble> {
        let lease_ms = self.parts.config.redis.lease_ms();
        let own = instance.to_owned();
        if self.keep(move |journal| journal.is_result_waiting(&own)).await? {
            return Ok(());
        }
        if let Acquired::Mine { fence, .. } =
            self.parts.fleet.acquire(&known.task_id, instance, lease_ms).await?
        {
            let seq = known.seq;
            self.keep(move |journal| journal.tell_again(seq, fence)).await?;
        }
        Ok(())
    }

    /// Reads an entry off the thread: files may lie on slow shares.
    async fn read(&self, taken: &Taken) -> Result<Result<Readable, Unreadable>, Trouble> {
        let (fields, entry, context) = (taken.fields.clone(), named_entry(taken), self.parts.context.clone());
        let read = move || {
            let mut disk = Disk { context: context.clone() };
            let parsed = match list_kind(&entry) {
                Some(kind) => {
                    let payload = fields.get("payload").map(String::as_bytes).unwrap_or_default();
                    message::from_list(kind, payload, &entry, &mut disk)
                }
                None => {
                    let given: Vec<(String, Vec<u8>)> = fields
                        .into_iter()
                        .filter(|(name, _)| name != "entry_id")
                        .map(|(name, value)| (name, value.into_bytes()))
                        .collect();
                    message::from_stream(&given, &entry, &mut disk)
                }
            };
            let message = parsed.map_err(|error: MessageError| {
                let text = chain(&error);
                if error.may_pass() { Unreadable::NotYet(text) } else { Unreadable::Never(text) }
            })?;
            let loaded =
                JobSpec::load_over(&message.text, &message.source_name, &context, &message.overlay())
                    .and_then(LoadedSpec::runnable);
            match loaded {
                Ok(spec) => Ok(Readable { message, spec: Box::new(spec) }),
                Err(error) => Err(Unreadable::Never(error.to_string())),
            }
        };
        if self.hung_reads.load(Ordering::SeqCst) >= HUNG_READS_MAX {
            return Ok(Err(Unreadable::NotYet("the share that its file is on does not answer".to_owned())));
        }
        let limit = READ_LIMIT.min(self.beat_interval());
        let going = Going::new(&self.hung_reads);
        let read = tokio::task::spawn_blocking(move || {
            let _going = going;
            read()
        });
        Ok(match tokio::time::timeout(limit, read).await {
            Ok(Ok(read)) => read,
            Ok(Err(error)) => Err(Unreadable::Never(format!("reading it failed: {error}"))),
            Err(_) => {
                let limit_ms = limit.as_millis();
                Err(Unreadable::NotYet(format!("its file could not be read within {limit_ms} ms")))
            }
        })
    }

    async fn put_aside(&mut self, taken: Taken, unreadable: Unreadable) -> Result<(), Trouble> {
        let (place, key) = (name_of(&taken), key_of(&taken));
        let reason = match unreadable {
            Unreadable::Never(reason) => reason,
            Unreadable::NotYet(reason) => {
                if self.unreadable.len() > REMEMBERED_MAX {
                    self.unreadable.clear();
                }
                let seen = self.unreadable.entry(key.clone()).or_insert(0);
                *seen += 1;
                if *seen < UNREADABLE_MAX {
                    tracing::warn!("{place} cannot be read yet and is given back: {reason}");
                    self.note_passed(&taken);
                    self.parts.fleet.release(&taken.entry).await?;
                    return Ok(());
                }
                format!("{reason} ({UNREADABLE_MAX} looks)")
            }
        };
        self.unreadable.remove(&key);
        tracing::error!("{place} is refused and goes to the dead:\n{reason}");
        self.parts.fleet.bury(&taken.entry, &taken.fields, &reason).await?;
        self.parts.observer.notice(&Notice::Rejected { source: place, reason });
        Ok(())
    }

    /// Leaves an entry that this machine cannot run to others. It stays where everyone can take it.
    async fn pass(&mut self, taken: Taken, task_id: &TaskId) -> Result<(), Trouble> {
        if self.note_passed(&taken) {
            tracing::info!(task_id = %task_id, "{} requires a GPU, which this machine lacks; it is left to others", name_of(&taken));
            let reason =
                format!("waits for a machine with a GPU ({} has none)", self.parts.fleet.machine_id());
            let fields = [
                ("task_id".to_owned(), task_id.to_string()),
                ("status".to_owned(), "queued".to_owned()),
                ("reason".to_owned(), reason),
                ("updated_unix_ms".to_owned(), now_unix_ms().to_string()),
            ];
            self.parts.fleet.progress_of_waiting(task_id, &fields).await?;
        }
        self.parts.fleet.release(&taken.entry).await?;
        Ok(())
    }

    /// Notes that an entry was looked at in vain and is not to be looked at before the next heartbeat. True the first time.
    fn note_passed(&mut self, taken: &Taken) -> bool {
        if self.passed.len() > REMEMBERED_MAX {
            self.passed.clear();
        }
        self.passed.insert(key_of(taken), self.next_beat).is_none()
    }

    /// Keeps an entry until the job that has its task id has ended.
    async fn put_off(&mut self, taken: Taken) -> Result<(), Trouble> {
        if self.later.len() >= LATER_MAX {
            self.parts.fleet.release(&taken.entry).await?;
        } else {
            self.later.push(taken);
        }
        Ok(())
    }

    /// Which submission an entry is. An entry of a stream has an id of its own; the same element of a list is the same
    /// submission until it has ended.
    async fn instance(
        &self,
        taken: &Taken,
        task_id: &TaskId,
        known: Option<&JobRecord>,
    ) -> Result<String, Trouble> {
        let queue = base_of(&taken.entry.queue);
        let stem = format!("{queue}/{}", taken.original_id);
        if !taken.entry.is_list {
            return Ok(stem);
        }
        let fleet = &self.parts.fleet;
        let last = fleet.last_instance(task_id).await?;
        let here = known.filter(|known| !known.state.is_terminal()).map(|known| known.instance.clone());
        for before in here.into_iter().chain(last) {
            if before.starts_with(&stem) && !fleet.is_done(&before).await? {
                return Ok(before);
            }
        }
        Ok(format!("{stem}/{}", uuid::Uuid::new_v4()))
    }

    async fn job(&self, task_id: &TaskId) -> Result<Option<JobRecord>, Trouble> {
        let task_id = task_id.clone();
        self.keep(move |journal| journal.job(&task_id)).await
    }

    async fn keep<R, F>(&self, work: F) -> Result<R, Trouble>
    where
        R: Send + 'static,
        F: FnOnce(&mut Journal) -> Result<R, QueueError> + Send + 'static,
    {
        Ok(self.parts.keeper.with(work).await?)
    }

    /// Makes a job of an entry.
    async fn accept(&mut self, taken: Taken, readable: Readable, shared: SharedJob) -> Result<(), Trouble> {
        let fleet = self.parts.fleet.clone();
        let fence = shared.fence;
        let task_id = readable.spec.task_id.clone();
        let Readable { message, spec } = readable;
        let submission = Submission {
            source: message.source_name.clone(),
            overlay: message.overlay(),
            bytes: message.text,
            modified_unix_ms: taken.at_unix_ms,
            keep_verdict: false,
            again: false,
            shared: Some(shared),
            taker: None,
        };
        let context = self.parts.context.clone();
        let decided = self.keep(move |journal| intake::decide(journal, &submission, &context)).await;
        if let Err(Trouble::Journal(_)) = &decided {
            // Others may take it at once; this machine takes nothing until its journal can be written.
            self.is_journal_broken = true;
            fleet.release(&taken.entry).await?;
            fleet.let_go(&task_id, fence).await?;
        }
        let verdict = decided?;
        match verdict {
            Verdict::Accepted(record) => {
                prepare_log(&record);
                tracing::info!(task_id = %task_id, "{} is accepted", message.source_name);
                for warning in &message.warnings {
                    tracing::warn!(task_id = %task_id, "{warning}");
                }
                for note in spec.ignored.iter().chain(&spec.overridden) {
                    tracing::warn!(task_id = %task_id, "key `{}`: {}", note.key, note.reason);
                }
                self.parts.observer.notice(&Notice::Accepted(record));
                self.parts.supervisor.send(Wake).await.map_err(|_| Trouble::Gone)?;
            }
            Verdict::DryRun(_) | Verdict::Known(_) => {
                tracing::info!(task_id = %task_id, "{} is valid; it asked for no run", message.source_name);
                fleet.acknowledge(&taken.entry).await?;
                fleet.let_go(&task_id, fence).await?;
            }
            Verdict::Rejected(reason) => {
                tracing::error!(task_id = %task_id, "{} is refused and goes to the dead: {reason}", message.source_name);
                fleet.bury(&taken.entry, &taken.fields, &reason).await?;
                fleet.let_go(&task_id, fence).await?;
                self.parts.observer.notice(&Notice::Rejected { source: message.source_name, reason });
            }
        }
        Ok(())
    }
}

/// The entry under the name that all machines know it by: the queue without its class, the first id.
fn named_entry(taken: &Taken) -> QueueEntry {
    let queue = base_of(&taken.entry.queue).to_owned();
    QueueEntry { queue, id: taken.original_id.clone(), is_list: taken.entry.is_list }
}

fn base_of(queue: &str) -> &str {
    queue.strip_suffix(":high").or_else(|| queue.strip_suffix(":low")).unwrap_or(queue)
}

fn key_of(taken: &Taken) -> (String, String) {
    (taken.entry.queue.clone(), taken.original_id.clone())
}

fn name_of(taken: &Taken) -> String {
    format!("the entry {} of {}", taken.original_id, taken.entry.queue)
}

fn list_kind(entry: &QueueEntry) -> Option<ListKind> {
    let kind = match entry.queue.as_str() {
        "recreate" => ListKind::Recreate,
        "evaluate" => ListKind::Evaluate,
        _ => ListKind::Training,
    };
    entry.is_list.then_some(kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_keep_their_name_when_they_change_their_class() {
        let taken = Taken {
            entry: QueueEntry { queue: "q:high".into(), id: "9-0".into(), is_list: false },
            original_id: "5-0".into(),
            fields: Default::default(),
            deliveries: 1,
            at_unix_ms: 5,
        };
        let named = named_entry(&taken);
        assert_eq!((named.queue.as_str(), named.id.as_str()), ("q", "5-0"));
        assert_eq!(list_kind(&named), None);
        let list = QueueEntry { queue: "recreate".into(), id: "{}".into(), is_list: true };
        assert_eq!(list_kind(&list), Some(ListKind::Recreate));
    }
}
