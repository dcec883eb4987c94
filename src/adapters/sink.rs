//! The port of a side service that deliveries are made to, and the error that says what to do after a failure.

use async_trait::async_trait;

use crate::job::causes;
use crate::job::delivery::{Delivery, SinkName};

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why a delivery was not made.
#[derive(Debug, thiserror::Error)]
pub enum DeliveryError {
    /// It would fail again: the service understood it and refused, or what it speaks of is gone. It is given up.
    #[error("{what}")]
    Refused {
        /// What was refused, and what was seen.
        what: String,
        /// Why.
        #[source]
        source: Option<Cause>,
    },
    /// Another machine owns the run by now. It is given up without a complaint.
    #[error("the run belongs to {owner} by now (fence {fence})")]
    Fenced {
        /// The machine.
        owner: String,
        /// Its fencing number.
        fence: u64,
    },
    /// This one failed, another may succeed: it is tried again later, its lane waits.
    #[error("{what}")]
    Later {
        /// What failed.
        what: String,
        /// Why.
        #[source]
        source: Option<Cause>,
    },
    /// The service does not work: everything for it waits.
    #[error("{what}")]
    Outage {
        /// What was seen.
        what: String,
        /// Why.
        #[source]
        source: Option<Cause>,
    },
}

/// What to do after a [`DeliveryError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterFailure {
    /// Give it up.
    GiveUp,
    /// Try it again later; its lane waits, others go on.
    LaneWaits,
    /// Try it again later; everything for this service waits.
    AllWait,
}

impl DeliveryError {
    /// What to do now.
    pub fn verdict(&self) -> AfterFailure {
        match self {
            Self::Refused { .. } | Self::Fenced { .. } => AfterFailure::GiveUp,
            Self::Later { .. } => AfterFailure::LaneWaits,
            Self::Outage { .. } => AfterFailure::AllWait,
        }
    }

    /// The error and its causes in one line.
    pub fn chain(&self) -> String {
        causes::chain(self)
    }
}

/// What a service gave back that is worth keeping with the job (`mlflow_run_id`, say).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Receipt {
    /// Names and values.
    pub notes: Vec<(&'static str, String)>,
}

/// A side service. Every method may be called again after any failure, in this process or a later one.
#[async_trait]
pub trait Sink: Send + Sync {
    /// Which one it is.
    fn name(&self) -> SinkName;

    /// Puts the service in order before the first delivery: what an earlier start left open and nobody goes on with.
    /// `live` are the instances of the jobs that have not ended, or whose end is still to be told.
    ///
    /// # Errors
    /// As [`Sink::deliver`]; it is asked again.
    async fn begin(&self, live: &[String]) -> Result<(), DeliveryError> {
        let _ = live;
        Ok(())
    }

    /// Makes the delivery. Making it twice has the effect of once.
    ///
    /// # Errors
    /// [`DeliveryError`] says whether and when to try again.
    async fn deliver(&self, delivery: &Delivery) -> Result<Receipt, DeliveryError>;
}
