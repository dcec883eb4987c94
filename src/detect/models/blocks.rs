//! Building blocks (models.md §2). `name` is the state-dict prefix of the block.

use crate::engine::activation::Activation::Silu;
use crate::engine::graph::{Graph, Value};

/// `Conv`: convolution, batch norm, SiLU.
pub fn conv(g: &mut Graph, name: &str, x: Value, c_out: usize, kernel: usize, stride: usize) -> Value {
    g.conv_bn_act(name, x, c_out, kernel, stride, Silu)
}

/// `Bottleneck`: two convolutions with kernels `kernels` and `hidden` channels between, and the input added
/// when `shortcut` is set and the channels agree.
pub fn bottleneck(
    g: &mut Graph,
    name: &str,
    x: Value,
    c_out: usize,
    hidden: usize,
    kernels: [usize; 2],
    shortcut: bool,
) -> Value {
    let residual = (shortcut && g.channels(x) == c_out).then_some(x);
    let y = conv(g, &format!("{name}.cv1"), x, hidden, kernels[0], 1);
    g.conv_bn_act_add(&format!("{name}.cv2"), y, c_out, kernels[1], 1, Silu, residual)
}

/// `C2f`: the two halves of `cv1`, then `repeats` bottlenecks each fed by the one before, all joined.
pub fn c2f(g: &mut Graph, name: &str, x: Value, c_out: usize, repeats: usize, shortcut: bool) -> Value {
    let c = c_out / 2;
    let halves = conv(g, &format!("{name}.cv1"), x, 2 * c, 1, 1);
    let mut parts = vec![halves];
    let mut last = g.slice(halves, c, c);
    for j in 0..repeats {
        last = bottleneck(g, &format!("{name}.m.{j}"), last, c, c, [3, 3], shortcut);
        parts.push(last);
    }
    let joined = g.concat(&parts);
    conv(g, &format!("{name}.cv2"), joined, c_out, 1, 1)
}

/// `SPPF`: three max-pools one after another, all four maps joined.
pub fn sppf(g: &mut Graph, name: &str, x: Value, c_out: usize, kernel: usize) -> Value {
    let hidden = g.channels(x) / 2;
    let mut parts = vec![conv(g, &format!("{name}.cv1"), x, hidden, 1, 1)];
    for i in 0..3 {
        parts.push(g.max_pool(parts[i], kernel, 1, kernel / 2));
    }
    let joined = g.concat(&parts);
    conv(g, &format!("{name}.cv2"), joined, c_out, 1, 1)
}
