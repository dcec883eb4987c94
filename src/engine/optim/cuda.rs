//! The optimisers on a CUDA device: state and averages stay there, a step is two launches (`kernels/optim.cu`), with
//! MuSGD some more (`muon_cuda`).
//!
//! Before each step [`DeviceOptimizer::upload_step`] sends the numbers that change (learning rates, corrections); then
//! [`DeviceOptimizer::step`] queues the work, which may be captured; [`DeviceOptimizer::read`] tells the norm and whether
//! the step was taken, and [`DeviceOptimizer::commit`] counts it. Given the same gradients the values, states and
//! averages have the CPU's bits, as long as the clipping factor rounds to the same `f32` (the norm is an `f64` sum in
//! another order); MuSGD's matrices agree to bfloat16's rounding.

use std::sync::Arc;

use super::muon_cuda::DeviceMuon;
use super::rules::{self, Rule};
use super::{Algorithm, Ema, Optimizer};
use crate::engine::device::cuda::{
    Buffer, Device, DeviceError, Kernel, Launch, PinnedBuffer, Precision, Stream,
};

/// Groups that the kernels' table holds.
const GROUPS_MAX: usize = 15;
/// Parameters that share a byte of the group table; tensors start at multiples of it.
const CHUNK: usize = 16;
/// Parameters that one block of the norm sums.
const NORM_NUMBERS: usize = 8192;
/// What a chunk says that no step moves.
const FROZEN: u8 = 255;
/// Uploads of step tables that may be under way at the same time.
const STAGES: usize = 4;

/// `struct StepTable`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct StepTable {
    norm_max: f64,
    ema_keep: f32,
    ema_take: f32,
    growth_interval: u32,
    reserved: u32,
    rules: [[f32; 8]; GROUPS_MAX],
    /// The muon groups' own numbers: momentum and learning rate times 0.2.
    muon: [[f32; 2]; GROUPS_MAX + 1],
}

/// `struct StepResult`: what a step leaves.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct StepResult {
    /// L2 norm of all gradients, before clipping, the loss scale taken out.
    pub norm: f64,
    /// What the gradients were multiplied with to clip them.
    pub clip: f32,
    /// What the gradients were multiplied with to undo the loss scale.
    pub inverse_scale: f32,
    /// 1 when the norm is finite; otherwise the step was not taken.
    pub is_finite: u32,
    reserved: [u32; 3],
}

/// `struct OptimArgs`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct OptimArgs {
    values: u64,
    grads: u64,
    state_a: u64,
    state_b: u64,
    average: u64,
    copy: u64,
    buffers: u64,
    buffer_average: u64,
    groups: u64,
    table: u64,
    result: u64,
    scale: u64,
    partials: u64,
    counter: u64,
    count: u64,
    buffer_count: u64,
    value_blocks: u32,
    copy_type: u32,
}

/// The loss scale of half precision on the device: `struct LossScale`.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct LossScale {
    /// What losses are multiplied with.
    pub scale: f32,
    /// Steps since it last changed.
    pub good_steps: u32,
}

impl LossScale {
    /// Where training in half precision begins.
    pub const START: LossScale = LossScale { scale: 65536.0, good_steps: 0 };
    /// Steps without overflow after which the scale doubles.
    pub const GROWTH_INTERVAL: u32 = 2000;
}

/// Where a step finds the network's numbers: device addresses of `f32` vectors.
#[derive(Clone, Copy, Debug)]
pub struct StepTargets {
    /// Parameters, moved.
    pub values: u64,
    /// Gradients, cleared.
    pub grads: u64,
    /// Running statistics, read.
    pub buffers: u64,
    /// The parameters in the storage type, written along; 0 for none (and in `f32`).
    pub copy: u64,
    /// The storage type of `copy`.
    pub precision: Precision,
    /// Address of a [`LossScale`] that the loss was multiplied with, or 0. A step whose gradients are not finite
    /// halves it.
    pub scale: u64,
}

/// An optimiser's state and the moving averages on a device.
pub struct DeviceOptimizer {
    algorithm: Algorithm,
    norm: Kernel,
    step: Kernel,
    muon: Option<DeviceMuon>,
    count: usize,
    buffer_count: usize,
    state: Vec<Buffer>,
    average: Buffer,
    buffer_average: Buffer,
    groups: Buffer,
    table: Buffer,
    work: Buffer,
    staging: Vec<PinnedBuffer>,
    stage: usize,
}

/// Places in the small working buffer, bytes.
const RESULT: usize = 0;
const COUNTER: usize = 64;
const PARTIALS: usize = 128;

fn work_bytes(count: usize) -> usize {
    PARTIALS + 8 * count.div_ceil(NORM_NUMBERS)
}

impl DeviceOptimizer {
    /// Bytes of device memory for an optimiser and an average of that shape, exact.
    pub fn bytes(optimizer: &Optimizer, ema: &Ema) -> usize {
        let count = ema.values.len();
        let muon = if optimizer.algorithm == Algorithm::MuSgd { DeviceMuon::bytes(optimizer) } else { 0 };
        optimizer.state_bytes()
            + (count + ema.buffers.len()) * 4
            + count.div_ceil(CHUNK)
            + size_of::<StepTable>()
            + work_bytes(count)
            + muon
    }

    /// Loads the kernels, allocates and takes up the state of `optimizer` and `ema`.
    ///
    /// # Panics
    /// When a tensor does not start at a multiple of 16, the vectors' lengths are no multiples of 16, or there are
    /// more than 15 groups.
    ///
    /// # Errors
    /// A kernel does not load, memory is refused.
    pub fn new(stream: &Stream, optimizer: &Optimizer, ema: &Ema) -> Result<DeviceOptimizer, DeviceError> {
        let device = stream.device();
        let (count, buffer_count) = (ema.values.len(), ema.buffers.len());
        assert!(optimizer.groups.len() <= GROUPS_MAX, "{} groups", optimizer.groups.len());
        assert!(
            count.is_multiple_of(CHUNK) && buffer_count.is_multiple_of(4),
            "{count}, {buffer_count} numbers"
        );
        assert!(optimizer.state.iter().all(|v| v.len() == count), "one state per parameter");
        let module = device.module("optim")?;
        let allocate = |numbers: usize| device.allocate(numbers * 4);
        let groups = upload(device, stream, &group_table(optimizer, count))?;
        let work = device.allocate(work_bytes(count))?;
        stream.upload(&work, 0, &[0u8; PARTIALS])?;
        let is_muon = optimizer.algorithm == Algorithm::MuSgd;
        let made = DeviceOptimizer {
            algorithm: optimizer.algorithm,
            norm: module.kernel("optim_norm")?,
            step: module.kernel(step_kernel(optimizer.algorithm))?,
            muon: if is_muon { Some(DeviceMuon::new(stream, optimizer)?) } else { None },
            count,
            buffer_count,
            state: optimizer.state.iter().map(|_| allocate(count)).collect::<Result<_, _>>()?,
            average: allocate(count)?,
            buffer_average: allocate(buffer_count)?,
            groups,
            table: device.allocate(size_of::<StepTable>())?,
            work,
            staging: (0..STAGES)
                .map(|_| device.allocate_pinned(size_of::<StepTable>()))
                .collect::<Result<_, _>>()?,
            stage: 0,
        };
        made.upload(stream, optimizer, ema)?;
        Ok(made)
    }

    /// Takes up the state of `optimizer` and `ema`; waits.
    ///
    /// # Errors
    /// The driver refuses a copy.
    pub fn upload(&self, stream: &Stream, optimizer: &Optimizer, ema: &Ema) -> Result<(), DeviceError> {
        self.check(optimizer, ema);
        for (buffer, state) in self.state.iter().zip(&optimizer.state) {
            stream.upload(buffer, 0, state)?;
        }
        stream.upload(&self.average, 0, &ema.values)?;
        stream.upload(&self.buffer_average, 0, &ema.buffers)
    }

    /// Gives the state back to `optimizer` and `ema`; waits for queued steps.
    ///
    /// # Errors
    /// The driver refuses a copy, or queued work failed.
    pub fn download(
        &self,
        stream: &Stream,
        optimizer: &mut Optimizer,
        ema: &mut Ema,
    ) -> Result<(), DeviceError> {
        self.check(optimizer, ema);
        for (buffer, state) in self.state.iter().zip(&mut optimizer.state) {
            stream.download(buffer, 0, state)?;
        }
        stream.download(&self.average, 0, &mut ema.values)?;
        stream.download(&self.buffer_average, 0, &mut ema.buffers)
    }

    fn check(&self, optimizer: &Optimizer, ema: &Ema) {
        assert_eq!(optimizer.algorithm, self.algorithm);
        assert_eq!(optimizer.state.len(), self.state.len());
        assert_eq!((ema.values.len(), ema.buffers.len()), (self.count, self.buffer_count));
    }

    /// Bytes that this object holds on the device.
    pub fn allocated_bytes(&self) -> usize {
        let own = [&self.average, &self.buffer_average, &self.groups, &self.table, &self.work];
        let own: usize = own.into_iter().chain(&self.state).map(Buffer::bytes).sum();
        own + self.muon.as_ref().map_or(0, DeviceMuon::allocated_bytes)
    }

    /// Exchanges live parameters and running statistics with their average: buffers change hands, nothing is copied.
    /// Work captured with their addresses is void until they are exchanged back.
    pub fn swap_average(&mut self, values: &mut Buffer, buffers: &mut Buffer) {
        assert_eq!((values.bytes(), buffers.bytes()), (self.average.bytes(), self.buffer_average.bytes()));
        std::mem::swap(values, &mut self.average);
        std::mem::swap(buffers, &mut self.buffer_average);
    }

    /// Address of the averaged parameters, `f32`.
    pub fn average(&self) -> u64 {
        self.average.pointer()
    }

    /// Address of the averaged running statistics, `f32`.
    pub fn buffer_average(&self) -> u64 {
        self.buffer_average.pointer()
    }

    /// Queues the copy of the next step's numbers: those of step `optimizer.steps() + 1` with the groups' current
    /// learning rates, and of the average's next update. Gradients are clipped to `norm_max`.
    ///
    /// # Safety
    /// Of the earlier uploads all but the last three have run: their staging memory is used again.
    ///
    /// # Errors
    /// The driver refuses the copy.
    pub unsafe fn upload_step(
        &mut self,
        stream: &Stream,
        optimizer: &Optimizer,
        ema: &Ema,
        norm_max: f64,
        growth_interval: u32,
    ) -> Result<(), DeviceError> {
        let (ema_keep, ema_take) = ema.shares(ema.updates + 1);
        let mut table = StepTable {
            norm_max,
            ema_keep,
            ema_take,
            growth_interval,
            reserved: 0,
            rules: [[0.0; 8]; GROUPS_MAX],
            muon: [[0.0; 2]; GROUPS_MAX + 1],
        };
        let prepared = rules::prepare(optimizer, optimizer.steps + 1);
        for (row, rule) in table.rules.iter_mut().zip(prepared.rules()) {
            *row = rule_row(rule);
        }
        for (row, group) in table.muon.iter_mut().zip(&optimizer.groups) {
            *row = [group.momentum as f32, super::muon::step_scale(group.lr)];
        }
        self.stage = (self.stage + 1) % STAGES;
        let staging = &mut self.staging[self.stage];
        staging.as_mut_slice::<u8>().copy_from_slice(bytemuck::bytes_of(&table));
        // SAFETY: this staging memory is written next after three more uploads, when by the caller's promise this
        // one has run.
        unsafe { stream.upload_pinned(&self.table, 0, &self.staging[self.stage], size_of::<StepTable>()) }
    }

    /// Queues a step with the numbers uploaded last: norm, clipping, the rule, the averages, the cleared gradients.
    /// Two runs give the same bits.
    ///
    /// # Safety
    /// The addresses are those of live memory of this device, of vectors as long as those given to
    /// [`DeviceOptimizer::new`], aligned to 16 bytes, and nothing else touches them meanwhile.
    ///
    /// # Errors
    /// The driver refuses a launch.
    pub unsafe fn step(&self, stream: &Stream, targets: &StepTargets) -> Result<(), DeviceError> {
        let value_blocks = (self.count / 4).div_ceil(256);
        let buffer_blocks = (self.buffer_count / 4).div_ceil(256);
        let state = |i: usize| self.state.get(i).map_or(0, Buffer::pointer);
        // MuSGD's ordinary momentum is its second state.
        let (state_a, state_b) =
            if self.muon.is_some() { (state(1), state(0)) } else { (state(0), state(1)) };
        let args = OptimArgs {
            values: targets.values,
            grads: targets.grads,
            state_a,
            state_b,
            average: self.average.pointer(),
            copy: if targets.precision == Precision::F32 { 0 } else { targets.copy },
            buffers: targets.buffers,
            buffer_average: self.buffer_average.pointer(),
            groups: self.groups.pointer(),
            table: self.table.pointer(),
            result: self.result(),
            scale: targets.scale,
            partials: self.work.pointer() + PARTIALS as u64,
            counter: self.work.pointer() + COUNTER as u64,
            count: self.count as u64,
            buffer_count: self.buffer_count as u64,
            value_blocks: value_blocks as u32,
            copy_type: u32::from(targets.precision == Precision::F16),
        };
        let norm_blocks = self.count.div_ceil(NORM_NUMBERS).max(1);
        // SAFETY: the caller's promise for the network's vectors; the others are this object's and as long; the
        // stream orders the launches.
        unsafe {
            stream.launch(&self.norm, Launch::row(norm_blocks as u32, 256), &args)?;
            if let Some(muon) = &self.muon {
                let table = self.table.pointer() + std::mem::offset_of!(StepTable, muon) as u64;
                muon.step(stream, targets.values, targets.grads, state_b, table, self.result())?;
            }
            stream.launch(&self.step, Launch::row((value_blocks + buffer_blocks).max(1) as u32, 256), &args)
        }
    }

    /// Address of the [`StepResult`] of the last step.
    pub fn result(&self) -> u64 {
        self.work.pointer() + RESULT as u64
    }

    /// Waits and reads what the last step left.
    ///
    /// # Errors
    /// The driver refuses, or queued work failed.
    pub fn read(&self, stream: &Stream) -> Result<StepResult, DeviceError> {
        let mut result = [<StepResult as bytemuck::Zeroable>::zeroed()];
        stream.download(&self.work, RESULT, &mut result)?;
        Ok(result[0])
    }

    /// Queues the copy of the result into pinned memory, 32 bytes.
    ///
    /// # Safety
    /// The pinned memory is not read or written before the copy has run.
    ///
    /// # Errors
    /// The driver refuses.
    pub unsafe fn read_pinned(&self, stream: &Stream, to: &mut PinnedBuffer) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        unsafe { stream.download_pinned(&self.work, RESULT, to, size_of::<StepResult>()) }
    }

    /// Counts a step that was taken; does nothing for one that was not.
    pub fn commit(result: &StepResult, optimizer: &mut Optimizer, ema: &mut Ema) {
        if result.is_finite == 0 {
            return;
        }
        optimizer.steps += 1;
        if let Some(next) = rules::prepare(optimizer, optimizer.steps).mu_product {
            optimizer.mu_product = next;
        }
        ema.updates += 1;
    }
}

fn upload(device: &Arc<Device>, stream: &Stream, bytes: &[u8]) -> Result<Buffer, DeviceError> {
    let buffer = device.allocate(bytes.len())?;
    stream.upload(&buffer, 0, bytes)?;
    Ok(buffer)
}

fn step_kernel(algorithm: Algorithm) -> &'static str {
    match algorithm {
        Algorithm::Sgd | Algorithm::MuSgd => "optim_step_sgd",
        Algorithm::Adam | Algorithm::AdamW => "optim_step_adam",
        Algorithm::Adamax => "optim_step_adamax",
        Algorithm::NAdam => "optim_step_nadam",
        Algorithm::RAdam => "optim_step_radam",
        Algorithm::RmsProp => "optim_step_rmsprop",
    }
}

/// A byte for each 16 parameters: group and number of those that belong to a tensor.
fn group_table(optimizer: &Optimizer, count: usize) -> Vec<u8> {
    let mut table = vec![FROZEN; count / CHUNK];
    for (tensor, &group) in optimizer.tensors.iter().zip(&optimizer.group_of) {
        let range = tensor.range.clone();
        assert!(range.start.is_multiple_of(CHUNK), "{} starts at {}", tensor.name, range.start);
        if tensor.frozen {
            continue;
        }
        for first in range.clone().step_by(CHUNK) {
            let live = (range.end - first).min(CHUNK);
            table[first / CHUNK] = (group * CHUNK + live - 1) as u8;
        }
    }
    table
}

/// A rule's constants in the order that its kernel reads them.
fn rule_row(rule: &Rule) -> [f32; 8] {
    match *rule {
        Rule::Sgd { lr, momentum, decay, .. } => [lr, momentum, decay, 0.0, 0.0, 0.0, 0.0, 0.0],
        Rule::Adam { step, beta1, beta2, root2, eps, coupled, decoupled } => {
            [step, beta1, beta2, root2, eps, coupled, decoupled, 0.0]
        }
        Rule::Adamax { step, beta1, beta2, eps, decay } => [step, beta1, beta2, eps, decay, 0.0, 0.0, 0.0],
        Rule::NAdam { g_step, m_step, beta1, beta2, root2, eps, decay } => {
            [g_step, m_step, beta1, beta2, root2, eps, decay, 0.0]
        }
        Rule::RAdam { step, beta1, beta2, rectify, eps, decay } => {
            let applies = if rectify.is_some() { 1.0 } else { 0.0 };
            [step, beta1, beta2, eps, decay, rectify.unwrap_or(1.0), applies, 0.0]
        }
        Rule::RmsProp { lr, momentum, eps, decay } => [lr, momentum, eps, decay, 0.0, 0.0, 0.0, 0.0],
    }
}
