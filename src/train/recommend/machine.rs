//! What the devices of this machine can hold when nothing else uses them: the choice that a training run makes, asked for
//! beforehand. What is free at this moment does not count, so the same question has the same answer.

use super::Room;
use crate::detect::models::Detector;
use crate::engine::params::ParamSet;
use crate::train::args::{Batch, BatchPolicy, Device, TrainArgs};
use crate::train::autobatch::{self, DeviceMemory, EmptyDevice, Wish};
use crate::train::device;
use crate::train::error::TrainError;
use crate::train::session::{Compute, batch_on};

/// Images for which no batch is cut short: more than automatic choice takes.
const IMAGES: usize = 1 << 20;

/// A device of this machine, and what of the data its memory depends on.
pub struct Machine {
    compute: Compute,
    host: EmptyDevice,
    nc: usize,
    boxes_max: usize,
}

impl Machine {
    /// Opens the device that `wanted` means, for `nc` classes and at most `boxes_max` boxes in an image.
    ///
    /// # Errors
    /// [`TrainError::Config`] when it is not there or cannot be used; [`TrainError::Device`].
    pub fn open(wanted: Device, nc: usize, boxes_max: usize) -> Result<Machine, TrainError> {
        let compute = device::open(wanted, TrainArgs::default().amp, 0)?;
        Ok(Machine { compute, host: EmptyDevice::host(), nc, boxes_max })
    }

    /// What a recommendation for this device must not be used without: its name and memory, whatever is free of it.
    pub fn identity(&self) -> String {
        let total = match &self.compute {
            Compute::Cpu { .. } => self.host.total(),
            Compute::Cuda { device, .. } => device.chip().memory_bytes,
        };
        format!("{} {} MiB", self.device(), total >> 20)
    }

    fn ask(&self, model: &str, imgsz: usize, batch: Batch) -> Result<autobatch::Choice, TrainError> {
        if let Compute::Cuda { .. } = &self.compute {
            let imgsz = u32::try_from(imgsz).unwrap_or(u32::MAX);
            let args = TrainArgs { model: model.to_owned(), imgsz, batch, ..TrainArgs::default() };
            return batch_on(&args, &self.compute, self.nc, (IMAGES, self.boxes_max));
        }
        // Without the threads that a network on the CPU would start.
        let detector = Detector::build(model, self.nc, imgsz, imgsz)
            .map_err(|error| TrainError::Config { key: "model".into(), message: error.to_string() })?;
        let params = ParamSet::new(&detector.graph);
        let wish = Wish {
            batch,
            policy: BatchPolicy::default(),
            images: IMAGES,
            auto_share: autobatch::AUTO_SHARE_HOST,
            share_max: 1.0,
        };
        let needed = |batch| autobatch::host_bytes(&detector, &params, batch);
        autobatch::choose(&wish, &mut { self.host }, &needed).map_err(|refusal| refusal.error(imgsz))
    }
}

impl Room for Machine {
    fn device(&self) -> String {
        match &self.compute {
            Compute::Cpu { .. } => "the CPU".to_owned(),
            Compute::Cuda { device, .. } => format!("cuda:{} {}", device.ordinal(), device.chip().name),
        }
    }

    fn is_gpu(&self) -> bool {
        matches!(self.compute, Compute::Cuda { .. })
    }

    fn largest(&self, model: &str, imgsz: usize) -> Result<usize, TrainError> {
        self.ask(model, imgsz, Batch::Auto).map(|choice| choice.batch)
    }

    fn bytes(&self, model: &str, imgsz: usize, batch: usize) -> Result<u64, TrainError> {
        let batch = Batch::Images(u32::try_from(batch).unwrap_or(u32::MAX));
        self.ask(model, imgsz, batch).map(|choice| choice.bytes)
    }
}
