//! What becomes of dropped files.

use std::io::Write;
use std::time::Duration;

use boxwright::job::state::JobState;

use crate::world::{World, job};

#[test]
fn a_dropped_file_becomes_a_job_and_says_so() {
    let mut world = World::new();
    world.start();
    let text = format!(
        "{}minio: {{MINIO_ID: me, MINIO_SECRET_KEY: hidden}}\nlogging: {{format: json}}\n",
        job("a", "steps=3,junk=1")
    );
    world.drop_job("a.yaml", &text);
    let record = world.wait_state("a", JobState::Completed);
    assert_eq!((record.attempts, record.generation), (1, 1));
    let result = record.result.expect("a result");
    assert_eq!(
        (result["fitness"].as_f64(), result["metrics"]["metrics/mAP50(B)"].as_f64()),
        (Some(0.5), Some(0.91))
    );
    assert_eq!(world.read("configs/a.yaml"), text, "the user's file is never touched");
    let sidecar: serde_json::Value =
        serde_json::from_str(&world.read("configs/a.yaml.accepted.json")).expect("JSON");
    assert_eq!(sidecar["task_id"], "a");
    assert_eq!(sidecar["ignored"][0]["key"], "minio");
    assert!(sidecar["run_dir"].as_str().is_some_and(|path| path.ends_with(&world.run_dir("a"))));
    let effective = world.stub("a", "config.effective.yaml");
    assert!(effective.contains("***") && !effective.contains("hidden"), "{effective}");
    assert!(!world.logs().contains("hidden"));
    // The job's own log: JSON as it asked, each line with its task id; the trainer's words are in it.
    let log = world.wait_file("logs/jobs/a.log");
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect("each line is JSON");
        assert_eq!(line["task_id"], "a");
    }
    assert!(log.contains("stub trainer speaks") && log.contains("\"WARNING\""), "{log}");
    let status = world.run(&["status", "a", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).expect("JSON");
    assert_eq!(
        (status["state"].as_str(), status["progress"]["epoch"].as_i64()),
        (Some("completed"), Some(3))
    );
    assert!(
        status["events"].as_array().is_some_and(|events| events.iter().any(|event| event["kind"] == "epoch"))
    );
    let logs = world.run(&["logs", "a", "-n", "2"]);
    assert_eq!(String::from_utf8_lossy(&logs.stdout).lines().count(), 2);
}

#[test]
fn bad_files_are_refused_with_every_reason_and_the_service_lives() {
    let mut world = World::new();
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..9 {
        let below = vec![format!("*a{}", level - 1); 10].join(", ");
        bomb.push_str(&format!("a{level}: &a{level} [{below}]\n"));
    }
    let good = job("x", "steps=1");
    let long = format!("{good}# {}\n", "x".repeat(1 << 20));
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", b"".to_vec(), "the file is empty"),
        ("comments", b"# nothing\n".to_vec(), "the file is empty"),
        ("half", b"model: yolov8n\ntype: yolo\ntrain: {data: x, epochs".to_vec(), "not valid YAML"),
        ("latin", b"model: yolov8n\ntype: \xe9\n".to_vec(), "2: the text is not UTF-8"),
        ("binary", b"\x7fELF\x02\x01\x01\x00\x00".to_vec(), "the file is binary"),
        (
            "duplicate",
            format!("{good}model: yolov8s\n").into_bytes(),
            "key `model` is given twice; it is already on line 1",
        ),
        ("bomb", bomb.into_bytes(), "aliases expand to too many values"),
        ("large", long.into_bytes(), "at most 1048576 are read"),
        (
            "unknown",
            good.replace("task_id:", "task_idd:").into_bytes(),
            "key `task_idd`: unknown key; did you mean `task_id`?",
        ),
        (
            "typo",
            good.replace("data:", "epohcs: 3, data:").into_bytes(),
            "key `train.epohcs`: unknown key; did you mean `epochs`?",
        ),
        (
            "range",
            good.replace("data:", "epochs: 0, lr0: 7, data:").into_bytes(),
            "key `train.lr0`: got 7; allowed: a number from 0 to 1",
        ),
        ("slash", job("'../x'", "steps=1").into_bytes(), "key `task_id`: got \"../x\""),
        ("shell", job("'x; touch pwned'", "steps=1").into_bytes(), "key `task_id`: got \"x; touch pwned\""),
        (
            "device",
            good.replace("data:", "device: [0, 1], data:").into_bytes(),
            "training on several GPUs is not supported",
        ),
        ("model", good.replace("yolov8n", "yolo99z").into_bytes(), "this build has no table for it"),
        ("list", b"- 1\n- 2\n".to_vec(), "a mapping"),
    ];
    world.start();
    for (name, bytes, _) in &cases {
        world.drop_job(&format!("{name}.yaml"), bytes);
    }
    for (name, bytes, reason) in &cases {
        let verdict = world.wait_file(&format!("configs/{name}.yaml.rejected.txt"));
        assert!(verdict.contains(reason), "{name}: {reason:?} is not in {verdict:?}");
        let kept = std::fs::read(world.path(&format!("configs/{name}.yaml"))).expect("is still there");
        assert_eq!(&kept, bytes, "{name} is untouched");
    }
    let range = world.read("configs/range.yaml.rejected.txt");
    assert!(range.contains("key `train.epochs`: got 0"), "all faults at once: {range}");
    assert!(!world.path("pwned").exists());
    assert_eq!(world.records(), []);
    world.drop_job("good.yaml", job("good", "steps=1"));
    world.wait_state("good", JobState::Completed);
    // A corrected file is taken.
    world.drop_job("empty.yaml", job("corrected", "steps=1"));
    world.wait_state("corrected", JobState::Completed);
    world.wait("the old refusal to go", || {
        (!world.path("configs/empty.yaml.rejected.txt").exists()).then_some(())
    });
}

#[test]
fn a_file_is_taken_when_its_writer_is_done() {
    let mut world = World::new();
    world.start();
    world.wait_log("watches");
    let text = job("slow", "steps=1");
    let mut file = std::fs::File::create(world.path("configs/slow.yaml")).expect("writable");
    for part in text.as_bytes().chunks(text.len().div_ceil(10)) {
        file.write_all(part).expect("writable");
        file.sync_all().expect("syncs");
        std::thread::sleep(Duration::from_millis(80));
        assert!(world.records().is_empty(), "a part is no job");
        assert!(!world.path("configs/slow.yaml.rejected.txt").exists(), "a part is no verdict");
    }
    drop(file);
    world.wait_state("slow", JobState::Completed);
    assert_eq!(world.records().len(), 1);
}

#[test]
fn temporary_files_and_sub_folders_are_left_alone() {
    let mut world = World::new();
    for name in [".a.yaml", "b.yaml~", "c.yaml.tmp", "d.yaml.part", ".e.yaml.swp", "sub/f.yaml", "g.txt"] {
        world.write(&format!("configs/{name}"), job("never", "steps=1"));
    }
    world.write("configs/last.yaml", job("last", "steps=1"));
    world.start_with(&["run", "--once"]);
    assert_eq!(world.wait_service().code(), Some(0), "{}", world.logs());
    let records = world.records();
    assert_eq!((records.len(), records[0].task_id.as_str()), (1, "last"));
}

#[test]
fn the_same_file_twice_is_one_job_and_two_files_of_one_task_id_are_too() {
    let mut world = World::new();
    world.start();
    world.drop_job("a.yaml", job("a", "steps=40,pause=0.05"));
    world.wait_state("a", JobState::Running);
    world.drop_job("a.yaml", job("a", "steps=40,pause=0.05"));
    world.drop_job("b.yaml", job("a", "steps=41,pause=0.05"));
    let verdict = world.wait_file("configs/b.yaml.rejected.txt");
    assert!(verdict.contains("task id a is taken by a job that is"), "{verdict}");
    // An edit of the file whose job runs: the job is unaffected, and the verdict says so.
    world.drop_job("a.yaml", job("a", "steps=2"));
    let verdict = world.wait_file("configs/a.yaml.rejected.txt");
    assert!(verdict.contains("it is unaffected by the change"), "{verdict}");
    let record = world.wait_state("a", JobState::Completed);
    assert_eq!((record.attempts, world.stub("a", "steps").lines().count()), (1, 40));
    assert_eq!(world.records().len(), 1);
    world.end_service(libc::SIGTERM);
    world.write("configs/a.yaml", job("a", "steps=40,pause=0.05"));
    world.start_with(&["run", "--once"]);
    assert_eq!(world.wait_service().code(), Some(0));
    assert_eq!(world.records().len(), 1, "known after a restart too");
    world.assert_no_violation("a");
}

#[test]
fn once_tells_by_its_exit_code() {
    let mut world = World::new();
    world.start_with(&["run", "--once"]);
    assert_eq!(world.wait_service().code(), Some(0), "nothing to do");
    world.write("configs/a.yaml", job("a", "steps=1"));
    world.start_with(&["run", "--once"]);
    assert_eq!(world.wait_service().code(), Some(0));
    assert!(
        world.logs().contains("a completed") && world.logs().contains("metrics/mAP50(B)"),
        "{}",
        world.logs()
    );
    world.write("configs/b.yaml", job("b", "steps=1,always=11@1"));
    world.start_with(&["run", "--once"]);
    assert_eq!(world.wait_service().code(), Some(1), "a job failed");
    world.write("configs/c.yaml", "no job");
    world.start_with(&["run", "--once"]);
    assert_eq!(world.wait_service().code(), Some(1), "a file was refused");
    world.start_with(&["run", "--once"]);
    assert_eq!(world.wait_service().code(), Some(0), "nothing new");
    world.write("service.yaml", "slots: {cpu: none}\nwotch: 3\n");
    world.start_with(&["run", "--once"]);
    assert_eq!(world.wait_service().code(), Some(2), "a configuration fault");
    assert!(world.logs().contains("key `wotch`: unknown key; did you mean `watch`?"));
}

#[test]
fn services_that_watch_one_folder_take_each_file_once() {
    let mut first = World::new();
    let mut second = World::new();
    second.set("CONFIGS_DIR", first.path("configs"));
    first.set("MACHINE_ID", "first");
    second.set("MACHINE_ID", "second");
    first.start();
    second.start();
    for number in 0..20 {
        let text = job(&format!("shared-{number}"), "steps=2");
        // Half of them leave the name to the service that takes them.
        let text = if number < 10 { text } else { text.replace(&format!("task_id: shared-{number}\n"), "") };
        first.drop_job(&format!("{number}.yaml"), text);
    }
    let ended = |world: &World| {
        let records = world.records();
        records.iter().all(|record| record.state.is_terminal()).then_some(records)
    };
    let (ours, theirs) = first.wait("every job to end", || {
        let (ours, theirs) = (ended(&first)?, ended(&second)?);
        (ours.len() + theirs.len() >= 20).then_some((ours, theirs))
    });
    // Another look of both, which finds nothing new.
    first.drop_job("last.yaml", job("last", "steps=1"));
    let taken_by = |world: &World| world.record("last").is_some_and(|it| it.state == JobState::Completed);
    first.wait("the last job", || (taken_by(&first) || taken_by(&second)).then_some(()));
    first.wait("nothing left claimed", || {
        let names = std::fs::read_dir(first.path("configs")).expect("reads").flatten();
        names.into_iter().all(|entry| !entry.file_name().to_string_lossy().ends_with(".claim")).then_some(())
    });
    let mut sources: Vec<_> = first.records().into_iter().chain(second.records()).collect();
    assert_eq!(sources.len(), 21, "{} and {} at first", ours.len(), theirs.len());
    sources.sort_by(|one, other| one.source.cmp(&other.source));
    sources.dedup_by(|one, other| one.source == other.source);
    assert_eq!(sources.len(), 21, "one job for each file");

    let configs = first.path("configs");
    // An edit belongs to the service that took the file, also when only the other one runs.
    let (mut owner, mut other) = if taken_by(&first) { (first, second) } else { (second, first) };
    owner.kill_service();
    let file = configs.join("last.yaml");
    std::fs::write(&file, job("last-edited", "steps=1")).expect("writable");
    other.wait_log("was edited; it belongs to the machine");
    assert!(other.record("last-edited").is_none());
    owner.start();
    owner.wait_state("last-edited", JobState::Completed);
    // A sidecar that is removed gives the file away.
    owner.kill_service();
    std::fs::remove_file(file.with_extension("yaml.accepted.json")).expect("there");
    std::fs::write(&file, job("last-given", "steps=1")).expect("writable");
    other.wait_state("last-given", JobState::Completed);
    other.end_service(libc::SIGTERM);
    // Who begins anew in the same place is told whose the files are.
    let mut anew = World::new();
    anew.set("CONFIGS_DIR", &configs);
    anew.set("MACHINE_ID", "first");
    anew.start();
    anew.wait_log("was taken by a service with another state folder on this machine");
    assert!(anew.records().is_empty());
}
