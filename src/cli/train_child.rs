//! `boxwright train-child`: one job, a training or an evaluation, for a supervisor, which hears events and says stop.
//!
//! Standard output: one session event per line of JSON. Standard input: the lines `stop` and `checkpoint`; its
//! end means that the supervisor is gone. What the exit code means is in [`ExitCode`](crate::train::child::ExitCode).

use std::io::{BufRead, Write};
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{CliError, signals};
use crate::train::child::{ChildResult, ChildSpec, ExitCode, JobMode, SUPERVISOR_PID};
use crate::train::device;
use crate::train::error::TrainError;
use crate::train::event::{Command, Observer, OutcomeKind, SessionEvent, Stamped};
use crate::train::session::{DataIdentity, Outcome, Session, SessionSpec, data_identity, evaluate};

/// Longest line that is read from the supervisor.
const LINE_BYTES_MAX: u64 = 4096;

/// Train one job for a supervisor (not meant for people)
#[derive(clap::Args)]
pub struct Args {
    /// The specification of the job, JSON
    #[arg(long)]
    spec: PathBuf,
}

/// What the supervisor asked for.
#[derive(Default)]
struct Orders {
    stop: AtomicBool,
    checkpoint: AtomicBool,
    is_orphaned: AtomicBool,
}

/// Writes events to standard output and reads orders.
struct Pipe {
    orders: Arc<Orders>,
}

impl Observer for Pipe {
    fn event(&mut self, event: &SessionEvent) {
        let Ok(line) = serde_json::to_string(&Stamped::now(event.clone())) else { return };
        // A closed pipe means that the supervisor is gone, which the end of standard input says too.
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }

    fn command(&mut self) -> Command {
        let orders = &self.orders;
        if signals::asked_to_end() {
            orders.is_orphaned.store(true, Ordering::SeqCst);
        }
        if orders.stop.load(Ordering::SeqCst) || orders.is_orphaned.load(Ordering::SeqCst) {
            return Command::Stop;
        }
        if orders.checkpoint.swap(false, Ordering::SeqCst) {
            Command::CheckpointNow
        } else {
            Command::Continue
        }
    }
}

/// Asks the kernel to end this process when the supervisor's ends. A supervisor that is gone already shows in the end of
/// standard input.
fn die_with_supervisor() {
    let Some(supervisor) = std::env::var(SUPERVISOR_PID).ok().and_then(|text| text.parse::<u32>().ok())
    else {
        return;
    };
    // SAFETY: prctl with this request takes a number and touches no memory of ours; getppid takes nothing.
    let is_ours = unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::getppid() as u32 == supervisor
    };
    if !is_ours {
        // It died before the request was made: nobody would hear of what this process does.
        std::process::exit(ExitCode::Interrupted as i32);
    }
}

/// Reads orders until standard input ends. The thread dies with the process.
fn listen(orders: Arc<Orders>) -> std::io::Result<()> {
    let listener = move || {
        let mut input = std::io::BufReader::new(std::io::stdin());
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = std::io::Read::take(&mut input, LINE_BYTES_MAX).read_until(b'\n', &mut line);
            match read {
                Ok(0) | Err(_) => return orders.is_orphaned.store(true, Ordering::SeqCst),
                Ok(_) => {}
            }
            match line.trim_ascii() {
                b"stop" => orders.stop.store(true, Ordering::SeqCst),
                b"checkpoint" => orders.checkpoint.store(true, Ordering::SeqCst),
                _ => {}
            }
        }
    };
    std::thread::Builder::new().name("orders".into()).spawn(listener).map(drop)
}

/// Trains the job of the specification.
///
/// # Errors
/// A specification that cannot be read. Everything else is an exit code and a result file.
pub fn run(args: Args) -> Result<std::process::ExitCode, CliError> {
    let read = |path: &PathBuf| -> Result<ChildSpec, Box<dyn std::error::Error + Send + Sync>> {
        Ok(serde_json::from_slice(&std::fs::read(path)?)?)
    };
    let spec = read(&args.spec)
        .map_err(|e| CliError::usage_from(format!("cannot read specification {}", args.spec.display()), e))?;
    die_with_supervisor();
    signals::watch();
    let orders = Arc::new(Orders::default());
    listen(Arc::clone(&orders)).map_err(|e| CliError::failed_from("cannot start a thread", e))?;
    let mut pipe = Pipe { orders: Arc::clone(&orders) };
    // Before the session reads the data: what is changed while it trains is not what it was measured on.
    let identity = std::panic::catch_unwind(AssertUnwindSafe(|| data_identity(&spec.args)));
    // A fault of the program ends this job with a result that says so.
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| train(&spec, &mut pipe)));
    let outcome = outcome.unwrap_or_else(|panic| {
        let message = panic_text(panic.as_ref());
        let error = TrainError::Internal { message };
        pipe.event(&SessionEvent::Failed { class: error.class(), message: error.chain() });
        Err(error)
    });
    let is_orphaned = orders.is_orphaned.load(Ordering::SeqCst) && !orders.stop.load(Ordering::SeqCst);
    let identity = match identity {
        Ok(Ok(identity)) => identity,
        fault => {
            let reason = fault.map_or_else(
                |panic| panic_text(panic.as_ref()),
                |told| told.map_or_else(|e| e.chain(), |_| String::new()),
            );
            // A run that failed has told the reason better.
            if outcome.is_ok() {
                let message = format!("the result does not say which data it was measured on: {reason}");
                pipe.event(&SessionEvent::Warning { message });
            }
            DataIdentity::default()
        }
    };
    let (code, result) = conclude(&spec, outcome, identity, is_orphaned);
    if let Some(result) = result
        && let Err(error) = result.write(&spec.result_path)
    {
        eprintln!("error: cannot write {}: {error}", spec.result_path.display());
        return Ok(ExitCode::Storage.into());
    }
    Ok(code.into())
}

/// Trains, or evaluates, on the device that the supervisor gave.
fn train(spec: &ChildSpec, pipe: &mut Pipe) -> Result<Outcome, TrainError> {
    let mut args = spec.args.clone();
    if let Some(uuid) = &spec.gpu_uuid {
        args.device = device::by_identity(uuid).inspect_err(|error| {
            pipe.event(&SessionEvent::Failed { class: error.class(), message: error.chain() });
        })?;
    }
    let session = SessionSpec {
        resume: spec.resume,
        gpu_share_max: spec.gpu_share_max,
        ..SessionSpec::new(args, &spec.run_dir, &spec.task_id)
    };
    match spec.mode {
        JobMode::Train => Session::new(session, pipe).run(),
        JobMode::Evaluate => evaluate(&session, pipe),
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|t| (*t).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a text".into())
}

/// The exit code, and the result unless the run is only interrupted.
fn conclude(
    spec: &ChildSpec,
    outcome: Result<Outcome, TrainError>,
    identity: DataIdentity,
    is_orphaned: bool,
) -> (ExitCode, Option<ChildResult>) {
    let blank = ChildResult {
        task_id: spec.task_id.clone(),
        attempt: spec.attempt,
        status: "failed".into(),
        class: None,
        reason: None,
        fitness: None,
        metrics: serde_json::Map::new(),
        best: None,
        last: None,
        epochs: None,
        data_fingerprint: None,
        val_fingerprint: None,
    };
    match outcome {
        Err(error) => {
            eprintln!("error: {}", error.chain());
            let class = error.class();
            let (name, reason) = (class.name().to_owned(), error.chain());
            (class.exit_code(), Some(ChildResult { class: Some(name), reason: Some(reason), ..blank }))
        }
        Ok(outcome) => {
            let (code, status) = match outcome.kind {
                OutcomeKind::Completed => (ExitCode::Completed, "completed"),
                OutcomeKind::Stopped if is_orphaned => return (ExitCode::Interrupted, None),
                OutcomeKind::Stopped => (ExitCode::Cancelled, "cancelled"),
            };
            let result = ChildResult {
                status: status.into(),
                fitness: outcome.fitness,
                metrics: outcome.metrics,
                best: outcome.best,
                last: outcome.last,
                epochs: (spec.mode == JobMode::Train).then_some(outcome.epochs),
                data_fingerprint: identity.data,
                val_fingerprint: identity.val,
                ..blank
            };
            (code, Some(result))
        }
    }
}
