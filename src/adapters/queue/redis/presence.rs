//! Signs of life: machines, their slots, and which machine has which GPU.

use std::collections::BTreeMap;

use redis::{Cmd, Value, cmd};
use serde_json::json;

use super::keys::{MACHINES, SIDE_LISTS};
use super::{Fleet, FleetError, now_unix_ms, scripts};

/// Machines that are looked at.
pub(super) const MACHINES_MAX: usize = 1_000;
/// Slots of one machine that are shown.
const SLOTS_MAX: usize = 256;
/// A machine without a sign of life is listed this long, in milliseconds: 7 days.
const LISTED_MS: i64 = 7 * 24 * 3_600_000;
/// Machines that one sign of life looks at to take them off the list.
const FORGOTTEN_MAX: usize = 20;

/// What a machine tells of one of its slots.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SlotReport {
    /// Name of the slot.
    pub slot: String,
    /// The job in it.
    pub task_id: Option<String>,
    /// Further fields. The same names each time: a name that is left out keeps its value.
    pub fields: Vec<(String, String)>,
}

/// What became of a sign of life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Announced {
    /// The name is ours.
    Mine,
    /// Another service uses the name of this machine, or an earlier start of this one has not been gone long enough.
    TakenBy {
        /// Its incarnation.
        incarnation: String,
        /// Its host.
        host: String,
        /// Since when it is there, Unix milliseconds.
        since_unix_ms: i64,
    },
}

/// A machine as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Its name.
    pub machine_id: String,
    /// No sign of life for three intervals.
    pub is_lost: bool,
    /// When the last one was, Unix milliseconds by the clock of Redis.
    pub seen_unix_ms: i64,
    /// `incarnation`, `version`, `host`, `slots`, `jobs`, `since`; empty when it is lost.
    pub fields: BTreeMap<String, String>,
    /// Its slots; none when it is lost.
    pub slots: Vec<WorkerView>,
}

/// A slot as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerView {
    /// Its name.
    pub slot: String,
    /// `task_id` and what the machine tells of it.
    pub fields: BTreeMap<String, String>,
}

/// Who has a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GpuOwner {
    /// This machine.
    Mine,
    /// Another.
    HeldBy(String),
}

impl Fleet {
    /// Gives a sign of life for this machine and its slots, for three heartbeats.
    ///
    /// # Errors
    /// As every call.
    pub async fn announce(&self, slots: &[SlotReport]) -> Result<Announced, FleetError> {
        let what = "give a sign of life";
        let (key, now) = (self.keys().machine(&self.inner.machine_id), now_unix_ms());
        let names: Vec<&str> = slots.iter().map(|slot| slot.slot.as_str()).collect();
        let jobs: Vec<&str> = slots.iter().filter_map(|slot| slot.task_id.as_deref()).collect();
        let (names, jobs) = (json!(names).to_string(), json!(jobs).to_string());
        let host = sysinfo::System::host_name().unwrap_or_default();
        let (ttl, since) = (self.inner.config.lease_ms().to_string(), now.to_string());
        let fields = [
            ("version", env!("CARGO_PKG_VERSION")),
            ("host", &host),
            ("slots", &names),
            ("jobs", &jobs),
            ("seen", &since),
        ];
        let mut arguments: Vec<&[u8]> =
            vec![self.inner.incarnation.as_bytes(), ttl.as_bytes(), since.as_bytes()];
        for (name, value) in &fields {
            arguments.extend([name.as_bytes(), value.as_bytes()]);
        }
        let (is_mine, incarnation, host, since, now): (bool, String, String, String, i64) =
            self.script(what, &scripts::ANNOUNCE, &[&key], &arguments).await?;
        if !is_mine {
            let since_unix_ms = since.parse().unwrap_or(0);
            return Ok(Announced::TakenBy { incarnation, host, since_unix_ms });
        }
        // By the clock of the server, as this list also tells whose elements are to be put back.
        let mut commands = vec![cmd("ZADD").arg(MACHINES).arg(now).arg(&self.inner.machine_id).to_owned()];
        for slot in slots {
            let key = self.keys().worker(&self.inner.machine_id, &slot.slot);
            let mut command = cmd("HSET");
            command.arg(&key).arg("task_id").arg(slot.task_id.as_deref().unwrap_or("")).arg(&slot.fields);
            commands.push(command);
            commands.push(cmd("PEXPIRE").arg(&key).arg(&ttl).to_owned());
        }
        self.many::<Value>(what, commands).await?;
        self.forget_machines(now - LISTED_MS).await?;
        Ok(Announced::Mine)
    }

    /// Takes machines off the list that gave no sign of life since then, except those that took from a list what nobody has
    /// put back yet.
    async fn forget_machines(&self, before_unix_ms: i64) -> Result<(), FleetError> {
        let what = "forget machines";
        let mut command = cmd("ZRANGEBYSCORE");
        command.arg(MACHINES).arg("-inf").arg(before_unix_ms).arg("LIMIT").arg(0).arg(FORGOTTEN_MAX);
        let gone: Vec<String> = self.command(what, &command).await?;
        for machine in gone {
            let lists = std::iter::once(self.keys().topic.as_str()).chain(SIDE_LISTS);
            let held = lists.map(|list| cmd("EXISTS").arg(self.keys().processing(list, &machine)).to_owned());
            let held: Vec<bool> = self.many(what, held.collect()).await?;
            if !held.contains(&true) {
                let _: i64 = self.command(what, cmd("ZREM").arg(MACHINES).arg(&machine)).await?;
            }
        }
        Ok(())
    }

    /// Takes the sign of life of this machine and of these slots back: the service goes down in an orderly way.
    ///
    /// # Errors
    /// As every call.
    pub async fn leave(&self, slots: &[String]) -> Result<(), FleetError> {
        let workers = slots.iter().map(|slot| self.keys().worker(&self.inner.machine_id, slot));
        let workers = workers.map(|key| cmd("DEL").arg(key).to_owned()).collect();
        self.many::<Value>("take the sign of life back", workers).await?;
        let key = self.keys().machine(&self.inner.machine_id);
        let arguments: [&[u8]; 2] = [b"incarnation", self.inner.incarnation.as_bytes()];
        self.script::<bool>("take the sign of life back", &scripts::FORGET_IF, &[&key], &arguments)
            .await
            .map(drop)
    }

    /// Takes the place of an earlier start of this machine's service that is known to be dead (it is the one that the journal
    /// names, and the lock of the state folder is ours), without waiting until its sign of life ends. False when
    /// another one has the name, or none.
    ///
    /// # Errors
    /// As every call.
    pub async fn succeed(&self, earlier_incarnation: &str) -> Result<bool, FleetError> {
        let key = self.keys().machine(&self.inner.machine_id);
        let arguments: [&[u8]; 2] = [b"incarnation", earlier_incarnation.as_bytes()];
        self.script("take the place of an earlier start", &scripts::FORGET_IF, &[&key], &arguments).await
    }

    /// All machines that gave a sign of life in the last days, with their slots, by name.
    ///
    /// # Errors
    /// As every call.
    pub async fn workers(&self) -> Result<Vec<Machine>, FleetError> {
        let what = "read the machines";
        let known = self.known_machines().await?;
        let read = |key: String| cmd("HGETALL").arg(key).to_owned();
        let hashes: Vec<Cmd> = known.iter().map(|(name, _)| read(self.keys().machine(name))).collect();
        let hashes: Vec<BTreeMap<String, String>> = self.many(what, hashes).await?;
        let mut machines = Vec::new();
        let mut places = Vec::new();
        for ((machine_id, seen_unix_ms), fields) in known.into_iter().zip(hashes) {
            let names = fields.get("slots").map(String::as_str).unwrap_or("[]");
            let names: Vec<String> = serde_json::from_str(names).unwrap_or_default();
            places.extend(names.into_iter().take(SLOTS_MAX).map(|slot| (machines.len(), slot)));
            let (is_lost, slots) = (fields.is_empty(), Vec::new());
            machines.push(Machine { machine_id, is_lost, seen_unix_ms, fields, slots });
        }
        let slots: Vec<Cmd> = places
            .iter()
            .map(|(machine, slot)| read(self.keys().worker(&machines[*machine].machine_id, slot)))
            .collect();
        let slots: Vec<BTreeMap<String, String>> = self.many(what, slots).await?;
        for ((machine, slot), fields) in places.into_iter().zip(slots) {
            machines[machine].slots.push(WorkerView { slot, fields });
        }
        machines.sort_by(|a, b| a.machine_id.cmp(&b.machine_id));
        Ok(machines)
    }

    /// Takes the GPU `uuid` for this machine, or goes on having it, for three heartbeats.
    ///
    /// # Errors
    /// As every call.
    pub async fn own_gpu(&self, uuid: &str) -> Result<GpuOwner, FleetError> {
        let (key, ttl) = (self.keys().gpu(uuid), self.inner.config.lease_ms().to_string());
        let arguments: [&[u8]; 3] =
            [self.inner.machine_id.as_bytes(), self.inner.incarnation.as_bytes(), ttl.as_bytes()];
        let owner: String = self.script("take a GPU", &scripts::OWN_GPU, &[&key], &arguments).await?;
        Ok(if owner == self.inner.machine_id { GpuOwner::Mine } else { GpuOwner::HeldBy(owner) })
    }

    /// Gives the GPU `uuid` up. False when this start of the service did not have it.
    ///
    /// # Errors
    /// As every call.
    pub async fn free_gpu(&self, uuid: &str) -> Result<bool, FleetError> {
        let key = self.keys().gpu(uuid);
        let arguments: [&[u8]; 4] =
            [b"owner", self.inner.machine_id.as_bytes(), b"incarnation", self.inner.incarnation.as_bytes()];
        self.script("give a GPU up", &scripts::FORGET_IF, &[&key], &arguments).await
    }
}
