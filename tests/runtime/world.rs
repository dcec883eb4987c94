//! A service of its own for each test: folders, configuration, the built program, conditions with a limit.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use boxwright::adapters::process;
use boxwright::adapters::queue::JobStore;
use boxwright::adapters::queue::journal::Journal;
use boxwright::job::record::JobRecord;
use boxwright::job::state::JobState;

/// How long a condition may take before a test gives up. Wide: the machine may be busy.
pub const LIMIT: Duration = Duration::from_secs(60);

pub struct World {
    folder: tempfile::TempDir,
    service: Option<Child>,
    starts: usize,
    /// Environment of the program; without a word of the test it finds no driver, whatever the machine has.
    environment: Vec<(&'static str, PathBuf)>,
    limit: Duration,
    /// Words before the program: what runs it, somewhere else.
    launcher: Vec<String>,
}

/// A file system of its own, gone at the end of the test.
pub struct Mount<'a>(&'a Path);

impl<'a> Mount<'a> {
    /// `None` where this user may not mount.
    pub fn tmpfs(path: &'a Path, options: &str) -> Option<Self> {
        std::fs::create_dir_all(path).expect("writable");
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(path).output();
        done.is_ok_and(|done| done.status.success()).then_some(Self(path))
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// Writes into this folder until its file system is full, down to the last block.
pub fn fill(folder: &Path) -> PathBuf {
    let path = folder.join("filler");
    let mut filler = File::create(&path).expect("writable");
    for bytes in [64 << 10, 4096, 512] {
        while std::io::Write::write_all(&mut filler, &vec![0u8; bytes]).is_ok() {}
    }
    path
}

/// A job for the stub trainer.
pub fn job(task_id: &str, stub: &str) -> String {
    format!("model: yolov8n\ntype: yolo\ntask_id: {task_id}\ntrain: {{data: 'stub:{stub}'}}\n")
}

impl World {
    pub fn new() -> Self {
        Self::with("")
    }

    /// With more lines in the service configuration.
    pub fn with(more: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let nowhere = folder.path().join("no-driver");
        let environment = vec![("BOXWRIGHT_CUDA_DRIVER", nowhere)];
        let world = Self { folder, service: None, starts: 0, environment, limit: LIMIT, launcher: vec![] };
        std::fs::create_dir(world.path("configs")).expect("writable");
        let stub = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/stub_trainer.sh");
        let mut text = "watch: {poll_interval_ms: 200, settle_ms: 300, open_settle_ms: 1500}\n\
             retry: {killed: {budget: 3, delay_seconds: 0.05}, memory: {budget: 2, delay_seconds: 0.05}, \
             storage: {budget: 1, delay_seconds: 0.05}, device: {budget: 1, delay_seconds: 0.05}}\n\
             logging: {level: DEBUG}\n"
            .to_owned();
        if !more.contains("trainer:") {
            text.push_str(&format!("trainer: {{program: {}}}\n", stub.display()));
        }
        text.push_str(&more.replace("STUB", &stub.display().to_string()));
        std::fs::write(world.path("service.yaml"), text).expect("writable");
        world
    }

    /// Sets a variable of the program's environment.
    pub fn set(&mut self, name: &'static str, value: impl Into<PathBuf>) {
        self.environment.retain(|(known, _)| *known != name);
        self.environment.push((name, value.into()));
    }

    /// Lets these words run the program, in its own process: `ip netns exec NAME`.
    #[allow(dead_code)]
    pub fn launch_by(&mut self, words: &[&str]) {
        self.launcher = words.iter().map(|word| (*word).to_owned()).collect();
    }

    /// Gives conditions more time: emulated GPUs are slow.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().expect("has a folder")).expect("writable");
        std::fs::write(&path, text).expect("writable");
        path
    }

    /// Writes a file beside and moves it in, as a careful program does.
    pub fn drop_job(&self, name: &str, text: impl AsRef<[u8]>) {
        let aside = self.write(&format!("aside/{name}"), text);
        std::fs::rename(aside, self.path(&format!("configs/{name}"))).expect("same file system");
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let program = env!("CARGO_BIN_EXE_boxwright");
        let mut words = self.launcher.iter().map(String::as_str).chain([program]);
        let mut command = Command::new(words.next().unwrap_or(program));
        command
            .args(words)
            .args(arguments)
            .arg("--service")
            .arg("service.yaml")
            .current_dir(self.folder.path());
        for name in [
            "CONFIGS_DIR",
            "STOP_DIR",
            "STATE_DIR",
            "RESULT_PATH",
            "LOG_DIR",
            "MACHINE_ID",
            "MAX_GPU",
            "REDIS_URL",
            "MINIO_ENDPOINT",
            "MLFLOW_TRACKING_URI",
            "RUST_LOG",
        ] {
            command.env_remove(name);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the program runs")
    }

    pub fn start(&mut self) {
        self.start_with(&["run"]);
    }

    pub fn start_with(&mut self, arguments: &[&str]) {
        assert!(self.service.is_none(), "one service at a time");
        self.starts += 1;
        let log = File::create(self.path(&format!("service{}.log", self.starts))).expect("writable");
        let child = self
            .command(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("clones"))
            .stderr(log)
            .spawn()
            .expect("the program runs");
        self.service = Some(child);
    }

    pub fn pid(&self) -> u32 {
        self.service.as_ref().expect("a service runs").id()
    }

    pub fn kill_service(&mut self) {
        let mut child = self.service.take().expect("a service runs");
        child.kill().expect("kills");
        child.wait().expect("waits");
    }

    /// Sends a signal and waits for the end.
    pub fn end_service(&mut self, signal: i32) -> ExitStatus {
        process::signal(self.pid(), signal);
        self.wait_service()
    }

    pub fn wait_service(&mut self) -> ExitStatus {
        let mut child = self.service.take().expect("a service runs");
        let deadline = Instant::now() + self.limit;
        loop {
            if let Some(status) = child.try_wait().expect("waits") {
                return status;
            }
            if Instant::now() > deadline {
                child.kill().expect("kills");
                panic!("the service did not end\n{}", self.logs());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn logs(&self) -> String {
        (1..=self.starts)
            .map(|start| self.read(&format!("service{start}.log")))
            .collect::<Vec<_>>()
            .join("\n--- restart\n")
    }

    /// Waits until `condition` gives something.
    pub fn wait<T>(&self, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + self.limit;
        loop {
            if let Some(value) = condition() {
                return value;
            }
            assert!(
                Instant::now() < deadline,
                "{what} did not happen within {:?}\n{}",
                self.limit,
                self.logs()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn wait_file(&self, name: &str) -> String {
        self.wait(name, || {
            let text = self.read(name);
            (!text.is_empty()).then_some(text)
        })
    }

    pub fn wait_log(&self, part: &str) {
        self.wait(&format!("a log line with {part:?}"), || self.logs().contains(part).then_some(()));
    }

    pub fn record(&self, task_id: &str) -> Option<JobRecord> {
        let journal = Journal::open_existing(&self.path("state")).ok()??;
        journal.job(&task_id.parse().expect("valid")).ok()?
    }

    /// The slots as `boxwright status --slots --json` shows them.
    pub fn slots(&self) -> Vec<serde_json::Value> {
        let output = self.run(&["status", "--slots", "--json"]);
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// Waits until the slot of this name is in this state, and gives it.
    pub fn wait_slot(&self, name: &str, state: &str) -> serde_json::Value {
        self.wait(&format!("{name} {state}"), || {
            self.slots().into_iter().find(|slot| slot["name"] == name && slot["state"] == state)
        })
    }

    /// Waits until a waiting job says this.
    pub fn wait_reason(&self, task_id: &str, part: &str) -> JobRecord {
        self.wait(&format!("{task_id} to say {part:?}"), || {
            self.record(task_id).filter(|record| record.reason.contains(part))
        })
    }

    pub fn records(&self) -> Vec<JobRecord> {
        let journal = Journal::open_existing(&self.path("state")).expect("opens");
        journal.map_or(Vec::new(), |journal| journal.recent(1000).expect("reads"))
    }

    pub fn wait_state(&self, task_id: &str, state: JobState) -> JobRecord {
        self.wait(&format!("{task_id} {state}"), || {
            let record = self.record(task_id)?;
            assert!(
                record.state == state || !record.state.is_terminal(),
                "{task_id} became {} ({}) instead of {state}\n{}",
                record.state,
                record.reason,
                self.logs()
            );
            (record.state == state).then_some(record)
        })
    }

    /// The run folder of the stub's first generation.
    pub fn run_dir(&self, task_id: &str) -> String {
        format!("runs/models/default/yolo/{task_id}/1/train_{task_id}")
    }

    /// What the stub wrote into its run folder.
    pub fn stub(&self, task_id: &str, name: &str) -> String {
        self.read(&format!("{}/{name}", self.run_dir(task_id)))
    }

    /// The stub's process, while it lives.
    pub fn stub_pid(&self, task_id: &str) -> Option<u32> {
        self.stub(task_id, "pid").parse().ok().filter(|&pid| process::started_ticks(pid).is_some())
    }

    pub fn wait_steps(&self, task_id: &str, steps: usize) {
        self.wait(&format!("{steps} steps of {task_id}"), || {
            (self.stub(task_id, "steps").lines().count() >= steps).then_some(())
        });
    }

    /// Nothing was trained after completion, nothing twice at once.
    pub fn assert_no_violation(&self, task_id: &str) {
        assert_eq!(self.stub(task_id, "violations"), "", "{task_id}\n{}", self.logs());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(mut child) = self.service.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
