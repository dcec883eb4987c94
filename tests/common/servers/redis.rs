//! A Redis server, sentinel or node of a cluster as a child process.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::process::Server;
use super::{Port, find};

/// How long a start may take.
const START_LIMIT: Duration = Duration::from_secs(30);

/// A server on a port of its own, with a folder of its own that outlives restarts.
#[derive(Debug)]
pub struct RedisServer {
    process: Server,
    port: Port,
    /// Port of a cluster's own traffic.
    _bus: Option<Port>,
    is_tls: bool,
    folder: tempfile::TempDir,
}

impl RedisServer {
    /// Starts one that keeps nothing on disk. `None` (after a loud word) when there is no program.
    pub fn start() -> Option<Self> {
        Self::start_with(&["--save", "", "--appendonly", "no"])
    }

    /// Starts one that has every write on disk before it answers, so that a kill loses nothing.
    pub fn start_durable() -> Option<Self> {
        Self::start_with(&["--save", "", "--appendonly", "yes", "--appendfsync", "always"])
    }

    /// Starts one with these arguments beside port, address and folder.
    pub fn start_with(arguments: &[&str]) -> Option<Self> {
        let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        Self::start_in(Port::free(), tempfile::tempdir().expect("a folder"), move |port, folder| {
            let mut all = vec!["--port".to_owned(), port.to_string()];
            all.extend(["--bind".to_owned(), "127.0.0.1".to_owned()]);
            all.extend(["--dir".to_owned(), folder.display().to_string()]);
            all.extend(arguments.clone());
            all
        })
    }

    /// Starts a cluster of one node, without slots yet.
    pub fn start_cluster() -> Option<Self> {
        // By itself it would take its port plus 10,000, which may be in use.
        let bus = Port::free();
        let number = bus.number().to_string();
        let mut server =
            Self::start_with(&["--save", "", "--cluster-enabled", "yes", "--cluster-port", &number])?;
        server._bus = Some(bus);
        Some(server)
    }

    /// Starts one with exactly these arguments, which are made from its port and folder.
    pub fn start_in(
        port: Port,
        folder: tempfile::TempDir,
        arguments: impl Fn(u16, &Path) -> Vec<String>,
    ) -> Option<Self> {
        let program = find("BOXWRIGHT_REDIS_SERVER", &["redis-server", "valkey-server"])?;
        let arguments = arguments(port.number(), folder.path());
        let is_tls = arguments.iter().any(|argument| argument == "--tls-port");
        let log: PathBuf = folder.path().join("server.log");
        let process = Server::start("redis", &log, move || {
            let mut command = Command::new(&program);
            command.args(&arguments);
            command
        });
        let mut server = Self { process, port, _bus: None, is_tls, folder };
        server.wait_ready();
        Some(server)
    }

    /// Waits until it answers; one that expects TLS need only accept.
    pub fn wait_ready(&mut self) {
        let (address, is_tls) = (self.port.address(), self.is_tls);
        self.process.wait_ready(START_LIMIT, || {
            let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(1)) else {
                return false;
            };
            let limit = Some(Duration::from_millis(300));
            stream.set_read_timeout(limit).and_then(|()| stream.write_all(b"PING\r\n")).expect("a socket");
            let mut answer = [0_u8; 8];
            let count = stream.read(&mut answer).unwrap_or(0);
            match answer[..count] {
                [b'+', ..] => true,
                // A password is missing, say.
                [b'-', ..] => !answer.starts_with(b"-LOADING"),
                _ => is_tls,
            }
        });
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// `redis://127.0.0.1:PORT/0`.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port())
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// SIGKILL. The port stays ours.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it after a kill, and waits until it answers.
    pub fn start_again(&mut self) {
        self.process.start_again();
        self.wait_ready();
    }

    /// Kills and starts it, and waits until it answers.
    pub fn restart(&mut self) {
        self.process.restart();
        self.wait_ready();
    }

    /// SIGSTOP: connections stay, nobody is answered.
    pub fn pause(&self) {
        self.process.pause();
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.process.resume();
    }
}
