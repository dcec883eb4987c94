//! Real servers for tests: found on the machine, started as children on ports of their own, disturbed, ended with the test.
//!
//! A test says `#[path = "common/servers/mod.rs"] mod servers;`. Everything here is of the standard library, and works in
//! any folder of tests. Where a program is not there the test skips loudly; with `BOXWRIGHT_REQUIRE_SERVICES=1` it fails.
//!
//! Each test binary uses a part of it, hence the allowance for unused code.
#![allow(dead_code)]

pub mod mlflow;
pub mod process;
pub mod proxy;
pub mod redis;
pub mod s3;

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// How long a condition may take before a test gives up. Wide: the machine may be busy.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Ports that tests take: below those that systems give to outgoing connections (32768 and up), which would otherwise
/// take a server's port while it is down.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// A loopback port that no other test has, in this process or another, until it is dropped. So a server can be killed
/// and restarted on it.
#[derive(Debug)]
pub struct Port {
    number: u16,
    /// A name in the abstract namespace, gone with the process whatever happens to it.
    _held: UnixListener,
}

impl Port {
    /// Takes a free one.
    pub fn free() -> Self {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        // Processes begin at different places, so that they seldom meet.
        let begin = (std::process::id().wrapping_mul(97) % u32::from(PORTS.end - PORTS.start)) as u16;
        for _ in PORTS {
            let step = NEXT.fetch_add(1, Ordering::Relaxed);
            let number = PORTS.start + (begin.wrapping_add(step)) % (PORTS.end - PORTS.start);
            if let Some(port) = Self::take(number) {
                return port;
            }
        }
        panic!("no loopback port is free between {} and {}", PORTS.start, PORTS.end);
    }

    fn take(number: u16) -> Option<Self> {
        let name = format!("boxwright-test-port-{number}");
        let name = std::os::unix::net::SocketAddr::from_abstract_name(name).expect("a short name");
        let held = UnixListener::bind_addr(&name).ok()?;
        // Free for every program, not only for tests.
        TcpListener::bind(("127.0.0.1", number)).ok()?;
        Some(Self { number, _held: held })
    }

    /// Its number.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// 127.0.0.1 and the number.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.number))
    }

    /// True when somebody accepts connections on it.
    pub fn answers(&self) -> bool {
        TcpStream::connect_timeout(&self.address(), Duration::from_secs(1)).is_ok()
    }
}

/// The program that `variable` names, else the first of `names` that is on the path. `None` after a loud word, which is
/// the test's order to return; a panic instead with `BOXWRIGHT_REQUIRE_SERVICES=1`, or when the variable names nothing.
pub fn find(variable: &str, names: &[&str]) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from) {
        assert!(is_program(&path), "{variable} names {}, which is no program", path.display());
        return Some(path);
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    for name in names {
        let found = std::env::split_paths(&folders).map(|folder| folder.join(name)).find(|p| is_program(p));
        if found.is_some() {
            return found;
        }
    }
    missing(&format!("{} (or {variable}=PATH)", names.join(" or ")))
}

/// Every program that the list `variable` names (separated by colons), else what [`find`] finds by the singular of it.
pub fn find_all(variable: &str, singular: &str, names: &[&str]) -> Vec<PathBuf> {
    let list = std::env::var_os(variable).unwrap_or_default();
    let paths: Vec<PathBuf> =
        std::env::split_paths(&list).filter(|path| !path.as_os_str().is_empty()).collect();
    for path in &paths {
        assert!(is_program(path), "{variable} names {}, which is no program", path.display());
    }
    if paths.is_empty() { find(singular, names).into_iter().collect() } else { paths }
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

/// Says that a test skips for want of `what`, or fails when that is not allowed.
pub fn missing<T>(what: &str) -> Option<T> {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let required = std::env::var_os("BOXWRIGHT_REQUIRE_SERVICES").is_some_and(|value| value == "1");
    assert!(!required, "{test}: there is no {what}, and BOXWRIGHT_REQUIRE_SERVICES=1");
    // Straight to the stream: the harness hides what passing tests print.
    let _ =
        writeln!(std::io::stderr(), "SKIPPED {test}: there is no {what}; scripts/services.sh provides it");
    None
}

/// Waits until `condition` gives something; panics after [`LIMIT`].
pub fn wait<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    wait_within(what, LIMIT, condition)
}

/// The same with a limit of its own.
pub fn wait_within<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what} did not happen within {limit:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
