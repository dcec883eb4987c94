//! The anchor-point detection loss on a CUDA device: decoding, assignment, all terms and their gradients, without a
//! round trip to the host.
//!
//! [`DeviceDetectionLoss::upload_targets`] sends the boxes of a batch, [`DeviceDetectionLoss::compute`] queues four
//! kernels (`kernels/task_aligned.cu`, `kernels/detection_loss.cu`), [`DeviceDetectionLoss::read`] fetches the terms.
//! `compute` may be captured: the number of boxes is read from device memory. The CPU twin is
//! [`DetectionLoss`](super::detection::DetectionLoss): the same rules and the same order of operations.

mod args;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use self::args::{
    DetectionArgs, Memory, PositiveRow, PreparedTarget, TargetLayout, TargetRow, WorkspaceLayout,
};
use super::detection::LossConfig;
use super::dfl;
use crate::detect::assigners::task_aligned::AssignTarget;
use crate::detect::head_cuda;
use crate::detect::targets::Target;
use crate::engine::device::cuda::{
    Buffer, Device, DeviceError, Kernel, Launch, PinnedBuffer, Precision, Stream,
};

pub use self::args::LossResults;
pub use crate::detect::head_cuda::DeviceHeadLevel;

/// Uploads of targets that may be under way at the same time.
const STAGES: usize = 4;

/// What a [`DeviceDetectionLoss`] has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LossCapacity {
    /// Images of a batch.
    pub max_batch: usize,
    /// Anchor points of an image at the largest input size.
    pub max_anchors: usize,
    /// Boxes of a batch, all images together. Grows when a batch has more.
    pub max_boxes: usize,
}

/// A foreground anchor of an assignment that was read back.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DevicePositive {
    /// Anchor index over all levels.
    pub anchor: u32,
    /// Index of the target within the image.
    pub target: u32,
    /// Soft class target.
    pub score: f32,
}

/// The loss with its buffers on the device.
pub struct DeviceDetectionLoss {
    device: Arc<Device>,
    config: LossConfig,
    precision: Precision,
    capacity: LossCapacity,
    decode: Kernel,
    choose: Kernel,
    settle: Kernel,
    terms: Kernel,
    layout: WorkspaceLayout,
    workspace: Buffer,
    target_layout: TargetLayout,
    targets: Buffer,
    staging: Vec<PinnedBuffer>,
    stage: usize,
}

impl DeviceDetectionLoss {
    /// Bytes of device memory for that room, exact.
    pub fn bytes(config: &LossConfig, capacity: &LossCapacity) -> usize {
        let targets = TargetLayout::new(capacity.max_batch, capacity.max_boxes.max(1));
        WorkspaceLayout::new(capacity, config.nc).bytes + targets.bytes
    }

    /// Loads the kernels and allocates.
    ///
    /// # Panics
    /// When the assigner chooses more than 16 anchors per box or filters them a second time (`topk2`).
    ///
    /// # Errors
    /// A kernel does not load, memory is refused.
    pub fn new(
        stream: &Stream,
        precision: Precision,
        config: LossConfig,
        capacity: LossCapacity,
    ) -> Result<DeviceDetectionLoss, DeviceError> {
        let device = Arc::clone(stream.device());
        assert!(config.nc >= 1, "at least one class");
        assert!((1..=dfl::BINS_MAX).contains(&config.reg_max), "reg_max is {} bins", config.reg_max);
        let assigner = &config.assigner;
        assert!(assigner.topk <= args::TOPK_MAX, "topk is {}, at most {}", assigner.topk, args::TOPK_MAX);
        assert_eq!(assigner.topk2, assigner.topk, "a second filter after conflicts is not offered here");
        assert!(capacity.max_batch >= 1 && capacity.max_anchors >= 1, "{capacity:?}");
        let capacity = LossCapacity { max_boxes: capacity.max_boxes.max(1), ..capacity };
        let assignment = device.module("task_aligned")?;
        let terms = device.module("detection_loss")?;
        let layout = WorkspaceLayout::new(&capacity, config.nc);
        let workspace = device.allocate(layout.bytes)?;
        stream.upload(&workspace, layout.counters, &[0u32; 2])?;
        if let Some(weights) = &config.class_weights {
            assert_eq!(weights.len(), config.nc, "one class weight per class");
            stream.upload(&workspace, layout.class_weights, weights)?;
        }
        let target_layout = TargetLayout::new(capacity.max_batch, capacity.max_boxes);
        let targets = device.allocate(target_layout.bytes)?;
        let staging = stages(&device, &target_layout, capacity.max_boxes)?;
        // Without any upload a batch has no boxes.
        stream.upload(&targets, 0, &vec![0u32; capacity.max_batch + 1])?;
        let suffix = precision.suffix();
        Ok(DeviceDetectionLoss {
            decode: assignment.kernel(&format!("task_aligned_decode_{suffix}"))?,
            choose: assignment.kernel("task_aligned_choose")?,
            settle: assignment.kernel("task_aligned_settle")?,
            terms: terms.kernel(&format!("detection_loss_terms_{suffix}"))?,
            device,
            config,
            precision,
            capacity,
            layout,
            workspace,
            target_layout,
            targets,
            staging,
            stage: 0,
        })
    }

    /// What there is room for.
    pub fn capacity(&self) -> LossCapacity {
        self.capacity
    }

    /// The parameters.
    pub fn config(&self) -> &LossConfig {
        &self.config
    }

    /// Makes room for `boxes` boxes in a batch; true when memory was moved, so that captured work is void. The boxes
    /// that were uploaded before are gone then. Waits for the stream if it grows.
    ///
    /// # Errors
    /// Memory is refused; the room is as before.
    pub fn reserve_boxes(&mut self, stream: &Stream, boxes: usize) -> Result<bool, DeviceError> {
        if boxes <= self.capacity.max_boxes {
            return Ok(false);
        }
        stream.synchronize()?;
        let boxes = boxes.next_power_of_two();
        let layout = TargetLayout::new(self.capacity.max_batch, boxes);
        let staging = stages(&self.device, &layout, boxes)?;
        let targets = self.device.allocate(layout.bytes)?;
        stream.upload(&targets, 0, &vec![0u32; self.capacity.max_batch + 1])?;
        (self.target_layout, self.targets, self.staging) = (layout, targets, staging);
        self.capacity.max_boxes = boxes;
        Ok(true)
    }

    /// Queues the copy of a batch's boxes, which are grouped by image, images ascending; true when memory was moved
    /// (see [`DeviceDetectionLoss::reserve_boxes`]).
    ///
    /// # Safety
    /// Of the earlier uploads all but the last three have run: their staging memory is used again.
    ///
    /// # Panics
    /// When the boxes are not grouped by image, or name an image or class that does not exist.
    ///
    /// # Errors
    /// Memory is refused, or the driver refuses the copy.
    pub unsafe fn upload_targets(
        &mut self,
        stream: &Stream,
        targets: &[Target],
        n: usize,
    ) -> Result<bool, DeviceError> {
        assert!(n <= self.capacity.max_batch, "{n} images, room for {}", self.capacity.max_batch);
        assert!(targets.is_sorted_by_key(|target| target.image), "targets are not grouped by image");
        assert!(
            targets.last().is_none_or(|t| (t.image as usize) < n),
            "a target of an image beyond the batch"
        );
        let nc = self.config.nc;
        assert!(targets.iter().all(|t| (t.class as usize) < nc), "a target's class is not below {nc}");
        let moved = self.reserve_boxes(stream, targets.len())?;
        self.stage = (self.stage + 1) % STAGES;
        let (layout, staging) = (self.target_layout, &mut self.staging[self.stage]);
        let (head, rows) = staging.as_mut_slice::<u8>().split_at_mut(layout.rows);
        let offsets: &mut [u32] = bytemuck::cast_slice_mut(&mut head[..(n + 1) * 4]);
        for (image, offset) in offsets.iter_mut().enumerate() {
            *offset = targets.partition_point(|target| (target.image as usize) < image) as u32;
        }
        let rows: &mut [TargetRow] =
            bytemuck::cast_slice_mut(&mut rows[..size_of::<TargetRow>() * targets.len()]);
        for (row, target) in rows.iter_mut().zip(targets) {
            let Target { image, class, cxcywh } = *target;
            *row = TargetRow { cxcywh, class, image, reserved: [0; 2] };
        }
        // SAFETY: this staging memory is written next after three more uploads, when by the caller's promise this
        // one has run.
        unsafe {
            stream.upload_pinned(&self.targets, 0, &self.staging[self.stage], layout.sent(targets.len()))?;
        }
        Ok(moved)
    }

    /// Queues the loss of `n` images and `d(total * scale)` by every head output; definitions as in
    /// [`DetectionLoss::compute`](super::detection::DetectionLoss::compute). `scale` is the address of an `f32` on the
    /// device, or 0 for one. Deterministic: the bits depend on inputs and shape alone.
    ///
    /// # Safety
    /// The tensors lie in live memory of this device, gradients and logits do not overlap, `scale` is such an
    /// address, and nothing else touches them or this object's memory meanwhile. The boxes uploaded last are those
    /// of these `n` images.
    ///
    /// # Panics
    /// When shapes do not fit each other or the capacity.
    ///
    /// # Errors
    /// The driver refuses a launch.
    pub unsafe fn compute(
        &self,
        stream: &Stream,
        levels: &[DeviceHeadLevel],
        n: usize,
        scale: u64,
    ) -> Result<(), DeviceError> {
        self.check(levels, n);
        let memory = Memory {
            workspace: (self.workspace.pointer(), self.layout),
            targets: (self.targets.pointer(), self.target_layout),
        };
        let args = args::arguments(&self.config, self.precision, levels, n, &memory, scale);
        let decode =
            Launch { grid: [args.anchor_pitch.div_ceil(64), n as u32, 1], threads: 256, shared_bytes: 0 };
        let boxes = self.capacity.max_boxes.min(self.device.chip().multiprocessors as usize * 16);
        let steps: [(&Kernel, Launch); 4] = [
            (&self.decode, decode),
            (&self.choose, Launch::row(boxes as u32, 128)),
            (&self.settle, Launch::row(n as u32, 1024)),
            (&self.terms, Launch::row(args.box_blocks + args.class_blocks, 256)),
        ];
        for (kernel, launch) in steps {
            // SAFETY: the caller's promise for the tensors; the workspace is sized for the capacity that was checked,
            // and the stream orders these launches.
            unsafe { stream.launch::<DetectionArgs>(kernel, launch, &args)? };
        }
        Ok(())
    }

    /// Address of the [`LossResults`] that `compute` writes.
    pub fn results(&self) -> u64 {
        self.workspace.pointer() + self.layout.results as u64
    }

    /// Waits and reads the terms of the last `compute`.
    ///
    /// # Errors
    /// The driver refuses, or queued work failed.
    pub fn read(&self, stream: &Stream) -> Result<LossResults, DeviceError> {
        let mut results = [<LossResults as bytemuck::Zeroable>::zeroed()];
        stream.download(&self.workspace, self.layout.results, &mut results)?;
        Ok(results[0])
    }

    /// Queues the copy of the terms into pinned memory, 32 bytes.
    ///
    /// # Safety
    /// The pinned memory is not read or written before the copy has run.
    ///
    /// # Errors
    /// The driver refuses.
    pub unsafe fn read_pinned(&self, stream: &Stream, to: &mut PinnedBuffer) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        unsafe { stream.download_pinned(&self.workspace, self.layout.results, to, size_of::<LossResults>()) }
    }

    /// Waits and reads the assignment of one image of the last `compute`, whose images had `anchors` anchor points:
    /// its targets in pixels and its foreground anchors in ascending order.
    ///
    /// # Errors
    /// The driver refuses, or queued work failed.
    pub fn assignment(
        &self,
        stream: &Stream,
        anchors: usize,
        image: usize,
    ) -> Result<(Vec<AssignTarget>, Vec<DevicePositive>), DeviceError> {
        assert!(image < self.capacity.max_batch && anchors <= self.capacity.max_anchors);
        let mut range = [0u32; 2];
        stream.download(&self.targets, image * 4, &mut range)?;
        let (first, boxes) = (range[0] as usize, (range[1] - range[0]) as usize);
        let mut rows = vec![<TargetRow as bytemuck::Zeroable>::zeroed(); boxes];
        let mut prepared = vec![<PreparedTarget as bytemuck::Zeroable>::zeroed(); boxes];
        let layout = self.target_layout;
        stream.download(&self.targets, layout.rows + first * size_of::<TargetRow>(), &mut rows)?;
        stream.download(
            &self.targets,
            layout.prepared + first * size_of::<PreparedTarget>(),
            &mut prepared,
        )?;
        let targets =
            rows.iter().zip(&prepared).map(|(row, p)| AssignTarget { xyxy: p.xyxy, class: row.class });
        let targets = targets.collect();
        let mut count = [0u32];
        stream.download(&self.workspace, self.layout.counts + image * 4, &mut count)?;
        let mut positives = vec![<PositiveRow as bytemuck::Zeroable>::zeroed(); count[0] as usize];
        let at = image * anchors.next_multiple_of(4) * size_of::<PositiveRow>();
        stream.download(&self.workspace, self.layout.positives + at, &mut positives)?;
        let positives = positives.iter().map(|p| DevicePositive {
            anchor: p.anchor,
            target: p.target - first as u32,
            score: p.score,
        });
        Ok((targets, positives.collect()))
    }

    fn check(&self, levels: &[DeviceHeadLevel], n: usize) {
        let LossCapacity { max_batch, max_anchors, .. } = self.capacity;
        assert!((1..=max_batch).contains(&n), "{n} images, room for {max_batch}");
        let anchors = head_cuda::check(levels, n, self.config.nc, self.config.reg_max);
        assert!((1..=max_anchors).contains(&anchors), "{anchors} anchor points, room for {max_anchors}");
    }
}

fn stages(
    device: &Arc<Device>,
    layout: &TargetLayout,
    boxes: usize,
) -> Result<Vec<PinnedBuffer>, DeviceError> {
    (0..STAGES).map(|_| device.allocate_pinned(layout.sent(boxes))).collect()
}
