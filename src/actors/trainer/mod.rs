//! One slot: one child process at a time, from its folder to its last word.
//!
//! Owns: the process, its pipes and its process group. In: [`Start`], [`Control`]. Out, to the supervisor:
//! `ChildStarted`, `ChildEvent` (steps may be dropped when the supervisor is busy: they are progress, not facts) and, exactly
//! once for each start, `ChildEnded`. On stop of the actor the process is killed with it. When the actor fails, the
//! process dies with the service or is killed by recovery, and the job continues from its checkpoint. Limits: one
//! process; lines of 1 MiB; silence, stop and shutdown each have a deadline after which the group is killed.

mod lines;
mod process;
mod provision;

use std::path::PathBuf;
use std::sync::Arc;

use actix::{Actor, AsyncContext, Context, Handler, Message, WrapFuture};
use tokio::sync::mpsc;

pub(super) use process::certified;
pub use provision::Supply;

use super::supervisor::{ChildEnded, Supervisor};
use crate::adapters::gpu::Gpu;
use crate::job::record::JobRecord;

/// What all slots share.
#[derive(Debug, Clone)]
pub struct TrainerConfig {
    /// The program started as `PROGRAM train-child --spec FILE`.
    pub program: PathBuf,
    /// Where the specifications of running jobs lie.
    pub state_dir: PathBuf,
    /// Threads of a child on the CPU; `None` leaves them to it.
    pub threads: Option<usize>,
    /// Share of a GPU's memory that a child may take, above 0 up to 1.
    pub gpu_share_max: f64,
    /// Silence after which a child is taken as stuck.
    pub stall_timeout_ms: u64,
    /// The object store, when there is one.
    pub supply: Option<Supply>,
}

/// One slot.
pub struct Trainer {
    slot: usize,
    config: Arc<TrainerConfig>,
    supervisor: actix::Addr<Supervisor>,
    control: Option<mpsc::Sender<Control>>,
}

impl Trainer {
    /// An empty slot.
    pub fn new(slot: usize, config: Arc<TrainerConfig>, supervisor: actix::Addr<Supervisor>) -> Self {
        Self { slot, config, supervisor, control: None }
    }
}

impl Actor for Trainer {
    type Context = Context<Self>;
}

/// Train this job. The slot must be empty.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Start {
    /// The job.
    pub record: Box<JobRecord>,
    /// The GPU to train on; `None` for the CPU.
    pub gpu: Option<Gpu>,
}

/// Something the child is to be told or done to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Message)]
#[rtype(result = "()")]
pub enum Control {
    /// Save and end; by force after the grace.
    Stop {
        /// Milliseconds.
        grace_ms: u64,
    },
    /// Save and leave, to be continued later; by force within the limit.
    Interrupt {
        /// Milliseconds.
        limit_ms: u64,
    },
    /// End at once.
    Kill,
}

impl Handler<Start> for Trainer {
    type Result = ();

    fn handle(&mut self, Start { record, gpu }: Start, ctx: &mut Context<Self>) {
        assert!(self.control.as_ref().is_none_or(mpsc::Sender::is_closed), "one process to a slot");
        let (control, orders) = mpsc::channel(8);
        self.control = Some(control);
        let (slot, config, supervisor) = (self.slot, self.config.clone(), self.supervisor.clone());
        let work = async move {
            let seq = record.seq;
            let ending = process::run(*record, gpu, slot, &config, &supervisor, orders).await;
            // A closed mailbox means that the supervisor is being rebuilt; recovery then reads the result file.
            if supervisor.send(ChildEnded { slot, seq, ending }).await.is_err() {
                tracing::error!(
                    seq,
                    "the supervisor is gone; the end of the trainer is read from its result file"
                );
            }
        };
        ctx.spawn(work.into_actor(self));
    }
}

impl Handler<Control> for Trainer {
    type Result = ();

    fn handle(&mut self, order: Control, _ctx: &mut Context<Self>) {
        if let Some(control) = &self.control {
            // Full or closed: eight orders wait already, or the process is gone; either way nothing is lost.
            let _ = control.try_send(order);
        }
    }
}
