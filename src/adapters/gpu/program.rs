//! Asking about GPUs in a child process: `PROGRAM probe` and `PROGRAM probe --test UUID`.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::process::Command;
use tokio::time::timeout;

use super::{Answer, Found, GpuError, GpuPort, Tested};
use crate::adapters::process;

/// Longest look. A driver that wakes many GPUs takes seconds.
const LOOK_LIMIT: Duration = Duration::from_secs(30);
/// Longest test: the first one compiles a kernel.
const TEST_LIMIT: Duration = Duration::from_secs(120);
/// Bytes of its last words that are passed on.
const SAID_BYTES_MAX: usize = 400;

/// Asks a program, usually this one, in a process of its own that ends with the answer.
#[derive(Debug, Clone)]
pub struct ProbeProgram {
    program: PathBuf,
    look_limit: Duration,
    test_limit: Duration,
}

impl ProbeProgram {
    /// Asks `program`.
    pub fn new(program: PathBuf) -> Self {
        Self { program, look_limit: LOOK_LIMIT, test_limit: TEST_LIMIT }
    }
}

impl GpuPort for ProbeProgram {
    fn look(&self) -> Answer<Found> {
        Box::pin(ask(self.program.clone(), vec!["probe".into()], self.look_limit))
    }

    fn test(&self, uuid: &str) -> Answer<Tested> {
        let arguments = vec!["probe".into(), "--test".into(), uuid.to_owned()];
        Box::pin(ask(self.program.clone(), arguments, self.test_limit))
    }
}

async fn ask<T: DeserializeOwned>(
    program: PathBuf,
    arguments: Vec<String>,
    limit: Duration,
) -> Result<T, GpuError> {
    let command = format!("`{} {}`", program.display(), arguments.join(" "));
    let mut child = Command::new(&program);
    child
        .args(&arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let child = child.spawn().map_err(|source| GpuError::Start { program, source })?;
    let pid = child.id().unwrap_or_default();
    let Ok(output) = timeout(limit, child.wait_with_output()).await else {
        process::signal_group(pid, libc::SIGKILL);
        return Err(GpuError::Limit { command, limit_s: limit.as_secs() });
    };
    let left =
        |status: String, said: &str| GpuError::Left { command: command.clone(), status, said: said.into() };
    let output = output.map_err(|error| left(error.to_string(), ""))?;
    let answer = output.status.success().then(|| serde_json::from_slice(&output.stdout).ok()).flatten();
    answer.ok_or_else(|| {
        let words = String::from_utf8_lossy(&output.stderr);
        let last = words.trim().lines().last().unwrap_or_default();
        let short: String = last.chars().take(SAID_BYTES_MAX).collect();
        let said = if short.is_empty() { String::new() } else { format!(": {short}") };
        left(output.status.to_string(), &said)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn with_script<R>(text: &str, use_it: impl AsyncFnOnce(ProbeProgram) -> R) -> R {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("probe.sh");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("writable");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("ours");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(use_it(ProbeProgram { program: path, ..ProbeProgram::new(PathBuf::new()) }))
    }

    #[test]
    fn answers_are_read_and_everything_else_is_a_sentence() {
        let gpu = r#"{"number":1,"uuid":"GPU-a","name":"T","memory_bytes":5}"#;
        let script = format!(
            "if [ \"$2\" = --test ]; then echo \"{{\\\"fault\\\":\\\"no $3\\\"}}\"; else echo '{{\"gpus\":[{gpu}]}}'; fi"
        );
        with_script(&script, async |port| {
            let found = port.look().await.expect("an answer");
            assert_eq!((found.gpus[0].number, found.gpus[0].uuid.as_str()), (1, "GPU-a"));
            assert_eq!(found.obstacle, None);
            assert_eq!(port.test("GPU-a").await.expect("an answer").fault.as_deref(), Some("no GPU-a"));
        });
        with_script("echo driver fell over >&2; kill -SEGV $$", async |port| {
            let error = port.look().await.expect_err("it died").to_string();
            assert!(error.contains("probe` left without an answer") && error.contains("SIGSEGV"), "{error}");
            assert!(error.ends_with(": driver fell over"), "{error}");
        });
        with_script("sleep 60", async |port| {
            let port = ProbeProgram { look_limit: Duration::from_millis(20), ..port };
            let error = port.look().await.expect_err("too long").to_string();
            assert!(error.contains("did not answer within 0 s"), "{error}");
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let error = runtime.block_on(ProbeProgram::new("/nowhere/x".into()).look()).expect_err("not there");
        assert!(error.to_string().starts_with("/nowhere/x cannot be started"), "{error}");
    }
}
