//! What a dead service left behind, put in order before anything new starts.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::endings::{self, Ending};
use super::trainer::certified;
use crate::adapters::process;
use crate::adapters::queue::journal::Journal;
use crate::adapters::queue::{JobStore, QueueError};
use crate::job::clock::now_unix_ms;
use crate::job::ids::TaskId;
use crate::job::record::JobRecord;
use crate::job::service::ServiceConfig;
use crate::job::state::JobState;
use crate::train::child::{ChildResult, ChildSpec};

/// How long a left-over trainer may take to die.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// The file that a trainer's process is started with.
pub fn child_spec_path(state_dir: &Path, task_id: &TaskId) -> PathBuf {
    state_dir.join("children").join(format!("{task_id}.json"))
}

/// The file that a trainer leaves its result in.
pub fn result_path(run_dir: &Path) -> PathBuf {
    run_dir.join("result.json")
}

/// The result of this very attempt, when the trainer left one.
pub fn result_of(record: &JobRecord) -> Option<ChildResult> {
    ChildResult::read(&result_path(&record.run_dir))
        .filter(|result| result.task_id == record.task_id.as_str() && result.attempt == record.attempts)
}

/// The GPU that this very attempt was given, by the file that its process was started with.
fn gpu_uuid_of(record: &JobRecord, state_dir: &Path) -> Option<String> {
    let text = std::fs::read(child_spec_path(state_dir, &record.task_id)).ok()?;
    let spec: ChildSpec = serde_json::from_slice(&text).ok()?;
    spec.gpu_uuid.filter(|_| spec.attempt == record.attempts)
}

/// Puts every job that had a process in order: a trainer that still runs is killed; a job whose trainer left its
/// result is settled by it; one that was asked to stop is cancelled; any other is interrupted and will be continued.
/// Returns what was changed.
///
/// # Errors
/// Those of the journal. Calling again goes on where it ended.
pub fn recover(
    journal: &mut Journal,
    config: &ServiceConfig,
    state_dir: &Path,
) -> Result<Vec<JobRecord>, QueueError> {
    let mut changed = Vec::new();
    for record in journal.active()? {
        super::supervisor::prepare_log_again(&record);
        let mut left = process::with_argument(&child_spec_path(state_dir, &record.task_id));
        left.extend(record.process.filter(|&process| process::is_alive(process)));
        for process in left {
            tracing::warn!(task_id = %record.task_id, pid = process.pid, "killing the trainer that an earlier service left");
            if !process::kill_and_wait(process, KILL_LIMIT) {
                tracing::error!(task_id = %record.task_id, pid = process.pid, "the left-over trainer does not die");
            }
        }
        if !record.state.has_process() {
            continue;
        }
        let ending = match result_of(&record) {
            Some(result) => certified(endings::read_result(&result), gpu_uuid_of(&record, state_dir)),
            None if record.state == JobState::Stopping => Ending::Cancelled(None),
            None => Ending::Interrupted("the service ended while the job ran".to_owned()),
        };
        let settled = endings::settle(journal, &record, ending, config, now_unix_ms())?;
        tracing::info!(task_id = %settled.task_id, state = %settled.state, "recovered: {}", settled.reason);
        super::supervisor::end_log(&settled);
        changed.push(settled);
    }
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;

    use super::*;
    use crate::job::record::{Change, NewJob};

    fn running(journal: &mut Journal, config: &ServiceConfig, folder: &Path, id: &str) -> JobRecord {
        let text = format!("model: yolov8n\ntype: yolo\ntask_id: {id}\ntrain: {{data: d}}\n");
        let new = NewJob::sample(&text, &config.spec_context(folder.to_owned()));
        std::fs::create_dir_all(&new.run_dir).expect("writable");
        let record = journal.accept(new, None).expect("accepted");
        journal.begin_attempt(record.seq, "starts").expect("legal");
        journal.change(record.seq, Change::to(JobState::Running, "trains")).expect("legal")
    }

    fn result(record: &JobRecord, attempt: u32, status: &str) {
        let result = ChildResult {
            task_id: record.task_id.to_string(),
            attempt,
            status: status.into(),
            class: Some("data".into()),
            reason: Some("no images".into()),
            fitness: Some(0.25),
            metrics: serde_json::Map::new(),
            best: (status == "completed").then(|| record.run_dir.join("best.safetensors")),
            last: None,
            epochs: Some(3),
            data_fingerprint: None,
            val_fingerprint: None,
        };
        result.write(&result_path(&record.run_dir)).expect("writable");
    }

    #[test]
    fn what_a_dead_service_left_is_put_in_order() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = ServiceConfig::default();
        let mut journal = Journal::in_memory().expect("opens");
        let ids = ["plain", "finished", "failed", "older", "stopping", "waiting"];
        let mut records: Vec<JobRecord> =
            ids.iter().map(|id| running(&mut journal, &config, folder.path(), id)).collect();
        result(&records[1], 1, "completed");
        std::fs::write(records[1].run_dir.join("best.safetensors"), "abc").expect("writable");
        let given = ChildSpec {
            task_id: "finished".into(),
            attempt: 1,
            mode: Default::default(),
            run_dir: records[1].run_dir.clone(),
            args: records[1].spec.args.clone(),
            resume: true,
            result_path: result_path(&records[1].run_dir),
            gpu_share_max: 1.0,
            gpu_uuid: Some("GPU-1".into()),
        };
        let path = child_spec_path(folder.path(), &records[1].task_id);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("writable");
        std::fs::write(&path, serde_json::to_vec(&given).expect("JSON")).expect("writable");
        result(&records[2], 1, "failed");
        result(&records[3], 0, "completed");
        records[4] = journal.change(records[4].seq, Change::to(JobState::Stopping, "asked")).expect("legal");
        journal.change(records[5].seq, Change::to(JobState::Interrupted, "before")).expect("legal");
        let changed = recover(&mut journal, &config, folder.path()).expect("recovers");
        let states: Vec<(&str, JobState)> =
            changed.iter().map(|record| (record.task_id.as_str(), record.state)).collect();
        assert_eq!(
            states,
            [
                ("plain", JobState::Interrupted),
                ("finished", JobState::Completed),
                ("failed", JobState::Failed),
                ("older", JobState::Interrupted),
                ("stopping", JobState::Cancelled),
            ]
        );
        assert_eq!(changed[2].reason, "no images");
        let told = changed[1].result.as_ref().expect("a result");
        let sum = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!((told["best_sha256"].as_str(), told["gpu_uuid"].as_str()), (Some(sum), Some("GPU-1")));
        assert!(
            recover(&mut journal, &config, folder.path()).expect("recovers").is_empty(),
            "once is enough"
        );
    }

    #[test]
    fn a_trainer_that_outlived_its_service_is_killed_first() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = ServiceConfig::default();
        let mut journal = Journal::in_memory().expect("opens");
        let known = running(&mut journal, &config, folder.path(), "known");
        let unheard = running(&mut journal, &config, folder.path(), "unheard");
        let start = |arguments: &[&std::ffi::OsStr]| {
            let mut command = std::process::Command::new("sh");
            command.args(["-c", "sleep 60"]).args(arguments).process_group(0);
            command.spawn().expect("sh is everywhere")
        };
        let mut one = start(&[]);
        let process = process::identify(one.id()).expect("it runs");
        journal.set_process(known.seq, Some(process)).expect("stored");
        let spec = child_spec_path(folder.path(), &unheard.task_id);
        let mut two = start(&["train-child".as_ref(), "--spec".as_ref(), spec.as_os_str()]);
        let reaper = std::thread::spawn(move || (one.wait(), two.wait()));
        let changed = recover(&mut journal, &config, folder.path()).expect("recovers");
        assert!(changed.iter().all(|record| record.state == JobState::Interrupted) && changed.len() == 2);
        assert!(!process::is_alive(process));
        let (one, two) = reaper.join().expect("joins");
        assert!(!one.expect("waits").success() && !two.expect("waits").success());
    }
}
