//! A fleet for one test: Redis, a store, machines.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::Path;

use redis::Commands;
use serde_json::Value as Json;

use crate::servers::redis::RedisServer;
use crate::servers::s3::{self, S3Server};
use crate::world::World;

/// Heartbeats of the tests, milliseconds: a machine is dead after three.
pub const BEAT_MS: u64 = 300;

/// Seconds between two uploads of a running job.
const UPLOAD_INTERVAL: f64 = 0.2;

pub struct Park {
    pub redis: RedisServer,
    pub store: Option<S3Server>,
    /// Seconds between two uploads of a running job of machines that are made from now on.
    pub upload_interval: f64,
    /// What every machine's configuration has beside the rest.
    pub more: String,
}

impl Park {
    /// With Redis alone; `None` where there is none.
    pub fn new() -> Option<Self> {
        Some(Self {
            redis: RedisServer::start_durable()?,
            store: None,
            upload_interval: UPLOAD_INTERVAL,
            more: String::new(),
        })
    }

    /// With an object store beside it.
    pub fn with_store() -> Option<Self> {
        let store = s3::server()?;
        Some(Self { store: Some(store), ..Self::new()? })
    }

    /// With everything at an address of this machine that is no loopback one.
    pub fn at(host: Ipv4Addr) -> Option<Self> {
        let store = s3::server()?.bound_to(host.into());
        let words = ["--save", "", "--appendonly", "no", "--protected-mode", "no", "--bind"];
        // The later of two words counts.
        let host = host.to_string();
        let words = [&words[..], &["127.0.0.1", &host]].concat();
        let redis = RedisServer::start_with(&words)?;
        Some(Self { redis, store: Some(store), upload_interval: UPLOAD_INTERVAL, more: String::new() })
    }

    /// A machine of the fleet that is not started yet.
    pub fn machine(&self, name: &str) -> World {
        self.machine_at(name, &self.redis.url())
    }

    /// The same with Redis at another address: behind a proxy, say.
    pub fn machine_at(&self, name: &str, redis_url: &str) -> World {
        let endpoint = self.store.as_ref().map(|store| format!("http://{}", store.address()));
        self.machine_with(name, redis_url, endpoint.as_deref())
    }

    /// The same with the store at another address too.
    pub fn machine_with(&self, name: &str, redis_url: &str, endpoint: Option<&str>) -> World {
        let mut world = World::with(&format!(
            "redis: {{heartbeat_interval_ms: {BEAT_MS}}}\n{}{}{}",
            if self.more.contains("outbox:") {
                ""
            } else {
                "outbox: {delay_seconds: 0.1, delay_seconds_max: 0.5}\n"
            },
            if endpoint.is_some() {
                format!("store: {{upload_interval_seconds: {}}}\n", self.upload_interval)
            } else {
                "store: {folder: null}\n".to_owned()
            },
            self.more
        ));
        world.set("MACHINE_ID", name);
        world.set("REDIS_URL", redis_url);
        if let Some(endpoint) = endpoint {
            world.set("MINIO_ENDPOINT", endpoint);
            world.set("MINIO_ID", "boxwright-test");
            world.set("MINIO_SECRET_KEY", "boxwright-test-secret");
        }
        world
    }

    pub fn client(&self) -> redis::Connection {
        let client = redis::Client::open(self.redis.url()).expect("an address");
        client.get_connection().expect("Redis answers")
    }

    /// `XADD training_queue * ...`, the way producers do it.
    pub fn push(&self, fields: &[(&str, &str)]) -> String {
        self.client().xadd("training_queue", "*", fields).expect("added")
    }

    /// The messages of the stream of results, oldest first.
    pub fn results(&self) -> Vec<Json> {
        let Ok(client) = redis::Client::open(self.redis.url()) else { return Vec::new() };
        let Ok(mut connection) = client.get_connection() else { return Vec::new() };
        let rows: redis::RedisResult<redis::streams::StreamRangeReply> =
            connection.xrange_all("results_queue");
        let Ok(rows) = rows else { return Vec::new() };
        rows.ids
            .iter()
            .filter_map(|entry| entry.get::<String>("result"))
            .map(|text| serde_json::from_str(&text).expect("a result is JSON"))
            .collect()
    }

    pub fn results_of(&self, task_id: &str) -> Vec<Json> {
        self.results().into_iter().filter(|result| result["task_id"] == task_id).collect()
    }

    /// Waits for the one result of a job.
    pub fn wait_result(&self, world: &World, task_id: &str) -> Json {
        let found =
            world.wait(&format!("a result of {task_id}"), || self.results_of(task_id).first().cloned());
        assert_eq!(self.results_of(task_id).len(), 1, "one result");
        found
    }

    pub fn hash(&self, key: &str) -> BTreeMap<String, String> {
        self.client().hgetall(key).unwrap_or_default()
    }

    /// Entries that were delivered and not acknowledged, or not delivered.
    pub fn queue_length(&self) -> usize {
        self.client().xlen("training_queue").unwrap_or(0)
    }
}

/// A job for the stub trainer that leaves files.
pub fn stub_job(task_id: &str, stub: &str) -> String {
    crate::world::job(task_id, &format!("files=1,{stub}"))
}

/// Writes a job where producers say that it lies.
pub fn job_file(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).expect("writable");
    path.to_string_lossy().into_owned()
}
