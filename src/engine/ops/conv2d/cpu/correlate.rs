//! Correlation of an input with packed weights over a grid of outputs: the forward pass, and the
//! data gradient one parity at a time.

use std::ops::Range;

use rayon::prelude::*;

use super::super::Conv2dParams;
use super::Epilogue;
use super::epilogue::{BlockStats, RowSpan, RowWork};
use super::pack::{Blocks, Parity};
use super::tile::{TileArgs, TileFn, Tiles, even_parts};
use crate::engine::simd::Level;
use crate::engine::tensor::{Dst, Src};

/// One correlation. Pitches and steps count floats.
#[derive(Clone, Copy)]
struct Correlation<'a> {
    level: Level,
    /// Under the first tap of output (0, 0) of image 0.
    x: *const f32,
    x_image_pitch: usize,
    /// From one output row, column to the next, in the input.
    x_row_step: usize,
    x_column_step: usize,
    tap_rows: usize,
    tap_columns: usize,
    tap_row_pitch: usize,
    tap_column_pitch: usize,
    /// Contiguous channels at each tap.
    run: usize,
    weights: &'a [f32],
    /// Output (0, 0) of image 0.
    y: *mut f32,
    y_image_pitch: usize,
    y_row_step: usize,
    y_column_step: usize,
    n: usize,
    h: usize,
    w: usize,
    channels: usize,
    accumulate: bool,
}

// SAFETY: the addresses come from a `Src` and a `Dst`, which are both; tasks write disjoint rows or
// blocks of channels of the output.
unsafe impl Send for Correlation<'_> {}
// SAFETY: as above.
unsafe impl Sync for Correlation<'_> {}

/// How the outputs are cut into tasks: rows of each image, and with large weights also channels.
#[derive(Clone, Copy)]
pub(super) struct Split {
    /// Output rows in a chunk.
    pub rows: usize,
    /// Chunks in an image.
    pub chunks: usize,
    /// Whether each block of channels is a task of its own.
    by_block: bool,
}

impl Split {
    /// Depends on the shape alone. `depth` counts the terms of an output's sum.
    pub(super) fn new(depth: usize, channels: usize, n: usize, h: usize, w: usize) -> Split {
        // Weights that would not stay in the second-level cache are cut by blocks of channels.
        let by_block = depth * channels > (256 << 10);
        let row_macs = (w * depth * if by_block { channels.min(64) } else { channels }).max(1);
        // A task is worth its overhead at a million multiply-adds (ten microseconds or more); about
        // a hundred tasks keep sixteen threads level.
        let blocks = if by_block { channels.div_ceil(64) } else { 1 };
        let rows = (1usize << 20).div_ceil(row_macs).max((n * h * blocks).div_ceil(96)).clamp(1, h.max(1));
        let chunks = h.div_ceil(rows).max(1);
        Split { rows: h.div_ceil(chunks), chunks, by_block }
    }
}

/// See [`super::forward`].
pub(in super::super) fn forward(
    level: Level,
    p: &Conv2dParams,
    x: Src,
    packed: &[f32],
    y: Dst,
    epilogue: Epilogue,
) {
    let (xv, yv) = (x.view, y.view);
    assert_eq!((yv.h, yv.w), p.output_size(xv.h, xv.w), "output of {p:?} on {xv:?}");
    assert!(xv.n == yv.n && xv.c == p.c_in && yv.c == p.c_out, "{p:?} from {xv:?} to {yv:?}");
    assert!(xv.pad >= p.pad, "border of {} for {p:?}", xv.pad);
    assert!(packed.len() >= p.packed_forward_len(), "{} packed floats for {p:?}", packed.len());
    if yv.is_empty() {
        return;
    }
    let merged = xv.pixel_pitch == p.c_in;
    let origin = xv.at(0, -(p.pad as isize), -(p.pad as isize));
    let correlation = Correlation {
        level,
        // SAFETY: the border is part of the buffer.
        x: unsafe { x.data.add(origin) },
        x_image_pitch: xv.image_pitch,
        x_row_step: p.stride * xv.row_pitch,
        x_column_step: p.stride * xv.pixel_pitch,
        tap_rows: p.kernel,
        tap_columns: if merged { 1 } else { p.kernel },
        tap_row_pitch: xv.row_pitch,
        tap_column_pitch: xv.pixel_pitch,
        run: if merged { p.kernel * p.c_in } else { p.c_in },
        weights: packed,
        // SAFETY: the view lies in the buffer.
        y: unsafe { y.data.add(yv.offset) },
        y_image_pitch: yv.image_pitch,
        y_row_step: yv.row_pitch,
        y_column_step: yv.pixel_pitch,
        n: xv.n,
        h: yv.h,
        w: yv.w,
        channels: p.c_out,
        accumulate: false,
    };
    let work = RowWork::new(p, yv, epilogue);
    correlation.run(&work);
}

/// See [`super::backward_data`].
pub(in super::super) fn backward_data(
    level: Level,
    p: &Conv2dParams,
    dy: Src,
    packed: &[f32],
    dx: Dst,
    accumulate: bool,
) {
    let (yv, xv) = (dy.view, dx.view);
    assert_eq!((yv.h, yv.w), p.output_size(xv.h, xv.w), "output of {p:?} on {xv:?}");
    assert!(xv.n == yv.n && xv.c == p.c_in && yv.c == p.c_out, "{p:?} from {yv:?} to {xv:?}");
    assert!(packed.len() >= p.packed_backward_len(), "{} packed floats for {p:?}", packed.len());
    let merged = yv.pixel_pitch == p.c_out;
    let mut weights = packed;
    for row in 0..p.stride {
        for column in 0..p.stride {
            let (rows, columns) = (Parity::new(p, row), Parity::new(p, column));
            let (h, w) =
                (xv.h.saturating_sub(row).div_ceil(p.stride), xv.w.saturating_sub(column).div_ceil(p.stride));
            let taps = rows.taps * columns.taps;
            let (here, rest) = weights.split_at(taps * p.c_out * xv.c.next_multiple_of(level.lanes()));
            weights = rest;
            if h * w * xv.n * xv.c == 0 || (taps == 0 && accumulate) {
                continue;
            }
            let first_row = first_coordinate(rows, h, yv.h, yv.pad, p);
            let first_column = first_coordinate(columns, w, yv.w, yv.pad, p);
            let correlation = Correlation {
                level,
                // SAFETY: `first_coordinate` has checked that the border holds what is read.
                x: unsafe { dy.data.add(yv.at(0, first_row, first_column)) },
                x_image_pitch: yv.image_pitch,
                x_row_step: yv.row_pitch,
                x_column_step: yv.pixel_pitch,
                tap_rows: if taps == 0 { 0 } else { rows.taps },
                tap_columns: if merged { 1 } else { columns.taps },
                tap_row_pitch: yv.row_pitch,
                tap_column_pitch: yv.pixel_pitch,
                run: if merged { columns.taps * p.c_out } else { p.c_out },
                weights: here,
                // SAFETY: row and column lie in the view, which lies in the buffer.
                y: unsafe { dx.data.add(xv.at(0, row as isize, column as isize)) },
                y_image_pitch: xv.image_pitch,
                y_row_step: p.stride * xv.row_pitch,
                y_column_step: p.stride * xv.pixel_pitch,
                n: xv.n,
                h,
                w,
                channels: p.c_in,
                accumulate,
            };
            correlation.run(&RowWork::Raw);
        }
    }
}

/// The gradient coordinate under the first stored tap of the first output of a parity; checks that
/// all `count` outputs read within the border.
fn first_coordinate(parity: Parity, count: usize, size: usize, border: usize, p: &Conv2dParams) -> isize {
    if parity.taps == 0 {
        return 0;
    }
    let first = parity.offset as isize - (parity.taps as isize - 1);
    let last = (parity.offset + count - 1) as isize;
    assert!(
        first >= -(border as isize) && last < (size + border) as isize,
        "gradient of {size} with a border of {border} is read from {first} to {last} for {p:?}"
    );
    first
}

impl Correlation<'_> {
    /// Runs all tasks in the current thread pool.
    fn run(&self, work: &RowWork) {
        let depth = self.tap_rows * self.tap_columns * self.run;
        let split = Split::new(depth, self.channels, self.n, self.h, self.w);
        let blocks = Blocks::new(self.level, self.channels).count();
        let (groups, group) = if split.by_block { (blocks, 1) } else { (1, blocks) };
        let tasks = self.n * split.chunks * groups;
        let task = |index: usize| {
            // Neighbouring tasks share weights.
            let (chunk, of_group) = (index % (self.n * split.chunks), index / (self.n * split.chunks));
            let first = chunk % split.chunks * split.rows;
            let rows = first..self.h.min(first + split.rows);
            run_rows(self.level, self, work, chunk, rows, of_group * group..(of_group + 1) * group);
        };
        if tasks == 1 {
            task(0);
        } else {
            (0..tasks).into_par_iter().with_max_len(1).for_each(task);
        }
    }
}

crate::simd_dispatch! {
    fn run_rows(c: &Correlation, work: &RowWork, chunk: usize, rows: Range<usize>, blocks: Range<usize>)
        = run_rows_body;
}

/// One task: some rows of one image (`chunk` counts over images), some blocks of channels.
#[inline(always)]
fn run_rows_body<S: Tiles>(
    s: S,
    c: &Correlation,
    work: &RowWork,
    chunk: usize,
    rows: Range<usize>,
    blocks: Range<usize>,
) {
    let cut = Blocks::new(c.level, c.channels);
    let depth = c.tap_rows * c.tap_columns * c.run;
    let image = chunk / Split::new(depth, c.channels, c.n, c.h, c.w).chunks;
    for block in blocks {
        let (start, vectors) = cut.get(block);
        let first_channel = start * S::LANES;
        let last = (c.channels - first_channel - (vectors - 1) * S::LANES).min(S::LANES);
        let (tiles, small, larger) = even_parts(c.w, S::height_max(vectors));
        let functions: [TileFn<S>; 2] =
            [S::tile(small, vectors), S::tile(small + usize::from(larger > 0), vectors)];
        let mut stats = BlockStats::new();
        for row in rows.clone() {
            // SAFETY: image, row and block lie in the grid of the correlation, whose maker checked
            // that input and output cover it; weights hold `depth * lanes` floats per vector.
            unsafe {
                let y = c.y.add(image * c.y_image_pitch + row * c.y_row_step + first_channel);
                let mut args = TileArgs {
                    x: c.x.add(image * c.x_image_pitch + row * c.x_row_step),
                    x_step: c.x_column_step,
                    tap_rows: c.tap_rows,
                    tap_columns: c.tap_columns,
                    run: c.run,
                    tap_row_pitch: c.tap_row_pitch,
                    tap_column_pitch: c.tap_column_pitch,
                    weights: c.weights.as_ptr().add(depth * first_channel),
                    y,
                    y_step: c.y_column_step,
                    last,
                    accumulate: c.accumulate,
                };
                for tile in 0..tiles {
                    let large = usize::from(tile < larger);
                    functions[large](s, &args);
                    args.x = args.x.wrapping_add((small + large) * c.x_column_step);
                    args.y = args.y.wrapping_add((small + large) * c.y_column_step);
                }
                let span =
                    RowSpan { y, step: c.y_column_step, w: c.w, first_channel, vectors, last, image, row };
                work.row(s, &span, &mut stats);
            }
        }
        work.finish_block(&stats, first_channel, (vectors - 1) * S::LANES + last, chunk, rows.len() * c.w);
    }
}
