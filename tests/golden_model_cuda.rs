//! The reduced YOLOv8 of the golden vectors on the CUDA device: the very kernels, run by the emulator where there is
//! no GPU, against the file and against the CPU.

mod common;

use boxwright::detect::losses::detection::LossItems;
use boxwright::detect::losses::detection_cuda::{DeviceDetectionLoss, DeviceHeadLevel, LossCapacity};
use boxwright::engine::device::cuda::Precision;
use boxwright::engine::device::cuda::executor::{DeviceParams, Executor};
use boxwright::engine::optim::{
    Algorithm, DeviceOptimizer, Ema, Hyper, LossScale, Optimizer, StepTargets, groups, squared_norm,
};
use boxwright::engine::params::{ParamSet, from_reference};
use boxwright::engine::plan::{Mode, Plan};
use common::emulator::device;
use common::tiny::{Tiny, nchw_to_nhwc, targets};
use common::tolerances::{
    BF16_GRADIENT_REL_L2, F16_GRADIENT_REL_L2, HALF_LOSS, HALF_OUTPUT_REL_L2, MODEL_FORWARD,
    MODEL_GRADIENT_FLOOR, MODEL_GRADIENT_REL_L2, MODEL_LOSS, OPTIMISER, RUNNING_STATISTICS,
};
use common::{assert_close, assert_rel_l2};

/// The model on the device.
struct OnDevice {
    tiny: Tiny,
    executor: Executor,
    params: DeviceParams,
    train: Plan,
    eval: Plan,
}

impl OnDevice {
    fn open(precision: Precision) -> OnDevice {
        let tiny = Tiny::open();
        let mut executor = Executor::new(&device(), precision).expect("kernels that load");
        let plan =
            |mode| Plan::for_target(&tiny.model.graph, &tiny.params, tiny.batch, mode, &executor.target());
        let (train, eval) = (plan(Mode::Train), plan(Mode::Eval));
        executor.reserve(&train).expect("a small plan");
        executor.reserve(&eval).expect("a small plan");
        let params = DeviceParams::new(executor.stream(), &tiny.params, precision).expect("memory");
        executor.upload_images(&train, &tiny.images).expect("a copy");
        OnDevice { tiny, executor, params, train, eval }
    }

    fn outputs(&self, plan: &Plan) -> Vec<Vec<f32>> {
        let read = |i: usize| {
            let mut out = vec![f32::NAN; plan.output_shape(i).iter().product()];
            self.executor.download_output(plan, i, &mut out).expect("a copy");
            out
        };
        (0..plan.output_count()).map(read).collect()
    }

    /// Output `2 * level + branch` of all levels as the reference joins them: `(n, channels, anchors)`.
    fn joined(&self, plan: &Plan, branch: usize) -> Vec<f32> {
        let outputs = self.outputs(plan);
        let mut joined = Vec::new();
        for image in 0..self.tiny.batch {
            for channel in 0..plan.output_shape(branch)[3] {
                for level in 0..self.tiny.model.strides.len() {
                    let i = 2 * level + branch;
                    let [_, h, w, c] = plan.output_shape(i);
                    let values = &outputs[i][image * h * w * c..(image + 1) * h * w * c];
                    joined.extend(values.iter().skip(channel).step_by(c));
                }
            }
        }
        joined
    }

    /// Forward, loss and backward on the device; the gradients come back into the parameters.
    fn step(&mut self) -> LossItems {
        let (executor, plan, graph) = (&self.executor, &self.train, &self.tiny.model.graph);
        let capacity = LossCapacity {
            max_batch: self.tiny.batch,
            max_anchors: self.tiny.model.anchor_count(),
            max_boxes: 1,
        };
        let (stream, config) = (executor.stream(), self.tiny.loss_config());
        let mut loss =
            DeviceDetectionLoss::new(stream, executor.precision(), config, capacity).expect("memory");
        executor.forward(graph, plan, &self.params).expect("launches");
        // SAFETY: one upload.
        unsafe { loss.upload_targets(stream, &targets(&self.tiny.golden), self.tiny.batch) }.expect("a copy");
        let levels: Vec<DeviceHeadLevel> = (self.tiny.model.strides.iter().enumerate())
            .map(|(level, &stride)| {
                let (boxes, box_gradient) = executor.output(plan, 2 * level);
                let (scores, score_gradient) = executor.output(plan, 2 * level + 1);
                DeviceHeadLevel {
                    stride: stride as u32,
                    boxes,
                    scores,
                    box_gradient: box_gradient.expect("a training plan"),
                    score_gradient: score_gradient.expect("a training plan"),
                }
            })
            .collect();
        // SAFETY: the views lie in the executor's arena.
        unsafe { loss.compute(stream, &levels, self.tiny.batch, 0) }.expect("launches");
        executor.backward(graph, plan, &self.params).expect("launches");
        let items = loss.read(stream).expect("a copy");
        self.params.download(stream, &mut self.tiny.params).expect("a copy");
        LossItems { box_: items.box_, cls: items.cls, dfl: items.dfl, total: items.total }
    }
}

#[test]
fn golden_model_forward_on_the_device() {
    let mut f = OnDevice::open(Precision::F32);
    f.executor.forward(&f.tiny.model.graph, &f.train, &f.params).expect("launches");
    for (i, &feature) in f.tiny.model.features.iter().enumerate() {
        let name = format!("train.feat{i}");
        let expected = nchw_to_nhwc(&f.tiny.golden.shape(&name), &f.tiny.golden.f32(&name));
        assert_close(&name, &f.executor.read(&f.train, feature).expect("a copy"), &expected, MODEL_FORWARD);
    }
    assert_close("train.boxes", &f.joined(&f.train, 0), &f.tiny.golden.f32("train.boxes"), MODEL_FORWARD);
    assert_close("train.scores", &f.joined(&f.train, 1), &f.tiny.golden.f32("train.scores"), MODEL_FORWARD);
    f.params.download(f.executor.stream(), &mut f.tiny.params).expect("a copy");
    for array in f.tiny.golden.with_prefix("bn_after.") {
        let target = &array["bn_after.".len()..];
        if !target.ends_with("num_batches_tracked") {
            let (_, got) = f.tiny.params.export(target).expect("a statistic of the model");
            assert_close(&array, &got, &f.tiny.golden.f32(&array), RUNNING_STATISTICS);
        }
    }
}

#[test]
fn golden_model_evaluation_on_the_device() {
    let f = OnDevice::open(Precision::F32);
    f.executor.forward(&f.tiny.model.graph, &f.eval, &f.params).expect("launches");
    let nc = f.tiny.model.nc;
    let anchors = f.tiny.golden.shape("eval.y")[2];
    let probabilities: Vec<f32> = f.joined(&f.eval, 1).iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
    let expected = f.tiny.golden.f32("eval.y");
    for image in 0..f.tiny.batch {
        let got = &probabilities[image * nc * anchors..(image + 1) * nc * anchors];
        let want = &expected[(image * (4 + nc) + 4) * anchors..(image + 1) * (4 + nc) * anchors];
        assert_close("eval.y scores", got, want, MODEL_FORWARD);
    }
}

/// Every gradient of the file against those in `params`; the number of tensors looked at.
fn check_gradients(tiny: &Tiny, params: &ParamSet, rel_l2: f64) -> usize {
    let norm = squared_norm(&params.grads).sqrt();
    let mut checked = 0;
    for array in tiny.golden.with_prefix("grad.").iter().filter(|a| !a.contains(".dfl.")) {
        let (_, got) = params.export_grad(&array["grad.".len()..]).expect("a parameter of the model");
        assert_rel_l2(array, &got, &tiny.golden.f32(array), rel_l2, MODEL_GRADIENT_FLOOR * norm);
        checked += 1;
    }
    checked
}

#[test]
fn golden_model_loss_and_every_gradient_on_the_device() {
    let mut f = OnDevice::open(Precision::F32);
    let items = f.step();
    let golden = &f.tiny.golden;
    assert_close("loss.items", &[items.box_, items.cls, items.dfl], &golden.f32("loss.items"), MODEL_LOSS);
    assert_close("loss.total", &[items.total], &golden.f32("loss.total"), MODEL_LOSS);
    let checked = check_gradients(&f.tiny, &f.tiny.params, MODEL_GRADIENT_REL_L2);
    assert_eq!(checked, f.tiny.params.tensors().len(), "every trainable tensor has a gradient in the file");
}

#[test]
fn golden_model_in_sixteen_bits_stays_near() {
    for precision in [Precision::Bf16, Precision::F16] {
        let mut f = OnDevice::open(precision);
        let name = |what: &str| format!("{what} in {}", precision.suffix());
        // The outputs give their memory back during the backward pass, so they are looked at before it.
        f.executor.forward(&f.tiny.model.graph, &f.train, &f.params).expect("launches");
        for (branch, array) in ["train.boxes", "train.scores"].into_iter().enumerate() {
            let expected = f.tiny.golden.f32(array);
            assert_rel_l2(&name(array), &f.joined(&f.train, branch), &expected, HALF_OUTPUT_REL_L2, 0.0);
        }
        let items = f.step();
        let golden = &f.tiny.golden;
        let got = [items.box_, items.cls, items.dfl];
        assert_close(&name("loss.items"), &got, &golden.f32("loss.items"), HALF_LOSS);
        let mut all = (Vec::new(), Vec::new());
        for array in golden.with_prefix("grad.").iter().filter(|a| !a.contains(".dfl.")) {
            all.0.extend(f.tiny.params.export_grad(&array["grad.".len()..]).expect("a parameter").1);
            all.1.extend(golden.f32(array));
        }
        let allowed = if precision == Precision::F16 { F16_GRADIENT_REL_L2 } else { BF16_GRADIENT_REL_L2 };
        assert_rel_l2(&name("all gradients"), &all.0, &all.1, allowed, 0.0);
    }
}

#[test]
fn a_step_on_the_device_has_the_same_bits_again() {
    for precision in [Precision::F32, Precision::Bf16] {
        let bits = |mut f: OnDevice| {
            let items = f.step();
            (items.total.to_bits(), f.tiny.params.grads.iter().map(|g| g.to_bits()).collect::<Vec<_>>())
        };
        assert!(bits(OnDevice::open(precision)) == bits(OnDevice::open(precision)), "{precision:?}");
    }
}

#[test]
fn golden_model_one_optimiser_step_on_the_device() {
    for (prefix, algorithm) in [("sgd1.", Algorithm::Sgd), ("adamw1.", Algorithm::AdamW)] {
        let mut f = OnDevice::open(Precision::F32);
        let settings = f.tiny.golden.meta("optimizer").clone();
        let number = |key: &str| settings[key].as_f64().expect("a number");
        for array in f.tiny.golden.with_prefix("grad.").iter().filter(|a| !a.contains(".dfl.")) {
            let i = f.tiny.params.index(&array["grad.".len()..]).expect("a parameter of the model");
            let range = f.tiny.params.infos[i].range.clone();
            let stored = from_reference(&f.tiny.params.infos[i].kind, &f.tiny.golden.f32(array));
            f.tiny.params.grads[range].copy_from_slice(&stored);
        }
        let sgd = algorithm == Algorithm::Sgd;
        let (lr, momentum) =
            if sgd { (number("sgd_lr"), number("sgd_momentum")) } else { (number("adamw_lr"), 0.0) };
        let hyper = Hyper { beta1: number("adamw_beta1"), ..Hyper::default() };
        let tensors = f.tiny.params.tensors();
        let groups = groups::build(algorithm, &tensors, lr, momentum, number("weight_decay"), |_| false);
        let mut optimizer = Optimizer::new(algorithm, hyper, tensors, groups, f.tiny.params.values.len());
        let mut ema = Ema::new(&f.tiny.params.values, &f.tiny.params.buffers, Ema::DECAY, Ema::TAU);
        let stream = f.executor.stream();
        f.params.upload(stream, &f.tiny.params).expect("a copy");
        let mut on_device = DeviceOptimizer::new(stream, &optimizer, &ema).expect("memory");
        let targets = StepTargets {
            values: f.params.values.pointer(),
            grads: f.params.grads.pointer(),
            buffers: f.params.buffers.pointer(),
            copy: 0,
            precision: Precision::F32,
            scale: 0,
        };
        // SAFETY: one upload; the addresses are those of the parameters.
        unsafe {
            let growth = LossScale::GROWTH_INTERVAL;
            on_device.upload_step(stream, &optimizer, &ema, number("clip"), growth).expect("a copy");
            on_device.step(stream, &targets).expect("launches");
        }
        let result = on_device.read(stream).expect("a copy");
        assert_rel_l2("grad_norm", &[result.norm as f32], &f.tiny.golden.f32("grad_norm"), 1e-5, 0.0);
        DeviceOptimizer::commit(&result, &mut optimizer, &mut ema);
        f.params.download(stream, &mut f.tiny.params).expect("a copy");
        assert!(f.tiny.params.grads.iter().all(|g| *g == 0.0), "gradients are cleared");
        for array in f.tiny.golden.with_prefix(prefix).iter().filter(|a| !a.contains(".dfl.")) {
            let (_, got) = f.tiny.params.export(&array[prefix.len()..]).expect("a parameter of the model");
            let expected = f.tiny.golden.f32(array);
            assert_close(array, &got[..expected.len()], &expected, OPTIMISER);
        }
    }
}
