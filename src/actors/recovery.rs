//! What a dead service left behind, put in order before anything new starts.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::endings::{self, Ending};
use crate::adapters::process;
use crate::adapters::queue::journal::Journal;
use crate::adapters::queue::{JobStore, QueueError};
use crate::job::clock::now_unix_ms;
use crate::job::ids::TaskId;
use crate::job::record::JobRecord;
use crate::job::service::ServiceConfig;
use crate::job::state::JobState;
use crate::train::child::ChildResult;

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
            Some(result) => endings::read_result(&result),
            None if record.state == JobState::Stopping => Ending::Cancelled(None),
            None => Ending::Interrupted("the service ended while the job ran".to_owned()),
        };
        let settled = endings::settle(journal, &record, ending, config, now_unix_ms())?;
        tracing::info!(task_id = %settled.task_id, state = %settled.state, "recovered: {}", settled.reason);
        changed.push(settled);
    }
    Ok(changed)
}
