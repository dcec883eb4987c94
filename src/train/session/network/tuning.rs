//! Which cuts of convolutions a network on a GPU uses: those of a checkpoint, those measured on this machine before,
//! or those it measures now.

use std::sync::Arc;

use super::{Backend, Network, build, device};
use crate::engine::device::cuda::{cache, tuner};
use crate::engine::graph::Node;
use crate::engine::ops::conv2d::Conv2dParams;
use crate::engine::ops::conv2d::cuda::{Limits, Tuning, tuning_file};
use crate::engine::plan::{Mode, Plan};
use crate::train::error::TrainError;

impl Network {
    /// What convolutions are cut by; empty for the model's choice, and on the CPU.
    pub fn tuning(&self) -> &Tuning {
        &self.tuning
    }

    /// From now on the convolutions of this network are cut as `tuning` says. One that was measured on another kind of
    /// chip or in another precision counts as empty.
    pub fn use_tuning(&mut self, tuning: &Tuning) {
        let Backend::Cuda(cuda) = &mut self.backend else { return };
        let (gpu, precision) = cuda.gpu();
        let mut used = Tuning::default();
        if tuning.fits(gpu.chip(), precision) {
            used = tuning.clone();
            let convolutions = convolutions(&self.name, self.nc);
            used.retain(|p| convolutions.contains(p));
        } else if !tuning.is_empty() {
            tracing::warn!("the run's convolutions were measured on another device; sums take another order");
        }
        if !used.is_empty() {
            tracing::info!("{} convolutions are cut as measured ({})", used.len(), used.identity());
        }
        self.tuning = Arc::new(used);
        cuda.set_tuning(Arc::clone(&self.tuning));
        self.plans.clear();
    }

    /// As [`Network::use_tuning`] with what was measured on this machine, if anything was.
    pub fn use_stored_tuning(&mut self) {
        let Backend::Cuda(cuda) = &self.backend else { return };
        let (gpu, precision) = cuda.gpu();
        let stored = tuning_file::read(&cache::folder(), gpu.chip(), precision);
        self.use_tuning(&stored);
    }

    /// Measures the convolutions of a training step and of an evaluation of `(images, height, width)`, all of them
    /// `anew` or those not yet measured, keeps the result on disk and uses it; how many were measured.
    ///
    /// # Errors
    /// A size that the network cannot take; a fault of the device.
    pub fn tune(&mut self, (n, h, w): (usize, usize, usize), anew: bool) -> Result<usize, TrainError> {
        let target = self.target();
        let Backend::Cuda(cuda) = &self.backend else { return Ok(0) };
        let (gpu, precision) = (Arc::clone(cuda.gpu().0), cuda.gpu().1);
        let graph = build(&self.name, self.nc, h, w)?.graph;
        // Validation takes twice the images.
        let plans = [(n, Mode::Train), (2 * n, Mode::Eval)]
            .map(|(n, mode)| Plan::for_target(&graph, &self.params, n, mode, &target));
        let known = if anew { Tuning::default() } else { Tuning::clone(&self.tuning) };
        let plans: Vec<_> = plans.iter().map(|plan| (&graph, plan)).collect();
        let measured = tuner::measure(&gpu, precision, &plans, &known, &Limits::default())
            .map_err(device("measure its convolutions"))?;
        match tuning_file::merge(&cache::folder(), gpu.chip(), precision, &measured) {
            Ok(path) => tracing::info!(file = %path.display(), "measured cuts of convolutions kept"),
            Err(error) => tracing::warn!("measured cuts of convolutions cannot be kept: {error}"),
        }
        let mut used = Tuning::new(gpu.chip(), precision);
        used.extend(&self.tuning);
        used.extend(&measured);
        self.use_tuning(&used);
        Ok(measured.len())
    }
}

/// Every convolution of a network; they do not depend on the input's size.
fn convolutions(name: &str, nc: usize) -> Vec<Conv2dParams> {
    let graph = build(name, nc, 64, 64).map(|detector| detector.graph);
    let nodes = graph.iter().flat_map(|graph| &graph.nodes);
    let of = |node: &Node| match node {
        Node::Conv(conv) => Some(conv.params),
        _ => None,
    };
    nodes.filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detect::losses::detection::LossConfig;
    use crate::engine::device::cuda::{Chip, Precision, testing};
    use crate::engine::ops::conv2d::cuda::{Case, Method, MmaConfig, Pass, Shape};
    use crate::engine::plan::Target;
    use crate::engine::tensor::View;
    use crate::train::session::Compute;

    fn table(chip: &Chip, params: &[Conv2dParams]) -> Tuning {
        let mut tuning = Tuning::new(chip, Precision::Bf16);
        for p in params {
            let (x, y) = (View::new(0, 2, 8, 8, p.c_in, 1), View::new(0, 2, 8, 8, p.c_out, 1));
            let shape = Shape::of_views(&x, &y, Precision::Bf16);
            let config = MmaConfig { method: Method::Gather, rows: 128, columns: 16, splits: 1 };
            tuning.insert(Case { pass: Pass::Forward, params: *p, shape }, config);
        }
        tuning
    }

    #[test]
    fn a_network_takes_what_was_measured_for_it_and_nothing_else() {
        for device in testing::devices() {
            let compute = Compute::Cuda { device: Arc::clone(&device), precision: Precision::Bf16 };
            let mut network = Network::new("yolov8n", 2, LossConfig::new(2), &compute).expect("it loads");
            let own = convolutions("yolov8n", 2)[1];
            let foreign = Conv2dParams { c_in: 24, c_out: 24, kernel: 7, stride: 1, pad: 3 };
            network.use_tuning(&table(device.chip(), &[own, foreign]));
            assert_eq!(*network.tuning(), table(device.chip(), &[own]));
            // Plans are made with the table that the kernels look into.
            let Target::Cuda { tuning, .. } = network.target() else { panic!("a GPU") };
            assert_eq!(tuning.identity(), network.tuning().identity());
            let other = Chip { name: "another".into(), ..device.chip().clone() };
            network.use_tuning(&table(&other, &[own]));
            assert!(network.tuning().is_empty());
        }
    }
}
