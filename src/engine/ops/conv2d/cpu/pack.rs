//! Packed weights: blocks of output channels, each `[tap row][tap column][channel][vectors * lanes]`,
//! zeros in the lanes past the last channel. A block that starts at vector `v` starts at
//! `taps * channels * v * lanes`.

use rayon::prelude::*;

use super::super::Conv2dParams;
use crate::engine::simd::Level;

/// How the vectors of the output channels are cut into blocks, one register tile wide each.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    vectors: usize,
    count: usize,
}

impl Blocks {
    /// Blocks for `channels` outputs; depends on the level and the channels alone.
    pub(super) fn new(level: Level, channels: usize) -> Blocks {
        let vectors = channels.div_ceil(level.lanes());
        Blocks::at_most(super::tile::widest_block(level, vectors), level, channels)
    }

    /// Blocks of at most `widest` vectors.
    pub(super) fn at_most(widest: usize, level: Level, channels: usize) -> Blocks {
        let vectors = channels.div_ceil(level.lanes());
        Blocks { vectors, count: vectors.div_ceil(widest) }
    }

    /// Number of blocks.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// First vector of block `index`; also the end of the one before.
    pub(super) fn start(&self, index: usize) -> usize {
        index * self.vectors / self.count
    }

    /// First vector and number of vectors of block `index`.
    pub(super) fn get(&self, index: usize) -> (usize, usize) {
        (self.start(index), self.start(index + 1) - self.start(index))
    }
}

/// The taps that reach output coordinates of one parity in the data gradient, along one axis.
///
/// Outputs `stride * i + parity` receive kernel elements `first + stride * t`, `t < taps`, from
/// gradient coordinates `i + offset - t`. Taps are stored with `t` falling, so that coordinates rise.
#[derive(Clone, Copy)]
pub(super) struct Parity {
    /// First kernel element.
    pub first: usize,
    /// Number of kernel elements; may be 0.
    pub taps: usize,
    /// Gradient coordinate of `t = 0` at `i = 0`.
    pub offset: usize,
}

impl Parity {
    pub(super) fn new(p: &Conv2dParams, parity: usize) -> Parity {
        let first = (parity + p.pad) % p.stride;
        let taps = p.kernel.saturating_sub(first).div_ceil(p.stride);
        Parity { first, taps, offset: (parity + p.pad) / p.stride }
    }

    /// Kernel element of stored tap `t`.
    fn element(&self, p: &Conv2dParams, t: usize) -> usize {
        self.first + p.stride * (self.taps - 1 - t)
    }
}

/// Packs for the forward pass.
pub(in super::super) fn forward(level: Level, p: &Conv2dParams, weight: &[f32], packed: &mut [f32]) {
    assert_eq!(weight.len(), p.weight_len(), "weight of {p:?}");
    let (lanes, blocks) = (level.lanes(), Blocks::new(level, p.c_out));
    let depth = p.kernel * p.kernel * p.c_in;
    let packed = &mut packed[..depth * p.c_out.next_multiple_of(lanes)];
    for block in 0..blocks.count() {
        let (start, vectors) = blocks.get(block);
        let (from, width) = (start * lanes, vectors * lanes);
        let used = width.min(p.c_out - from);
        let rows = packed[depth * from..][..depth * width].chunks_exact_mut(width);
        for (row, weights) in rows.zip(weight.chunks_exact(p.c_out)) {
            row[..used].copy_from_slice(&weights[from..from + used]);
            row[used..].fill(0.0);
        }
    }
}

/// Packs for the data gradient: for each parity of row and column, the taps of that parity, the
/// roles of the channels exchanged.
pub(in super::super) fn backward(level: Level, p: &Conv2dParams, weight: &[f32], packed: &mut [f32]) {
    assert_eq!(weight.len(), p.weight_len(), "weight of {p:?}");
    let (lanes, blocks) = (level.lanes(), Blocks::new(level, p.c_in));
    let mut rest = &mut packed[..p.kernel * p.kernel * p.c_out * p.c_in.next_multiple_of(lanes)];
    for row in 0..p.stride {
        for column in 0..p.stride {
            let (row, column) = (Parity::new(p, row), Parity::new(p, column));
            let taps = row.taps * column.taps;
            let (mut part, tail) = rest.split_at_mut(taps * p.c_out * p.c_in.next_multiple_of(lanes));
            rest = tail;
            for block in 0..blocks.count() {
                let (start, vectors) = blocks.get(block);
                let (from, width) = (start * lanes, vectors * lanes);
                let (here, tail) = part.split_at_mut(taps * p.c_out * width);
                part = tail;
                here.par_chunks_exact_mut(p.c_out * width).enumerate().for_each(|(tap, rows)| {
                    let a = row.element(p, tap / column.taps);
                    let b = column.element(p, tap % column.taps);
                    let used = width.min(p.c_in - from);
                    let weights = &weight[((a * p.kernel + b) * p.c_in + from) * p.c_out..];
                    transpose(&weights[..used * p.c_out], p.c_out, width, rows);
                });
            }
        }
    }
}

/// `rows[o][i] = weights[i][o]`, zeros past the last input channel.
fn transpose(weights: &[f32], c_out: usize, width: usize, rows: &mut [f32]) {
    let used = weights.len() / c_out;
    // Sixteen outputs at a time: one cache line of every row of `weights`.
    for first in (0..c_out).step_by(16) {
        for o in first..c_out.min(first + 16) {
            let row = &mut rows[o * width..][..width];
            for (i, value) in row[..used].iter_mut().enumerate() {
                *value = weights[i * c_out + o];
            }
            row[used..].fill(0.0);
        }
    }
}
