//! Taking work: the streams by class, the lists, what this machine has not finished, and waiting for more.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use redis::{Cmd, Value, cmd};
use sha2::{Digest, Sha256};

use super::keys::SIDE_LISTS;
use super::{ANSWER_LIMIT, Fleet, FleetError, Request, WAIT_SLICE, form, lossy, now_unix_ms, scripts};
use crate::job::delivery::QueueEntry;

/// New entries that one call looks through for a priority.
const ROUTED_MAX: usize = 200;
/// Entries of one page of what is not finished.
const PAGE: usize = 50;
/// Between two looks at lists: they cannot be waited for without taking from them.
const LIST_POLL: Duration = Duration::from_millis(250);

/// What is at the key of the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QueueKind {
    /// A stream.
    Stream,
    /// A list.
    List,
    /// Nothing: it becomes what the first producer makes of it. An emptied list is gone too.
    Missing,
    /// Something that is no queue.
    Other(String),
}

impl QueueKind {
    fn of(word: &str) -> Self {
        match word {
            "stream" => Self::Stream,
            "list" => Self::List,
            "none" => Self::Missing,
            other => Self::Other(other.to_owned()),
        }
    }
}

/// An entry that this machine holds now. It stays the machine's until it is acknowledged, given away, or stolen for
/// want of a sign of life.
#[derive(Debug, Clone, PartialEq)]
pub struct Taken {
    /// Where it is.
    pub entry: QueueEntry,
    /// Its id when it was added, also after it was moved to its class; of a list's element the SHA-256 (hexadecimal).
    pub original_id: String,
    /// Its fields; the element of a list is the field `payload`.
    pub fields: BTreeMap<String, String>,
    /// How often it was delivered, this time included; 1 for elements of lists, which are not counted.
    pub deliveries: u64,
    /// When it was added, Unix milliseconds; for an element of a list, now.
    pub at_unix_ms: i64,
}

/// When the entry of a stream with this id was added, Unix milliseconds.
fn added_at(id: &str) -> Option<i64> {
    let (ms, sequence) = id.split_once('-')?;
    sequence.parse::<u64>().ok()?;
    ms.parse().ok()
}

/// Id, flat fields and values, deliveries.
pub(super) type RawRow = (String, Vec<Vec<u8>>, u64);

impl Taken {
    /// In the stream of a class, `has_moved`, the field `entry_id` is ours.
    pub(super) fn of_stream(queue: &str, has_moved: bool, (id, flat, deliveries): RawRow) -> Self {
        let mut fields = BTreeMap::new();
        let mut parts = flat.into_iter();
        while let (Some(name), Some(value)) = (parts.next(), parts.next()) {
            fields.insert(lossy(name), lossy(value));
        }
        let own = fields.get("entry_id").filter(|own| has_moved && added_at(own).is_some());
        let original_id = own.unwrap_or(&id).clone();
        Self {
            at_unix_ms: added_at(&original_id).unwrap_or_else(now_unix_ms),
            entry: QueueEntry { queue: queue.to_owned(), id, is_list: false },
            original_id,
            fields,
            deliveries,
        }
    }

    fn of_list(list: &str, element: String) -> Self {
        let digest = Sha256::digest(element.as_bytes());
        Self {
            original_id: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
            fields: BTreeMap::from([("payload".to_owned(), element.clone())]),
            entry: QueueEntry { queue: list.to_owned(), id: element, is_list: true },
            deliveries: 1,
            at_unix_ms: now_unix_ms(),
        }
    }
}

impl Fleet {
    /// What is at the key of the queue.
    ///
    /// # Errors
    /// As every call.
    pub async fn queue_kind(&self) -> Result<QueueKind, FleetError> {
        let word: String = self.command("type of the queue", cmd("TYPE").arg(&self.keys().topic)).await?;
        Ok(QueueKind::of(&word))
    }

    /// Makes the consumer group on the streams, from their beginning; it is fine when it is there. A topic that does not
    /// exist is left alone: its first producer decides whether it is a stream or a list.
    ///
    /// # Errors
    /// [`FleetError::WrongType`] when the topic is neither.
    pub async fn ensure_groups(&self) -> Result<QueueKind, FleetError> {
        let what = "make the consumer group";
        let kind = self.queue_kind().await?;
        let mut streams = vec![&self.keys().high, &self.keys().low];
        match &kind {
            QueueKind::Stream => streams.push(&self.keys().topic),
            QueueKind::List => return Ok(kind),
            QueueKind::Missing => {}
            QueueKind::Other(_) => return Err(FleetError::WrongType { what, source: None }),
        }
        for stream in streams {
            let mut command = cmd("XGROUP");
            command.arg("CREATE").arg(stream).arg(&self.inner.config.group).arg("0").arg("MKSTREAM");
            match self.command::<Value>(what, &command).await {
                Err(FleetError::Refused { source, .. }) if source.to_string().contains("BUSYGROUP") => {}
                other => drop(other?),
            }
        }
        Ok(kind)
    }

    /// Takes up to `count` entries: of the topic's streams by class (high before normal before low, where every
    /// `ageing_ms` of waiting are worth one class, 0 for never; then the older one), or of the topic's list in order; and of
    /// the lists `recreate` and `evaluate`. Which of the two comes first alternates. The lists `skipped` are left alone.
    ///
    /// # Errors
    /// [`FleetError::NoGroup`]: call [`Fleet::ensure_groups`] and take again. [`FleetError::WrongType`]: the topic is no queue.
    /// After an error that asks to reconnect, call [`Fleet::own_pending`]: the lost answer may have given entries to this
    /// machine.
    pub async fn take(
        &self,
        count: usize,
        ageing_ms: u64,
        skipped: &[&str],
    ) -> Result<Vec<Taken>, FleetError> {
        let mut taken = Vec::new();
        if count == 0 {
            return Ok(taken);
        }
        let topic = self.keys().topic.clone();
        let keys = std::iter::once(topic.as_str()).chain(SIDE_LISTS);
        let types: Vec<Cmd> = keys.map(|key| cmd("TYPE").arg(key).to_owned()).collect();
        let types: Vec<String> = self.many("type of the queue", types).await?;
        let turn = self.inner.turn.fetch_add(1, Ordering::Relaxed);
        for step in 0..2 {
            if (turn + step).is_multiple_of(2) {
                let wanted = count - taken.len();
                match QueueKind::of(&types[0]) {
                    QueueKind::Stream | QueueKind::Missing => {
                        taken.extend(self.take_streams(wanted, ageing_ms).await?);
                    }
                    QueueKind::List if skipped.contains(&topic.as_str()) => {}
                    QueueKind::List => taken.extend(self.take_list(&topic, wanted).await?),
                    QueueKind::Other(_) => {
                        return Err(FleetError::WrongType { what: "take from the queue", source: None });
                    }
                }
            } else {
                for (list, kind) in SIDE_LISTS.iter().zip(&types[1..]) {
                    if QueueKind::of(kind) == QueueKind::List && !skipped.contains(list) {
                        taken.extend(self.take_list(list, count - taken.len()).await?);
                    }
                }
            }
        }
        Ok(taken)
    }

    async fn take_streams(&self, count: usize, ageing_ms: u64) -> Result<Vec<Taken>, FleetError> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let keys = self.keys();
        let (count, ageing, routed) = (count.to_string(), ageing_ms.to_string(), ROUTED_MAX.to_string());
        let rows: Vec<(String, String, Vec<Vec<u8>>)> = self
            .script(
                "take from the queue",
                &scripts::TAKE,
                &[&keys.high, &keys.topic, &keys.low, &keys.routed],
                &[
                    self.inner.config.group.as_bytes(),
                    self.inner.machine_id.as_bytes(),
                    count.as_bytes(),
                    ageing.as_bytes(),
                    routed.as_bytes(),
                ],
            )
            .await?;
        let taken = |(queue, id, fields): (String, _, _)| {
            Taken::of_stream(&queue, queue != keys.topic, (id, fields, 1))
        };
        Ok(rows.into_iter().map(taken).collect())
    }

    async fn take_list(&self, list: &str, count: usize) -> Result<Vec<Taken>, FleetError> {
        let processing = self.keys().processing(list, &self.inner.machine_id);
        let mut taken = Vec::new();
        while taken.len() < count {
            let mut command = cmd("LMOVE");
            command.arg(list).arg(&processing).arg("LEFT").arg("RIGHT");
            let Some(element) = self.command::<Option<Vec<u8>>>("take from a list", &command).await? else {
                break;
            };
            taken.extend(self.readable(list, &processing, element).await?);
        }
        Ok(taken)
    }

    /// The element as text; one that is no text could never be found again by its text, and is buried.
    async fn readable(
        &self,
        list: &str,
        processing: &str,
        element: Vec<u8>,
    ) -> Result<Option<Taken>, FleetError> {
        match String::from_utf8(element) {
            Ok(text) => Ok(Some(Taken::of_list(list, text))),
            Err(error) => {
                let element = error.into_bytes();
                let shown = String::from_utf8_lossy(&element).into_owned();
                let fields = BTreeMap::from([("payload".to_owned(), shown)]);
                let dead = self.keys().dead_of(list);
                self.bury_raw([processing, &dead], true, &element, &fields, "not UTF-8 text").await?;
                Ok(None)
            }
        }
    }

    /// Everything that this machine holds and has not acknowledged, up to `limit`: what it was at when it went down. Counts as
    /// a sign of life, and the first call of a handle as a further delivery: the entry may be what brought the service down.
    /// Entries that somebody deleted are acknowledged and left out.
    ///
    /// # Errors
    /// As [`Fleet::take`].
    pub async fn own_pending(&self, limit: usize) -> Result<Vec<Taken>, FleetError> {
        let what = "read what is not finished";
        let count = if self.inner.has_read_pending.swap(true, Ordering::Relaxed) { "" } else { "count" };
        let mut found = Vec::new();
        for list in std::iter::once(self.keys().topic.as_str()).chain(SIDE_LISTS) {
            let processing = self.keys().processing(list, &self.inner.machine_id);
            let mut command = cmd("LRANGE");
            command.arg(&processing).arg(0).arg(limit);
            for element in self.command::<Vec<Vec<u8>>>(what, &command).await? {
                found.extend(self.readable(list, &processing, element).await?);
            }
        }
        let kind = self.queue_kind().await?;
        for stream in self.keys().streams() {
            if stream == self.keys().topic && kind != QueueKind::Stream || kind == QueueKind::List {
                continue;
            }
            let mut after = "0-0".to_owned();
            while found.len() < limit && !after.is_empty() {
                let page = PAGE.min(limit - found.len()).to_string();
                let arguments: [&[u8]; 5] = [
                    self.inner.config.group.as_bytes(),
                    self.inner.machine_id.as_bytes(),
                    after.as_bytes(),
                    page.as_bytes(),
                    count.as_bytes(),
                ];
                let (next, rows): (String, Vec<RawRow>) =
                    self.script(what, &scripts::OWN_PENDING, &[stream], &arguments).await?;
                found.extend(
                    rows.into_iter().map(|row| Taken::of_stream(stream, stream != self.keys().topic, row)),
                );
                after = next;
            }
        }
        found.truncate(limit);
        Ok(found)
    }

    /// Returns true as soon as there may be something to take, false when `limit_ms` are over. Takes nothing. It has a
    /// connection of its own, so that other calls do not wait behind it.
    ///
    /// # Errors
    /// As [`Fleet::take`].
    pub async fn wait_for_work(&self, limit_ms: u64, skipped: &[&str]) -> Result<bool, FleetError> {
        let what = "wait for work";
        let until = Instant::now() + Duration::from_millis(limit_ms);
        loop {
            let topic = self.keys().topic.as_str();
            let lists: Vec<&str> = std::iter::once(topic).chain(SIDE_LISTS).collect();
            let types: Vec<Cmd> = lists.iter().map(|key| cmd("TYPE").arg(key).to_owned()).collect();
            let types: Vec<String> = self.many(what, types).await?;
            if types.iter().zip(&lists).any(|(kind, list)| kind == "list" && !skipped.contains(list)) {
                return Ok(true);
            }
            let left = until.saturating_duration_since(Instant::now());
            let kind = QueueKind::of(&types[0]);
            let has_stream = kind != QueueKind::List;
            let slice = if kind == QueueKind::Stream { WAIT_SLICE } else { LIST_POLL };
            if !has_stream {
                tokio::time::sleep(slice.min(left)).await;
            } else if self.is_stream_ready(&kind, slice.min(left)).await? {
                return Ok(true);
            }
            if slice >= left {
                return Ok(false);
            }
        }
    }

    /// Waits until a stream has an entry that the group was not given.
    async fn is_stream_ready(&self, kind: &QueueKind, limit: Duration) -> Result<bool, FleetError> {
        let what = "wait for work";
        let mut read = cmd("XREAD");
        // Zero would be for ever.
        read.arg("COUNT").arg(1).arg("BLOCK").arg((limit.as_millis() as u64).max(1)).arg("STREAMS");
        read.arg(&self.keys().streams());
        for stream in self.keys().streams() {
            if stream == self.keys().topic && *kind == QueueKind::Missing {
                read.arg("0-0");
                continue;
            }
            let groups: Value = match self.command(what, cmd("XINFO").arg("GROUPS").arg(stream)).await {
                Err(FleetError::Refused { source, .. }) if source.to_string().contains("no such key") => {
                    return Err(FleetError::NoGroup { what, source: Some(source) });
                }
                other => other?,
            };
            let last = last_delivered(what, groups, &self.inner.config.group)?;
            read.arg(last.ok_or(FleetError::NoGroup { what, source: None })?);
        }
        let line = &self.inner.waiting;
        let answer: Value = self.ask(line, what, limit + ANSWER_LIMIT, Request::Command(&read)).await?;
        Ok(answer != Value::Nil)
    }
}

/// The last id that a group was given, from the answer of `XINFO GROUPS`.
fn last_delivered(what: &'static str, groups: Value, group: &str) -> Result<Option<String>, FleetError> {
    let groups: Vec<BTreeMap<String, Value>> = form(what, groups)?;
    for mut info in groups {
        let name: Option<String> = info.remove("name").map(|name| form(what, name)).transpose()?;
        if name.as_deref() == Some(group) {
            return info.remove("last-delivered-id").map(|id| form(what, id)).transpose();
        }
    }
    Ok(None)
}
