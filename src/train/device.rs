//! The device that a session, a validation, a prediction or a measurement computes on.

use super::args::{Amp, Device, ResolvedDevice};
use super::error::TrainError;
use super::session::Compute;
use crate::engine::device::cuda::{Device as CudaDevice, DeviceError, Probe, probe};

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

/// The GPU of this identity ([`Chip::identity`](crate::engine::device::cuda::Chip::identity)), whatever its number now.
///
/// # Errors
/// [`TrainError::Device`] when it is not there any more: another GPU may take the job.
pub fn by_identity(uuid: &str) -> Result<Device, TrainError> {
    let found = probe();
    let usable = found.devices.iter().filter(|device| device.refused.is_none() && found.obstacle.is_none());
    let number =
        usable.into_iter().find(|device| device.chip.identity() == uuid).map(|device| device.ordinal);
    number.map(Device::Cuda).ok_or_else(|| {
        let shown: Vec<String> = found.devices.iter().map(|device| device.chip.identity()).collect();
        let meaning = found.obstacle.unwrap_or_else(|| format!("the driver shows {}", shown.join(", ")));
        let source = DeviceError::Driver {
            operation: format!("finding the GPU {uuid}"),
            code: "no such GPU".into(),
            meaning,
            queued: Vec::new(),
        };
        TrainError::Device { action: "start", source }
    })
}

/// Opens the device of this machine that `wanted` means and settles the precision that `amp` means there. The CPU
/// computes on `threads` threads, 0 takes all cores.
///
/// # Errors
/// As [`resolve`]; a precision that the device lacks; the driver does not open the GPU.
pub fn open(wanted: Device, amp: Amp, threads: usize) -> Result<Compute, TrainError> {
    let config = |key: &str, message: String| TrainError::Config { key: key.into(), message };
    match resolve(wanted)? {
        ResolvedDevice::Cpu => {
            amp.precision(None).map_err(|message| config("amp", message))?;
            Ok(Compute::Cpu { threads })
        }
        ResolvedDevice::Cuda(ordinal) => {
            let failed = |source| TrainError::Device { action: "start", source };
            let device = CudaDevice::open(ordinal).map_err(failed)?;
            let precision = amp.precision(Some(device.chip())).map_err(|message| config("amp", message))?;
            Ok(Compute::Cuda { device, precision })
        }
    }
}

/// What to tell somebody who named no device, has a GPU's driver and computes on the CPU all the same: why.
pub fn remark(wanted: Device, chosen: &Compute) -> Option<String> {
    let is_left_out = wanted == Device::Default && matches!(chosen, Compute::Cpu { .. });
    is_left_out.then(probe).and_then(|found| left_out(&found))
}

fn left_out(found: &Probe) -> Option<String> {
    found.driver_version?;
    let reason = found.obstacle.as_deref()?;
    Some(format!("computing on the CPU although there is an NVIDIA driver: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_is_left_out_is_spoken_of() {
        let found = |driver_version, obstacle: Option<&str>| Probe {
            driver_version,
            devices: Vec::new(),
            compiler: Err("looked in vain".into()),
            obstacle: obstacle.map(str::to_owned),
        };
        let said = left_out(&found(Some(13000), Some("NVRTC was not found"))).expect("a remark");
        assert!(said.contains("on the CPU") && said.ends_with("NVRTC was not found"), "{said}");
        assert_eq!(left_out(&found(None, Some("no NVIDIA driver"))), None, "nothing to miss");
        assert_eq!(left_out(&found(Some(13000), None)), None);
        assert_eq!(remark(Device::Cpu, &Compute::Cpu { threads: 1 }), None, "the CPU was meant");
    }
}
