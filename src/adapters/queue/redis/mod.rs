//! Redis: the queue that machines share, leases, results, and what is shown of running jobs.
//!
//! [`Fleet`] is a handle; every method is one question to the server, or a few that may each be repeated. Nothing here waits
//! for a server that is away: a call ends within its limits, and says by [`FleetError::retry`] what to do. A connection
//! is made by the first call that needs it and dropped by the first that fails on it.
//!
//! What has to be decided and done at once is a script in `scripts/`, run inside the server. `docs/redis-keys.md` is
//! the table of keys. Servers from version 6.2 on are supported: one server, one behind sentinels, or a cluster.

mod entries;
mod error;
mod keys;
mod lease;
mod link;
mod presence;
mod results;
mod scripts;
mod shown;
mod side;
mod sink;
mod take;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use redis::{Cmd, FromRedisValue, Pipeline, RedisError, Script, ScriptInvocation, Value};

pub use entries::Stolen;
pub use error::{FleetError, Retry};
pub use lease::{Acquired, Renewed};
pub use presence::{Announced, GpuOwner, Machine, SlotReport, WorkerView};
pub use results::Published;
pub use shown::{LogPart, Logged};
pub use side::{CacheCounts, Warning};
pub use sink::RedisSink;
pub use take::{QueueKind, Taken};

use crate::job::service::RedisConfig;
use keys::Keys;
use link::{Link, Server};

/// Limit of making a connection.
const CONNECT_LIMIT: Duration = Duration::from_millis(2_000);
/// Limit of an answer.
const ANSWER_LIMIT: Duration = Duration::from_millis(2_000);
/// Longest single wait inside the server; a longer one is several.
const WAIT_SLICE: Duration = Duration::from_millis(1_000);

/// Calls that are on their way at once.
pub const TOGETHER_MAX: usize = 64;

/// A handle on the Redis that the fleet shares. Clones share connections.
#[derive(Clone)]
pub struct Fleet {
    inner: Arc<Inner>,
}

struct Inner {
    server: Server,
    keys: Keys,
    config: RedisConfig,
    machine_id: String,
    incarnation: String,
    /// What this machine had not finished was read since the start.
    has_read_pending: AtomicBool,
    calls: Line,
    waiting: Line,
    /// Which source is asked first alternates, so that none starves.
    turn: AtomicUsize,
    /// Where the search for dead consumers' entries goes on, by stream.
    steal_from: std::sync::Mutex<[String; 3]>,
    cache_hits: AtomicU64,
    cache_misses: AtomicU64,
}

/// Place of a connection.
#[derive(Default)]
struct Line {
    /// The connection, with the number of its making.
    link: std::sync::Mutex<Option<(u64, Link)>>,
    /// Held by the one that makes it.
    making: tokio::sync::Mutex<()>,
    made: AtomicU64,
}

impl Line {
    fn link(&self) -> std::sync::MutexGuard<'_, Option<(u64, Link)>> {
        // A panic elsewhere leaves a connection or none, both of which are fine.
        self.link.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// What is asked.
enum Request<'a> {
    Command(&'a Cmd),
    Pipeline(&'a Pipeline),
    Script(&'a ScriptInvocation<'a>),
}

impl std::fmt::Debug for Fleet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fleet")
            .field("address", &self.inner.server.address)
            .field("machine_id", &self.inner.machine_id)
            .finish_non_exhaustive()
    }
}

impl Fleet {
    /// A handle for the machine `machine_id` (stable over restarts: it is the consumer's name) and this start of its
    /// service, `incarnation`. Does no network; reads the file of certificates.
    ///
    /// # Errors
    /// [`FleetError::Config`] for addresses, certificates or combinations that cannot work.
    pub fn new(config: &RedisConfig, machine_id: &str, incarnation: &str) -> Result<Self, FleetError> {
        let server = Server::new(config)?;
        let keys = Keys::new(config, server.is_cluster());
        Ok(Self {
            inner: Arc::new(Inner {
                keys,
                server,
                config: config.clone(),
                machine_id: machine_id.to_owned(),
                incarnation: incarnation.to_owned(),
                has_read_pending: AtomicBool::new(false),
                calls: Line::default(),
                waiting: Line::default(),
                turn: AtomicUsize::new(0),
                steal_from: std::sync::Mutex::new(std::array::from_fn(|_| "0-0".to_owned())),
                cache_hits: AtomicU64::new(0),
                cache_misses: AtomicU64::new(0),
            }),
        })
    }

    /// Where the server is, for messages: hosts and ports only.
    pub fn address(&self) -> &str {
        &self.inner.server.address
    }

    /// The machine that this handle speaks for.
    pub fn machine_id(&self) -> &str {
        &self.inner.machine_id
    }

    /// Asks for a sign of life.
    ///
    /// # Errors
    /// As every call: the server is away, slow, or refuses.
    pub async fn ping(&self) -> Result<(), FleetError> {
        let _: Value = self.command("ping", &redis::cmd("PING")).await?;
        Ok(())
    }

    /// Drops the connections; the next call makes them again.
    pub fn disconnect(&self) {
        *self.inner.calls.link() = None;
        *self.inner.waiting.link() = None;
    }

    fn keys(&self) -> &Keys {
        &self.inner.keys
    }

    fn is_cluster(&self) -> bool {
        self.inner.server.is_cluster()
    }

    /// The connection of `line`, made if there is none, with the number of its making.
    async fn link(&self, line: &Line, what: &'static str) -> Result<(u64, Link), FleetError> {
        if let Some(held) = line.link().clone() {
            return Ok(held);
        }
        let server = &self.inner.server;
        let connect = async {
            let _making = line.making.lock().await;
            // Another call may have made one while this one waited.
            if let Some(held) = line.link().clone() {
                return Ok(held);
            }
            let link = server.connect(ANSWER_LIMIT + WAIT_SLICE).await?;
            let made = (line.made.fetch_add(1, Ordering::Relaxed), link);
            *line.link() = Some(made.clone());
            Ok(made)
        };
        let limit_ms = CONNECT_LIMIT.as_millis() as u64;
        match tokio::time::timeout(CONNECT_LIMIT, connect).await {
            Ok(made) => made.map_err(|error| FleetError::sort(error, what, &server.address, limit_ms)),
            Err(_) => Err(FleetError::Timeout { address: server.address.clone(), what, limit_ms }),
        }
    }

    async fn ask<T: FromRedisValue>(
        &self,
        line: &Line,
        what: &'static str,
        limit: Duration,
        request: Request<'_>,
    ) -> Result<T, FleetError> {
        let (number, mut link) = self.link(line, what).await?;
        let answer = async {
            match request {
                Request::Command(command) => command.query_async(&mut link).await,
                Request::Pipeline(pipeline) => pipeline.query_async(&mut link).await,
                Request::Script(script) => script.invoke_async(&mut link).await,
            }
        };
        let limit_ms = limit.as_millis() as u64;
        let address = &self.inner.server.address;
        let error = match tokio::time::timeout(limit, answer).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => FleetError::sort(error, what, address, limit_ms),
            Err(_) => FleetError::Timeout { address: address.clone(), what, limit_ms },
        };
        if error.retry() == Retry::Reconnect {
            let mut place = line.link();
            // Another call may have made a new one in the meantime.
            if place.as_ref().is_some_and(|(held, _)| *held == number) {
                *place = None;
            }
        }
        Err(error)
    }

    async fn command<T: FromRedisValue>(&self, what: &'static str, command: &Cmd) -> Result<T, FleetError> {
        self.ask(&self.inner.calls, what, ANSWER_LIMIT, Request::Command(command)).await
    }

    /// Commands that all concern one key (or keys of one slot).
    async fn pipeline<T: FromRedisValue>(
        &self,
        what: &'static str,
        pipeline: &Pipeline,
    ) -> Result<T, FleetError> {
        self.ask(&self.inner.calls, what, ANSWER_LIMIT, Request::Pipeline(pipeline)).await
    }

    /// Commands that concern any keys: sent together to one server, each to its node of a cluster.
    async fn many<T: FromRedisValue>(
        &self,
        what: &'static str,
        commands: Vec<Cmd>,
    ) -> Result<Vec<T>, FleetError> {
        if commands.is_empty() {
            return Ok(Vec::new());
        }
        if self.is_cluster() {
            // In order, but not one after the other.
            let asked = commands.into_iter().map(|command| async move { self.command(what, &command).await });
            return futures_util::stream::iter(asked).buffered(TOGETHER_MAX).try_collect().await;
        }
        let mut pipeline = Pipeline::with_capacity(commands.len());
        for command in commands {
            pipeline.add_command(command);
        }
        let answers: Vec<Value> = self.pipeline(what, &pipeline).await?;
        answers.into_iter().map(|value| form(what, value)).collect()
    }

    /// Runs a script over `keys` with `arguments`.
    async fn script<T: FromRedisValue>(
        &self,
        what: &'static str,
        script: &Script,
        keys: &[&str],
        arguments: &[&[u8]],
    ) -> Result<T, FleetError> {
        let mut invocation = script.prepare_invoke();
        for key in keys {
            invocation.key(*key);
        }
        for argument in arguments {
            invocation.arg(*argument);
        }
        self.ask(&self.inner.calls, what, ANSWER_LIMIT, Request::Script(&invocation)).await
    }
}

/// Brings an answer into the form that is expected.
fn form<T: FromRedisValue>(what: &'static str, value: Value) -> Result<T, FleetError> {
    T::from_redis_value(value).map_err(|error| FleetError::answer(what, RedisError::from(error)))
}

/// Bytes from outside as text; what is no text is shown as such.
fn lossy(bytes: Vec<u8>) -> String {
    match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    }
}

fn now_unix_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as i64)
}
