//! Measured cuts from the clock to the numbers of a small network.

use std::sync::Arc;

use super::executor::{DeviceParams, Executor};
use super::{Device, DeviceError, Precision, testing, tuner};
use crate::engine::activation::Activation;
use crate::engine::graph::{Graph, InputKind};
use crate::engine::ops::conv2d::cuda::{self as conv, Clock, Limits, MmaConfig, Subject, Tuning};
use crate::engine::params::ParamSet;
use crate::engine::plan::{Mode, Plan};
use crate::engine::rng::{Rng, Use};

const PRECISION: Precision = Precision::Bf16;

/// Three convolutions: of two strides, two sizes of kernel, and one with a bias.
fn network() -> (Graph, ParamSet) {
    let (mut graph, x) = Graph::new(12, 12, 16, InputKind::Float);
    let x = graph.conv_bn_act("a", x, 32, 3, 2, Activation::Silu);
    let x = graph.conv_bn_act("b", x, 32, 3, 1, Activation::Silu);
    let x = graph.conv_bias("c", x, 16);
    graph.output(x);
    let mut params = ParamSet::new(&graph);
    let mut rng = Rng::new(1, Use::Test, 0, 0);
    for value in &mut params.values {
        *value = rng.range(-0.3, 0.3) as f32;
    }
    (graph, params)
}

/// Finds the last candidate the fastest.
struct LastIsFastest;

impl Clock for LastIsFastest {
    fn time(&mut self, _: &Subject, configs: &[MmaConfig]) -> Result<Vec<f64>, DeviceError> {
        Ok((0..configs.len()).map(|i| 100.0 - 10.0 * i as f64).collect())
    }
}

fn last_of_each(device: &Arc<Device>) -> Tuning {
    let (graph, params) = network();
    let executor = Executor::new(device, PRECISION).expect("kernels");
    let plan = Plan::for_target(&graph, &params, 2, Mode::Train, &executor.target());
    let subjects = tuner::subjects(device, PRECISION, &graph, &plan);
    let (known, limits) = (Tuning::default(), Limits::default());
    conv::measure(&subjects, &known, device.chip(), PRECISION, &limits, &mut LastIsFastest).expect("no fault")
}

/// Output and gradients of one step, cut as `tuning` says.
fn step(device: &Arc<Device>, tuning: &Tuning) -> (Vec<f32>, Vec<f32>) {
    let (graph, mut params) = network();
    let mut executor = Executor::new(device, PRECISION).expect("kernels");
    executor.set_tuning(Arc::new(tuning.clone()));
    let plan = Plan::for_target(&graph, &params, 2, Mode::Train, &executor.target());
    executor.reserve(&plan).expect("memory");
    let on_device = DeviceParams::new(executor.stream(), &params, PRECISION).expect("memory");
    let mut rng = Rng::new(2, Use::Test, 0, 0);
    let mut numbers = |len: usize| (0..len).map(|_| rng.range(-1.0, 1.0) as f32).collect::<Vec<f32>>();
    executor.upload_floats(&plan, &numbers(plan.bytes().input / 4)).expect("a copy");
    executor.forward(&graph, &plan, &on_device).expect("launches");
    let mut output = vec![f32::NAN; plan.output_shape(0).iter().product()];
    executor.download_output(&plan, 0, &mut output).expect("a copy");
    executor.upload_output_grad(&plan, 0, &numbers(output.len())).expect("a copy");
    executor.backward(&graph, &plan, &on_device).expect("launches");
    executor.stream().synchronize().expect("no fault");
    on_device.download(executor.stream(), &mut params).expect("a copy");
    (output, params.grads)
}

fn relative(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: f32| f64::from(v) * f64::from(v);
    let difference: f64 = a.iter().zip(b).map(|(x, y)| square(x - y)).sum();
    (difference / a.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn a_measured_plan_agrees_with_the_models_and_repeats_its_bits() {
    for device in testing::devices() {
        let (model, tuning) = (Tuning::default(), last_of_each(&device));
        assert!(tuning.len() >= 7, "{} cases", tuning.len());
        let (output, grads) = step(&device, &model);
        let (tuned_output, tuned_grads) = step(&device, &tuning);
        assert!(relative(&output, &tuned_output) < 1e-2, "{}", relative(&output, &tuned_output));
        assert!(relative(&grads, &tuned_grads) < 2e-2, "{}", relative(&grads, &tuned_grads));
        assert!(bits(&grads) != bits(&tuned_grads), "other cuts sum in another order");
        let (again_output, again_grads) = step(&device, &tuning);
        assert!(bits(&again_output) == bits(&tuned_output) && bits(&again_grads) == bits(&tuned_grads));
    }
}

#[test]
fn candidates_are_timed_on_the_device() {
    for device in testing::devices() {
        let (graph, params) = network();
        let executor = Executor::new(&device, PRECISION).expect("kernels");
        let plans = [Mode::Train, Mode::Eval]
            .map(|mode| Plan::for_target(&graph, &params, 2, mode, &executor.target()));
        let plans: Vec<_> = plans.iter().map(|plan| (&graph, plan)).collect();
        let measured = tuner::measure(&device, PRECISION, &plans, &Tuning::default(), &Limits::default());
        let tuning = measured.expect("no fault");
        assert!(tuning.len() >= 7 && tuning.fits(device.chip(), PRECISION));
        // Whatever the clock found, a plan made with it runs.
        assert!(step(&device, &tuning).0.iter().all(|v| v.is_finite()));
    }
}
