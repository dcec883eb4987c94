//! The acceptance corpus, merging, masking and hostile files.

use std::path::Path;

use super::*;
use crate::train::args::Source;

fn context() -> SpecContext {
    SpecContext {
        base: None,
        strict: false,
        runs_dir: "runs".into(),
        working_dir: "/work-dir".into(),
        data_path_map: Vec::new(),
    }
}

fn load(text: &str) -> Result<LoadedSpec, SpecError> {
    JobSpec::load(text.as_bytes(), "job.yaml", &context())
}

fn faults(text: &str) -> String {
    load(text).expect_err("the job is not valid").to_string()
}

fn corpus(name: &str) -> LoadedSpec {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name);
    let text = std::fs::read(&path).expect("the corpus is part of the crate");
    JobSpec::load(&text, name, &context()).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Dotted paths of all leaves and blocks that are not null.
fn given_keys(json: &serde_json::Value, path: &str, keys: &mut Vec<String>) {
    let Some(map) = json.as_object() else { return };
    for (key, value) in map.iter().filter(|(_, value)| !value.is_null()) {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        given_keys(value, &path, keys);
        keys.push(path);
    }
}

#[test]
fn the_corpus_loads_and_every_key_is_accounted_for() {
    for (name, refused) in [
        ("readme_job.yaml", 0),
        ("library_example.yaml", 0),
        ("g2_detection.yaml", 0),
        ("g2_classification.yaml", 3),
        ("generated.yaml", 0),
        ("base_config.yaml", 0),
    ] {
        let loaded = corpus(name);
        assert_eq!(loaded.refused.list().len(), refused, "{name}: {}", loaded.refused);
        let spec = &loaded.spec;
        let mut accounted: Vec<&str> = spec.understood.iter().map(String::as_str).collect();
        accounted.extend(spec.ignored.iter().chain(&spec.overridden).map(|note| note.key.as_str()));
        accounted.extend(loaded.refused.list().iter().map(|fault| fault.key.as_str()));
        let mut keys = Vec::new();
        given_keys(&spec.effective, "", &mut keys);
        for key in &keys {
            let known = accounted.iter().any(|known| {
                known == key || key.starts_with(&format!("{known}.")) || known.starts_with(&format!("{key}."))
            });
            assert!(known, "{name}: `{key}` is neither understood nor ignored nor overridden");
        }
        let text = serde_json::to_string(spec).expect("serialises");
        assert!(!text.contains("must not be seen") && !text.contains("user:word"), "{name} shows a secret");
        assert_eq!(serde_json::from_str::<JobSpec>(&text).expect("reads back"), *spec, "{name}");
    }
}

#[test]
fn the_corpus_means_what_it_says() {
    let job = corpus("g2_detection.yaml").runnable().expect("can run");
    assert_eq!(job.priority, Priority::High);
    assert_eq!((job.study_name.as_str(), job.version), ("plant_roboflow", Some(2)));
    assert_eq!(job.args.batch, crate::train::args::Batch::Auto);
    assert_eq!((job.args.lr0, job.args.weight_decay), (1e-4, 5e-4));
    let ignored: Vec<&str> = job.ignored.iter().map(|note| note.key.as_str()).collect();
    for key in ["sweeper.search_space", "mlflow", "minio", "extras.gpu.id", "genetic"] {
        assert!(ignored.contains(&key), "{key} is not in {ignored:?}");
    }
    assert!(["extras.gpu.limit", "train.amp"].iter().all(|key| job.understood.iter().any(|u| u == key)));
    assert_eq!(job.gpu_share_max, Some(0.95));
    let job = corpus("library_example.yaml").runnable().expect("can run");
    assert_eq!(
        job.run_dir(),
        Path::new("/work-dir/runs/models/example/yolo/test_training_001/2/train_test_training_001")
    );
    assert_eq!((job.retries_max, job.retry_delay_ms, job.args.lr0), (Some(3), Some(1000), 1e-3));
    assert!(job.overridden.iter().any(|note| note.key == "train.exist_ok"), "{:?}", job.overridden);
    assert!(
        job.overridden
            .iter()
            .any(|note| note.key == "model" && note.reason.contains("its name chooses the network"))
    );
    let classification = corpus("g2_classification.yaml").runnable().expect_err("is refused").to_string();
    assert!(classification.contains("g2_classification.yaml:2: key `model`"), "{classification}");
    assert!(classification.contains("this build trains the task detect"), "{classification}");
}

#[test]
fn faults_name_file_line_and_key_all_at_once() {
    let text = "model: yolov8n\ntype: yolov\ntask_id: 'x; touch /tmp/p'\ntrian: {}\ntrain:\n  epohcs: 3\n  lr0: 7\n\
                sweeper: {study_name: ../up, prioritty: high, fitness: metrics/mAP}\n";
    let text = faults(text);
    for part in [
        "job.yaml:2: key `type`: got \"yolov\"; allowed: one of yolo, rtdetr (did you mean `yolo`?)",
        "job.yaml:3: key `task_id`: got \"x; touch /tmp/p\"; allowed: 1 to 128 of the characters",
        "job.yaml:4: key `trian`: unknown key; did you mean `train`?",
        "job.yaml:6: key `train.epohcs`: unknown key; did you mean `epochs`?",
        "job.yaml:7: key `train.lr0`: got 7; allowed: a number from 0 to 1",
        "key `train.data`: missing",
        "key `sweeper.study_name`: got \"../up\"",
        "key `sweeper.prioritty`: unknown key; did you mean `priority`?",
        "key `sweeper.fitness`: got \"metrics/mAP\"; allowed: one of fitness, metrics/mAP50-95(B)",
    ] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
    assert!(faults("just a text").contains("a mapping"), "{}", faults("just a text"));
    assert!(faults("- 1\n- 2\n").contains("a list of 2"));
    assert!(faults("model: yolov8n\n").contains("key `type`: missing"));
}

#[test]
fn ids_are_random_when_absent_and_never_a_path() {
    let minimal = "model: yolov8n\ntype: yolo\ntrain: {data: d.yaml}\n";
    let (a, b) = (load(minimal).expect("valid").spec, load(minimal).expect("valid").spec);
    assert_ne!(a.task_id, b.task_id);
    for bad in ["../x", "a/b", "..", "$(id)", "\"a\\u0000b\"", "x y"] {
        let text = format!("{minimal}task_id: {bad}\n");
        assert!(faults(&text).contains("task_id"), "{bad}");
    }
    let number = load(&format!("{minimal}task_id: 42\n")).expect("a number is a name").spec;
    assert_eq!(number.task_id.as_str(), "42");
}

#[test]
fn base_is_merged_under_the_file_and_strict_makes_faults_of_ignored_keys() {
    let base = yaml::parse(b"train: {epochs: 7, imgsz: 320, classes: [1, 2]}\nmlflow: {a: 1}\n", "base")
        .expect("valid");
    let base = Node::from_json(&base.to_json());
    let mut with_base = SpecContext { base: Some(base), ..context() };
    let text = b"model: yolov8n\ntype: yolo\ntrain: {data: d.yaml, epochs: 9, classes: [0]}\n";
    let spec = JobSpec::load(text, "job.yaml", &with_base).expect("valid").spec;
    assert_eq!((spec.args.epochs, spec.args.imgsz), (9, 320));
    assert_eq!(spec.args.classes.0, Some(vec![0]));
    with_base.strict = true;
    let error = JobSpec::load(text, "job.yaml", &with_base).expect_err("strict").to_string();
    assert!(error.contains("key `mlflow`: has no effect"), "{error}");
}

#[test]
fn data_paths_are_mapped_loudly() {
    let map = vec![("/datasets/".to_owned(), "/srv/sets/".to_owned())];
    let mapped = SpecContext { data_path_map: map, ..context() };
    let text = b"model: yolov8n\ntype: yolo\ntrain: {data: /datasets/a/data.yaml}\n";
    let spec = JobSpec::load(text, "job.yaml", &mapped).expect("valid").spec;
    assert_eq!(spec.args.data, "/srv/sets/a/data.yaml");
    assert!(spec.overridden.iter().any(|note| note.key == "train.data"));
}

#[test]
fn weights_are_mapped_like_data() {
    let folder = tempfile::tempdir().expect("a folder");
    let here = folder.path().to_str().expect("a plain path");
    std::fs::write(folder.path().join("last.pt"), "x").expect("writable");
    let map = vec![("/models/".to_owned(), format!("{here}/"))];
    let mapped = SpecContext { data_path_map: map, ..context() };
    let last = format!("{here}/last.pt");
    let text = b"model: /models/last.pt\ntype: yolo\ntrain: {mode: val, data: d.yaml}\n";
    let spec = JobSpec::load(text, "job.yaml", &mapped).expect("valid").spec;
    assert_eq!(spec.args.model, last);
    assert!(spec.overridden.iter().any(|note| note.key == "model"), "{:?}", spec.overridden);
    let text = b"model: yolov8n\ntype: yolo\ntrain: {data: d, resume: /models/last.pt, pretrained: /models/last.pt}\n";
    let spec = JobSpec::load(text, "job.yaml", &mapped).expect("valid").spec;
    assert_eq!((spec.args.resume, spec.args.pretrained), (Source::Path(last.clone()), Source::Path(last)));
}

#[test]
fn secrets_are_masked() {
    let json = serde_json::json!({
        "REDIS_PASSWORD": "x", "deep": [{"apiKey_token": 1}], "url": "redis://u:p@h:1/0", "plain": "a@b", "pass": null
    });
    assert_eq!(
        masked(&json),
        serde_json::json!({
            "REDIS_PASSWORD": "***", "deep": [{"apiKey_token": "***"}], "url": "redis://***@h:1/0", "plain": "a@b",
            "pass": null
        })
    );
}

#[test]
fn extras_say_where_the_job_computes() {
    use crate::train::args::Device;
    let load = |train: &str, extras: &str| {
        let text =
            format!("model: yolov8n\ntype: yolo\ntrain: {{data: d.yaml{train}}}\nextras: {{{extras}}}\n");
        load(&text).expect("valid").spec
    };
    let device = |train: &str, extras: &str| load(train, extras).args.device;
    assert_eq!(device("", "force_cpu: false"), Device::Default);
    assert_eq!(device("", "force_cpu: true"), Device::Cpu);
    assert_eq!(device("", "force_cpu: true, force_gpu: true"), Device::Cpu);
    assert_eq!(device(", device: 1", "force_cpu: true"), Device::Cpu);
    assert_eq!(device("", "force_gpu: true"), Device::Cuda(0));
    assert_eq!(device("", "force_gpu: true, gpu: {id: 2}"), Device::Cuda(2));
    assert_eq!(device("", "gpu: {id: 2}"), Device::Default);
    assert_eq!(device(", device: cuda:1", "force_gpu: true, gpu: {id: 2}"), Device::Cuda(1));
    assert_eq!(device(", device: cpu", "force_gpu: true"), Device::Cpu);
    let noted = |spec: &JobSpec, key: &str| spec.ignored.iter().chain(&spec.overridden).any(|n| n.key == key);
    assert!(noted(&load(", device: cpu", "force_gpu: true"), "extras.force_gpu"));
    assert!(noted(&load(", device: 1", "force_cpu: true"), "train.device"));
    assert!(noted(&load("", "gpu: {id: 2}"), "extras.gpu.id"));
    assert!(!noted(&load("", "force_gpu: true, gpu: {id: 2}"), "extras.gpu.id"));
    assert_eq!(load("", "gpu: {limit: 0.5}").gpu_share_max, Some(0.5));
}

#[test]
fn a_job_evaluates_a_weights_file_that_is_there() {
    let folder = tempfile::tempdir().expect("a folder");
    let weights = folder.path().join("odd-name.pt");
    std::fs::write(&weights, "x").expect("writable");
    let context = SpecContext { working_dir: folder.path().to_owned(), ..context() };
    let load = |model: &str, train: &str| {
        let text = format!("model: {model}\ntype: yolo\ntrain: {{mode: VAL, data: d.yaml{train}}}\n");
        JobSpec::load(text.as_bytes(), "job.yaml", &context).map(|loaded| loaded.runnable().expect("can run"))
    };
    let spec = load("odd-name.pt", ", conf: 0.1, epochs: 3, resume: true").expect("valid");
    assert_eq!(spec.mode, JobMode::Evaluate);
    assert_eq!(spec.args.model, weights.to_string_lossy());
    assert_eq!((spec.args.imgsz, spec.args.rect, spec.args.conf), (0, true, Some(0.1)));
    assert_eq!(spec.args.resume, Source::Off);
    let ignored: Vec<&str> = spec.ignored.iter().map(|note| note.key.as_str()).collect();
    assert_eq!(ignored, ["train.epochs", "train.resume"]);
    assert!(["train.mode", "train.conf", "model"].iter().all(|key| spec.understood.iter().any(|u| u == key)));
    let spec = load("odd-name.pt", ", imgsz: 320, rect: false").expect("valid");
    assert_eq!((spec.args.imgsz, spec.args.rect), (320, false));
    for model in ["yolov8n", "gone.safetensors", "yolov8n.pt"] {
        let text = load(model, "").expect_err("nothing to evaluate").to_string();
        let part = "allowed: a weights file (.safetensors or .pt) that exists";
        assert!(text.starts_with("job.yaml:1: key `model`: got") && text.contains(part), "{text}");
    }
    // A file that is there is not judged by its name when it is trained, either.
    let text = b"model: odd-name.pt\ntype: yolo\ntrain: {data: d.yaml}\n";
    let spec = JobSpec::load(text, "job.yaml", &context).expect("valid").runnable().expect("can run");
    assert_eq!((spec.mode, spec.args.model), (JobMode::Train, weights.to_string_lossy().into_owned()));
}

#[test]
fn records_of_before_read_as_training_jobs_that_need_no_gpu() {
    let spec = load("model: yolov8n\ntype: yolo\ntrain: {data: d}\n").expect("valid").spec;
    let mut json = serde_json::to_value(&spec).expect("serialises");
    assert_eq!(json["mode"], "train");
    let fields = json.as_object_mut().expect("an object");
    assert!(fields.remove("mode").is_some() && fields.remove("requires_gpu").is_some());
    assert_eq!(serde_json::from_value::<JobSpec>(json).expect("reads"), spec);
}

#[test]
fn a_required_gpu_is_any_gpu() {
    use crate::train::args::Device;
    let load = |device: &str, rest: &str| {
        let text = format!("model: yolov8n\ntype: yolo\ntrain: {{data: d{device}}}\n{rest}");
        load(&text).expect("valid").spec
    };
    let device = |device: &str, rest: &str| {
        let spec = load(device, rest);
        assert!(spec.requires_gpu);
        spec.args.device
    };
    assert_eq!(device("", "requires_gpu: true\n"), Device::Default);
    assert_eq!(device(", device: 2", "requires_gpu: true\n"), Device::Cuda(2));
    assert_eq!(device(", device: cpu", "requires_gpu: true\n"), Device::Default);
    assert_eq!(device("", "requires_gpu: true\nextras: {force_cpu: true}\n"), Device::Default);
    assert_eq!(device("", "requires_gpu: true\nextras: {force_gpu: true}\n"), Device::Default);
    assert_eq!(device("", "requires_gpu: true\nextras: {force_gpu: true, gpu: {id: 1}}\n"), Device::Cuda(1));
    let spec = load(", device: cpu", "requires_gpu: true\n");
    assert!(spec.overridden.iter().any(|note| note.key == "train.device"), "{:?}", spec.overridden);
    let spec = load(", device: cpu", "requires_gpu: false\n");
    assert_eq!((spec.requires_gpu, spec.args.device), (false, Device::Cpu));
}
