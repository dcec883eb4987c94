//! The port to the GPUs of this machine: which there are, and whether one works.
//!
//! The service's own process never talks to a GPU, since a driver that fails takes the process with it. It asks
//! a child ([`ProbeProgram`]); a service without GPUs asks nobody ([`NoGpus`]).

mod program;

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;

use serde::{Deserialize, Serialize};

pub use program::ProbeProgram;

/// A GPU that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// Its number, as the driver counts those that it shows.
    pub number: usize,
    /// Its identity, which stays when numbers shift.
    pub uuid: String,
    /// Its name.
    pub name: String,
    /// Its memory, bytes.
    pub memory_bytes: u64,
    /// Why it cannot be used; `None` when it can.
    #[serde(default)]
    pub refused: Option<String>,
}

/// What a look found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Every GPU that the driver shows.
    pub gpus: Vec<Gpu>,
    /// Why none can be used; `None` when one can.
    #[serde(default)]
    pub obstacle: Option<String>,
}

/// What a test found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tested {
    /// What is wrong; `None` when the GPU copies and computes as it should.
    pub fault: Option<String>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// The program cannot be started.
    #[error("{program} cannot be started: {source}")]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It did not end in time and was killed.
    #[error("{command} did not answer within {limit_s} s")]
    Limit {
        /// The command.
        command: String,
        /// The limit, seconds.
        limit_s: u64,
    },
    /// It left without an answer.
    #[error("{command} left without an answer ({status}){said}")]
    Left {
        /// The command.
        command: String,
        /// How it left.
        status: String,
        /// Its last words, with a colon before them, or nothing.
        said: String,
    },
}

/// An answer to wait for.
pub type Answer<T> = Pin<Box<dyn Future<Output = Result<T, GpuError>>>>;

/// A way to ask about GPUs. Neither question blocks the thread, and each ends within a limit.
pub trait GpuPort: Send + Sync {
    /// Looks which GPUs there are. Takes no memory of theirs and may be asked while they train.
    fn look(&self) -> Answer<Found>;

    /// Copies to a GPU, computes there, and compares.
    fn test(&self, uuid: &str) -> Answer<Tested>;
}

/// A machine whose GPUs are not used.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoGpus;

impl GpuPort for NoGpus {
    fn look(&self) -> Answer<Found> {
        let obstacle = Some("this service uses no GPU (`slots.gpus` is none)".to_owned());
        Box::pin(std::future::ready(Ok(Found { gpus: Vec::new(), obstacle })))
    }

    fn test(&self, _uuid: &str) -> Answer<Tested> {
        Box::pin(std::future::ready(Ok(Tested { fault: Some("it is not used".to_owned()) })))
    }
}
