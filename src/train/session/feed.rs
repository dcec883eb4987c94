//! Where training batches come from: made on the CPU, or on the GPU that trains on them.

use super::feeding::{augment_args, data_error, loader_args};
use super::network::{Compute, Network};
use crate::data::device_loader::{DeviceBatch, DeviceLoader, DeviceLoaderArgs};
use crate::data::{Batch, DataError, Split, TrainLoader};
use crate::train::args::TrainArgs;
use crate::train::error::TrainError;

/// Batches of the training split.
pub(super) enum Feed {
    Host(TrainLoader),
    Device(DeviceLoader),
}

/// A batch. Where its pixels were made on a GPU, `batch.images` is empty.
pub(super) struct Fed {
    pub batch: Batch,
    pub on_device: Option<DeviceBatch>,
}

impl Feed {
    /// Whether batches are made on the GPU: not where their shapes change, which the CPU does.
    pub fn is_on_device(compute: &Compute, args: &TrainArgs) -> bool {
        matches!(compute, Compute::Cuda { .. }) && !args.rect && args.multi_scale <= 0.0
    }

    /// Opens the loader. On a GPU it takes half of the memory that is still free for decoded images, so everything
    /// else must have been taken before.
    pub fn open(
        compute: &Compute,
        args: &TrainArgs,
        train: &Split,
        batch: usize,
        imgsz: usize,
    ) -> Result<Feed, TrainError> {
        let loader = loader_args(args, batch, imgsz, args.rect);
        let failed = |e| data_error(&args.data, e);
        match compute {
            Compute::Cuda { device, .. } if Feed::is_on_device(compute, args) => {
                let on_device = DeviceLoaderArgs::default();
                let opened = DeviceLoader::new(device, train, loader, augment_args(args), on_device);
                Ok(Feed::Device(opened.map_err(failed)?))
            }
            _ => Ok(Feed::Host(TrainLoader::new(train, loader, augment_args(args)).map_err(failed)?)),
        }
    }

    pub fn notes(&self) -> &[String] {
        match self {
            Feed::Host(loader) => loader.notes(),
            Feed::Device(loader) => loader.notes(),
        }
    }

    pub fn input_max(&self) -> (usize, usize) {
        match self {
            Feed::Host(loader) => loader.input_max(),
            Feed::Device(loader) => loader.input_max(),
        }
    }

    pub fn start_epoch(&mut self, epoch: u32, first_batch: usize, close_mosaic: bool) {
        match self {
            Feed::Host(loader) => loader.start_epoch(epoch, first_batch, close_mosaic),
            Feed::Device(loader) => loader.start_epoch(epoch, first_batch, close_mosaic),
        }
    }

    pub fn next(&mut self) -> Result<Option<Fed>, DataError> {
        match self {
            Feed::Host(loader) => Ok(loader.next()?.map(|batch| Fed { batch, on_device: None })),
            Feed::Device(loader) => Ok(loader.next()?.map(|mut made| {
                let batch = Batch {
                    n: made.n,
                    h: made.h,
                    w: made.w,
                    targets: std::mem::take(&mut made.targets),
                    samples: std::mem::take(&mut made.samples),
                    swapped: std::mem::take(&mut made.swapped),
                    ..Batch::default()
                };
                Fed { batch, on_device: Some(made) }
            })),
        }
    }

    pub fn wait_seconds(&mut self) -> f64 {
        match self {
            Feed::Host(loader) => loader.wait_seconds(),
            Feed::Device(loader) => loader.wait_seconds(),
        }
    }

    /// Gives a batch's memory back; `network` has read its pixels.
    pub fn recycle(&mut self, fed: Fed, network: &Network) -> Result<(), TrainError> {
        match (self, fed.on_device) {
            (Feed::Host(loader), _) => loader.recycle(fed.batch),
            (Feed::Device(loader), Some(made)) => {
                let done = network.mark()?;
                let failed =
                    |e| TrainError::Internal { message: format!("a batch cannot be given back: {e}") };
                loader.recycle(made, &done).map_err(failed)?;
            }
            (Feed::Device(_), None) => {}
        }
        Ok(())
    }
}
