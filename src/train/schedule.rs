//! Learning rate, momentum and accumulation over a run, and the choices of `optimizer: auto`.

use crate::engine::optim::{Algorithm, Group, GroupKind};

/// What the schedule is made from.
#[derive(Clone, Debug, PartialEq)]
pub struct ScheduleSpec {
    /// Epochs of the run.
    pub epochs: u32,
    /// Batches per epoch.
    pub batches: usize,
    /// Final learning rate as a share of the initial one.
    pub lrf: f64,
    /// Cosine instead of linear.
    pub cosine: bool,
    /// Epochs of warm-up.
    pub warmup_epochs: f64,
    /// Learning rate at which biases start the warm-up.
    pub warmup_bias_lr: f64,
    /// Momentum at which the warm-up starts.
    pub warmup_momentum: f64,
    /// Momentum at which it ends.
    pub momentum: f64,
    /// Batches whose gradients are summed for one step, after the warm-up.
    pub accumulate: usize,
}

/// The schedule of a run: a pure function of epoch and batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    spec: ScheduleSpec,
    warmup_batches: usize,
    passes: usize,
}

impl Schedule {
    /// A schedule; the warm-up lasts `round(min(warmup_epochs, epochs - 1) * batches)` batches.
    pub fn new(spec: ScheduleSpec) -> Schedule {
        let epochs = spec.warmup_epochs.min(f64::from(spec.epochs.saturating_sub(1)));
        let warmup_batches = (epochs.max(0.0) * spec.batches as f64).round_ties_even() as usize;
        Schedule { spec, warmup_batches, passes: 1 }
    }

    /// Epochs of the run.
    pub fn epochs(&self) -> u32 {
        self.spec.epochs
    }

    /// The same schedule over another number of epochs (a run with a time budget); the warm-up keeps
    /// the length it had.
    pub fn with_epochs(mut self, epochs: u32) -> Schedule {
        self.spec.epochs = epochs;
        self
    }

    /// The same schedule for batches that each run as so many passes, which are what the epoch counts.
    pub fn with_passes(mut self, passes: usize) -> Schedule {
        self.passes = passes.max(1);
        self
    }

    /// Batches of warm-up.
    pub fn warmup_batches(&self) -> usize {
        self.warmup_batches
    }

    /// Factor of the learning rate in `epoch` (counted from 0).
    ///
    /// linear: max(1 - e/E, 0) * (1 - lrf) + lrf; cosine: (1 - cos(pi e/E)) / 2 * (lrf - 1) + 1.
    pub fn factor(&self, epoch: u32) -> f64 {
        let (lrf, share) = (self.spec.lrf, f64::from(epoch) / f64::from(self.spec.epochs));
        if self.spec.cosine {
            (1.0 - (std::f64::consts::PI * share).cos()) / 2.0 * (lrf - 1.0) + 1.0
        } else {
            (1.0 - share).max(0.0) * (1.0 - lrf) + lrf
        }
    }

    /// Passes to accumulate at iteration `ni = batch + batches * epoch`.
    pub fn accumulate_at(&self, ni: u64) -> usize {
        let batches = match self.warming(ni) {
            Some(share) => {
                let wanted = 1.0 + share * (self.spec.accumulate as f64 - 1.0);
                (wanted.round_ties_even() as usize).max(1)
            }
            None => self.spec.accumulate,
        };
        batches * self.passes
    }

    /// Writes the learning rates and momenta of `batch` in `epoch` into the groups.
    pub fn apply(&self, epoch: u32, batch: usize, groups: &mut [Group], has_momentum: bool) {
        let ni = batch as u64 + self.spec.batches as u64 * u64::from(epoch);
        let factor = self.factor(epoch);
        let warming = self.warming(ni);
        for group in groups {
            let end = group.initial_lr * factor;
            let start = if group.kind == GroupKind::Bias { self.spec.warmup_bias_lr } else { 0.0 };
            group.lr = warming.map_or(end, |share| start + share * (end - start));
            if has_momentum {
                let (start, end) = (self.spec.warmup_momentum, self.spec.momentum);
                group.momentum = warming.map_or(end, |share| start + share * (end - start));
            }
        }
    }

    /// How far the warm-up is at iteration `ni`, 0..=1; `None` after it.
    fn warming(&self, ni: u64) -> Option<f64> {
        let n = self.warmup_batches;
        (n > 0 && ni <= n as u64).then(|| ni as f64 / n as f64)
    }
}

/// Batches to accumulate for a nominal batch of `nbs`: max(round(nbs / batch), 1).
pub fn accumulate_for(nbs: usize, batch: usize) -> usize {
    ((nbs as f64 / batch as f64).round_ties_even() as usize).max(1)
}

/// Weight decay scaled to the images that one step really sees: decay * batch * accumulate / nbs.
pub fn effective_weight_decay(weight_decay: f64, batch: usize, nbs: usize) -> f64 {
    weight_decay * (batch * accumulate_for(nbs, batch)) as f64 / nbs as f64
}

/// Weight of the one-to-many branch of a two-branch head during `epoch`; the rest is the other's.
///
/// max(1 - e / max(E - 1, 1), 0) * 0.7 + 0.1.
pub fn one_to_many_weight(epoch: u32, epochs: u32) -> f64 {
    let share = f64::from(epoch) / f64::from(epochs.saturating_sub(1).max(1));
    (1.0 - share).max(0.0) * (0.8 - 0.1) + 0.1
}

/// An optimiser and its constants as training uses them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimizerChoice {
    /// The update rule.
    pub algorithm: Algorithm,
    /// Initial learning rate.
    pub lr0: f64,
    /// Momentum, or beta1 of the Adam family, at construction.
    pub momentum: f64,
    /// Learning rate at which biases start the warm-up.
    pub warmup_bias_lr: f64,
}

/// Iterations above which `auto` prefers MuSGD.
const AUTO_LONG_RUN_ITERATIONS: usize = 10_000;

/// What `optimizer: auto` means for a dataset of `images` with `nc` classes.
///
/// iterations = ceil(images / max(batch, nbs)) * epochs; above 10,000 MuSGD at 0.01, else AdamW at
/// round(0.002 * 5 / (4 + nc), 6). Biases then warm up from 0.
pub fn auto_optimizer(images: usize, batch: usize, nbs: usize, epochs: u32, nc: usize) -> OptimizerChoice {
    let iterations = images.div_ceil(batch.max(nbs).max(1)) * epochs as usize;
    let (algorithm, lr0) = if iterations > AUTO_LONG_RUN_ITERATIONS {
        (Algorithm::MuSgd, 0.01)
    } else {
        (Algorithm::AdamW, (0.002 * 5.0 / (4.0 + nc as f64) * 1e6).round_ties_even() / 1e6)
    };
    OptimizerChoice { algorithm, lr0, momentum: 0.9, warmup_bias_lr: 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> ScheduleSpec {
        ScheduleSpec {
            epochs: 10,
            batches: 5,
            lrf: 0.01,
            cosine: false,
            warmup_epochs: 3.0,
            warmup_bias_lr: 0.1,
            warmup_momentum: 0.8,
            momentum: 0.937,
            accumulate: 4,
        }
    }

    #[test]
    fn auto_picks_by_iterations_and_classes() {
        let lr = |nc| auto_optimizer(1000, 16, 64, 100, nc).lr0;
        assert_eq!((lr(80), lr(3), lr(1)), (0.000119, 0.001429, 0.002));
        assert_eq!(auto_optimizer(1000, 16, 64, 100, 3).algorithm, Algorithm::AdamW);
        assert_eq!(auto_optimizer(118_000, 16, 64, 100, 80).algorithm, Algorithm::MuSgd);
        // ceil(6400 / 64) * 100 is exactly the bound, which is not above it.
        assert_eq!(auto_optimizer(6400, 16, 64, 100, 80).algorithm, Algorithm::AdamW);
    }

    #[test]
    fn warmup_is_bounded_by_the_run() {
        assert_eq!(Schedule::new(spec()).warmup_batches(), 15);
        assert_eq!(Schedule::new(ScheduleSpec { epochs: 1, ..spec() }).warmup_batches(), 0);
        assert_eq!(Schedule::new(ScheduleSpec { epochs: 2, ..spec() }).warmup_batches(), 5);
        assert_eq!(Schedule::new(ScheduleSpec { warmup_epochs: 0.5, ..spec() }).warmup_batches(), 2);
    }

    #[test]
    fn decay_counts_the_images_of_a_step() {
        assert_eq!(effective_weight_decay(5e-4, 16, 64), 5e-4);
        assert_eq!(effective_weight_decay(5e-4, 64, 64), 5e-4);
        assert_eq!(effective_weight_decay(5e-4, 128, 64), 1e-3);
        // round(64 / 24) = 3, so 72 images.
        assert!((effective_weight_decay(5e-4, 24, 64) - 5e-4 * 72.0 / 64.0).abs() < 1e-12);
    }

    #[test]
    fn after_the_warmup_nothing_but_the_epoch_matters() {
        let s = Schedule::new(spec());
        assert_eq!(s.accumulate_at(0), 1);
        assert_eq!(s.accumulate_at(15), 4);
        assert_eq!(s.accumulate_at(16), 4);
        let mut groups = crate::engine::optim::groups::build(Algorithm::Sgd, &[], 0.01, 0.9, 0.0, |_| false);
        s.apply(4, 0, &mut groups, true);
        let first = groups[0].clone();
        s.apply(4, 4, &mut groups, true);
        assert_eq!((first.lr, first.momentum), (groups[0].lr, groups[0].momentum));
        assert!((groups[0].lr - 0.01 * s.factor(4)).abs() < 1e-15);
    }

    #[test]
    fn a_batch_that_was_cut_steps_after_whole_batches() {
        let cut = Schedule::new(spec()).with_passes(4);
        for ni in [0, 1, 7, 100, 1000] {
            assert_eq!(cut.accumulate_at(ni), 4 * Schedule::new(spec()).accumulate_at(ni));
        }
    }
}
