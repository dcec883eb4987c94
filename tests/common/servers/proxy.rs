//! A proxy before a server, with faults that a test switches while connections are open.
//!
//! [`Proxy::tcp`] passes bytes. [`Proxy::http`] knows requests: it serves one per connection (it asks the server to close
//! after the answer), counts them, and can answer some of them itself.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Port;

/// Bytes moved at once.
const CHUNK_BYTES: usize = 64 << 10;
/// Bytes of the head of a request.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Request lines kept.
const LINES_MAX: usize = 100_000;
/// How long the server may take to accept.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// What goes wrong.
#[derive(Debug, Clone, PartialEq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Nobody listens, and open connections are reset.
    Refuse,
    /// Connections open and stay open, and no byte passes, as behind a cut cable. Bytes that wait pass when it ends.
    BlackHole,
    /// Requests pass and answers are thrown away: the work is done, and nobody hears of it.
    LoseAnswers,
    /// Every piece waits this long.
    Delay(Duration),
    /// Bytes per second in each direction of a connection.
    Throttle(u64),
    /// A connection is reset once this many bytes of it went to the server.
    CutRequest(u64),
    /// A connection is reset once this many bytes of it came from the server.
    CutAnswer(u64),
    /// Of the requests whose first line holds `part`, one in `one_in` gets this status and no other answer. Only of
    /// [`Proxy::http`].
    Answer { status: u16, one_in: u64, part: &'static str },
}

/// What passed so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connections that were accepted.
    pub connections: u64,
    /// Requests, those answered here included; 0 for a proxy of bytes.
    pub requests: u64,
    /// Requests that were answered here.
    pub answered: u64,
    /// Bytes to the server.
    pub bytes_up: u64,
    /// Bytes from the server.
    pub bytes_down: u64,
}

struct State {
    fault: Fault,
    /// Goes up with every fault, so that sleepers look again.
    generation: u64,
    is_closed: bool,
    listener: Option<TcpListener>,
    counts: Counts,
    /// Requests that fitted the fault `Answer`.
    fitting: u64,
    lines: Vec<String>,
    /// Both ends of each open connection, to reset them.
    open: HashMap<u64, [TcpStream; 2]>,
}

struct Shared {
    upstream: SocketAddr,
    is_http: bool,
    state: Mutex<State>,
    changed: Condvar,
}

/// A listening proxy; gone with its value.
pub struct Proxy {
    port: Port,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Passes bytes to `upstream`.
    pub fn tcp(upstream: SocketAddr) -> Self {
        Self::new(upstream, false)
    }

    /// Passes HTTP/1.1 requests to `upstream`.
    pub fn http(upstream: SocketAddr) -> Self {
        Self::new(upstream, true)
    }

    fn new(upstream: SocketAddr, is_http: bool) -> Self {
        let state = State {
            fault: Fault::None,
            generation: 0,
            is_closed: false,
            listener: None,
            counts: Counts::default(),
            fitting: 0,
            lines: Vec::new(),
            open: HashMap::new(),
        };
        let shared = Shared { upstream, is_http, state: Mutex::new(state), changed: Condvar::new() };
        let proxy = Self { port: Port::free(), shared: Arc::new(shared) };
        proxy.listen(&mut proxy.shared.lock());
        proxy
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// The same as `http://HOST:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address())
    }

    /// From now on, also for open connections (a cut counts a connection's bytes from its beginning).
    pub fn set(&self, fault: Fault) {
        let is_answer = matches!(fault, Fault::Answer { .. });
        assert!(self.shared.is_http || !is_answer, "only a proxy of HTTP can answer");
        let mut state = self.shared.lock();
        if fault == Fault::Refuse {
            if let Some(listener) = state.listener.take() {
                stop_listening(&listener);
            }
            reset_all(&mut state);
        } else if state.listener.is_none() {
            self.listen(&mut state);
        }
        state.fault = fault;
        state.fitting = 0;
        state.generation += 1;
        self.shared.changed.notify_all();
    }

    /// Resets every open connection; new ones are served.
    pub fn reset_connections(&self) {
        reset_all(&mut self.shared.lock());
        self.shared.changed.notify_all();
    }

    /// What passed so far.
    pub fn counts(&self) -> Counts {
        self.shared.lock().counts
    }

    /// First lines of the requests so far, such as `PUT /bucket/key HTTP/1.1`.
    pub fn request_lines(&self) -> Vec<String> {
        self.shared.lock().lines.clone()
    }

    fn listen(&self, state: &mut State) {
        let listener = TcpListener::bind(self.address()).expect("the port is ours");
        state.listener = Some(listener.try_clone().expect("clones"));
        let shared = self.shared.clone();
        std::thread::spawn(move || {
            // Ends when the socket is shut down.
            while let Ok((client, _)) = listener.accept() {
                let shared = shared.clone();
                std::thread::spawn(move || shared.serve(client));
            }
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.is_closed = true;
        if let Some(listener) = state.listener.take() {
            stop_listening(&listener);
        }
        reset_all(&mut state);
        self.shared.changed.notify_all();
    }
}

/// At once, although the accepting thread holds the socket too.
fn stop_listening(listener: &TcpListener) {
    // SAFETY: a system call on a descriptor that is open.
    unsafe { libc::shutdown(listener.as_raw_fd(), libc::SHUT_RDWR) };
}

fn reset_all(state: &mut State) {
    for (_, ends) in state.open.drain() {
        ends.iter().for_each(reset);
    }
}

/// Closes with a reset where the system allows it: unsent bytes are thrown away.
fn reset(stream: &TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let bytes = std::mem::size_of::<libc::linger>() as libc::socklen_t;
    let value = std::ptr::from_ref(&linger).cast();
    // SAFETY: the option's value lives through the call and has the size that is told.
    unsafe { libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, value, bytes) };
    let _ = stream.shutdown(Shutdown::Both);
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

/// What becomes of a piece.
enum Verdict {
    Pass,
    Drop,
    /// So many bytes of it, then a reset.
    Cut(usize),
    Gone,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(self: Arc<Self>, mut client: TcpStream) {
        self.lock().counts.connections += 1;
        let mut head = Vec::new();
        if self.is_http {
            match self.request(&mut client) {
                Some(bytes) => head = bytes,
                None => return,
            }
        }
        let Ok(mut server) = TcpStream::connect_timeout(&self.upstream, CONNECT_LIMIT) else {
            return reset(&client);
        };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let clones = (client.try_clone(), server.try_clone(), client.try_clone(), server.try_clone());
        let (Ok(client_end), Ok(server_end), Ok(mut answers_to), Ok(mut answers_from)) = clones else {
            return;
        };
        let id = {
            let mut state = self.lock();
            if state.is_closed || state.fault == Fault::Refuse {
                return reset(&client);
            }
            let id = state.counts.connections << 16 | state.open.len() as u64;
            state.open.insert(id, [client_end, server_end]);
            id
        };
        let shared = self.clone();
        let down = std::thread::spawn(move || {
            shared.pump(&mut answers_from, &mut answers_to, Direction::Down, Vec::new());
        });
        self.pump(&mut client, &mut server, Direction::Up, head);
        let _ = down.join();
        self.lock().open.remove(&id);
    }

    /// Moves one direction to its end. `first` goes before what is read.
    fn pump(&self, from: &mut TcpStream, to: &mut TcpStream, direction: Direction, first: Vec<u8>) {
        let mut buffer = first;
        let mut passed = 0;
        let mut length = buffer.len();
        loop {
            if length > 0 && !self.move_piece(&buffer[..length], from, to, direction, &mut passed) {
                return;
            }
            buffer.resize(CHUNK_BYTES, 0);
            // A throttled connection reads little, so that the sender feels it.
            let piece = match self.lock().fault {
                Fault::Throttle(rate) => ((rate / 20) as usize).clamp(1, CHUNK_BYTES),
                _ => CHUNK_BYTES,
            };
            length = match from.read(&mut buffer[..piece]) {
                Ok(0) => {
                    // A half is closed; the other may still speak. Not through a black hole.
                    self.wait_open();
                    let _ = to.shutdown(Shutdown::Write);
                    return;
                }
                Ok(length) => length,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => 0,
                Err(_) => {
                    reset(to);
                    return;
                }
            };
        }
    }

    /// False when the connection is over.
    fn move_piece(
        &self,
        piece: &[u8],
        from: &TcpStream,
        to: &mut TcpStream,
        direction: Direction,
        passed: &mut u64,
    ) -> bool {
        let (kept, goes_on) = match self.judge(direction, piece.len(), *passed) {
            Verdict::Pass => (piece, true),
            Verdict::Drop => return true,
            Verdict::Cut(bytes) => (&piece[..bytes], false),
            Verdict::Gone => (&piece[..0], false),
        };
        *passed += kept.len() as u64;
        // Counted before it is sent: who has received a piece finds it counted.
        let mut state = self.lock();
        match direction {
            Direction::Up => state.counts.bytes_up += kept.len() as u64,
            Direction::Down => state.counts.bytes_down += kept.len() as u64,
        }
        drop(state);
        let written = to.write_all(kept).is_ok();
        if !written || !goes_on {
            reset(from);
            reset(to);
        }
        written && goes_on
    }

    /// Waits as the fault says, then decides; looks again when the fault changes meanwhile.
    fn judge(&self, direction: Direction, length: usize, passed: u64) -> Verdict {
        let begun = Instant::now();
        let mut state = self.lock();
        loop {
            if state.is_closed {
                return Verdict::Gone;
            }
            let room = |limit: u64| limit.saturating_sub(passed).min(length as u64) as usize;
            let pause = match (&state.fault, direction) {
                (Fault::Refuse, _) => return Verdict::Gone,
                (Fault::BlackHole, _) => Duration::MAX,
                (Fault::LoseAnswers, Direction::Down) => return Verdict::Drop,
                (Fault::CutRequest(limit), Direction::Up) | (Fault::CutAnswer(limit), Direction::Down)
                    if passed + length as u64 > *limit =>
                {
                    return Verdict::Cut(room(*limit));
                }
                (Fault::Delay(pause), _) => *pause,
                (Fault::Throttle(rate), _) => Duration::from_secs_f64(length as f64 / (*rate).max(1) as f64),
                _ => return Verdict::Pass,
            };
            state = if pause == Duration::MAX {
                self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
            } else {
                let left = pause.saturating_sub(begun.elapsed());
                if left.is_zero() {
                    return Verdict::Pass;
                }
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
            };
        }
    }

    fn wait_open(&self) {
        let mut state = self.lock();
        while state.fault == Fault::BlackHole && !state.is_closed {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Reads the head of a request. `None` when it was answered here or is none.
    fn request(&self, client: &mut TcpStream) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let end = loop {
            if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
                break at;
            }
            let mut piece = [0; 4096];
            let length = client.read(&mut piece).ok().filter(|length| *length > 0)?;
            bytes.extend_from_slice(&piece[..length]);
            if bytes.len() > HEAD_BYTES_MAX {
                return None;
            }
        };
        let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
        let line = head.lines().next().unwrap_or_default();
        if let Some(status) = self.count(line) {
            // A client that waits for leave to send its body gets the answer in its place.
            let answer = format!("HTTP/1.1 {status} Fault\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            let _ = client.write_all(answer.as_bytes());
            let _ = client.shutdown(Shutdown::Write);
            drain(client);
            return None;
        }
        // One request for each connection: then no body needs to be understood.
        let kept = head.split("\r\n").filter(|line| !line.to_ascii_lowercase().starts_with("connection:"));
        let mut written = kept.collect::<Vec<_>>().join("\r\n").into_bytes();
        written.extend_from_slice(b"\r\nConnection: close\r\n\r\n");
        written.extend_from_slice(&bytes[end + 4..]);
        Some(written)
    }

    /// Counts a request; gives the status with which it is answered here.
    fn count(&self, line: &str) -> Option<u16> {
        let mut state = self.lock();
        state.counts.requests += 1;
        if state.lines.len() < LINES_MAX {
            state.lines.push(line.to_owned());
        }
        let Fault::Answer { status, one_in, part } = state.fault else { return None };
        if !line.contains(part) {
            return None;
        }
        state.fitting += 1;
        if !state.fitting.is_multiple_of(one_in.max(1)) {
            return None;
        }
        state.counts.answered += 1;
        Some(status)
    }
}

/// Reads what the client still sends, so that the answer reaches it before a reset would.
fn drain(client: &mut TcpStream) {
    let _ = client.set_read_timeout(Some(Duration::from_secs(5)));
    let mut buffer = [0; 4096];
    // A gibibyte at most.
    for _ in 0..(1 << 18) {
        if !matches!(client.read(&mut buffer), Ok(1..)) {
            return;
        }
    }
}
