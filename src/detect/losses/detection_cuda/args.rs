//! What the kernels of `kernels/detection.cuh` are given, and where everything lies in device memory.

use crate::detect::head_cuda::{DeviceHeadLevel, LEVELS_MAX, LevelArgs};
use crate::engine::device::cuda::{FastDivisor, Precision};

use super::super::detection::LossConfig;
use super::LossCapacity;

/// Anchors that a box may choose.
pub(super) const TOPK_MAX: usize = 16;
/// Units of eight classes that one block of the class term works on.
const UNITS_PER_BLOCK: usize = 1024;
/// Blocks of the box term for one image; fixed, because it fixes the order of sums.
const BOX_BLOCKS_PER_IMAGE: usize = 8;
/// Every array starts at a multiple of this.
const ALIGNMENT: usize = 256;

/// `struct DetectionArgs`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct DetectionArgs {
    pub levels: [LevelArgs; LEVELS_MAX],
    groups: FastDivisor,
    offsets: u64,
    targets: u64,
    prepared: u64,
    maxima: u64,
    corners: u64,
    owners: u64,
    positives: u64,
    counts: u64,
    image_sums: u64,
    partials: u64,
    counters: u64,
    factors: u64,
    results: u64,
    scale: u64,
    class_weights: u64,
    n: u32,
    anchors: u32,
    pub anchor_pitch: u32,
    level_count: u32,
    nc: u32,
    reg_max: u32,
    topk: u32,
    units: u32,
    pub box_blocks: u32,
    box_blocks_per_image: u32,
    pub class_blocks: u32,
    reserved: u32,
    alpha: f32,
    beta: f32,
    gain_box: f32,
    gain_cls: f32,
    gain_dfl: f32,
    side_min: f32,
    input_w: f32,
    input_h: f32,
}

/// `struct TargetRow`.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct TargetRow {
    pub cxcywh: [f32; 4],
    pub class: u32,
    pub image: u32,
    pub reserved: [u32; 2],
}

/// `struct PreparedTarget`.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct PreparedTarget {
    pub xyxy: [f32; 4],
    pub bounds: [f32; 4],
}

/// `struct Positive`.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct PositiveRow {
    pub anchor: u32,
    pub target: u32,
    pub score: f32,
    pub overlap: f32,
}

/// `struct LossResults`: what the host reads.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct LossResults {
    /// Box term times its gain.
    pub box_: f32,
    /// Class term times its gain.
    pub cls: f32,
    /// Third term times its gain.
    pub dfl: f32,
    /// What is differentiated: images in the batch times the sum of the three terms.
    pub total: f32,
    /// Sum of the soft class targets of the batch.
    pub score_sum: f64,
    reserved: [u32; 2],
}

/// Byte offsets of the arrays whose size the boxes do not change.
#[derive(Clone, Copy, Debug)]
pub(super) struct WorkspaceLayout {
    corners: usize,
    owners: usize,
    pub positives: usize,
    pub counts: usize,
    image_sums: usize,
    partials: usize,
    pub counters: usize,
    factors: usize,
    pub results: usize,
    pub class_weights: usize,
    pub bytes: usize,
}

/// Byte offsets of the arrays of boxes. The first two are what the host sends in one copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct TargetLayout {
    pub rows: usize,
    pub prepared: usize,
    maxima: usize,
    pub bytes: usize,
}

/// Gives out places one after another.
struct Places(usize);

impl Places {
    fn take(&mut self, bytes: usize) -> usize {
        let at = self.0;
        self.0 = (at + bytes).next_multiple_of(ALIGNMENT);
        at
    }
}

fn anchor_pitch(anchors: usize) -> usize {
    anchors.next_multiple_of(4)
}

impl WorkspaceLayout {
    pub fn new(capacity: &LossCapacity, nc: usize) -> WorkspaceLayout {
        let LossCapacity { max_batch, max_anchors, .. } = *capacity;
        let places = max_batch * anchor_pitch(max_anchors);
        let blocks = (max_batch * max_anchors * nc.div_ceil(8)).div_ceil(UNITS_PER_BLOCK);
        let partials = 2 * BOX_BLOCKS_PER_IMAGE * max_batch + blocks;
        let mut at = Places(0);
        WorkspaceLayout {
            corners: at.take(places * 16),
            owners: at.take(places * 4),
            positives: at.take(places * 16),
            counts: at.take(max_batch * 4),
            image_sums: at.take(max_batch * 8),
            partials: at.take(partials * 8),
            counters: at.take(8),
            factors: at.take(32),
            results: at.take(32),
            class_weights: at.take(nc * 4),
            bytes: at.0,
        }
    }
}

impl TargetLayout {
    pub fn new(max_batch: usize, boxes: usize) -> TargetLayout {
        let mut at = Places(0);
        let _offsets = at.take((max_batch + 1) * 4);
        TargetLayout {
            rows: at.take(boxes * size_of::<TargetRow>()),
            prepared: at.take(boxes * size_of::<PreparedTarget>()),
            maxima: at.take(boxes * 8),
            bytes: at.0,
        }
    }

    /// Bytes that the host sends for so many boxes.
    pub fn sent(&self, boxes: usize) -> usize {
        self.rows + boxes * size_of::<TargetRow>()
    }
}

/// Where the arrays lie: base addresses and layouts.
pub(super) struct Memory {
    pub workspace: (u64, WorkspaceLayout),
    pub targets: (u64, TargetLayout),
}

/// The arguments of all kernels for one batch shape.
pub(super) fn arguments(
    config: &LossConfig,
    precision: Precision,
    levels: &[DeviceHeadLevel],
    n: usize,
    memory: &Memory,
    scale: u64,
) -> DetectionArgs {
    let LossConfig { nc, reg_max, .. } = *config;
    let groups = nc.div_ceil(8);
    let mut table: [LevelArgs; LEVELS_MAX] = bytemuck::Zeroable::zeroed();
    let (mut anchors, mut units) = (0usize, 0usize);
    for (row, level) in table.iter_mut().zip(levels) {
        *row = LevelArgs::new(level, precision);
        (row.first, row.first_unit) = (anchors as u32, units as u32);
        let cells = (level.boxes.h * level.boxes.w) as usize;
        anchors += cells;
        units += n * cells * groups;
    }
    assert!(units < 1 << 31, "{units} groups of classes are too many for one launch");
    let side_min = levels.get(1).unwrap_or(&levels[0]).stride as f32;
    let input = |cells: u32| (cells * levels[0].stride) as f32;
    let ((base, work), (target_base, target)) = (memory.workspace, memory.targets);
    let at = |offset: usize| base + offset as u64;
    DetectionArgs {
        levels: table,
        groups: FastDivisor::new(groups as u32),
        offsets: target_base,
        targets: target_base + target.rows as u64,
        prepared: target_base + target.prepared as u64,
        maxima: target_base + target.maxima as u64,
        corners: at(work.corners),
        owners: at(work.owners),
        positives: at(work.positives),
        counts: at(work.counts),
        image_sums: at(work.image_sums),
        partials: at(work.partials),
        counters: at(work.counters),
        factors: at(work.factors),
        results: at(work.results),
        scale,
        class_weights: if config.class_weights.is_some() { at(work.class_weights) } else { 0 },
        n: n as u32,
        anchors: anchors as u32,
        anchor_pitch: anchor_pitch(anchors) as u32,
        level_count: levels.len() as u32,
        nc: nc as u32,
        reg_max: reg_max as u32,
        topk: config.assigner.topk as u32,
        units: units as u32,
        box_blocks: (n * BOX_BLOCKS_PER_IMAGE) as u32,
        box_blocks_per_image: BOX_BLOCKS_PER_IMAGE as u32,
        class_blocks: units.div_ceil(UNITS_PER_BLOCK) as u32,
        reserved: 0,
        alpha: config.assigner.alpha,
        beta: config.assigner.beta,
        gain_box: config.gain_box,
        gain_cls: config.gain_cls,
        gain_dfl: config.gain_dfl,
        side_min,
        input_w: input(levels[0].boxes.w),
        input_h: input(levels[0].boxes.h),
    }
}
