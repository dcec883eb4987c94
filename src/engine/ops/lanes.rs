//! How kernels walk over the pixels of a map with one thread for each group of channels: `kernels/lanes.cuh`.

use crate::engine::device::cuda::{DeviceError, FastDivisor, Kernel, Launch, Precision, Tensor};
use crate::engine::device::cuda::{Module, Stream};
use std::sync::Arc;

/// Threads of a block.
pub(crate) const THREADS: u32 = 256;

/// Twin of `struct Walk`.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct Walk {
    width: FastDivisor,
    height: FastDivisor,
    groups: FastDivisor,
    pixels: u32,
    pad: u32,
    slots: u32,
    group_count: u32,
}

impl Walk {
    /// Over `map` and `pad` pixels around it. `vector`: a group is eight channels, not one.
    pub fn new(map: &Tensor, pad: u32, vector: bool) -> Walk {
        let group_count = if vector { map.c / 8 } else { map.c };
        let groups = group_count.min(THREADS);
        let (h, w) = (map.h + 2 * pad, map.w + 2 * pad);
        let pixels = u64::from(map.n) * u64::from(h) * u64::from(w);
        assert!(pixels > 0 && pixels < 1 << 31 && groups > 0, "a map of {map:?}");
        Walk {
            width: FastDivisor::new(w),
            height: FastDivisor::new(h),
            groups: FastDivisor::new(groups),
            pixels: pixels as u32,
            pad,
            slots: THREADS / groups,
            group_count,
        }
    }

    /// Steps of `per_thread` pixels a thread that cover the map.
    pub fn chunks(&self, per_thread: u32) -> u32 {
        self.pixels.div_ceil(per_thread * self.slots)
    }

    /// Blocks along the channels.
    pub fn channel_blocks(&self) -> u32 {
        self.group_count.div_ceil(self.group_count.min(THREADS))
    }

    /// Blocks for `chunks` steps: a few waves, each block with as many steps as the others.
    pub fn launch(&self, chunks: u32, blocks_max: u32) -> Launch {
        Launch {
            grid: [even(chunks, blocks_max), self.channel_blocks(), 1],
            threads: THREADS,
            shared_bytes: 0,
        }
    }
}

/// At most about `blocks_max` blocks that share `chunks` evenly.
pub(crate) fn even(chunks: u32, blocks_max: u32) -> u32 {
    chunks.div_ceil(chunks.div_ceil(blocks_max.max(1)).max(1)).max(1)
}

/// Whether all these views can be moved eight channels at a time.
pub(crate) fn vectors(precision: Precision, tensors: &[Tensor]) -> bool {
    tensors.iter().all(|t| t.data == 0 || (t.c.is_multiple_of(8) && t.is_aligned(precision)))
}

/// A kernel in its two forms: eight channels to a thread, or one.
#[derive(Clone)]
pub(crate) struct Forms {
    vector: Kernel,
    scalar: Kernel,
}

impl Forms {
    /// `<name>_<type>` and `<name>_scalar_<type>`.
    pub fn load(module: &Arc<Module>, name: &str, precision: Precision) -> Result<Forms, DeviceError> {
        let suffix = precision.suffix();
        Ok(Forms {
            vector: module.kernel(&format!("{name}_{suffix}"))?,
            scalar: module.kernel(&format!("{name}_scalar_{suffix}"))?,
        })
    }

    /// The one to use.
    pub fn pick(&self, vector: bool) -> &Kernel {
        if vector { &self.vector } else { &self.scalar }
    }
}

/// Launches a kernel that handles one pixel of a walk in each thread and step.
///
/// # Safety
/// As [`Stream::launch`].
pub(crate) unsafe fn sweep<A: bytemuck::Pod>(
    stream: &Stream,
    kernel: &Kernel,
    walk: &Walk,
    args: &A,
) -> Result<(), DeviceError> {
    let blocks_max = stream.device().chip().multiprocessors * 16;
    // SAFETY: the caller's promise.
    unsafe { stream.launch(kernel, walk.launch(walk.chunks(1), blocks_max), args) }
}
