//! Timing of training steps on random images: forward, loss, backward, clipping, optimiser, averaging.
//! No data loading, so that it is the same work as a step of the reference's timing script.

use std::time::Instant;

use super::error::TrainError;
use super::session::{Compute, Network, initialise};
use crate::data::Batch;
use crate::detect::losses::detection::LossConfig;
use crate::detect::models::Detector;
use crate::detect::targets::Target;
use crate::engine::device::cpu::Profile;
use crate::engine::optim::{Algorithm, Ema, Hyper, Optimizer, groups};
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
    /// Bytes of GPU memory held; 0 on the CPU.
    pub device_bytes: usize,
}

/// A network with optimiser and average, ready to step.
pub struct StepTrainer {
    /// The network.
    pub network: Network,
    optimizer: Optimizer,
    ema: Ema,
}

impl StepTrainer {
    /// One whole training step; seconds of the update alone.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn step(&mut self, batch: &Batch) -> Result<f64, TrainError> {
        self.network.train(batch, None)?;
        let update = Instant::now();
        self.network.update(&mut self.optimizer, &mut self.ema, 10.0)?;
        Ok(update.elapsed().as_secs_f64())
    }
}

impl StepBench {
    /// The network with fresh weights, SGD and an average.
    ///
    /// # Errors
    /// An unknown model, a wrong size, memory refused.
    pub fn trainer(&self, compute: &Compute) -> Result<StepTrainer, TrainError> {
        let mut network = Network::new(&self.model, self.nc, LossConfig::new(self.nc), compute)?;
        let detector = Detector::build(&self.model, self.nc, self.imgsz, self.imgsz)
            .map_err(|e| TrainError::Config { key: "imgsz".into(), message: e.to_string() })?;
        initialise(&mut network.params, &detector, 0);
        network.use_stored_tuning(); // as a new run does
        let tensors = network.params.tensors();
        let groups = groups::build(Algorithm::Sgd, &tensors, 0.01, 0.937, 5e-4, |_| false);
        let len = network.params.values.len();
        let optimizer = Optimizer::new(Algorithm::Sgd, Hyper::default(), tensors, groups, len);
        let ema = Ema::new(&network.params.values, &network.params.buffers, 0.9999, 2000.0);
        network.push(&optimizer, &ema)?;
        Ok(StepTrainer { network, optimizer, ema })
    }

    /// Runs the steps.
    ///
    /// # Errors
    /// An unknown model, a wrong size, memory refused.
    pub fn run(&self, compute: &Compute) -> Result<StepTimes, TrainError> {
        let mut trainer = self.trainer(compute)?;
        let batch = self.random_batch();
        let mut times = StepTimes {
            seconds: Vec::with_capacity(self.steps),
            threads: trainer.network.threads(),
            macs: trainer.network.macs(self.imgsz, self.imgsz)?,
            profile: Profile::default(),
            loss_seconds: 0.0,
            optimiser_seconds: 0.0,
            device_bytes: 0,
        };
        for step in 0..self.warmup + self.steps {
            if step == self.warmup {
                trainer.network.take_profile();
                times.optimiser_seconds = 0.0;
            }
            let start = Instant::now();
            times.optimiser_seconds += trainer.step(&batch)?;
            if step >= self.warmup {
                times.seconds.push(start.elapsed().as_secs_f64());
            }
        }
        (times.profile, times.loss_seconds) = trainer.network.take_profile();
        times.device_bytes = trainer.network.device_bytes();
        Ok(times)
    }

    /// Random images and boxes.
    pub fn random_batch(&self) -> Batch {
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
