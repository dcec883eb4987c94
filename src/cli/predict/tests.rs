//! Prediction from weights written for the purpose to files.

use super::*;
use crate::detect::models::Detector;
use crate::engine::params::ParamSet;
use crate::train::session::Compute;
use crate::train::weights_file::{Metadata, write};
use clap::Parser;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: Args,
}

fn parsed(line: &[&str]) -> Result<Args, clap::Error> {
    Line::try_parse_from([&["predict"], line].concat()).map(|l| l.args)
}

/// A network whose every cell says class 1 with probability 1/2.
fn weights(folder: &Path) -> PathBuf {
    let detector = Detector::build("yolov8n", 2, 64, 64).expect("a shipped model");
    let mut params = ParamSet::new(&detector.graph);
    for level in 0..3 {
        let index = params.index(&format!("model.22.cv3.{level}.2.bias")).expect("a class bias");
        params.numbers_mut(index).copy_from_slice(&[-20.0, 0.0]);
    }
    let path = folder.join("w.safetensors");
    let names = r#"["one","two"]"#.to_owned();
    let metadata = Metadata::from([("names".into(), names), ("imgsz".into(), "64".into())]);
    write(&path, &detector, &params, &params.values, &params.buffers, &metadata).expect("written");
    path
}

#[test]
fn images_of_a_folder_become_json_drawn_images_and_labels() {
    let folder = tempfile::tempdir().expect("a folder");
    let images = folder.path().join("in/deeper");
    std::fs::create_dir_all(&images).expect("created");
    RgbImage::new(120, 60).save(images.join("a.png")).expect("saved");
    RgbImage::new(50, 90).save(folder.path().join("in/a.jpg")).expect("saved");
    std::fs::write(folder.path().join("in/broken.png"), b"no image").expect("written");
    let weights = weights(folder.path());
    let out = folder.path().join("out");
    let text = |p: &Path| p.to_string_lossy().into_owned();
    let line =
        [&text(&weights), &text(&folder.path().join("in")), "--out", &text(&out), "--json", "--save-txt"];
    let args = parsed(&line).expect("valid");
    let mut printed = Vec::new();
    let code = execute(&args, &mut printed).expect("predicted");
    assert_eq!(code, ExitCode::FAILURE, "one image is broken");
    let printed = String::from_utf8(printed).expect("text");
    let rows: Vec<serde_json::Value> =
        printed.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    assert_eq!(rows.len(), 3);
    assert_eq!((&rows[0]["width"], &rows[0]["height"]), (&50.into(), &90.into()));
    assert!(rows[1]["error"].as_str().is_some_and(|e| e.contains("broken.png")));
    let first = &rows[0]["detections"][0];
    assert_eq!((&first["class"], &first["name"], &first["score"]), (&1.into(), &"two".into(), &0.5.into()));
    let corner = first["xyxy"][2].as_f64().expect("a number");
    assert!((0.0..=50.0).contains(&corner));
    // Two images of one name: both are drawn.
    assert!(out.join("a.jpg").is_file() && out.join("a-2.png").is_file());
    assert_eq!(image::open(out.join("a-2.png")).expect("an image").width(), 120);
    let labels = std::fs::read_to_string(out.join("labels/a.txt")).expect("labels");
    assert!(labels.lines().all(|l| l.starts_with("1 ") && l.split(' ').count() == 5));
    let all: Vec<serde_json::Value> =
        serde_json::from_slice(&std::fs::read(out.join("predictions.json")).expect("read")).expect("JSON");
    assert_eq!(all, rows);
}

#[test]
fn a_weights_file_that_says_nothing_about_itself_is_recognised_by_its_arrays() {
    let folder = tempfile::tempdir().expect("a folder");
    let weights = weights(folder.path());
    let mut arrays = crate::detect::weights::safetensors::read_file(&weights).expect("readable");
    arrays.metadata.clear();
    let silent = folder.path().join("best.safetensors");
    crate::detect::weights::safetensors::write_file(&silent, &arrays).expect("written");
    let mut predictor =
        Predictor::open(&silent, Some(64), NmsArgs::prediction(), &Compute::Cpu { threads: 1 })
            .expect("recognised");
    assert_eq!(predictor.names(), ["class_0", "class_1"]);
    let image = Image::filled(40, 80, [9, 9, 9]);
    let found = predictor.predict(&image).expect("predicted");
    assert!(!found.is_empty() && found.iter().all(|d| d.class == 1 && d.xyxy[2] <= 80.0));
    arrays.tensors.remove("model.5.conv.weight");
    crate::detect::weights::safetensors::write_file(&silent, &arrays).expect("written");
    assert!(Predictor::open(&silent, None, NmsArgs::prediction(), &Compute::Cpu { threads: 1 }).is_err());
}

#[test]
fn wrong_requests_end_with_code_two_and_a_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let weights = weights(folder.path()).to_string_lossy().into_owned();
    let here = folder.path().to_string_lossy().into_owned();
    let (full, image) = (tempfile::tempdir().expect("a folder"), RgbImage::new(8, 8));
    let image_path = full.path().join("a.png");
    image.save(&image_path).expect("saved");
    let image_path = image_path.to_string_lossy();
    for (line, reason) in [
        (vec![weights.as_str(), "nowhere"], "source nowhere does not exist"),
        (vec![weights.as_str(), here.as_str()], "no image in"),
        (vec![weights.as_str(), &image_path, "--classes", "0,2"], "class 2 does not exist"),
    ] {
        let error = execute(&parsed(&line).expect("valid"), &mut Vec::new()).expect_err("refused");
        assert!(error.to_string().contains(reason), "{error}");
        assert_eq!(CliError::from(error).exit_code(), 2);
    }
    for bad in [["--conf", "1.5"], ["--iou", "nan"], ["--max-det", "0"], ["--imgsz", "9000"]] {
        assert!(parsed(&[weights.as_str(), "x", bad[0], bad[1]]).is_err(), "{bad:?}");
    }
}

#[test]
fn no_file_that_was_given_is_overwritten() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    let text = |name: &str| at(name).to_string_lossy().into_owned();
    let weights = weights(folder.path()).to_string_lossy().into_owned();
    std::fs::create_dir_all(at("set/images")).expect("created");
    std::fs::create_dir_all(at("set/labels")).expect("created");
    RgbImage::new(60, 40).save(at("set/images/a.png")).expect("saved");
    std::fs::write(at("set/labels/a.txt"), "0 0.5 0.5 0.1 0.1\n").expect("written");
    std::fs::create_dir(at("links")).expect("created");
    std::os::unix::fs::symlink(at("set/images/a.png"), at("links/a.png")).expect("linked");
    let before = std::fs::read(at("set/images/a.png")).expect("read");
    let image = text("set/images/a.png");
    let cases = [
        (vec![text("set/images"), "--out".into(), text("set/images")], "set/images/a.png"),
        (vec![image.clone(), "--out".into(), text("set/labels/../images")], "a.png"),
        (vec![image.clone(), "--out".into(), text("links")], "links/a.png"),
        (
            vec![image.clone(), "--no-draw".into(), "--save-txt".into(), "--out".into(), text("set")],
            "labels/a.txt",
        ),
    ];
    for (rest, named) in &cases {
        let line: Vec<&str> = std::iter::once(&weights).chain(rest).map(String::as_str).collect();
        let error = execute(&parsed(&line).expect("valid"), &mut Vec::new()).expect_err("refused");
        assert!(error.to_string().contains(named), "{error}");
        assert_eq!(CliError::from(error).exit_code(), 2);
    }
    assert_eq!(std::fs::read(at("set/images/a.png")).expect("read"), before);
    assert_eq!(std::fs::read_to_string(at("set/labels/a.txt")).expect("read"), "0 0.5 0.5 0.1 0.1\n");
    assert!(!at("set/images/predictions.json").exists(), "nothing was written");
    // A folder that holds the results of an earlier call is used again.
    for _ in 0..2 {
        let line = [weights.as_str(), &image, "--out", &text("out")];
        execute(&parsed(&line).expect("valid"), &mut Vec::new()).expect("predicted");
    }
}

#[test]
fn names_that_are_no_text_stand_in_the_results_all_the_same() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().expect("a folder");
    let weights = weights(folder.path()).to_string_lossy().into_owned();
    let images = folder.path().join("in");
    std::fs::create_dir(&images).expect("created");
    let name = std::ffi::OsStr::from_bytes(b"a\xff.png");
    RgbImage::new(60, 40).save_with_format(images.join(name), image::ImageFormat::Png).expect("saved");
    let out = folder.path().join("out");
    let (images, out) = (images.to_string_lossy(), out.to_string_lossy());
    let line = [weights.as_str(), &images, "--json", "--out", &out];
    let mut printed = Vec::new();
    execute(&parsed(&line).expect("valid"), &mut printed).expect("predicted");
    let row: serde_json::Value = serde_json::from_slice(&printed).expect("JSON");
    assert!(row["path"].as_str().is_some_and(|path| path.ends_with("in/a\u{fffd}.png")), "{row}");
}
