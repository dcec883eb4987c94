//! Batch normalisation and activation on the CPU.
//!
//! A task is a few rows of one image; inside, a block of channels keeps its constants in registers while the
//! pixels go by. Channels past the last full vector take the scalar road.

use rayon::prelude::*;

use super::Norm;
use crate::engine::ops::rows_per_task;
use crate::engine::simd::{Kernel, Simd, level};
use crate::engine::tensor::{Dst, Src, View};

/// Numbers of scratch for [`backward`]: two sums for each channel, in total and for each task.
pub fn partials_len(n: usize, h: usize, w: usize, c: usize) -> usize {
    2 * c * (1 + n * h.div_ceil(rows_per_task(h, w, c)))
}

/// Adds `f64` sums to `f32` gradients.
pub fn add_sums(sums: &[f64], grads: &mut [f32]) {
    for (g, s) in grads.iter_mut().zip(sums) {
        *g += *s as f32;
    }
}

/// The rows of one task.
#[derive(Clone, Copy)]
struct Rows {
    n: usize,
    from: usize,
    to: usize,
}

/// Calls `work(task, rows)` for all tasks of a map, in parallel.
fn for_each_task(v: View, work: impl Fn(usize, Rows) + Sync) {
    let step = rows_per_task(v.h, v.w, v.c);
    let tasks = v.h.div_ceil(step);
    (0..v.n * tasks).into_par_iter().for_each(|task| {
        let from = task % tasks * step;
        work(task, Rows { n: task / tasks, from, to: v.h.min(from + step) });
    });
}

/// `z = act(norm(y)) + residual`.
pub fn forward(y: Src, norm: &Norm, residual: Option<Src>, z: Dst) {
    assert_eq!((y.view.h, y.view.w, y.view.c), (z.view.h, z.view.w, z.view.c), "shapes of y and z");
    for_each_task(y.view, |_, rows| level().call(Forward { y, norm, residual, z, rows }));
}

/// The whole backward pass: `dy`, the sums for `dbias` and `dweight` in `partials[..2 * c]`, and the
/// shortcut's gradient `dz`, written or added as the flag says. `batch_statistics` is false where the
/// forward pass used running statistics; then no sums are made.
pub fn backward(
    y: Src,
    dz: Src,
    norm: &Norm,
    batch_statistics: bool,
    partials: &mut [f64],
    dy: Dst,
    residual: Option<(Dst, bool)>,
) {
    let v = y.view;
    assert_eq!((v.h, v.w, v.c), (dz.view.h, dz.view.w, dz.view.c), "shapes of y and dz");
    assert_eq!(partials.len(), partials_len(v.n, v.h, v.w, v.c), "scratch");
    let (sums, parts) = partials.split_at_mut(2 * v.c);
    sums.fill(0.0);
    if batch_statistics {
        let shared = Parts(parts.as_mut_ptr());
        for_each_task(v, |task, rows| {
            // SAFETY: `partials_len` has `2 * c` numbers for each task, and this is the only one with its number.
            let part = unsafe { std::slice::from_raw_parts_mut(shared.at(task * 2 * v.c), 2 * v.c) };
            level().call(Reduce { y, dz, norm, part, rows });
        });
        for part in parts.chunks_exact(2 * v.c) {
            sums.iter_mut().zip(part).for_each(|(s, p)| *s += p);
        }
    }
    let inverse_count = 1.0 / (v.n * v.h * v.w) as f64;
    let sums = &*sums;
    for_each_task(v, |_, rows| level().call(Apply { y, dz, norm, sums, inverse_count, dy, residual, rows }));
}

struct Parts(*mut f64);

// SAFETY: tasks write disjoint runs.
unsafe impl Sync for Parts {}

impl Parts {
    /// # Safety
    /// `index` lies in the scratch.
    unsafe fn at(&self, index: usize) -> *mut f64 {
        // SAFETY: by contract.
        unsafe { self.0.add(index) }
    }
}

/// Index of the first channel of pixel (n, y, 0).
fn row(v: &View, n: usize, y: usize) -> usize {
    v.at(n, y as isize, 0)
}

struct Forward<'a> {
    y: Src<'a>,
    norm: &'a Norm<'a>,
    residual: Option<Src<'a>>,
    z: Dst<'a>,
    rows: Rows,
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let c = self.y.view.c;
        let mut from = 0;
        while from + 4 * S::LANES <= c {
            self.block::<S, 4>(s, from);
            from += 4 * S::LANES;
        }
        while from + S::LANES <= c {
            self.block::<S, 1>(s, from);
            from += S::LANES;
        }
        self.scalar(from..c);
    }
}

impl Forward<'_> {
    #[inline(always)]
    fn block<S: Simd, const B: usize>(&self, s: S, from: usize) {
        let (y, z, norm) = (self.y, self.z, self.norm);
        let mut scale = [s.splat(0.0); B];
        let mut shift = [s.splat(0.0); B];
        for b in 0..B {
            let at = from + b * S::LANES;
            // SAFETY: `at + LANES <= c`, and each slice holds `c` numbers.
            unsafe {
                scale[b] = s.mul(load(s, norm.weight, at), load(s, norm.inverse_deviation, at));
                let mean = s.mul(load(s, norm.mean, at), scale[b]);
                shift[b] = s.sub(load(s, norm.bias, at), mean);
            }
        }
        for line in self.rows.from..self.rows.to {
            let (ys, zs) = (row(&y.view, self.rows.n, line) + from, row(&z.view, self.rows.n, line) + from);
            let rs =
                self.residual.map(|r| (r.data, row(&r.view, self.rows.n, line) + from, r.view.pixel_pitch));
            for x in 0..y.view.w {
                for b in 0..B {
                    let at = b * S::LANES;
                    // SAFETY: channels `from + at ..` of pixel (line, x), inside all three maps; `z`'s rows
                    // belong to this task.
                    unsafe {
                        let u =
                            s.fma(s.load(y.data.add(ys + x * y.view.pixel_pitch + at)), scale[b], shift[b]);
                        let mut out = norm.activation.value_vector(s, u);
                        if let Some((data, start, pitch)) = rs {
                            out = s.add(out, s.load(data.add(start + x * pitch + at)));
                        }
                        s.store(z.data.add(zs + x * z.view.pixel_pitch + at), out);
                    }
                }
            }
        }
    }

    fn scalar(&self, channels: std::ops::Range<usize>) {
        let (y, z, norm) = (self.y, self.z, self.norm);
        for c in channels {
            let scale = norm.weight[c] * norm.inverse_deviation[c];
            let shift = norm.bias[c] - norm.mean[c] * scale;
            for line in self.rows.from..self.rows.to {
                for x in 0..y.view.w {
                    let (n, l, x) = (self.rows.n, line as isize, x as isize);
                    // SAFETY: channel `c` of a pixel of each map; `z`'s rows belong to this task.
                    unsafe {
                        let u = (*y.data.add(y.view.at(n, l, x) + c)).mul_add(scale, shift);
                        let add = self.residual.map_or(0.0, |r| *r.data.add(r.view.at(n, l, x) + c));
                        *z.data.add(z.view.at(n, l, x) + c) = norm.activation.value(u) + add;
                    }
                }
            }
        }
    }
}

/// First backward sweep: `sum d` and `sum d * xhat` over the rows of a task.
struct Reduce<'a> {
    y: Src<'a>,
    dz: Src<'a>,
    norm: &'a Norm<'a>,
    part: &'a mut [f64],
    rows: Rows,
}

/// Constants of a block of channels: `xhat = y * inverse + offset`, `u = xhat * weight + bias`.
#[derive(Clone, Copy)]
struct Constants<V> {
    inverse: V,
    offset: V,
    weight: V,
    bias: V,
}

/// # Safety
/// `at + LANES` numbers in each slice of `norm`.
#[inline(always)]
unsafe fn constants<S: Simd>(s: S, norm: &Norm, at: usize) -> Constants<S::F32> {
    // SAFETY: by contract.
    unsafe {
        let inverse = load(s, norm.inverse_deviation, at);
        Constants {
            inverse,
            offset: s.sub(s.splat(0.0), s.mul(load(s, norm.mean, at), inverse)),
            weight: load(s, norm.weight, at),
            bias: load(s, norm.bias, at),
        }
    }
}

/// # Safety
/// `slice` holds `at + LANES` numbers.
#[inline(always)]
unsafe fn load<S: Simd>(s: S, slice: &[f32], at: usize) -> S::F32 {
    debug_assert!(at + S::LANES <= slice.len());
    // SAFETY: by contract.
    unsafe { s.load(slice.as_ptr().add(at)) }
}

impl Kernel for Reduce<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let c = self.y.view.c;
        let mut from = 0;
        while from + 2 * S::LANES <= c {
            self.block::<S, 2>(s, from);
            from += 2 * S::LANES;
        }
        while from + S::LANES <= c {
            self.block::<S, 1>(s, from);
            from += S::LANES;
        }
        self.scalar(from..c);
    }
}

impl Reduce<'_> {
    #[inline(always)]
    fn block<S: Simd, const B: usize>(&mut self, s: S, from: usize) {
        let (y, dz, norm) = (self.y, self.dz, self.norm);
        // SAFETY: the caller's blocks end at or before `c`.
        let k: [Constants<S::F32>; B] =
            std::array::from_fn(|b| unsafe { constants(s, norm, from + b * S::LANES) });
        let mut sum_d = [s.splat(0.0); B];
        let mut sum_dx = [s.splat(0.0); B];
        for line in self.rows.from..self.rows.to {
            let (ys, ds) = (row(&y.view, self.rows.n, line) + from, row(&dz.view, self.rows.n, line) + from);
            for x in 0..y.view.w {
                for b in 0..B {
                    let at = b * S::LANES;
                    // SAFETY: channels of pixel (line, x) of two maps that are only read.
                    let (yv, dv) = unsafe {
                        (
                            s.load(y.data.add(ys + x * y.view.pixel_pitch + at)),
                            s.load(dz.data.add(ds + x * dz.view.pixel_pitch + at)),
                        )
                    };
                    let xhat = s.fma(yv, k[b].inverse, k[b].offset);
                    let u = s.fma(xhat, k[b].weight, k[b].bias);
                    let d = s.mul(dv, norm.activation.derivative_vector(s, u));
                    sum_d[b] = s.add(sum_d[b], d);
                    sum_dx[b] = s.fma(d, xhat, sum_dx[b]);
                }
            }
        }
        let c = y.view.c;
        let mut lanes = [0.0f32; 16];
        for b in 0..B {
            for (which, sum) in [(0, sum_d[b]), (c, sum_dx[b])] {
                // SAFETY: no vector is longer than 16 lanes.
                unsafe { s.store(lanes.as_mut_ptr(), sum) };
                let start = which + from + b * S::LANES;
                for (out, &lane) in self.part[start..start + S::LANES].iter_mut().zip(&lanes) {
                    *out = f64::from(lane);
                }
            }
        }
    }

    fn scalar(&mut self, channels: std::ops::Range<usize>) {
        let (y, dz, norm) = (self.y, self.dz, self.norm);
        for c in channels {
            let (mut sum_d, mut sum_dx) = (0.0f32, 0.0f32);
            for line in self.rows.from..self.rows.to {
                for x in 0..y.view.w {
                    let (n, l, x) = (self.rows.n, line as isize, x as isize);
                    // SAFETY: channel `c` of a pixel of two maps that are only read.
                    let (yv, dv) = unsafe {
                        (*y.data.add(y.view.at(n, l, x) + c), *dz.data.add(dz.view.at(n, l, x) + c))
                    };
                    let xhat = (yv - norm.mean[c]) * norm.inverse_deviation[c];
                    let d = dv * norm.activation.derivative(xhat.mul_add(norm.weight[c], norm.bias[c]));
                    sum_d += d;
                    sum_dx += d * xhat;
                }
            }
            self.part[c] = f64::from(sum_d);
            self.part[y.view.c + c] = f64::from(sum_dx);
        }
    }
}

/// Second backward sweep: `dy` and the shortcut's gradient.
struct Apply<'a> {
    y: Src<'a>,
    dz: Src<'a>,
    norm: &'a Norm<'a>,
    sums: &'a [f64],
    inverse_count: f64,
    dy: Dst<'a>,
    residual: Option<(Dst<'a>, bool)>,
    rows: Rows,
}

impl Kernel for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let c = self.y.view.c;
        let mut from = 0;
        while from + 2 * S::LANES <= c {
            self.block::<S, 2>(s, from);
            from += 2 * S::LANES;
        }
        while from + S::LANES <= c {
            self.block::<S, 1>(s, from);
            from += S::LANES;
        }
        self.scalar(from..c);
    }
}

impl Apply<'_> {
    /// `sum / M` of channel `c` for both sums.
    fn means(&self, c: usize) -> (f32, f32) {
        let mean = |at: usize| (self.sums[at] * self.inverse_count) as f32;
        (mean(c), mean(self.y.view.c + c))
    }

    #[inline(always)]
    fn block<S: Simd, const B: usize>(&self, s: S, from: usize) {
        let (y, dz, dy, norm) = (self.y, self.dz, self.dy, self.norm);
        // SAFETY: the caller's blocks end at or before `c`.
        let k: [Constants<S::F32>; B] =
            std::array::from_fn(|b| unsafe { constants(s, norm, from + b * S::LANES) });
        let mut mean_d = [s.splat(0.0); B];
        let mut mean_dx = [s.splat(0.0); B];
        let (mut first, mut second) = ([0.0f32; 16], [0.0f32; 16]);
        for b in 0..B {
            for (lane, (d, dx)) in first.iter_mut().zip(&mut second).take(S::LANES).enumerate() {
                (*d, *dx) = self.means(from + b * S::LANES + lane);
            }
            // SAFETY: no vector is longer than 16 lanes.
            unsafe {
                mean_d[b] = s.load(first.as_ptr());
                mean_dx[b] = s.load(second.as_ptr());
            }
        }
        for line in self.rows.from..self.rows.to {
            let n = self.rows.n;
            let (ys, ds, os) =
                (row(&y.view, n, line) + from, row(&dz.view, n, line) + from, row(&dy.view, n, line) + from);
            let rs =
                self.residual.map(|(r, add)| (r.data, row(&r.view, n, line) + from, r.view.pixel_pitch, add));
            for x in 0..y.view.w {
                for b in 0..B {
                    let at = b * S::LANES;
                    // SAFETY: channels of pixel (line, x), inside all maps; the rows of `dy` and of the
                    // shortcut's gradient belong to this task.
                    unsafe {
                        let dv = s.load(dz.data.add(ds + x * dz.view.pixel_pitch + at));
                        let yv = s.load(y.data.add(ys + x * y.view.pixel_pitch + at));
                        if let Some((data, start, pitch, accumulate)) = rs {
                            let to = data.add(start + x * pitch + at);
                            s.store(to, if accumulate { s.add(s.load(to), dv) } else { dv });
                        }
                        let xhat = s.fma(yv, k[b].inverse, k[b].offset);
                        let u = s.fma(xhat, k[b].weight, k[b].bias);
                        let d = s.mul(dv, norm.activation.derivative_vector(s, u));
                        let centred = s.sub(s.sub(d, mean_d[b]), s.mul(xhat, mean_dx[b]));
                        let scale = s.mul(k[b].weight, k[b].inverse);
                        s.store(dy.data.add(os + x * dy.view.pixel_pitch + at), s.mul(centred, scale));
                    }
                }
            }
        }
    }

    fn scalar(&self, channels: std::ops::Range<usize>) {
        let (y, dz, dy, norm) = (self.y, self.dz, self.dy, self.norm);
        for c in channels {
            let (mean_d, mean_dx) = self.means(c);
            for line in self.rows.from..self.rows.to {
                for x in 0..y.view.w {
                    let (n, l, x) = (self.rows.n, line as isize, x as isize);
                    // SAFETY: channel `c` of a pixel of each map; written rows belong to this task.
                    unsafe {
                        let (yv, dv) =
                            (*y.data.add(y.view.at(n, l, x) + c), *dz.data.add(dz.view.at(n, l, x) + c));
                        if let Some((r, accumulate)) = self.residual {
                            let to = r.data.add(r.view.at(n, l, x) + c);
                            *to = if accumulate { *to + dv } else { dv };
                        }
                        let xhat = (yv - norm.mean[c]) * norm.inverse_deviation[c];
                        let d = dv * norm.activation.derivative(xhat.mul_add(norm.weight[c], norm.bias[c]));
                        let scale = norm.weight[c] * norm.inverse_deviation[c];
                        *dy.data.add(dy.view.at(n, l, x) + c) = (d - mean_d - xhat * mean_dx) * scale;
                    }
                }
            }
        }
    }
}
