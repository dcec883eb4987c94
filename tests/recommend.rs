//! `boxwright recommend` as a person uses it: the answer, what is kept, the job it writes, the run it starts from.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use boxwright::data::synth::{SynthArgs, write_dataset};
use serde_json::Value as Json;

/// Runs a command in `root`, with caches and state of its own.
fn boxwright(root: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_boxwright"));
    command.args(arguments).current_dir(root).env("BOXWRIGHT_CACHE_DIR", root.join("cache"));
    command.output().expect("it runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn recommend(root: &Path, more: &[&str]) -> Output {
    let first = ["recommend", "set", "--device", "cpu", "--state-dir", "state"];
    boxwright(root, &[&first, more].concat())
}

/// The answer as JSON.
fn answer(root: &Path, more: &[&str]) -> Json {
    let output = recommend(root, &[more, &["--json"]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn cache(answer: &Json) -> [&str; 2] {
    ["metadata", "recommendation"].map(|which| answer["cache"][which].as_str().expect("a word"))
}

fn touch(path: &Path) {
    let file = std::fs::File::options().append(true).open(path).expect("opens");
    let time = file.metadata().expect("known").modified().expect("known");
    file.set_modified(time + Duration::from_secs(1)).expect("set");
}

fn with_shapes() -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("a folder");
    let args = SynthArgs { images: 12, val_images: 4, imgsz: 64, seed: 9, ..SynthArgs::default() };
    write_dataset(&root.path().join("set"), &args).expect("a dataset");
    root
}

#[test]
fn the_same_question_has_the_same_answer_from_the_cache() {
    let root = with_shapes();
    let root = root.path();
    let first = recommend(root, &[]);
    let second = recommend(root, &[]);
    assert!(first.status.success() && second.status.success(), "{}", text(&first.stderr));
    assert_eq!(text(&first.stdout), text(&second.stdout));
    assert!(text(&first.stderr).contains("metadata cache=miss, recommendation cache=miss"));
    let said = text(&second.stderr);
    assert!(said.contains("metadata cache=hit (") && said.contains("recommendation cache=hit"), "{said}");

    assert_eq!(
        cache(&answer(root, &["--goal", "fast"])),
        ["hit", "miss"],
        "another goal is another question"
    );
    assert_eq!(cache(&answer(root, &["--goal", "fast"])), ["hit", "hit"]);
    assert_eq!(cache(&answer(root, &["--fresh"])), ["miss", "miss"]);
    touch(&root.join("set/labels/train/000003.txt"));
    let touched = answer(root, &[]);
    assert_eq!(cache(&touched), ["miss", "miss"]);
    assert_eq!(touched["cache"]["images_scanned"], 1);
    for shelf in ["metadata", "recommendation"] {
        for entry in std::fs::read_dir(root.join("cache").join(shelf)).expect("listed") {
            std::fs::write(entry.expect("an entry").path(), "damaged\n{}").expect("written");
        }
    }
    let anew = answer(root, &[]);
    assert_eq!(cache(&anew), ["miss", "miss"]);
    assert_eq!(anew["recommendation"], touched["recommendation"]);
}

#[test]
fn wrong_questions_are_told_by_code_and_cause() {
    let root = with_shapes();
    let root = root.path();
    let code = |output: &Output| (output.status.code(), text(&output.stderr));
    let (nowhere, said) = code(&boxwright(root, &["recommend", "nowhere"]));
    assert_eq!(nowhere, Some(2));
    assert!(said.contains("no dataset at nowhere"), "{said}");
    let (goal, said) = code(&recommend(root, &["--goal", "best"]));
    assert!(goal == Some(2) && said.contains("balanced"), "{said}");
    std::fs::write(root.join("mine.yaml"), "mine").expect("written");
    let (refused, said) = code(&recommend(root, &["--write", "mine.yaml"]));
    assert_eq!(refused, Some(2));
    assert!(said.contains("mine.yaml exists; it is not overwritten"), "{said}");
    assert_eq!(std::fs::read_to_string(root.join("mine.yaml")).expect("read"), "mine");
    let (failed, said) = code(&recommend(root, &["--write", "no/folder.yaml"]));
    assert!(failed == Some(1) && said.contains("cannot write no/folder.yaml"), "{said}");
    std::fs::write(root.join("set/images/val/000000.jpg"), "").expect("emptied");
    for image in ["000001", "000002", "000003"] {
        std::fs::remove_file(root.join(format!("set/images/val/{image}.jpg"))).expect("removed");
    }
    let (faulty, said) = code(&recommend(root, &[]));
    assert!(faulty == Some(1) && said.contains("000000.jpg"), "{said}");
}

#[test]
fn the_job_it_writes_trains_and_is_what_the_next_one_starts_from() {
    let root = with_shapes();
    let root = root.path();
    let written = recommend(root, &["--write", "job.yaml"]);
    assert!(written.status.success(), "{}", text(&written.stderr));
    let job = std::fs::read_to_string(root.join("job.yaml")).expect("written");
    assert!(job.contains("\n# imgsz: ") && job.contains("\n  epochs: 300\n"), "{job}");
    assert!(job.contains("\n  device: \"cpu\"\n") && job.contains("task_id: set_balanced_"), "{job}");
    let task_id = job.lines().find_map(|line| line.strip_prefix("task_id: ")).expect("an id");
    let short = format!("{}  workers: 1\n  plots: false\n", job.replace("epochs: 300", "epochs: 1"));
    std::fs::create_dir(root.join("configs")).expect("made");
    std::fs::write(root.join("configs/job.yaml"), short).expect("written");
    let ran = boxwright(root, &["run", "configs", "--once", "--state-dir", "state"]);
    assert!(ran.status.success(), "{}\n{}", text(&ran.stdout), text(&ran.stderr));

    let status = boxwright(root, &["status", task_id, "--json", "--state-dir", "state"]);
    let status: Json = serde_json::from_slice(&status.stdout).expect("JSON");
    assert_eq!(status["state"], "completed");
    let known = answer(root, &[]);
    for name in ["data_fingerprint", "val_fingerprint"] {
        let of_data = &known["metadata"][name.trim_start_matches("data_")];
        assert_eq!(status["result"][name].as_str().map(str::len), Some(64), "{status}");
        assert_eq!(&status["result"][name], of_data, "{name}");
    }
    let warm = &known["recommendation"]["warm_start"];
    assert_eq!(warm["task_id"], task_id, "{known}");
    assert_eq!(warm["weights"], status["result"]["best"]);
    assert_eq!(known["recommendation"]["epochs"], 150);
    let next = known["job"].as_str().expect("a job");
    assert!(next.contains("pretrained: "));
    assert!(
        !next.contains(&format!("task_id: {task_id}\n")),
        "it would replace what is stored of the job that it starts from: {next}"
    );
    // The cache was asked before the run; a new run is a new question.
    assert_eq!(cache(&known), ["hit", "miss"]);
    let checked =
        boxwright(root, &["recommend", "set", "--device", "cpu", "--state-dir", "elsewhere", "--json"]);
    let checked: Json = serde_json::from_slice(&checked.stdout).expect("JSON");
    assert!(checked["recommendation"]["warm_start"].is_null(), "another journal knows of no run");

    touch(&root.join("set/labels/train/000003.txt"));
    let changed = answer(root, &[]);
    assert!(changed["recommendation"]["warm_start"].is_null(), "the data are not those of the run");
}
