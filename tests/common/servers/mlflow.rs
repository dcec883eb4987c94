//! A real MLflow server as a child of the test program, on a free loopback port, with everything it keeps in a folder of its own.
//!
//! It takes seconds to start, so a test program shares one. It ends with the program however that ends: a shell
//! between the two reads an input that nobody writes to, and kills its process group when that input closes.
//!
//! Each test program uses a part of it, hence the allowance for unused code.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Time to start. The machine may be busy with other tests.
const START_LIMIT: Duration = Duration::from_secs(180);
/// Folders of shared servers are called so, with the number of the test program behind it.
const FOLDER_PREFIX: &str = "mlflow-";
/// Names the program.
const VARIABLE: &str = "BOXWRIGHT_MLFLOW";

/// A running server.
pub struct MlflowServer {
    shell: Child,
    /// `http://127.0.0.1:PORT`.
    pub url: String,
    /// Its port.
    pub port: u16,
}

impl Drop for MlflowServer {
    fn drop(&mut self) {
        // Its end of input is the order to end.
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}

/// The program, or `None` after a loud word.
///
/// # Panics
/// When there is none and `BOXWRIGHT_REQUIRE_SERVICES` is 1, or when `BOXWRIGHT_MLFLOW` names nothing.
pub fn program() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from) {
        assert!(path.is_file(), "{VARIABLE} names {}, which is no program", path.display());
        return Some(path);
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&folders).map(|folder| folder.join("mlflow")).find(|path| path.is_file());
    if found.is_none() {
        let is_required = std::env::var_os("BOXWRIGHT_REQUIRE_SERVICES").is_some_and(|value| value == "1");
        assert!(!is_required, "there is no mlflow (or {VARIABLE}=PATH), and BOXWRIGHT_REQUIRE_SERVICES=1");
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        let _ = writeln!(std::io::stderr(), "SKIPPED {test}: there is no mlflow (or {VARIABLE}=PATH)");
    }
    found
}

/// The server that all tests of this program share; `None` after a loud word when there is no program.
pub fn shared() -> Option<&'static MlflowServer> {
    static SHARED: OnceLock<Option<MlflowServer>> = OnceLock::new();
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let shared = SHARED.get_or_init(|| {
        let program = program()?;
        // A static is never dropped, so each program clears up after those before it.
        let folder = FOLDER.get_or_init(|| {
            let folders = Path::new(env!("CARGO_TARGET_TMPDIR"));
            clear(folders);
            let folder = folders.join(format!("{FOLDER_PREFIX}{}", std::process::id()));
            std::fs::create_dir_all(&folder).expect("the folder for temporary files is writable");
            folder
        });
        Some(MlflowServer::start(&program, folder))
    });
    if shared.is_none() {
        // Every test says that it skips, not only the first.
        program();
    }
    shared.as_ref()
}

/// Removes the folders of test programs that have ended.
fn clear(folders: &Path) {
    for entry in std::fs::read_dir(folders).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix(FOLDER_PREFIX) else { continue };
        if !Path::new("/proc").join(pid).exists() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

impl MlflowServer {
    /// Starts one that keeps everything in `folder`; waits until it answers.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(program: &Path, folder: &Path) -> Self {
        let server = Self::spawn(program, folder, free_port(), &[]);
        let deadline = Instant::now() + START_LIMIT;
        while !is_healthy(server.port) {
            let text = || std::fs::read_to_string(folder.join("server.log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "mlflow did not start within {START_LIMIT:?}:\n{}", text());
            std::thread::sleep(Duration::from_millis(50));
        }
        server
    }

    /// Starts one on `port` and does not wait.
    ///
    /// # Panics
    /// When there is no shell.
    pub fn spawn(program: &Path, folder: &Path, port: u16, more_arguments: &[&str]) -> Self {
        let log = std::fs::File::create(folder.join("server.log")).expect("writable");
        let shell = Command::new("sh")
            .args(["-c", "\"$@\" </dev/null & read -r _; kill -KILL 0", "sh"])
            .arg(program)
            .args(["server", "--host", "127.0.0.1", "--workers", "1", "--serve-artifacts", "--port"])
            .arg(port.to_string())
            .arg("--backend-store-uri")
            .arg(format!("sqlite:///{}", folder.join("mlflow.db").display()))
            .arg("--artifacts-destination")
            .arg(folder.join("artifacts"))
            .args(more_arguments)
            .current_dir(folder)
            // Nothing but the tracking server: no job runners beside it, no word to its makers.
            .env("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
            .env("MLFLOW_DISABLE_TELEMETRY", "true")
            .env("DO_NOT_TRACK", "true")
            .stdin(Stdio::piped())
            .stdout(log.try_clone().expect("a handle"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .expect("a shell starts");
        Self { shell, url: format!("http://127.0.0.1:{port}"), port }
    }

    /// Sends a signal to all its processes.
    pub fn signal(&self, signal: i32) {
        // SAFETY: a system call on numbers; the group is that of the shell, which lives until it is waited for.
        let done = unsafe { libc::kill(-self.shell.id().cast_signed(), signal) };
        assert_eq!(done, 0, "the server has gone");
    }
}

/// A loopback port that nobody listens on.
pub fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).and_then(|l| l.local_addr()).expect("a free port").port()
}

fn is_healthy(port: u16) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    ask().is_ok_and(|text| text.starts_with("HTTP/1.1 200"))
}
