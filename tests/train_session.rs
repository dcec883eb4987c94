//! Whole training sessions on a tiny synthetic set: exact resume, stop, learning, files.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use boxwright::data::synth::{SynthArgs, write_dataset};
use boxwright::train::args::{Batch, Freeze, OptimizerChoice, Scale, Source, TrainArgs};
use boxwright::train::checkpoint::{Checkpoint, Store};
use boxwright::train::error::{FailureClass, TrainError};
use boxwright::train::event::{Command, Observer, OutcomeKind, SessionEvent};
use boxwright::train::session::{Outcome, Session, SessionSpec};

/// A dataset of twelve training and six validation images, made once.
fn dataset() -> &'static Path {
    static FOLDER: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = FOLDER.get_or_init(|| {
        let root = tempfile::tempdir().expect("a folder");
        let path = root.path().join("tiny");
        let args = SynthArgs { images: 12, val_images: 6, imgsz: 64, seed: 3, ..SynthArgs::default() };
        write_dataset(&path, &args).expect("a dataset");
        (root, path)
    });
    path
}

/// Nine batches in three epochs, two batches to a step after the warm-up.
fn tiny_args() -> TrainArgs {
    TrainArgs {
        model: "yolov8n".into(),
        data: dataset().to_string_lossy().into_owned(),
        epochs: 3,
        batch: Batch::Images(4),
        nbs: 8,
        imgsz: 64,
        workers: 2,
        warmup_epochs: 1.0,
        close_mosaic: 1,
        plots: false,
        ..TrainArgs::default()
    }
}

/// Records events; gives a command when so many steps were seen.
#[derive(Default)]
struct Watch {
    events: Vec<SessionEvent>,
    steps: usize,
    stop_after: Option<usize>,
    checkpoint_after: Option<usize>,
    panic_after: Option<usize>,
}

impl Observer for Watch {
    fn event(&mut self, event: &SessionEvent) {
        if let SessionEvent::Step { .. } = event {
            self.steps += 1;
            assert!(self.panic_after != Some(self.steps), "killed by the test");
        }
        self.events.push(event.clone());
    }

    fn command(&mut self) -> Command {
        if self.stop_after.is_some_and(|n| self.steps >= n) {
            return Command::Stop;
        }
        if self.checkpoint_after == Some(self.steps) {
            self.checkpoint_after = None;
            return Command::CheckpointNow;
        }
        Command::Continue
    }
}

impl Watch {
    fn warnings(&self) -> Vec<&str> {
        fn text(event: &SessionEvent) -> Option<&str> {
            match event {
                SessionEvent::Warning { message } => Some(message),
                _ => None,
            }
        }
        self.events.iter().filter_map(text).collect()
    }
}

fn spec(args: &TrainArgs, folder: &Path, threads: usize) -> SessionSpec {
    SessionSpec {
        threads,
        checkpoint_interval_s: 3600,
        resume: true,
        ..SessionSpec::new(args.clone(), folder, "test")
    }
}

fn run(args: &TrainArgs, folder: &Path, threads: usize, watch: &mut Watch) -> Outcome {
    let outcome = Session::new(spec(args, folder, threads), watch).run();
    outcome.unwrap_or_else(|e| panic!("{}", e.chain()))
}

fn newest(folder: &Path) -> Checkpoint {
    Store::new(folder.join("state"), 2).newest().expect("readable").newest.expect("a checkpoint").1
}

/// Rows of `results.csv` without the column of seconds.
fn rows(folder: &Path) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(folder.join("results.csv")).expect("results");
    let cells = |line: &str| line.split(',').map(str::to_owned).collect::<Vec<_>>();
    let mut rows: Vec<Vec<String>> = text.lines().map(cells).collect();
    rows.iter_mut().for_each(|row| drop(row.remove(1)));
    rows
}

/// Everything that must be equal between two runs.
#[track_caller]
fn assert_same_end(name: &str, a: &Path, b: &Path) {
    for file in ["weights/last.safetensors", "weights/best.safetensors"] {
        let (x, y) = (std::fs::read(a.join(file)).expect(file), std::fs::read(b.join(file)).expect(file));
        assert!(x == y, "{name}: {file} differs");
    }
    assert_eq!(rows(a), rows(b), "{name}");
    let (x, y) = (newest(a), newest(b));
    assert_eq!(bits(&x.values), bits(&y.values), "{name}: live parameters");
    assert_eq!(bits(&x.buffers), bits(&y.buffers), "{name}: running statistics");
    assert!(x.optimizer == y.optimizer, "{name}: optimiser");
    assert_eq!((x.progress.step, x.progress.last_step), (y.progress.step, y.progress.last_step), "{name}");
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The undisturbed run that the others are compared with.
fn undisturbed() -> &'static Path {
    static RUN: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = RUN.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let mut watch = Watch::default();
        let outcome = run(&tiny_args(), folder.path(), 2, &mut watch);
        assert_eq!((outcome.kind, outcome.epochs, watch.steps), (OutcomeKind::Completed, 3, 9));
        folder
    });
    folder.path()
}

#[test]
fn a_stopped_and_resumed_run_ends_in_the_same_bits() {
    // Within the warm-up, within an accumulation window, at the end of an epoch, one batch before the end;
    // other numbers of threads before and after.
    for (stops, threads) in [(vec![1], 1), (vec![3], 2), (vec![6], 3), (vec![2, 3, 2], 1), (vec![8], 2)] {
        let folder = tempfile::tempdir().expect("a folder");
        for &stop in &stops {
            let mut watch = Watch { stop_after: Some(stop), ..Watch::default() };
            let outcome = run(&tiny_args(), folder.path(), threads, &mut watch);
            assert_eq!((outcome.kind, watch.steps), (OutcomeKind::Stopped, stop));
        }
        let mut watch = Watch::default();
        let outcome = run(&tiny_args(), folder.path(), 3 - threads.min(2), &mut watch);
        assert_eq!(outcome.kind, OutcomeKind::Completed);
        assert_eq!(watch.steps, 9 - stops.iter().sum::<usize>(), "nothing is computed twice");
        assert_same_end(&format!("stops {stops:?}"), undisturbed(), folder.path());
    }
}

#[test]
fn a_killed_run_ends_in_the_same_bits() {
    for (checkpoint, kill) in [(None, 2), (Some(4), 6), (None, 7)] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut watch = Watch { panic_after: Some(kill), checkpoint_after: checkpoint, ..Watch::default() };
        let args = tiny_args();
        let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            run(&args, folder.path(), 2, &mut watch);
        }));
        assert!(killed.is_err(), "the run is killed after {kill} batches");
        run(&args, folder.path(), 2, &mut Watch::default());
        assert_same_end(&format!("killed after {kill}"), undisturbed(), folder.path());
    }
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_older_one_used() {
    let folder = tempfile::tempdir().expect("a folder");
    run(&tiny_args(), folder.path(), 2, &mut Watch { stop_after: Some(5), ..Watch::default() });
    let newest = folder.path().join("state").join("step-000000005.ckpt");
    let mut bytes = std::fs::read(&newest).expect("the checkpoint of the stop");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&newest, bytes).expect("written");
    let mut watch = Watch::default();
    run(&tiny_args(), folder.path(), 2, &mut watch);
    assert!(
        watch.warnings().iter().any(|w| w.contains("step-000000005.ckpt is damaged")),
        "{:?}",
        watch.warnings()
    );
    assert_same_end("damaged", undisturbed(), folder.path());
}

#[test]
fn a_stop_acts_before_the_next_batch_and_files_are_whole() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut watch = Watch { stop_after: Some(4), ..Watch::default() };
    let outcome = run(&tiny_args(), folder.path(), 2, &mut watch);
    assert_eq!((outcome.kind, watch.steps), (OutcomeKind::Stopped, 4));
    assert_eq!(newest(folder.path()).progress.batch, 1);
    assert_eq!(rows(folder.path()).len(), 2, "a header and the row of the first epoch");
    let log = std::fs::read_to_string(folder.path().join("events.jsonl")).expect("a log");
    for line in log.lines() {
        let event: serde_json::Value = serde_json::from_str(line).expect("a JSON line");
        assert!(event["time_unix_ms"].is_u64() && event["event"].is_string(), "{line}");
    }
    assert!(log.contains("\"event\":\"finished\"") && log.contains("\"outcome\":\"stopped\""));
}

#[test]
fn results_hold_each_epoch_once_and_weights_read_back() {
    let rows = rows(undisturbed());
    let epochs: Vec<&str> = rows[1..].iter().map(|row| row[0].as_str()).collect();
    assert_eq!(epochs, ["1", "2", "3"]);
    assert_eq!(rows[0].len(), 14, "{:?}", rows[0]);
    assert!(rows.iter().all(|row| row.len() == 14));
    let bytes = std::fs::read(undisturbed().join("weights/last.safetensors")).expect("weights");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    assert_eq!(file.len(), 355);
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).expect("a header");
    let metadata = header.metadata().as_ref().expect("metadata");
    assert_eq!((metadata["nc"].as_str(), metadata["model"].as_str()), ("3", "yolov8n"));
    let names: Vec<String> = serde_json::from_str(&metadata["names"]).expect("a list");
    assert_eq!(names, ["circle", "square", "triangle"]);
    let again = std::fs::read_to_string(undisturbed().join("args.yaml")).expect("args.yaml");
    assert!(again.contains("imgsz: 64") && again.contains("batch: 4"));
}

#[test]
fn training_learns_its_images() {
    let root = tempfile::tempdir().expect("a folder");
    let data = root.path().join("learn");
    let synth = SynthArgs { images: 16, val_images: 2, imgsz: 96, seed: 5, ..SynthArgs::default() };
    write_dataset(&data, &synth).expect("a dataset");
    let args = TrainArgs {
        data: data.to_string_lossy().into_owned(),
        split: "train".into(),
        epochs: 50,
        imgsz: 96,
        optimizer: OptimizerChoice::AdamW,
        lr0: 0.002,
        nbs: 4,
        mosaic: 0.0,
        translate: 0.0,
        scale: Scale::Symmetric(0.0),
        val: false,
        ..tiny_args()
    };
    let outcome = run(&args, &root.path().join("run"), 0, &mut Watch::default());
    let map50 = outcome.metrics["metrics/mAP50(B)"].as_f64().expect("a number");
    let rows = rows(&root.path().join("run"));
    let loss = |row: &[String]| row[1..4].iter().map(|v| v.parse::<f64>().expect("a number")).sum::<f64>();
    let (highest, last) = (rows[1..].iter().map(|r| loss(r)).fold(0.0, f64::max), loss(&rows[50]));
    assert!(last < 0.75 * highest, "the loss is {last}, at its highest it was {highest}");
    assert!(map50 > 0.5, "mAP50 on its own images is {map50}");
}

#[test]
fn frozen_rows_do_not_move_and_their_statistics_neither() {
    let folder = tempfile::tempdir().expect("a folder");
    let args = TrainArgs { epochs: 1, freeze: Freeze::First(5), ..tiny_args() };
    run(&args, folder.path(), 2, &mut Watch::default());
    let start = tempfile::tempdir().expect("a folder");
    // Stopped before the first batch: the initial weights.
    run(&args, start.path(), 2, &mut Watch { stop_after: Some(0), ..Watch::default() });
    let (end, begin) = (newest(folder.path()), newest(start.path()));
    let detector = boxwright::detect::models::Detector::build("yolov8n", 3, 64, 64).expect("shipped");
    let layout = boxwright::engine::params::ParamSet::new(&detector.graph);
    let mut moved = 0;
    for info in &layout.infos {
        let side = |c: &Checkpoint| {
            let numbers = if info.kind.is_buffer() { &c.buffers } else { &c.values };
            bits(&numbers[info.range.clone()])
        };
        let is_frozen = (0..5).any(|row| info.name.starts_with(&format!("model.{row}.")));
        if is_frozen {
            assert_eq!(side(&end), side(&begin), "{}", info.name);
        } else {
            moved += usize::from(side(&end) != side(&begin));
        }
    }
    assert!(moved > 100, "{moved} tensors moved");
}

#[test]
fn a_loss_that_explodes_fails_as_diverged_and_names_the_images() {
    let folder = tempfile::tempdir().expect("a folder");
    let args = TrainArgs {
        epochs: 40,
        optimizer: OptimizerChoice::Sgd,
        lr0: 1e20,
        warmup_epochs: 0.0,
        nbs: 4,
        val: false,
        ..tiny_args()
    };
    let mut watch = Watch::default();
    let error = Session::new(spec(&args, folder.path(), 2), &mut watch).run().expect_err("it diverges");
    let text = error.to_string();
    assert_eq!(error.class(), FailureClass::Diverged, "{text}");
    assert!(text.contains("learning rate") && text.contains(".png") || text.contains(".jpg"), "{text}");
    assert!(watch.warnings().iter().any(|w| w.contains("going back to")), "{:?}", watch.warnings());
    assert!(matches!(watch.events.last(), Some(SessionEvent::Failed { class: FailureClass::Diverged, .. })));
}

#[test]
fn early_stop_and_time_budget_end_a_run() {
    let folder = tempfile::tempdir().expect("a folder");
    // Nothing is learnt, so the fitness stays where it is.
    let args =
        TrainArgs { epochs: 50, patience: 2, lr0: 0.0, optimizer: OptimizerChoice::Sgd, ..tiny_args() };
    let args = TrainArgs { warmup_bias_lr: 0.0, conf: Some(0.9), ..args };
    let mut watch = Watch { stop_after: Some(60), ..Watch::default() };
    let outcome = run(&args, folder.path(), 2, &mut watch);
    // A fitness of zero counts as no best at all, so such a run goes on; this is the recipe's rule.
    assert_eq!(outcome.kind, OutcomeKind::Stopped);
    let folder = tempfile::tempdir().expect("a folder");
    let args = TrainArgs { epochs: 1000, time: Some(2.0 / 3600.0), ..tiny_args() };
    let outcome = run(&args, folder.path(), 2, &mut Watch::default());
    assert_eq!(outcome.kind, OutcomeKind::Completed);
    assert!(outcome.epochs < 1000 && outcome.epochs >= 1, "{}", outcome.epochs);
}

#[test]
fn multi_scale_rect_and_other_optimisers_run() {
    for (optimizer, multi_scale, rect) in
        [(OptimizerChoice::MuSgd, 0.5, false), (OptimizerChoice::NAdam, 0.0, true)]
    {
        let folder = tempfile::tempdir().expect("a folder");
        let args = TrainArgs { epochs: 1, optimizer, multi_scale, rect, ..tiny_args() };
        run(&args, folder.path(), 2, &mut Watch::default());
        let columns = rows(folder.path())[0].len();
        assert_eq!(columns, if optimizer == OptimizerChoice::MuSgd { 19 } else { 14 });
    }
}

#[test]
fn what_cannot_be_trained_is_refused_by_class() {
    let fails = |args: TrainArgs| {
        let folder = tempfile::tempdir().expect("a folder");
        Session::new(spec(&args, folder.path(), 1), &mut Watch::default()).run().expect_err("refused")
    };
    let missing = fails(TrainArgs { data: "/nowhere/data.yaml".into(), ..tiny_args() });
    assert_eq!(missing.class(), FailureClass::Data, "{missing}");
    let weights = fails(TrainArgs { pretrained: Source::Path("/nowhere/w.pt".into()), ..tiny_args() });
    assert!(matches!(weights, TrainError::Weights { .. }), "{weights}");
    assert_eq!(weights.class(), FailureClass::Config);
    let memory = fails(TrainArgs { batch: Batch::Fraction(1e-9), ..tiny_args() });
    assert_eq!(memory.class(), FailureClass::Memory, "{memory}");
    let freeze = fails(TrainArgs { freeze: Freeze::First(23), ..tiny_args() });
    assert_eq!(freeze.class(), FailureClass::Config, "{freeze}");
}

#[test]
fn pretrained_weights_are_taken_by_name_and_class() {
    let source = undisturbed().join("weights/best.safetensors");
    let folder = tempfile::tempdir().expect("a folder");
    let args = TrainArgs { model: source.to_string_lossy().into_owned(), ..tiny_args() };
    let mut watch = Watch { stop_after: Some(0), ..Watch::default() };
    run(&args, folder.path(), 2, &mut watch);
    let (start, best) = (newest(folder.path()), newest(undisturbed()));
    assert!(watch.warnings().iter().any(|w| w.contains("297 of 297 tensors")), "{:?}", watch.warnings());
    assert_eq!(start.values.len(), best.values.len());
    let folder = tempfile::tempdir().expect("a folder");
    let mut watch = Watch { stop_after: Some(0), ..Watch::default() };
    run(&TrainArgs { model: "yolov8n.pt".into(), ..tiny_args() }, folder.path(), 2, &mut watch);
    assert!(watch.warnings().iter().any(|w| w.contains("from scratch")), "{:?}", watch.warnings());
}
