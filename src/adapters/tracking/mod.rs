//! The tracking server: where people look at runs, compare them and find the best weights of a study.
//!
//! A tracker is a [`Sink`](crate::adapters::sink::Sink): it takes the start, the samples, the files and the end of a run and is
//! free to be down for days, since the outbox keeps what it has not taken. It decides nothing. [`MlflowSink`] is
//! the one there is.

mod mlflow;

use std::path::PathBuf;

pub use mlflow::MlflowSink;

use crate::adapters::sink::DeliveryError;

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why the tracking server was not told.
#[derive(Debug, thiserror::Error)]
pub enum TrackingError {
    /// The configuration cannot be used.
    #[error("the tracking server cannot be used: {what}")]
    Config {
        /// What is wrong with it.
        what: String,
        /// Why.
        #[source]
        source: Option<Cause>,
    },
    /// No answer: it refused the connection, or none came before the deadline.
    #[error("{operation}: no answer from the tracking server (limit {limit_s} s)")]
    Silent {
        /// What was asked.
        operation: &'static str,
        /// The deadline, seconds.
        limit_s: f64,
        /// The deadline passed; else the connection ended or was not made.
        is_late: bool,
        /// Why.
        #[source]
        source: Option<Cause>,
    },
    /// It asked for patience.
    #[error("{operation}: the tracking server asks to wait {wait_s} s")]
    Busy {
        /// What was asked.
        operation: &'static str,
        /// How long, seconds.
        wait_s: u64,
    },
    /// It failed, or what answered is no tracking server.
    #[error("{operation}: the tracking server does not work (status {status}): {said}")]
    Failed {
        /// What was asked.
        operation: &'static str,
        /// Status of the answer.
        status: u16,
        /// What it said, shortened.
        said: String,
    },
    /// It does not let us in.
    #[error("{operation}: the tracking server does not accept the credentials (status {status}): {said}")]
    Credentials {
        /// What was asked.
        operation: &'static str,
        /// Status of the answer, 401 or 403.
        status: u16,
        /// What it said, shortened.
        said: String,
    },
    /// What was spoken of is not there.
    #[error("{operation}: not on the tracking server: {said}")]
    Missing {
        /// What was asked.
        operation: &'static str,
        /// What it said, shortened.
        said: String,
    },
    /// It understood and refused.
    #[error("{operation}: the tracking server refused (status {status}, {code}): {said}")]
    Refused {
        /// What was asked.
        operation: &'static str,
        /// Status of the answer.
        status: u16,
        /// Its word for the error (`INVALID_PARAMETER_VALUE`).
        code: String,
        /// What it said, shortened.
        said: String,
    },
    /// Somebody deleted the run or the experiment there.
    #[error("{what} was deleted on the tracking server")]
    Deleted {
        /// What.
        what: String,
    },
    /// It is no delivery for a tracker, or does not say what it should.
    #[error("the delivery cannot be made: {what}")]
    Delivery {
        /// What is wrong with it.
        what: String,
    },
    /// Another machine owns the run by now.
    #[error("the run belongs to {owner} by now (fence {fence})")]
    Fenced {
        /// The machine.
        owner: String,
        /// Its fencing number.
        fence: u64,
    },
    /// A file of the run cannot be read.
    #[error("cannot read {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What to do after a [`TrackingError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrackingRetry {
    /// It would fail again.
    Never,
    /// This one again later, others meanwhile.
    Later,
    /// Everything again later.
    WhenItWorks,
}

impl TrackingError {
    /// Whether and when to try again.
    pub fn retry(&self) -> TrackingRetry {
        match self {
            Self::Silent { .. } | Self::Busy { .. } | Self::Failed { .. } => TrackingRetry::WhenItWorks,
            // Credentials may be mended while we wait, and nobody wants to lose a night's runs over a password.
            Self::Credentials { .. } => TrackingRetry::WhenItWorks,
            Self::File { .. } => TrackingRetry::Later,
            Self::Config { .. }
            | Self::Missing { .. }
            | Self::Refused { .. }
            | Self::Deleted { .. }
            | Self::Delivery { .. }
            | Self::Fenced { .. } => TrackingRetry::Never,
        }
    }

    /// True for the server's own word that something is there already.
    fn is_already_there(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if code == "RESOURCE_ALREADY_EXISTS")
    }
}

impl From<TrackingError> for DeliveryError {
    fn from(error: TrackingError) -> Self {
        let (what, retry) = (error.to_string(), error.retry());
        let source: Option<Cause> = match error {
            TrackingError::Fenced { owner, fence } => return Self::Fenced { owner, fence },
            TrackingError::Config { source, .. } | TrackingError::Silent { source, .. } => source,
            TrackingError::File { source, .. } => Some(source.into()),
            _ => None,
        };
        match retry {
            TrackingRetry::Never => Self::Refused { what, source },
            TrackingRetry::Later => Self::Later { what, source },
            TrackingRetry::WhenItWorks => Self::Outage { what, source },
        }
    }
}
