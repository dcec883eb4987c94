//! The documented messages, hostile ones, and what is the same on every machine.

use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::job::spec::{JobSpec, LoadedSpec, SpecContext};

/// Files by path: the text of a job, or what kind of weights.
#[derive(Default)]
struct Shelf {
    configs: Vec<(String, Vec<u8>)>,
    weights: Vec<(String, WeightsFound)>,
}

impl MessageFiles for Shelf {
    fn read_config(&mut self, path: &str) -> std::io::Result<Vec<u8>> {
        let found = self.configs.iter().find(|(name, _)| name == path);
        found.map(|(_, text)| text.clone()).ok_or_else(|| std::io::ErrorKind::NotFound.into())
    }

    fn weights(&mut self, path: &str) -> WeightsFound {
        self.weights.iter().find(|(name, _)| name == path).map_or(WeightsFound::Missing, |(_, found)| *found)
    }
}

/// Anything is there.
struct Everything;

impl MessageFiles for Everything {
    fn read_config(&mut self, _: &str) -> std::io::Result<Vec<u8>> {
        Ok(JOB.to_vec())
    }

    fn weights(&mut self, _: &str) -> WeightsFound {
        WeightsFound::Weights
    }
}

const JOB: &[u8] = b"model: yolov8n\ntype: yolo\ntrain: {data: d.yaml}\n";

fn context() -> SpecContext {
    SpecContext {
        base: None,
        strict: false,
        runs_dir: "runs".into(),
        working_dir: "/work-dir".into(),
        data_path_map: Vec::new(),
    }
}

fn entry(queue: &str, id: &str, is_list: bool) -> QueueEntry {
    QueueEntry { queue: queue.into(), id: id.into(), is_list }
}

fn load(message: &Message) -> JobSpec {
    let loaded = JobSpec::load_over(&message.text, &message.source_name, &context(), &message.overlay());
    let loaded = loaded.unwrap_or_else(|error| panic!("{error}"));
    LoadedSpec::runnable(loaded).unwrap_or_else(|error| panic!("{error}"))
}

fn text_of(json: &Json) -> &str {
    json.as_str().expect("a text")
}

fn texts(json: &Json) -> Vec<&str> {
    json.as_array().map(|list| list.iter().map(text_of).collect()).unwrap_or_default()
}

fn corpus(path: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(path)).expect("is there")
}

fn shelf(case: &Json) -> Shelf {
    let mut shelf = Shelf::default();
    for (path, what) in case["files"].as_object().into_iter().flatten() {
        match text_of(what) {
            "weights" => shelf.weights.push((path.clone(), WeightsFound::Weights)),
            "checkpoint" => shelf.weights.push((path.clone(), WeightsFound::Resumable)),
            file => shelf.configs.push((path.clone(), corpus(file))),
        }
    }
    shelf
}

fn read(case: &Json, weights: &str) -> Result<Message, MessageError> {
    let mut shelf = shelf(case);
    let entry = entry(text_of(&case["queue"]), text_of(&case["id"]), case["list"].is_string());
    let Some(list) = case["list"].as_str() else {
        let fields = case["stream"].as_object().expect("fields").iter();
        let fields: Vec<_> = fields.map(|(name, value)| (name.clone(), text_of(value).into())).collect();
        return from_stream(&fields, &entry, &mut shelf);
    };
    let kind = match list {
        "training" => ListKind::Training,
        "recreate" => ListKind::Recreate,
        "evaluate" => ListKind::Evaluate,
        other => panic!("no list is called {other}"),
    };
    let payload = case["text"].as_str().map_or_else(|| case["payload"].to_string(), str::to_owned);
    shelf.weights.push((weights.to_owned(), WeightsFound::Weights));
    from_list(kind, payload.replace("WEIGHTS", weights).as_bytes(), &entry, &mut shelf)
}

#[test]
fn the_documented_messages_become_what_they_mean() {
    let folder = tempfile::tempdir().expect("a folder");
    let weights = folder.path().join("best.safetensors");
    std::fs::write(&weights, "x").expect("writable");
    let weights = weights.to_str().expect("a plain path");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/messages");
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .expect("the corpus is part of the crate")
        .map(|entry| entry.expect("is readable").file_name().to_string_lossy().into_owned())
        .filter(|name| name.ends_with(".json"))
        .collect();
    names.sort_unstable();
    assert!(names.len() >= 16, "{names:?}");
    for name in names {
        let case: Json = serde_json::from_slice(&corpus(&format!("messages/{name}"))).expect("JSON");
        let found = read(&case, weights);
        if case["fault"].is_array() {
            let error = found.expect_err(&name);
            let said = error.to_string();
            for part in texts(&case["fault"]) {
                assert!(said.contains(part), "{name}: {part:?} is not in\n{said}");
            }
            assert_eq!(Some(error.may_pass()), case["may_pass"].as_bool(), "{name}: {said}");
            continue;
        }
        let message = found.unwrap_or_else(|error| panic!("{name}: {error}"));
        for (said, part) in message.warnings.iter().zip(texts(&case["warnings"])) {
            assert!(said.contains(part), "{name}: {part:?} is not in {said}");
        }
        assert_eq!(message.warnings.len(), texts(&case["warnings"]).len(), "{name}: {:?}", message.warnings);
        let keys: Vec<&str> = message.overrides.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, texts(&case["overridden"]), "{name}");
        let spec = load(&message);
        for key in keys {
            assert!(spec.overridden.iter().any(|note| note.key == key), "{name}: {key} is not noted");
        }
        let json = serde_json::to_value(&spec).expect("serialises");
        for (path, wanted) in case["job"].as_object().expect("an object") {
            let got = path.split('.').fold(&json, |json, key| &json[key]);
            match wanted.as_str() {
                Some("stable") => assert_eq!(got, message.stable_id.as_str(), "{name}: {path}"),
                _ => assert_eq!(got, wanted, "{name}: {path}"),
            }
        }
    }
}

#[test]
fn an_entry_has_the_same_id_everywhere_and_no_other_has_it() {
    let id = stable_id("training_queue", "1526919030474-0");
    assert_eq!(id.as_str(), "0cdfc0e3-135c-855b-947a-93077d7b937b", "the id is part of the contract");
    assert_ne!(id, stable_id("training_queue", "1526919030474-1"));
    assert_ne!(stable_id("ab", "c"), stable_id("a", "bc"));
    let parsed = uuid::Uuid::parse_str(id.as_str()).expect("a UUID");
    assert_eq!((parsed.get_version_num(), parsed.get_variant()), (8, uuid::Variant::RFC4122));
    let fields = [("config_path".to_owned(), b"a.yaml".to_vec())];
    let message =
        from_stream(&fields, &entry("training_queue", "1-0", false), &mut Everything).expect("read");
    assert_eq!(load(&message).task_id, message.stable_id, "nothing names one");
    let named = Message { text: [JOB, b"task_id: mine\n"].concat(), ..message };
    assert_eq!(load(&named).task_id.as_str(), "mine", "the file names one");
}

#[test]
fn content_is_the_text_and_what_wins_over_it() {
    let alone = content_hash(b"abc", &[]);
    assert_eq!(alone, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    let (a, b) = (("a".to_owned(), json!(1)), ("b".to_owned(), json!("x")));
    let both = content_hash(b"abc", &[a.clone(), b.clone()]);
    assert_eq!(both, content_hash(b"abc", &[b.clone(), a.clone()]), "whatever the order");
    assert_ne!(both, alone);
    assert_ne!(both, content_hash(b"abc", &[a]));
    let b = [b];
    assert_ne!(content_hash(b"a", &b), content_hash(b"b", &b));
}

#[test]
fn values_of_a_message_win_and_never_hide_a_fault_of_the_text() {
    let over = |text: &[u8], overrides: &[(&str, Json)]| {
        let overrides = overrides.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        JobSpec::load_over(text, "job.yaml", &context(), &Overlay { overrides, task_id: None })
    };
    let resume = [("train.resume", json!("/r")), ("trial_number", json!(3))];
    let spec = over(b"model: yolov8n\ntype: yolo\ntrial_number: 2\ntrain: {data: d}\n", &resume)
        .expect("valid")
        .spec;
    let reasons: Vec<&str> = spec.overridden.iter().map(|note| note.reason.as_str()).collect();
    assert_eq!(reasons, ["the message gives it", "the message wins; the job said 2"]);
    assert_eq!(spec.effective["train"]["resume"], "/r");
    assert_eq!((spec.trial_number, spec.mode), (3, crate::job::spec::JobMode::Train));
    let said = |text: &[u8]| over(text, &resume).expect_err("no job").to_string();
    assert!(
        said(b"just a text").contains("got \"just a text\"; allowed: a mapping"),
        "{}",
        said(b"just a text")
    );
    let text = said(b"model: yolov8n\ntype: yolo\ntrain: 5\n");
    assert!(text.contains("job.yaml:3: key `train`: got 5; allowed: a mapping"), "{text}");
    let bad = over(JOB, &[("fitness", json!("metrics/none"))]).expect_err("no metric").to_string();
    assert!(bad.contains("job.yaml: key `fitness`: got \"metrics/none\"; allowed: one of"), "{bad}");
}

#[test]
fn limits_are_kept_and_said() {
    let stream = |fields: &[(&str, &[u8])]| {
        let fields: Vec<_> =
            fields.iter().map(|(name, value)| ((*name).to_owned(), value.to_vec())).collect();
        from_stream(&fields, &entry("q", "1-0", false), &mut Everything).expect_err("refused").to_string()
    };
    let large = vec![b'x'; MESSAGE_BYTES_MAX];
    assert!(stream(&[("config", &large)]).contains("the message has"), "{}", stream(&[("config", &large)]));
    let inline = vec![b'x'; CONFIG_BYTES_MAX + 1];
    assert!(stream(&[("config", &inline)]).contains("got a text of 1048577 bytes; allowed: at most 1048576"));
    let twice = stream(&[("config_path", b"a"), ("config_path", b"b")]);
    assert!(twice.contains("key `config_path`: is given twice"), "{twice}");
    let bytes = stream(&[("config_path", b"a\xff")]);
    assert!(bytes.contains("key `config_path`: is not UTF-8 at byte 1"), "{bytes}");
    let control = stream(&[("config_path", b"a\nb")]);
    assert!(
        control.contains("allowed: a text of at most 4096 bytes without control characters"),
        "{control}"
    );
    let names: Vec<String> = (0..FIELDS_MAX + 1).map(|number| format!("f{number}")).collect();
    let many: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), b"x".as_slice())).collect();
    assert!(stream(&many).contains("more than 64 fields"), "{}", stream(&many));
    struct Large;
    impl MessageFiles for Large {
        fn read_config(&mut self, _: &str) -> std::io::Result<Vec<u8>> {
            Ok(vec![b'x'; CONFIG_BYTES_MAX + 1])
        }
        fn weights(&mut self, _: &str) -> WeightsFound {
            WeightsFound::Missing
        }
    }
    let fields = [("config_path".to_owned(), b"a.yaml".to_vec())];
    let error = from_stream(&fields, &entry("q", "1-0", false), &mut Large).expect_err("refused");
    assert!(error.to_string().contains("with over 1048576 bytes") && !error.may_pass(), "{error}");
}

/// The JSON text of a payload inside another JSON text.
fn twice(payload: &Json) -> String {
    Json::String(payload.to_string()).to_string()
}

proptest! {
    #[test]
    fn no_payload_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        for kind in [ListKind::Training, ListKind::Recreate, ListKind::Evaluate] {
            let _ = from_list(kind, &bytes, &entry("q", "e", true), &mut Everything);
        }
    }

    #[test]
    fn no_json_panics(name in "[a-z_]{1,12}|task_id|config|config_path|trial_number|priority|requires_gpu|file|last_model",
                      value in "[ -~]{0,30}", raw in any::<bool>()) {
        let value = if raw { value } else { Json::from(value).to_string() };
        let payload = format!("{{{}: {value}}}", Json::from(name));
        for kind in [ListKind::Training, ListKind::Recreate, ListKind::Evaluate] {
            let _ = from_list(kind, payload.as_bytes(), &entry("q", "e", true), &mut Everything);
        }
    }

    #[test]
    fn no_fields_panic(fields in proptest::collection::vec(("\\PC{0,12}", proptest::collection::vec(any::<u8>(), 0..40)), 0..8),
                       config in proptest::collection::vec(any::<u8>(), 0..80)) {
        let mut fields = fields;
        fields.push(("config".into(), config));
        if let Ok(message) = from_stream(&fields, &entry("q", "1-0", false), &mut Everything) {
            let _ = JobSpec::load_over(&message.text, "q", &context(), &message.overlay());
            prop_assert_eq!(&message.content_sha256(), &content_hash(&message.text, &message.overrides));
        }
    }

    #[test]
    fn once_or_twice_encoded_is_the_same(id in "[A-Za-z0-9._-]{1,40}", path in "/[ -~]{1,40}[!-~]", user in "\\PC{1,20}",
                                         trial in 0i64..1_000_000) {
        prop_assume!(id != "." && id != ".." && !user.trim().is_empty());
        let payload = json!({ "task_id": id, "config_path": path, "user_code": user, "trial_number": trial });
        let read = |text: &str| from_list(ListKind::Training, text.as_bytes(), &entry("q", "e", true), &mut Everything);
        let (once, two) = (read(&payload.to_string()).expect("read"), read(&twice(&payload)).expect("read"));
        prop_assert_eq!(&once, &two);
        let value = |key: &str| once.overrides.iter().find(|(known, _)| known == key).map(|(_, value)| value.clone());
        prop_assert_eq!(value("task_id"), Some(Json::from(id.clone())));
        prop_assert_eq!(value("user_code"), Some(Json::from(user.trim())));
        prop_assert_eq!(value("trial_number"), Some(Json::from(trial)));
        let spec = load(&once);
        prop_assert_eq!((spec.task_id.as_str(), i64::from(spec.trial_number)), (id.as_str(), trial));
    }

    #[test]
    fn a_stream_says_the_same_as_a_list(trial in 0i64..1_000_000, gpu in any::<bool>(), priority in "high|medium|low") {
        let list = json!({ "config_path": "a.yaml", "trial_number": trial, "requires_gpu": gpu, "priority": priority });
        let fields: Vec<(String, Vec<u8>)> = list.as_object().expect("an object").iter()
            .map(|(name, value)| (name.clone(), value.as_str().map_or_else(|| value.to_string(), str::to_owned).into()))
            .collect();
        let list = from_list(ListKind::Training, list.to_string().as_bytes(), &entry("q", "e", true), &mut Everything);
        let stream = from_stream(&fields, &entry("q", "1-0", false), &mut Everything);
        let (list, stream) = (list.expect("read"), stream.expect("read"));
        prop_assert_eq!(&list.overrides, &stream.overrides);
        prop_assert_eq!(list.requires_gpu, Some(gpu));
    }

    #[test]
    fn paths_of_an_evaluation_come_through(data in "/\\PC{1,40}", model in "/\\PC{1,40}") {
        prop_assume!(!data.trim().is_empty() && data.trim() == data && model.trim() == model);
        prop_assume!(!data.chars().chain(model.chars()).any(char::is_control));
        let payload = json!({ "data_yaml": data, "model_path": model }).to_string();
        let message = from_list(ListKind::Evaluate, payload.as_bytes(), &entry("evaluate", "e", true), &mut Everything);
        let message = message.expect("read");
        let read = crate::yaml::parse(&message.text, "q").expect("JSON is YAML").to_json();
        prop_assert_eq!(read, json!({ "model": model, "type": "yolo", "train": { "mode": "val", "data": data } }));
    }
}
