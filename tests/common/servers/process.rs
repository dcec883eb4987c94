//! A server as a child process: started, waited for, killed, paused, restarted, and never left behind.
//!
//! It ends with its [`Server`], and with the test process however that dies: the child gets SIGKILL when its parent is
//! gone, and a watcher with a pipe to this process kills the whole group, for servers that start workers.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use super::wait_within;

/// Bytes of the log that are shown when something goes wrong.
const LOG_TAIL_BYTES: u64 = 16 << 10;

/// A server of a test.
pub struct Server {
    name: String,
    /// How it is started, each time the same.
    command: Box<dyn Fn() -> Command + Send + Sync>,
    log: PathBuf,
    child: Option<Child>,
    watcher: Option<Child>,
    starts: usize,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "server {} (start {}, log {})", self.name, self.starts, self.log.display())
    }
}

impl Server {
    /// Starts what `command` builds; its output goes to `log`, all starts one after the other. Not ready yet: see
    /// [`Server::wait_ready`].
    pub fn start(name: &str, log: &Path, command: impl Fn() -> Command + Send + Sync + 'static) -> Self {
        let command = Box::new(command);
        let mut server = Self {
            name: name.to_owned(),
            command,
            log: log.to_owned(),
            child: None,
            watcher: None,
            starts: 0,
        };
        server.start_again();
        server
    }

    /// Starts it after a kill or an end, with the same command.
    pub fn start_again(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.name);
        let log = File::options().create(true).append(true).open(&self.log).expect("the log is writable");
        let mut command = (self.command)();
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("clones")).stderr(log);
        self.starts += 1;
        let child = spawn(command).unwrap_or_else(|error| panic!("cannot start {}: {error}", self.name));
        self.watcher = Some(watch_group(child.id()));
        self.child = Some(child);
    }

    /// Waits until `is_ready`; panics with the log when the child ends first or `limit` passes.
    pub fn wait_ready(&mut self, limit: Duration, mut is_ready: impl FnMut() -> bool) {
        let deadline = Instant::now() + limit;
        while !is_ready() {
            if let Some(status) = self.try_wait() {
                panic!("{} ended before it was ready: {status}\n{}", self.name, self.log_tail());
            }
            assert!(
                Instant::now() < deadline,
                "{} not ready within {limit:?}\n{}",
                self.name,
                self.log_tail()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap_or_else(|| panic!("{} does not run", self.name)).id()
    }

    /// True while the child runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.is_some() && self.try_wait().is_none()
    }

    /// How often it was started.
    pub fn starts(&self) -> usize {
        self.starts
    }

    fn try_wait(&mut self) -> Option<ExitStatus> {
        self.child.as_mut().and_then(|child| child.try_wait().expect("waits"))
    }

    /// SIGKILL to it and all that it started, as a power cut would.
    pub fn kill(&mut self) -> ExitStatus {
        let mut child = self.child.take().unwrap_or_else(|| panic!("{} does not run", self.name));
        signal_group(child.id(), libc::SIGKILL);
        let status = child.wait().expect("waits");
        self.end_watcher();
        status
    }

    /// SIGTERM, and waits for the end at most `limit`.
    pub fn terminate(&mut self, limit: Duration) -> ExitStatus {
        signal(self.pid(), libc::SIGTERM);
        let what = format!("the end of {}", self.name);
        let status = wait_within(&what, limit, || self.try_wait());
        self.kill();
        status
    }

    /// Kill and start again; the caller waits until it is ready.
    pub fn restart(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
        self.start_again();
    }

    /// SIGSTOP to it and its workers: it keeps its connections and answers nobody. Returns when it stands still.
    pub fn pause(&self) {
        let pid = self.pid();
        signal_group(pid, libc::SIGSTOP);
        wait_within("standstill", Duration::from_secs(10), || {
            matches!(state(pid), Some('T' | 't')).then_some(())
        });
    }

    /// SIGCONT.
    pub fn resume(&self) {
        signal_group(self.pid(), libc::SIGCONT);
    }

    /// Resident bytes of the child alone; `None` when it is gone.
    pub fn resident_bytes(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
    }

    /// The end of what it wrote.
    pub fn log_tail(&self) -> String {
        let tail = || -> std::io::Result<String> {
            let mut file = File::open(&self.log)?;
            let bytes = file.metadata()?.len();
            file.seek(SeekFrom::Start(bytes.saturating_sub(LOG_TAIL_BYTES)))?;
            let mut text = Vec::new();
            file.read_to_end(&mut text)?;
            Ok(String::from_utf8_lossy(&text).into_owned())
        };
        format!("---- log of {}\n{}", self.name, tail().unwrap_or_else(|error| error.to_string()))
    }

    fn end_watcher(&mut self) {
        if let Some(mut watcher) = self.watcher.take() {
            let _ = watcher.kill();
            let _ = watcher.wait();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Through the macro: the harness puts it with the failed test.
            eprintln!("{}", self.log_tail());
        }
        if let Some(mut child) = self.child.take() {
            signal_group(child.id(), libc::SIGKILL);
            let _ = child.wait();
        }
        self.end_watcher();
    }
}

/// Sends `signal` to one process.
pub fn signal(pid: u32, signal: i32) {
    // SAFETY: kill has no effect on this process's memory; the pid is a child's that is not yet waited for.
    unsafe { libc::kill(pid as libc::pid_t, signal) };
}

fn signal_group(pid: u32, number: i32) {
    // SAFETY: as above; the child leads a group of its own.
    unsafe { libc::kill(-(pid as libc::pid_t), number) };
}

/// The letter of the process's state in /proc: R, S, T, Z and so on.
pub fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.trim_start().chars().next()
}

/// True when the process was ended by this signal.
pub fn died_of(status: ExitStatus, signal: i32) -> bool {
    status.signal() == Some(signal)
}

type Order = (Command, mpsc::Sender<std::io::Result<Child>>);

/// Starts `command` in a group of its own, to die with this process.
///
/// The system's "parent" is a thread, so a child that a test's thread started would die with that thread, also when
/// another test still uses it. One thread that lives as long as the process starts them all.
pub fn spawn(mut command: Command) -> std::io::Result<Child> {
    static ORDERS: OnceLock<Mutex<mpsc::Sender<Order>>> = OnceLock::new();
    let orders = ORDERS.get_or_init(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        let work = move || {
            for (mut command, answer) in inbox {
                let _ = answer.send(command.spawn());
            }
        };
        std::thread::Builder::new().name("servers".to_owned()).spawn(work).expect("a thread");
        Mutex::new(orders)
    });
    let parent = std::process::id();
    // SAFETY: only system calls that are allowed between fork and exec, on values of this closure.
    unsafe {
        command.process_group(0).pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            if libc::getppid() as u32 != parent {
                return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
    let (answer, result) = mpsc::channel();
    let order = (command, answer);
    orders.lock().unwrap_or_else(std::sync::PoisonError::into_inner).send(order).expect("the thread lives");
    result.recv().expect("the thread lives")
}

/// A shell that waits for the end of a pipe from this process and then kills the group.
fn watch_group(pid: u32) -> Child {
    let script = format!("read -r _; kill -9 -- -{pid} 2>/dev/null");
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command.process_group(0).spawn().expect("a shell")
}
