//! Times the best few cuts of a convolution and takes the fastest.
//!
//! [`measure`] decides what is timed and what is taken; an [`EventClock`] times. All candidates of a case run in turn,
//! several rounds on one stream without a gap, each launch between two events, so a clock that changes meets all of
//! them alike; the median of the rounds counts.

use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::{Case, Conv2dKernels, Epilogue, MmaConfig, Pass, Shape, Tuning, uses_tensor_cores};
use crate::engine::activation::Activation;
use crate::engine::device::cuda::{Buffer, Chip, Device, DeviceError, Precision, Stream, Tensor};
use crate::engine::ops::conv2d::Conv2dParams;
use crate::engine::tensor::View;

/// Bytes and times that they are written ahead of the timed launches: about a millisecond.
const LEAD_BYTES: usize = 64 << 20;
const LEAD_FILLS: usize = 32;

/// What a forward pass does with its sums, as far as its time depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// See [`Epilogue::Raw`]; also stands for the gradients.
    Raw,
    /// See [`Epilogue::Stats`].
    Stats,
    /// See [`Epilogue::Bias`].
    Bias,
    /// See [`Epilogue::Apply`].
    Apply(Activation),
}

/// A case with the layout it is timed in.
#[derive(Clone, Copy, Debug)]
pub struct Subject {
    /// What is measured.
    pub case: Case,
    x: View,
    y: View,
    output: Output,
}

impl Subject {
    /// A pass over `x` (in the data gradient, the gradient of it) and `y` (its gradient, but forward); `None` where
    /// there is nothing to choose.
    pub fn new(
        pass: Pass,
        params: Conv2dParams,
        (x, y): (View, View),
        output: Output,
        precision: Precision,
        chip: &Chip,
    ) -> Option<Subject> {
        let shape = Shape::of_views(&x, &y, precision);
        let subject = Subject { case: Case { pass, params, shape }, x, y, output };
        uses_tensor_cores(&params, &shape, precision, chip).then_some(subject)
    }

    fn macs(&self) -> u64 {
        self.case.params.macs(self.case.shape.n, self.case.shape.h_in, self.case.shape.w_in)
    }

    fn y_bytes(&self, precision: Precision) -> usize {
        if self.output == Output::Bias { 4 } else { precision.bytes() }
    }

    /// Where everything lies that the candidates need, in one buffer.
    fn places(&self, precision: Precision, configs: &[MmaConfig]) -> Places {
        let Case { pass, params: p, shape } = &self.case;
        let longest = |len: &dyn Fn(&MmaConfig) -> usize| configs.iter().map(len).max().unwrap_or(0);
        let workspace = longest(&|c| c.workspace_len(*pass, p, shape));
        let is_stats = self.output == Output::Stats;
        let partials = if is_stats { longest(&|c| c.stats_tiles(p, shape).0 * 2 * p.c_out) } else { 0 };
        let mut end = 0;
        let mut take = |bytes: usize| {
            let start = end;
            end += bytes.max(16).next_multiple_of(256);
            start
        };
        Places {
            // A slice of channels begins inside the first pixel: as much more is behind the last.
            x: take(self.x.n * self.x.image_pitch * precision.bytes()),
            y: take(self.y.n * self.y.image_pitch * self.y_bytes(precision)),
            weight: take(p.weight_len() * precision.bytes()),
            gradient: take(if *pass == Pass::BackwardWeight { p.weight_len() * 4 } else { 0 }),
            channels: take(p.c_out * 8),
            partials: take(partials * 4),
            workspace: take(workspace * 4),
            bytes: end,
        }
    }
}

/// Offsets in bytes.
struct Places {
    x: usize,
    y: usize,
    weight: usize,
    gradient: usize,
    channels: usize,
    partials: usize,
    workspace: usize,
    bytes: usize,
}

/// The tensor of a view whose buffer, border included, begins at `start`.
fn tensor_at(start: u64, view: &View, bytes: usize) -> Tensor {
    let border = view.pad * (view.row_pitch + view.pixel_pitch);
    // SAFETY: the place at `start` has room for all images with their borders; see `Subject::places`.
    unsafe { Tensor::new(start, bytes, &View { offset: border, ..*view }) }
}

/// How much may be spent.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Seconds, checked between cases.
    pub seconds: f64,
    /// Bytes of device memory; cases that need more are left to the model.
    pub bytes: usize,
    /// Best candidates by the model that are timed. Of a method that is not among them, its best is added.
    pub candidates: usize,
    /// Share of the time of the model's choice by which another must be faster.
    pub gain: f64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { seconds: 20.0, bytes: 16 << 30, candidates: 6, gain: 0.03 }
    }
}

/// Says how long candidates take.
pub trait Clock {
    /// Any unit, one number for each of `configs`; one that is not finite or not above 0 says nothing.
    ///
    /// # Errors
    /// A fault of the device.
    fn time(&mut self, subject: &Subject, configs: &[MmaConfig]) -> Result<Vec<f64>, DeviceError>;
}

/// The fastest cut of every case of `subjects` that `known` does not have, the largest cases first.
///
/// # Errors
/// What the clock says.
pub fn measure(
    subjects: &[Subject],
    known: &Tuning,
    chip: &Chip,
    precision: Precision,
    limits: &Limits,
    clock: &mut dyn Clock,
) -> Result<Tuning, DeviceError> {
    let mut open: Vec<&Subject> = subjects.iter().filter(|s| known.get(&s.case).is_none()).collect();
    open.sort_by_key(|s| (std::cmp::Reverse(s.macs()), s.case));
    open.dedup_by_key(|s| s.case);
    let (began, mut measured) = (Instant::now(), Tuning::new(chip, precision));
    let (mut changed, mut left, mut said) = (0, 0, 0.0);
    for (i, subject) in open.iter().enumerate() {
        let seconds = began.elapsed().as_secs_f64();
        let configs = candidates(&subject.case, chip, limits.candidates);
        if seconds > limits.seconds || subject.places(precision, &configs).bytes > limits.bytes {
            left += 1;
            continue;
        }
        if seconds > said + 2.0 {
            said = seconds;
            tracing::info!("measuring cuts of convolutions: {i} of {}", open.len());
        }
        let best = match configs.len() {
            1 => 0,
            _ => fastest(&clock.time(subject, &configs)?, limits.gain),
        };
        changed += usize::from(best != 0);
        measured.insert(subject.case, configs[best]);
    }
    tracing::info!(
        "cuts of {} convolutions measured in {:.1} s, {changed} differ from the model's, {left} left to it",
        measured.len(),
        began.elapsed().as_secs_f64()
    );
    Ok(measured)
}

/// The best few by the model, first the one it would take, and the best of every method.
fn candidates(case: &Case, chip: &Chip, count: usize) -> Vec<MmaConfig> {
    let all =
        MmaConfig::candidates(case.pass, &case.params, &case.shape, chip, super::wgmma::is_wanted(chip));
    let (mut kept, rest) = (all[..all.len().min(count.max(1))].to_vec(), all.iter().skip(count.max(1)));
    for config in rest {
        let same =
            |k: &MmaConfig| std::mem::discriminant(&k.method) == std::mem::discriminant(&config.method);
        if !kept.iter().any(same) {
            kept.push(*config);
        }
    }
    kept
}

/// Index of the fastest; the first unless another beats it by more than `gain`.
fn fastest(times: &[f64], gain: f64) -> usize {
    let is_sound = |t: f64| t.is_finite() && t > 0.0;
    let others = times.iter().enumerate().filter(|(_, t)| is_sound(**t));
    match others.min_by(|a, b| a.1.total_cmp(b.1)) {
        Some((i, &t)) if is_sound(times[0]) && t < times[0] * (1.0 - gain) => i,
        _ => 0,
    }
}

/// Times launches by the events of a stream of its own, on memory of its own.
pub struct EventClock {
    kernels: Conv2dKernels,
    stream: Stream,
    memory: Buffer,
    /// Numbers from -1 to 1: zeros would draw less power than what a network computes.
    numbers: Vec<u8>,
    rounds: usize,
    /// Written before the first timed launch, so that the queue never runs dry.
    lead: Buffer,
}

impl EventClock {
    /// A clock for a 16-bit precision.
    ///
    /// # Errors
    /// Kernels do not load; memory refused.
    pub fn new(device: &Arc<Device>, precision: Precision) -> Result<EventClock, DeviceError> {
        let is_emulated = device.chip().is_emulated();
        let mut state = 1u32;
        let numbers = (0..1 << 15).flat_map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
            match precision {
                Precision::F16 => half::f16::from_f32(value).to_le_bytes(),
                _ => half::bf16::from_f32(value).to_le_bytes(),
            }
        });
        Ok(EventClock {
            kernels: Conv2dKernels::load(device, precision)?,
            stream: device.stream()?,
            memory: device.allocate(0)?,
            numbers: numbers.collect(),
            rounds: if is_emulated { 1 } else { 9 },
            lead: device.allocate(if is_emulated { 0 } else { LEAD_BYTES })?,
        })
    }

    /// Memory of at least `bytes`, all of it numbers.
    fn fill(&mut self, bytes: usize) -> Result<(), DeviceError> {
        if self.memory.bytes() < bytes {
            self.stream.synchronize()?;
            let device = Arc::clone(self.stream.device());
            self.memory = device.allocate(0)?; // give back first: the two never need to exist together
            self.memory = device.allocate(bytes)?;
        }
        let mut done = self.numbers.len().min(bytes);
        self.stream.upload(&self.memory, 0, &self.numbers[..done])?;
        while done < bytes {
            let more = done.min(bytes - done);
            let start = self.memory.pointer();
            // SAFETY: both parts lie in the buffer, one behind the other.
            unsafe { self.stream.copy(start + done as u64, start, more)? };
            done += more;
        }
        Ok(())
    }

    /// Queues one run of a subject.
    fn launch(&self, subject: &Subject, places: &Places, config: MmaConfig) -> Result<(), DeviceError> {
        let Case { pass, params: p, shape } = &subject.case;
        let kernels = &self.kernels;
        kernels.chosen.lock().unwrap_or_else(PoisonError::into_inner).insert((*pass, *p, *shape), config);
        let at = |place: usize| self.memory.pointer() + place as u64;
        let x = tensor_at(at(places.x), &subject.x, kernels.precision.bytes());
        let y = tensor_at(at(places.y), &subject.y, subject.y_bytes(kernels.precision));
        assert_eq!(Shape::of_tensors(&x, &y, kernels.precision), *shape, "timed as it will run");
        let (first, second) = (at(places.channels), at(places.channels + p.c_out * 4));
        let epilogue = match subject.output {
            Output::Raw => Epilogue::Raw,
            Output::Stats => Epilogue::Stats { partials: at(places.partials) },
            Output::Bias => Epilogue::Bias { bias: first },
            Output::Apply(activation) => {
                Epilogue::Apply { scale: first, shift: second, activation, residual: None }
            }
        };
        let (weight, workspace) = (at(places.weight), at(places.workspace));
        // SAFETY: each place has the room its use needs for every candidate (`Subject::places`), none overlap, and the
        // buffer lives until `time` has waited for the stream.
        unsafe {
            match pass {
                Pass::Forward => kernels.forward(&self.stream, p, x, weight, y, epilogue, workspace),
                Pass::BackwardData => kernels.backward_data(&self.stream, p, y, weight, x, false, workspace),
                Pass::BackwardWeight => {
                    kernels.backward_weight(&self.stream, p, x, y, at(places.gradient), workspace)
                }
            }
        }
    }

    /// Queues the rounds; the number of a candidate is the part of its launches.
    fn queue(&self, subject: &Subject, places: &Places, configs: &[MmaConfig]) -> Result<(), DeviceError> {
        for _ in 0..self.rounds {
            for (i, config) in configs.iter().enumerate() {
                self.stream.set_part(i as u32);
                self.launch(subject, places, *config)?;
            }
        }
        Ok(())
    }
}

impl Clock for EventClock {
    fn time(&mut self, subject: &Subject, configs: &[MmaConfig]) -> Result<Vec<f64>, DeviceError> {
        let places = subject.places(self.kernels.precision, configs);
        self.fill(places.bytes)?;
        if self.rounds > 1 {
            configs.iter().try_for_each(|c| self.launch(subject, &places, *c))?;
            for _ in 0..LEAD_FILLS {
                // SAFETY: the whole buffer, which nothing else uses.
                unsafe { self.stream.fill(self.lead.pointer(), 0, self.lead.bytes())? };
            }
        }
        self.stream.start_timing();
        let queued = self.queue(subject, &places, configs);
        let times = self.stream.take_times();
        queued?;
        let mut sums = vec![Vec::new(); configs.len()];
        for time in times? {
            sums[time.part as usize].push(f64::from(time.milliseconds));
        }
        let median = |launches: Vec<f64>| {
            let each = (launches.len() / self.rounds).max(1);
            let mut rounds: Vec<f64> = launches.chunks(each).map(|c| c.iter().sum()).collect();
            rounds.sort_by(f64::total_cmp);
            rounds.get(rounds.len() / 2).copied().unwrap_or(f64::NAN)
        };
        Ok(sums.into_iter().map(median).collect())
    }
}
