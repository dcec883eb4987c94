//! What each step must move and compute, at least: the measure that a profile holds times against.

use super::{Mode, Plan, Step, View};
use crate::engine::graph::{Graph, Node};

/// Bytes to and from memory, and floating-point operations, of a step or of many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes read and written when every map goes to memory once for each pass that needs it.
    pub bytes: u64,
    /// Operations; a multiply-add is two.
    pub flops: u64,
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.bytes += other.bytes;
        self.flops += other.flops;
    }
}

/// One step of a plan as a profile shows it.
#[derive(Clone, Debug)]
pub struct StepCost {
    /// The layer, or the operation where it has no name.
    pub name: String,
    /// `forward` or `backward`.
    pub pass: &'static str,
    /// What it must do.
    pub cost: Cost,
}

impl Plan {
    /// Every step in the order it runs, forward then backward.
    pub fn costs(&self, graph: &Graph) -> Vec<StepCost> {
        let forward = self.forward.iter().map(|s| ("forward", s));
        let backward = self.backward.iter().map(|s| ("backward", s));
        let step = |(pass, step): (&'static str, &Step)| StepCost {
            name: self.name(graph, step),
            pass,
            cost: self.cost(graph, step),
        };
        forward.chain(backward).map(step).collect()
    }

    /// All of it.
    pub fn total_cost(&self, graph: &Graph) -> Cost {
        let mut total = Cost::default();
        self.costs(graph).into_iter().for_each(|s| total += s.cost);
        total
    }

    fn name(&self, graph: &Graph, step: &Step) -> String {
        let node = |index: usize| match &graph.nodes[index] {
            Node::Conv(c) => c.name.clone(),
            _ => String::new(),
        };
        match step {
            Step::Conv(s) => node(s.node),
            Step::ConvBackward(s) => node(s.node),
            Step::Input { .. } => "input".into(),
            Step::MaxPool(_) | Step::MaxPoolBackward { .. } => "max_pool2d".into(),
            Step::Upsample { .. } | Step::UpsampleBackward { .. } => "upsample_nearest".into(),
            Step::ZeroBorder(_) | Step::Zero(_) => "border".into(),
        }
    }

    fn cost(&self, graph: &Graph, step: &Step) -> Cost {
        let number = self.target.bytes() as u64;
        let map = |v: &View| v.len() as u64 * number;
        match step {
            Step::Conv(s) => {
                let Node::Conv(c) = &graph.nodes[s.node] else { return Cost::default() };
                let x = if s.reads_image { s.x.len() as u64 } else { map(&s.x) };
                let weights = c.params.weight_len() as u64 * number;
                let shortcut = s.residual.as_ref().map_or(0, map);
                // Training writes the raw output, reads it again and writes the activation.
                let out = if s.y.is_some() { 3 * map(&s.z) } else { map(&s.z) };
                let flops = 2 * (s.z.n * s.z.h * s.z.w) as u64 * c.params.weight_len() as u64;
                Cost { bytes: x + weights + shortcut + out, flops }
            }
            Step::ConvBackward(s) => {
                let Node::Conv(c) = &graph.nodes[s.node] else { return Cost::default() };
                let products = 2 * (s.dz.n * s.dz.h * s.dz.w) as u64 * c.params.weight_len() as u64;
                let x = if s.reads_image { s.x.len() as u64 } else { map(&s.x) };
                // (dz, y) twice and dy once for the normalisation, dy for each of the two products.
                let norm = if s.dy.is_some() { 5 * map(&s.dz) } else { 0 };
                let mut cost = Cost { bytes: norm, flops: 0 };
                if !s.frozen_weight {
                    cost +=
                        Cost { bytes: map(&s.dz) + x + 8 * c.params.weight_len() as u64, flops: products };
                }
                if let Some((dx, adds)) = &s.dx {
                    let times = 1 + u64::from(*adds);
                    cost += Cost { bytes: map(&s.dz) + times * map(dx), flops: products };
                }
                if let Some((grad, adds)) = &s.residual_grad {
                    cost += Cost { bytes: (1 + u64::from(*adds)) * map(grad), flops: 0 };
                }
                cost
            }
            Step::MaxPool(p) => {
                let kept = if self.mode == Mode::Train { p.z.len() as u64 } else { 0 };
                Cost { bytes: map(&p.x) + map(&p.z) + kept, flops: 0 }
            }
            Step::MaxPoolBackward { pool: p, accumulate } => {
                let times = 1 + u64::from(*accumulate);
                Cost { bytes: times * map(&p.x) + map(&p.z) + p.z.len() as u64, flops: 0 }
            }
            Step::Upsample { x, z, .. } => Cost { bytes: map(x) + map(z), flops: 0 },
            Step::UpsampleBackward { dz, dx, accumulate, .. } => {
                Cost { bytes: map(dz) + (1 + u64::from(*accumulate)) * map(dx), flops: 0 }
            }
            Step::Input { dst } => Cost { bytes: dst.len() as u64 + map(dst), flops: 0 },
            Step::Zero(view) => Cost { bytes: map(view), flops: 0 },
            Step::ZeroBorder(_) => Cost::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::activation::Activation;

    #[test]
    fn a_layer_costs_what_its_maps_and_products_say() {
        let (mut graph, x) = Graph::new(8, 8, 16, crate::engine::graph::InputKind::Float);
        let y = graph.conv_bn_act("a", x, 32, 3, 2, Activation::Silu);
        graph.output(y);
        let plan = Plan::new(&graph, 3, Mode::Train);
        let costs = plan.costs(&graph);
        let (input, out, weights) = (3 * 8 * 8 * 16u64, 3 * 4 * 4 * 32u64, 9 * 16 * 32u64);
        let forward = costs.iter().find(|c| c.name == "a" && c.pass == "forward").expect("it runs").cost;
        assert_eq!(forward, Cost { bytes: 4 * (input + 3 * out + weights), flops: 2 * 3 * 16 * weights });
        let backward = costs.iter().find(|c| c.name == "a" && c.pass == "backward").expect("it runs").cost;
        assert_eq!(backward.flops, 2 * forward.flops, "two products");
        assert_eq!(backward.bytes, 4 * (7 * out + 2 * input + 2 * weights));
        assert_eq!(plan.total_cost(&graph).flops, 3 * forward.flops);
    }
}
