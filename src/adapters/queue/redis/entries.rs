//! Entries that were taken: signs of life, giving away, stealing from the dead, the end.

use std::collections::BTreeMap;

use redis::{Cmd, cmd};

use super::keys::{MACHINES, SIDE_LISTS};
use super::take::{QueueKind, RawRow};
use super::{Fleet, FleetError, Taken, now_unix_ms, scripts};
use crate::job::delivery::QueueEntry;

/// The consumer that entries are given to which anyone may claim at once.
const UNASSIGNED: &str = "unassigned";
/// Idle time of such entries, in milliseconds: longer than any limit of ours.
const IDLE_FOR_ALL: &str = "31536000000";
/// Entries of the stream of the dead.
const DEAD_MAX: &str = "10000";
/// Fields of a buried entry that are kept.
const DEAD_FIELDS_MAX: usize = 500;
/// Pending entries that one call looks at, for each stream.
const LOOKED_AT_MAX: usize = 200;

/// What was taken over from machines that show no sign of life.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Stolen {
    /// Entries of streams: this machine's now.
    pub entries: Vec<Taken>,
    /// Elements that were moved back to the head of their lists, to be taken as usual.
    pub returned: usize,
}

impl Fleet {
    /// Takes over up to `count` entries whose consumer gave no sign of life for `min_idle_ms`, and moves up to as many elements
    /// that machines without a sign of life had taken from lists back to the lists.
    ///
    /// Entries of this machine itself are among them when it gave no sign of life for them: it does not know that it has
    /// them, because the answer with them was lost. One that does know them (after a long standstill) goes on as before.
    ///
    /// # Errors
    /// [`FleetError::NoGroup`]: call [`Fleet::ensure_groups`] first.
    pub async fn steal(&self, min_idle_ms: u64, count: usize) -> Result<Stolen, FleetError> {
        let kind = self.queue_kind().await?;
        let mut stolen = Stolen { returned: self.return_elements(&kind, count).await?, ..Stolen::default() };
        let (idle, looked_at) = (min_idle_ms.to_string(), LOOKED_AT_MAX.to_string());
        for (index, stream) in self.keys().streams().into_iter().enumerate() {
            if kind == QueueKind::List
                || index == 1 && kind != QueueKind::Stream
                || stolen.entries.len() >= count
            {
                continue;
            }
            let wanted = (count - stolen.entries.len()).to_string();
            let from = self.steal_from()[index].clone();
            let arguments: [&[u8]; 6] = [
                self.inner.config.group.as_bytes(),
                self.inner.machine_id.as_bytes(),
                idle.as_bytes(),
                wanted.as_bytes(),
                from.as_bytes(),
                looked_at.as_bytes(),
            ];
            let (next, rows): (String, Vec<RawRow>) =
                self.script("claim entries of the dead", &scripts::STEAL, &[stream], &arguments).await?;
            self.steal_from()[index] = next;
            stolen.entries.extend(rows.into_iter().map(|row| Taken::of_stream(stream, index != 1, row)));
        }
        Ok(stolen)
    }

    fn steal_from(&self) -> std::sync::MutexGuard<'_, [String; 3]> {
        // A panic elsewhere leaves three texts, which are fine.
        self.inner.steal_from.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    async fn return_elements(&self, kind: &QueueKind, count: usize) -> Result<usize, FleetError> {
        let what = "return elements of the dead";
        let machines = self.known_machines().await?;
        let others: Vec<String> = machines
            .into_iter()
            .map(|(name, _)| name)
            .filter(|name| *name != self.inner.machine_id)
            .collect();
        let alive: Vec<Cmd> =
            others.iter().map(|name| cmd("EXISTS").arg(self.keys().machine(name)).to_owned()).collect();
        let alive: Vec<bool> = self.many(what, alive).await?;
        let mut returned = 0;
        for machine in others.iter().zip(alive).filter(|(_, alive)| !alive).map(|(name, _)| name) {
            for list in std::iter::once(self.keys().topic.as_str()).chain(SIDE_LISTS) {
                if list == self.keys().topic && *kind == QueueKind::Stream {
                    continue;
                }
                let (processing, sign) =
                    (self.keys().processing(list, machine), self.keys().machine(machine));
                let keys = [processing.as_str(), list, sign.as_str()];
                // The sign of life lies elsewhere on a cluster; it was looked at just now.
                let keys = if self.is_cluster() { &keys[..2] } else { &keys[..] };
                while returned < count
                    && self.script::<bool>(what, &scripts::RETURN_ELEMENT, keys, &[]).await?
                {
                    returned += 1;
                }
            }
        }
        Ok(returned)
    }

    /// A sign of life for entries that this machine holds. Returns those that it does not hold any more: acknowledged,
    /// taken over by another machine, or deleted. Those are left as they are.
    ///
    /// # Errors
    /// [`FleetError::NoGroup`]: call [`Fleet::ensure_groups`]; the entries will be delivered again.
    pub async fn renew_entries(&self, entries: &[QueueEntry]) -> Result<Vec<QueueEntry>, FleetError> {
        let what = "renew entries";
        let (elements, others): (Vec<_>, Vec<_>) = entries.iter().partition(|entry| entry.is_list);
        let places = elements.iter().map(|entry| {
            let processing = self.keys().processing(&entry.queue, &self.inner.machine_id);
            cmd("LPOS").arg(&processing).arg(&entry.id).to_owned()
        });
        let places: Vec<Option<i64>> = self.many(what, places.collect()).await?;
        let elements = elements.into_iter().zip(places);
        let mut lost: Vec<QueueEntry> =
            elements.filter(|(_, place)| place.is_none()).map(|(entry, _)| entry.clone()).collect();
        let mut streams: BTreeMap<&str, Vec<&QueueEntry>> = BTreeMap::new();
        for entry in others {
            streams.entry(&entry.queue).or_default().push(entry);
        }
        for (stream, held) in streams {
            let mut arguments: Vec<&[u8]> =
                vec![self.inner.config.group.as_bytes(), self.inner.machine_id.as_bytes()];
            arguments.extend(held.iter().map(|entry| entry.id.as_bytes()));
            let gone: Vec<String> = self.script(what, &scripts::RENEW_ENTRIES, &[stream], &arguments).await?;
            lost.extend(held.into_iter().filter(|entry| gone.contains(&entry.id)).cloned());
        }
        Ok(lost)
    }

    /// A sign of life for entries of jobs whose leases this machine has. An element that others put back into its list, because
    /// this machine was taken for dead, is taken out again, so that nobody works on it a second time.
    ///
    /// # Errors
    /// As [`Fleet::renew_entries`].
    pub async fn hold_entries(&self, entries: &[QueueEntry]) -> Result<(), FleetError> {
        let gone = self.renew_entries(entries).await?;
        for entry in gone.iter().filter(|entry| entry.is_list) {
            let mine = self.keys().processing(&entry.queue, &self.inner.machine_id);
            let keys = [mine.as_str(), entry.queue.as_str()];
            let arguments: [&[u8]; 1] = [entry.id.as_bytes()];
            let _: bool = self.script("hold an element", &scripts::HOLD_ELEMENT, &keys, &arguments).await?;
        }
        Ok(())
    }

    /// Gives an entry to the machine `to` (the one that holds the lease of its task). False when this machine did not hold
    /// it.
    ///
    /// # Errors
    /// As every call.
    pub async fn hand_over(&self, entry: &QueueEntry, to: &str) -> Result<bool, FleetError> {
        if entry.is_list {
            let theirs = self.keys().processing(&entry.queue, to);
            return self.move_element(entry, &theirs).await;
        }
        self.give(entry, to, "0").await
    }

    /// Gives an entry back: any machine takes it at its next look for entries of the dead, and an element of a list when its
    /// turn comes, which is last. False when this machine did not hold it.
    ///
    /// # Errors
    /// As every call.
    pub async fn release(&self, entry: &QueueEntry) -> Result<bool, FleetError> {
        if entry.is_list {
            return self.move_element(entry, &entry.queue).await;
        }
        self.give(entry, UNASSIGNED, IDLE_FOR_ALL).await
    }

    async fn give(&self, entry: &QueueEntry, to: &str, idle_ms: &str) -> Result<bool, FleetError> {
        let arguments: [&[u8]; 5] = [
            self.inner.config.group.as_bytes(),
            self.inner.machine_id.as_bytes(),
            to.as_bytes(),
            entry.id.as_bytes(),
            idle_ms.as_bytes(),
        ];
        self.script("give an entry away", &scripts::GIVE, &[&entry.queue], &arguments).await
    }

    async fn move_element(&self, entry: &QueueEntry, to: &str) -> Result<bool, FleetError> {
        let mine = self.keys().processing(&entry.queue, &self.inner.machine_id);
        let arguments: [&[u8]; 1] = [entry.id.as_bytes()];
        self.script("give an element away", &scripts::MOVE_ELEMENT, &[&mine, to], &arguments).await
    }

    /// Ends an entry, whoever holds it: its job has ended. Unless other groups read the stream too, the entry is removed, and
    /// with it all that are done with. False when it was not pending.
    ///
    /// # Errors
    /// As every call.
    pub async fn acknowledge(&self, entry: &QueueEntry) -> Result<bool, FleetError> {
        let what = "acknowledge an entry";
        if entry.is_list {
            let mine = self.keys().processing(&entry.queue, &self.inner.machine_id);
            return self.command(what, cmd("LREM").arg(&mine).arg(1).arg(&entry.id)).await;
        }
        let arguments: [&[u8]; 2] = [self.inner.config.group.as_bytes(), entry.id.as_bytes()];
        self.script(what, &scripts::ACKNOWLEDGE, &[&entry.queue], &arguments).await
    }

    /// Moves an entry that can never be worked on to the stream of the dead, with its fields, the reason, the machine and the
    /// time. False when this machine did not hold it.
    ///
    /// # Errors
    /// As every call.
    pub async fn bury(
        &self,
        entry: &QueueEntry,
        fields: &BTreeMap<String, String>,
        reason: &str,
    ) -> Result<bool, FleetError> {
        let mine = self.keys().processing(&entry.queue, &self.inner.machine_id);
        let place = if entry.is_list { &mine } else { &entry.queue };
        let dead = self.keys().dead_of(&entry.queue);
        self.bury_raw([place, &dead], entry.is_list, entry.id.as_bytes(), fields, reason).await
    }

    /// Moves what is held from `keys[0]` to the dead, `keys[1]`.
    pub(super) async fn bury_raw(
        &self,
        keys: [&str; 2],
        is_list: bool,
        id: &[u8],
        fields: &BTreeMap<String, String>,
        reason: &str,
    ) -> Result<bool, FleetError> {
        let now = now_unix_ms().to_string();
        let kind = if is_list { "list" } else { "stream" };
        let mut arguments: Vec<&[u8]> = vec![
            kind.as_bytes(),
            self.inner.config.group.as_bytes(),
            self.inner.machine_id.as_bytes(),
            id,
            DEAD_MAX.as_bytes(),
        ];
        let ours = [("reason", reason), ("machine_id", &self.inner.machine_id), ("buried_unix_ms", &now)];
        for (name, value) in fields.iter().take(DEAD_FIELDS_MAX) {
            arguments.extend([name.as_bytes(), value.as_bytes()]);
        }
        for (name, value) in &ours {
            arguments.extend([name.as_bytes(), value.as_bytes()]);
        }
        self.script("bury an entry", &scripts::BURY, &keys, &arguments).await
    }

    /// Machines that gave a sign of life in the last days, and when the last one was (Unix milliseconds); the newest, where
    /// there are too many.
    pub(super) async fn known_machines(&self) -> Result<Vec<(String, i64)>, FleetError> {
        let mut command = cmd("ZRANGE");
        command.arg(MACHINES).arg(0).arg(super::presence::MACHINES_MAX).arg("REV").arg("WITHSCORES");
        let rows: Vec<(String, f64)> = self.command("read the machines", &command).await?;
        Ok(rows.into_iter().map(|(name, at)| (name, at as i64)).collect())
    }
}
