//! Whole training sessions on the CUDA device (the emulator, where there is no GPU): the same bits twice and after a
//! stop, the same losses as on the CPU.

mod common;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use boxwright::data::synth::{SynthArgs, write_dataset};
use boxwright::train::args::{Amp, Batch, Device, OptimizerChoice, TrainArgs};
use boxwright::train::checkpoint::{Checkpoint, Store};
use boxwright::train::error::FailureClass;
use boxwright::train::event::{Command, Observer, OutcomeKind, SessionEvent};
use boxwright::train::session::{Outcome, Session, SessionSpec};
use common::emulator::device;

/// A dataset of five training and two validation images, made once.
fn dataset() -> &'static Path {
    static FOLDER: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = FOLDER.get_or_init(|| {
        let root = tempfile::tempdir().expect("a folder");
        let path = root.path().join("tiny");
        let args = SynthArgs { images: 5, val_images: 2, imgsz: 64, seed: 3, ..SynthArgs::default() };
        write_dataset(&path, &args).expect("a dataset");
        (root, path)
    });
    path
}

/// Six batches in two epochs, the last of each epoch smaller.
fn args(device: Device, amp: Amp) -> TrainArgs {
    TrainArgs {
        model: "yolov8n".into(),
        data: dataset().to_string_lossy().into_owned(),
        epochs: 2,
        batch: Batch::Images(2),
        nbs: 4,
        imgsz: 64,
        workers: 1,
        warmup_epochs: 1.0,
        close_mosaic: 1,
        plots: false,
        device,
        amp,
        ..TrainArgs::default()
    }
}

#[derive(Default)]
struct Watch {
    /// Mean losses after each batch.
    losses: Vec<[f64; 3]>,
    warnings: Vec<String>,
    stop_after: Option<usize>,
}

impl Observer for Watch {
    fn event(&mut self, event: &SessionEvent) {
        if let SessionEvent::Step { box_loss, cls_loss, dfl_loss, .. } = event {
            self.losses.push([*box_loss, *cls_loss, *dfl_loss]);
        }
        if let SessionEvent::Warning { message } = event {
            self.warnings.push(message.clone());
        }
    }

    fn command(&mut self) -> Command {
        match self.stop_after {
            Some(n) if self.losses.len() >= n => Command::Stop,
            _ => Command::Continue,
        }
    }
}

fn run(args: &TrainArgs, folder: &Path, watch: &mut Watch) -> Outcome {
    let spec = SessionSpec {
        threads: 2,
        checkpoint_interval_s: 3600,
        resume: true,
        ..SessionSpec::new(args.clone(), folder, "test")
    };
    Session::new(spec, watch).run().unwrap_or_else(|e| panic!("{}", e.chain()))
}

fn newest(folder: &Path) -> Checkpoint {
    Store::new(folder.join("state"), 2).newest().expect("readable").newest.expect("a checkpoint").1
}

#[track_caller]
fn assert_same_end(a: &Path, b: &Path) {
    for file in ["weights/last.safetensors", "weights/best.safetensors"] {
        let (x, y) = (std::fs::read(a.join(file)).expect(file), std::fs::read(b.join(file)).expect(file));
        assert!(x == y, "{file} differs");
    }
    let (x, y) = (newest(a), newest(b));
    let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(bits(&x.values) == bits(&y.values), "live parameters");
    assert!(bits(&x.ema_values) == bits(&y.ema_values), "averaged parameters");
    assert!(bits(&x.buffers) == bits(&y.buffers), "running statistics");
    assert!(x.optimizer == y.optimizer, "optimiser");
    assert_eq!((x.progress.step, x.progress.loss_scale), (y.progress.step, y.progress.loss_scale));
}

#[test]
fn a_stopped_and_resumed_run_ends_in_the_same_bits() {
    device();
    let args = args(Device::Cuda(0), Amp::On);
    let whole = tempfile::tempdir().expect("a folder");
    let outcome = run(&args, whole.path(), &mut Watch::default());
    assert_eq!((outcome.kind, outcome.epochs), (OutcomeKind::Completed, 2));
    // In the middle of an epoch, between two optimiser steps.
    let cut = tempfile::tempdir().expect("a folder");
    let outcome = run(&args, cut.path(), &mut Watch { stop_after: Some(4), ..Watch::default() });
    assert_eq!(outcome.kind, OutcomeKind::Stopped);
    let outcome = run(&args, cut.path(), &mut Watch::default());
    assert_eq!(outcome.kind, OutcomeKind::Completed);
    assert_same_end(whole.path(), cut.path());
}

#[test]
fn single_precision_follows_the_cpu() {
    device();
    let losses = |device| {
        let folder = tempfile::tempdir().expect("a folder");
        let mut watch = Watch::default();
        let outcome = run(&args(device, Amp::Off), folder.path(), &mut watch);
        assert_eq!(outcome.kind, OutcomeKind::Completed);
        watch.losses
    };
    let (cpu, gpu) = (losses(Device::Cpu), losses(Device::Cuda(0)));
    assert_eq!(cpu.len(), gpu.len());
    for (batch, (a, b)) in cpu.iter().zip(&gpu).enumerate() {
        // Rounding grows with every step that is taken on it.
        let rtol = 1e-5 * 4f64.powi(batch as i32);
        for (x, y) in a.iter().zip(b) {
            assert!(
                (x - y).abs() <= rtol * x.abs().max(1e-3),
                "batch {batch}: {x} on the CPU, {y} on the device"
            );
        }
    }
}

#[test]
fn a_loss_that_explodes_goes_back_once_and_then_fails_as_diverged() {
    device();
    let folder = tempfile::tempdir().expect("a folder");
    let args = TrainArgs {
        epochs: 40,
        optimizer: OptimizerChoice::Sgd,
        lr0: 1e20,
        warmup_epochs: 0.0,
        nbs: 2,
        val: false,
        ..args(Device::Cuda(0), Amp::On)
    };
    let mut watch = Watch::default();
    let spec = SessionSpec { threads: 2, ..SessionSpec::new(args, folder.path(), "test") };
    let error = Session::new(spec, &mut watch).run().expect_err("it diverges");
    assert_eq!(error.class(), FailureClass::Diverged, "{}", error.chain());
    let text = error.to_string();
    assert!(
        text.contains("learning rate") && text.contains("going back") || text.contains("went back"),
        "{text}"
    );
    assert!(watch.warnings.iter().any(|w| w.contains("going back to")), "{:?}", watch.warnings);
}
