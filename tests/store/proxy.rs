//! A network between a store and its server that does what networks do.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// What the network does with connections and requests from now on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Weather {
    /// Everything passes.
    Fine,
    /// Connections are closed at once.
    Refusing,
    /// Connections are taken and nothing is ever answered.
    BlackHole,
    /// So many bytes a second each way on each connection.
    Slow(u64),
    /// A connection is cut after so many bytes from the client; so many connections are, then all is fine.
    Cut(u64, u64),
    /// One request in so many is answered with 503 (odd) or 500 (even).
    Failing(u64),
}

struct Shared {
    upstream: SocketAddr,
    weather: Mutex<Weather>,
    requests: AtomicU64,
    failed: AtomicU64,
    cuts: AtomicU64,
    bytes_up: AtomicU64,
    is_over: AtomicBool,
}

/// A running proxy; it ends with the value.
pub struct Proxy {
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    pub fn new(upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            upstream,
            weather: Mutex::new(Weather::Fine),
            requests: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            cuts: AtomicU64::new(0),
            bytes_up: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
        });
        let ours = shared.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if ours.is_over.load(Ordering::Relaxed) {
                    return;
                }
                let ours = ours.clone();
                thread::spawn(move || {
                    let _ = serve(client, &ours);
                });
            }
        });
        Self { address, shared }
    }

    pub fn set(&self, weather: Weather) {
        *self.shared.weather.lock().expect("no poison") = weather;
    }

    /// Requests that were answered with a failure.
    pub fn failed(&self) -> u64 {
        self.shared.failed.load(Ordering::Relaxed)
    }

    /// Connections that were cut.
    pub fn cuts(&self) -> u64 {
        self.shared.cuts.load(Ordering::Relaxed)
    }

    /// Bytes from the client so far.
    pub fn bytes_up(&self) -> u64 {
        self.shared.bytes_up.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(mut client: TcpStream, shared: &Arc<Shared>) -> std::io::Result<()> {
    let weather = *shared.weather.lock().expect("no poison");
    match weather {
        Weather::Refusing => client.shutdown(Shutdown::Both),
        Weather::BlackHole => {
            let mut sink = [0u8; 4096];
            while client.read(&mut sink)? > 0 {}
            Ok(())
        }
        Weather::Failing(every) => one_request(client, shared, every),
        Weather::Fine | Weather::Slow(_) | Weather::Cut(..) => {
            let server = TcpStream::connect(shared.upstream)?;
            let (mut from_server, mut to_client) = (server.try_clone()?, client.try_clone()?);
            let ours = shared.clone();
            thread::spawn(move || {
                let _ = pump(&mut from_server, &mut to_client, &ours, false);
                let _ = to_client.shutdown(Shutdown::Both);
            });
            let mut to_server = server;
            let pumped = pump(&mut client, &mut to_server, shared, true);
            let _ = to_server.shutdown(Shutdown::Both);
            pumped
        }
    }
}

/// Passes bytes on in the weather of the moment.
fn pump(from: &mut TcpStream, to: &mut TcpStream, shared: &Shared, is_up: bool) -> std::io::Result<()> {
    let mut buffer = vec![0u8; 64 << 10];
    let mut passed = 0u64;
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        if is_up {
            shared.bytes_up.fetch_add(n as u64, Ordering::Relaxed);
        }
        passed += n as u64;
        let weather = *shared.weather.lock().expect("no poison");
        match weather {
            Weather::Slow(bytes_per_s) => {
                thread::sleep(Duration::from_secs_f64(n as f64 / bytes_per_s as f64));
            }
            Weather::Cut(after, count) if is_up && passed > after => {
                if shared.cuts.fetch_add(1, Ordering::Relaxed) < count {
                    return from.shutdown(Shutdown::Both);
                }
                shared.cuts.fetch_sub(1, Ordering::Relaxed);
            }
            _ => {}
        }
        to.write_all(&buffer[..n])?;
    }
}

/// Answers one request with a failure or with the server's answer, and closes.
fn one_request(mut client: TcpStream, shared: &Arc<Shared>, every: u64) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut byte = [0u8; 1];
    while !head.ends_with(b"\r\n\r\n") {
        if client.read(&mut byte)? == 0 || head.len() > 64 << 10 {
            return Ok(());
        }
        head.push(byte[0]);
    }
    let text = String::from_utf8_lossy(&head).into_owned();
    let length =
        text.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length:").map(str::to_owned));
    let length: u64 = length.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let number = shared.requests.fetch_add(1, Ordering::Relaxed) + 1;
    if number.is_multiple_of(every) {
        let failed = shared.failed.fetch_add(1, Ordering::Relaxed) + 1;
        std::io::copy(&mut (&mut client).take(length), &mut std::io::sink())?;
        let status =
            if failed.is_multiple_of(2) { "500 Internal Server Error" } else { "503 Service Unavailable" };
        let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        client.write_all(answer.as_bytes())?;
        return client.shutdown(Shutdown::Both);
    }
    let mut server = TcpStream::connect(shared.upstream)?;
    let (first, rest) = text.split_once("\r\n").unwrap_or((&text, ""));
    server.write_all(format!("{first}\r\nConnection: close\r\n{rest}").as_bytes())?;
    std::io::copy(&mut (&mut client).take(length), &mut server)?;
    std::io::copy(&mut server, &mut client)?;
    client.shutdown(Shutdown::Both)
}

/// Waits for a condition.
pub fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        thread::sleep(Duration::from_millis(2));
    }
}
