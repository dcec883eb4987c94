//! What the chip at hand can give at most, measured: bytes per second of a copy, products per second of its tensor
//! cores as `mma.sync` drives them.

use std::sync::Arc;

use super::{Device, DeviceError, Launch, Precision, Stream};

/// Bytes that the copy reads and writes; far more than any cache.
const COPY_BYTES: u64 = 1 << 30;
/// Rounds of products in a launch.
const ROUNDS: u64 = 4096;
/// Operations of a warp in a round: eight products of 16 x 16 by 16 x 8.
const ROUND_FLOPS: u64 = 8 * 2 * 16 * 16 * 8;
/// Launches of which the fastest counts.
const REPEATS: usize = 5;

/// The measured ceilings.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Ceilings {
    /// Bytes read and written together, per second.
    pub bytes_per_s: f64,
    /// Operations per second of the tensor cores; `None` where `mma.sync` is not used.
    pub flops_per_s: Option<f64>,
}

/// Arguments of `ceiling_*`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct CeilingArgs {
    from: u64,
    to: u64,
    count: u64,
}

/// Measures the ceilings; takes some milliseconds and 2 GiB of memory, less on a smaller device.
///
/// # Errors
/// No memory, or a launch failed.
pub fn measure(device: &Arc<Device>, precision: Precision) -> Result<Ceilings, DeviceError> {
    let stream = device.stream()?;
    let module = device.module("ceiling")?;
    // An emulator's figures mean nothing: keep the work small.
    let (most, rounds) = if device.chip().is_emulated() { (1 << 20, 2) } else { (COPY_BYTES, ROUNDS) };
    let bytes = most.min(device.memory()?.free_bytes / 4) / 16 * 16;
    let (from, to) = (device.allocate(bytes as usize)?, device.allocate(bytes as usize)?);
    let blocks = device.chip().multiprocessors * 8;
    let copy = CeilingArgs { from: from.pointer(), to: to.pointer(), count: bytes / 16 };
    let copy_kernel = module.kernel("ceiling_copy")?;
    // SAFETY: both buffers hold `bytes` bytes and outlive the times, which are waited for.
    let seconds = unsafe { fastest(&stream, |s| s.launch(&copy_kernel, Launch::row(blocks, 256), &copy)) }?;
    let flops_per_s = if device.chip().has_tensor_bf16() && precision != Precision::F32 {
        let kernel = module.kernel(&format!("ceiling_mma_{}", precision.suffix()))?;
        let args = CeilingArgs { from: 0, to: to.pointer(), count: rounds };
        assert!(u64::from(blocks) * 256 * 4 <= bytes, "one number for each thread");
        // SAFETY: each thread writes one number to `to`, which is long enough.
        let seconds = unsafe { fastest(&stream, |s| s.launch(&kernel, Launch::row(blocks, 256), &args)) }?;
        Some((u64::from(blocks) * 8 * rounds * ROUND_FLOPS) as f64 / seconds)
    } else {
        None
    };
    Ok(Ceilings { bytes_per_s: 2.0 * bytes as f64 / seconds, flops_per_s })
}

/// Seconds of the fastest of some launches.
///
/// # Safety
/// As the launch itself.
unsafe fn fastest(
    stream: &Stream,
    launch: impl Fn(&Stream) -> Result<(), DeviceError>,
) -> Result<f64, DeviceError> {
    launch(stream)?;
    stream.start_timing();
    for _ in 0..REPEATS {
        launch(stream)?;
    }
    let times = stream.take_times()?;
    let fastest = times.iter().map(|t| f64::from(t.milliseconds) * 1e-3).fold(f64::INFINITY, f64::min);
    Ok(fastest.max(1e-9))
}
