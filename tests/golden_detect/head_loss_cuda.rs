//! The device's loss and detections on the stored head outputs of the reduced YOLOv8.

use boxwright::detect::decode::detect;
use boxwright::detect::losses::detection_cuda::{DeviceDetectionLoss, DeviceHeadLevel, LossCapacity};
use boxwright::detect::nms::NmsArgs;
use boxwright::detect::nms_cuda::{DeviceNms, NmsCapacity};
use boxwright::engine::device::cuda::{Buffer, Precision, Stream, Tensor};
use boxwright::engine::tensor::View;

use crate::common::tolerances::LOSS;
use crate::common::{Golden, assert_close, emulator};
use crate::head_loss::{Head, config, targets};

/// The head's outputs on the device, with room for gradients; the buffers keep the tensors alive.
fn upload(head: &Head, stream: &Stream) -> (Vec<DeviceHeadLevel>, Vec<Buffer>) {
    let mut buffers = Vec::new();
    let mut send = |numbers: &[f32], h: usize, w: usize, c: usize| {
        let buffer = stream.device().allocate(numbers.len() * 4).expect("memory");
        stream.upload(&buffer, 0, numbers).expect("a copy");
        // SAFETY: the view is that of the buffer, which the caller keeps.
        let tensor = unsafe { Tensor::new(buffer.pointer(), 4, &View::new(0, head.n, h, w, c, 0)) };
        buffers.push(buffer);
        tensor
    };
    let levels = (head.grids.iter().enumerate())
        .map(|(l, &(stride, h, w))| DeviceHeadLevel {
            stride: stride as u32,
            boxes: send(&head.boxes[l], h, w, 4 * head.reg_max),
            scores: send(&head.scores[l], h, w, head.nc),
            box_gradient: send(&head.boxes[l], h, w, 4 * head.reg_max),
            score_gradient: send(&head.scores[l], h, w, head.nc),
        })
        .collect();
    (levels, buffers)
}

#[test]
fn golden_head_loss_items_on_the_device() {
    let golden = Golden::open("yolov8_tiny");
    let (head, targets) = (Head::read(&golden), targets(&golden));
    let stream = emulator::device().stream().expect("a stream");
    let (levels, _buffers) = upload(&head, &stream);
    let anchors = head.grids.iter().map(|g| g.1 * g.2).sum();
    let capacity = LossCapacity { max_batch: head.n, max_anchors: anchors, max_boxes: targets.len() };
    let mut loss =
        DeviceDetectionLoss::new(&stream, Precision::F32, config(&golden), capacity).expect("it loads");
    // SAFETY: one upload; all tensors live to the end.
    unsafe {
        loss.upload_targets(&stream, &targets, head.n).expect("a copy");
        loss.compute(&stream, &levels, head.n, 0).expect("launches");
    }
    let items = loss.read(&stream).expect("a copy");
    assert_close("loss.items", &[items.box_, items.cls, items.dfl], &golden.f32("loss.items"), LOSS);
    assert_close("loss.total", &[items.total], &golden.f32("loss.total"), LOSS);
}

#[test]
fn golden_detections_on_the_device_are_those_of_the_cpu() {
    let golden = Golden::open("yolov8_tiny");
    let head = Head::read(&golden);
    let stream = emulator::device().stream().expect("a stream");
    let (levels, _buffers) = upload(&head, &stream);
    let max_anchors = head.grids.iter().map(|g| g.1 * g.2).sum();
    let capacity = NmsCapacity { max_batch: head.n, max_anchors, nc: head.nc, reg_max: head.reg_max };
    for args in [NmsArgs::validation(), NmsArgs::prediction()] {
        let nms = DeviceNms::new(&stream, args.clone(), capacity).expect("it loads");
        // SAFETY: all tensors live to the end.
        unsafe { nms.detect(&stream, &levels, head.n) }.expect("launches");
        let found = nms.read(&stream, head.n).expect("a copy");
        assert_eq!(found, detect(&head.levels(), head.nc, head.reg_max, head.n, &args));
    }
}
