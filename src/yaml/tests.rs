//! Places, limits and messages.

use proptest::prelude::*;

use super::*;

fn tree(text: &str) -> Node {
    parse(text.as_bytes(), "job.yaml").expect("the text is valid")
}

fn message(text: &[u8]) -> String {
    parse(text, "job.yaml").expect_err("the text is not valid").to_string()
}

#[test]
fn values_know_their_place() {
    let root =
        tree("# a comment\nmodel: yolov8n.pt\ntrain:\n  epochs: 3\n  lr0: 1e-5\n  names: [a, 'b', 3]\n");
    let train = root.get("train").expect("train");
    let epochs = train.get("epochs").expect("epochs");
    assert_eq!((epochs.line, epochs.column, epochs.as_int()), (4, 11, Some(3)));
    assert_eq!(train.get("lr0").and_then(Node::as_float), Some(1e-5));
    let names = train.get("names").and_then(Node::as_sequence).expect("a list");
    assert_eq!(
        names.iter().map(Node::as_text).collect::<Vec<_>>(),
        [Some("a".to_owned()), Some("b".to_owned()), Some("3".to_owned())]
    );
    assert_eq!(train.as_mapping().expect("a mapping")[1].line, 5);
}

#[test]
fn scalars_follow_the_core_schema_and_numbers_in_text_are_read_when_asked() {
    for (text, expected) in [
        ("~", Value::Null),
        ("True", Value::Bool(true)),
        ("no", Value::String("no".into())),
        ("0x10", Value::Int(16)),
        ("0o17", Value::Int(15)),
        ("-7", Value::Int(-7)),
        ("1.5e3", Value::Float(1500.0)),
        ("1e-5", Value::Float(1e-5)),
        ("-.inf", Value::Float(f64::NEG_INFINITY)),
        ("'12'", Value::String("12".into())),
        ("1.2.3", Value::String("1.2.3".into())),
        ("e5", Value::String("e5".into())),
        ("2024-01-02", Value::String("2024-01-02".into())),
        ("infinity", Value::String("infinity".into())),
        ("99999999999999999999", Value::Float(1e20)),
    ] {
        let root = parse(format!("k: {text}").as_bytes(), "f");
        assert_eq!(root.expect("valid").get("k").expect("k").value, expected, "{text}");
    }
    let quoted = tree("k: '1e-5'\nn: '16'\nf: 'yes'");
    assert_eq!(quoted.get("k").and_then(Node::as_float), Some(1e-5));
    assert_eq!(quoted.get("n").and_then(Node::as_int), Some(16));
    assert_eq!(quoted.get("f").and_then(Node::as_bool), Some(true));
    assert_eq!(tree("k: 1.5").get("k").and_then(Node::as_int), None);
}

#[test]
fn bad_files_are_named_with_line_and_reason() {
    assert_eq!(message(b""), "job.yaml: the file is empty");
    assert_eq!(message(b"  \n# only a comment\n"), "job.yaml: the file is empty");
    assert!(message(b"a: 1\nb: \x00\x01").contains("job.yaml:2: the file is binary (byte 0x00"), "binary");
    assert!(message(b"\x89PNG\r\n\x1a\n").contains("binary"), "an image");
    assert!(
        message(b"a: 1\nb: caf\xe9\n").contains("job.yaml:2: the text is not UTF-8 (byte 0xe9"),
        "latin-1"
    );
    assert_eq!(message(b"a: 1\nb: 2\na: 3\n"), "job.yaml:3: key `a` is given twice; it is already on line 1");
    assert!(message(b"a: [1, 2\nb: 3").contains("job.yaml:"), "half-written");
    assert!(message(b"a: 1\n---\nb: 2\n").contains("second document"), "two documents");
    assert!(message(b"a: *nothing\n").contains("job.yaml:1"), "unknown anchor");
    assert!(message(b"a: &a [*a]\n").contains("job.yaml:1"), "an alias in its own anchor");
    assert!(message(b"? [a, b]\n: 1\n").contains("a key must be plain text"), "a list as key");
    let big = vec![b'a'; (1 << 20) + 1];
    assert!(message(&big).contains("1048577 bytes; at most 1048576"), "size");
}

#[test]
fn alias_bombs_and_deep_nests_are_refused_cheaply() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let below = vec![format!("*a{}", level - 1); 10].join(", ");
        bomb.push_str(&format!("a{level}: &a{level} [{below}]\n"));
    }
    let started = std::time::Instant::now();
    assert!(message(bomb.as_bytes()).contains("aliases expand to too many values; at most 10000"));
    assert!(started.elapsed().as_secs() < 5, "refusing took {:?}", started.elapsed());
    let deep = format!("k: {}{}", "[".repeat(200), "]".repeat(200));
    assert!(message(deep.as_bytes()).contains("nested too deep"), "{}", message(deep.as_bytes()));
    let wide = format!("k: [{}]", "1,".repeat(200_000));
    assert!(message(wide.as_bytes()).contains("too many values"));
}

#[test]
fn anchors_and_merge_keys_work() {
    let root = tree("base: &base {epochs: 3, batch: 4}\ntrain:\n  <<: *base\n  epochs: 9\n");
    let train = root.get("train").expect("train");
    assert_eq!(train.get("epochs").and_then(Node::as_int), Some(9));
    assert_eq!(train.get("batch").and_then(Node::as_int), Some(4));
}

#[test]
fn all_faults_come_together_with_hints() {
    let root = tree("epohcs: 3\nbatch: abc\nmode: trian\n");
    let mut faults = Faults::new("job.yaml");
    let mut reader = MapReader::new(&root, "train", &mut faults).expect("a mapping");
    reader.get("epochs");
    reader.required("data", "the dataset", &mut faults);
    let batch = reader.get("batch").expect("batch");
    assert_eq!(faults.int(batch, "train.batch", 1, 1024), None);
    let mode = reader.get("mode").expect("mode");
    assert_eq!(faults.choice(mode, "train.mode", &["train", "val"]), None);
    reader.finish(&mut faults);
    let lines: Vec<String> = faults.to_string().lines().map(str::to_owned).collect();
    assert_eq!(
        lines,
        [
            "job.yaml:1: key `train.data`: missing; it gives the dataset",
            "job.yaml:2: key `train.batch`: got \"abc\"; allowed: a whole number from 1 to 1024",
            "job.yaml:3: key `train.mode`: got \"trian\"; allowed: one of train, val (did you mean `train`?)",
            "job.yaml:1: key `train.epohcs`: unknown key; did you mean `epochs`?",
        ]
    );
}

#[test]
fn numbers_outside_their_range_and_not_a_number_are_refused() {
    let root = tree("a: .nan\nb: .inf\nc: 1.5\nd: -1\n");
    let mut faults = Faults::new("f");
    for key in ["a", "b", "c", "d"] {
        assert_eq!(faults.float(root.get(key).expect("set"), key, 0.0, 1.0), None, "{key}");
    }
    assert_eq!(faults.list().len(), 4);
}

#[test]
fn nearest_word_is_near() {
    let keys = ["epochs", "erasing", "imgsz", "batch"];
    assert_eq!(nearest("epohcs", keys), Some("epochs"));
    assert_eq!(nearest("imgsize", keys), Some("imgsz"));
    assert_eq!(nearest("lr", keys), None);
    assert_eq!(nearest("something_else", keys), None);
}

#[test]
fn merging_is_deep_and_lists_are_replaced() {
    let base = tree("a: {x: 1, y: [1, 2]}\nb: 1\n");
    let top = tree("a: {y: [3]}\nc: 2\n");
    let merged = base.merged_with(&top);
    assert_eq!(merged.to_json(), serde_json::json!({"a": {"x": 1, "y": [3]}, "b": 1, "c": 2}));
    let mut root = tree("a: 1\n");
    root.set_path("train.epochs", Node::synthetic(Value::Int(3)));
    assert_eq!(root.to_json(), serde_json::json!({"a": 1, "train": {"epochs": 3}}));
}

proptest! {
    #[test]
    fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = parse(&bytes, "f");
    }

    #[test]
    fn no_yaml_like_text_panics(text in "[a-c:\\-\\[\\]{}&*,'\"\n >|!#?0-9.<]{0,120}") {
        let _ = parse(text.as_bytes(), "f");
    }
}
