//! Why the object store did not do what it was asked, and whether to ask again.

use std::path::{Path, PathBuf};

use crate::adapters::sink::DeliveryError;

pub(super) type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The object or the bucket is not there.
    #[error("{object} is not in the store")]
    Missing {
        /// `bucket/key`, or the bucket.
        object: String,
    },
    /// A name that no store takes.
    #[error("{what} {name:?} is refused: {reason}")]
    Name {
        /// `bucket`, `key`, `address`.
        what: &'static str,
        /// As it was given.
        name: String,
        /// Why.
        reason: &'static str,
    },
    /// The configuration does not make a store.
    #[error("the store cannot be used: {what}")]
    Config {
        /// What is wrong.
        what: String,
        /// Why.
        #[source]
        source: Option<Cause>,
    },
    /// The credentials are wrong, or they do not allow it.
    #[error("the store denies to {what}")]
    Denied {
        /// What was asked.
        what: String,
        /// Why.
        #[source]
        source: Option<Cause>,
    },
    /// The store understood and refused.
    #[error("the store refuses to {what}")]
    Refused {
        /// What was asked.
        what: String,
        /// Why.
        #[source]
        source: Option<Cause>,
    },
    /// There is no room.
    #[error("the store is full: cannot {what}")]
    Full {
        /// What was asked.
        what: String,
        /// Why.
        #[source]
        source: Option<Cause>,
    },
    /// The store is not reached, or it answers that it cannot work now.
    #[error("the store does not work: cannot {what}")]
    Unavailable {
        /// What was asked.
        what: String,
        /// Why.
        #[source]
        source: Option<Cause>,
    },
    /// No answer in time.
    #[error("the store does not answer: {what} took more than {limit_ms} ms")]
    Timeout {
        /// What was asked.
        what: String,
        /// The limit.
        limit_ms: u64,
    },
    /// What is stored is not what was sent.
    #[error("{object} is damaged: expected {expected}, found {found}")]
    Integrity {
        /// `bucket/key`.
        object: String,
        /// Size and checksum, or what else it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A later owner of the run has written its manifest.
    #[error("the run belongs to the machine {owner} by now (fence {fence})")]
    Fenced {
        /// That machine.
        owner: String,
        /// Its fencing number.
        fence: u64,
    },
    /// Others replaced the object at every try.
    #[error("{object} is replaced by others all the time")]
    Busy {
        /// `bucket/key`.
        object: String,
    },
    /// A dataset on this machine is used in another state than the store has.
    #[error("{folder} is not brought up to date while it is used by {users}; waited {waited_ms} ms")]
    InUse {
        /// The folder of the dataset.
        folder: PathBuf,
        /// Who uses it.
        users: String,
        /// How long it was waited for.
        waited_ms: u64,
    },
    /// The file system of this machine has no room for what is to be fetched.
    #[error(
        "no room in {folder}: needs {needed_bytes} bytes and {reserve_bytes} that stay free, {free_bytes} are free"
    )]
    NoRoom {
        /// Where it was to lie.
        folder: PathBuf,
        /// What is to be fetched.
        needed_bytes: u64,
        /// What has to stay free beside it.
        reserve_bytes: u64,
        /// What is free.
        free_bytes: u64,
    },
    /// An object is larger than the reader allows.
    #[error("{object} has {bytes} bytes, at most {bytes_max} are allowed")]
    TooLarge {
        /// `bucket/key`.
        object: String,
        /// Its size.
        bytes: u64,
        /// The limit.
        bytes_max: u64,
    },
    /// A file on this machine changed while it was sent.
    #[error("{path} changed while it was sent")]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A file on this machine cannot be read or written.
    #[error("cannot {action} {path}")]
    LocalFile {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Whether to ask again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// It would fail again.
    Never,
    /// At once: the next try sees another state.
    Now,
    /// After a pause.
    After,
}

impl StoreError {
    /// Whether to ask again.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Missing { .. } | Self::Name { .. } | Self::Config { .. } | Self::TooLarge { .. } => {
                Retry::Never
            }
            Self::Refused { .. } | Self::Fenced { .. } => Retry::Never,
            Self::Changed { .. } => Retry::Now,
            Self::Denied { .. } | Self::Full { .. } | Self::Unavailable { .. } | Self::Timeout { .. } => {
                Retry::After
            }
            Self::Integrity { .. } | Self::LocalFile { .. } | Self::Busy { .. } => Retry::After,
            Self::InUse { .. } | Self::NoRoom { .. } => Retry::After,
        }
    }

    /// True when the store itself does not work, whatever it is asked.
    pub fn is_outage(&self) -> bool {
        matches!(
            self,
            Self::Denied { .. } | Self::Full { .. } | Self::Unavailable { .. } | Self::Timeout { .. }
        )
    }

    /// True when something is not there, in the store or on this machine.
    pub fn is_missing(&self) -> bool {
        match self {
            Self::Missing { .. } => true,
            Self::LocalFile { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
            _ => false,
        }
    }

    pub(super) fn local(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::LocalFile { action, path, source }
    }
}

/// `None` for what is not there.
///
/// # Errors
/// All others.
pub fn found<T>(result: Result<T, StoreError>) -> Result<Option<T>, StoreError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(StoreError::Missing { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

impl From<StoreError> for DeliveryError {
    fn from(error: StoreError) -> Self {
        if let StoreError::Fenced { owner, fence } = error {
            return Self::Fenced { owner, fence };
        }
        let what = error.to_string();
        let is_outage = error.is_outage();
        let retry = match &error {
            // A bucket that was removed in the middle of it: it is made again by the next try.
            StoreError::Missing { .. } => Retry::After,
            error => error.retry(),
        };
        let source: Option<Cause> = match error {
            StoreError::Denied { source, .. }
            | StoreError::Refused { source, .. }
            | StoreError::Full { source, .. }
            | StoreError::Unavailable { source, .. }
            | StoreError::Config { source, .. } => source,
            StoreError::LocalFile { source, .. } => Some(Box::new(source)),
            _ => None,
        };
        match retry {
            _ if is_outage => Self::Outage { what, source },
            Retry::Never => Self::Refused { what, source },
            Retry::Now | Retry::After => Self::Later { what, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::sink::AfterFailure;

    #[test]
    fn every_error_says_what_to_do() {
        let what = || "put a/b".to_owned();
        let table = [
            (StoreError::Missing { object: what() }, Retry::Never, AfterFailure::LaneWaits),
            (StoreError::Refused { what: what(), source: None }, Retry::Never, AfterFailure::GiveUp),
            (StoreError::Fenced { owner: what(), fence: 2 }, Retry::Never, AfterFailure::GiveUp),
            (StoreError::Denied { what: what(), source: None }, Retry::After, AfterFailure::AllWait),
            (StoreError::Full { what: what(), source: None }, Retry::After, AfterFailure::AllWait),
            (StoreError::Unavailable { what: what(), source: None }, Retry::After, AfterFailure::AllWait),
            (StoreError::Timeout { what: what(), limit_ms: 1 }, Retry::After, AfterFailure::AllWait),
            (StoreError::Changed { path: "x".into() }, Retry::Now, AfterFailure::LaneWaits),
        ];
        for (error, retry, after) in table {
            assert_eq!(error.retry(), retry, "{error}");
            assert_eq!(DeliveryError::from(error).verdict(), after);
        }
    }
}
