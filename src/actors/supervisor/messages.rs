//! What the supervisor hears.

use actix::{
    ActorContext, ActorFutureExt, Addr, AsyncContext, Context, Handler, Message, ResponseFuture, WrapFuture,
};
use serde_json::Value as Json;
use tokio::sync::oneshot;

use super::{Supervisor, log_journal, request_stop};
use crate::actors::endings::Ending;
use crate::actors::folder_watcher::FolderWatcher;
use crate::actors::trainer::Control;
use crate::adapters::queue::JobStore;
use crate::job::ids::TaskId;
use crate::job::record::ProcessId;

/// Something may have changed: look for requests and fill the slots.
#[derive(Debug, Clone, Copy, Message)]
#[rtype(result = "()")]
pub struct Wake;

impl Handler<Wake> for Supervisor {
    type Result = ();

    fn handle(&mut self, _: Wake, ctx: &mut Context<Self>) {
        self.round(ctx);
    }
}

/// The watcher to wake when a job ends.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Introduce(pub Addr<FolderWatcher>);

impl Handler<Introduce> for Supervisor {
    type Result = ();

    fn handle(&mut self, Introduce(watcher): Introduce, _ctx: &mut Context<Self>) {
        self.watcher = Some(watcher);
    }
}

/// A trainer's process runs.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ChildStarted {
    /// The record.
    pub seq: i64,
    /// Its process.
    pub process: ProcessId,
}

impl Handler<ChildStarted> for Supervisor {
    type Result = ();

    fn handle(&mut self, message: ChildStarted, ctx: &mut Context<Self>) {
        let keeper = self.keeper.clone();
        let work = async move {
            keeper.with(move |journal| journal.set_process(message.seq, Some(message.process))).await
        };
        ctx.wait(work.into_actor(self).map(|result, _actor, _ctx| {
            if let Err(error) = result {
                // Recovery also finds processes by their arguments.
                log_journal("note the process of a job", &error);
            }
        }));
    }
}

/// A session event.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ChildEvent {
    /// The slot.
    pub slot: usize,
    /// The record.
    pub seq: i64,
    /// The event.
    pub event: Json,
}

impl Handler<ChildEvent> for Supervisor {
    type Result = ();

    fn handle(&mut self, message: ChildEvent, ctx: &mut Context<Self>) {
        let ours = self
            .bays
            .get(message.slot)
            .and_then(|bay| bay.busy.as_ref())
            .is_some_and(|busy| busy.record.seq == message.seq);
        if ours {
            self.journal_event(message.slot, message.event, ctx);
        }
    }
}

/// A trainer's process is gone.
#[derive(Debug, Clone, Message)]
#[rtype(result = "()")]
pub struct ChildEnded {
    /// The slot.
    pub slot: usize,
    /// The record.
    pub seq: i64,
    /// How it ended.
    pub ending: Ending,
}

impl Handler<ChildEnded> for Supervisor {
    type Result = ();

    fn handle(&mut self, message: ChildEnded, ctx: &mut Context<Self>) {
        self.settle(message, ctx);
    }
}

/// Stop this job. The answer is true when the journal has it, so that it happens whatever comes.
#[derive(Message)]
#[rtype(result = "bool")]
pub struct StopJob {
    /// The job.
    pub task_id: TaskId,
    /// Who asked, in a sentence.
    pub why: String,
}

impl Handler<StopJob> for Supervisor {
    type Result = ResponseFuture<bool>;

    fn handle(&mut self, StopJob { task_id, why }: StopJob, ctx: &mut Context<Self>) -> Self::Result {
        let keeper = self.keeper.clone();
        let work = async move {
            keeper
                .with(move |journal| match journal.job(&task_id)? {
                    Some(record) => request_stop(journal, &record, &why),
                    None => Ok(None),
                })
                .await
        };
        let (told, answer) = oneshot::channel();
        // The journal's word first: nothing else is handled meanwhile.
        ctx.wait(work.into_actor(self).map(|result, actor, ctx| {
            let is_done = match result {
                Ok(Some(record)) => {
                    actor.stopped(record, ctx);
                    true
                }
                Ok(None) => true,
                // A stop file stays, and so does a key in Redis: it is tried again at the next look.
                Err(error) => {
                    log_journal("stop a job", &error);
                    false
                }
            };
            // A caller that stopped waiting does not need the answer.
            let _ = told.send(is_done);
        }));
        Box::pin(async move { answer.await.unwrap_or(false) })
    }
}

/// Take no more work, let the trainers save and leave, then stop.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Shutdown;

impl Handler<Shutdown> for Supervisor {
    type Result = ();

    fn handle(&mut self, _: Shutdown, ctx: &mut Context<Self>) {
        self.shutting_down = true;
        // A part of the limit is left for the journal.
        let limit_ms = self.config.shutdown_limit_ms * 9 / 10;
        for bay in self.bays.iter().filter(|bay| bay.busy.is_some()) {
            bay.trainer.do_send(Control::Interrupt { limit_ms });
        }
        if self.is_idle() {
            ctx.stop();
        }
    }
}

/// Has every job that ended been reported, and every slot no job?
#[derive(Message)]
#[rtype(result = "bool")]
pub struct IsIdle;

impl Handler<IsIdle> for Supervisor {
    type Result = bool;

    fn handle(&mut self, _: IsIdle, _ctx: &mut Context<Self>) -> bool {
        self.is_idle()
    }
}

/// Kill the trainers now.
#[derive(Message)]
#[rtype(result = "()")]
pub struct KillAll;

impl Handler<KillAll> for Supervisor {
    type Result = ();

    fn handle(&mut self, _: KillAll, _ctx: &mut Context<Self>) {
        for bay in &self.bays {
            bay.trainer.do_send(Control::Kill);
        }
    }
}
