//! The supervisor's part in a fleet: how it stands, jobs that another machine took, GPUs that another machine has,
//! draining.

use std::time::{Duration, Instant};

use actix::{ActorFutureExt, AsyncContext, Context, Handler, Message, ResponseFuture, WrapFuture};
use tokio::sync::oneshot;

use super::{Supervisor, log_journal};
use crate::actors::slots::{Claim, Seat};
use crate::actors::trainer::Control;
use crate::adapters::queue::JobStore;
use crate::job::record::Change;
use crate::job::slot::SlotRecord;
use crate::job::state::JobState;

/// Flag in the journal: slots that take no job, as a JSON list of names; `["all"]` for the machine.
pub const DRAINED_FLAG: &str = "drained";
/// Added to a lease before a machine that cannot reach Redis goes on by itself.
const HEAR_MARGIN: Duration = Duration::from_secs(2);
/// Why jobs of the shared queue wait at the start.
const NOT_HEARD: &str = "waits to hear from Redis whether another machine has it by now";

/// What holds back work until the fleet was heard.
#[derive(Default)]
pub(super) struct FleetGate {
    /// When the wait is over, whatever was heard; `None` when there is nothing to wait for.
    until: Option<Instant>,
    /// Slots that take no job.
    drained: Vec<String>,
    /// Another service uses this machine's name, or the like: nothing is taken from the shared queue.
    is_shut: bool,
}

impl FleetGate {
    /// A gate that opens when the fleet was heard, or after one lease without an answer.
    pub(super) fn closed(lease_ms: u64) -> Self {
        Self {
            until: Some(Instant::now() + Duration::from_millis(lease_ms) + HEAR_MARGIN),
            ..Self::default()
        }
    }
}

/// How does it stand?
#[derive(Message)]
#[rtype(result = "Standing")]
pub struct HowDoYouStand;

/// The answer to [`HowDoYouStand`].
#[derive(Debug, Clone, Default, actix::MessageResponse)]
pub struct Standing {
    /// All slots.
    pub slots: Vec<SlotRecord>,
    /// Slots that would take a job that names no device.
    pub free: usize,
    /// Slots, busy or free, that can take a job that names no device now or later: neither drained nor out of use.
    pub usable: usize,
    /// True when some slot is a GPU that is not missing.
    pub has_gpu: bool,
    /// Every slot is drained.
    pub is_drained: bool,
    /// No more work is wanted.
    pub is_closing: bool,
}

impl Handler<HowDoYouStand> for Supervisor {
    type Result = Standing;

    fn handle(&mut self, _: HowDoYouStand, _ctx: &mut Context<Self>) -> Standing {
        let seats: Vec<_> = self.bays.iter().map(|bay| bay.slot.seat(bay.job())).collect();
        let has_gpu = seats.iter().any(|seat| seat.gpu.is_some() && !seat.is_missing);
        // Jobs that name no device go to GPUs wherever there is a slot for one, also while it is missing.
        let on_gpus = seats.iter().any(|seat| seat.gpu.is_some());
        let usable = seats.iter().filter(|seat| {
            seat.obstacle.is_none() && seat.gpu.is_some() == on_gpus && !self.is_drained(&seat.name)
        });
        let is_drained =
            !self.bays.is_empty() && self.bays.iter().all(|bay| self.is_drained(&bay.slot.name()));
        Standing {
            free: usable.clone().filter(|seat| seat.job.is_none()).count(),
            usable: usable.count(),
            has_gpu,
            is_drained,
            is_closing: self.shutting_down || self.fleet.is_shut || is_drained,
            slots: self.bays.iter().map(|bay| bay.slot.record(bay.job())).collect(),
        }
    }
}

/// The fleet was heard: who has the GPUs of this machine.
#[derive(Message)]
#[rtype(result = "()")]
pub struct FleetHeard {
    /// Identity of each GPU that was asked for, and the other machine that has it.
    pub gpus: Vec<(String, Option<String>)>,
}

impl Handler<FleetHeard> for Supervisor {
    type Result = ();

    fn handle(&mut self, heard: FleetHeard, ctx: &mut Context<Self>) {
        self.fleet.until = None;
        let mut is_news = self.gate.shared.take().is_some();
        for bay in &mut self.bays {
            let Some(gpu) = bay.slot.as_gpu() else { continue };
            let Some((_, owner)) = heard.gpus.iter().find(|(uuid, _)| *uuid == gpu.uuid) else { continue };
            let claim = owner.clone().map_or(Claim::Ours, Claim::Foreign);
            if bay.slot.claim != claim {
                match &claim {
                    Claim::Foreign(owner) => {
                        tracing::warn!(
                            "{} belongs to the machine {owner}: it takes no jobs here",
                            bay.slot.name()
                        );
                    }
                    Claim::Ours | Claim::Unheard => {
                        tracing::info!("{} belongs to this machine", bay.slot.name())
                    }
                }
                bay.slot.claim = claim;
                is_news = true;
            }
        }
        if is_news {
            self.publish(ctx);
            self.round(ctx);
        }
    }
}

/// A job of this machine belongs to another machine by now: end its trainer and let it go.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Surrender {
    /// The record.
    pub seq: i64,
    /// Who has it.
    pub owner: String,
}

impl Handler<Surrender> for Supervisor {
    type Result = ();

    fn handle(&mut self, Surrender { seq, owner }: Surrender, ctx: &mut Context<Self>) {
        let keeper = self.keeper.clone();
        let work = async move {
            keeper
                .with(move |journal| {
                    let record = journal.record(seq)?;
                    if record.state.is_terminal() {
                        return Ok(None);
                    }
                    let reason = format!("goes on on the machine {owner}, which took it over");
                    journal.change(seq, Change::to(JobState::Moved, reason)).map(Some)
                })
                .await
        };
        ctx.wait(work.into_actor(self).map(move |result, actor, ctx| match result {
            Ok(Some(record)) => {
                tracing::warn!(task_id = %record.task_id, "{}", record.reason);
                match actor.bay_of(seq) {
                    // The notice follows when the process is gone.
                    Some(bay) => {
                        bay.trainer.do_send(Control::Kill);
                        if let Some(busy) = &mut bay.busy {
                            busy.record = record;
                        }
                    }
                    None => {
                        actor.observer.notice(&super::Notice::Left(Box::new(record)));
                        actor.wake_watcher();
                        ctx.notify(super::Wake);
                    }
                }
            }
            Ok(None) => {}
            // The next heartbeat asks again.
            Err(error) => log_journal("let a job go", &error),
        }));
    }
}

/// Let a job of the shared queue go that waits here, so that another machine can have it. The answer is true when it was
/// let go; false when it has begun or ended by now.
#[derive(Message)]
#[rtype(result = "bool")]
pub struct GiveBack {
    /// The record.
    pub seq: i64,
    /// Why, in a sentence.
    pub why: String,
}

impl Handler<GiveBack> for Supervisor {
    type Result = ResponseFuture<bool>;

    fn handle(&mut self, GiveBack { seq, why }: GiveBack, ctx: &mut Context<Self>) -> Self::Result {
        let keeper = self.keeper.clone();
        let work = async move {
            keeper
                .with(move |journal| {
                    let record = journal.record(seq)?;
                    if !matches!(record.state, JobState::Queued | JobState::Interrupted)
                        || journal.is_delivery_waiting(&record.instance)?
                    {
                        return Ok(None);
                    }
                    journal.change(seq, Change::to(JobState::Moved, why)).map(Some)
                })
                .await
        };
        let (told, answer) = oneshot::channel();
        // The journal's word first: nothing else is handled meanwhile.
        ctx.wait(work.into_actor(self).map(|result, actor, ctx| {
            let is_done = match result {
                Ok(Some(record)) => {
                    tracing::info!(task_id = %record.task_id, "{}", record.reason);
                    actor.observer.notice(&super::Notice::Left(Box::new(record)));
                    actor.wake_watcher();
                    ctx.notify(super::Wake);
                    true
                }
                Ok(None) => false,
                // The next heartbeat asks again.
                Err(error) => {
                    log_journal("give a job back", &error);
                    false
                }
            };
            // A caller that stopped waiting does not need the answer.
            let _ = told.send(is_done);
        }));
        Box::pin(async move { answer.await.unwrap_or(false) })
    }
}

/// Take nothing from the shared queue any more, or again.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ShutFleet(pub bool);

impl Handler<ShutFleet> for Supervisor {
    type Result = ();

    fn handle(&mut self, ShutFleet(is_shut): ShutFleet, _ctx: &mut Context<Self>) {
        self.fleet.is_shut = is_shut;
    }
}

impl Supervisor {
    /// Closes the gate when there is a fleet to hear.
    pub(super) fn wait_for_fleet(&mut self) {
        if self.config.redis.is_on() {
            self.fleet = FleetGate::closed(self.config.redis.lease_ms());
            self.gate.shared = Some(NOT_HEARD.to_owned());
        }
    }

    /// The claim of a GPU that just got its slot: other machines may see it too.
    pub(super) fn first_claim(&self) -> Claim {
        if self.config.redis.is_on() { Claim::Unheard } else { Claim::Ours }
    }

    /// A GPU whose owner nobody tells for long enough is this machine's.
    fn await_claims(&mut self) {
        let is_waiting = self.bays.iter().any(|bay| bay.slot.claim == Claim::Unheard);
        let limit = Duration::from_millis(self.config.redis.lease_ms()) + HEAR_MARGIN;
        match self.fleet.until {
            None if is_waiting => self.fleet.until = Some(Instant::now() + limit),
            // The gate of jobs has its own reason to wait.
            Some(_) if !is_waiting && self.gate.shared.is_none() => self.fleet.until = None,
            _ => {}
        }
    }

    /// Once a second: opens the gate when nobody answered for long enough; reads which slots are drained.
    pub(super) fn tend_fleet(&mut self, ctx: &mut Context<Self>) {
        // While another service uses this machine's name nothing here is its own.
        if self.fleet.is_shut {
            return;
        }
        self.await_claims();
        if self.fleet.until.is_some_and(|until| Instant::now() >= until) {
            tracing::warn!("Redis did not answer: the jobs and GPUs of this machine are taken as its own");
            let gpus = self.bays.iter().filter_map(|bay| Some((bay.slot.as_gpu()?.uuid.clone(), None)));
            ctx.notify(FleetHeard { gpus: gpus.collect() });
        }
    }

    pub(super) fn is_drained(&self, slot: &str) -> bool {
        covers(&self.fleet.drained, slot)
    }

    /// Takes over which slots are drained.
    pub(super) fn set_drained(&mut self, drained: Vec<String>) {
        if drained != self.fleet.drained {
            let names = drained.join(", ");
            match drained.is_empty() {
                true => tracing::info!("no slot is drained any more"),
                false => tracing::info!("drained: {names}; what runs goes on to its end"),
            }
            self.fleet.drained = drained;
        }
    }
}

/// The names in the flag. One that cannot be read was not written by this program: it drains nothing.
pub fn drained(flag: Option<&str>) -> Vec<String> {
    flag.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

/// Gives drained seats their obstacle.
pub(super) fn mark_drained(seats: &mut [Seat], drained: &[String]) {
    for seat in seats.iter_mut().filter(|seat| seat.obstacle.is_none()) {
        if covers(drained, &seat.name) {
            seat.obstacle = Some("is drained".to_owned());
        }
    }
}

fn covers(drained: &[String], slot: &str) -> bool {
    drained.iter().any(|name| name == "all" || name == slot)
}
