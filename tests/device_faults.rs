//! What a user sees when the GPU fails: the program against a stand-in driver that is told to misbehave.

mod common;

use std::path::Path;
use std::process::{Command, Output};

use boxwright::data::synth::{SynthArgs, write_dataset};
use common::emulator::folder;

/// A job on four small images.
fn job(root: &Path) -> std::path::PathBuf {
    let data = root.join("tiny");
    let args = SynthArgs { images: 4, val_images: 2, imgsz: 64, seed: 3, ..SynthArgs::default() };
    write_dataset(&data, &args).expect("a dataset");
    let text = format!(
        "task_id: fault\ntype: yolo\nmodel: yolov8n\ntrain:\n  data: {}\n  epochs: 1\n  batch: 2\n  imgsz: 64\n  workers: 1\n  plots: false\n",
        data.display()
    );
    let path = root.join("fault.yaml");
    std::fs::write(&path, text).expect("writable");
    path
}

fn train(root: &Path, emulator: &str, device: &str) -> Output {
    let folder = folder();
    Command::new(env!("CARGO_BIN_EXE_boxwright"))
        .args(["train", "--device", device])
        .arg(job(root))
        .current_dir(root)
        .env("BOXWRIGHT_CUDA_DRIVER", &folder)
        .env("BOXWRIGHT_NVRTC", &folder)
        .env("BOXWRIGHT_KERNEL_CACHE", root.join("kernels"))
        .env("BOXWRIGHT_EMULATOR", emulator)
        .output()
        .expect("the program starts")
}

/// Exit code and everything that was printed.
fn said(output: &Output) -> (Option<i32>, String) {
    let text = [&output.stdout, &output.stderr].map(|b| String::from_utf8_lossy(b).into_owned()).concat();
    (output.status.code(), text)
}

#[test]
fn a_kernel_that_faults_fails_the_job_as_device_and_names_it() {
    let root = tempfile::tempdir().expect("a folder");
    let (code, text) = said(&train(root.path(), "fail_launch=400", "cuda"));
    assert_ne!(code, Some(0), "{text}");
    assert!(text.contains("GPU") && text.contains("launch"), "{text}");
}

#[test]
fn a_device_without_room_fails_the_job_as_memory_with_numbers() {
    let root = tempfile::tempdir().expect("a folder");
    let (code, text) = said(&train(root.path(), "memory_mib=40", "cuda"));
    assert_ne!(code, Some(0), "{text}");
    assert!(text.contains("MiB") || text.contains("bytes"), "{text}");
}

#[test]
fn an_old_chip_and_a_missing_one_are_refused_in_a_sentence() {
    let root = tempfile::tempdir().expect("a folder");
    let (code, text) = said(&train(root.path(), "chip=61", "cuda"));
    assert_ne!(code, Some(0), "{text}");
    assert!(text.contains("compute capability 6.1") && text.contains("7.5"), "{text}");
    let root = tempfile::tempdir().expect("a folder");
    let (code, text) = said(&train(root.path(), "chip=90", "cuda:5"));
    assert_ne!(code, Some(0), "{text}");
    assert!(text.contains("cuda:5"), "{text}");
}
