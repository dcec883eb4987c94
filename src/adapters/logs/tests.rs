//! Spellings, job files, limits.

use std::sync::{Arc, Mutex};

use serde_json::Value as Json;
use time::UtcOffset;
use tracing::Level;

use super::*;

fn line() -> LogLine {
    LogLine {
        time: time::macros::datetime!(2026-01-02 03:04:05.678 UTC),
        level: Level::WARN,
        module: "boxwright::actors::supervisor".into(),
        line: 7,
        message: "two\nlines".into(),
        task_id: Some("a".into()),
        fields: serde_json::Map::from_iter([("epoch".to_owned(), Json::from(3))]),
    }
}

#[test]
fn three_formats() {
    assert_eq!(line().text(LogFormat::Simple, false), "03:04:05 | WARNING  | two\nlines task_id=a epoch=3");
    assert_eq!(
        line().text(LogFormat::Detailed, false),
        "2026-01-02 03:04:05.678 | WARNING  | boxwright::actors::supervisor:7 - two\nlines task_id=a epoch=3"
    );
    let json = line().text(LogFormat::Json, true);
    assert!(!json.contains('\n') && !json.contains('\x1b'), "{json}");
    let json: Json = serde_json::from_str(&json).expect("one object");
    assert_eq!((json["task_id"].as_str(), json["epoch"].as_i64()), (Some("a"), Some(3)));
    assert_eq!((json["level"].as_str(), json["message"].as_str()), (Some("WARNING"), Some("two\nlines")));
    assert_eq!(json["time"].as_str(), Some("2026-01-02T03:04:05.678Z"));
    assert!(line().text(LogFormat::Detailed, true).starts_with("\x1b[32m2026"), "colours");
}

#[test]
fn events_reach_console_and_the_file_of_their_job() {
    let folder = tempfile::tempdir().expect("a folder");
    let jobs = JobLogs::start(folder.path().join("jobs"), LogFormat::Json, 3).expect("starts");
    let seen = Arc::new(Mutex::new(Vec::<String>::new()));
    let console: ConsoleWriter = {
        let seen = seen.clone();
        Arc::new(move |line| seen.lock().expect("not poisoned").push(line.to_owned()))
    };
    let sinks = vec![
        Sink::Console { format: LogFormat::Simple, colour: false, write: console },
        Sink::Jobs(jobs.sender()),
    ];
    let subscriber = tracing_subscriber::registry().with(LogLayer::new(sinks, UtcOffset::UTC));
    tracing::subscriber::with_default(subscriber, || {
        tracing::info!("nobody's");
        tracing::info!(task_id = "one", epoch = 2, "mine");
        let span = tracing::info_span!("job", task_id = "two");
        let _entered = span.enter();
        tracing::warn!("inside a span");
        tracing::error!(task_id = "../evil", "never a path");
    });
    drop(jobs);
    let console = seen.lock().expect("not poisoned").join("\n");
    assert!(
        console.contains("| INFO     | nobody's") && console.contains("mine task_id=one epoch=2"),
        "{console}"
    );
    let one = std::fs::read_to_string(job_log_path(folder.path(), "one")).expect("written");
    let one: Json = serde_json::from_str(one.trim()).expect("one line");
    assert_eq!((one["message"].as_str(), one["task_id"].as_str()), (Some("mine"), Some("one")));
    assert!(
        one["line"].as_u64() > Some(0)
            && one["module"].as_str().is_some_and(|name| name.contains("logs::tests"))
    );
    let two = std::fs::read_to_string(job_log_path(folder.path(), "two")).expect("written");
    assert!(two.contains("inside a span"));
    assert!(!folder.path().join("evil.log").exists());
}

#[test]
fn old_job_files_go() {
    let folder = tempfile::tempdir().expect("a folder");
    let jobs = JobLogs::start(folder.path().join("jobs"), LogFormat::Simple, 3).expect("starts");
    for index in 0..8 {
        let mut line = line();
        line.task_id = Some(format!("job{index}"));
        jobs.sender().send(super::jobs::Message::Line(line)).expect("runs");
    }
    drop(jobs);
    let left = std::fs::read_dir(folder.path().join("jobs")).expect("a folder").count();
    assert_eq!(left, 3);
}

#[test]
fn the_files_of_jobs_that_run_stay() {
    let folder = tempfile::tempdir().expect("a folder");
    let jobs = JobLogs::start(folder.path().join("jobs"), LogFormat::Simple, 3).expect("starts");
    let say = |id: &str| {
        let line = LogLine { task_id: Some(id.to_owned()), ..line() };
        jobs.sender().send(super::jobs::Message::Line(line)).expect("runs");
    };
    keep_job_log("a-job-that-runs");
    say("a-job-that-runs");
    for index in 0..8 {
        say(&format!("job{index}"));
    }
    // The thread is through with what was said when it takes this.
    let wait = |left: usize| {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        let count = || std::fs::read_dir(folder.path().join("jobs")).expect("a folder").count();
        while count() != left || !job_log_path(folder.path(), "job7").exists() {
            assert!(std::time::Instant::now() < deadline, "{} files", count());
            std::thread::yield_now();
        }
    };
    wait(3);
    assert!(job_log_path(folder.path(), "a-job-that-runs").exists(), "it is the oldest, and runs");
    let_job_log_go("a-job-that-runs");
    say("job8");
    drop(jobs);
    assert!(!job_log_path(folder.path(), "a-job-that-runs").exists(), "it has ended");
}

#[test]
fn a_run_begins_where_the_file_of_earlier_ones_ends() {
    let folder = tempfile::tempdir().expect("a folder");
    let id = "run-again";
    for run in 0..2 {
        let jobs = JobLogs::start(folder.path().join("jobs"), LogFormat::Simple, 3).expect("starts");
        let task_id = id.to_owned();
        let settings = || {
            let task_id = task_id.clone();
            super::jobs::Message::Settings { task_id, level: None, format: None, run: Some(run) }
        };
        jobs.sender().send(settings()).expect("runs");
        let line = LogLine { task_id: Some(id.to_owned()), message: format!("run {run}"), ..line() };
        jobs.sender().send(super::jobs::Message::Line(line)).expect("runs");
        // The same run again: it began before.
        jobs.sender().send(settings()).expect("runs");
        drop(jobs);
    }
    let text = std::fs::read_to_string(job_log_path(folder.path(), id)).expect("written");
    let begin = job_log_begin(id) as usize;
    assert!(text[..begin].contains("run 0") && text[begin..].contains("run 1"), "{begin}: {text}");
    assert!(!text[begin..].contains("run 0"));
    assert_eq!(job_log_begin("never-heard-of"), 0);
}
