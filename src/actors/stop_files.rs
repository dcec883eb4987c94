//! What a stop file means for its job: a plain function of the file and the journal.

use crate::job::clock::now_unix_ms;
use crate::job::ids::TaskId;
use crate::job::record::JobRecord;
use crate::job::state::JobState;

/// What to do about a stop file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum StopVerdict {
    /// Stop the job.
    Stop,
    /// The job has ended: put the file aside; the text is a warning when it did not end by being stopped.
    PutAside(Option<String>),
    /// Leave it and say this once.
    Leave(String),
    /// Leave it for now: the machine that has the job by now may read the same folder.
    Wait,
}

/// Time for another machine to find a stop file in a folder that several read, milliseconds.
const OTHERS_MS: i64 = 30_000;

/// The task id in the name of a stop file; `None` when the name is none, an error text when the id is none.
pub(super) fn task_id_of(name: &str) -> Option<Result<TaskId, String>> {
    let id = name.strip_prefix("stop_training_")?.strip_suffix(".txt")?;
    Some(id.parse().map_err(|error: crate::job::ids::InvalidTaskId| error.to_string()))
}

/// Judges a stop file by the newest record of its task id.
pub(super) fn judge(record: Option<&JobRecord>, modified_unix_ms: i64, honour_stale: bool) -> StopVerdict {
    let Some(record) = record else {
        return StopVerdict::Leave(
            "no job of this task id is known; the file is left where it is".to_owned(),
        );
    };
    let state = record.state;
    let age_ms = now_unix_ms() - modified_unix_ms;
    if state.is_terminal() && record.entry.is_some() && age_ms < OTHERS_MS {
        return StopVerdict::Wait;
    }
    if state.is_terminal() {
        let warning =
            (state != JobState::Cancelled).then(|| format!("the job is already {state}; nothing to stop"));
        return StopVerdict::PutAside(warning);
    }
    if modified_unix_ms < record.accepted_unix_ms && !honour_stale {
        return StopVerdict::Leave(
            "the file is older than the job and is not obeyed; touch it to stop the job, or set stop.honour_stale".to_owned(),
        );
    }
    StopVerdict::Stop
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::queue::JobStore;
    use crate::adapters::queue::journal::Journal;
    use crate::job::record::{Change, NewJob};

    #[test]
    fn names() {
        assert_eq!(task_id_of("readme.txt"), None);
        assert_eq!(task_id_of("stop_training_a.txt.done"), None);
        assert_eq!(task_id_of("stop_training_a-1.txt").expect("is one").expect("valid").as_str(), "a-1");
        assert!(task_id_of("stop_training_.txt").expect("is one").is_err());
        assert!(task_id_of("stop_training_a b.txt").expect("is one").is_err());
    }

    #[test]
    fn queued_running_finished_unknown_and_stale() {
        let mut journal = Journal::in_memory().expect("opens");
        let context = crate::job::service::ServiceConfig::default().spec_context("/w".into());
        let text = "model: yolov8n\ntype: yolo\ntask_id: a\ntrain: {data: d}\n";
        let new = NewJob::sample(text, &context);
        let record = journal.accept(new, None).expect("accepted");
        let after = record.accepted_unix_ms + 5;
        assert!(matches!(judge(None, after, true), StopVerdict::Leave(_)));
        assert_eq!(judge(Some(&record), after, false), StopVerdict::Stop);
        assert!(matches!(judge(Some(&record), record.accepted_unix_ms - 5, false), StopVerdict::Leave(_)));
        assert_eq!(judge(Some(&record), record.accepted_unix_ms - 5, true), StopVerdict::Stop);
        let running = journal.begin_attempt(record.seq, "starts").expect("legal");
        assert_eq!(judge(Some(&running), after, false), StopVerdict::Stop);
        let done = journal.change(record.seq, Change::to(JobState::Completed, "done")).expect("legal");
        assert!(matches!(judge(Some(&done), after, false), StopVerdict::PutAside(Some(_))));
        let cancelled = JobRecord { state: JobState::Cancelled, ..done };
        assert_eq!(judge(Some(&cancelled), after, false), StopVerdict::PutAside(None));
    }
}
