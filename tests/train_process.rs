//! The trainer as a process: its protocol, kill -9 at any moment, the command that validates.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use boxwright::data::synth::{SynthArgs, write_dataset};
use boxwright::train::args::{Batch, Source, TrainArgs};
use boxwright::train::child::{ChildResult, ChildSpec, JobMode};

/// Longest wait for one line of a trainer.
const LIMIT: Duration = Duration::from_secs(120);

fn args(root: &Path) -> TrainArgs {
    let data = root.join("data");
    if !data.exists() {
        let synth = SynthArgs { images: 12, val_images: 4, imgsz: 64, seed: 9, ..SynthArgs::default() };
        write_dataset(&data, &synth).expect("a dataset");
    }
    TrainArgs {
        model: "yolov8n".into(),
        data: data.to_string_lossy().into_owned(),
        epochs: 3,
        batch: Batch::Images(4),
        nbs: 8,
        imgsz: 64,
        workers: 1,
        warmup_epochs: 1.0,
        plots: false,
        ..TrainArgs::default()
    }
}

struct Trainer {
    child: Child,
    lines: Receiver<serde_json::Value>,
    result: PathBuf,
}

impl Trainer {
    fn start(args: &TrainArgs, run_dir: &Path) -> Trainer {
        std::fs::create_dir_all(run_dir).expect("a folder");
        let result = run_dir.join("result.json");
        let spec = ChildSpec {
            gpu_share_max: 1.0,
            gpu_uuid: None,
            task_id: "t1".into(),
            attempt: 1,
            mode: args.job_mode(),
            run_dir: run_dir.to_owned(),
            args: args.clone(),
            resume: true,
            result_path: result.clone(),
        };
        let path = run_dir.join("spec.json");
        std::fs::write(&path, serde_json::to_vec(&spec).expect("JSON")).expect("written");
        let mut command = Command::new(env!("CARGO_BIN_EXE_boxwright"));
        command.arg("train-child").arg("--spec").arg(&path);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("the trainer starts");
        let out = child.stdout.take().expect("piped");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let event = serde_json::from_str(&line).expect("every line is JSON");
                if sender.send(event).is_err() {
                    break;
                }
            }
        });
        Trainer { child, lines, result }
    }

    /// Waits until `count` events of this name were seen; false when the trainer ended before.
    fn wait_for(&self, name: &str, count: usize) -> bool {
        let mut seen = 0;
        while seen < count {
            match self.lines.recv_timeout(LIMIT) {
                Ok(event) => seen += usize::from(event["event"] == name),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return false,
                Err(error) => panic!("{name}: {error}"),
            }
        }
        true
    }

    fn say(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().expect("piped"), "{line}").expect("the trainer listens");
    }

    /// Waits for the end; the exit code.
    fn end(mut self) -> (Option<i32>, Option<ChildResult>) {
        while self.lines.recv_timeout(LIMIT).is_ok() {}
        let status = self.child.wait().expect("it ends");
        (status.code(), ChildResult::read(&self.result))
    }
}

fn weights(run_dir: &Path) -> Vec<u8> {
    std::fs::read(run_dir.join("weights/last.safetensors")).expect("weights")
}

#[test]
fn killed_again_and_again_it_ends_in_the_same_bits() {
    let root = tempfile::tempdir().expect("a folder");
    let args = args(root.path());
    let (code, result) = Trainer::start(&args, &root.path().join("whole")).end();
    assert_eq!(code, Some(0));
    let result = result.expect("a result");
    assert_eq!((result.status.as_str(), result.epochs), ("completed", Some(3)));
    let measured_on = boxwright::data::metadata::val_fingerprint(Path::new(&args.data)).expect("told");
    assert_eq!(result.val_fingerprint, Some(measured_on));
    let run_dir = root.path().join("killed");
    // Right at the start, within an epoch, between weights and checkpoint, during validation.
    for (event, count) in [("started", 1), ("step", 2), ("epoch", 1), ("step", 2), ("validated", 1)] {
        let mut trainer = Trainer::start(&args, &run_dir);
        if trainer.wait_for(event, count) {
            trainer.child.kill().expect("kill -9");
        }
        let (code, result) = trainer.end();
        assert!(code.is_none() && result.is_none(), "killed: {code:?}");
    }
    let (code, _) = Trainer::start(&args, &run_dir).end();
    assert_eq!(code, Some(0));
    assert!(weights(&root.path().join("whole")) == weights(&run_dir), "the weights differ");
}

#[test]
fn stop_checkpoint_and_a_gone_supervisor_are_obeyed() {
    let root = tempfile::tempdir().expect("a folder");
    let args = TrainArgs { epochs: 1000, val: false, ..args(root.path()) };
    let run_dir = root.path().join("run");
    let mut trainer = Trainer::start(&args, &run_dir);
    assert!(trainer.wait_for("step", 2));
    trainer.say("checkpoint");
    assert!(trainer.wait_for("checkpoint", 1));
    trainer.say("stop");
    let (code, result) = trainer.end();
    assert_eq!(code, Some(130));
    assert_eq!(result.expect("a result").status, "cancelled");
    std::fs::remove_file(run_dir.join("result.json")).expect("removed");
    let mut trainer = Trainer::start(&args, &run_dir);
    assert!(trainer.wait_for("step", 1));
    drop(trainer.child.stdin.take());
    let (code, result) = trainer.end();
    assert_eq!((code, result), (Some(131), None), "interrupted is not final");
    let missing = TrainArgs { data: "/nowhere".into(), ..args };
    let (code, result) = Trainer::start(&missing, &root.path().join("bad")).end();
    let result = result.expect("a result");
    assert_eq!((code, result.class.as_deref()), (Some(11), Some("data")));
    assert_eq!(result.val_fingerprint, None);
    assert!(result.reason.is_some_and(|r| r.contains("/nowhere")));
}

#[test]
fn train_and_val_agree_and_end_with_one_line_of_json() {
    let root = tempfile::tempdir().expect("a folder");
    let args = args(root.path());
    let run = |arguments: &[&str]| -> serde_json::Value {
        let output =
            Command::new(env!("CARGO_BIN_EXE_boxwright")).args(arguments).current_dir(root.path()).output();
        let output = output.expect("it runs");
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{err}");
        assert_eq!(out.lines().count(), 1, "{out}");
        serde_json::from_str(&out).expect("JSON")
    };
    let data = format!("data={}", args.data);
    let items = [
        "model=yolov8n",
        &data,
        "epochs=2",
        "imgsz=64",
        "batch=4",
        "nbs=4",
        "plots=false",
        "workers=1",
        "name=a",
    ];
    let trained = run(&[&["train", "--json"], &items[..]].concat());
    assert_eq!((trained["status"].as_str(), trained["epochs"].as_u64()), (Some("completed"), Some(2)));
    let best = trained["best"].as_str().expect("a path");
    assert!(best.contains("runs/detect/a"), "{best}");
    let validated = run(&["val", best, "--data", &args.data, "--batch", "8", "--json"]);
    for name in ["metrics/mAP50(B)", "metrics/mAP50-95(B)", "metrics/precision(B)", "metrics/recall(B)"] {
        assert_eq!(validated["metrics"][name], trained["metrics"][name], "{name}");
    }
    // The folder says how to go on; the run is complete, so nothing is computed but the last validation.
    let resumed = run(&["train", "--json", "--resume", "runs/detect/a"]);
    assert_eq!(resumed["steps"], trained["steps"]);
    let refused = Command::new(env!("CARGO_BIN_EXE_boxwright"))
        .args(["train", "model=yolov8n", &data, "epohcs=3"])
        .output()
        .expect("it runs");
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("did you mean `epochs`"));
}

#[test]
fn an_evaluation_speaks_the_same_language() {
    let root = tempfile::tempdir().expect("a folder");
    let train = TrainArgs { epochs: 1, save_json: true, ..args(root.path()) };
    let trained = root.path().join("trained");
    assert_eq!(Trainer::start(&train, &trained).end().0, Some(0));
    let best = trained.join("weights/best.safetensors").to_string_lossy().into_owned();
    let args =
        TrainArgs { mode: "val".into(), model: best, imgsz: 0, rect: true, plots: true, ..train.clone() };
    assert_eq!(args.job_mode(), JobMode::Evaluate);
    let run_dir = root.path().join("measured");
    let trainer = Trainer::start(&args, &run_dir);
    let mut events = Vec::new();
    while let Ok(event) = trainer.lines.recv_timeout(LIMIT) {
        events.push(event);
    }
    let names: Vec<&str> = events.iter().filter_map(|event| event["event"].as_str()).collect();
    assert_eq!(names, ["started", "plan", "validating", "validated", "finished"]);
    assert_eq!((&events[1]["val_images"], &events[1]["imgsz"]), (&4.into(), &64.into()));
    assert_eq!((&events[2]["batch"], &events[2]["batches"]), (&1.into(), &1.into()));
    let (code, result) = trainer.end();
    let result = result.expect("a result");
    assert_eq!((code, result.status.as_str(), result.epochs), (Some(0), "completed", None));
    // The figures are those that the training ended with, from the same weights on the same images.
    let ended = ChildResult::read(&trained.join("result.json")).expect("a result");
    assert_eq!((&result.metrics, result.fitness.is_some()), (&ended.metrics, true));
    assert_eq!(events[4]["metrics"]["fitness"], result.metrics["fitness"]);
    assert_eq!((result.best, result.last), (None, None), "nothing was learnt");
    let boxes = |folder: &Path| -> Vec<serde_json::Value> {
        let text = std::fs::read(folder.join("predictions.json")).expect("is written");
        serde_json::from_slice(&text).expect("JSON")
    };
    assert!(!boxes(&run_dir).is_empty() && boxes(&run_dir) == boxes(&trained), "box by box");
    for name in
        ["args.yaml", "events.jsonl", "confusion_matrix.png", "BoxPR_curve.png", "val_batch0_pred.png"]
    {
        assert!(run_dir.join(name).is_file(), "{name}");
    }
    assert!(!run_dir.join("results.csv").exists() && !run_dir.join("state").exists());

    // Small batches, so that a stop falls between two of them.
    let slow = TrainArgs { batch: Batch::Images(1), split: "train".into(), plots: false, ..args.clone() };
    for (orphaned, code) in [(false, Some(130)), (true, Some(131))] {
        let run_dir = root.path().join(format!("stopped-{orphaned}"));
        let mut trainer = Trainer::start(&slow, &run_dir);
        if orphaned {
            drop(trainer.child.stdin.take());
        } else {
            trainer.say("stop");
        }
        let (left, result) = trainer.end();
        assert_eq!(left, code);
        assert_eq!(result.map(|result| result.status), (!orphaned).then(|| "cancelled".to_owned()));
    }
    for (bad, code, class) in [
        (TrainArgs { data: "/nowhere".into(), ..args.clone() }, 11, "data"),
        (TrainArgs { model: "/nowhere.safetensors".into(), ..args }, 10, "config"),
    ] {
        let (left, result) = Trainer::start(&bad, &root.path().join(format!("bad-{class}"))).end();
        let result = result.expect("a result");
        assert_eq!((left, result.class.as_deref()), (Some(code), Some(class)), "{:?}", result.reason);
        assert!(result.reason.is_some_and(|reason| reason.contains("/nowhere")));
    }
}

/// What a message to `recreate` becomes: the weights of a run, and the run goes on.
#[test]
fn a_job_goes_on_from_the_weights_of_another_run() {
    let root = tempfile::tempdir().expect("a folder");
    let first = TrainArgs { epochs: 1, ..args(root.path()) };
    let trained = root.path().join("first");
    assert_eq!(Trainer::start(&first, &trained).end().0, Some(0));
    let last = trained.join("weights/last.safetensors").to_string_lossy().into_owned();
    let more = TrainArgs { epochs: 2, resume: Source::Path(last), ..first };
    let run_dir = root.path().join("second");
    let trainer = Trainer::start(&more, &run_dir);
    let mut events = Vec::new();
    while let Ok(event) = trainer.lines.recv_timeout(LIMIT) {
        events.push(event);
    }
    let plan = events.iter().find(|event| event["event"] == "plan").expect("a plan");
    assert!(plan["resumed_step"].as_u64().is_some_and(|step| step > 0), "{plan}");
    let epochs: Vec<u64> =
        events.iter().filter(|e| e["event"] == "epoch").filter_map(|e| e["epoch"].as_u64()).collect();
    assert_eq!(epochs, [2], "the first was trained before");
    let (code, result) = trainer.end();
    assert_eq!((code, result.and_then(|result| result.epochs)), (Some(0), Some(2)));
    assert!(run_dir.join("weights/last.safetensors").is_file() && weights(&trained) != weights(&run_dir));
}
