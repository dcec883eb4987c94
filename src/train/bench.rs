//! Timing of training steps on random images: forward, loss, backward, clipping, optimiser, averaging.
//! No data loading, so that it is the same work as a step of the reference's timing script.

use std::time::Instant;

use super::args::Device;
use super::device;
use super::error::TrainError;
use super::session::{Network, initialise};
use crate::data::Batch;
use crate::detect::losses::detection::LossConfig;
use crate::detect::models::Detector;
use crate::detect::targets::Target;
use crate::engine::device::cpu::Profile;
use crate::engine::optim::{Algorithm, Ema, Hyper, Optimizer, clip_grad_norm, groups};
use crate::engine::rng::{Rng, Use};

/// What to time.
#[derive(Clone, Debug)]
pub struct StepBench {
    /// Model name.
    pub model: String,
    /// Classes.
    pub nc: usize,
    /// Side of the square input, pixels.
    pub imgsz: usize,
    /// Images of a batch.
    pub batch: usize,
    /// Boxes of an image.
    pub boxes: usize,
    /// Steps before the clock starts.
    pub warmup: usize,
    /// Timed steps.
    pub steps: usize,
    /// Threads, 0 for all cores.
    pub threads: usize,
    /// The device.
    pub device: Device,
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct StepTimes {
    /// Seconds of each timed step, in order.
    pub seconds: Vec<f64>,
    /// Threads that computed.
    pub threads: usize,
    /// Multiply-accumulates of one image, forward.
    pub macs: u64,
    /// Where the engine's time went, over all timed steps.
    pub profile: Profile,
    /// Seconds of loss, and of clipping, optimiser and averaging, over all timed steps.
    pub loss_seconds: f64,
    /// See `loss_seconds`.
    pub optimiser_seconds: f64,
}

impl StepBench {
    /// Runs the steps.
    ///
    /// # Errors
    /// An unknown model, a wrong size, memory refused.
    pub fn run(&self) -> Result<StepTimes, TrainError> {
        device::cpu_only(self.device, "the timing of steps")?;
        let mut network = Network::new(&self.model, self.nc, LossConfig::new(self.nc), self.threads)?;
        let detector = Detector::build(&self.model, self.nc, self.imgsz, self.imgsz)
            .map_err(|e| TrainError::Config { key: "imgsz".into(), message: e.to_string() })?;
        initialise(&mut network.params, &detector, 0);
        let batch = self.random_batch();
        let tensors = network.params.tensors();
        let groups = groups::build(Algorithm::Sgd, &tensors, 0.01, 0.937, 5e-4, |_| false);
        let len = network.params.values.len();
        let mut optimizer = Optimizer::new(Algorithm::Sgd, Hyper::default(), tensors, groups, len);
        let mut ema = Ema::new(&network.params.values, &network.params.buffers, 0.9999, 2000.0);
        let mut times = StepTimes {
            seconds: Vec::with_capacity(self.steps),
            threads: network.threads(),
            macs: detector.graph.macs(),
            profile: Profile::default(),
            loss_seconds: 0.0,
            optimiser_seconds: 0.0,
        };
        for step in 0..self.warmup + self.steps {
            if step == self.warmup {
                network.take_profile();
                times.optimiser_seconds = 0.0;
            }
            let start = Instant::now();
            network.train(&batch)?;
            let update = Instant::now();
            network.with_params(|params| {
                clip_grad_norm(&mut params.grads, 10.0);
                optimizer.step(&mut params.values, &params.grads);
                params.clear_grads();
                ema.update(&params.values, &params.buffers);
            });
            times.optimiser_seconds += update.elapsed().as_secs_f64();
            if step >= self.warmup {
                times.seconds.push(start.elapsed().as_secs_f64());
            }
        }
        (times.profile, times.loss_seconds) = network.take_profile();
        Ok(times)
    }

    fn random_batch(&self) -> Batch {
        let mut rng = Rng::new(0, Use::Test, 0, 0);
        let mut targets = Vec::with_capacity(self.batch * self.boxes);
        for image in 0..self.batch as u32 {
            for _ in 0..self.boxes {
                let (w, h) = (rng.range(0.02, 0.32), rng.range(0.02, 0.32));
                let (cx, cy) = (rng.range(w / 2.0, 1.0 - w / 2.0), rng.range(h / 2.0, 1.0 - h / 2.0));
                let class = rng.below(self.nc) as u32;
                targets.push(Target { image, class, cxcywh: [cx, cy, w, h].map(|v| v as f32) });
            }
        }
        let bytes = self.batch * self.imgsz * self.imgsz * 3;
        Batch {
            images: (0..bytes).map(|_| rng.next_u32() as u8).collect(),
            n: self.batch,
            h: self.imgsz,
            w: self.imgsz,
            targets,
            ..Batch::default()
        }
    }
}
