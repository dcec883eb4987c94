//! The side services of a worker: Redis, the object store, the tracking server, and the outbox before them.
//!
//! Secrets come from the environment (`NAME`), from a file that the environment names (`NAME_FILE`), or from a file that
//! the configuration names; the configuration itself never holds one.

use std::path::{Path, PathBuf};

use super::{block, flag, optional_path, optional_text, path, seconds, text, whole};
use crate::job::secret::Secret;
use crate::yaml::{self, Faults, MapReader, Node};

/// How the addresses of Redis are to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RedisKind {
    /// One server.
    Single,
    /// Sentinels that know where the master is.
    Sentinel,
    /// Nodes of a cluster.
    Cluster,
}

/// The queue that machines share, and where progress is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedisConfig {
    /// Addresses (`redis://host:6379/0`, `rediss://` for TLS); empty means that there is no Redis.
    pub urls: Vec<String>,
    /// What they are addresses of.
    pub kind: RedisKind,
    /// Name of the master that sentinels watch.
    pub sentinel_service: String,
    /// User of the access control list.
    pub username: Option<String>,
    /// Password of that user, or of the server.
    pub password: Option<Secret>,
    /// Certificates (PEM) that are trusted in place of the usual ones.
    pub ca_file: Option<PathBuf>,
    /// Key of the queue: a stream, or a list.
    pub topic: String,
    /// Key of the stream of results.
    pub result_topic: String,
    /// Consumer group of the stream.
    pub group: String,
    /// Jobs that are taken beyond the free slots.
    pub prefetch: usize,
    /// Between two signs of life; a machine is dead after three without.
    pub heartbeat_interval_ms: u64,
    /// How long the progress of an ended job is shown.
    pub progress_ttl_ms: u64,
    /// How long the log stream of an ended job is kept.
    pub log_ttl_ms: u64,
    /// Lines kept in the log stream of one job.
    pub log_lines_max: usize,
    /// Also write progress in the transposed form of the older workers.
    pub transposed_progress: bool,
}

/// Where checkpoints and run files are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreConfig {
    /// Folder of the embedded store; `None` together with no endpoint means that nothing is stored.
    pub folder: Option<PathBuf>,
    /// Address of an S3-compatible server (`http://host:9000`); it is used in place of the folder.
    pub endpoint: Option<String>,
    /// Bucket of runs.
    pub bucket: String,
    /// Bucket of promoted weights.
    pub better_bucket: String,
    /// Region that requests are signed for.
    pub region: String,
    /// Bucket in the path instead of the host name.
    pub is_path_style: bool,
    /// Access key.
    pub id: Option<Secret>,
    /// Secret key.
    pub secret: Option<Secret>,
    /// Certificates (PEM) that are trusted beside the usual ones.
    pub ca_file: Option<PathBuf>,
    /// Least time between two uploads of the newest checkpoint of a running job.
    pub upload_interval_ms: u64,
    /// Newest checkpoints kept of a job.
    pub keep_last: usize,
    /// Also keep the weights of every so many epochs; 0 for none.
    pub keep_every_epochs: u32,
    /// Keep the best weights.
    pub keep_best: bool,
    /// Bytes of one part of an upload.
    pub part_bytes: u64,
    /// Where datasets from the store are staged.
    pub datasets_dir: PathBuf,
}

impl StoreConfig {
    /// True when there is a store of either kind.
    pub fn is_on(&self) -> bool {
        self.endpoint.is_some() || self.folder.is_some()
    }
}

/// The tracking server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MlflowConfig {
    /// Its address; `None` means that there is none.
    pub tracking_uri: Option<String>,
    /// User of basic authentication.
    pub username: Option<String>,
    /// Password of that user.
    pub password: Option<Secret>,
    /// Bearer token.
    pub token: Option<Secret>,
    /// Certificates (PEM) that are trusted beside the usual ones.
    pub ca_file: Option<PathBuf>,
    /// Least time between two step samples of a job.
    pub step_interval_ms: u64,
    /// Between two samples of the machine; 0 for none.
    pub system_metrics_interval_ms: u64,
    /// Send the small files of a run.
    pub is_sending_artifacts: bool,
    /// Enter completed runs in the model registry.
    pub is_registering: bool,
}

/// The outbox: what is still to be delivered to side services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutboxConfig {
    /// Entries kept; beyond, what may be lost is dropped, oldest first.
    pub items_max: usize,
    /// First delay after a failed delivery.
    pub delay_ms: u64,
    /// Longest delay.
    pub delay_ms_max: u64,
}

impl Default for RedisConfig {
    fn default() -> Self {
        Self {
            urls: Vec::new(),
            kind: RedisKind::Single,
            sentinel_service: "mymaster".into(),
            username: None,
            password: None,
            ca_file: None,
            topic: "training_queue".into(),
            result_topic: "results_queue".into(),
            group: "training_group".into(),
            prefetch: 0,
            heartbeat_interval_ms: 5_000,
            progress_ttl_ms: 30 * 60_000,
            log_ttl_ms: 3_600_000,
            log_lines_max: 10_000,
            transposed_progress: false,
        }
    }
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            folder: Some("store".into()),
            endpoint: None,
            bucket: "models".into(),
            better_bucket: "better-models".into(),
            region: "us-east-1".into(),
            is_path_style: true,
            id: None,
            secret: None,
            ca_file: None,
            upload_interval_ms: 60_000,
            keep_last: 2,
            keep_every_epochs: 0,
            keep_best: true,
            part_bytes: 8 << 20,
            datasets_dir: "state/datasets".into(),
        }
    }
}

impl Default for MlflowConfig {
    fn default() -> Self {
        Self {
            tracking_uri: None,
            username: None,
            password: None,
            token: None,
            ca_file: None,
            step_interval_ms: 10_000,
            system_metrics_interval_ms: 15_000,
            is_sending_artifacts: true,
            is_registering: true,
        }
    }
}

impl Default for OutboxConfig {
    fn default() -> Self {
        Self { items_max: 100_000, delay_ms: 1_000, delay_ms_max: 60_000 }
    }
}

/// Reads a secret from a file, without the line end.
fn secret_file(path: &Path, key: &str, faults: &mut Faults) -> Option<Secret> {
    match std::fs::read_to_string(path) {
        Ok(text) => Some(Secret::new(text.trim_end_matches(['\r', '\n']))),
        Err(error) => {
            faults.add(0, key, format!("cannot read the secret in {}: {error}", path.display()));
            None
        }
    }
}

fn secret_key(block: &mut MapReader<'_>, key: &str, target: &mut Option<Secret>, faults: &mut Faults) {
    let mut file = None;
    optional_path(block, key, &mut file, faults);
    if let Some(file) = file {
        *target = secret_file(&file, &block.path_of(key), faults);
    }
}

impl RedisConfig {
    /// True when there is a Redis to use.
    pub fn is_on(&self) -> bool {
        !self.urls.is_empty()
    }

    /// Time without a sign of life after which a machine is dead.
    pub fn lease_ms(&self) -> u64 {
        self.heartbeat_interval_ms * 3
    }

    pub(super) fn read(&mut self, reader: &mut MapReader<'_>, faults: &mut Faults) {
        let Some(mut block) = block(reader, "redis", faults) else { return };
        let mut url = None;
        optional_text(&mut block, "url", &mut url, faults);
        if let Some(url) = url {
            self.urls = addresses(&url);
            for url in self.urls.iter().filter(|url| !is_redis_address(url)) {
                let message = format!("got {:?}; allowed: redis://HOST:PORT/DB or rediss://", masked(url));
                faults.add(0, "redis.url", message);
            }
        }
        if let Some(node) = block.set("kind") {
            match faults.choice(node, "redis.kind", &["single", "sentinel", "cluster"]) {
                Some("sentinel") => self.kind = RedisKind::Sentinel,
                Some("cluster") => self.kind = RedisKind::Cluster,
                _ => self.kind = RedisKind::Single,
            }
        }
        text(&mut block, "sentinel_service", &mut self.sentinel_service, faults);
        optional_text(&mut block, "username", &mut self.username, faults);
        secret_key(&mut block, "password_file", &mut self.password, faults);
        optional_path(&mut block, "ca_file", &mut self.ca_file, faults);
        text(&mut block, "topic", &mut self.topic, faults);
        text(&mut block, "result_topic", &mut self.result_topic, faults);
        text(&mut block, "group", &mut self.group, faults);
        for (key, target) in [("prefetch", &mut self.prefetch), ("log_lines_max", &mut self.log_lines_max)] {
            let mut number = *target as u64;
            whole(&mut block, key, &mut number, 0, 1_000_000, faults);
            *target = number as usize;
        }
        whole(&mut block, "heartbeat_interval_ms", &mut self.heartbeat_interval_ms, 100, 3_600_000, faults);
        seconds(&mut block, "progress_ttl_seconds", &mut self.progress_ttl_ms, faults);
        seconds(&mut block, "log_ttl_seconds", &mut self.log_ttl_ms, faults);
        flag(&mut block, "transposed_progress", &mut self.transposed_progress, faults);
        block.finish(faults);
    }

    pub(super) fn environment(&mut self, set: &dyn Fn(&str) -> Option<String>, faults: &mut Faults) {
        let mut has_password = false;
        if let Some(url) = set("REDIS_URL") {
            self.urls = addresses(&url);
            // That of sentinels is not the one of the server that they watch.
            has_password =
                self.kind != RedisKind::Sentinel && self.urls.iter().any(|url| has_password_in(url));
        } else if let Some(host) = set("REDIS_HOST") {
            let port = set("REDIS_PORT").unwrap_or_else(|| "6379".into());
            let db = set("REDIS_DB").unwrap_or_else(|| "0".into());
            self.urls = vec![format!("redis://{host}:{port}/{db}")];
        }
        for url in self.urls.iter().filter(|url| !is_redis_address(url)) {
            let message = format!("got {:?}; allowed: redis://HOST:PORT/DB or rediss://", masked(url));
            faults.add(0, "REDIS_URL", message);
        }
        if let Some(name) = set("REDIS_USERNAME") {
            self.username = Some(name);
        }
        // The password in an address that a user sets goes before a file that a container comes with.
        if set("REDIS_PASSWORD").is_some() || !has_password {
            secret_variable("REDIS_PASSWORD", &mut self.password, set, faults);
        }
        for (name, target) in [("TOPIC", &mut self.topic), ("RESULT_TOPIC", &mut self.result_topic)] {
            if let Some(value) = set(name) {
                *target = value;
            }
        }
        if let Some(value) = set("HEARTBEAT_INTERVAL") {
            let node = Node::synthetic(yaml::Value::String(value));
            if let Some(seconds) = faults.float(&node, "HEARTBEAT_INTERVAL", 0.1, 3600.0) {
                self.heartbeat_interval_ms = (seconds * 1000.0) as u64;
            }
        }
    }
}

fn addresses(text: &str) -> Vec<String> {
    text.split(',').map(|url| url.trim().to_owned()).filter(|url| !url.is_empty()).collect()
}

fn is_redis_address(url: &str) -> bool {
    ["redis://", "rediss://", "redis+unix://", "unix://"].iter().any(|scheme| url.starts_with(scheme))
}

/// True for `scheme://USER:PASSWORD@..` with a password.
fn has_password_in(url: &str) -> bool {
    let (_, rest) = url.split_once("://").unwrap_or_default();
    let authority = rest.split('/').next().unwrap_or_default();
    let user = authority.rsplit_once('@').map(|(user, _)| user);
    user.and_then(|user| user.split_once(':')).is_some_and(|(_, password)| !password.is_empty())
}

/// The address without what may be a password.
fn masked(url: &str) -> String {
    crate::job::spec::masked(&serde_json::Value::from(url)).as_str().unwrap_or_default().to_owned()
}

/// A secret from the variable `name`, or from the file that `name_FILE` names: what a user sets outright goes before the
/// files that a container comes with.
fn secret_variable(
    name: &str,
    target: &mut Option<Secret>,
    set: &dyn Fn(&str) -> Option<String>,
    faults: &mut Faults,
) {
    if let Some(value) = set(name) {
        *target = Some(Secret::new(value));
    } else if let Some(file) = set(&format!("{name}_FILE")) {
        *target = secret_file(Path::new(&file), &format!("{name}_FILE"), faults);
    }
}

impl StoreConfig {
    pub(super) fn read(&mut self, reader: &mut MapReader<'_>, faults: &mut Faults) {
        let Some(mut block) = block(reader, "store", faults) else { return };
        optional_path(&mut block, "folder", &mut self.folder, faults);
        if block.get("folder").is_some_and(Node::is_null) {
            self.folder = None;
        }
        optional_text(&mut block, "endpoint", &mut self.endpoint, faults);
        text(&mut block, "bucket", &mut self.bucket, faults);
        text(&mut block, "better_bucket", &mut self.better_bucket, faults);
        text(&mut block, "region", &mut self.region, faults);
        flag(&mut block, "path_style", &mut self.is_path_style, faults);
        secret_key(&mut block, "id_file", &mut self.id, faults);
        secret_key(&mut block, "secret_file", &mut self.secret, faults);
        optional_path(&mut block, "ca_file", &mut self.ca_file, faults);
        seconds(&mut block, "upload_interval_seconds", &mut self.upload_interval_ms, faults);
        let mut number = self.keep_last as u64;
        whole(&mut block, "keep_last", &mut number, 1, 1000, faults);
        self.keep_last = number as usize;
        let mut number = u64::from(self.keep_every_epochs);
        whole(&mut block, "keep_every_epochs", &mut number, 0, 1_000_000, faults);
        self.keep_every_epochs = number as u32;
        flag(&mut block, "keep_best", &mut self.keep_best, faults);
        // The protocol's limits: 5 MiB to 5 GiB.
        whole(&mut block, "part_bytes", &mut self.part_bytes, 5 << 20, 5 << 30, faults);
        path(&mut block, "datasets_dir", &mut self.datasets_dir, faults);
        self.check("store.endpoint", faults);
        block.finish(faults);
    }

    fn check(&self, key: &str, faults: &mut Faults) {
        let fits = |url: &String| url.starts_with("http://") || url.starts_with("https://");
        if let Some(endpoint) = self.endpoint.as_ref().filter(|url| !fits(url)) {
            let message = format!("got {:?}; allowed: http://HOST:PORT or https://", masked(endpoint));
            faults.add(0, key, message);
        }
    }

    pub(super) fn environment(&mut self, set: &dyn Fn(&str) -> Option<String>, faults: &mut Faults) {
        if let Some(endpoint) = set("MINIO_ENDPOINT") {
            // The older workers write the address without a scheme.
            let has_scheme = endpoint.contains("://");
            self.endpoint = Some(if has_scheme { endpoint } else { format!("http://{endpoint}") });
            self.check("MINIO_ENDPOINT", faults);
        }
        if let Some(bucket) = set("MINIO_BUCKET") {
            self.bucket = bucket;
        }
        if let Some(region) = set("AWS_REGION") {
            self.region = region;
        }
        // Never the name of one pair with the key of another.
        const PAIRS: [[&str; 2]; 2] =
            [["MINIO_ID", "MINIO_SECRET_KEY"], ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]];
        let outright = |pair: &&[&str; 2]| pair.iter().any(|name| set(name).is_some());
        let of_files = |pair: &&[&str; 2]| pair.iter().any(|name| set(&format!("{name}_FILE")).is_some());
        let pair = PAIRS.iter().find(outright).or_else(|| PAIRS.iter().find(of_files));
        if let Some([id, secret]) = pair {
            secret_variable(id, &mut self.id, set, faults);
            secret_variable(secret, &mut self.secret, set, faults);
        }
    }
}

impl MlflowConfig {
    pub(super) fn read(&mut self, reader: &mut MapReader<'_>, faults: &mut Faults) {
        let Some(mut block) = block(reader, "mlflow", faults) else { return };
        optional_text(&mut block, "tracking_uri", &mut self.tracking_uri, faults);
        optional_text(&mut block, "username", &mut self.username, faults);
        secret_key(&mut block, "password_file", &mut self.password, faults);
        secret_key(&mut block, "token_file", &mut self.token, faults);
        optional_path(&mut block, "ca_file", &mut self.ca_file, faults);
        seconds(&mut block, "step_interval_seconds", &mut self.step_interval_ms, faults);
        if let Some(node) = block.set("system_metrics_interval_seconds") {
            let key = "mlflow.system_metrics_interval_seconds";
            if let Some(seconds) = faults.float(node, key, 0.0, 86_400.0) {
                self.system_metrics_interval_ms = (seconds * 1000.0) as u64;
            }
        }
        flag(&mut block, "artifacts", &mut self.is_sending_artifacts, faults);
        flag(&mut block, "register", &mut self.is_registering, faults);
        self.check("mlflow.tracking_uri", faults);
        block.finish(faults);
    }

    fn check(&self, key: &str, faults: &mut Faults) {
        let fits = |url: &String| url.starts_with("http://") || url.starts_with("https://");
        if let Some(uri) = self.tracking_uri.as_ref().filter(|url| !fits(url)) {
            let message = format!("got {:?}; allowed: http://HOST:PORT or https://", masked(uri));
            faults.add(0, key, message);
        }
    }

    pub(super) fn environment(&mut self, set: &dyn Fn(&str) -> Option<String>, faults: &mut Faults) {
        if let Some(uri) = set("MLFLOW_TRACKING_URI") {
            self.tracking_uri = Some(uri);
            self.check("MLFLOW_TRACKING_URI", faults);
        }
        if let Some(name) = set("MLFLOW_TRACKING_USERNAME") {
            self.username = Some(name);
        }
        secret_variable("MLFLOW_TRACKING_PASSWORD", &mut self.password, set, faults);
        secret_variable("MLFLOW_TRACKING_TOKEN", &mut self.token, set, faults);
    }
}

impl OutboxConfig {
    pub(super) fn read(&mut self, reader: &mut MapReader<'_>, faults: &mut Faults) {
        let Some(mut block) = block(reader, "outbox", faults) else { return };
        let mut number = self.items_max as u64;
        whole(&mut block, "items_max", &mut number, 100, 10_000_000, faults);
        self.items_max = number as usize;
        seconds(&mut block, "delay_seconds", &mut self.delay_ms, faults);
        seconds(&mut block, "delay_seconds_max", &mut self.delay_ms_max, faults);
        block.finish(faults);
    }
}

#[cfg(test)]
mod tests {
    use super::super::ServiceConfig;

    fn load(text: &str, variable: impl Fn(&str) -> Option<String>) -> Result<ServiceConfig, String> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s.yaml");
        std::fs::write(&path, text).expect("writable");
        ServiceConfig::load(Some(&path), variable).map_err(|error| error.to_string())
    }

    #[test]
    fn addresses_and_secrets_come_from_the_environment_and_from_files() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("word");
        std::fs::write(&file, "s3cret\n").expect("writable");
        let name = file.to_string_lossy().into_owned();
        let config = load("strict: no\n", |variable| match variable {
            "REDIS_HOST" => Some("r".to_owned()),
            "REDIS_PORT" => Some("1".to_owned()),
            "REDIS_PASSWORD_FILE" => Some(name.clone()),
            "MINIO_ENDPOINT" => Some("m:9000".to_owned()),
            "MINIO_ID" => Some("me".to_owned()),
            "MLFLOW_TRACKING_URI" => Some("http://t:5000".to_owned()),
            "HEARTBEAT_INTERVAL" => Some("20".to_owned()),
            _ => None,
        })
        .expect("valid");
        assert_eq!(config.redis.urls, ["redis://r:1/0"]);
        assert_eq!(config.redis.password.as_ref().map(|word| word.expose()), Some("s3cret"));
        assert_eq!((config.redis.heartbeat_interval_ms, config.redis.lease_ms()), (20_000, 60_000));
        assert_eq!(config.store.endpoint.as_deref(), Some("http://m:9000"));
        assert_eq!(config.mlflow.tracking_uri.as_deref(), Some("http://t:5000"));
        assert!(!format!("{config:?}").contains("s3cret"));
    }

    #[test]
    fn what_is_set_outright_goes_before_files_of_secrets() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("word");
        std::fs::write(&file, "of the file").expect("writable");
        let file = file.to_string_lossy();
        let with = |more: &[(&str, &str)]| {
            let files = ["REDIS_PASSWORD_FILE", "MINIO_ID_FILE", "MINIO_SECRET_KEY_FILE"];
            let files = files.map(|name| (name, &*file));
            let set: Vec<_> =
                more.iter().chain(&files).map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
            let find =
                |name: &str| set.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
            load("strict: no\n", find).expect("valid")
        };
        let words = |config: &ServiceConfig| {
            let secrets = [&config.redis.password, &config.store.id, &config.store.secret];
            secrets.map(|secret| secret.as_ref().map(|word| word.expose().to_owned()))
        };
        let of_file = || Some("of the file".to_owned());
        assert_eq!(words(&with(&[])), [of_file(), of_file(), of_file()]);
        let addresses =
            [("redis://:mine@h:1/0", None), ("rediss://me@h:1", of_file()), ("redis://h", of_file())];
        for (url, password) in addresses {
            assert_eq!(words(&with(&[("REDIS_URL", url)]))[0], password, "{url}");
        }
        let both = with(&[("REDIS_URL", "redis://:mine@h:1/0"), ("REDIS_PASSWORD", "outright")]);
        assert_eq!(words(&both)[0].as_deref(), Some("outright"));
        let sentinels = load("redis: {kind: sentinel}\n", |name| match name {
            "REDIS_URL" => Some("redis://:theirs@h:1".to_owned()),
            "REDIS_PASSWORD_FILE" => Some(file.to_string()),
            _ => None,
        });
        assert_eq!(words(&sentinels.expect("valid"))[0], of_file());
        let keys = with(&[("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "key")]);
        assert_eq!(words(&keys), [of_file(), Some("id".into()), Some("key".into())]);
        let keys = with(&[("MINIO_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "of another pair")]);
        assert_eq!(words(&keys), [of_file(), Some("id".into()), of_file()]);
    }

    #[test]
    fn every_key_of_the_side_services_is_read_and_checked() {
        let config = load(
            "redis: {url: 'redis://a:1, redis://b:2', kind: cluster, prefetch: 3, progress_ttl_seconds: 5}\n\
             store: {folder: null, keep_last: 5, part_bytes: 6000000, path_style: no}\n\
             mlflow: {tracking_uri: 'https://x', system_metrics_interval_seconds: 0, register: no}\n\
             outbox: {items_max: 500, delay_seconds: 0.1}\n",
            |_| None,
        )
        .expect("valid");
        assert_eq!(
            (config.redis.urls.len(), config.redis.prefetch, config.redis.progress_ttl_ms),
            (2, 3, 5000)
        );
        assert!(!config.store.is_on() && config.store.keep_last == 5 && !config.store.is_path_style);
        assert_eq!((config.mlflow.system_metrics_interval_ms, config.mlflow.is_registering), (0, false));
        assert_eq!((config.outbox.items_max, config.outbox.delay_ms), (500, 100));
        let error = load(
            "redis: {url: 'http://u:secret@h', kind: many}\nstore: {endpoint: h, part_bytes: 5}\n\
             mlflow: {tracking_uri: file, password_file: /no/such/file}\noutbox: {items_max: 1}\n",
            |_| None,
        )
        .expect_err("seven faults");
        assert_eq!(error.lines().count(), 7, "{error}");
        assert!(!error.contains("secret@"), "{error}");
    }
}
