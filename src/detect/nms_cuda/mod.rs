//! From raw head outputs to detections on a CUDA device (`kernels/nms.cu`).
//!
//! [`DeviceNms::detect`] queues ten kernels, [`DeviceNms::read`] fetches what was found: a few hundred boxes instead of
//! all logits. The result is that of the CPU's [`detect`](super::decode::detect), to the bit.

#[cfg(test)]
mod tests;

use super::decode::logit_below;
use super::head_cuda::{self, DeviceHeadLevel, LEVELS_MAX, LevelArgs};
use super::nms::{Detection, NmsArgs};
use crate::engine::device::cuda::{Buffer, DeviceError, FastDivisor, Kernel, Launch, Precision, Stream};

/// Values of a digit of the selection.
const BINS: usize = 2048;
/// Lowest bits of the digits, the highest digit first.
const SHIFTS: [u32; 6] = [53, 42, 31, 20, 9, 0];
/// Blocks of an image in the selection.
const SELECT_BLOCKS: u32 = 32;
/// Every array starts at a multiple of this, bytes.
const ALIGNMENT: usize = 256;

/// `struct NmsState`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct State {
    threshold: u64,
    count: u32,
    listed: u32,
    remaining: u32,
    arrived: u32,
    low: u32,
    high: u32,
    not_finite: u32,
    kept: u32,
    reserved: [u32; 2],
}

/// `struct Detection` of the kernels.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Row {
    xyxy: [f32; 4],
    score: f32,
    class: u32,
}

/// `struct NmsArgs` of the kernels.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct KernelArgs {
    levels: [LevelArgs; LEVELS_MAX],
    groups: FastDivisor,
    iou: f64,
    corners: u64,
    keys: u64,
    states: u64,
    histograms: u64,
    detections: u64,
    classes: u64,
    n: u32,
    anchors: u32,
    level_count: u32,
    nc: u32,
    reg_max: u32,
    units: u32,
    class_bits: u32,
    max_nms: u32,
    max_det: u32,
    is_agnostic: u32,
    is_second: u32,
    shift: u32,
    conf: f32,
    logit_min: f32,
}

/// What a [`DeviceNms`] has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NmsCapacity {
    /// Images of a batch.
    pub max_batch: usize,
    /// Anchor points of an image at the largest input size.
    pub max_anchors: usize,
    /// Number of classes.
    pub nc: usize,
    /// Bins per side.
    pub reg_max: usize,
}

#[derive(Clone, Copy)]
struct Layout {
    corners: usize,
    keys: usize,
    states: usize,
    histograms: usize,
    detections: usize,
    classes: usize,
    bytes: usize,
}

impl Layout {
    fn new(args: &NmsArgs, capacity: &NmsCapacity) -> Layout {
        let n = capacity.max_batch;
        let mut end = 0usize;
        let mut take = |bytes: usize| {
            let at = end;
            end = (at + bytes).next_multiple_of(ALIGNMENT);
            at
        };
        let layout = Layout {
            corners: take(n * capacity.max_anchors * 16),
            keys: take(n * key_count(args, capacity) * 8),
            states: take(n * size_of::<State>()),
            histograms: take(n * BINS * 4),
            detections: take(n * args.max_det * size_of::<Row>()),
            classes: take(capacity.nc.div_ceil(32) * 4),
            bytes: 0,
        };
        Layout { bytes: end, ..layout }
    }
}

/// Keys kept for an image.
fn key_count(args: &NmsArgs, capacity: &NmsCapacity) -> usize {
    args.max_nms.min(capacity.max_anchors * capacity.nc).max(1)
}

/// Decoding and suppression with their buffers on the device.
pub struct DeviceNms {
    args: NmsArgs,
    capacity: NmsCapacity,
    is_multi_label: bool,
    decode: Kernel,
    collect: Kernel,
    select: Kernel,
    suppress: Kernel,
    layout: Layout,
    workspace: Buffer,
}

impl DeviceNms {
    /// Bytes of device memory for that room, exact.
    pub fn bytes(args: &NmsArgs, capacity: &NmsCapacity) -> usize {
        Layout::new(args, capacity).bytes
    }

    /// Loads the kernels and allocates.
    ///
    /// # Panics
    /// When anchor points times classes do not fit 32 bits.
    ///
    /// # Errors
    /// A kernel does not load, memory is refused.
    pub fn new(stream: &Stream, args: NmsArgs, capacity: NmsCapacity) -> Result<DeviceNms, DeviceError> {
        assert!(capacity.max_batch >= 1 && capacity.max_anchors >= 1 && capacity.nc >= 1, "{capacity:?}");
        assert!((capacity.max_anchors as u64) << class_bits(capacity.nc) < 1 << 32, "{capacity:?}");
        let module = stream.device().module("nms")?;
        let layout = Layout::new(&args, &capacity);
        let workspace = stream.device().allocate(layout.bytes)?;
        // SAFETY: within the buffer, just allocated. The histograms must be zero before the first use.
        unsafe {
            let histograms = workspace.pointer() + layout.histograms as u64;
            stream.fill(histograms, 0, capacity.max_batch * BINS * 4)?;
        }
        if let Some(classes) = &args.classes {
            let mut bits = vec![0u32; capacity.nc.div_ceil(32)];
            classes.iter().filter(|&&c| c < capacity.nc).for_each(|c| bits[c / 32] |= 1 << (c % 32));
            stream.upload(&workspace, layout.classes, &bits)?;
        }
        let is_multi_label = args.multi_label && capacity.nc > 1;
        let which = if is_multi_label { "all" } else { "best" };
        Ok(DeviceNms {
            is_multi_label,
            decode: module.kernel("nms_decode")?,
            collect: module.kernel(&format!("nms_collect_{which}"))?,
            select: module.kernel(&format!("nms_select_{which}"))?,
            suppress: module.kernel("nms_suppress")?,
            args,
            capacity,
            layout,
            workspace,
        })
    }

    /// How candidates are chosen.
    pub fn args(&self) -> &NmsArgs {
        &self.args
    }

    /// What there is room for.
    pub fn capacity(&self) -> NmsCapacity {
        self.capacity
    }

    /// Queues decoding and suppression of `n` images. May be captured.
    ///
    /// # Safety
    /// The logits lie in live memory of this device, and nothing writes them or this object's memory meanwhile.
    ///
    /// # Panics
    /// When shapes do not fit each other or the capacity.
    ///
    /// # Errors
    /// The driver refuses a launch.
    pub unsafe fn detect(
        &self,
        stream: &Stream,
        levels: &[DeviceHeadLevel],
        n: usize,
    ) -> Result<(), DeviceError> {
        let mut args = self.kernel_args(levels, n);
        let by_image = |blocks: u32| Launch { grid: [blocks, n as u32, 1], threads: 256, shared_bytes: 0 };
        let collect = by_image(args.units.div_ceil(256));
        // SAFETY: the caller's promise for the logits; the workspace is sized for the capacity that was checked, and
        // the stream orders these launches.
        let launch = |kernel: &Kernel, launch: Launch, args: &KernelArgs| unsafe {
            stream.launch(kernel, launch, args)
        };
        launch(&self.decode, by_image(args.anchors.div_ceil(64)), &args)?;
        launch(&self.collect, collect, &args)?;
        // With room for every candidate there is nothing to select.
        if (args.max_nms as usize) < args.anchors as usize * self.capacity.nc {
            for shift in SHIFTS {
                args.shift = shift;
                launch(&self.select, by_image(SELECT_BLOCKS), &args)?;
            }
            args.is_second = 1;
            launch(&self.collect, collect, &args)?;
        }
        launch(&self.suppress, Launch::row(n as u32, 1024), &args)
    }

    /// Waits and reads the detections of the `n` images of the last [`DeviceNms::detect`], the best first.
    ///
    /// # Errors
    /// The driver refuses, or queued work failed.
    pub fn read(&self, stream: &Stream, n: usize) -> Result<Vec<Vec<Detection>>, DeviceError> {
        assert!(n <= self.capacity.max_batch, "{n} images, room for {}", self.capacity.max_batch);
        let mut states = vec![<State as bytemuck::Zeroable>::zeroed(); n];
        stream.download(&self.workspace, self.layout.states, &mut states)?;
        let max_det = self.args.max_det;
        let most = states.iter().map(|state| state.kept as usize).max().unwrap_or(0);
        let mut rows = vec![<Row as bytemuck::Zeroable>::zeroed(); if most == 0 { 0 } else { n * max_det }];
        stream.download(&self.workspace, self.layout.detections, &mut rows)?;
        let of_image = |(image, state): (usize, &State)| {
            let rows = rows.get(image * max_det..).unwrap_or_default();
            let found = rows.iter().take(state.kept as usize);
            found.map(|row| Detection { xyxy: row.xyxy, score: row.score, class: row.class }).collect()
        };
        Ok(states.iter().enumerate().map(of_image).collect())
    }

    fn kernel_args(&self, levels: &[DeviceHeadLevel], n: usize) -> KernelArgs {
        let NmsCapacity { max_batch, max_anchors, nc, reg_max } = self.capacity;
        assert!((1..=max_batch).contains(&n), "{n} images, room for {max_batch}");
        let anchors = head_cuda::check(levels, n, nc, reg_max);
        assert!((1..=max_anchors).contains(&anchors), "{anchors} anchor points, room for {max_anchors}");
        let mut table: [LevelArgs; LEVELS_MAX] = bytemuck::Zeroable::zeroed();
        let mut first = 0;
        for (row, level) in table.iter_mut().zip(levels) {
            *row = LevelArgs::new(level, Precision::F32);
            row.first = first;
            first += level.boxes.h * level.boxes.w;
        }
        let groups = if self.is_multi_label { nc.div_ceil(8) } else { 1 };
        let at = |offset: usize| self.workspace.pointer() + offset as u64;
        KernelArgs {
            levels: table,
            groups: FastDivisor::new(groups as u32),
            iou: self.args.iou,
            corners: at(self.layout.corners),
            keys: at(self.layout.keys),
            states: at(self.layout.states),
            histograms: at(self.layout.histograms),
            detections: at(self.layout.detections),
            classes: if self.args.classes.is_some() { at(self.layout.classes) } else { 0 },
            n: n as u32,
            anchors: anchors as u32,
            level_count: levels.len() as u32,
            nc: nc as u32,
            reg_max: reg_max as u32,
            units: (anchors * groups) as u32,
            class_bits: class_bits(nc),
            max_nms: key_count(&self.args, &self.capacity) as u32,
            max_det: if self.args.max_nms == 0 { 0 } else { self.args.max_det as u32 },
            is_agnostic: u32::from(self.args.agnostic),
            is_second: 0,
            shift: 0,
            conf: self.args.conf,
            logit_min: logit_below(self.args.conf),
        }
    }
}

/// Bits that hold a class index.
fn class_bits(nc: usize) -> u32 {
    nc.next_power_of_two().ilog2()
}
