//! The fitness of a model, which model is the best, and when waiting for a better one ends.

use serde::{Deserialize, Serialize};

/// Fitness of a detector: mAP50-95 alone; not a number counts as 0.
pub fn fitness(map50_95: f64) -> f64 {
    if map50_95.is_nan() { 0.0 } else { map50_95 }
}

/// Watches the fitness of each epoch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EarlyStop {
    /// Epochs to wait for an improvement; 0 waits for ever.
    pub patience: u32,
    /// Best fitness so far.
    pub best_fitness: f64,
    /// Epoch (from 1) of the best fitness; 0 before the first.
    pub best_epoch: u32,
}

impl EarlyStop {
    /// Nothing seen yet.
    pub fn new(patience: u32) -> EarlyStop {
        EarlyStop { patience, best_fitness: 0.0, best_epoch: 0 }
    }

    /// Takes the fitness of `epoch` (from 1); true when training should stop.
    ///
    /// A tie moves nothing, except that while the best is 0 every epoch counts as the best, so that
    /// a model that has not begun to detect is not given up before it was given `patience` epochs.
    pub fn observe(&mut self, epoch: u32, fitness: f64) -> bool {
        if fitness > self.best_fitness || self.best_fitness == 0.0 {
            self.best_fitness = fitness;
            self.best_epoch = epoch;
        }
        self.would_stop(epoch)
    }

    /// True when `epoch` is so late that only an improvement in it can keep training going.
    pub fn would_stop(&self, epoch: u32) -> bool {
        self.patience > 0 && epoch.saturating_sub(self.best_epoch) >= self.patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_after_patience_epochs_without_improvement() {
        let mut stop = EarlyStop::new(2);
        assert!(!stop.observe(1, 0.0));
        assert!(!stop.observe(2, 0.0));
        assert!(!stop.observe(3, 0.3));
        assert!(!stop.observe(4, 0.3));
        assert!(stop.observe(5, 0.2));
        assert_eq!((stop.best_epoch, stop.best_fitness), (3, 0.3));
    }

    #[test]
    fn patience_zero_never_stops() {
        let mut stop = EarlyStop::new(0);
        assert!((1..1000).all(|epoch| !stop.observe(epoch, if epoch == 1 { 0.5 } else { 0.1 })));
    }

    #[test]
    fn not_a_number_is_zero() {
        assert_eq!(fitness(f64::NAN), 0.0);
        assert_eq!(fitness(0.25), 0.25);
    }
}
