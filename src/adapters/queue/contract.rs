//! What every store of jobs must do, run over each form of it.

use serde_json::json;

use super::journal::Journal;
use super::{JobStore, QueueError, Retry};
use crate::job::record::{Change, CommandKind, IntakeEntry, JobRecord, NewJob, ProcessId};
use crate::job::slot::{SlotBoard, SlotRecord, SlotState};
use crate::job::spec::{JobSpec, SpecContext};
use crate::job::state::{FailureClass, JobState};

fn spec(task_id: &str) -> JobSpec {
    let context = SpecContext {
        base: None,
        strict: false,
        runs_dir: "runs".into(),
        working_dir: "/w".into(),
        data_path_map: Vec::new(),
    };
    let text = format!("model: yolov8n\ntype: yolo\ntask_id: {task_id}\ntrain: {{data: d.yaml}}\n");
    JobSpec::load(text.as_bytes(), "test", &context).expect("valid").spec
}

pub(super) fn new_job(task_id: &str) -> NewJob {
    let spec = spec(task_id);
    let run_dir = spec.run_dir();
    NewJob {
        spec,
        source: "a.yaml".into(),
        content_sha256: "00".into(),
        run_dir,
        reason: "waits".into(),
        shared: None,
        continues: None,
    }
}

fn in_state(store: &mut dyn JobStore, task_id: &str, path: &[JobState]) -> JobRecord {
    let mut record = store.accept(new_job(task_id), None).expect("accepted");
    for &state in path {
        record = store.change(record.seq, Change::to(state, "test")).expect("legal");
    }
    record
}

/// The suite.
fn contract(store: &mut dyn JobStore) {
    accepting(store);
    every_move(store);
    retries_and_processes(store);
    history_and_requests(store);
    verdicts(store);
    boards(store);
}

fn boards(store: &mut dyn JobStore) {
    assert_eq!(store.board().expect("reads"), None);
    let service = ProcessId { pid: 7, started_ticks: 9 };
    let slot = SlotRecord {
        name: "GPU 1".into(),
        device: "cuda:1".into(),
        uuid: Some("GPU-a".into()),
        model: Some("T".into()),
        state: SlotState::Quarantined,
        task_id: None,
        reason: "3 faults in a row".into(),
        faults: 3,
        back_off_ms: 60_000,
        until_unix_ms: Some(5),
    };
    for slots in [vec![slot.clone(), slot], Vec::new()] {
        let board = SlotBoard { service, slots };
        store.set_board(&board).expect("stored");
        assert_eq!(store.board().expect("reads"), Some(board));
    }
}

fn accepting(store: &mut dyn JobStore) {
    let first = store.accept(new_job("a"), None).expect("accepted");
    assert_eq!((first.generation, first.state, first.attempts), (1, JobState::Queued, 0));
    assert_eq!(*first.spec, spec("a"));
    match store.accept(new_job("a"), None).expect_err("taken") {
        error @ QueueError::Busy { .. } => {
            assert_eq!(error.retry(), Retry::Never);
            assert_eq!(error.to_string(), "task id a is taken by a job that is queued (from a.yaml)");
        }
        other => panic!("{other}"),
    }
    let mut same_folder = new_job("a2");
    same_folder.run_dir = first.run_dir.clone();
    assert!(matches!(store.accept(same_folder, None), Err(QueueError::FolderBusy { .. })));
    store.change(first.seq, Change::to(JobState::Cancelled, "stopped")).expect("legal");
    let second = store.accept(new_job("a"), None).expect("free again");
    assert_eq!((second.generation, second.seq > first.seq), (2, true));
    assert_eq!(store.job(&second.task_id).expect("reads").map(|record| record.seq), Some(second.seq));
    assert_eq!(store.job(&"nobody".parse().expect("valid")).expect("reads"), None);
    store
        .change(second.seq, Change::to(JobState::Failed, "x").with_class(FailureClass::Data))
        .expect("legal");
}

fn every_move(store: &mut dyn JobStore) {
    use JobState::{Completed, Interrupted, Preparing, Queued, Running, Stopping};
    let ways: [(JobState, &[JobState]); 8] = [
        (Queued, &[]),
        (Preparing, &[Preparing]),
        (Running, &[Preparing, Running]),
        (Stopping, &[Preparing, Running, Stopping]),
        (Interrupted, &[Preparing, Running, Interrupted]),
        (Completed, &[Preparing, Running, Completed]),
        (JobState::Failed, &[Preparing, JobState::Failed]),
        (JobState::Cancelled, &[JobState::Cancelled]),
    ];
    for (from, way) in ways {
        for to in JobState::ALL {
            let id = format!("move-{from}-{to}");
            let record = in_state(store, &id, way);
            assert_eq!(record.state, from);
            let moved = store.change(record.seq, Change::to(to, "test"));
            match moved {
                Ok(after) => {
                    assert!(from.may_become(to) && after.state == to, "{from} to {to}");
                    assert_eq!(after.finished_unix_ms.is_some(), to.is_terminal());
                }
                Err(QueueError::Illegal { from: seen, .. }) => {
                    assert!(!from.may_become(to) && seen == from, "{from} to {to}");
                    let kept = store.job(&record.task_id).expect("reads").expect("is there");
                    assert_eq!(kept, record, "a refused move changes nothing");
                }
                Err(other) => panic!("{from} to {to}: {other}"),
            }
            let left = store.job(&record.task_id).expect("reads").expect("is there");
            if !left.state.is_terminal() {
                store.change(left.seq, Change::to(JobState::Cancelled, "tidy")).expect("legal");
            }
        }
    }
    assert_eq!(store.active().expect("reads"), []);
}

fn retries_and_processes(store: &mut dyn JobStore) {
    let job = store.accept(new_job("r"), None).expect("accepted");
    let begun = store.begin_attempt(job.seq, "starts").expect("legal");
    assert_eq!((begun.attempts, begun.state), (1, JobState::Preparing));
    assert!(begun.started_unix_ms.is_some());
    let process = ProcessId { pid: 4_000_000_000, started_ticks: u64::MAX / 4 };
    store.set_process(job.seq, Some(process)).expect("stored");
    assert_eq!(store.active().expect("reads")[0].process, Some(process));
    let waits = store.retry(job.seq, FailureClass::Killed, "again", 77).expect("legal");
    assert_eq!((waits.state, waits.not_before_unix_ms, waits.process), (JobState::Queued, 77, None));
    assert_eq!(waits.retries[&FailureClass::Killed], 1);
    store.begin_attempt(job.seq, "starts").expect("legal");
    let waits = store.retry(job.seq, FailureClass::Memory, "again", 0).expect("legal");
    assert_eq!((waits.attempts, waits.retries.len()), (2, 2));
    store.set_reasons(&[(job.seq, "waits for a slot".to_owned())]).expect("stored");
    store.set_progress(job.seq, &json!({"epoch": 3})).expect("stored");
    let seen = store.job(&job.task_id).expect("reads").expect("is there");
    assert_eq!((seen.reason.as_str(), seen.progress), ("waits for a slot", Some(json!({"epoch": 3}))));
    store.begin_attempt(job.seq, "starts").expect("legal");
    let away = store.change(job.seq, Change::to(JobState::Interrupted, "shutdown")).expect("legal");
    assert_eq!(away.interruptions, 1);
    let done = Change::to(JobState::Completed, "done").with_result(Some(json!({"fitness": 0.5})));
    let done = store.change(job.seq, done).expect("legal");
    assert_eq!((done.result, done.attempts), (Some(json!({"fitness": 0.5})), 3));
    assert!(matches!(
        store.change(9_999_999, Change::to(JobState::Failed, "")),
        Err(QueueError::Unknown { .. })
    ));
}

fn history_and_requests(store: &mut dyn JobStore) {
    let job = store.accept(new_job("h"), None).expect("accepted");
    for epoch in 0..3 {
        store.add_event(job.seq, "epoch", &json!({"epoch": epoch})).expect("stored");
    }
    let events = store.events(job.seq, 0, 100).expect("reads");
    assert_eq!(
        events.iter().map(|event| event.kind.as_str()).collect::<Vec<_>>(),
        ["state", "epoch", "epoch", "epoch"]
    );
    let rest = store.events(job.seq, events[1].id, 1).expect("reads");
    assert_eq!(rest[0].detail, json!({"epoch": 1}));
    store.push_command(&job.task_id, CommandKind::Stop).expect("stored");
    store.push_command(&job.task_id, CommandKind::Stop).expect("stored once");
    let commands = store.commands().expect("reads");
    assert_eq!((commands.len(), &commands[0].task_id), (1, &job.task_id));
    store.finish_command(commands[0].id).expect("removed");
    assert_eq!(store.commands().expect("reads"), []);
    store.change(job.seq, Change::to(JobState::Cancelled, "tidy")).expect("legal");
    assert!(store.recent(2).expect("reads").len() == 2);
}

fn verdicts(store: &mut dyn JobStore) {
    let entry = |hash: &str, accepted: bool, at: i64| IntakeEntry {
        path: "/c/a.yaml".into(),
        content_sha256: hash.into(),
        modified_unix_ms: 5,
        accepted,
        task_id: accepted.then(|| "v".parse().expect("valid")),
        verdict: "text".into(),
        at_unix_ms: at,
    };
    store.record_intake(&entry("1", false, 1)).expect("stored");
    let accepted = store.accept(new_job("v"), Some(entry("2", true, 2))).expect("accepted");
    assert_eq!(store.intake("/c/a.yaml", "1").expect("reads"), Some(entry("1", false, 1)));
    assert_eq!(store.intake("/c/a.yaml", "3").expect("reads"), None);
    assert_eq!(store.last_accepted("/c/a.yaml").expect("reads"), Some(entry("2", true, 2)));
    assert!(store.accept(new_job("v"), Some(entry("4", true, 3))).is_err(), "taken");
    assert_eq!(store.intake("/c/a.yaml", "4").expect("reads"), None, "a refused job leaves no verdict");
    store.change(accepted.seq, Change::to(JobState::Cancelled, "tidy")).expect("legal");
}

#[test]
fn contract_in_memory() {
    contract(&mut Journal::in_memory().expect("opens"));
}

#[test]
fn contract_on_disk_and_after_reopening() {
    let folder = tempfile::tempdir().expect("a folder");
    contract(&mut Journal::open(folder.path()).expect("opens"));
    let records = Journal::open(folder.path()).expect("opens again").recent(1000).expect("reads");
    assert!(records.len() > 64 && records.iter().all(|record| record.state.is_terminal()));
}

#[test]
fn two_connections_see_each_other() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut service = Journal::open(folder.path()).expect("opens");
    let mut command_line = Journal::open_existing(folder.path()).expect("opens").expect("is there");
    let version = service.data_version().expect("reads");
    let job = command_line.accept(new_job("x"), None).expect("accepted");
    command_line.push_command(&job.task_id, CommandKind::Stop).expect("stored");
    assert_ne!(service.data_version().expect("reads"), version);
    assert_eq!(service.commands().expect("reads").len(), 1);
    service.begin_attempt(job.seq, "starts").expect("legal");
    assert_eq!(
        command_line.job(&job.task_id).expect("reads").map(|job| job.state),
        Some(JobState::Preparing)
    );
}

#[test]
fn history_is_bounded() {
    let mut store = Journal::in_memory().expect("opens");
    let job = store.accept(new_job("x"), None).expect("accepted");
    for epoch in 0..crate::job::event::EVENTS_PER_JOB_MAX + 20 {
        store.add_event(job.seq, "epoch", &json!(epoch)).expect("stored");
    }
    let events = store.events(job.seq, 0, 100_000).expect("reads");
    assert!(events.len() as i64 <= crate::job::event::EVENTS_PER_JOB_MAX + 1, "{}", events.len());
    assert_eq!(events[0].kind, "state", "changes of state are kept");
    assert_eq!(
        events.last().map(|event| &event.detail),
        Some(&json!(crate::job::event::EVENTS_PER_JOB_MAX + 19))
    );
}

#[test]
fn a_damaged_or_newer_journal_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(Journal::path(folder.path()), [7u8; 5000]).expect("writable");
    let error = Journal::open(folder.path()).expect_err("damaged");
    assert!(matches!(error, QueueError::Damaged { .. }), "{error}");
    let folder = tempfile::tempdir().expect("a folder");
    drop(Journal::open(folder.path()).expect("opens"));
    let raw = rusqlite::Connection::open(Journal::path(folder.path())).expect("opens");
    raw.pragma_update(None, "user_version", 99).expect("stored");
    drop(raw);
    let error = Journal::open(folder.path()).expect_err("newer").to_string();
    assert!(error.contains("has schema version 99; this program knows up to 2"), "{error}");
    assert!(Journal::open_existing(tempfile::tempdir().expect("a folder").path()).expect("reads").is_none());
}

#[test]
fn the_database_itself_refuses_to_leave_a_terminal_state() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut store = Journal::open(folder.path()).expect("opens");
    let job = store.accept(new_job("x"), None).expect("accepted");
    store.change(job.seq, Change::to(JobState::Cancelled, "stopped")).expect("legal");
    let raw = rusqlite::Connection::open(Journal::path(folder.path())).expect("opens");
    assert!(raw.execute("UPDATE jobs SET state = 'completed'", []).is_err());
}
