//! Optimisers, clipping, moving average and schedules against the reference's numbers.

mod common;

use boxwright::engine::optim::{
    Algorithm, Ema, Form, Hyper, Optimizer, Role, Tensor, clip_grad_norm, groups,
};
use boxwright::train::schedule::{Schedule, ScheduleSpec, one_to_many_weight};
use common::golden::Golden;
use common::tolerances::{self, Tolerance};
use common::{assert_close, assert_scalar_close, compare::assert_close_f64};

/// `[o][i][k][k]` to `[k][k][i][o]`, the layout in which the engine keeps convolution weights.
fn to_hwio(data: &[f32], shape: &[usize]) -> Vec<f32> {
    permute(data, shape, true)
}

fn permute(data: &[f32], shape: &[usize], to_hwio: bool) -> Vec<f32> {
    let &[c_out, c_in, kh, kw] = shape else { return data.to_vec() };
    let mut out = vec![0.0; data.len()];
    for o in 0..c_out {
        for i in 0..c_in {
            for y in 0..kh {
                for x in 0..kw {
                    let oihw = ((o * c_in + i) * kh + y) * kw + x;
                    let hwio = ((y * kw + x) * c_in + i) * c_out + o;
                    if to_hwio { out[hwio] = data[oihw] } else { out[oihw] = data[hwio] }
                }
            }
        }
    }
    out
}

fn form(shape: &[usize], is_hwio: bool) -> Form {
    let last_two = |d2: usize, d1: usize| (d2 as f32 / d1 as f32).max(1.0);
    match *shape {
        [rows, cols] => Form::Matrix { rows, cols, aspect: last_two(rows, cols) },
        [o, i, h, w] if is_hwio => Form::Matrix { rows: h * w * i, cols: o, aspect: last_two(h, w) },
        [o, i, h, w] => Form::Matrix { rows: o, cols: i * h * w, aspect: last_two(h, w) },
        _ => Form::Vector,
    }
}

/// The parameters of the file in one flat buffer.
struct Model {
    names: Vec<String>,
    shapes: Vec<Vec<usize>>,
    tensors: Vec<Tensor>,
    len: usize,
}

impl Model {
    fn new(golden: &Golden, prefix: &str, names: Vec<String>, is_hwio: bool) -> Model {
        let (mut tensors, mut shapes, mut len) = (Vec::new(), Vec::new(), 0);
        for name in &names {
            let shape = golden.shape(&format!("{prefix}{name}"));
            let size: usize = shape.iter().product();
            let role = match name {
                n if n.contains("bias") => Role::Bias,
                _ if shape.len() == 1 => Role::Norm,
                _ => Role::Weight,
            };
            let (form, name) = (form(&shape, is_hwio), name.clone());
            tensors.push(Tensor { name, range: len..len + size, role, form, frozen: false });
            shapes.push(shape);
            len += size;
        }
        Model { names, shapes, tensors, len }
    }

    fn load(&self, golden: &Golden, prefix: &str, is_hwio: bool) -> Vec<f32> {
        let mut flat = vec![0.0; self.len];
        for ((name, shape), tensor) in self.names.iter().zip(&self.shapes).zip(&self.tensors) {
            let data = golden.f32(&format!("{prefix}{name}"));
            let data = if is_hwio { to_hwio(&data, shape) } else { data };
            flat[tensor.range.clone()].copy_from_slice(&data);
        }
        flat
    }
}

fn floats(golden: &Golden, key: &str) -> Vec<f64> {
    let list = golden.meta(key).as_array().expect("a list of numbers");
    list.iter().map(|v| v.as_f64().expect("a number")).collect()
}

fn check_steps(algorithm: Algorithm, prefix: &str, tolerance: Tolerance, is_hwio: bool) {
    let golden = Golden::open("optim");
    let names = golden.with_prefix("p0.").iter().map(|n| n["p0.".len()..].to_string()).collect();
    let model = Model::new(&golden, "p0.", names, is_hwio);
    let (lrs, momenta) = (floats(&golden, "lrs"), floats(&golden, "momenta"));
    let decay = golden.meta_f64("weight_decay");
    let betas = &golden.meta("adamw")["betas"];
    let hyper = Hyper {
        beta1: betas[0].as_f64().expect("a number"),
        beta2: betas[1].as_f64().expect("a number"),
        eps: golden.meta("adamw")["eps"].as_f64().expect("a number"),
    };
    let groups = groups::build(algorithm, &model.tensors, lrs[0], momenta[0], decay, |_| false);
    let mut values = model.load(&golden, "p0.", is_hwio);
    let mut optimizer = Optimizer::new(algorithm, hyper, model.tensors.clone(), groups, model.len);
    for (step, (&lr, &momentum)) in lrs.iter().zip(&momenta).enumerate() {
        for group in &mut optimizer.groups {
            (group.lr, group.momentum) = (lr, momentum);
        }
        let grads = model.load(&golden, &format!("grad{step}."), is_hwio);
        optimizer.step(&mut values, &grads);
        for ((name, shape), tensor) in model.names.iter().zip(&model.shapes).zip(&model.tensors) {
            let key = format!("{prefix}.step{step}.{name}");
            let found = &values[tensor.range.clone()];
            let found = if is_hwio { permute(found, shape, false) } else { found.to_vec() };
            assert_close(&key, &found, &golden.f32(&key), tolerance);
        }
    }
}

#[test]
fn golden_sgd() {
    check_steps(Algorithm::Sgd, "sgd", tolerances::OPTIMISER, false);
}

#[test]
fn golden_adamw() {
    check_steps(Algorithm::AdamW, "adamw", tolerances::OPTIMISER, false);
}

#[test]
fn golden_musgd_in_both_layouts() {
    check_steps(Algorithm::MuSgd, "musgd", tolerances::OPTIMISER_MUSGD, false);
    check_steps(Algorithm::MuSgd, "musgd", tolerances::OPTIMISER_MUSGD, true);
}

#[test]
fn golden_clip() {
    let golden = Golden::open("optim");
    let names: Vec<_> =
        golden.with_prefix("clip_grad.").iter().map(|n| n["clip_grad.".len()..].to_string()).collect();
    let model = Model::new(&golden, "clip_grad.", names, false);
    let last = floats(&golden, "lrs").len() - 1;
    let mut grads = model.load(&golden, &format!("grad{last}."), false);
    let norm = clip_grad_norm(&mut grads, 10.0);
    assert_scalar_close("clip_total_norm", norm, golden.scalar("clip_total_norm"), tolerances::GRADIENT_NORM);
    assert_close("clip_grad", &grads, &model.load(&golden, "clip_grad.", false), tolerances::OPTIMISER);
}

#[test]
fn golden_ema() {
    let golden = Golden::open("optim");
    let settings = golden.meta("ema");
    let (decay, tau) =
        (settings["decay"].as_f64().expect("number"), settings["tau"].as_f64().expect("number"));
    let is_buffer = |n: &str| n.contains("running_");
    // Integer buffers (the count of batches) are not averaged.
    let names: Vec<String> = golden.with_prefix("ema.model0.").into_iter().collect();
    let names =
        names.iter().filter(|n| golden.dtype(n) == "F32").map(|n| n["ema.model0.".len()..].to_string());
    let (buffers, values): (Vec<_>, Vec<_>) = names.partition(|n| is_buffer(n));
    let values = Model::new(&golden, "ema.model0.", values, false);
    let buffers = Model::new(&golden, "ema.model0.", buffers, false);
    let load = |prefix: &str| (values.load(&golden, prefix, false), buffers.load(&golden, prefix, false));
    let (v, b) = load("ema.model0.");
    let mut ema = Ema::new(&v, &b, decay, tau);
    for update in 1.. {
        let model = format!("ema.model{update}.");
        if golden.with_prefix(&model).is_empty() {
            assert!(update > 1, "the file holds no update");
            break;
        }
        let (v, b) = load(&model);
        ema.update(&v, &b);
        let (v, b) = load(&format!("ema.ema{update}."));
        assert_close(&format!("ema {update} parameters"), &ema.values, &v, tolerances::OPTIMISER);
        assert_close(&format!("ema {update} buffers"), &ema.buffers, &b, tolerances::OPTIMISER);
    }
}

fn schedule(golden: &Golden, cosine: bool) -> (Schedule, f64) {
    let s = golden.meta("sched");
    let number = |key: &str| s[key].as_f64().unwrap_or_else(|| panic!("sched.{key} is not a number"));
    let spec = ScheduleSpec {
        epochs: number("epochs") as u32,
        batches: number("nb") as usize,
        lrf: number("lrf"),
        cosine,
        warmup_epochs: number("warmup_epochs"),
        warmup_bias_lr: number("warmup_bias_lr"),
        warmup_momentum: number("warmup_momentum"),
        momentum: number("momentum"),
        accumulate: number("accumulate") as usize,
    };
    (Schedule::new(spec), number("lr0"))
}

#[test]
fn golden_schedules() {
    let golden = Golden::open("optim");
    let epochs = golden.shape("sched.linear")[0] as u32;
    for (key, cosine) in [("sched.linear", false), ("sched.cosine", true)] {
        let (schedule, _) = schedule(&golden, cosine);
        let found: Vec<f64> = (0..epochs).map(|e| schedule.factor(e)).collect();
        assert_close_f64(key, &found, &golden.f64(key), tolerances::SCHEDULE);
    }
    let found: Vec<f64> = (0..epochs).map(|e| one_to_many_weight(e, epochs)).collect();
    assert_close_f64("sched.o2m", &found, &golden.f64("sched.o2m"), tolerances::SCHEDULE);
}

#[test]
fn golden_warmup() {
    let golden = Golden::open("optim");
    let (schedule, lr0) = schedule(&golden, false);
    let batches = golden.meta("sched")["nb"].as_u64().expect("an integer");
    let mut groups = groups::build(Algorithm::Sgd, &[], lr0, 0.9, 0.0, |_| false);
    let columns = golden.shape("sched.warmup")[1];
    for row in golden.f64("sched.warmup").chunks(columns) {
        let ni = row[0] as u64;
        schedule.apply((ni / batches) as u32, (ni % batches) as usize, &mut groups, true);
        let found =
            [ni as f64, schedule.accumulate_at(ni) as f64, groups[2].lr, groups[0].lr, groups[0].momentum];
        assert_close_f64(&format!("sched.warmup at {ni}"), &found, row, tolerances::SCHEDULE);
        assert_eq!(groups[0].lr, groups[1].lr);
    }
}

/// One step of the whole reduced model: clip, then SGD and AdamW, first elements of each tensor.
#[test]
fn golden_model_steps() {
    let golden = Golden::open("yolov8_tiny");
    let names: Vec<_> = golden.with_prefix("grad.").iter().map(|n| n["grad.".len()..].to_string()).collect();
    let model = Model::new(&golden, "grad.", names, false);
    let mut grads = model.load(&golden, "grad.", false);
    let norm = clip_grad_norm(&mut grads, 10.0);
    assert_scalar_close("grad_norm", norm, golden.scalar("grad_norm"), tolerances::GRADIENT_NORM);
    for (algorithm, prefix, lr) in [(Algorithm::Sgd, "sgd1.", 0.01), (Algorithm::AdamW, "adamw1.", 0.001)] {
        let groups = groups::build(algorithm, &model.tensors, lr, 0.937, 5e-4, |_| false);
        let mut optimizer =
            Optimizer::new(algorithm, Hyper::default(), model.tensors.clone(), groups, model.len);
        let mut values = model.load(&golden, "sd.", false);
        optimizer.step(&mut values, &grads);
        for tensor in &model.tensors {
            let key = format!("{prefix}{}", tensor.name);
            let expected = golden.f32(&key);
            let found = &values[tensor.range.clone()][..expected.len()];
            assert_close(&key, found, &expected, tolerances::OPTIMISER);
        }
    }
}
