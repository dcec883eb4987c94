//! The kernels of `kernels/augment.cu`.

use std::collections::HashMap;
use std::sync::Arc;

use super::tables::{Offsets, Tables, tap};
use crate::data::DataError;
use crate::data::resize::{column_of, row_of};
use crate::engine::device::cuda::{Buffer, Device, DeviceError, Kernel, Launch, Stream};

/// Sides of the square of pixels that a block makes.
const TILE: usize = 32;
/// Threads of a block.
const THREADS: u32 = 256;
/// Bytes that whole words may reach past the last pixel of an image: every buffer that is read has them.
pub(super) const SPARE_BYTES: usize = 16;

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct AugmentArgs {
    samples: u64,
    bases: u64,
    growth: u64,
    taps: u64,
    images: u64,
    h: u32,
    w: u32,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct ResizeArgs {
    from: u64,
    to: u64,
    taps: u64,
    source_h: u32,
    source_w: u32,
    h: u32,
    w: u32,
}

fn launch_of(n: usize, (h, w): (usize, usize)) -> Launch {
    Launch {
        grid: [w.div_ceil(TILE) as u32, h.div_ceil(TILE) as u32, n as u32],
        threads: THREADS,
        shared_bytes: 0,
    }
}

/// What makes batches of decoded images.
pub(super) struct AugmentKernels {
    plain: Kernel,
    everything: Kernel,
}

impl AugmentKernels {
    /// Compiles them, if need be.
    pub fn load(device: &Arc<Device>) -> Result<AugmentKernels, DeviceError> {
        let module = device.module("augment")?;
        Ok(AugmentKernels {
            plain: module.kernel("augment_gather")?,
            everything: module.kernel("augment_gather_turned")?,
        })
    }

    /// Queues the making of a batch at `images` from `tables`, which were written to `table` with these offsets.
    ///
    /// # Safety
    /// `table` is live memory of the device that holds the tables when the kernel runs; the images they name are live,
    /// have [`SPARE_BYTES`] behind them, and are not written meanwhile; `images` has room for all.
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        tables: &Tables,
        (table, offsets): (u64, Offsets),
        images: u64,
        (h, w): (usize, usize),
    ) -> Result<(), DeviceError> {
        let args = AugmentArgs {
            samples: table + offsets.samples,
            bases: table + offsets.bases,
            growth: table + offsets.growth,
            taps: table + offsets.taps,
            images,
            h: h as u32,
            w: w as u32,
        };
        let kernel = if tables.needs_everything() { &self.everything } else { &self.plain };
        // SAFETY: the addresses are the caller's promise; every tile lies in an image of the batch or is cut to it.
        unsafe { stream.launch(kernel, launch_of(tables.len(), (h, w)), &args) }
    }
}

/// Scales batches on the device, as [`crate::data::resize_batch`] does; for `multi_scale`.
pub struct DeviceResizer {
    device: Arc<Device>,
    kernel: Kernel,
    out: Buffer,
    /// Tables by height and width before and after.
    taps: HashMap<[usize; 4], Buffer>,
}

impl DeviceResizer {
    /// For results of up to `images` images of `h` x `w`.
    ///
    /// # Errors
    /// No memory, or the kernel does not load.
    pub fn new(
        device: &Arc<Device>,
        images: usize,
        (h, w): (usize, usize),
    ) -> Result<DeviceResizer, DataError> {
        let kernel = device.module("augment")?.kernel("augment_resize")?;
        let out = device.allocate(images * h * w * 3 + SPARE_BYTES)?;
        Ok(DeviceResizer { device: Arc::clone(device), kernel, out, taps: HashMap::new() })
    }

    /// Queues the scaling of `n` images at the device address `images` from one height and width to another. Returns
    /// the address of the result, which the next call on any stream overwrites.
    ///
    /// # Safety
    /// `images` holds that many images and 16 more bytes, until the work has run; work that reads the last result is
    /// ordered with `stream`.
    ///
    /// # Errors
    /// The driver refuses.
    pub unsafe fn resize(
        &mut self,
        stream: &Stream,
        images: u64,
        n: usize,
        from: (usize, usize),
        to: (usize, usize),
    ) -> Result<u64, DataError> {
        let bytes = n * to.0 * to.1 * 3;
        assert!(bytes + SPARE_BYTES <= self.out.bytes(), "{n} images of {to:?} are more than was asked for");
        let key = [from.0, from.1, to.0, to.1];
        if !self.taps.contains_key(&key) {
            let columns = (0..to.1).map(|x| tap(column_of(x, to.1, from.1)));
            let taps: Vec<u32> = columns.chain((0..to.0).map(|y| tap(row_of(y, to.0, from.0)))).collect();
            let buffer = self.device.allocate(taps.len() * 4)?;
            stream.upload(&buffer, 0, &taps)?;
            self.taps.insert(key, buffer);
        }
        let args = ResizeArgs {
            from: images,
            to: self.out.pointer(),
            taps: self.taps[&key].pointer(),
            source_h: from.0 as u32,
            source_w: from.1 as u32,
            h: to.0 as u32,
            w: to.1 as u32,
        };
        // SAFETY: the source is the caller's promise, the result fits by the assertion, the table has a tap for every
        // column and row, each inside the source.
        unsafe { stream.launch(&self.kernel, launch_of(n, to), &args) }?;
        Ok(self.out.pointer())
    }
}
