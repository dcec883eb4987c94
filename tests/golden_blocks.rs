//! Building blocks of YOLOv8 alone, forward and backward, against the golden vectors.
//!
//! Each block is built from the shapes in the file, loaded with its weights, run in training mode (outputs,
//! running statistics, input and parameter gradients) and in evaluation mode.

mod common;

use boxwright::detect::models::blocks;
use boxwright::engine::activation::Activation;
use boxwright::engine::device::cpu::Executor;
use boxwright::engine::graph::{Graph, InputKind, NormConfig, Value};
use boxwright::engine::params::ParamSet;
use boxwright::engine::plan::{Mode, Plan};
use common::tolerances::{BLOCK_FORWARD, BLOCK_GRADIENT_REL_L2};
use common::{Golden, assert_close, assert_rel_l2};

/// `[n, c, h, w]` to `[n, h, w, c]`.
fn to_nhwc(shape: &[usize], data: &[f32]) -> Vec<f32> {
    let (n, c, h, w) = (shape[0], shape[1], shape[2], shape[3]);
    let mut out = Vec::with_capacity(data.len());
    for image in 0..n {
        for pixel in 0..h * w {
            out.extend((0..c).map(|channel| data[(image * c + channel) * h * w + pixel]));
        }
    }
    out
}

/// The block's graph: what the file's weights and description say.
fn build(golden: &Golden, block: &str, g: &mut Graph, x: Value) -> Value {
    let weight = |name: &str| golden.shape(&format!("{block}/sd.{name}.weight"));
    let repeats = (0..).take_while(|j| golden.has(&format!("{block}/sd.m.{j}.cv1.conv.weight"))).count();
    let c_out = golden.shape(&format!("{block}/y0"))[1];
    let description = golden.meta("blocks")[block]["desc"].as_str().expect("a description").to_owned();
    if golden.has(&format!("{block}/sd.conv.weight")) {
        let kernel = weight("conv")[2];
        let rows = (golden.shape(&format!("{block}/x0"))[2], golden.shape(&format!("{block}/y0"))[2]);
        let stride = if rows.0 == rows.1 { 1 } else { 2 };
        let silent = description.contains("no act");
        let activation = if silent { Activation::Identity } else { Activation::Silu };
        return g.conv_bn_act(block, x, c_out, kernel, stride, activation);
    }
    if block.starts_with("bottleneck") {
        let first = weight("cv1.conv");
        let kernels = [first[2], weight("cv2.conv")[2]];
        return blocks::bottleneck(
            g,
            block,
            x,
            c_out,
            first[0],
            kernels,
            description.contains("shortcut=True"),
        );
    }
    if block.starts_with("c2f") {
        return blocks::c2f(g, block, x, c_out, repeats, description.contains("shortcut=True"));
    }
    blocks::sppf(g, block, x, c_out, 5)
}

fn check(golden: &Golden, block: &str) {
    let name = |array: &str| format!("{block}/{array}");
    let shape = golden.shape(&name("x0"));
    let (n, c, h, w) = (shape[0], shape[1], shape[2], shape[3]);
    let (mut graph, x) = Graph::new(h, w, c, InputKind::Float);
    let meta = &golden.meta("blocks")[block];
    let number = |key: &str| meta[key].as_f64().expect("a number") as f32;
    graph.set_norm(NormConfig { eps: number("bn_eps"), momentum: number("bn_momentum") });
    let out = build(golden, block, &mut graph, x);
    graph.output(out);
    let mut params = ParamSet::new(&graph);
    let prefix = name("sd.");
    for array in golden.with_prefix(&prefix) {
        if !array.ends_with("num_batches_tracked") {
            let target = format!("{block}.{}", &array[prefix.len()..]);
            params
                .import(&target, &golden.shape(&array), &golden.f32(&array))
                .expect("the shapes of the file");
        }
    }
    let (train, eval) = (Plan::new(&graph, n, Mode::Train), Plan::new(&graph, n, Mode::Eval));
    let mut executor = Executor::new(&[&train, &eval], 2).expect("a small plan");
    let input = to_nhwc(&shape, &golden.f32(&name("x0")));
    let nhwc = |array: &str| to_nhwc(&golden.shape(&name(array)), &golden.f32(&name(array)));

    executor.input_floats_mut(&eval).copy_from_slice(&input);
    executor.forward(&graph, &eval, &mut params);
    assert_close(&name("y_eval0"), executor.output(&eval, 0), &nhwc("y_eval0"), BLOCK_FORWARD);

    executor.input_floats_mut(&train).copy_from_slice(&input);
    executor.forward(&graph, &train, &mut params);
    assert_close(&name("y0"), executor.output(&train, 0), &nhwc("y0"), BLOCK_FORWARD);
    executor.output_grad_mut(&train, 0).copy_from_slice(&nhwc("dy0"));
    executor.backward(&graph, &train, &mut params);
    let dx = executor.input_grad(&train).expect("a float input has a gradient");
    assert_rel_l2(&name("dx0"), &dx, &nhwc("dx0"), BLOCK_GRADIENT_REL_L2, 1e-6);
    for (prefix, gradient) in [(name("grad."), true), (name("bn_after."), false)] {
        let arrays = golden.with_prefix(&prefix);
        assert!(!arrays.is_empty(), "{prefix}* is missing");
        for array in arrays.iter().filter(|a| !a.ends_with("num_batches_tracked")) {
            let target = format!("{block}.{}", &array[prefix.len()..]);
            if gradient {
                let (_, got) = params.export_grad(&target).expect("a parameter of the block");
                assert_rel_l2(array, &got, &golden.f32(array), BLOCK_GRADIENT_REL_L2, 1e-6);
            } else {
                let (_, got) = params.export(&target).expect("a statistic of the block");
                assert_close(array, &got, &golden.f32(array), BLOCK_FORWARD);
            }
        }
    }
}

#[test]
fn golden_blocks_of_yolov8() {
    let golden = Golden::open("blocks");
    let blocks = [
        "conv_k3s2",
        "conv_k1_noact",
        "bottleneck_add",
        "bottleneck_noadd",
        "c2f_n2",
        "c2f_n1_noadd",
        "sppf_v8",
    ];
    for block in blocks {
        check(&golden, block);
    }
}
