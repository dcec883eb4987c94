//! Measures how the convolutions of plans are best cut on a GPU.

use std::sync::Arc;

use super::{Device, DeviceError, Precision};
use crate::engine::graph::{ConvNode, Graph, Node};
use crate::engine::ops::conv2d::cuda::{self as conv, EventClock, Limits, Output, Pass, Subject, Tuning};
use crate::engine::plan::{Plan, Step};
use crate::engine::tensor::View;

/// The convolutions of a plan that the tensor cores compute, each as often as it stands there.
pub fn subjects(device: &Device, precision: Precision, graph: &Graph, plan: &Plan) -> Vec<Subject> {
    let mut found = Vec::new();
    let mut add = |pass, node: &ConvNode, x: &View, y: &View, output| {
        found.extend(Subject::new(pass, node.params, (*x, *y), output, precision, device.chip()));
    };
    for step in plan.forward.iter().chain(&plan.backward) {
        match step {
            Step::Conv(s) if !s.reads_image => {
                let Node::Conv(node) = &graph.nodes[s.node] else { continue };
                let output = match (node.norm, s.y, s.partials) {
                    (None, ..) => Output::Bias,
                    (_, None, _) => Output::Apply(node.activation),
                    (.., None) => Output::Raw,
                    (.., Some(_)) => Output::Stats,
                };
                add(Pass::Forward, node, &s.x, s.y.as_ref().unwrap_or(&s.z), output);
            }
            Step::ConvBackward(s) => {
                let Node::Conv(node) = &graph.nodes[s.node] else { continue };
                let dy = s.dy.as_ref().unwrap_or(&s.dz);
                if !s.frozen_weight && !s.reads_image {
                    add(Pass::BackwardWeight, node, &s.x, dy, Output::Raw);
                }
                if let Some((dx, _)) = &s.dx {
                    add(Pass::BackwardData, node, dx, dy, Output::Raw);
                }
            }
            _ => {}
        }
    }
    found
}

/// Times the best few cuts of every convolution of `plans` (each with its graph) that `known` does not have.
///
/// At most half of the free memory is taken, and given back.
///
/// # Errors
/// A fault of the device; memory refused.
pub fn measure(
    device: &Arc<Device>,
    precision: Precision,
    plans: &[(&Graph, &Plan)],
    known: &Tuning,
    limits: &Limits,
) -> Result<Tuning, DeviceError> {
    let of_plan = |(graph, plan): &(&Graph, &Plan)| subjects(device, precision, graph, plan);
    let subjects: Vec<Subject> = plans.iter().flat_map(of_plan).collect();
    if subjects.is_empty() {
        return Ok(Tuning::new(device.chip(), precision));
    }
    let half = (device.memory()?.free_bytes / 2) as usize;
    let limits = Limits { bytes: limits.bytes.min(half), ..*limits };
    let mut clock = EventClock::new(device, precision)?;
    conv::measure(&subjects, known, device.chip(), precision, &limits, &mut clock)
}
