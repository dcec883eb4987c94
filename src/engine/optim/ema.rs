//! Exponential moving average of a model.

use rayon::prelude::*;

use super::CHUNK;

/// Moving average of parameters and normalisation buffers; the model that is validated and saved.
///
/// After the u-th update d = decay * (1 - e^(-u / tau)); average = d * average + (1 - d) * model.
#[derive(Clone, Debug)]
pub struct Ema {
    /// Averaged parameters.
    pub values: Vec<f32>,
    /// Averaged running statistics.
    pub buffers: Vec<f32>,
    /// Updates so far.
    pub updates: u64,
    decay: f64,
    tau: f64,
}

impl Ema {
    /// Decay approached after many updates.
    pub const DECAY: f64 = 0.9999;
    /// Updates over which the decay ramps up.
    pub const TAU: f64 = 2000.0;

    /// Starts at the model itself.
    pub fn new(values: &[f32], buffers: &[f32], decay: f64, tau: f64) -> Ema {
        Ema { values: values.to_vec(), buffers: buffers.to_vec(), updates: 0, decay, tau }
    }

    /// Moves the average towards the model.
    pub fn update(&mut self, values: &[f32], buffers: &[f32]) {
        self.updates += 1;
        let (keep, take) = self.shares(self.updates);
        blend(&mut self.values, values, keep, take);
        blend(&mut self.buffers, buffers, keep, take);
    }

    /// What update `update` (counted from 1) keeps of the average and takes of the model.
    pub(super) fn shares(&self, update: u64) -> (f32, f32) {
        let d = self.decay * (1.0 - (-(update as f64) / self.tau).exp());
        (d as f32, (1.0 - d) as f32)
    }
}

fn blend(average: &mut [f32], model: &[f32], keep: f32, take: f32) {
    assert_eq!(average.len(), model.len());
    average.par_chunks_mut(CHUNK).zip(model.par_chunks(CHUNK)).for_each(|(average, model)| {
        for (a, &m) in average.iter_mut().zip(model) {
            *a = *a * keep + take * m;
        }
    });
}
