//! The life of one child process.

use std::collections::VecDeque;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use super::lines::Lines;
use super::provision::{Provided, provide};
use super::{Control, TrainerConfig};
use crate::actors::endings::{self, Ending, Witness};
use crate::actors::recovery::{child_spec_path, result_of, result_path};
use crate::actors::supervisor::{ChildEvent, ChildStarted, Supervisor};
use crate::adapters::gpu::Gpu;
use crate::adapters::process;
use crate::job::record::JobRecord;
use crate::job::state::FailureClass;
use crate::train::args::{Device, TrainArgs};
use crate::train::child::{ChildSpec, SUPERVISOR_PID};

/// Lines of standard error kept for the reason of a failure.
const TAIL_LINES_MAX: usize = 40;
/// Bytes of each.
const TAIL_LINE_BYTES_MAX: usize = 512;
/// Time between SIGTERM and SIGKILL after a stop.
const TERM_GRACE: Duration = Duration::from_secs(10);
/// How long pipes are read after the process is gone (a grandchild may hold them open).
const DRAIN_LIMIT: Duration = Duration::from_secs(2);
/// How much rather than another process the child is ended when memory runs out, as the kernel counts it.
const OOM_SCORE: &str = "500";
/// Between two looks at the child's memory.
const MEMORY_INTERVAL: Duration = Duration::from_secs(5);

/// Starts the child of `record`, watches it to its end and says how it ended.
pub(super) async fn run(
    record: JobRecord,
    gpu: Option<Gpu>,
    slot: usize,
    config: &TrainerConfig,
    supervisor: &actix::Addr<Supervisor>,
    mut orders: mpsc::Receiver<Control>,
) -> Ending {
    // The dataset stays as it is until this function has seen the process end.
    let (data, _in_use) = match provide(&record, config.supply.as_ref(), &mut orders).await {
        Ok(Provided { data, in_use }) => (data, in_use),
        Err(ending) => return ending,
    };
    let spec_path = child_spec_path(&config.state_dir, &record.task_id);
    let prepared = {
        let (record, gpu, spec_path) = (record.clone(), gpu.clone(), spec_path.clone());
        let gpu_share_max = config.gpu_share_max;
        tokio::task::spawn_blocking(move || prepare(&record, gpu.as_ref(), &spec_path, gpu_share_max, data))
            .await
    };
    match prepared {
        Ok(Ok(())) => {}
        Ok(Err(reason)) => return Ending::Failed { class: FailureClass::Storage, reason },
        Err(error) => return Ending::Failed { class: FailureClass::Internal, reason: error.to_string() },
    }
    let mut child = match spawn(config, gpu.is_some(), &spec_path) {
        Ok(child) => child,
        Err(error) => {
            let reason = format!("cannot start the trainer {}: {error}", config.program.display());
            return Ending::Failed { class: FailureClass::Internal, reason };
        }
    };
    let pid = child.id().unwrap_or_default();
    if let Some(identity) = process::identify(pid)
        && supervisor.send(ChildStarted { seq: record.seq, process: identity }).await.is_err()
    {
        tracing::warn!(task_id = %record.task_id, "the supervisor is gone; recovery will find the trainer by its arguments");
    }
    let watch = Watch::new(&record, slot, pid, config, supervisor.clone(), &mut child, orders);
    let (status, mut witness) = watch.until_gone(&mut child).await;
    witness.gpu = gpu.as_ref().map(|gpu| gpu.number);
    // Whatever the child started goes with it.
    process::signal_group(pid, libc::SIGKILL);
    let ending = {
        let record = record.clone();
        let result = tokio::task::spawn_blocking(move || result_of(&record)).await.unwrap_or_default();
        match status {
            Ok(status) => endings::read_exit(status, result.as_ref(), &witness),
            Err(error) => Ending::Failed {
                class: FailureClass::Internal,
                reason: format!("cannot wait for the trainer: {error}"),
            },
        }
    };
    let uuid = gpu.map(|gpu| gpu.uuid);
    let ending = tokio::task::spawn_blocking(move || certified(ending, uuid))
        .await
        .unwrap_or_else(|error| Ending::Failed { class: FailureClass::Internal, reason: error.to_string() });
    // Kept only while it is needed; a left-over one does no harm.
    let _ = tokio::fs::remove_file(&spec_path).await;
    ending
}

/// Adds to a result the checksums of its weights, and the GPU. Blocks.
pub(in crate::actors) fn certified(ending: Ending, gpu_uuid: Option<String>) -> Ending {
    let add = |result: Option<Json>| {
        let mut result = result?;
        for name in ["best", "last"] {
            let sum = result[name].as_str().and_then(|path| sha256_of(Path::new(path)).ok());
            result[format!("{name}_sha256")] = sum.into();
        }
        result["gpu_uuid"] = gpu_uuid.clone().into();
        Some(result)
    };
    match ending {
        Ending::Completed(result) => Ending::Completed(add(result)),
        Ending::Cancelled(result) => Ending::Cancelled(add(result)),
        other => other,
    }
}

fn sha256_of(path: &Path) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    std::io::copy(&mut std::fs::File::open(path)?, &mut hash)?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Makes the run folder and writes what the child reads.
fn prepare(
    record: &JobRecord,
    gpu: Option<&Gpu>,
    spec_path: &Path,
    gpu_share_max: f64,
    data: Option<String>,
) -> Result<(), String> {
    let run_dir = &record.run_dir;
    std::fs::create_dir_all(run_dir)
        .map_err(|error| format!("cannot make the run folder {}: {error}", run_dir.display()))?;
    let effective = run_dir.join("config.effective.yaml");
    write_whole(&effective, effective_yaml(record).as_bytes())?;
    // The slot decides: a child on the CPU leaves every GPU alone.
    let device = gpu.map_or(Device::Cpu, |gpu| Device::Cuda(gpu.number));
    let spec = ChildSpec {
        task_id: record.task_id.to_string(),
        attempt: record.attempts,
        mode: record.spec.mode,
        run_dir: run_dir.clone(),
        args: TrainArgs {
            device,
            data: data.unwrap_or_else(|| record.spec.args.data.clone()),
            ..record.spec.args.clone()
        },
        resume: true,
        result_path: result_path(run_dir),
        gpu_share_max: record.spec.gpu_share_max.map_or(gpu_share_max, |share| share.min(gpu_share_max)),
        gpu_uuid: gpu.map(|gpu| gpu.uuid.clone()),
    };
    let text = serde_json::to_vec(&spec).map_err(|error| error.to_string())?;
    if let Some(folder) = spec_path.parent() {
        std::fs::create_dir_all(folder)
            .map_err(|error| format!("cannot make the folder {}: {error}", folder.display()))?;
    }
    write_whole(spec_path, &text)
}

fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), String> {
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, bytes)
        .and_then(|()| std::fs::rename(&temporary, path))
        .map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// The merged configuration with secrets masked, and what became of its keys.
fn effective_yaml(record: &JobRecord) -> String {
    let spec = &record.spec;
    let mut text =
        format!("# The configuration of job {} as it was accepted; secrets are masked.\n", record.task_id);
    text.push_str(&format!(
        "# From {}, SHA-256 {}.\n",
        record.source.replace('\n', " "),
        record.content_sha256
    ));
    for (word, notes) in [("ignored", &spec.ignored), ("overridden", &spec.overridden)] {
        for note in notes {
            text.push_str(&format!("# {word}: {} ({})\n", note.key, note.reason.replace('\n', " ")));
        }
    }
    // A mapping of plain values always has a YAML form; an empty text would only lose a display.
    text.push_str(&serde_yaml::to_string(&spec.effective).unwrap_or_default());
    text
}

fn spawn(config: &TrainerConfig, on_gpu: bool, spec_path: &Path) -> std::io::Result<Child> {
    let mut command = Command::new(&config.program);
    command
        .arg("train-child")
        .arg("--spec")
        .arg(spec_path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    if let Some(threads) = config.threads.filter(|_| !on_gpu) {
        command.env("RAYON_NUM_THREADS", threads.to_string());
    }
    // No code of ours runs between fork and exec: the system can then start the child without copying this process's page
    // tables, which costs more than everything else about a job. The child itself asks to die with us.
    command.env(SUPERVISOR_PID, std::process::id().to_string());
    let child = command.spawn()?;
    if let Some(pid) = child.id() {
        // When memory runs out the trainer goes, not the service. A system without the file is fine too.
        let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), OOM_SCORE);
    }
    Ok(child)
}

/// A child under watch.
struct Watch {
    task_id: String,
    seq: i64,
    slot: usize,
    pid: u32,
    supervisor: actix::Addr<Supervisor>,
    orders: mpsc::Receiver<Control>,
    stdin: Option<ChildStdin>,
    stdout: Lines<tokio::process::ChildStdout>,
    stderr: Lines<tokio::process::ChildStderr>,
    stall_timeout: Duration,
    stall_at: Instant,
    term_at: Option<Instant>,
    kill_at: Option<Instant>,
    memory_at: Instant,
    tail: VecDeque<String>,
    witness: Witness,
}

impl Watch {
    fn new(
        record: &JobRecord,
        slot: usize,
        pid: u32,
        config: &TrainerConfig,
        supervisor: actix::Addr<Supervisor>,
        child: &mut Child,
        orders: mpsc::Receiver<Control>,
    ) -> Self {
        let stall_timeout = Duration::from_millis(config.stall_timeout_ms);
        Self {
            task_id: record.task_id.to_string(),
            seq: record.seq,
            slot,
            pid,
            supervisor,
            orders,
            stdin: child.stdin.take(),
            stdout: Lines::new(child.stdout.take().expect("standard output is a pipe")),
            stderr: Lines::new(child.stderr.take().expect("standard error is a pipe")),
            stall_timeout,
            stall_at: Instant::now() + stall_timeout,
            term_at: None,
            kill_at: None,
            memory_at: Instant::now() + MEMORY_INTERVAL,
            tail: VecDeque::new(),
            witness: Witness::default(),
        }
    }

    async fn until_gone(mut self, child: &mut Child) -> (std::io::Result<ExitStatus>, Witness) {
        let status = loop {
            let deadline = self.next_deadline();
            tokio::select! {
                line = self.stdout.next(), if !self.stdout.ended() => self.said(line).await,
                line = self.stderr.next(), if !self.stderr.ended() => self.muttered(line),
                Some(order) = self.orders.recv() => self.obey(order).await,
                () = sleep_until(deadline) => self.time_passed(),
                status = child.wait() => break status,
            }
        };
        // A line may still be in the pipe; whoever else holds the pipe open does not hold us up.
        let drained = timeout(DRAIN_LIMIT, async {
            while let Some(line) = self.stdout.next().await {
                self.said(Some(line)).await;
            }
            while let Some(line) = self.stderr.next().await {
                self.muttered(Some(line));
            }
        });
        if drained.await.is_err() {
            tracing::warn!(
                task_id = self.task_id,
                "a process that the trainer left behind holds its pipes open"
            );
        }
        self.witness.stderr_tail = self.tail.iter().map(String::as_str).collect::<Vec<_>>().join("\n");
        (status, self.witness)
    }

    fn next_deadline(&self) -> Instant {
        let mut next = self.stall_at.min(self.memory_at);
        for at in [self.term_at, self.kill_at].into_iter().flatten() {
            next = next.min(at);
        }
        next
    }

    fn time_passed(&mut self) {
        let now = Instant::now();
        if now >= self.stall_at {
            let silence_ms = self.stall_timeout.as_millis() as u64;
            tracing::error!(
                task_id = self.task_id,
                pid = self.pid,
                silence_ms,
                "the trainer is stuck; killing it"
            );
            self.witness.stalled_ms = Some(silence_ms);
            self.kill_at = Some(now);
        }
        if self.kill_at.is_some_and(|at| now >= at) {
            process::signal_group(self.pid, libc::SIGKILL);
            (self.kill_at, self.term_at) = (None, None);
            self.stall_at = now + self.stall_timeout;
        } else if self.term_at.is_some_and(|at| now >= at) {
            tracing::warn!(
                task_id = self.task_id,
                pid = self.pid,
                "the trainer takes its time; sending SIGTERM"
            );
            process::signal_group(self.pid, libc::SIGTERM);
            self.term_at = None;
        }
        if now >= self.memory_at {
            self.memory_at = now + MEMORY_INTERVAL;
            if let Some(bytes) = process::resident_bytes(self.pid) {
                self.forward_lossy(json!({"event": "memory", "resident_bytes": bytes}));
            }
        }
    }

    async fn obey(&mut self, order: Control) {
        let now = Instant::now();
        match order {
            Control::Stop { grace_ms } => {
                self.witness.stop_requested = true;
                self.tell("stop\n").await;
                let term_at = now + Duration::from_millis(grace_ms);
                self.term_at = Some(term_at);
                self.kill_at = Some(term_at + TERM_GRACE);
            }
            Control::Interrupt { limit_ms } => {
                self.witness.interrupt_requested = true;
                self.tell("checkpoint\n").await;
                // The end of its input tells the child that nobody will speak to it again: save and leave.
                self.stdin = None;
                self.term_at = Some(now + Duration::from_millis(limit_ms * 2 / 3));
                self.kill_at = Some(now + Duration::from_millis(limit_ms * 5 / 6));
            }
            Control::Kill => {
                self.witness.interrupt_requested |= !self.witness.stop_requested;
                process::signal_group(self.pid, libc::SIGKILL);
            }
        }
    }

    async fn tell(&mut self, line: &str) {
        if let Some(stdin) = &mut self.stdin {
            // A child that no longer listens is dealt with by the deadline.
            let _ = timeout(Duration::from_secs(1), stdin.write_all(line.as_bytes())).await;
        }
    }

    /// A line of standard output: an event, or noise.
    async fn said(&mut self, line: Option<String>) {
        let Some(line) = line.filter(|line| !line.trim().is_empty()) else { return };
        self.stall_at = Instant::now() + self.stall_timeout;
        let event: Json = match serde_json::from_str(&line) {
            Ok(event @ Json::Object(_)) => event,
            _ => {
                tracing::debug!(task_id = self.task_id, "not an event: {line}");
                return;
            }
        };
        match event["event"].as_str() {
            Some("finished") => self.witness.finished = Some(event.clone()),
            Some("failed") => {
                self.witness.failed =
                    event["message"].as_str().or(event["reason"].as_str()).map(str::to_owned);
            }
            Some("step" | "validating") => return self.forward_lossy(event),
            Some(_) => {}
            None => return,
        }
        let message = ChildEvent { slot: self.slot, seq: self.seq, event };
        if self.supervisor.send(message).await.is_err() {
            tracing::warn!(task_id = self.task_id, "the supervisor is gone; an event is lost to the journal");
        }
    }

    /// Sends what may be lost: a busy supervisor must not slow the training down.
    fn forward_lossy(&self, event: Json) {
        drop(self.supervisor.try_send(ChildEvent { slot: self.slot, seq: self.seq, event }));
    }

    /// A line of standard error: to the job's log, and kept for the reason of a failure.
    fn muttered(&mut self, line: Option<String>) {
        let Some(line) = line else { return };
        let (level, text) = split_level(&line);
        match level {
            "ERROR" => tracing::error!(target: "trainer", task_id = self.task_id, "{text}"),
            "WARNING" => tracing::warn!(target: "trainer", task_id = self.task_id, "{text}"),
            "DEBUG" | "TRACE" => tracing::debug!(target: "trainer", task_id = self.task_id, "{text}"),
            _ => tracing::info!(target: "trainer", task_id = self.task_id, "{text}"),
        }
        if self.tail.len() == TAIL_LINES_MAX {
            self.tail.pop_front();
        }
        self.tail.push_back(line.chars().take(TAIL_LINE_BYTES_MAX).collect());
    }
}

/// Level and message of a line that is a log line already (`time | LEVEL | rest`).
fn split_level(line: &str) -> (&str, &str) {
    let mut parts = line.splitn(3, " | ");
    match (parts.next(), parts.next().map(str::trim), parts.next()) {
        (Some(_), Some(level @ ("TRACE" | "DEBUG" | "INFO" | "WARNING" | "ERROR")), Some(rest)) => {
            (level, rest)
        }
        _ => ("INFO", line),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_lines_keep_their_level() {
        assert_eq!(split_level("12:00:00 | WARNING  | a | b"), ("WARNING", "a | b"));
        assert_eq!(split_level("thread panicked"), ("INFO", "thread panicked"));
    }
}
