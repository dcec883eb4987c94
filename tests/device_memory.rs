//! What training holds on the device is what was counted beforehand. A program of its own, because the device's free
//! memory is one number for all tests of a process.

mod common;

use boxwright::detect::losses::detection::LossConfig;
use boxwright::detect::models::Detector;
use boxwright::engine::device::cuda::{Device, Precision};
use boxwright::engine::optim::{Algorithm, Ema, Hyper, Optimizer, groups};
use boxwright::engine::params::ParamSet;
use boxwright::engine::plan::{Mode, Plan};
use boxwright::train::args::{Batch, TrainArgs};
use boxwright::train::autobatch::AUTO_SHARE_GPU;
use boxwright::train::session::{Compute, Network, batch_on};
use common::emulator::device;

#[test]
fn bytes_held_are_those_counted_within_one_percent() {
    let device = device();
    for (precision, batch) in [(Precision::Bf16, 12), (Precision::F32, 5)] {
        let free = || device.memory().expect("the device answers").free_bytes as f64;
        let before = free();
        let compute = Compute::Cuda { device: device.clone(), precision };
        let mut network = Network::new("yolov8n", 3, LossConfig::new(3), &compute).expect("a shipped model");
        network.prepare(batch, 160, 128, Mode::Train).expect("room");
        network.prepare(2 * batch, 160, 128, Mode::Eval).expect("room");
        let tensors = network.params.tensors();
        let groups = groups::build(Algorithm::AdamW, &tensors, 0.01, 0.9, 5e-4, |_| false);
        let len = network.params.values.len();
        let optimizer = Optimizer::new(Algorithm::AdamW, Hyper::default(), tensors, groups, len);
        let ema = Ema::new(&network.params.values, &network.params.buffers, Ema::DECAY, Ema::TAU);
        network.push(&optimizer, &ema).expect("room");
        let used = before - free();
        let held = network.device_bytes() as f64;
        assert!((used / held - 1.0).abs() < 0.01, "{precision:?}: {used} bytes used, {held} counted");

        // Most of it is the arena, known from the plan alone before anything was allocated.
        let detector = Detector::build("yolov8n", 3, 160, 128).expect("a shipped model");
        let params = ParamSet::new(&detector.graph);
        let plan = |n, mode| {
            Plan::for_target(&detector.graph, &params, n, mode, &network.target()).bytes().total() as f64
        };
        let planned = plan(batch, Mode::Train).max(plan(2 * batch, Mode::Eval));
        assert!(planned < held && planned > 0.3 * held, "{planned} of {held}");
    }
    a_batch_asked_for_beforehand_fits_and_leaves_nothing_behind(&device);
}

fn a_batch_asked_for_beforehand_fits_and_leaves_nothing_behind(device: &std::sync::Arc<Device>) {
    let free = || device.memory().expect("the device answers").free_bytes;
    let compute = Compute::Cuda { device: device.clone(), precision: Precision::Bf16 };
    let ask = |batch| {
        let args = TrainArgs { model: "yolov8n".into(), imgsz: 64, batch, ..TrainArgs::default() };
        batch_on(&args, &compute, 3, (1 << 20, 8)).expect("room")
    };
    let before = free();
    let [four, eight] = [4, 8].map(|batch| ask(Batch::Images(batch)));
    assert_eq!((four.batch, eight.batch), (4, 8));
    assert!(four.bytes < eight.bytes, "{four:?} {eight:?}");
    let largest = ask(Batch::Auto);
    assert!(largest.batch > 8 && largest.bytes as f64 <= AUTO_SHARE_GPU * before as f64, "{largest:?}");
    let kept = before.saturating_sub(free());
    assert!(kept < 64 << 20, "{kept} bytes are not given back");
}
