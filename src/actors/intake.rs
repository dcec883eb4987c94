//! What becomes of a submitted text: a job, a duplicate, or a refusal with every reason.
//!
//! The journal has the verdict before anyone is told; the sidecar beside the file comes after, and is written again
//! when a crash came between. The user's own file is never touched.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::adapters::queue::journal::Journal;
use crate::adapters::queue::{JobStore, QueueError};
use crate::job::clock::{now_unix_ms, rfc3339};
use crate::job::message::content_hash;
use crate::job::record::{IntakeEntry, JobRecord, NewJob, SharedJob};
use crate::job::spec::{JobSpec, LoadedSpec, Overlay, SpecContext, SpecError};
use crate::job::state::JobState;

/// Run folders tried before giving up: `train_x`, `train_x-2`, ...
const RUN_FOLDERS_MAX: u32 = 10_000;

/// The service that takes a file, as its sidecar names it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Taker {
    /// The machine.
    pub machine_id: String,
    /// Identity of the state folder: two services on one machine differ in it.
    pub installation: String,
}

/// A text that wants to become a job.
#[derive(Debug, Clone)]
pub struct Submission {
    /// The file, or a name for it.
    pub source: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its modification time, Unix milliseconds.
    pub modified_unix_ms: i64,
    /// True for a watched file, whose verdicts are kept; false for the command line, which is told directly.
    pub keep_verdict: bool,
    /// Run again what has completed with this very content.
    pub again: bool,
    /// How other machines know it; `None` for a job of this machine alone.
    pub shared: Option<SharedJob>,
    /// Values that came with a message and win over the text.
    pub overlay: Overlay,
    /// Who takes it, for the sidecar of a watched file.
    pub taker: Option<Taker>,
}

impl Submission {
    /// Identity of its content: the text and what is laid over it.
    pub fn content_sha256(&self) -> String {
        content_hash(&self.bytes, &self.overlay.overrides)
    }
}

/// What became of it.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// A new job.
    Accepted(Box<JobRecord>),
    /// Valid, and asked for nothing but validation.
    DryRun(String),
    /// Known already: the verdict that stands.
    Known(IntakeEntry),
    /// No job, and why.
    Rejected(String),
}

/// Decides about a submission and writes the verdict into the journal.
///
/// # Errors
/// Those of the journal; nothing was decided then.
pub fn decide(
    journal: &mut Journal,
    submission: &Submission,
    context: &SpecContext,
) -> Result<Verdict, QueueError> {
    let hash = submission.content_sha256();
    if submission.keep_verdict
        && let Some(known) = journal.intake(&submission.source, &hash)?
        // A refusal stands until the file is written again: its reason may have gone by then.
        && (known.accepted || known.modified_unix_ms == submission.modified_unix_ms)
    {
        return Ok(Verdict::Known(known));
    }
    let loaded = JobSpec::load_over(&submission.bytes, &submission.source, context, &submission.overlay)
        .and_then(LoadedSpec::runnable);
    let spec = match loaded {
        Ok(spec) => spec,
        Err(error) => return reject(journal, submission, hash, explain(&error)),
    };
    if spec.dry_run {
        let verdict = accepted_json(submission, &spec, &hash, None);
        if submission.keep_verdict {
            journal.record_intake(&entry(submission, hash, true, None, verdict.clone()))?;
        }
        return Ok(Verdict::DryRun(verdict));
    }
    if let Some(reason) = duplicate(journal, submission, &spec, &hash)? {
        return reject(journal, submission, hash, reason);
    }
    let Some(run_dir) = run_dir_of(journal, submission, &spec)? else {
        let reason = format!("{}: there are too many folders of this name", spec.run_dir().display());
        return reject(journal, submission, hash, reason);
    };
    let verdict = accepted_json(submission, &spec, &hash, Some(&run_dir));
    let job = NewJob {
        source: submission.source.clone(),
        content_sha256: hash.clone(),
        run_dir,
        reason: "waits for the next round of scheduling".to_owned(),
        spec,
        shared: submission.shared.clone(),
        continues: None,
    };
    let task_id = job.spec.task_id.clone();
    let kept = submission.keep_verdict.then(|| entry(submission, hash.clone(), true, Some(&job), verdict));
    match journal.accept(job, kept) {
        Ok(record) => Ok(Verdict::Accepted(Box::new(record))),
        Err(QueueError::Busy { state, source_name, .. }) if source_name == submission.source => {
            let reason = format!(
                "the job {task_id} that this file became is {state}; it is unaffected by the change. The new content was \
                 not taken because its task_id is in use: wait for the end of that job, or write another task_id"
            );
            reject(journal, submission, hash, reason)
        }
        Err(error @ (QueueError::Busy { .. } | QueueError::FolderBusy { .. })) => {
            reject(journal, submission, hash, error.to_string())
        }
        Err(error) => Err(error),
    }
}

/// The reason when this very content has already completed under this task id.
fn duplicate(
    journal: &Journal,
    submission: &Submission,
    spec: &JobSpec,
    hash: &str,
) -> Result<Option<String>, QueueError> {
    if submission.again {
        return Ok(None);
    }
    let newest = journal.job(&spec.task_id)?;
    Ok(newest.filter(|record| record.state == JobState::Completed && record.content_sha256 == hash).map(
        |record| {
            format!(
                "the job {} with this very content (from {}) has completed; its results are in {}",
                record.task_id,
                record.source,
                record.run_dir.display()
            )
        },
    ))
}

fn reject(
    journal: &mut Journal,
    submission: &Submission,
    hash: String,
    reason: String,
) -> Result<Verdict, QueueError> {
    if submission.keep_verdict {
        journal.record_intake(&entry(submission, hash, false, None, reason.clone()))?;
    }
    Ok(Verdict::Rejected(reason))
}

fn entry(
    submission: &Submission,
    content_sha256: String,
    accepted: bool,
    job: Option<&NewJob>,
    verdict: String,
) -> IntakeEntry {
    IntakeEntry {
        path: submission.source.clone(),
        content_sha256,
        modified_unix_ms: submission.modified_unix_ms,
        accepted,
        task_id: job.map(|job| job.spec.task_id.clone()),
        verdict,
        at_unix_ms: now_unix_ms(),
    }
}

fn explain(error: &SpecError) -> String {
    error.to_string()
}

/// What the sidecar of an accepted file says.
fn accepted_json(submission: &Submission, spec: &JobSpec, hash: &str, run_dir: Option<&Path>) -> String {
    let verdict = json!({
        "taken_by": submission.taker,
        "task_id": spec.task_id,
        "accepted_at": rfc3339(now_unix_ms()),
        "content_sha256": hash,
        "dry_run": spec.dry_run,
        "run_dir": run_dir,
        "understood": spec.understood,
        "ignored": spec.ignored,
        "overridden": spec.overridden,
    });
    format!("{verdict:#}\n")
}

/// The run folder: that of the same submission when it was here before and moved away, else one that is free.
fn run_dir_of(
    journal: &Journal,
    submission: &Submission,
    spec: &JobSpec,
) -> Result<Option<PathBuf>, QueueError> {
    if let Some(shared) = &submission.shared
        && let Some(before) = journal.job(&spec.task_id)?.filter(|record| record.instance == shared.instance)
    {
        return Ok(Some(before.run_dir));
    }
    Ok(free_run_dir(&spec.run_dir()))
}

/// The run folder itself when it does not exist, or the first of `-2`, `-3`, ... that does not.
fn free_run_dir(wanted: &Path) -> Option<PathBuf> {
    if !wanted.exists() {
        return Some(wanted.to_owned());
    }
    let name = wanted.file_name()?.to_string_lossy().into_owned();
    (2..RUN_FOLDERS_MAX)
        .map(|number| wanted.with_file_name(format!("{name}-{number}")))
        .find(|path| !path.exists())
}

/// The sidecar paths of a file: accepted, rejected.
pub fn sidecars(path: &Path) -> (PathBuf, PathBuf) {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    (
        path.with_file_name(format!("{name}.accepted.json")),
        path.with_file_name(format!("{name}.rejected.txt")),
    )
}

/// Writes the sidecar of a verdict; an older refusal beside an acceptance goes. Nothing is done when it already says so.
///
/// # Errors
/// Whatever the file system says; the journal is the truth, so a caller may go on.
pub fn write_sidecar(path: &Path, accepted: bool, verdict: &str) -> std::io::Result<()> {
    let (accepted_path, rejected_path) = sidecars(path);
    let target = if accepted { &accepted_path } else { &rejected_path };
    let text = if accepted { verdict.to_owned() } else { format!("{}\n", verdict.trim_end()) };
    if accepted && rejected_path.exists() {
        std::fs::remove_file(&rejected_path)?;
    }
    if std::fs::read(target).is_ok_and(|found| found == text.as_bytes()) {
        return Ok(());
    }
    let temporary = target.with_extension("tmp");
    std::fs::write(&temporary, text)?;
    std::fs::rename(&temporary, target)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::record::Change;
    use crate::job::service::ServiceConfig;

    fn submission(source: &str, text: &str) -> Submission {
        Submission {
            source: source.into(),
            bytes: text.as_bytes().to_vec(),
            modified_unix_ms: 1,
            keep_verdict: true,
            again: false,
            shared: None,
            overlay: Overlay::default(),
            taker: None,
        }
    }

    struct Fixture {
        journal: Journal,
        context: SpecContext,
        _folder: tempfile::TempDir,
    }

    impl Fixture {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let context = ServiceConfig::default().spec_context(folder.path().to_owned());
            Self { journal: Journal::in_memory().expect("opens"), context, _folder: folder }
        }

        fn decide(&mut self, submission: &Submission) -> Verdict {
            decide(&mut self.journal, submission, &self.context).expect("the journal works")
        }

        fn end(&mut self, verdict: &Verdict, state: JobState) {
            let Verdict::Accepted(record) = verdict else { panic!("{verdict:?}") };
            if state == JobState::Completed {
                self.journal.begin_attempt(record.seq, "starts").expect("legal");
            }
            self.journal.change(record.seq, Change::to(state, "test")).expect("legal");
        }
    }

    const JOB: &str = "model: yolov8n\ntype: yolo\ntask_id: a\ntrain: {data: d.yaml}\n";

    fn rejected(verdict: Verdict) -> String {
        match verdict {
            Verdict::Rejected(reason) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_same_content_of_the_same_file_is_known() {
        let mut fixture = Fixture::new();
        let first = fixture.decide(&submission("a.yaml", JOB));
        assert!(matches!(first, Verdict::Accepted(_)));
        assert!(
            matches!(fixture.decide(&submission("a.yaml", JOB)), Verdict::Known(entry) if entry.accepted)
        );
        fixture.end(&first, JobState::Completed);
        let touched = Submission { modified_unix_ms: 99, ..submission("a.yaml", JOB) };
        assert!(matches!(fixture.decide(&touched), Verdict::Known(_)), "touching is no change");
        assert_eq!(fixture.journal.recent(10).expect("reads").len(), 1);
    }

    #[test]
    fn an_edit_is_taken_when_its_task_id_is_free() {
        let mut fixture = Fixture::new();
        let first = fixture.decide(&submission("a.yaml", JOB));
        let edited = submission("a.yaml", &JOB.replace("train: {", "train: {epochs: 7, "));
        let reason = rejected(fixture.decide(&edited));
        assert!(reason.contains("is queued; it is unaffected by the change"), "{reason}");
        fixture.end(&first, JobState::Cancelled);
        assert!(
            matches!(fixture.decide(&edited), Verdict::Known(entry) if !entry.accepted),
            "until it is written again"
        );
        let written_again = Submission { modified_unix_ms: 2, ..edited };
        match fixture.decide(&written_again) {
            Verdict::Accepted(record) => assert_eq!((record.generation, record.spec.args.epochs), (2, 7)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn one_task_id_is_one_job() {
        let mut fixture = Fixture::new();
        let first = fixture.decide(&submission("a.yaml", JOB));
        let second = submission("b.yaml", &JOB.replace("d.yaml", "e.yaml"));
        assert_eq!(
            rejected(fixture.decide(&second)),
            "task id a is taken by a job that is queued (from a.yaml)"
        );
        fixture.end(&first, JobState::Completed);
        let reason = rejected(fixture.decide(&submission("b.yaml", JOB)));
        assert!(reason.contains("with this very content (from a.yaml) has completed"), "{reason}");
        let again = Submission { again: true, keep_verdict: false, ..submission("command line", JOB) };
        assert!(matches!(fixture.decide(&again), Verdict::Accepted(_)));
    }

    #[test]
    fn files_without_task_id_become_two_jobs_in_two_folders() {
        let mut fixture = Fixture::new();
        let text = JOB.replace("task_id: a\n", "");
        let (one, two) =
            (fixture.decide(&submission("a.yaml", &text)), fixture.decide(&submission("b.yaml", &text)));
        match (one, two) {
            (Verdict::Accepted(one), Verdict::Accepted(two)) => {
                assert_ne!(one.task_id, two.task_id);
                assert_ne!(one.run_dir, two.run_dir);
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_used_run_folder_is_left_alone() {
        let mut fixture = Fixture::new();
        let wanted = fixture.context.working_dir.join("runs/models/default/yolo/a/1/train_a");
        std::fs::create_dir_all(&wanted).expect("writable");
        match fixture.decide(&submission("a.yaml", JOB)) {
            Verdict::Accepted(record) => assert_eq!(record.run_dir, wanted.with_file_name("train_a-2")),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn refusals_and_dry_runs_make_no_job() {
        let mut fixture = Fixture::new();
        let device = submission("a.yaml", &JOB.replace("data:", "device: [0, 1], data:"));
        assert!(rejected(fixture.decide(&device)).contains("training on several GPUs is not supported"));
        let dry = submission("b.yaml", &format!("{JOB}dry_run: true\n"));
        assert!(matches!(fixture.decide(&dry), Verdict::DryRun(text) if text.contains("\"dry_run\": true")));
        assert_eq!(fixture.journal.active().expect("reads"), []);
    }

    #[test]
    fn sidecars_stand_beside_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("job.yaml");
        std::fs::write(&file, "x").expect("writable");
        write_sidecar(&file, false, "why not").expect("writable");
        let (accepted, rejected) = sidecars(&file);
        assert_eq!(std::fs::read_to_string(&rejected).expect("is there"), "why not\n");
        write_sidecar(&file, true, "{}").expect("writable");
        assert!(accepted.ends_with("job.yaml.accepted.json") && accepted.exists() && !rejected.exists());
        assert_eq!(std::fs::read_to_string(&file).expect("is there"), "x");
    }
}
