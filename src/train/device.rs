//! The device that a session, a validation, a prediction or a measurement computes on.

use std::sync::Arc;

use super::args::{Amp, Device, ResolvedDevice};
use super::error::TrainError;
use crate::engine::device::cuda::{Device as CudaDevice, Precision, probe};

/// The device of this machine that `wanted` means.
///
/// # Errors
/// [`TrainError::Config`] with one sentence when a GPU is named that is not there or cannot be used.
pub fn resolve(wanted: Device) -> Result<ResolvedDevice, TrainError> {
    // Looking for GPUs starts the driver, which takes time and memory.
    if wanted == Device::Cpu {
        return Ok(ResolvedDevice::Cpu);
    }
    wanted.resolve(&probe()).map_err(|message| TrainError::Config { key: "device".into(), message })
}

/// Refuses a GPU that is named for work that only the CPU does; the best device there is means the CPU here.
///
/// # Errors
/// As [`resolve`], or a sentence that says what computes on the CPU.
pub fn cpu_only(wanted: Device, work: &str) -> Result<(), TrainError> {
    let Device::Cuda(ordinal) = wanted else { return Ok(()) };
    resolve(wanted)?;
    let message = format!("cuda:{ordinal} was asked for; {work} computes on the CPU in this version");
    Err(TrainError::Config { key: "device".into(), message })
}

/// A device that is ready.
#[derive(Clone)]
pub enum Opened {
    /// The CPU.
    Cpu,
    /// A GPU and the storage of activations on it.
    Cuda(Arc<CudaDevice>, Precision),
}

/// Opens the device of this machine that `wanted` means and settles the precision that `amp` means there.
///
/// # Errors
/// As [`resolve`]; a precision that the device lacks; the driver does not open the GPU.
pub fn open(wanted: Device, amp: Amp) -> Result<Opened, TrainError> {
    let config = |key: &str, message: String| TrainError::Config { key: key.into(), message };
    match resolve(wanted)? {
        ResolvedDevice::Cpu => {
            amp.precision(None).map_err(|message| config("amp", message))?;
            Ok(Opened::Cpu)
        }
        ResolvedDevice::Cuda(ordinal) => {
            let device = CudaDevice::open(ordinal).map_err(|error| config("device", error.to_string()))?;
            let precision = amp.precision(Some(device.chip())).map_err(|message| config("amp", message))?;
            Ok(Opened::Cuda(device, precision))
        }
    }
}
