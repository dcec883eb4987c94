//! The weight gradient: for each tap, the outer product of input and output-gradient channels,
//! summed over the pixels.

use std::ops::Range;

use rayon::prelude::*;

use super::super::Conv2dParams;
use super::pack::Blocks;
use super::tile::{Tiles, even_parts};
use super::weight_tile::WeightTileArgs;
use crate::engine::simd::Level;
use crate::engine::tensor::Src;

/// Pixels in a chunk: inputs and gradients of a register tile over that many stay in the first-level
/// cache from tap to tap, and the sums are long against the cost of storing them.
const CHUNK_PIXELS: usize = 240;
/// Pixels for which a partial sum of its own pays.
const SPLIT_PIXELS: usize = 512;
/// Most floats of all partial sums.
const WORKSPACE_MAX: usize = 1 << 20;
/// Most partial sums, and tasks aimed at: enough for sixteen threads.
const TASKS: usize = 48;

/// Number of parts into which the pixels are split, each with a partial sum of the whole weight.
/// Depends on the shape alone, since it orders the sum.
pub(in super::super) fn splits(p: &Conv2dParams, n: usize, h_out: usize, w_out: usize) -> usize {
    let by_pixels = n * h_out * w_out / SPLIT_PIXELS;
    let by_memory = WORKSPACE_MAX / p.weight_len().max(1);
    by_pixels.min(by_memory).min(n * chunks_per_image(h_out, w_out)).clamp(1, TASKS)
}

/// Output rows in a chunk.
fn chunk_rows(h_out: usize, w_out: usize) -> usize {
    (CHUNK_PIXELS / w_out.max(1)).clamp(1, h_out.max(1))
}

fn chunks_per_image(h_out: usize, w_out: usize) -> usize {
    h_out.div_ceil(chunk_rows(h_out, w_out))
}

/// All that a task needs to know.
#[derive(Clone, Copy)]
struct Job<'a> {
    level: Level,
    p: Conv2dParams,
    x: Src<'a>,
    dy: Src<'a>,
    /// Tap columns, and contiguous channels at each: the columns are one run when nothing lies
    /// between their channels.
    tap_columns: usize,
    run: usize,
    splits: usize,
    /// `splits` partial sums, or the gradient itself when there is one.
    partials: *mut f32,
    /// Add to the partial from the first chunk on.
    accumulate: bool,
}

// SAFETY: tasks read shared inputs and write tiles of partial sums that are theirs alone.
unsafe impl Send for Job<'_> {}
// SAFETY: as above.
unsafe impl Sync for Job<'_> {}

/// See [`super::backward_weight`].
pub(in super::super) fn run(
    level: Level,
    p: &Conv2dParams,
    x: Src,
    dy: Src,
    dweight: &mut [f32],
    workspace: &mut [f32],
) {
    let (xv, yv) = (x.view, dy.view);
    assert_eq!((yv.h, yv.w), p.output_size(xv.h, xv.w), "output of {p:?} on {xv:?}");
    assert!(xv.n == yv.n && xv.c == p.c_in && yv.c == p.c_out, "{p:?} from {xv:?} to {yv:?}");
    assert!(xv.pad >= p.pad, "border of {} for {p:?}", xv.pad);
    assert_eq!(dweight.len(), p.weight_len(), "weight gradient of {p:?}");
    if yv.is_empty() || xv.c == 0 {
        return;
    }
    let splits = splits(p, yv.n, yv.h, yv.w);
    let merged = xv.pixel_pitch == p.c_in;
    if splits > 1 {
        assert!(workspace.len() >= splits * p.weight_len(), "workspace of {p:?}");
    }
    let job = Job {
        level,
        p: *p,
        x,
        dy,
        tap_columns: if merged { 1 } else { p.kernel },
        run: if merged { p.kernel * p.c_in } else { p.c_in },
        splits,
        partials: if splits > 1 { workspace.as_mut_ptr() } else { dweight.as_mut_ptr() },
        accumulate: splits == 1,
    };
    let units = units(level, &job);
    let macs = yv.n * yv.h * yv.w * p.weight_len();
    let groups = (macs >> 20).clamp(1, TASKS).div_ceil(splits).min(units);
    let task = |index: usize| {
        let (split, group) = (index / groups, index % groups);
        run_task(level, &job, split, group * units / groups..(group + 1) * units / groups);
    };
    if splits * groups == 1 {
        task(0);
    } else {
        (0..splits * groups).into_par_iter().with_max_len(1).for_each(task);
    }
    if splits > 1 {
        let partials = &workspace[..splits * p.weight_len()];
        reduce(partials, dweight);
    }
}

/// `dweight += ` the partial sums, in their order.
fn reduce(partials: &[f32], dweight: &mut [f32]) {
    const PIECE: usize = 2048;
    let len = dweight.len();
    dweight.par_chunks_mut(PIECE).enumerate().for_each(|(piece, out)| {
        let mut sum = [0.0f32; PIECE];
        let sum = &mut sum[..out.len()];
        for partial in partials.chunks_exact(len) {
            for (sum, &part) in sum.iter_mut().zip(&partial[piece * PIECE..]) {
                *sum += part;
            }
        }
        for (out, &sum) in out.iter_mut().zip(&*sum) {
            *out += sum;
        }
    });
}

crate::simd_dispatch! {
    fn units(job: &Job) -> usize = units_body;
    fn run_task(job: &Job, split: usize, units: Range<usize>) = run_task_body;
}

/// Number of register tiles of one tap, all blocks together.
#[inline(always)]
fn units_body<S: Tiles>(_s: S, job: &Job) -> usize {
    let blocks = Blocks::at_most(S::WEIGHT_BLOCK, job.level, job.p.c_out);
    (0..blocks.count()).map(|b| even_parts(job.run, S::height_max(blocks.get(b).1)).0).sum()
}

/// One task: some register tiles, all taps, over the chunks of pixels of one split.
#[inline(always)]
fn run_task_body<S: Tiles>(s: S, job: &Job, split: usize, units: Range<usize>) {
    let view = job.dy.view;
    let per_image = chunks_per_image(view.h, view.w);
    let chunks = view.n * per_image;
    let chunks = split * chunks / job.splits..(split + 1) * chunks / job.splits;
    let blocks = Blocks::at_most(S::WEIGHT_BLOCK, job.level, job.p.c_out);
    for chunk in chunks.clone() {
        let accumulate = job.accumulate || chunk != chunks.start;
        let first = chunk % per_image * chunk_rows(view.h, view.w);
        let rows = first..view.h.min(first + chunk_rows(view.h, view.w));
        let mut unit = 0;
        for block in 0..blocks.count() {
            let (start, vectors) = blocks.get(block);
            let (tiles, small, larger) = even_parts(job.run, S::height_max(vectors));
            for tile in 0..tiles {
                if units.contains(&unit) {
                    let height = small + usize::from(tile < larger);
                    let channel = tile * small + tile.min(larger);
                    let place = Place { split, image: chunk / per_image, rows: rows.clone(), accumulate };
                    run_unit(s, job, &place, channel, height, start, vectors);
                }
                unit += 1;
            }
        }
    }
}

/// Where a unit works.
struct Place {
    split: usize,
    image: usize,
    rows: Range<usize>,
    accumulate: bool,
}

/// One register tile, all taps, one chunk of pixels.
#[inline(always)]
fn run_unit<S: Tiles>(
    s: S,
    job: &Job,
    place: &Place,
    channel: usize,
    height: usize,
    first_vector: usize,
    vectors: usize,
) {
    let (p, xv, yv) = (&job.p, &job.x.view, &job.dy.view);
    let function = S::weight_tile(height, vectors);
    let output = first_vector * S::LANES;
    let last = (p.c_out - output - (vectors - 1) * S::LANES).min(S::LANES);
    let row = place.rows.start as isize;
    for a in 0..p.kernel {
        for b in 0..job.tap_columns {
            let x_row = row * p.stride as isize + a as isize - p.pad as isize;
            let x_at = xv.at(place.image, x_row, b as isize - p.pad as isize) + channel;
            let weight = ((a * job.tap_columns + b) * job.run + channel) * p.c_out + output;
            // SAFETY: input and gradient cover the pixels (checked by `run`); the tile's weights lie
            // in partial sum `split`, and no other task has this split and these channels.
            unsafe {
                let args = WeightTileArgs {
                    x: job.x.data.add(x_at),
                    x_row_pitch: p.stride * xv.row_pitch,
                    x_step: p.stride * xv.pixel_pitch,
                    dy: job.dy.data.add(yv.at(place.image, row, 0) + output),
                    dy_row_pitch: yv.row_pitch,
                    dy_step: yv.pixel_pitch,
                    rows: place.rows.len(),
                    columns: yv.w,
                    dweight: job.partials.add(place.split * p.weight_len() + weight),
                    dweight_pitch: p.c_out,
                    last,
                    accumulate: place.accumulate,
                };
                function(s, &args);
            }
        }
    }
}
