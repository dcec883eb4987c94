//! The helpers that other tests trust with real servers, tried on small ones: a shell, and an echo.

#[path = "common/servers/mod.rs"]
mod servers;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use servers::process::{self, Server};
use servers::proxy::{Fault, Proxy};
use servers::{Port, wait};

/// A server that sends back what it gets.
fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut reader = stream.try_clone().expect("clones");
                let _ = std::io::copy(&mut reader, &mut &stream);
            });
        }
    });
    address
}

/// A server that answers every request with 200 and the length of its body.
fn http() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let (mut bytes, mut piece) = (Vec::new(), [0; 4096]);
            let body = loop {
                let Ok(length @ 1..) = stream.read(&mut piece) else { break None };
                bytes.extend_from_slice(&piece[..length]);
                let text = String::from_utf8_lossy(&bytes);
                let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
                let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
                let length: usize = length.map_or(0, |length| length.parse().expect("a number"));
                assert!(head.contains("Connection: close") && !head.contains("keep-alive"), "{head}");
                if body.len() >= length {
                    break Some(length);
                }
            };
            if let Some(length) = body {
                let text = length.to_string();
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len());
                let _ = stream.write_all(answer.as_bytes());
            }
        }
    });
    address
}

fn connect(proxy: &Proxy) -> TcpStream {
    let stream = TcpStream::connect(proxy.address()).expect("connects");
    stream.set_read_timeout(Some(servers::LIMIT)).expect("a limit");
    stream
}

fn echoed(stream: &mut TcpStream, text: &str) -> std::io::Result<String> {
    stream.write_all(text.as_bytes())?;
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer)?;
    Ok(String::from_utf8(answer).expect("text"))
}

/// Nothing comes within a moment.
fn silent(stream: &mut TcpStream) {
    stream.set_read_timeout(Some(Duration::from_millis(150))).expect("a limit");
    let error = stream.read(&mut [0; 1]).expect_err("nothing is to be read");
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    stream.set_read_timeout(Some(servers::LIMIT)).expect("a limit");
}

fn is_over(result: std::io::Result<usize>) -> bool {
    matches!(result, Ok(0)) || result.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

fn request(proxy: &Proxy, method: &str, body: &str) -> String {
    let mut stream = connect(proxy);
    let head = format!("{method} /a/b HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n");
    write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).expect("writes");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

#[test]
fn ports_are_given_once() {
    let ports: Vec<Port> = (0..50).map(|_| Port::free()).collect();
    let mut numbers: Vec<u16> = ports.iter().map(Port::number).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), 50);
    assert!(!ports[0].answers());
    let _listener = TcpListener::bind(ports[0].address()).expect("free for a server");
    assert!(ports[0].answers());
}

#[test]
fn a_black_hole_keeps_connections_and_bytes() {
    let proxy = Proxy::tcp(echo());
    let mut stream = connect(&proxy);
    assert_eq!(echoed(&mut stream, "one").expect("passes"), "one");
    proxy.set(Fault::BlackHole);
    stream.write_all(b"two").expect("accepted by the system");
    silent(&mut stream);
    let mut late = connect(&proxy);
    late.write_all(b"new").expect("accepted by the system");
    silent(&mut late);
    proxy.set(Fault::None);
    let mut answer = [0; 3];
    stream.read_exact(&mut answer).expect("the cable is back");
    assert_eq!(&answer, b"two");
    late.read_exact(&mut answer).expect("the cable is back");
    assert_eq!(&answer, b"new");
    let counts = proxy.counts();
    assert_eq!((counts.connections, counts.bytes_up, counts.bytes_down), (2, 9, 9));
}

#[test]
fn a_refusal_resets_what_is_open_and_lets_nobody_in() {
    let proxy = Proxy::tcp(echo());
    let mut stream = connect(&proxy);
    assert_eq!(echoed(&mut stream, "one").expect("passes"), "one");
    for _ in 0..5 {
        proxy.set(Fault::Refuse);
        assert!(is_over(stream.read(&mut [0; 1])));
        let error = TcpStream::connect(proxy.address()).expect_err("nobody listens");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        proxy.set(Fault::None);
        stream = connect(&proxy);
        assert_eq!(echoed(&mut stream, "again").expect("passes"), "again");
    }
    proxy.reset_connections();
    assert!(is_over(stream.read(&mut [0; 1])));
}

#[test]
fn cuts_come_after_their_bytes_and_lost_answers_after_the_work() {
    let proxy = Proxy::tcp(echo());
    proxy.set(Fault::CutAnswer(5));
    let mut stream = connect(&proxy);
    assert_eq!(echoed(&mut stream, "12345").expect("passes"), "12345");
    stream.write_all(b"6").expect("accepted by the system");
    assert!(is_over(stream.read(&mut [0; 1])));

    proxy.set(Fault::CutRequest(1000));
    let up = proxy.counts().bytes_up;
    let mut stream = connect(&proxy);
    let _ = stream.write_all(&[7; 5000]);
    // What came back before the reset may or may not arrive; the end does.
    while !is_over(stream.read(&mut [0; 512])) {}
    assert_eq!(proxy.counts().bytes_up - up, 1000);

    proxy.set(Fault::LoseAnswers);
    let (up, down) = (proxy.counts().bytes_up, proxy.counts().bytes_down);
    let mut stream = connect(&proxy);
    stream.write_all(b"work").expect("passes");
    wait("the work", || (proxy.counts().bytes_up - up == 4).then_some(()));
    silent(&mut stream);
    assert_eq!(proxy.counts().bytes_down, down);
}

#[test]
fn delays_and_throttles_take_their_time() {
    let proxy = Proxy::tcp(echo());
    let mut stream = connect(&proxy);
    proxy.set(Fault::Delay(Duration::from_millis(60)));
    let begun = Instant::now();
    echoed(&mut stream, "x").expect("passes");
    assert!(begun.elapsed() >= Duration::from_millis(120), "there and back: {:?}", begun.elapsed());
    proxy.set(Fault::Throttle(100_000));
    let begun = Instant::now();
    echoed(&mut stream, &"y".repeat(20_000)).expect("passes");
    assert!(begun.elapsed() >= Duration::from_millis(190), "at 100 kB/s: {:?}", begun.elapsed());
}

#[test]
fn http_requests_are_counted_and_one_in_some_is_answered() {
    let proxy = Proxy::http(http());
    assert!(request(&proxy, "PUT", "12345").ends_with("\r\n\r\n5"));
    proxy.set(Fault::Answer { status: 503, one_in: 3, part: "PUT /a" });
    let large = "z".repeat(300_000);
    let statuses: Vec<bool> = (0..9).map(|_| request(&proxy, "PUT", &large).contains("503 Fault")).collect();
    assert_eq!(statuses, [false, false, true, false, false, true, false, false, true]);
    assert!((0..9).all(|_| request(&proxy, "GET", "").contains("200 OK")));
    let counts = proxy.counts();
    assert_eq!((counts.requests, counts.answered, counts.connections), (19, 3, 19));
    assert_eq!(proxy.request_lines()[0], "PUT /a/b HTTP/1.1");
}

fn shell(script: &'static str) -> impl Fn() -> Command + Send + Sync {
    move || {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }
}

#[test]
fn a_server_is_paused_killed_and_restarted_with_its_workers() {
    let folder = tempfile::tempdir().expect("a folder");
    let log = folder.path().join("log");
    // One worker in the background, as servers with several processes have.
    let mut server = Server::start("shell", &log, shell("sleep 1000 & echo worker $!; wait"));
    let worker = |starts: usize| {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let line = text.lines().nth(starts - 1)?.strip_prefix("worker ")?.to_owned();
        text.ends_with('\n').then(|| line.parse::<u32>().expect("a number"))
    };
    server.wait_ready(servers::LIMIT, || worker(1).is_some());
    let first = worker(1).expect("ready");
    server.pause();
    wait("the worker's standstill", || (process::state(first) == Some('T')).then_some(()));
    server.resume();
    wait("the worker's going on", || (process::state(first) == Some('S')).then_some(()));
    assert!(process::died_of(server.kill(), libc::SIGKILL));
    let is_gone = |pid| matches!(process::state(pid), None | Some('Z'));
    wait("the worker's end", || is_gone(first).then_some(()));
    server.start_again();
    server.wait_ready(servers::LIMIT, || worker(2).is_some());
    let second = worker(2).expect("ready");
    assert!(server.is_alive() && server.starts() == 2 && first != second);
    drop(server);
    wait("the worker's end", || is_gone(second).then_some(()));
}

#[test]
fn a_server_outlives_the_thread_that_started_it_and_ends_when_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let log = folder.path().join("log");
    let path = log.clone();
    let start = move || {
        Server::start("shell", &path, shell("trap 'exit 3' TERM; echo on; while :; do sleep 0.01; done"))
    };
    let mut server = std::thread::spawn(start).join().expect("starts");
    server.wait_ready(servers::LIMIT, || std::fs::read_to_string(&log).is_ok_and(|text| text == "on\n"));
    assert!(server.is_alive() && server.resident_bytes().is_some_and(|bytes| bytes > 0));
    assert_eq!(server.terminate(servers::LIMIT).code(), Some(3));
    assert!(!server.is_alive());
}
