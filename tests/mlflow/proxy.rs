//! A proxy before the server that fails as it is told, request by request.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long a late request is late: the next attempt shall overtake it now and then.
const LATE: Duration = Duration::from_millis(30);

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// It is passed on, and so is the answer.
    None,
    /// It is taken and nothing ever comes back. The server does not see it.
    BlackHole,
    /// The connection ends. The server does not see it.
    Cut,
    /// The server carries it out, the answer is lost.
    Lost,
    /// The client hears nothing until it gives up; only then does the server carry it out.
    Late,
    /// The proxy answers with this status and header lines. The server does not see it.
    Answer(u16, &'static str),
}

type Plan = Box<dyn FnMut(usize, &Seen) -> Fault + Send>;

/// One request as it came in.
#[derive(Debug, Clone)]
pub struct Seen {
    pub line: String,
    pub authorization: String,
}

struct State {
    plan: Plan,
    seen: Vec<Seen>,
    /// Connections of black holes, held so that they stay open.
    held: Vec<TcpStream>,
    /// Requests that the server has yet to carry out.
    late: usize,
}

/// A proxy on a port of its own; it ends with the test program.
pub struct Proxy {
    pub url: String,
    state: Arc<Mutex<State>>,
}

impl Proxy {
    /// A proxy before `port`.
    pub fn before(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let state = State { plan: Box::new(|_, _| Fault::None), seen: Vec::new(), held: Vec::new(), late: 0 };
        let state = Arc::new(Mutex::new(state));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                std::thread::spawn(move || {
                    // A broken connection is what a proxy is for.
                    let _ = serve(stream, port, &state);
                });
            }
        });
        Self { url, state }
    }

    /// From now on the request with number `n` (from 0) meets `plan(n)`.
    pub fn plan(&self, mut plan: impl FnMut(usize) -> Fault + Send + 'static) {
        let mut state = self.state.lock().expect("no panic");
        let first = state.seen.len();
        state.plan = Box::new(move |number, _| plan(number - first));
        state.held.clear();
    }

    /// From now on a request with this first line (`POST /path HTTP/1.1`) meets `plan(line)`.
    pub fn plan_lines(&self, mut plan: impl FnMut(&str) -> Fault + Send + 'static) {
        let mut state = self.state.lock().expect("no panic");
        state.plan = Box::new(move |_, seen| plan(&seen.line));
        state.held.clear();
    }

    /// The same for every request.
    pub fn set(&self, fault: Fault) {
        self.plan(move |_| fault);
    }

    /// Requests that the server has yet to carry out, though the client has given them up.
    pub fn late(&self) -> usize {
        self.state.lock().expect("no panic").late
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.state.lock().expect("no panic").seen.clone()
    }
}

fn serve(client: TcpStream, port: u16, state: &Mutex<State>) -> std::io::Result<()> {
    client.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut reader = BufReader::new(client.try_clone()?);
    let mut head = String::new();
    let mut body_bytes = 0;
    let mut seen = Seen { line: String::new(), authorization: String::new() };
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let lower = line.to_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            body_bytes = value.trim().parse().expect("a length");
        }
        if lower.starts_with("authorization:") {
            seen.authorization = line["authorization:".len()..].trim().to_owned();
        }
        if seen.line.is_empty() {
            seen.line = line.trim().to_owned();
        }
        if line == "\r\n" {
            break;
        }
        // One request for each connection, so that each meets its own fate.
        if !lower.starts_with("connection:") {
            head.push_str(&line);
        }
    }
    head.push_str("connection: close\r\n\r\n");
    let mut body = vec![0; body_bytes];
    reader.read_exact(&mut body)?;
    let fault = {
        let mut state = state.lock().expect("no panic");
        let number = state.seen.len();
        let fault = (state.plan)(number, &seen);
        state.seen.push(seen);
        if fault == Fault::Late {
            state.late += 1;
        }
        if fault == Fault::BlackHole {
            state.held.push(client.try_clone()?);
        }
        fault
    };
    match fault {
        Fault::BlackHole => return Ok(()),
        Fault::Cut => {}
        Fault::Answer(status, headers) => {
            let text = "{\"message\": \"said by the proxy\"}";
            let length = text.len();
            let answer = format!(
                "HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nconnection: close\r\n{headers}\r\n{text}"
            );
            (&client).write_all(answer.as_bytes())?;
        }
        Fault::Late => {
            // The end of input: the client has given up. Its next attempt is under way meanwhile.
            let mut rest = Vec::new();
            let _ = reader.read_to_end(&mut rest);
            std::thread::sleep(LATE);
            let carried_out = pass_on(port, &head, &body);
            state.lock().expect("no panic").late -= 1;
            carried_out?;
        }
        Fault::None | Fault::Lost => {
            let answer = pass_on(port, &head, &body)?;
            if fault == Fault::None {
                (&client).write_all(&answer)?;
            }
        }
    }
    client.shutdown(Shutdown::Both)
}

fn pass_on(port: u16, head: &str, body: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut server = TcpStream::connect(("127.0.0.1", port))?;
    server.write_all(head.as_bytes())?;
    server.write_all(body)?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    Ok(answer)
}
