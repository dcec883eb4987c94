//! What a user of the program sees of a GPU: `doctor`, the choice of the device, the batch that fits its memory.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use boxwright::data::synth::{SynthArgs, write_dataset};
use common::emulator::folder;
use serde_json::Value as Json;

/// The program in `root` with the driver and compiler of `libraries`.
fn program(root: &Path, libraries: &Path, emulator: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_boxwright"));
    command
        .current_dir(root)
        .env("BOXWRIGHT_CUDA_DRIVER", libraries)
        .env("BOXWRIGHT_NVRTC", libraries)
        .env("BOXWRIGHT_KERNEL_CACHE", root.join("kernels"))
        .env("BOXWRIGHT_EMULATOR", emulator);
    command
}

/// Everything that was printed.
fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|b| String::from_utf8_lossy(b).into_owned()).concat()
}

/// `doctor` in words, and the data of its check `graphics`.
fn doctor(libraries: &Path, emulator: &str) -> (String, Json) {
    let root = tempfile::tempdir().expect("a folder");
    let words = program(root.path(), libraries, emulator).arg("doctor").output().expect("it starts");
    assert!(words.status.success(), "no GPU is no fault: {}", text(&words));
    let json =
        program(root.path(), libraries, emulator).args(["doctor", "--json"]).output().expect("it starts");
    let json: Json = serde_json::from_slice(&json.stdout).expect("JSON");
    let checks = json["checks"].as_array().expect("a list").clone();
    let graphics = checks.into_iter().find(|check| check["name"] == "graphics").expect("it is there");
    (text(&words), graphics)
}

#[test]
fn doctor_says_in_a_sentence_that_there_is_no_driver() {
    let empty = tempfile::tempdir().expect("a folder");
    let (words, graphics) = doctor(empty.path(), "");
    assert!(words.contains("no NVIDIA driver (libcuda) on this machine"), "{words}");
    assert!(words.contains("training on the CPU"), "{words}");
    assert_eq!(graphics["verdict"], "note");
    assert_eq!(graphics["data"]["usable"], false);
    assert!(graphics["data"]["driver_cuda_version"].is_null());
    assert_eq!(graphics["data"]["devices"], serde_json::json!([]));
}

#[test]
fn doctor_shows_each_gpu_its_memory_the_compiler_and_the_cache() {
    let (words, graphics) = doctor(&folder(), "chip=90,memory_mib=512;chip=75");
    for part in ["cuda:0 CPU emulation", "compute capability 9.0", "cuda:1 ", "NVRTC", "kernels: empty"] {
        assert!(words.contains(part), "{part:?} is not in\n{words}");
    }
    assert_eq!(graphics["verdict"], "ok");
    let data = &graphics["data"];
    assert!(data["obstacle"].is_null() && data["usable"] == true, "{data}");
    assert_eq!(data["kernel_cache"]["files"], 0);
    let device = &data["devices"][0];
    assert_eq!(
        (device["device"].as_str(), device["compute_capability"].as_str()),
        (Some("cuda:0"), Some("9.0"))
    );
    let bytes = |key: &str| device[key].as_u64().expect("a number");
    assert_eq!(bytes("memory_total_bytes"), 512 << 20);
    assert!(bytes("memory_free_bytes") <= bytes("memory_total_bytes"));
    assert_eq!(data["devices"].as_array().map(Vec::len), Some(2));
}

#[test]
fn doctor_names_a_chip_that_is_too_old() {
    let (words, graphics) = doctor(&folder(), "chip=61");
    assert!(words.contains("compute capability 6.1; 7.5 or later is needed"), "{words}");
    assert_eq!(graphics["data"]["usable"], false);
    let (words, graphics) = doctor(&folder(), "chip=61;chip=80");
    assert!(words.contains("training on cuda:1"), "{words}");
    assert_eq!(graphics["data"]["usable"], true);
}

/// A dataset of four images of 64 pixels.
fn dataset(root: &Path) -> PathBuf {
    let data = root.join("tiny");
    let args = SynthArgs { images: 4, val_images: 1, imgsz: 64, seed: 3, ..SynthArgs::default() };
    write_dataset(&data, &args).expect("a dataset");
    data
}

/// Trains one epoch with this batch on a GPU with so much memory.
fn train(root: &Path, memory_mib: u64, keys: &[&str]) -> Output {
    let data = format!("data={}", root.join("tiny").display());
    program(root, &folder(), &format!("chip=90,memory_mib={memory_mib}"))
        .args(["train", "--device", "cuda", "model=yolov8n", &data, "epochs=1", "imgsz=64", "workers=1"])
        .args(["plots=false", "amp=false", "optimizer=SGD", "multi_scale=0", "mosaic=0"])
        .args(keys)
        .output()
        .expect("it starts")
}

/// MiB needed, MiB available and the largest batch of a refusal.
fn figures(output: &Output) -> (u64, u64, u64) {
    let text = text(output);
    assert!(!output.status.success(), "{text}");
    let line = text.lines().find(|line| line.contains("are available")).unwrap_or_else(|| panic!("{text}"));
    let number = |before: &str| {
        let at = line.find(before).unwrap_or_else(|| panic!("{line}")) + before.len();
        let digits: String = line[at..].chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().unwrap_or_else(|_| panic!("{line}"))
    };
    (number("needs "), number("MiB, "), number("that fits is "))
}

#[test]
fn a_batch_that_does_not_fit_is_refused_with_figures_or_cut() {
    let root = tempfile::tempdir().expect("a folder");
    dataset(root.path());
    let memory = 140;
    let (four, available, largest) = figures(&train(root.path(), memory, &["batch=4"]));
    let (two, ..) = figures(&train(root.path(), memory, &["batch=2"]));
    assert!(largest < 4 && two < four && four > available, "{two} {four} {available} {largest}");
    // Between what two and what four images need.
    let enough = memory - available + (two + four) / 2;
    let refused = figures(&train(root.path(), enough, &["batch=4"]));
    assert!((2..4).contains(&refused.2), "{refused:?}");
    let cut = train(root.path(), enough, &["batch=4", "batch_policy=accumulate"]);
    assert!(cut.status.success(), "{}", text(&cut));
    assert!(text(&cut).contains("2 passes of 2 images"), "{}", text(&cut));
    // A share of what is free, here far too small.
    let (_, share, largest) = figures(&train(root.path(), 400, &["batch=0.01"]));
    assert!((1..=4).contains(&share) && largest == 0, "{share} {largest}");
}
