//! Why Redis did not do it, and what to do then.

use redis::{ErrorKind, RedisError, ServerErrorKind};

use crate::job::causes;

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// What to do after a [`FleetError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// It would fail again until somebody changes something.
    Never,
    /// The same call after a while.
    After,
    /// The same call after a while; the connection is dropped and made again by it.
    Reconnect,
}

/// Why a call to Redis failed. Addresses are shown without user and password.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// The configuration does not fit together.
    #[error("redis configuration: {what}")]
    Config {
        /// What, and what was seen.
        what: String,
        /// Why.
        #[source]
        source: Option<Cause>,
    },
    /// No connection, or it broke.
    #[error("redis at {address} is not reachable ({what})")]
    Unreachable {
        /// Where.
        address: String,
        /// What was to be done.
        what: &'static str,
        /// Why.
        #[source]
        source: Cause,
    },
    /// No answer in time.
    #[error("redis at {address} did not answer within {limit_ms} ms ({what})")]
    Timeout {
        /// Where.
        address: String,
        /// What was to be done.
        what: &'static str,
        /// The limit.
        limit_ms: u64,
    },
    /// User or password are not accepted, or are missing.
    #[error("redis at {address} does not accept the user or the password")]
    Auth {
        /// Where.
        address: String,
        /// What it said.
        #[source]
        source: Cause,
    },
    /// The user may not do this.
    #[error("redis at {address} does not permit it: {what}")]
    NoPermission {
        /// Where.
        address: String,
        /// What was to be done.
        what: &'static str,
        /// What it said, with the command or key.
        #[source]
        source: Cause,
    },
    /// The consumer group, or the stream with it, is gone: make it again and go on.
    #[error("the consumer group is gone ({what})")]
    NoGroup {
        /// What was to be done.
        what: &'static str,
        /// What the server said.
        #[source]
        source: Option<Cause>,
    },
    /// A key holds something else than was expected.
    #[error("a key of redis has another type than expected ({what})")]
    WrongType {
        /// What was to be done.
        what: &'static str,
        /// What the server said.
        #[source]
        source: Option<Cause>,
    },
    /// The server is there and cannot do it now: it loads, has no memory, is a replica, or its cluster is not whole.
    #[error("redis at {address} is not ready ({what})")]
    NotReady {
        /// Where.
        address: String,
        /// What was to be done.
        what: &'static str,
        /// What it said.
        #[source]
        source: Cause,
    },
    /// The server refused the command.
    #[error("redis at {address} refused: {what}")]
    Refused {
        /// Where.
        address: String,
        /// What was to be done.
        what: &'static str,
        /// What it said.
        #[source]
        source: Cause,
    },
    /// The answer has another form than expected.
    #[error("redis answered in an unexpected form ({what})")]
    Answer {
        /// What was to be done.
        what: &'static str,
        /// What was wrong.
        #[source]
        source: Option<Cause>,
    },
}

impl FleetError {
    /// What to do now.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Config { .. } => Retry::Never,
            Self::NoPermission { .. } | Self::Refused { .. } | Self::WrongType { .. } => Retry::Never,
            Self::Answer { .. } => Retry::Never,
            // The caller makes the group again before it repeats the call.
            Self::NoGroup { .. } => Retry::After,
            Self::Unreachable { .. } | Self::Timeout { .. } => Retry::Reconnect,
            // A password may be changed on either side while we run; a replica that was the master is left alone.
            Self::Auth { .. } | Self::NotReady { .. } => Retry::Reconnect,
        }
    }

    /// True when the consumer group is to be made again.
    pub fn is_no_group(&self) -> bool {
        matches!(self, Self::NoGroup { .. })
    }

    /// The error and its causes in one line.
    pub fn chain(&self) -> String {
        causes::chain(self)
    }

    pub(super) fn config(what: impl Into<String>) -> Self {
        Self::Config { what: what.into(), source: None }
    }

    pub(super) fn answer(what: &'static str, source: RedisError) -> Self {
        Self::Answer { what, source: Some(Box::new(source)) }
    }

    /// Sorts an error of the crate.
    pub(super) fn sort(error: RedisError, what: &'static str, address: &str, limit_ms: u64) -> Self {
        let address = address.to_owned();
        if error.is_timeout() {
            return Self::Timeout { address, what, limit_ms };
        }
        let text = error.to_string();
        let says = |word: &str| error.code() == Some(word) || text.contains(word);
        match error.kind() {
            ErrorKind::InvalidClientConfig | ErrorKind::EmptySentinelList | ErrorKind::RESP3NotSupported => {
                Self::Config { what: what.to_owned(), source: Some(Box::new(error)) }
            }
            ErrorKind::Io
            | ErrorKind::MasterNameNotFoundBySentinel
            | ErrorKind::NoValidReplicasFoundBySentinel
            | ErrorKind::ClusterConnectionNotFound => {
                Self::Unreachable { address, what, source: Box::new(error) }
            }
            ErrorKind::Parse => Self::Unreachable { address, what, source: Box::new(error) },
            ErrorKind::UnexpectedReturnType => Self::answer(what, error),
            // Errors inside a script keep their code only on newer servers, hence the text.
            _ if says("NOGROUP") => Self::NoGroup { what, source: Some(Box::new(error)) },
            _ if says("WRONGTYPE") => Self::WrongType { what, source: Some(Box::new(error)) },
            ErrorKind::AuthenticationFailed => Self::Auth { address, source: Box::new(error) },
            _ if says("NOAUTH") || says("WRONGPASS") => Self::Auth { address, source: Box::new(error) },
            ErrorKind::Server(ServerErrorKind::NoPerm) => {
                Self::NoPermission { address, what, source: Box::new(error) }
            }
            _ if says("NOPERM") || says("No permission") || says("can't access at least one of the keys") => {
                Self::NoPermission { address, what, source: Box::new(error) }
            }
            ErrorKind::Server(
                ServerErrorKind::BusyLoading
                | ServerErrorKind::TryAgain
                | ServerErrorKind::ClusterDown
                | ServerErrorKind::MasterDown
                | ServerErrorKind::ReadOnly
                | ServerErrorKind::Moved
                | ServerErrorKind::Ask,
            ) => Self::NotReady { address, what, source: Box::new(error) },
            _ if [
                "LOADING",
                "OOM",
                "MISCONF",
                "NOREPLICAS",
                "READONLY",
                "MASTERDOWN",
                "CLUSTERDOWN",
                "BUSY ",
                "max number of clients",
            ]
            .iter()
            .any(|word| says(word)) =>
            {
                Self::NotReady { address, what, source: Box::new(error) }
            }
            _ => Self::Refused { address, what, source: Box::new(error) },
        }
    }
}
