//! The batch size: the one asked for if it fits, or the largest that does.

use crate::detect::models::Detector;
use crate::engine::params::ParamSet;
use crate::engine::plan::{Mode, Plan};
use crate::train::args::Batch;
use crate::train::error::TrainError;

/// Largest batch that automatic choice takes.
const AUTO_BATCH_MAX: usize = 1024;
/// Share of the available memory that `batch: -1` takes.
const AUTO_SHARE: f64 = 0.6;
/// Copies of the parameters in training: values, gradients, average, two states of the optimiser.
const PARAMETER_COPIES: usize = 5;
/// Batches of pixels that the loader keeps ready or in the making.
const LOADER_BATCHES: usize = 4;
/// Bytes of assignment and decoded boxes per image and anchor point, for targets in the usual number.
const LOSS_BYTES_PER_ANCHOR: usize = 64;

/// Bytes of memory that a process could still take: what the system says, or the limit of its control
/// group where that is lower.
pub fn available_bytes() -> u64 {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let free = system.available_memory();
    system.cgroup_limits().map_or(free, |limits| free.min(limits.free_memory))
}

/// Bytes that training at `batch` takes: the exact plan, the parameters and their copies, the loss, the loader.
pub fn bytes_needed(detector: &Detector, params: &ParamSet, batch: usize) -> u64 {
    let plan = Plan::with_params(&detector.graph, params, batch, Mode::Train);
    let fixed = PARAMETER_COPIES * params.values.len() * 4;
    let loss = batch * detector.anchor_count() * LOSS_BYTES_PER_ANCHOR;
    let loader = LOADER_BATCHES * plan.bytes().input;
    (plan.bytes().total() + fixed + loss + loader) as u64
}

/// The batch for a dataset of `images` training images.
///
/// An explicit batch is capped at the number of images, and refused when it does not fit the available
/// memory. `-1` is the largest batch that fits 0.6 of it, a number in (0, 1) the largest that fits that
/// share; both are capped at the number of images and at 1024.
///
/// # Errors
/// [`TrainError::Memory`].
pub fn choose(
    wanted: Batch,
    detector: &Detector,
    params: &ParamSet,
    images: usize,
    available: u64,
) -> Result<usize, TrainError> {
    let needed = |batch: usize| bytes_needed(detector, params, batch);
    let refuse = |batch: usize, limit: u64| TrainError::Memory {
        batch,
        imgsz: detector.graph.shape(detector.graph.outputs()[0])[0] * detector.strides[0],
        needed_mib: needed(batch) >> 20,
        available_mib: limit >> 20,
        largest: largest(|b| needed(b) <= limit, batch),
    };
    let share = match wanted {
        Batch::Images(batch) => {
            let batch = (batch as usize).min(images).max(1);
            return if needed(batch) <= available { Ok(batch) } else { Err(refuse(batch, available)) };
        }
        Batch::Auto => AUTO_SHARE,
        Batch::Fraction(share) => share,
    };
    let limit = (available as f64 * share) as u64;
    match largest(|batch| needed(batch) <= limit, images.clamp(1, AUTO_BATCH_MAX)) {
        0 => Err(refuse(1, limit)),
        batch => Ok(batch),
    }
}

/// The largest number in `1..=max` that fits, by bisection; 0 when not even 1 does.
fn largest(fits: impl Fn(usize) -> bool, max: usize) -> usize {
    let (mut low, mut high) = (0, max + 1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bisection_finds_the_edge() {
        for edge in [0, 1, 2, 63, 64, 65, 100] {
            assert_eq!(largest(|n| n <= edge, 100), edge.min(100));
        }
    }

    #[test]
    fn batch_fits_or_is_refused_with_the_largest() {
        let detector = Detector::build("yolov8n", 3, 64, 64).expect("a shipped model");
        let params = ParamSet::new(&detector.graph);
        let need = |batch| bytes_needed(&detector, &params, batch);
        let choose = |batch, images, available| choose(batch, &detector, &params, images, available);
        assert_eq!(choose(Batch::Images(16), 1000, need(16)).expect("it fits"), 16);
        assert_eq!(choose(Batch::Images(16), 5, need(16)).expect("capped"), 5);
        assert_eq!(choose(Batch::Fraction(0.5), 1000, 2 * need(7) + 2).expect("the largest"), 7);
        assert_eq!(choose(Batch::Auto, 3, u64::MAX >> 8).expect("capped"), 3);
        match choose(Batch::Images(16), 1000, need(9)) {
            Err(TrainError::Memory { batch: 16, imgsz: 64, largest: 9, .. }) => {}
            other => panic!("{other:?}"),
        }
        assert!(matches!(
            choose(Batch::Auto, 10, 1000),
            Err(TrainError::Memory { batch: 1, largest: 0, .. })
        ));
    }
}
