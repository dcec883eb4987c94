//! What the end of a trainer's process means for its job.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use serde_json::{Value as Json, json};

use crate::adapters::queue::journal::Journal;
use crate::adapters::queue::{JobStore, QueueError};
use crate::job::clock::human_ms;
use crate::job::record::{Change, JobRecord};
use crate::job::service::ServiceConfig;
use crate::job::state::{FailureClass, JobState};
use crate::train::child::{ChildResult, ExitCode, JobMode};

/// Longest reason kept with a job, bytes.
const REASON_BYTES_MAX: usize = 4096;

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    /// The run is complete.
    Completed(Option<Json>),
    /// Stopped on request.
    Cancelled(Option<Json>),
    /// Left early without fault; to be continued.
    Interrupted(String),
    /// Failed.
    Failed {
        /// The class.
        class: FailureClass,
        /// Why, for a person.
        reason: String,
    },
}

/// What was asked of a child, and what was seen of it.
#[derive(Debug, Clone, Default)]
pub struct Witness {
    /// It was asked to stop.
    pub stop_requested: bool,
    /// It was asked to save and leave.
    pub interrupt_requested: bool,
    /// It was killed after this silence.
    pub stalled_ms: Option<u64>,
    /// The last `finished` event.
    pub finished: Option<Json>,
    /// The message of the last `failed` event.
    pub failed: Option<String>,
    /// The last lines of its standard error.
    pub stderr_tail: String,
    /// The GPU it trained on.
    pub gpu: Option<usize>,
}

/// Reads the end of a process. `result` is its result file, when it is of this very attempt.
pub fn read_exit(status: ExitStatus, result: Option<&ChildResult>, witness: &Witness) -> Ending {
    if let Some(result) = result.filter(|result| result.status == "completed") {
        return Ending::Completed(Some(result_json(result)));
    }
    let cancelled = || Ending::Cancelled(result.map(result_json).or_else(|| witness.finished.clone()));
    let reason = |fallback: String| reason(result, witness, fallback);
    if let Some(signal) = status.signal() {
        return match () {
            () if witness.stop_requested => cancelled(),
            () if witness.interrupt_requested => Ending::Interrupted("the service was shut down".to_owned()),
            () => killed(signal, witness, reason),
        };
    }
    let number = status.code().unwrap_or(-1);
    match ExitCode::from_number(number) {
        Some(ExitCode::Completed) => Ending::Completed(witness.finished.clone()),
        Some(ExitCode::Cancelled) if witness.stop_requested => cancelled(),
        Some(ExitCode::Interrupted) if witness.stop_requested => cancelled(),
        Some(ExitCode::Cancelled | ExitCode::Interrupted) if witness.interrupt_requested => {
            Ending::Interrupted("the service was shut down".to_owned())
        }
        Some(ExitCode::Cancelled | ExitCode::Interrupted) => Ending::Failed {
            class: FailureClass::Killed,
            reason: "the trainer was told to leave by someone other than this service".to_owned(),
        },
        Some(code) => Ending::Failed {
            class: code.class().and_then(FailureClass::parse).unwrap_or(FailureClass::Internal),
            reason: reason(format!("the trainer left with code {number} and said nothing")),
        },
        None => Ending::Failed {
            class: FailureClass::Internal,
            reason: reason(format!("the trainer left with the unknown code {number}")),
        },
    }
}

/// A crash or a standstill on a GPU counts as a fault of the device: a driver that fails takes its process with it, and
/// another GPU may do. A signal that came from outside says nothing of the device.
fn killed(signal: i32, witness: &Witness, reason: impl Fn(String) -> String) -> Ending {
    let name = signal_name(signal);
    let (on_gpu, place) = match witness.gpu {
        Some(number) => (true, format!(" on GPU {number}")),
        None => (false, String::new()),
    };
    if let Some(ms) = witness.stalled_ms {
        let reason = format!("the trainer said nothing for {}{place}; it was killed", human_ms(ms as i64));
        let class = if on_gpu { FailureClass::Device } else { FailureClass::Killed };
        return Ending::Failed { class, reason };
    }
    match signal {
        libc::SIGKILL => Ending::Failed {
            class: FailureClass::Killed,
            reason: "the trainer was killed (SIGKILL), by someone or for want of memory".to_owned(),
        },
        libc::SIGTERM | libc::SIGINT | libc::SIGHUP | libc::SIGQUIT => Ending::Failed {
            class: FailureClass::Killed,
            reason: format!("the trainer was ended from outside ({name})"),
        },
        _ => Ending::Failed {
            class: if on_gpu { FailureClass::Device } else { FailureClass::Internal },
            reason: reason(format!("the trainer crashed ({name}){place}")),
        },
    }
}

/// The name of a signal.
fn signal_name(signal: i32) -> String {
    match signal {
        libc::SIGKILL => "SIGKILL".into(),
        libc::SIGTERM => "SIGTERM".into(),
        libc::SIGINT => "SIGINT".into(),
        libc::SIGHUP => "SIGHUP".into(),
        libc::SIGQUIT => "SIGQUIT".into(),
        libc::SIGSEGV => "SIGSEGV".into(),
        libc::SIGBUS => "SIGBUS".into(),
        libc::SIGILL => "SIGILL".into(),
        libc::SIGABRT => "SIGABRT".into(),
        libc::SIGFPE => "SIGFPE".into(),
        other => format!("signal {other}"),
    }
}

/// What the trainer itself said, in the order of trust: result file, last event, standard error.
fn reason(result: Option<&ChildResult>, witness: &Witness, fallback: String) -> String {
    let said = result.and_then(|result| result.reason.clone()).or_else(|| witness.failed.clone());
    let tail = witness.stderr_tail.trim();
    let text = match said {
        Some(said) => said,
        None if tail.is_empty() => fallback,
        None => format!("{fallback}; its last words: {tail}"),
    };
    if text.len() <= REASON_BYTES_MAX {
        return text;
    }
    let mut end = REASON_BYTES_MAX;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &text[..end])
}

/// The end that a result file tells when the process itself is gone unheard.
pub fn read_result(result: &ChildResult) -> Ending {
    match result.status.as_str() {
        "completed" => Ending::Completed(Some(result_json(result))),
        "cancelled" => Ending::Cancelled(Some(result_json(result))),
        _ => Ending::Failed {
            class: result.class.as_deref().and_then(FailureClass::parse).unwrap_or(FailureClass::Internal),
            reason: result
                .reason
                .clone()
                .unwrap_or_else(|| "the trainer failed and gave no reason".to_owned()),
        },
    }
}

fn result_json(result: &ChildResult) -> Json {
    json!({
        "fitness": result.fitness,
        "metrics": result.metrics,
        "best": result.best,
        "last": result.last,
        "epochs": result.epochs,
        "attempt": result.attempt,
        "data_fingerprint": result.data_fingerprint,
        "val_fingerprint": result.val_fingerprint,
    })
}

/// Writes an ending into the journal: final, or queued again while the budget of its class lasts. A job that was
/// asked to stop ends as cancelled however its process left, unless it was complete.
///
/// # Errors
/// Those of the journal; nothing has changed then.
pub fn settle(
    journal: &mut Journal,
    record: &JobRecord,
    ending: Ending,
    config: &ServiceConfig,
    now_unix_ms: i64,
) -> Result<JobRecord, QueueError> {
    let seq = record.seq;
    let stopping = record.state == JobState::Stopping;
    match ending {
        Ending::Completed(result) => {
            let result = with_fitness(result, &record.spec.fitness, &config.machine_id);
            journal.change(seq, Change::to(JobState::Completed, "done").with_result(result))
        }
        Ending::Cancelled(result) => {
            journal.change(seq, Change::to(JobState::Cancelled, "stopped on request").with_result(result))
        }
        Ending::Interrupted(reason) if stopping => {
            journal.change(seq, Change::to(JobState::Cancelled, format!("stopped on request; {reason}")))
        }
        Ending::Interrupted(reason) => {
            let goes_on = match record.spec.mode {
                JobMode::Train => "continues from its last checkpoint",
                JobMode::Evaluate => "starts again",
            };
            let reason = format!("{reason}; {goes_on}");
            journal.change(seq, Change::to(JobState::Interrupted, reason))
        }
        Ending::Failed { reason, .. } if stopping => {
            journal.change(seq, Change::to(JobState::Cancelled, format!("stopped on request; {reason}")))
        }
        Ending::Failed { class, reason } => fail(journal, record, class, reason, config, now_unix_ms),
    }
}

fn fail(
    journal: &mut Journal,
    record: &JobRecord,
    class: FailureClass,
    reason: String,
    config: &ServiceConfig,
    now_unix_ms: i64,
) -> Result<JobRecord, QueueError> {
    let seq = record.seq;
    let policy = config.retry.get(&class).filter(|_| class.is_retried()).copied();
    let budget = policy.map_or(0, |policy| record.spec.retries_max.unwrap_or(policy.budget));
    let used = record.retries.get(&class).copied().unwrap_or(0);
    let Some(mut policy) = policy.filter(|_| used < budget) else {
        let tried = if used > 0 { format!(" (after {used} retries)") } else { String::new() };
        return journal
            .change(seq, Change::to(JobState::Failed, format!("{reason}{tried}")).with_class(class));
    };
    if let Some(delay_ms) = record.spec.retry_delay_ms {
        policy.delay_ms = delay_ms;
    }
    // The jitter spreads jobs that failed together; it needs to differ, not to be random.
    let jitter = f64::from((seq as u32).wrapping_mul(2_654_435_769) >> 8) / f64::from(1u32 << 24);
    let delay_ms = policy.delay_ms(used, jitter);
    let reason = format!(
        "retry {} of {budget} for class {class}, in {}: {reason}",
        used + 1,
        human_ms(delay_ms as i64)
    );
    journal.retry(seq, class, &reason, now_unix_ms + delay_ms as i64)
}

/// Puts the score that the job asked for under `fitness`, where the metrics have it, and names the machine.
fn with_fitness(result: Option<Json>, name: &str, machine_id: &str) -> Option<Json> {
    let mut result = result?;
    if name != "fitness"
        && let Some(score) = result.get("metrics").and_then(|metrics| metrics.get(name)).cloned()
    {
        result["fitness"] = score;
    }
    result["fitness_name"] = name.into();
    result["machine_id"] = machine_id.into();
    Some(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::record::NewJob;

    fn exit(code: i32) -> ExitStatus {
        ExitStatus::from_raw(code << 8)
    }

    fn signalled(signal: i32) -> ExitStatus {
        ExitStatus::from_raw(signal)
    }

    fn class_of(ending: Ending) -> Option<FailureClass> {
        match ending {
            Ending::Failed { class, .. } => Some(class),
            _ => None,
        }
    }

    #[test]
    fn every_exit_has_a_meaning() {
        let nothing = Witness::default();
        for (code, class) in [
            (10, FailureClass::Config),
            (11, FailureClass::Data),
            (12, FailureClass::Memory),
            (13, FailureClass::Diverged),
            (14, FailureClass::Device),
            (15, FailureClass::Storage),
            (16, FailureClass::Internal),
            (101, FailureClass::Internal),
            (1, FailureClass::Internal),
            (130, FailureClass::Killed),
            (131, FailureClass::Killed),
        ] {
            assert_eq!(class_of(read_exit(exit(code), None, &nothing)), Some(class), "{code}");
        }
        assert_eq!(read_exit(exit(0), None, &nothing), Ending::Completed(None));
        for (signal, class) in [
            (libc::SIGKILL, FailureClass::Killed),
            (libc::SIGTERM, FailureClass::Killed),
            (libc::SIGSEGV, FailureClass::Internal),
            (libc::SIGABRT, FailureClass::Internal),
        ] {
            assert_eq!(class_of(read_exit(signalled(signal), None, &nothing)), Some(class), "{signal}");
        }
        let on_gpu = Witness { gpu: Some(1), ..Witness::default() };
        for (signal, class) in [(libc::SIGSEGV, FailureClass::Device), (libc::SIGKILL, FailureClass::Killed)]
        {
            assert_eq!(
                class_of(read_exit(signalled(signal), None, &on_gpu)),
                Some(class),
                "{signal} on a GPU"
            );
        }
        let stuck = Witness { stalled_ms: Some(1000), ..on_gpu };
        match read_exit(signalled(libc::SIGKILL), None, &stuck) {
            Ending::Failed { class: FailureClass::Device, reason } => {
                assert_eq!(reason, "the trainer said nothing for 1.0 s on GPU 1; it was killed");
            }
            other => panic!("{other:?}"),
        }
        let stop = Witness { stop_requested: true, ..Witness::default() };
        for status in [exit(130), exit(131), signalled(libc::SIGKILL)] {
            assert_eq!(read_exit(status, None, &stop), Ending::Cancelled(None));
        }
        let leave = Witness { interrupt_requested: true, ..Witness::default() };
        for status in [exit(131), exit(130), signalled(libc::SIGTERM), signalled(libc::SIGKILL)] {
            assert!(matches!(read_exit(status, None, &leave), Ending::Interrupted(_)));
        }
        let words = Witness { stderr_tail: "boom".into(), ..Witness::default() };
        match read_exit(exit(101), None, &words) {
            Ending::Failed { reason, .. } => assert!(reason.ends_with("its last words: boom"), "{reason}"),
            other => panic!("{other:?}"),
        }
        let long = Witness { failed: Some("é".repeat(5000)), ..Witness::default() };
        match read_exit(exit(12), None, &long) {
            Ending::Failed { reason, .. } => assert!(reason.len() <= REASON_BYTES_MAX + 3),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn budgets_are_counted_by_class_and_stopping_wins() {
        let config = ServiceConfig::default();
        let mut journal = Journal::in_memory().expect("opens");
        let context = config.spec_context("/w".into());
        let text = "model: yolov8n\ntype: yolo\ntask_id: a\ntrain: {data: d}\n";
        let new = NewJob::sample(text, &context);
        let mut record = journal.accept(new.clone(), None).expect("accepted");
        let killed = || Ending::Failed { class: FailureClass::Killed, reason: "gone".into() };
        for retry in 1..=3 {
            record = journal.begin_attempt(record.seq, "starts").expect("legal");
            record = settle(&mut journal, &record, killed(), &config, 1000).expect("settles");
            assert_eq!((record.state, record.retries[&FailureClass::Killed]), (JobState::Queued, retry));
            assert!(record.not_before_unix_ms >= 1000 + (5000 << (retry - 1)), "{record:?}");
            assert!(
                record.reason.starts_with(&format!("retry {retry} of 3 for class killed, in")),
                "{}",
                record.reason
            );
        }
        record = journal.begin_attempt(record.seq, "starts").expect("legal");
        let memory = Ending::Failed { class: FailureClass::Memory, reason: "short".into() };
        record = settle(&mut journal, &record, memory, &config, 0).expect("settles");
        assert_eq!(record.state, JobState::Queued, "another class has its own budget");
        record = journal.begin_attempt(record.seq, "starts").expect("legal");
        record = settle(&mut journal, &record, killed(), &config, 0).expect("settles");
        assert_eq!((record.state, record.class), (JobState::Failed, Some(FailureClass::Killed)));
        assert_eq!(record.reason, "gone (after 3 retries)");
        let mut record = journal.accept(new, None).expect("accepted again");
        journal.begin_attempt(record.seq, "starts").expect("legal");
        record = journal.change(record.seq, Change::to(JobState::Stopping, "asked")).expect("legal");
        record = settle(&mut journal, &record, killed(), &config, 0).expect("settles");
        assert_eq!(record.state, JobState::Cancelled);
    }
}
