//! What CUDA this machine has, without a panic and with a sentence for every answer.

use cudarc::driver::result;

use super::compile;
use super::context::{count, describe};
use super::error::{DeviceError, driver};
use super::libraries::{driver_present, driver_version};
use super::{Chip, cache};

/// One device that was looked at.
#[derive(Clone, Debug)]
pub struct Finding {
    /// Number of the GPU.
    pub ordinal: usize,
    /// What it offers.
    pub chip: Chip,
    /// Why it cannot be used; `None` when it can.
    pub refused: Option<String>,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Version of the driver as `1000 * major + 10 * minor`.
    pub driver_version: Option<u32>,
    /// The devices.
    pub devices: Vec<Finding>,
    /// The compiler, or where it was looked for.
    pub compiler: Result<String, String>,
    /// Why no device can be used; `None` when one can.
    pub obstacle: Option<String>,
}

/// Looks for the driver, its devices and the compiler. Never fails and never panics.
pub fn probe() -> Probe {
    let compiler = compile::compiler();
    let mut found = Probe { driver_version: driver_version(), devices: Vec::new(), compiler, obstacle: None };
    match look() {
        Ok(devices) => found.devices = devices,
        Err(error) => {
            found.obstacle = Some(match error {
                DeviceError::Unavailable { reason } => reason,
                other => other.to_string(),
            });
            return found;
        }
    }
    found.obstacle = if found.devices.is_empty() {
        Some("the NVIDIA driver is here and shows no GPU".into())
    } else if let Some(refused) =
        found.devices.iter().map(|d| d.refused.clone()).reduce(Option::and).flatten()
    {
        Some(refused)
    } else {
        compiler_obstacle(&found)
    };
    found
}

/// Without a compiler, kernels compiled earlier may do; without those nothing runs.
fn compiler_obstacle(found: &Probe) -> Option<String> {
    let missing = found.compiler.as_ref().err()?;
    let is_cached = std::fs::read_dir(cache::folder()).is_ok_and(|mut entries| entries.next().is_some());
    (!is_cached).then(|| format!("the run-time compiler NVRTC was not found: {missing}"))
}

fn look() -> Result<Vec<Finding>, DeviceError> {
    initialise()?;
    let mut devices = Vec::new();
    for ordinal in 0..count()? {
        let handle = result::device::get(ordinal as i32).map_err(driver("finding a GPU"))?;
        let chip = describe(handle)?;
        let refused = check_chip(&chip).err().map(|error| match error {
            DeviceError::Unavailable { reason } => reason,
            other => other.to_string(),
        });
        devices.push(Finding { ordinal, chip, refused });
    }
    Ok(devices)
}

/// Makes the driver ready, or says why that cannot be.
pub(super) fn initialise() -> Result<(), DeviceError> {
    let unavailable = |reason: String| DeviceError::Unavailable { reason };
    if !driver_present() {
        return Err(unavailable("no NVIDIA driver (libcuda) on this machine".into()));
    }
    if let Err(error) = result::init() {
        let text = error.error_string().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let name = error.error_name().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        return Err(unavailable(format!("the NVIDIA driver does not start: {name} ({text})")));
    }
    // Code from a newer compiler than the driver knows does not load.
    if let (Some(driver), Some((major, minor))) = (driver_version(), compile::compiler_version())
        && driver / 1000 < major
    {
        return Err(unavailable(format!(
            "the NVIDIA driver speaks CUDA {}.{} and the compiler found is NVRTC {major}.{minor}; \
             update the driver or install NVRTC {}",
            driver / 1000,
            driver % 1000 / 10,
            driver / 1000
        )));
    }
    Ok(())
}

/// Whether the kernels run on a chip.
pub(super) fn check_chip(chip: &Chip) -> Result<(), DeviceError> {
    if (chip.major, chip.minor) >= Chip::OLDEST {
        return Ok(());
    }
    let (major, minor) = Chip::OLDEST;
    Err(DeviceError::Unavailable {
        reason: format!(
            "{} has compute capability {}.{}; {major}.{minor} or later is needed",
            chip.name, chip.major, chip.minor
        ),
    })
}
