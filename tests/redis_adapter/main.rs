//! The handle on Redis against real servers: what every call does, what two machines do to each other, and what is left after
//! a server is killed, stopped, emptied or restarted.

mod entries;
mod faults;
mod kinds;
mod leases;
mod queue;
mod results;
#[path = "../common/servers/mod.rs"]
mod servers;
mod shown;
mod turmoil;

use std::time::Duration;

use boxwright::adapters::queue::redis::{Fleet, Taken};
use boxwright::job::ids::TaskId;
use boxwright::job::service::RedisConfig;
use redis::FromRedisValue;
use servers::redis::RedisServer;

const TOPIC: &str = "training_queue";

fn config(server: &RedisServer) -> RedisConfig {
    RedisConfig { urls: vec![server.url()], heartbeat_interval_ms: 20_000, ..RedisConfig::default() }
}

fn fleet(server: &RedisServer, machine: &str) -> Fleet {
    Fleet::new(&config(server), machine, &format!("{machine}-1")).expect("a handle")
}

/// A handle whose groups are there, on a topic that is a stream.
async fn ready(server: &RedisServer, machine: &str) -> Fleet {
    let fleet = fleet(server, machine);
    run::<i64>(server, &["XGROUP", "CREATE", TOPIC, "training_group", "0", "MKSTREAM"]).ok();
    fleet.ensure_groups().await.expect("groups");
    fleet
}

fn task(id: &str) -> TaskId {
    id.parse().expect("a task id")
}

/// One command by a client of its own.
fn run<T: FromRedisValue>(server: &RedisServer, words: &[&str]) -> redis::RedisResult<T> {
    let client = redis::Client::open(server.url())?;
    let mut link = client.get_connection_with_timeout(Duration::from_secs(5))?;
    redis::cmd(words[0]).arg(&words[1..]).query(&mut link)
}

/// The same, when it must work.
fn get<T: FromRedisValue>(server: &RedisServer, words: &[&str]) -> T {
    run(server, words).unwrap_or_else(|error| panic!("{words:?}: {error}"))
}

/// Pushes a job as the documented snippet does; its id.
fn push(server: &RedisServer, name: &str, more: &[&str]) -> String {
    let mut words = vec!["XADD", TOPIC, "*", "config_path", name, "trial_number", "1"];
    words.extend(more);
    get(server, &words)
}

fn names(taken: &[Taken]) -> Vec<&str> {
    taken.iter().map(|taken| taken.fields["config_path"].as_str()).collect()
}
