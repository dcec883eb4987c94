//! `boxwright train`: one job in the foreground.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;

use super::session_console::Console;
use super::{CliError, EXIT_STOPPED, signals};
use crate::job::spec::{JobSpec, SpecContext};
use crate::train::args::{Device, ResolvedDevice, Source, TrainArgs};
use crate::train::child::JobMode;
use crate::train::device;
use crate::train::error::{FailureClass, TrainError};
use crate::train::event::OutcomeKind;
use crate::train::run_folder::RunFolder;
use crate::train::session::{Outcome, Session, SessionSpec, evaluate};
use crate::yaml::{self, Faults, Node};

/// Keys of a job that are not under `train`.
const TOP_KEYS: [&str; 3] = ["model", "type", "task_id"];

/// Training keys that choose the run folder.
const PLACE_KEYS: [&str; 3] = ["project", "name", "exist_ok"];

/// Train one job in the foreground
#[derive(clap::Args)]
pub struct Args {
    /// A job file, and `key=value` for training keys that replace its values (`epochs=5`); without a file
    /// `model=yolov8n data=DATA.yaml` at least
    #[arg(value_name = "JOB.yaml | KEY=VALUE")]
    items: Vec<String>,
    /// Go on with this run folder, or with the newest one of the job
    #[arg(long, value_name = "RUN_DIR", num_args = 0..=1)]
    resume: Option<Option<PathBuf>>,
    /// cpu, cuda or cuda:N, in place of the job's `device`
    #[arg(long, value_name = "DEVICE")]
    device: Option<Device>,
    /// End with one line of JSON on standard output
    #[arg(long)]
    json: bool,
    /// Compute threads; all cores when not given
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// Trains, shows the progress, prints where the results are.
///
/// # Errors
/// A job that cannot be read or trained.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    let (train_args, run_dir, task_id) = match &args.resume {
        Some(Some(folder)) => resumed_args(folder, &args)?,
        _ => fresh_args(&args)?,
    };
    signals::watch();
    let mut console = Console::default();
    let spec = SessionSpec {
        resume: args.resume.is_some(),
        threads: args.threads,
        ..SessionSpec::new(train_args, &run_dir, task_id)
    };
    let outcome = match spec.args.job_mode() {
        JobMode::Train => Session::new(spec, &mut console).run(),
        JobMode::Evaluate => evaluate(&spec, &mut console),
    };
    let outcome = outcome.map_err(cli_error)?;
    report(&args, &run_dir, &outcome);
    Ok(match outcome.kind {
        OutcomeKind::Completed => ExitCode::SUCCESS,
        OutcomeKind::Stopped => ExitCode::from(EXIT_STOPPED),
    })
}

/// A failed session as an error of the command: configuration faults are wrong use.
pub fn cli_error(error: TrainError) -> CliError {
    match error.class() {
        FailureClass::Config => CliError::usage(error.chain()),
        _ => CliError::failed(error.chain()),
    }
}

fn report(args: &Args, run_dir: &Path, outcome: &Outcome) {
    let status = match outcome.kind {
        OutcomeKind::Completed => "completed",
        OutcomeKind::Stopped => "stopped",
    };
    if args.json {
        let line = json!({
            "status": status,
            "fitness": outcome.fitness,
            "metrics": outcome.metrics,
            "epochs": outcome.epochs,
            "steps": outcome.step,
            "seconds": outcome.seconds,
            "run_dir": run_dir.to_string_lossy(),
            "best": outcome.best.as_deref().map(Path::to_string_lossy),
            "last": outcome.last.as_deref().map(Path::to_string_lossy),
            "results": Some(run_dir.join("results.csv")).filter(|path| path.is_file()).as_deref().map(Path::to_string_lossy),
        });
        println!("{line}");
        return;
    }
    let epochs = if outcome.epochs > 0 { format!(" after {} epochs", outcome.epochs) } else { String::new() };
    println!("{status}{epochs} in {:.0} s", outcome.seconds);
    for (name, value) in &outcome.metrics {
        println!("{name:<22} {value}");
    }
    for (name, path) in [("best", &outcome.best), ("last", &outcome.last)] {
        if let Some(path) = path {
            println!("{name:<22} {}", path.display());
        }
    }
    if let (OutcomeKind::Completed, Some(line)) = (outcome.kind, outcome.fitness.and_then(final_score)) {
        println!("{line}");
    }
}

/// The last line of a run that completed, by which programs around the older trainers find the score; `None` for a
/// number that they cannot read. They look for digits, a point, digits.
fn final_score(fitness: f64) -> Option<String> {
    let digits = fitness.to_string();
    let is_read = fitness.is_finite() && fitness.is_sign_positive();
    let point = if digits.contains('.') { "" } else { ".0" };
    is_read.then(|| format!("ResultadoFinal:{digits}{point}"))
}

/// `key=value` items as a tree, with the flags that stand for keys; a value is read as YAML.
fn overrides(args: &Args) -> Result<(Option<&String>, Node), CliError> {
    let mut file = None;
    let mut tree = Node::from_json(&json!({}));
    for item in &args.items {
        let Some((key, value)) = item.split_once('=') else {
            if file.replace(item).is_some() {
                return Err(CliError::usage(format!("{item:?} is a second job file; allowed: one")));
            }
            continue;
        };
        let node = yaml::parse(format!("v: {value}").as_bytes(), item)
            .map_err(|e| CliError::usage_from(format!("{item:?} is no key=value"), e))?;
        let value = node.get("v").cloned().unwrap_or_else(|| Node::from_json(&json!(null)));
        let path = if TOP_KEYS.contains(&key) || key.contains('.') {
            key.to_owned()
        } else {
            format!("train.{key}")
        };
        tree.set_path(&path, value);
    }
    if let Some(device) = args.device {
        tree.set_path("train.device", Node::from_json(&device.into()));
    }
    Ok((file, tree))
}

/// Arguments of a run that starts, and its folder.
fn fresh_args(args: &Args) -> Result<(TrainArgs, PathBuf, String), CliError> {
    let (file, mut top) = overrides(args)?;
    let working_dir = std::env::current_dir().map_err(|e| CliError::failed_from("no working folder", e))?;
    let mut context = SpecContext {
        base: None,
        strict: false,
        runs_dir: working_dir.join("runs"),
        working_dir,
        data_path_map: Vec::new(),
    };
    let has_overrides = top.as_mapping().is_some_and(|entries| !entries.is_empty());
    let (text, source) = match file {
        Some(file) => {
            let text =
                std::fs::read(file).map_err(|e| CliError::usage_from(format!("cannot read {file}"), e))?;
            if has_overrides {
                let base = yaml::parse(&text, file).map_err(|e| CliError::usage(e.to_string()))?;
                context.base = Some(base);
            }
            (text, file.as_str())
        }
        None => {
            if top.get("type").is_none() {
                top.set_path("type", Node::from_json(&json!("yolo")));
            }
            (Vec::new(), "command line")
        }
    };
    let text = if has_overrides || file.is_none() { top.to_json().to_string().into_bytes() } else { text };
    let loaded = JobSpec::load(&text, source, &context).map_err(|e| CliError::usage(e.to_string()))?;
    let spec = loaded.runnable().map_err(|e| CliError::usage(e.to_string()))?;
    let is_place = |key: &str| PLACE_KEYS.iter().any(|place| key.strip_prefix("train.") == Some(place));
    for note in spec.ignored.iter().chain(&spec.overridden).filter(|note| !is_place(&note.key)) {
        eprintln!("note: {}: {}", note.key, note.reason);
    }
    if spec.mode == JobMode::Evaluate && args.resume.is_some() {
        return Err(CliError::usage("an evaluation leaves nothing to resume"));
    }
    let mut train = spec.args;
    if spec.requires_gpu && device::resolve(train.device).map_err(cli_error)? == ResolvedDevice::Cpu {
        return Err(CliError::usage("`requires_gpu`: this machine has no GPU that can be used"));
    }
    place(&mut train, context.base.as_ref(), &text, source)?;
    let (project, name) = (train.project.as_deref(), train.name.as_deref());
    let run_dir = match (&args.resume, &train.resume) {
        (None, Source::Off) => RunFolder::claim(project, name, train.exist_ok).map_err(cli_error)?,
        (_, Source::Path(path)) => run_folder_of(Path::new(path))?,
        _ => RunFolder::newest(project, name).ok_or_else(|| {
            CliError::usage("nothing to resume: no run folder of this name holds a checkpoint")
        })?,
    };
    Ok((train, run_dir, spec.task_id.as_str().to_owned()))
}

/// In the foreground `project`, `name` and `exist_ok` choose the run folder, which for the service its own
/// tree does: they are taken from the job as it was written.
fn place(train: &mut TrainArgs, base: Option<&Node>, text: &[u8], source: &str) -> Result<(), CliError> {
    let top = yaml::parse(text, source).map_err(|e| CliError::usage(e.to_string()))?;
    let written = base.map_or_else(|| top.clone(), |base| base.merged_with(&top));
    let Some(written) = written.get("train") else { return Ok(()) };
    train.project = written.get("project").and_then(Node::as_text);
    train.name = written.get("name").and_then(Node::as_text);
    train.exist_ok = written.get("exist_ok").and_then(Node::as_bool).unwrap_or(false);
    Ok(())
}

/// The run folder that a checkpoint, a weights file or the folder itself belongs to.
fn run_folder_of(path: &Path) -> Result<PathBuf, CliError> {
    let folder = path.ancestors().take(3).find(|folder| folder.join("state").is_dir());
    folder.map(Path::to_owned).ok_or_else(|| {
        CliError::usage(format!("{} is not in a run folder that holds checkpoints", path.display()))
    })
}

fn is_job_file(path: &Path) -> bool {
    let suffix = path.extension().map(|suffix| suffix.to_ascii_lowercase()).unwrap_or_default();
    (suffix == "yaml" || suffix == "yml") && path.is_file()
}

/// Refuses overrides that cannot change a run which goes on: what is no training key, and what chooses its folder.
fn refuse_fixed(top: &Node) -> Result<(), CliError> {
    let keys = |node: Option<&Node>| -> Vec<String> {
        node.and_then(Node::as_mapping).unwrap_or_default().iter().map(|entry| entry.key.clone()).collect()
    };
    let mut fixed = keys(Some(top));
    fixed.retain(|key| key != "train");
    fixed.extend(keys(top.get("train")).into_iter().filter(|key| PLACE_KEYS.contains(&key.as_str())));
    if fixed.is_empty() {
        return Ok(());
    }
    let what =
        format!("a run that is resumed keeps its own {}; allowed: other training keys", fixed.join(", "));
    Err(CliError::usage(what))
}

/// Arguments of a run that goes on, from its folder.
fn resumed_args(folder: &Path, args: &Args) -> Result<(TrainArgs, PathBuf, String), CliError> {
    let folder = match run_folder_of(folder) {
        Err(_) if is_job_file(folder) => {
            let job = folder.display();
            let what =
                format!("{job} is a job file; its newest run goes on with `boxwright train {job} --resume`");
            return Err(CliError::usage(what));
        }
        found => found?,
    };
    let (file, top) = overrides(args)?;
    if let Some(file) = file {
        return Err(CliError::usage(format!(
            "{file:?}: a run that is resumed has its arguments in its folder"
        )));
    }
    refuse_fixed(&top)?;
    let path = folder.join("args.yaml");
    let source = path.to_string_lossy().into_owned();
    let text = std::fs::read(&path).map_err(|e| CliError::usage_from(format!("cannot read {source}"), e))?;
    let saved = yaml::parse(&text, &source).map_err(|e| CliError::usage(e.to_string()))?;
    let merged = match top.get("train") {
        Some(train) => saved.merged_with(train),
        None => saved,
    };
    let mut faults = Faults::new(&source);
    let (args, report) = TrainArgs::read(&merged, "train", &mut faults);
    faults.extend(report.refused);
    match args {
        Some(args) if faults.is_empty() => {
            let name = folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            Ok((args, folder, name))
        }
        _ => Err(CliError::usage(faults.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn refused(line: &[&str]) -> String {
        let args = Line::try_parse_from([&["train"], line].concat()).expect("valid").args;
        let error = run(args).expect_err("refused");
        assert_eq!(error.exit_code(), crate::cli::EXIT_USAGE);
        error.to_string()
    }

    #[test]
    fn a_run_that_goes_on_names_what_it_cannot_change() {
        let folder = tempfile::tempdir().expect("a folder");
        let run_dir = folder.path().join("run");
        std::fs::create_dir_all(run_dir.join("state")).expect("created");
        std::fs::write(run_dir.join("args.yaml"), "epochs: 1\n").expect("written");
        let run_dir = run_dir.to_string_lossy();
        let line = ["--resume", &run_dir, "model=yolov8m", "sweeper.study_name=s", "name=other", "epochs=3"];
        let said = refused(&line);
        assert!(said.contains("keeps its own model, sweeper, name;"), "{said}");
        let job = folder.path().join("job.yaml");
        std::fs::write(&job, "model: yolov8n\n").expect("written");
        let said = refused(&["--resume", &job.to_string_lossy()]);
        assert!(said.contains("job.yaml --resume`"), "{said}");
    }

    #[test]
    fn the_final_score_is_digits_a_point_and_digits() {
        for (fitness, line) in [
            (0.8651, Some("ResultadoFinal:0.8651")),
            (1.0, Some("ResultadoFinal:1.0")),
            (0.0, Some("ResultadoFinal:0.0")),
            (1e-7, Some("ResultadoFinal:0.0000001")),
            (-0.5, None),
            (f64::NAN, None),
            (f64::INFINITY, None),
        ] {
            assert_eq!(final_score(fitness).as_deref(), line, "{fitness}");
        }
    }
}
