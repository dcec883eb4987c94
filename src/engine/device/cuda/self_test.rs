//! Whether a GPU works: a copy there, a kernel, a copy back, compared number by number.

use super::{Device, DeviceError, Launch};

/// Numbers that are sent: small enough to be nothing, many enough for every multiprocessor.
const COUNT: usize = 1 << 20;

/// Arguments of `cast_f16`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct CastArgs {
    values: u64,
    out: u64,
    count: u64,
}

/// Number `i`: exact in half precision, so that every correct GPU gives the same bits.
fn number(i: usize) -> f32 {
    (i % 2039) as f32 - 1019.0
}

/// Opens GPU `ordinal` and computes on it. `None` when all is well, else what is wrong.
///
/// # Errors
/// The GPU cannot be opened, or the driver refuses something.
pub fn self_test(ordinal: usize) -> Result<Option<String>, DeviceError> {
    let device = Device::open(ordinal)?;
    let stream = device.stream()?;
    // An emulated device computes on the CPU: fewer numbers say as much.
    let count = if device.chip().is_emulated() { COUNT / 64 } else { COUNT };
    let values: Vec<f32> = (0..count).map(number).collect();
    let from = device.allocate(count * 4)?;
    let to = device.allocate(count * 2)?;
    stream.upload(&from, 0, &values)?;
    let kernel = device.module("cast")?.kernel("cast_f16")?;
    let args = CastArgs { values: from.pointer(), out: to.pointer(), count: count as u64 };
    // SAFETY: both buffers hold `count` numbers of their type, which is a multiple of 16, and live until the
    // download below has waited for the kernel; nothing else uses them.
    unsafe { stream.launch(&kernel, Launch::cover(count as u64 / 8, 256), &args)? };
    let mut out = vec![half::f16::ZERO; count];
    stream.download(&to, 0, &mut out)?;
    let wrong = values.iter().zip(&out).filter(|(value, out)| out.to_f32() != **value).count();
    Ok((wrong > 0).then(|| format!("{wrong} of {count} numbers came back wrong from a test kernel")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sound_device_passes() {
        let device = super::super::testing::devices().swap_remove(0);
        let fault = self_test(device.ordinal()).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(fault, None);
    }
}
