//! A real S3 server for tests: MinIO, or `s3s-fs`, as a child process on a free loopback port that ends with the test.
//!
//! The program is named by `BOXWRIGHT_S3_SERVER`, or found as `minio` or `s3s-fs` on the path. Where there is none a
//! test says so and passes, unless `BOXWRIGHT_REQUIRE_SERVICES=1`.
#![allow(dead_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use boxwright::job::secret::Secret;
use boxwright::job::service::StoreConfig;

/// Longest start of a server on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(60);

/// The program of an S3 server.
pub fn program() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("BOXWRIGHT_S3_SERVER") {
        let named = PathBuf::from(named);
        assert!(named.is_file(), "BOXWRIGHT_S3_SERVER names {}, which is no file", named.display());
        return Some(named);
    }
    let path = std::env::var_os("PATH")?;
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let named = |name: &str| folders.iter().map(|folder| folder.join(name)).find(|file| file.is_file());
    named("minio").or_else(|| named("s3s-fs"))
}

/// The server of a test, or `None` after a loud word.
pub fn server() -> Option<S3Server> {
    let Some(program) = program() else {
        let is_required = std::env::var("BOXWRIGHT_REQUIRE_SERVICES").is_ok_and(|value| value == "1");
        assert!(!is_required, "BOXWRIGHT_REQUIRE_SERVICES is set and there is no S3 server");
        eprintln!("SKIPPED: no S3 server (set BOXWRIGHT_S3_SERVER to minio or s3s-fs)");
        return None;
    };
    Some(S3Server::start(&program))
}

/// A running server.
pub struct S3Server {
    program: PathBuf,
    folder: tempfile::TempDir,
    data: PathBuf,
    child: Option<Child>,
    host: IpAddr,
    port: u16,
    console_port: u16,
    starts: u32,
    /// Folder of certificates, when it speaks TLS.
    certificates: Option<PathBuf>,
}

/// Makes a certificate authority `ca.crt` and a certificate of 127.0.0.1 signed by it. False without `openssl`.
pub fn make_certificates(folder: &Path) -> bool {
    std::fs::create_dir_all(folder).expect("a folder");
    std::fs::write(folder.join("names"), "subjectAltName=IP:127.0.0.1,DNS:localhost\n").expect("written");
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    let steps = [
        format!("req -x509 {key} -keyout ca.key -out ca.crt -days 2 -subj /CN=boxwright-test"),
        format!("req {key} -keyout private.key -out leaf.csr -subj /CN=localhost"),
        "x509 -req -in leaf.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out public.crt -days 2 -extfile names"
            .to_owned(),
    ];
    steps.iter().all(|step| {
        let mut command = Command::new("openssl");
        command.args(step.split(' ')).current_dir(folder).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    })
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("an address").port()
}

impl S3Server {
    /// Starts one and waits until it answers.
    pub fn start(program: &Path) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let data = folder.path().join("data");
        Self::start_with(program, folder, &data)
    }

    /// The same with its data in a given folder.
    pub fn start_in(program: &Path, data: &Path) -> Self {
        Self::start_with(program, tempfile::tempdir().expect("a folder"), data)
    }

    fn start_with(program: &Path, folder: tempfile::TempDir, data: &Path) -> Self {
        std::fs::create_dir_all(data).expect("a folder");
        let mut server = Self {
            program: program.to_owned(),
            data: data.to_owned(),
            folder,
            child: None,
            host: Ipv4Addr::LOCALHOST.into(),
            port: free_port(),
            console_port: free_port(),
            starts: 0,
            certificates: None,
        };
        server.run();
        server
    }

    /// Puts MinIO behind TLS with a certificate of its own authority. `None` without `openssl`.
    pub fn with_tls(mut self) -> Option<Self> {
        let folder = self.folder.path().join("certificates");
        if !make_certificates(&folder) {
            return None;
        }
        self.certificates = Some(folder);
        self.run();
        Some(self)
    }

    /// Puts it on another address of this machine.
    pub fn bound_to(mut self, host: IpAddr) -> Self {
        self.host = host;
        self.run();
        self
    }

    /// The certificate of its authority.
    pub fn ca_file(&self) -> Option<PathBuf> {
        self.certificates.as_ref().map(|folder| folder.join("ca.crt"))
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((self.host, self.port))
    }

    /// True for the one that checks everything itself.
    pub fn is_minio(&self) -> bool {
        self.program.file_name().is_some_and(|name| name == "minio")
    }

    /// A configuration of a store on it.
    pub fn config(&self) -> StoreConfig {
        StoreConfig {
            folder: None,
            endpoint: Some(match self.certificates {
                None => format!("http://{}", self.address()),
                Some(_) => format!("https://{}", self.address()),
            }),
            ca_file: self.ca_file(),
            id: Some(Secret::new("boxwright-test")),
            secret: Some(Secret::new("boxwright-test-secret")),
            part_bytes: 5 << 20,
            ..StoreConfig::default()
        }
    }

    /// Ends it without warning.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it again on the same port with the same data.
    pub fn run(&mut self) {
        self.kill();
        self.starts += 1;
        let log_path = self.folder.path().join(format!("log{}", self.starts));
        let log = File::create(&log_path).expect("a log");
        let data = self.data.clone();
        let mut command = Command::new(&self.program);
        if self.is_minio() {
            command.arg("server").arg(&data).arg("--address").arg(self.address().to_string());
            command.arg("--console-address").arg(format!("127.0.0.1:{}", self.console_port));
            if let Some(folder) = &self.certificates {
                command.arg("--certs-dir").arg(folder);
            }
            command.env("MINIO_ROOT_USER", "boxwright-test");
            command.env("MINIO_ROOT_PASSWORD", "boxwright-test-secret");
            command.env("MINIO_BROWSER", "off").env("MINIO_UPDATE", "off");
        } else {
            command.args(["--host", &self.host.to_string(), "--port", &self.port.to_string()]);
            command.args(["--access-key", "boxwright-test", "--secret-key", "boxwright-test-secret"]);
            command.arg(&data);
        }
        command.env("HOME", self.folder.path());
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        // SAFETY: between fork and exec only prctl is called, which is async-signal-safe and takes no pointer.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        self.child = Some(command.spawn().expect("the S3 server starts"));
        let deadline = Instant::now() + START_LIMIT;
        while !self.answers() {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            let log = || std::fs::read_to_string(&log_path).unwrap_or_default();
            assert!(ended.is_none(), "the S3 server ended: {ended:?}\n{}", log());
            assert!(Instant::now() < deadline, "the S3 server does not answer\n{}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// True when it is ready for requests: MinIO refuses a stranger then, another server answers anything at all.
    fn answers(&self) -> bool {
        let Ok(mut stream) = TcpStream::connect_timeout(&self.address(), Duration::from_millis(200)) else {
            return false;
        };
        if self.certificates.is_some() {
            return true;
        }
        let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
        let mut head = [0u8; 12];
        let request = b"GET /nobody HTTP/1.0\r\nHost: localhost\r\n\r\n";
        let answered = stream.write_all(request).and_then(|()| stream.read_exact(&mut head));
        answered.is_ok() && (!self.is_minio() || &head[9..12] == b"403")
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        self.kill();
    }
}
