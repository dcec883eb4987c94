//! The supervisor's care for GPUs: looking for them, testing them, putting a bad one aside, showing all slots.

use std::time::{Duration, Instant};

use actix::{ActorFutureExt, AsyncContext, Context, WrapFuture};

use super::{ChildEnded, Supervisor, log_journal};
use crate::actors::endings::Ending;
use crate::actors::slots::{Health, Looked, Slot};
use crate::adapters::gpu::{Found, Gpu, GpuError, Tested};
use crate::adapters::process;
use crate::adapters::queue::JobStore;
use crate::job::clock::now_unix_ms;
use crate::job::slot::{GpuChoice, SlotBoard, SlotRecord, SlotState};
use crate::job::state::FailureClass;

/// Between two looks for GPUs.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);

/// What is known of the machine's GPUs beside the slots.
#[derive(Default)]
pub(super) struct Survey {
    /// The last look.
    pub(super) looked: Looked,
    /// Slots from before this supervisor was rebuilt.
    remembered: Vec<SlotRecord>,
    /// A look is under way.
    is_looking: bool,
    /// Another one is wanted after it.
    again: bool,
    /// Slots to test after it, unless it shows that their GPU is gone.
    to_test: Vec<usize>,
    last_look: Option<Instant>,
    /// What the journal was told last.
    published: Vec<SlotRecord>,
}

impl Supervisor {
    /// Reads what an earlier supervisor of this process knew, then looks.
    pub(super) fn look_first(&mut self, ctx: &mut Context<Self>) {
        let keeper = self.keeper.clone();
        let work = async move { keeper.with(|journal| journal.board()).await };
        ctx.wait(work.into_actor(self).map(|board, actor, ctx| {
            match board {
                Ok(Some(board)) if process::identify(std::process::id()) == Some(board.service) => {
                    actor.survey.remembered = board.slots;
                }
                Ok(_) => {}
                Err(error) => log_journal("read the slots", &error),
            }
            actor.look(ctx);
        }));
    }

    /// Asks the port which GPUs there are, beside everything else.
    pub(super) fn look(&mut self, ctx: &mut Context<Self>) {
        if self.survey.is_looking {
            self.survey.again = true;
            return;
        }
        self.survey.is_looking = true;
        self.survey.last_look = Some(Instant::now());
        let answer = self.port.look();
        ctx.spawn(answer.into_actor(self).map(|found, actor, ctx| actor.looked(found, ctx)));
    }

    /// Once a second: a quarantine that ends, a look that is due.
    pub(super) fn tend(&mut self, ctx: &mut Context<Self>) {
        let now = now_unix_ms();
        for index in 0..self.bays.len() {
            let bay = &mut self.bays[index];
            if bay.busy.is_none() && bay.slot.is_due(now) {
                self.test(index, ctx);
            }
        }
        let is_due = self.survey.last_look.is_none_or(|at| at.elapsed() >= LOOK_INTERVAL);
        if is_due && self.config.gpus != GpuChoice::None {
            self.look(ctx);
        }
    }

    fn looked(&mut self, found: Result<Found, GpuError>, ctx: &mut Context<Self>) {
        self.survey.is_looking = false;
        match found {
            Ok(found) => self.compare(found, ctx),
            Err(error) => {
                let why = format!("GPUs cannot be looked for: {error}");
                // What was found before stands until a look tells otherwise.
                let is_news = self.survey.looked != Looked::Failed(why.clone());
                if is_news && !matches!(self.survey.looked, Looked::Found { .. }) {
                    tracing::warn!("{why}");
                    self.survey.looked = Looked::Failed(why);
                } else {
                    tracing::debug!("{why}");
                }
            }
        }
        if std::mem::take(&mut self.survey.again) {
            self.look(ctx);
        } else {
            for index in std::mem::take(&mut self.survey.to_test) {
                if self.bays[index].slot.health == Health::Testing {
                    self.test(index, ctx);
                }
            }
        }
        self.publish(ctx);
        self.round(ctx);
    }

    /// Brings the slots in line with what a look found.
    fn compare(&mut self, found: Found, ctx: &mut Context<Self>) {
        let is_first = !matches!(self.survey.looked, Looked::Found { .. });
        let mut left_out = Vec::new();
        for gpu in &found.gpus {
            let known =
                self.bays.iter().position(|bay| bay.slot.as_gpu().is_some_and(|own| own.uuid == gpu.uuid));
            match (known, self.unusable(gpu)) {
                (None, Some(why)) => left_out.push((gpu.number, why)),
                // A GPU that was usable and is refused now is as good as gone.
                (Some(index), Some(why)) => self.lose(index, &why),
                (None, None) => {
                    tracing::info!("found GPU {}: {}, {}", gpu.number, gpu.name, gpu.uuid);
                    self.adopt(gpu, ctx);
                }
                (Some(index), None) => {
                    if self.bays[index].slot.appeared(gpu) {
                        tracing::info!("GPU {} ({}) is back", gpu.number, gpu.uuid);
                        self.survey.to_test.push(index);
                    }
                }
            }
        }
        let shown: Vec<String> =
            found.gpus.iter().map(|gpu| format!("GPU {} ({})", gpu.number, gpu.uuid)).collect();
        let why = found.obstacle.clone().unwrap_or_else(|| format!("the driver shows {}", shown.join(", ")));
        for index in 0..self.bays.len() {
            let own = self.bays[index].slot.as_gpu();
            if own.is_some_and(|own| found.gpus.iter().all(|gpu| gpu.uuid != own.uuid)) {
                self.lose(index, &why);
            }
        }
        if is_first {
            self.say_what_trains(&found, &left_out);
        }
        self.survey.looked = Looked::Found { left_out, obstacle: found.obstacle };
    }

    /// Why a GPU gets no slot.
    fn unusable(&self, gpu: &Gpu) -> Option<String> {
        if !self.config.gpus.allows(gpu.number) {
            // One that has a slot keeps it when numbers shift.
            let has_slot =
                self.bays.iter().any(|bay| bay.slot.as_gpu().is_some_and(|own| own.uuid == gpu.uuid));
            if !has_slot {
                return Some("`slots.gpus` leaves it out".to_owned());
            }
        }
        gpu.refused.clone()
    }

    /// Gives a GPU a slot.
    fn adopt(&mut self, gpu: &Gpu, ctx: &mut Context<Self>) {
        let mut slot = Slot::gpu(gpu.clone());
        slot.claim = self.first_claim();
        let remembered =
            self.survey.remembered.iter().find(|record| record.uuid.as_deref() == Some(&gpu.uuid));
        if let Some(record) = remembered {
            slot.remember(record);
        }
        self.survey.to_test.push(self.bays.len());
        self.add_bay(slot, ctx);
    }

    fn lose(&mut self, index: usize, why: &str) {
        let slot = &mut self.bays[index].slot;
        if slot.vanished(why) {
            tracing::error!("{} is missing: {why}", slot.name());
        }
    }

    fn say_what_trains(&self, found: &Found, left_out: &[(usize, String)]) {
        for (number, why) in left_out {
            tracing::info!("GPU {number} is not used: {why}");
        }
        if let GpuChoice::Only(numbers) = &self.config.gpus {
            for number in numbers.iter().filter(|&&number| found.gpus.iter().all(|gpu| gpu.number != number))
            {
                tracing::warn!("`slots.gpus` names GPU {number}, which is not there");
            }
        }
        let names: Vec<String> = self.bays.iter().map(|bay| bay.slot.name()).collect();
        let why = found.obstacle.as_ref().map_or(String::new(), |why| format!("; no GPU: {why}"));
        tracing::info!("{} slots: {}{why}", names.len(), names.join(", "));
    }

    fn test(&mut self, index: usize, ctx: &mut Context<Self>) {
        let Some(gpu) = self.bays[index].slot.as_gpu() else { return };
        let answer = self.port.test(&gpu.uuid);
        ctx.spawn(answer.into_actor(self).map(move |tested, actor, ctx| actor.tested(index, tested, ctx)));
    }

    fn tested(&mut self, index: usize, tested: Result<Tested, GpuError>, ctx: &mut Context<Self>) {
        let fault = match tested {
            Ok(tested) => tested.fault,
            Err(error) => Some(error.to_string()),
        };
        let slot = &mut self.bays[index].slot;
        if slot.tested(fault.as_deref(), now_unix_ms()) {
            match slot.obstacle() {
                None => tracing::info!("{} passed its test and takes jobs", slot.name()),
                Some(obstacle) => tracing::error!("{} {obstacle}", slot.name()),
            }
        }
        self.publish(ctx);
        self.round(ctx);
    }

    /// Counts the end of an attempt for or against the GPU that it ran on.
    pub(super) fn judge(&mut self, ended: &ChildEnded, ctx: &mut Context<Self>) {
        let Some(bay) = self.bays.get_mut(ended.slot).filter(|bay| bay.slot.as_gpu().is_some()) else {
            return;
        };
        let reason = match &ended.ending {
            Ending::Completed(_) => return bay.slot.success(),
            Ending::Failed { class: FailureClass::Device, reason } => reason,
            Ending::Cancelled(_) | Ending::Interrupted(_) | Ending::Failed { .. } => return,
        };
        let must_test = bay.slot.fault(ended.seq, reason, now_unix_ms());
        let (name, obstacle) = (bay.slot.name(), bay.slot.obstacle().unwrap_or_default());
        if must_test {
            tracing::warn!("{name} failed and {obstacle}");
            self.survey.to_test.push(ended.slot);
        } else {
            tracing::error!("{name} {obstacle}");
        }
        // It may be gone altogether: the look comes before the test.
        self.look(ctx);
    }

    /// Lets the journal know how the slots stand, when that has changed. A display: losing it costs nothing.
    pub(super) fn publish(&mut self, ctx: &mut Context<Self>) {
        let mut slots: Vec<SlotRecord> = self.bays.iter().map(|bay| bay.slot.record(bay.job())).collect();
        for slot in slots.iter_mut().filter(|slot| slot.state == SlotState::Free) {
            if self.is_drained(&slot.name) {
                slot.state = SlotState::Drained;
            }
        }
        let Some(service) = process::identify(std::process::id()).filter(|_| slots != self.survey.published)
        else {
            return;
        };
        self.survey.published.clone_from(&slots);
        let keeper = self.keeper.clone();
        let work =
            async move { keeper.with(move |journal| journal.set_board(&SlotBoard { service, slots })).await };
        ctx.spawn(work.into_actor(self).map(|result, actor, _ctx| {
            if let Err(error) = result {
                // The next round writes it.
                actor.survey.published.clear();
                log_journal("note the slots", &error);
            }
        }));
    }
}
