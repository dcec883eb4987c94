//! Why a training session failed, by class.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::child::ExitCode;
use crate::engine::device::cuda::DeviceError;

/// The class of a failure: what a supervisor decides retries by and what a user reads first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureClass {
    /// The configuration asks for what cannot be.
    Config,
    /// The dataset is missing or unusable.
    Data,
    /// Not enough memory.
    Memory,
    /// The loss stopped being a finite number.
    Diverged,
    /// The compute device failed.
    Device,
    /// A file could not be written or read.
    Storage,
    /// A fault of the program.
    Internal,
}

impl FailureClass {
    /// Every class.
    pub const ALL: [FailureClass; 7] = [
        FailureClass::Config,
        FailureClass::Data,
        FailureClass::Memory,
        FailureClass::Diverged,
        FailureClass::Device,
        FailureClass::Storage,
        FailureClass::Internal,
    ];

    /// Exit code of a training process that failed so.
    pub fn exit_code(self) -> ExitCode {
        match self {
            FailureClass::Config => ExitCode::Config,
            FailureClass::Data => ExitCode::Data,
            FailureClass::Memory => ExitCode::Memory,
            FailureClass::Diverged => ExitCode::Diverged,
            FailureClass::Device => ExitCode::Device,
            FailureClass::Storage => ExitCode::Storage,
            FailureClass::Internal => ExitCode::Internal,
        }
    }

    /// The name used in files and messages.
    pub fn name(self) -> &'static str {
        match self {
            FailureClass::Config => "config",
            FailureClass::Data => "data",
            FailureClass::Memory => "memory",
            FailureClass::Diverged => "diverged",
            FailureClass::Device => "device",
            FailureClass::Storage => "storage",
            FailureClass::Internal => "internal",
        }
    }
}

/// A training session failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A value of the configuration cannot be used.
    #[error("{key}: {message}")]
    Config {
        /// The key.
        key: String,
        /// What was seen and what is allowed.
        message: String,
    },
    /// The dataset cannot be used.
    #[error("dataset {path}: {message}")]
    Data {
        /// The dataset.
        path: PathBuf,
        /// What is wrong.
        message: String,
        /// The cause, where there is one.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// Not enough memory for the batch.
    #[error(
        "batch {batch} at {imgsz} px needs {needed_mib} MiB, {available_mib} MiB are available; \
         the largest batch that fits is {largest}"
    )]
    Memory {
        /// Images per batch asked for.
        batch: usize,
        /// Input size, pixels.
        imgsz: usize,
        /// MiB needed.
        needed_mib: u64,
        /// MiB available.
        available_mib: u64,
        /// Largest batch that fits; 0 when none does.
        largest: usize,
    },
    /// The loss or the gradient is not finite, again after one return to the last good checkpoint.
    #[error(
        "{what} is {value} in epoch {epoch}, batch {batch} (step {step}), learning rate {lr:.6}, \
         images {images:?}; training went back to the last good checkpoint once and met it again"
    )]
    Diverged {
        /// What is not finite.
        what: &'static str,
        /// Its value.
        value: f64,
        /// Epoch, from 1.
        epoch: u32,
        /// Batch of the epoch, from 1.
        batch: usize,
        /// Optimiser steps taken before.
        step: u64,
        /// Learning rate of the weights.
        lr: f64,
        /// The images of the batch.
        images: Vec<String>,
    },
    /// A file of the run cannot be written or read.
    #[error("cannot {action} {path}")]
    Storage {
        /// What was tried, for example `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A checkpoint does not fit the session.
    #[error("checkpoint {path} cannot be resumed: {message}")]
    Resume {
        /// The checkpoint.
        path: PathBuf,
        /// What differs.
        message: String,
    },
    /// Weights cannot be read or do not fit.
    #[error("weights {path}: {message}")]
    Weights {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
        /// The cause, where there is one.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The engine refused.
    #[error("the engine failed while it was asked to {action}")]
    Engine {
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: crate::engine::error::EngineError,
    },
    /// A GPU failed or cannot be used.
    #[error("the GPU failed while it was asked to {action}")]
    Device {
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: DeviceError,
    },
    /// A fault of the program.
    #[error("internal fault: {message}")]
    Internal {
        /// What was seen.
        message: String,
    },
}

impl TrainError {
    /// The class of the failure.
    pub fn class(&self) -> FailureClass {
        use crate::engine::error::EngineError;
        match self {
            TrainError::Config { .. } | TrainError::Weights { .. } | TrainError::Resume { .. } => {
                FailureClass::Config
            }
            TrainError::Data { .. } => FailureClass::Data,
            TrainError::Memory { .. } => FailureClass::Memory,
            TrainError::Engine { source: EngineError::OutOfMemory { .. }, .. } => FailureClass::Memory,
            TrainError::Device { source, .. } => match source {
                DeviceError::OutOfMemory { .. } => FailureClass::Memory,
                // Another attempt on the same machine finds no other one.
                DeviceError::Unavailable { .. } => FailureClass::Config,
                _ => FailureClass::Device,
            },
            TrainError::Diverged { .. } => FailureClass::Diverged,
            TrainError::Storage { .. } => FailureClass::Storage,
            TrainError::Engine { .. } | TrainError::Internal { .. } => FailureClass::Internal,
        }
    }

    /// The message with all its causes, joined by colons.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        // A chain of causes is short; the bound keeps a faulty one from running on.
        for _ in 0..16 {
            let Some(error) = cause else { break };
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }

    /// A storage error for `action` on `path`.
    pub fn storage(action: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> TrainError {
        TrainError::Storage { action, path: path.into(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_carry_the_class() {
        for class in FailureClass::ALL {
            assert_eq!(class.exit_code().class(), Some(class.name()));
            let json = serde_json::to_string(&class).expect("a name");
            assert_eq!(json, format!("\"{}\"", class.name()));
        }
    }

    #[test]
    fn the_chain_names_the_cause_once() {
        let source = std::io::Error::other("disk full");
        let error = TrainError::storage("write", "/run/args.yaml", source);
        assert_eq!(error.chain(), "cannot write /run/args.yaml: disk full");
    }
}
