//! Connections: to one server, to the master that sentinels name, to the nodes of a cluster.

use std::path::PathBuf;
use std::time::Duration;

use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::cluster::{ClusterClient, ClusterClientBuilder};
use redis::cluster_async::ClusterConnection;
use redis::sentinel::{SentinelClientBuilder, SentinelServerType};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, Pipeline,
    RedisFuture, RedisResult, TlsCertificates, TlsMode, Value,
};

use super::error::FleetError;
use crate::job::secret::Secret;
use crate::job::service::{RedisConfig, RedisKind};

/// A connection.
#[derive(Clone)]
pub(super) enum Link {
    /// To one server.
    One(MultiplexedConnection),
    /// To all nodes of a cluster.
    Cluster(ClusterConnection),
}

impl ConnectionLike for Link {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::One(link) => link.req_packed_command(cmd),
            Self::Cluster(link) => link.req_packed_command(cmd),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Self::One(link) => link.req_packed_commands(pipeline, offset, count),
            Self::Cluster(link) => link.req_packed_commands(pipeline, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Self::One(link) => link.get_db(),
            Self::Cluster(link) => link.get_db(),
        }
    }
}

/// How to reach the server. Making one does no network.
pub(super) struct Server {
    kind: RedisKind,
    nodes: Vec<ConnectionInfo>,
    sentinel_service: String,
    username: Option<String>,
    password: Option<Secret>,
    certificates: Option<TlsCertificates>,
    /// For messages: hosts and ports, without user and password.
    pub(super) address: String,
}

impl Server {
    /// Checks addresses and certificates.
    ///
    /// # Errors
    /// [`FleetError::Config`] says what does not fit.
    pub(super) fn new(config: &RedisConfig) -> Result<Self, FleetError> {
        let mut nodes = Vec::new();
        for url in &config.urls {
            // The crate's message names no address; ours may not, a password could be in it.
            let node = url.as_str().into_connection_info().map_err(|source| FleetError::Config {
                what: format!("address {} of {} is not understood", nodes.len() + 1, config.urls.len()),
                source: Some(Box::new(source)),
            })?;
            nodes.push(node);
        }
        let Some(first) = nodes.first() else {
            return Err(FleetError::config("there is no address"));
        };
        if config.kind == RedisKind::Single && nodes.len() > 1 {
            let what = format!("got {} addresses of one server; name one, or set `kind`", nodes.len());
            return Err(FleetError::config(what));
        }
        let is_tls = matches!(first.addr(), ConnectionAddr::TcpTls { .. });
        let certificates = match &config.ca_file {
            Some(path) if is_tls => Some(certificates(path)?),
            Some(path) => {
                let what = format!("{} is set, but the address is not rediss://", path.display());
                return Err(FleetError::config(what));
            }
            None => None,
        };
        let server = Self {
            kind: config.kind,
            address: nodes.iter().map(|node| node.addr().to_string()).collect::<Vec<_>>().join(", "),
            nodes,
            sentinel_service: config.sentinel_service.clone(),
            username: config.username.clone(),
            password: config.password.clone(),
            certificates,
        };
        // What the crate itself would refuse is refused now, not at the first call.
        match server.kind {
            RedisKind::Single => server.single_client().map(drop),
            RedisKind::Sentinel => server.sentinel_client().map(drop),
            RedisKind::Cluster => server.cluster_client(Duration::from_secs(1)).map(drop),
        }
        .map_err(|source| FleetError::Config {
            what: format!("cannot use {}", server.address),
            source: Some(Box::new(source)),
        })?;
        Ok(server)
    }

    pub(super) fn is_cluster(&self) -> bool {
        self.kind == RedisKind::Cluster
    }

    /// The first address with the configured user and password over those of the address.
    fn with_credentials(&self, node: &ConnectionInfo) -> ConnectionInfo {
        let mut settings = node.redis_settings().clone();
        if let Some(name) = &self.username {
            settings = settings.set_username(name);
        }
        if let Some(password) = &self.password {
            settings = settings.set_password(password.expose());
        }
        node.clone().set_redis_settings(settings)
    }

    fn single_client(&self) -> RedisResult<Client> {
        let node = self.with_credentials(&self.nodes[0]);
        match &self.certificates {
            Some(certificates) => Client::build_with_tls(node, certificates.clone()),
            None => Client::open(node),
        }
    }

    /// Sentinels are asked with the user and password of their addresses; the master gets the configured ones.
    fn sentinel_client(&self) -> RedisResult<redis::sentinel::SentinelClient> {
        let addresses = self.nodes.iter().map(|node| node.addr().clone());
        let service = self.sentinel_service.as_str();
        let mut builder = SentinelClientBuilder::new(addresses, service, SentinelServerType::Master)?;
        let settings = self.nodes[0].redis_settings();
        if let Some(name) = settings.username() {
            builder = builder.set_client_to_sentinel_username(name);
        }
        if let Some(password) = settings.password() {
            builder = builder.set_client_to_sentinel_password(password);
        }
        builder = builder.set_client_to_redis_db(settings.db());
        if let Some(name) = &self.username {
            builder = builder.set_client_to_redis_username(name);
        }
        if let Some(password) = &self.password {
            builder = builder.set_client_to_redis_password(password.expose());
        }
        if matches!(self.nodes[0].addr(), ConnectionAddr::TcpTls { .. }) {
            builder = builder.set_client_to_redis_tls_mode(TlsMode::Secure);
            if let Some(certificates) = &self.certificates {
                builder = builder
                    .set_client_to_redis_certificates(certificates.clone())
                    .set_client_to_sentinel_certificates(certificates.clone());
            }
        }
        builder.build()
    }

    fn cluster_client(&self, limit: Duration) -> RedisResult<ClusterClient> {
        let nodes = self.nodes.iter().map(|node| self.with_credentials(node));
        let mut builder = ClusterClientBuilder::new(nodes)
            .retries(2)
            .min_retry_wait(10)
            .max_retry_wait(100)
            .connection_timeout(limit)
            .response_timeout(limit);
        if let Some(certificates) = &self.certificates {
            builder = builder.certs(certificates.clone());
        }
        builder.build()
    }

    /// Connects. The caller limits the time; `limit` is that of each answer later.
    pub(super) async fn connect(&self, limit: Duration) -> RedisResult<Link> {
        let config =
            AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(Some(limit));
        match self.kind {
            RedisKind::Single => {
                let client = self.single_client()?;
                Ok(Link::One(client.get_multiplexed_async_connection_with_config(&config).await?))
            }
            RedisKind::Sentinel => {
                let mut client = self.sentinel_client()?;
                Ok(Link::One(client.get_async_connection_with_config(&config).await?))
            }
            RedisKind::Cluster => {
                Ok(Link::Cluster(self.cluster_client(limit)?.get_async_connection().await?))
            }
        }
    }
}

/// The certificates that are trusted for Redis: with a file, those in it and no others.
fn certificates(path: &PathBuf) -> Result<TlsCertificates, FleetError> {
    let root_cert = std::fs::read(path).map_err(|source| FleetError::Config {
        what: format!("cannot read the certificates {}", path.display()),
        source: Some(Box::new(source)),
    })?;
    if !root_cert.windows(27).any(|text| text == b"-----BEGIN CERTIFICATE-----") {
        return Err(FleetError::config(format!("{} holds no certificate (PEM)", path.display())));
    }
    Ok(TlsCertificates { client_tls: None, root_cert: Some(root_cert) })
}
