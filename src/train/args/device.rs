//! `device` and `amp`: where a job computes, and in what numbers.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use crate::engine::device::cuda::{Chip, Precision, Probe};
use crate::yaml::Node;

/// Largest number of a GPU that is read.
const ORDINAL_MAX: usize = 1023;
/// What `device` may say.
const DEVICE_ALLOWED: &str = "cpu, cuda, cuda:N, N or [N], or nothing for the best device there is";
/// Why a list of several GPUs is refused.
const ONE_GPU: &str = "one device; training on several GPUs is not supported";

/// `device`: where the job is meant to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "Json", into = "Json")]
pub enum Device {
    /// Not said: the best device that this program can use.
    #[default]
    Default,
    /// The CPU.
    Cpu,
    /// The GPU of this number, as the driver counts those that it shows.
    Cuda(usize),
}

/// Where a job computes on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResolvedDevice {
    /// The CPU.
    Cpu,
    /// The GPU of this number, which can be used.
    Cuda(usize),
}

impl Device {
    /// The device on a machine where `probe` was found.
    ///
    /// # Errors
    /// A GPU was named that is not there or cannot be used: one sentence.
    pub fn resolve(self, probe: &Probe) -> Result<ResolvedDevice, String> {
        let is_usable = |ordinal: &usize| {
            probe.devices.iter().any(|device| device.ordinal == *ordinal && device.refused.is_none())
        };
        let ordinal = match self {
            Self::Cpu => return Ok(ResolvedDevice::Cpu),
            Self::Default => {
                let first = probe.devices.iter().map(|device| device.ordinal).find(is_usable);
                let first = first.filter(|_| probe.obstacle.is_none());
                return Ok(first.map_or(ResolvedDevice::Cpu, ResolvedDevice::Cuda));
            }
            Self::Cuda(ordinal) => ordinal,
        };
        let asked = format!("cuda:{ordinal} was asked for");
        let found = probe.devices.iter().find(|device| device.ordinal == ordinal);
        let reason = match (found, &probe.obstacle) {
            (Some(device), _) if device.refused.is_some() => device.refused.clone(),
            (_, Some(obstacle)) => Some(obstacle.clone()),
            (None, None) => {
                let names: Vec<String> = probe
                    .devices
                    .iter()
                    .map(|device| format!("cuda:{} ({})", device.ordinal, device.chip.name))
                    .collect();
                Some(format!("this machine has {}", names.join(", ")))
            }
            (Some(_), None) => None,
        };
        match reason {
            None => Ok(ResolvedDevice::Cuda(ordinal)),
            Some(reason) => Err(format!("{asked}: {reason}")),
        }
    }
}

/// One GPU by number, `cuda` or `cuda:N`.
fn ordinal(text: &str) -> Option<usize> {
    let number = match text.strip_prefix("cuda") {
        Some("") => return Some(0),
        Some(rest) => rest.strip_prefix(':')?,
        None => text,
    };
    let is_number = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    number.parse().ok().filter(|&ordinal| is_number && ordinal <= ORDINAL_MAX)
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim().to_ascii_lowercase();
        let text = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(&text).trim();
        match text {
            "" | "none" | "null" => Ok(Self::Default),
            "cpu" => Ok(Self::Cpu),
            _ => match ordinal(text) {
                Some(ordinal) => Ok(Self::Cuda(ordinal)),
                None if text.contains(',') => Err(ONE_GPU.to_owned()),
                None => Err(DEVICE_ALLOWED.to_owned()),
            },
        }
    }
}

impl TryFrom<Json> for Device {
    type Error = String;

    fn try_from(json: Json) -> Result<Self, String> {
        match &json {
            Json::Null => Ok(Self::Default),
            Json::Array(items) => match items.as_slice() {
                [Json::Array(_)] | [] => Err(DEVICE_ALLOWED.to_owned()),
                [one] => Self::try_from(one.clone()),
                _ => Err(ONE_GPU.to_owned()),
            },
            single => Node::from_json(single).as_text().ok_or_else(|| DEVICE_ALLOWED.to_owned())?.parse(),
        }
    }
}

impl From<Device> for Json {
    fn from(device: Device) -> Json {
        match device {
            Device::Default => Json::Null,
            Device::Cpu => json!("cpu"),
            Device::Cuda(ordinal) => json!(format!("cuda:{ordinal}")),
        }
    }
}

/// `amp`: precision of the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Json", into = "Json")]
pub enum Amp {
    /// `false`: single precision.
    Off,
    /// `true`: mixed precision where the device has it.
    On,
    /// Half precision with loss scaling.
    Fp16,
    /// Brain float.
    Bf16,
    /// Single precision.
    Fp32,
}

impl TryFrom<Json> for Amp {
    type Error = String;

    fn try_from(json: Json) -> Result<Self, String> {
        let node = Node::from_json(&json);
        match (node.as_bool(), node.as_str().map(str::to_ascii_lowercase).as_deref()) {
            (Some(false), _) => Ok(Self::Off),
            (Some(true), _) => Ok(Self::On),
            (_, Some("fp16")) => Ok(Self::Fp16),
            (_, Some("bf16")) => Ok(Self::Bf16),
            (_, Some("fp32")) => Ok(Self::Fp32),
            _ => Err("true, false, fp16, bf16 or fp32".to_owned()),
        }
    }
}

impl From<Amp> for Json {
    fn from(amp: Amp) -> Json {
        match amp {
            Amp::Off => json!(false),
            Amp::On => json!(true),
            Amp::Fp16 => json!("fp16"),
            Amp::Bf16 => json!("bf16"),
            Amp::Fp32 => json!("fp32"),
        }
    }
}

impl Amp {
    /// What activations are stored in on a chip; `None` stands for the CPU, which computes in single precision.
    ///
    /// # Errors
    /// A precision asked for by name that the device lacks.
    pub fn precision(self, chip: Option<&Chip>) -> Result<Precision, String> {
        match (self, chip) {
            (Self::Off | Self::Fp32, _) | (Self::On, None) => Ok(Precision::F32),
            (Self::On, Some(chip)) => Ok(Precision::mixed(chip)),
            (Self::Fp16, Some(_)) => Ok(Precision::F16),
            (Self::Bf16, Some(chip)) if chip.has_tensor_bf16() => Ok(Precision::Bf16),
            (Self::Bf16, Some(chip)) => Err(format!(
                "{} (compute capability {}.{}) has no bf16; leave `amp` out or write fp16",
                chip.name, chip.major, chip.minor
            )),
            (Self::Fp16 | Self::Bf16, None) => {
                Err("the CPU computes in single precision; leave `amp` out or write false".to_owned())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::device::cuda::Finding;

    fn chip(name: &str, major: u32, minor: u32) -> Chip {
        Chip {
            name: name.to_owned(),
            uuid: "0".repeat(32),
            major,
            minor,
            multiprocessors: 80,
            shared_bytes_max: 99 << 10,
            l2_bytes: 4 << 20,
            memory_bytes: 16 << 30,
        }
    }

    fn probe(chips: &[Chip]) -> Probe {
        let refused = |chip: &Chip| (chip.major < 7).then(|| format!("{} is too old", chip.name));
        let device =
            |(ordinal, chip): (usize, &Chip)| Finding { ordinal, chip: chip.clone(), refused: refused(chip) };
        let devices: Vec<Finding> = chips.iter().enumerate().map(device).collect();
        let obstacle = match devices.iter().all(|d| d.refused.is_some()) {
            true if devices.is_empty() => Some("no NVIDIA driver (libcuda) on this machine".to_owned()),
            true => devices[0].refused.clone(),
            false => None,
        };
        Probe { driver_version: Some(13_000), devices, compiler: Ok("NVRTC".into()), obstacle }
    }

    #[test]
    fn devices_are_read_in_all_their_spellings() {
        let read = |json: Json| Device::try_from(json);
        for json in [json!(null), json!(""), json!("none"), json!("None")] {
            assert_eq!(read(json.clone()), Ok(Device::Default), "{json}");
        }
        for json in [json!("cpu"), json!("CPU"), json!(["cpu"])] {
            assert_eq!(read(json.clone()), Ok(Device::Cpu), "{json}");
        }
        for json in
            [json!(0), json!("0"), json!("cuda"), json!("cuda:0"), json!([0]), json!("[0]"), json!("CUDA:0")]
        {
            assert_eq!(read(json.clone()), Ok(Device::Cuda(0)), "{json}");
        }
        for json in [json!(3), json!("3"), json!("cuda:3"), json!(["cuda:3"]), json!(["3"])] {
            assert_eq!(read(json.clone()), Ok(Device::Cuda(3)), "{json}");
        }
        for json in [json!([0, 1]), json!("0,1"), json!("cuda:0,1"), json!("[0, 1]")] {
            let error = read(json.clone()).expect_err("several");
            assert!(error.contains("training on several GPUs is not supported"), "{json}: {error}");
        }
        let odd = ["gpu", "cuda:", "cuda:x", "cuda1", "-1", "1.5", "mps", "99999", "+1", "cuda:0:1"];
        for json in
            odd.map(|text| json!(text)).into_iter().chain([json!(-1), json!(true), json!([]), json!([[0]])])
        {
            let error = read(json.clone()).expect_err("unknown");
            assert!(error.contains("cuda:N"), "{json}: {error}");
        }
    }

    #[test]
    fn a_device_reads_back_as_it_was_written() {
        for device in [Device::Default, Device::Cpu, Device::Cuda(0), Device::Cuda(7)] {
            assert_eq!(Device::try_from(Json::from(device)), Ok(device));
        }
    }

    #[test]
    fn a_device_is_resolved_on_what_is_there() {
        let none = probe(&[]);
        let one = probe(&[chip("H", 9, 0)]);
        let mixed = probe(&[chip("Old", 6, 1), chip("T", 7, 5)]);
        let old = probe(&[chip("Old", 6, 1)]);
        for probe in [&none, &one, &mixed, &old] {
            assert_eq!(Device::Cpu.resolve(probe), Ok(ResolvedDevice::Cpu));
        }
        assert_eq!(Device::Default.resolve(&none), Ok(ResolvedDevice::Cpu));
        assert_eq!(Device::Default.resolve(&old), Ok(ResolvedDevice::Cpu));
        assert_eq!(Device::Default.resolve(&one), Ok(ResolvedDevice::Cuda(0)));
        assert_eq!(Device::Default.resolve(&mixed), Ok(ResolvedDevice::Cuda(1)));
        assert_eq!(Device::Cuda(1).resolve(&mixed), Ok(ResolvedDevice::Cuda(1)));
        let refused = |device: Device, probe: &Probe, part: &str| {
            let error = device.resolve(probe).expect_err("not there");
            assert!(error.contains(part) && error.contains("was asked for"), "{error}");
        };
        refused(Device::Cuda(0), &none, "no NVIDIA driver");
        refused(Device::Cuda(0), &mixed, "Old is too old");
        refused(Device::Cuda(0), &old, "Old is too old");
        refused(Device::Cuda(2), &one, "this machine has cuda:0 (H)");
        let no_compiler = Probe { obstacle: Some("NVRTC was not found".into()), ..one };
        assert_eq!(Device::Default.resolve(&no_compiler), Ok(ResolvedDevice::Cpu));
        refused(Device::Cuda(0), &no_compiler, "NVRTC was not found");
    }

    #[test]
    fn precision_is_what_the_device_has() {
        let (hopper, turing) = (chip("H", 9, 0), chip("T", 7, 5));
        assert_eq!(Amp::On.precision(Some(&hopper)), Ok(Precision::Bf16));
        assert_eq!(Amp::On.precision(Some(&turing)), Ok(Precision::F16));
        assert_eq!(Amp::On.precision(None), Ok(Precision::F32));
        assert_eq!(Amp::Fp16.precision(Some(&hopper)), Ok(Precision::F16));
        for amp in [Amp::Off, Amp::Fp32] {
            assert_eq!(amp.precision(Some(&hopper)), Ok(Precision::F32));
            assert_eq!(amp.precision(None), Ok(Precision::F32));
        }
        assert!(Amp::Bf16.precision(Some(&turing)).is_err_and(|e| e.contains("T (compute capability 7.5)")));
        assert!(Amp::Bf16.precision(None).is_err_and(|e| e.contains("single precision")));
    }
}
