//! The device's optimisers against the CPU's.

use half::{bf16, f16};

use super::*;
use crate::engine::device::cuda::testing::devices;
use crate::engine::device::cuda::{Buffer, Precision, Stream};
use crate::engine::rng::{Rng, Use};

fn noise(len: usize, index: u32, size: f64) -> Vec<f32> {
    let mut rng = Rng::new(2, Use::Test, 0, index);
    (0..len).map(|_| (size * rng.normal()) as f32).collect()
}

/// Tensors at multiples of 16, some of odd lengths, one frozen, gaps between.
fn tensors() -> (Vec<Tensor>, usize) {
    let mut tensors: Vec<Tensor> = Vec::new();
    let mut at = 32;
    let mut add = |name: &str, len: usize, role, form, frozen| {
        tensors.push(Tensor { name: name.into(), range: at..at + len, role, form, frozen });
        at = (at + len).next_multiple_of(16);
    };
    let matrix = |rows, cols, aspect| Form::Matrix { rows, cols, aspect };
    add("a.weight", 9 * 20 * 33, Role::Weight, matrix(9 * 20, 33, 1.0), false);
    add("a.norm", 33, Role::Norm, Form::Vector, false);
    add("a.bias", 33, Role::Bias, Form::Vector, false);
    add("cv3.weight", 40 * 101, Role::Weight, matrix(40, 101, 2.5), false);
    add("cv3.bias", 101, Role::Bias, Form::Vector, false);
    add("frozen.weight", 100, Role::Weight, matrix(10, 10, 1.0), true);
    add("one.weight", 1, Role::Weight, matrix(1, 1, 1.0), false);
    add("wide.weight", 70 * 72, Role::Weight, matrix(70, 72, 1.0), false);
    (tensors, at + 48)
}

fn build(algorithm: Algorithm) -> (Optimizer, usize) {
    let (tensors, len) = tensors();
    let groups = groups::build(algorithm, &tensors, 0.01, 0.9, 0.05, |n| n.contains("cv3"));
    (Optimizer::new(algorithm, Hyper::default(), tensors, groups, len), len)
}

const BUFFERS: usize = 2064;

/// Numbers of a network on the device.
struct Network {
    values: Buffer,
    grads: Buffer,
    buffers: Buffer,
    copy: Buffer,
    scale: Buffer,
}

impl Network {
    fn new(stream: &Stream, values: &[f32], buffers: &[f32]) -> Network {
        let allocate = |bytes: usize| stream.device().allocate(bytes).expect("memory");
        let network = Network {
            values: allocate(values.len() * 4),
            grads: allocate(values.len() * 4),
            buffers: allocate(buffers.len() * 4),
            copy: allocate(values.len() * 2),
            scale: allocate(8),
        };
        stream.upload(&network.values, 0, values).expect("a copy");
        stream.upload(&network.buffers, 0, buffers).expect("a copy");
        network
    }

    fn targets(&self, precision: Precision, has_scale: bool) -> StepTargets {
        StepTargets {
            values: self.values.pointer(),
            grads: self.grads.pointer(),
            buffers: self.buffers.pointer(),
            copy: self.copy.pointer(),
            precision,
            scale: if has_scale { self.scale.pointer() } else { 0 },
        }
    }
}

fn download<T: bytemuck::Pod>(stream: &Stream, buffer: &Buffer, len: usize) -> Vec<T> {
    let mut out = vec![T::zeroed(); len];
    stream.download(buffer, 0, &mut out).expect("a copy");
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Some learning rates and momenta for step `t`.
fn schedule(optimizer: &mut Optimizer, t: u32) {
    for (g, group) in optimizer.groups.iter_mut().enumerate() {
        group.lr = group.initial_lr * (1.0 + 0.1 * f64::from(t) + 0.2 * g as f64);
        group.momentum = 0.8 + 0.01 * f64::from(t);
    }
}

/// Gradients that are small in some steps and clipped in others, zero in gaps and frozen tensors.
fn gradients(optimizer: &Optimizer, len: usize, t: u32) -> Vec<f32> {
    let drawn = noise(len, t, if t.is_multiple_of(2) { 0.01 } else { 1.0 });
    let mut grads = vec![0.0; len];
    for tensor in optimizer.tensors.iter().filter(|t| !t.frozen) {
        grads[tensor.range.clone()].copy_from_slice(&drawn[tensor.range.clone()]);
    }
    grads
}

#[test]
fn every_rule_gives_the_bits_of_the_cpu() {
    for (name, algorithm) in Algorithm::ALL {
        for device in devices() {
            let stream = device.stream().expect("a stream");
            let (mut optimizer, len) = build(algorithm);
            let is_muon = algorithm == Algorithm::MuSgd;
            let (mut values, mut buffers) = (noise(len, 0, 0.5), noise(BUFFERS, 99, 1.0));
            let mut ema = Ema::new(&values, &buffers, 0.99, 20.0);
            let network = Network::new(&stream, &values, &buffers);
            // The second half starts from a state that was taken back and put up again.
            let mut on_device = DeviceOptimizer::new(&stream, &optimizer, &ema).expect("it loads");
            let (mut own, mut own_ema) = (build(algorithm).0, ema.clone());
            let bytes = DeviceOptimizer::bytes(&optimizer, &ema);
            assert_eq!(bytes, on_device.allocated_bytes(), "{name}");
            for t in 1..=8 {
                let grads = gradients(&optimizer, len, t);
                schedule(&mut optimizer, t);
                schedule(&mut own, t);
                if t == 5 {
                    on_device.download(&stream, &mut own, &mut own_ema).expect("a copy");
                    on_device = DeviceOptimizer::new(&stream, &own, &own_ema).expect("it loads");
                }
                stream.upload(&network.grads, 0, &grads).expect("a copy");
                stream.upload(&network.buffers, 0, &buffers).expect("a copy");
                // SAFETY: every turn ends in a synchronisation; the vectors are as long as they must be.
                unsafe {
                    on_device.upload_step(&stream, &own, &own_ema, 10.0, 0).expect("a copy");
                    on_device.step(&stream, &network.targets(Precision::Bf16, false)).expect("launches");
                }
                let result = on_device.read(&stream).expect("a copy");
                DeviceOptimizer::commit(&result, &mut own, &mut own_ema);
                let mut clipped = grads.clone();
                let norm = clip_grad_norm(&mut clipped, 10.0);
                assert!((result.norm - norm).abs() <= 1e-12 * norm, "{name}: {result:?} against {norm}");
                assert_eq!(result.is_finite, 1);
                optimizer.step(&mut values, &clipped);
                ema.update(&values, &buffers);
                buffers.iter_mut().for_each(|b| *b = *b * 0.97 + 0.01);
                let found: Vec<f32> = download(&stream, &network.values, len);
                if is_muon {
                    close(&found, &values, 3e-4 * f64::from(t));
                } else {
                    assert_eq!(bits(&found), bits(&values), "{name}, step {t}");
                }
                assert!(download::<f32>(&stream, &network.grads, len).iter().all(|g| g.to_bits() == 0));
                let copy: Vec<bf16> = download(&stream, &network.copy, len);
                assert!(found.iter().zip(&copy).all(|(v, c)| bf16::from_f32(*v) == *c), "{name}: the copy");
            }
            on_device.download(&stream, &mut own, &mut own_ema).expect("a copy");
            assert_eq!((own.steps, own.mu_product), (optimizer.steps, optimizer.mu_product), "{name}");
            assert_eq!(own_ema.updates, ema.updates);
            assert_eq!(bits(&own_ema.buffers), bits(&ema.buffers), "{name}");
            if is_muon {
                close(&own_ema.values, &ema.values, 3e-3);
                close(&own.state[0], &optimizer.state[0], 1e-9);
            } else {
                assert_eq!(bits(&own_ema.values), bits(&ema.values), "{name}");
                for (found, expected) in own.state.iter().zip(&optimizer.state) {
                    assert_eq!(bits(found), bits(expected), "{name}");
                }
            }
        }
    }
}

fn close(found: &[f32], expected: &[f32], allowed: f64) {
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(f64::from((f - e).abs()) <= allowed, "element {i}: {f} against {e}");
    }
}

#[test]
fn orthogonalised_steps_agree_with_the_cpu_to_bfloat16() {
    for device in devices() {
        let stream = device.stream().expect("a stream");
        for (rows, cols) in [(1usize, 1usize), (3, 5), (64, 64), (65, 130), (200, 24), (129, 7), (16, 300)] {
            let len = (rows * cols).next_multiple_of(16);
            let tensor = Tensor {
                name: "w".into(),
                range: 0..rows * cols,
                role: Role::Weight,
                form: Form::Matrix { rows, cols, aspect: 4.0 },
                frozen: false,
            };
            // No decay, no momentum in the ordinary part, a learning rate of one: the step is the matrix.
            let tensors = vec![tensor];
            let mut groups = groups::build(Algorithm::MuSgd, &tensors, 1.0, 0.5, 0.0, |_| false);
            groups.iter_mut().for_each(|g| g.lr = 1.0);
            let mut cpu = Optimizer::new(Algorithm::MuSgd, Hyper::default(), tensors, groups, len);
            let mut values = vec![0.0f32; len];
            let ema = Ema::new(&values, &[0.0; 16], 0.99, 20.0);
            let mut grads = noise(len, 3, 1.0);
            grads[rows * cols..].fill(0.0);
            let network = Network::new(&stream, &values, &[0.0; 16]);
            let mut runs = Vec::new();
            for _ in 0..2 {
                stream.upload(&network.values, 0, &values).expect("a copy");
                let mut on_device = DeviceOptimizer::new(&stream, &cpu, &ema).expect("it loads");
                stream.upload(&network.grads, 0, &grads).expect("a copy");
                // SAFETY: the run ends in a synchronisation.
                unsafe {
                    on_device.upload_step(&stream, &cpu, &ema, 1e9, 0).expect("a copy");
                    on_device.step(&stream, &network.targets(Precision::F32, false)).expect("launches");
                }
                runs.push(download::<f32>(&stream, &network.values, len));
            }
            assert_eq!(bits(&runs[0]), bits(&runs[1]), "two runs");
            cpu.step(&mut values, &grads);
            // Entries of up to one in bfloat16, times 0.2 sqrt(4); five iterations enlarge a rounding a little.
            close(&runs[0], &values, 0.4 * 3.0 / 128.0);
            let error: f64 =
                runs[0].iter().zip(&values).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
            let size: f64 =
                values.iter().zip(&grads).map(|(v, g)| f64::from(v + g).powi(2)).sum::<f64>().sqrt();
            assert!(error <= 0.01 * size.max(0.1), "{rows} x {cols}: {error} of {size}");
        }
    }
}

#[test]
fn gradients_that_are_not_finite_move_nothing() {
    for device in devices() {
        let stream = device.stream().expect("a stream");
        for algorithm in [Algorithm::MuSgd, Algorithm::AdamW] {
            let (mut optimizer, len) = build(algorithm);
            let (values, buffers) = (noise(len, 0, 0.5), noise(BUFFERS, 99, 1.0));
            let mut ema = Ema::new(&noise(len, 5, 0.5), &noise(BUFFERS, 98, 1.0), 0.99, 20.0);
            let before = (optimizer.export(), ema.clone());
            let network = Network::new(&stream, &values, &buffers);
            let mut on_device = DeviceOptimizer::new(&stream, &optimizer, &ema).expect("it loads");
            let start = LossScale { scale: 1024.0, good_steps: 7 };
            stream.upload(&network.scale, 0, &[start]).expect("a copy");
            for bad in [f32::NAN, f32::INFINITY] {
                let mut grads = gradients(&optimizer, len, 1);
                grads[len / 2] = bad;
                stream.upload(&network.grads, 0, &grads).expect("a copy");
                // SAFETY: the turn ends in a synchronisation.
                unsafe {
                    on_device.upload_step(&stream, &optimizer, &ema, 10.0, 2000).expect("a copy");
                    on_device.step(&stream, &network.targets(Precision::F16, true)).expect("launches");
                }
                let result = on_device.read(&stream).expect("a copy");
                assert!(result.is_finite == 0 && !result.norm.is_finite());
                DeviceOptimizer::commit(&result, &mut optimizer, &mut ema);
                assert_eq!(bits(&download(&stream, &network.values, len)), bits(&values));
                assert!(download::<f32>(&stream, &network.grads, len).iter().all(|g| *g == 0.0));
            }
            let scale: Vec<LossScale> = download(&stream, &network.scale, 1);
            assert_eq!(scale[0], LossScale { scale: 256.0, good_steps: 0 });
            on_device.download(&stream, &mut optimizer, &mut ema).expect("a copy");
            assert_eq!(optimizer.export(), before.0);
            assert_eq!((&ema.values, &ema.buffers, ema.updates), (&before.1.values, &before.1.buffers, 0));
        }
    }
}

#[test]
fn a_loss_scale_is_taken_out_and_grows() {
    for device in devices() {
        let stream = device.stream().expect("a stream");
        let (mut optimizer, len) = build(Algorithm::Sgd);
        let (mut values, buffers) = (noise(len, 0, 0.5), noise(BUFFERS, 99, 1.0));
        let mut ema = Ema::new(&values, &buffers, 0.99, 20.0);
        let (mut own, mut own_ema) = (build(Algorithm::Sgd).0, ema.clone());
        let network = Network::new(&stream, &values, &buffers);
        let mut on_device = DeviceOptimizer::new(&stream, &optimizer, &ema).expect("it loads");
        let start = LossScale { scale: 512.0, good_steps: 0 };
        stream.upload(&network.scale, 0, &[start]).expect("a copy");
        let mut expected_scale = 512.0f32;
        for t in 1..=5 {
            let mut grads = gradients(&optimizer, len, t);
            let scaled: Vec<f32> = grads.iter().map(|g| g * expected_scale).collect();
            stream.upload(&network.grads, 0, &scaled).expect("a copy");
            // SAFETY: the turn ends in a synchronisation.
            unsafe {
                on_device.upload_step(&stream, &own, &own_ema, 10.0, 2).expect("a copy");
                on_device.step(&stream, &network.targets(Precision::F16, true)).expect("launches");
            }
            let result = on_device.read(&stream).expect("a copy");
            DeviceOptimizer::commit(&result, &mut own, &mut own_ema);
            clip_grad_norm(&mut grads, 10.0);
            optimizer.step(&mut values, &grads);
            ema.update(&values, &buffers);
            let found: Vec<f32> = download(&stream, &network.values, len);
            assert_eq!(bits(&found), bits(&values), "step {t}");
            let copy: Vec<f16> = download(&stream, &network.copy, len);
            assert!(found.iter().zip(&copy).all(|(v, c)| f16::from_f32(*v) == *c));
            expected_scale *= if t.is_multiple_of(2) { 2.0 } else { 1.0 };
        }
        let scale: Vec<LossScale> = download(&stream, &network.scale, 1);
        assert_eq!(scale[0], LossScale { scale: 2048.0, good_steps: 1 });
    }
}

#[test]
fn norms_of_many_blocks_count_nothing_frozen() {
    for device in devices() {
        let stream = device.stream().expect("a stream");
        let len = 8192 * 5 + 16 * 3;
        let tensor = |name: &str, range, frozen| {
            let form = Form::Vector;
            Tensor { name: name.into(), range, role: Role::Weight, form, frozen }
        };
        let tensors = vec![
            tensor("a", 0..30_001, false),
            tensor("b", 30_016..30_100, true),
            tensor("c", 30_112..len, false),
        ];
        let groups = groups::build(Algorithm::Sgd, &tensors, 0.01, 0.9, 0.0, |_| false);
        let optimizer = Optimizer::new(Algorithm::Sgd, Hyper::default(), tensors, groups, len);
        let values = noise(len, 0, 1.0);
        let ema = Ema::new(&values, &[0.0; 16], 0.99, 20.0);
        let network = Network::new(&stream, &values, &[0.0; 16]);
        let mut on_device = DeviceOptimizer::new(&stream, &optimizer, &ema).expect("it loads");
        let mut grads = noise(len, 1, 1.0);
        for _ in 0..2 {
            stream.upload(&network.grads, 0, &grads).expect("a copy");
            // SAFETY: the turn ends in a synchronisation.
            unsafe {
                on_device.upload_step(&stream, &optimizer, &ema, 10.0, 0).expect("a copy");
                on_device.step(&stream, &network.targets(Precision::F32, false)).expect("launches");
            }
            let mut counted = grads.clone();
            counted[30_001..30_112].fill(0.0);
            let norm = squared_norm(&counted).sqrt();
            let result = on_device.read(&stream).expect("a copy");
            assert!((result.norm - norm).abs() <= 1e-12 * norm, "{result:?} against {norm}");
            grads[7] = 1e20;
        }
    }
}
