//! Heartbeats: this machine lives, these jobs and GPUs are its own, those it was asked to cancel.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt};
use serde_json::json;

use super::{COMPLAINT_INTERVAL, Consumer, PENDING_MAX, Trouble};
use crate::actors::supervisor::{FleetHeard, GiveBack, ShutFleet, Standing, StopJob, Surrender};
use crate::adapters::queue::redis::{Announced, GpuOwner, Renewed, SlotReport, TOGETHER_MAX, Warning};
use crate::job::clock::{now_unix_ms, rfc3339};
use crate::job::ids::TaskId;
use crate::job::record::JobRecord;
use crate::job::slot::SlotRecord;
use crate::job::state::{FailureClass, JobState};
use crate::train::args::Device;

/// Leases after which another service that uses this machine's name is taken for good.
const INTRUSION_LEASES: u32 = 2;

impl Consumer {
    /// The first round after a failure: groups, pending entries, remarks on the configuration.
    pub(super) async fn connect(&mut self) -> Result<(), Trouble> {
        let fleet = self.parts.fleet.clone();
        fleet.ping().await?;
        // A queue that cannot be used is no reason to lose the leases of what runs.
        let groups = fleet.ensure_groups().await;
        let standing = self.standing().await?;
        self.next_beat = Instant::now() + self.beat_interval();
        let beaten = self.beat(&standing).await;
        if self.down_since.is_some() {
            // Results that waited need not wait for the end of a back-off.
            self.parts.redis_back.notify_one();
        }
        groups?;
        beaten?;
        if self.down_since.is_some() {
            let lease = Duration::from_millis(self.parts.config.redis.lease_ms());
            self.no_steal_until = Instant::now() + lease;
        }
        self.has_unread = self.is_intruded.is_some() || standing.is_closing;
        if !self.has_unread {
            // What was put off is among what is pending.
            self.later.clear();
            self.consider_all(fleet.own_pending(PENDING_MAX).await?, &standing).await?;
        }
        if !self.was_heard || self.down_since.is_some() {
            self.warn(fleet.warnings().await?);
        }
        self.is_connected = true;
        self.note(json!({"state": "up", "last_success": rfc3339(now_unix_ms())})).await;
        if !self.was_heard {
            self.was_heard = true;
            tracing::info!(
                "takes jobs from `{}` on Redis at {} as {}",
                self.parts.config.redis.topic,
                fleet.address(),
                fleet.machine_id()
            );
        }
        Ok(())
    }

    /// Names what is dangerous: when it is news, and once a minute where one connection follows another.
    fn warn(&mut self, warnings: Vec<Warning>) {
        let is_said =
            |(at, said): &(Instant, Vec<Warning>)| at.elapsed() < COMPLAINT_INTERVAL && *said == warnings;
        if self.warned.as_ref().is_some_and(is_said) {
            return;
        }
        for warning in &warnings {
            match warning {
                Warning::Danger(text) => tracing::warn!("{text}"),
                Warning::Note(text) => tracing::info!("{text}"),
            }
        }
        self.warned = Some((Instant::now(), warnings));
    }

    /// One heartbeat.
    pub(super) async fn beat(&mut self, standing: &Standing) -> Result<(), Trouble> {
        self.announce(standing).await?;
        if self.has_unread && self.is_intruded.is_none() && !standing.is_closing {
            // The next round begins as after an outage, and reads what this machine had taken before it started.
            self.is_connected = false;
        }
        let held = self.parts.keeper.with(|journal| journal.held_shared()).await?;
        let surrendered = self.renew(held).await?;
        let gpus = self.claim_gpus(&standing.slots).await?;
        if self.is_intruded.is_none() {
            self.parts.supervisor.send(FleetHeard { gpus }).await.map_err(|_| Trouble::Gone)?;
        }
        self.cancel(&surrendered).await?;
        self.give_back(standing).await?;
        self.show_counts().await
    }

    /// A sign of life; another service with this machine's name is no laughing matter.
    async fn announce(&mut self, standing: &Standing) -> Result<(), Trouble> {
        let reports: Vec<SlotReport> = standing.slots.iter().map(report).collect();
        self.slots = reports.iter().map(|report| report.slot.clone()).collect();
        match self.parts.fleet.announce(&reports).await? {
            Announced::Mine => {
                if self.is_intruded.take().is_some() {
                    self.parts.supervisor.do_send(ShutFleet(false));
                }
            }
            Announced::TakenBy { host, since_unix_ms, .. } => {
                if self.is_intruded.is_none() {
                    tracing::warn!(
                        "the machine id {} is in use by another service on the host {host}; waiting whether it goes away",
                        self.parts.fleet.machine_id()
                    );
                }
                let since = *self.is_intruded.get_or_insert_with(Instant::now);
                self.parts.supervisor.do_send(ShutFleet(true));
                let lease = Duration::from_millis(self.parts.config.redis.lease_ms());
                if since.elapsed() >= lease * INTRUSION_LEASES {
                    let text = format!(
                        "another service uses the machine id {} (on the host {host}, since {}); every service needs \
                         its own: set MACHINE_ID",
                        self.parts.fleet.machine_id(),
                        rfc3339(since_unix_ms)
                    );
                    if let Ok(mut fatal) = self.shared.fatal.lock() {
                        *fatal = Some(text);
                    }
                }
            }
        }
        Ok(())
    }

    /// Renews the leases and entries of this machine's shared jobs, also of those that have ended and whose result is not out,
    /// and lets go of those that another machine has. Many questions are on their way at once: what is taken ahead may be
    /// thousands.
    async fn renew(&mut self, mut held: Vec<JobRecord>) -> Result<Vec<TaskId>, Trouble> {
        let fleet = self.parts.fleet.clone();
        let lease_ms = self.parts.config.redis.lease_ms();
        // Should the server fail on the way, those that are worked on have been renewed.
        held.sort_by_key(|record| match record.state {
            JobState::Queued | JobState::Interrupted => 1,
            state if state.is_terminal() => 2,
            _ => 0,
        });
        let mut newest: HashMap<TaskId, i64> = HashMap::new();
        for record in &held {
            let seq = newest.entry(record.task_id.clone()).or_default();
            *seq = record.seq.max(*seq);
        }
        // The lease of a task is that of its latest submission.
        let (held, older): (Vec<_>, Vec<_>) =
            held.into_iter().partition(|record| newest.get(&record.task_id) == Some(&record.seq));
        let asked = held.iter().map(|record| {
            let (task_id, instance) = (&record.task_id, &record.instance);
            fleet.renew(task_id, instance, record.fence, record.attempts_all(), lease_ms)
        });
        let answers: Vec<Renewed> =
            futures_util::stream::iter(asked).buffered(TOGETHER_MAX).try_collect().await?;
        let (mut entries, mut surrendered) = (Vec::new(), Vec::new());
        for (record, answer) in held.iter().zip(answers) {
            match answer {
                Renewed::Mine if self.is_told(record).await? => {
                    fleet.let_go(&record.task_id, record.fence).await?;
                }
                Renewed::Mine => entries.extend(record.entry.clone()),
                // A later start of this very machine: the journal has the older number.
                Renewed::Lost { owner, fence } if owner == fleet.machine_id() && fence > record.fence => {
                    let seq = record.seq;
                    self.parts.keeper.with(move |journal| journal.set_fence(seq, fence)).await?;
                }
                // Nothing runs here; its result is told or fenced by its number.
                Renewed::Lost { .. } if record.state.is_terminal() => {}
                Renewed::Lost { owner, .. } => {
                    let message = Surrender { seq: record.seq, owner };
                    self.parts.supervisor.send(message).await.map_err(|_| Trouble::Gone)?;
                    surrendered.push(record.task_id.clone());
                }
            }
        }
        fleet.hold_entries(&entries).await?;
        // Entries that are gone from the queue do not matter to a job that is in the journal, but to one that waits here.
        let waiting = self.later.iter().map(|taken| taken.entry.clone());
        let waiting: Vec<_> = waiting.chain(older.into_iter().filter_map(|record| record.entry)).collect();
        let gone = fleet.renew_entries(&waiting).await?;
        self.later.retain(|taken| !gone.contains(&taken.entry));
        Ok(surrendered)
    }

    /// Gives waiting jobs back to the queue when no slot here can take them: at once when all are drained, after a lease when
    /// they are out of use. One of which something is still to be told stays until it is told.
    async fn give_back(&mut self, standing: &Standing) -> Result<(), Trouble> {
        let lease = Duration::from_millis(self.parts.config.redis.lease_ms());
        if standing.usable > 0 || self.is_leaving() {
            self.unusable_since = None;
            return Ok(());
        }
        let since = *self.unusable_since.get_or_insert_with(Instant::now);
        if !standing.is_drained && since.elapsed() < lease {
            return Ok(());
        }
        let why = if standing.is_drained {
            "given back to the queue: every slot here is drained"
        } else {
            "given back to the queue: no slot here can take it for now"
        };
        for record in self.parts.keeper.with(|journal| journal.held_shared()).await? {
            let is_waiting = matches!(record.state, JobState::Queued | JobState::Interrupted);
            // The CPU has slots of its own. And a job that met a fault of a GPU elsewhere, too, is tried here to its end: it may
            // be what breaks them.
            let stays = record.spec.args.device == Device::Cpu
                || record.attempts_before > 0 && record.class == Some(FailureClass::Device);
            let is_free = is_waiting && (standing.is_drained || !stays);
            let Some(entry) = record.entry.clone().filter(|_| is_free) else { continue };
            let message = GiveBack { seq: record.seq, why: why.to_owned() };
            if self.parts.supervisor.send(message).await.map_err(|_| Trouble::Gone)? {
                if record.attempts_all() == 0 {
                    // Whoever takes it begins it: there is nothing to go on from.
                    self.parts.fleet.forget_instance(&record.task_id).await?;
                }
                self.parts.fleet.release(&entry).await?;
                self.parts.fleet.let_go(&record.task_id, record.fence).await?;
            }
        }
        Ok(())
    }

    /// True when the result has gone out, and the lease with it, since the look into the journal. What lies in the queue under
    /// the same text may be a new element by now.
    async fn is_told(&self, record: &JobRecord) -> Result<bool, Trouble> {
        if !record.state.is_terminal() {
            return Ok(false);
        }
        let instance = record.instance.clone();
        let is_waiting = self.parts.keeper.with(move |journal| journal.is_result_waiting(&instance)).await?;
        Ok(!is_waiting || self.parts.fleet.is_done(&record.instance).await?)
    }

    async fn claim_gpus(&mut self, slots: &[SlotRecord]) -> Result<Vec<(String, Option<String>)>, Trouble> {
        let mut owners = Vec::new();
        for uuid in slots.iter().filter_map(|slot| slot.uuid.clone()) {
            let owner = match self.parts.fleet.own_gpu(&uuid).await? {
                GpuOwner::Mine => None,
                GpuOwner::HeldBy(machine) => Some(machine),
            };
            if owner.is_none() {
                self.gpus.insert(uuid.clone());
            } else {
                self.gpus.remove(&uuid);
            }
            owners.push((uuid, owner));
        }
        Ok(owners)
    }

    /// Cancellations by key, for every job that is active here. A key is forgotten when it was obeyed, and left for the new owner
    /// of a job that was just surrendered.
    async fn cancel(&mut self, surrendered: &[TaskId]) -> Result<(), Trouble> {
        let mut active = self.parts.keeper.with(|journal| journal.active_ids()).await?;
        active.retain(|task_id| !surrendered.contains(task_id));
        if active.is_empty() {
            return Ok(());
        }
        for task_id in self.parts.fleet.cancelled(&active).await? {
            let why = "cancelled by a key in Redis".to_owned();
            let message = StopJob { task_id: task_id.clone(), why };
            if self.parts.supervisor.send(message).await.map_err(|_| Trouble::Gone)? {
                self.parts.fleet.forget_cancel(&task_id).await?;
            }
        }
        Ok(())
    }

    async fn show_counts(&self) -> Result<(), Trouble> {
        let counts = self.parts.keeper.with(|journal| journal.counts()).await?;
        let of = |states: &[JobState]| -> u64 {
            states.iter().filter_map(|state| counts.get(state.as_str())).sum()
        };
        let stats = BTreeMap::from([
            ("queued".to_owned(), of(&[JobState::Queued, JobState::Interrupted]).to_string()),
            (
                "active".to_owned(),
                of(&[JobState::Preparing, JobState::Running, JobState::Stopping]).to_string(),
            ),
            ("completed".to_owned(), of(&[JobState::Completed]).to_string()),
            ("failed".to_owned(), of(&[JobState::Failed]).to_string()),
            ("cancelled".to_owned(), of(&[JobState::Cancelled]).to_string()),
        ]);
        let machine = self.parts.fleet.machine_id();
        let stats = stats.into_iter().map(|(name, count)| (format!("{machine}:{name}"), count)).collect();
        self.parts.fleet.queue_stats(&stats).await?;
        Ok(())
    }
}

/// A slot as other machines see it.
fn report(slot: &SlotRecord) -> SlotReport {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    SlotReport {
        slot: slot.name.replace(' ', "-").to_lowercase(),
        task_id: slot.task_id.as_ref().map(ToString::to_string),
        fields: vec![
            ("device".to_owned(), slot.device.clone()),
            ("state".to_owned(), slot.state.to_string()),
            ("reason".to_owned(), slot.reason.clone()),
            ("gpu_uuid".to_owned(), text(&slot.uuid)),
            ("gpu_model".to_owned(), text(&slot.model)),
            ("updated_unix_ms".to_owned(), now_unix_ms().to_string()),
        ],
    }
}
