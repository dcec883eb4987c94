//! The orthogonalised momentum step of MuSGD (Jordan et al., "Muon", 2024).
//!
//! The momentum of a matrix is replaced by the nearest semi-orthogonal matrix, found by five
//! Newton-Schulz steps in bfloat16 values with f32 sums, which is what the recipe was tuned with.

use half::bf16;
use rayon::prelude::*;

/// Weight of the orthogonalised step in MuSGD.
const MUON_SCALE: f64 = 0.2;
/// Coefficients of the quintic iteration and its number of steps.
const COEFFICIENTS: (f32, f32, f32) = (3.4445, -4.7750, 2.0315);
const ITERATIONS: usize = 5;
/// Rows and columns of the tile of the product that is held in registers.
const TILE_ROWS: usize = 4;
const TILE_COLS: usize = 32;

/// Scratch matrices, grown to the largest tensor and kept.
#[derive(Default)]
pub(super) struct Workspace {
    update: Vec<f32>,
    x: Vec<f32>,
    x_transposed: Vec<f32>,
    gram: Vec<f32>,
    mix: Vec<f32>,
    product: Vec<f32>,
}

/// One step's constants for one tensor.
pub(super) struct Step {
    pub rows: usize,
    pub cols: usize,
    pub aspect: f32,
    pub lr: f64,
    pub momentum: f64,
}

/// m = mu m + (1 - mu) g; u = mu m + (1 - mu) g; p -= lr * 0.2 * sqrt(aspect) * orthogonal(u).
pub(super) fn step(p: &mut [f32], g: &[f32], m: &mut [f32], step: &Step, work: &mut Workspace) {
    let mu = step.momentum as f32;
    work.update.clear();
    work.update.extend(m.iter_mut().zip(g).map(|(m, &g)| {
        *m += (g - *m) * (1.0 - mu);
        g + (*m - g) * mu
    }));
    let update = std::mem::take(&mut work.update);
    let x = orthogonalise(&update, step.rows, step.cols, work);
    let scale = step_scale(step.lr) * step.aspect.sqrt();
    for (p, &x) in p.iter_mut().zip(x) {
        *p -= scale * x;
    }
    work.update = update;
}

/// What the orthogonalised update is multiplied with, but for the matrix's aspect.
pub(super) fn step_scale(lr: f64) -> f32 {
    (lr * MUON_SCALE) as f32
}

/// The semi-orthogonal matrix near `matrix` (row-major, `rows x cols`).
pub fn newton_schulz(matrix: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    orthogonalise(matrix, rows, cols, &mut Workspace::default()).to_vec()
}

/// As [`newton_schulz`]; the result lies in the workspace.
fn orthogonalise<'a>(matrix: &[f32], rows: usize, cols: usize, work: &'a mut Workspace) -> &'a [f32] {
    assert_eq!(matrix.len(), rows * cols);
    // The norm, too, is a bfloat16 number, taken of the rounded entries: that shifts it by up to 0.4 %.
    let squares: f64 = matrix.iter().map(|&v| f64::from(round(v)).powi(2)).sum();
    let norm = round(round(squares.sqrt() as f32) + 1e-7);
    let (m, n) = (rows.min(cols), rows.max(cols));
    let Workspace { x, x_transposed, gram, mix, product, .. } = work;
    resize(x, m * n);
    resize(x_transposed, m * n);
    resize(gram, m * m);
    resize(mix, m * m);
    resize(product, m * n);
    let is_transposed = rows > cols;
    let source = if is_transposed { &mut *x_transposed } else { &mut *x };
    for (to, &from) in source.iter_mut().zip(matrix) {
        *to = round(round(from) / norm);
    }
    match is_transposed {
        true => transpose(x_transposed, x, n, m),
        false => transpose(x, x_transposed, m, n),
    }
    let (a, b, c) = COEFFICIENTS;
    for iteration in 0..ITERATIONS {
        if iteration > 0 {
            transpose(x, x_transposed, m, n);
        }
        multiply(x, x_transposed, gram, m, n, m);
        gram.iter_mut().for_each(|v| *v = round(*v));
        multiply(gram, gram, mix, m, m, m);
        mix.iter_mut().zip(&*gram).for_each(|(square, &g)| *square = round(b * g + c * *square));
        multiply(mix, x, product, m, m, n);
        x.iter_mut().zip(&*product).for_each(|(x, &p)| *x = round(a * *x + p));
    }
    if is_transposed {
        transpose(x, x_transposed, m, n);
        return x_transposed;
    }
    x
}

fn round(v: f32) -> f32 {
    bf16::from_f32(v).to_f32()
}

fn resize(buffer: &mut Vec<f32>, len: usize) {
    buffer.clear();
    buffer.resize(len, 0.0);
}

/// `to[j][i] = from[i][j]` for `from` of `rows x cols`.
fn transpose(from: &[f32], to: &mut [f32], rows: usize, cols: usize) {
    const BLOCK: usize = 16;
    for i0 in (0..rows).step_by(BLOCK) {
        for j0 in (0..cols).step_by(BLOCK) {
            for i in i0..(i0 + BLOCK).min(rows) {
                for j in j0..(j0 + BLOCK).min(cols) {
                    to[j * rows + i] = from[i * cols + j];
                }
            }
        }
    }
}

/// `out = left * right`: `m x k` by `k x n`, row-major. Each element sums over k in ascending order,
/// whatever the tile and the thread, so the bits do not depend on either.
fn multiply(left: &[f32], right: &[f32], out: &mut [f32], m: usize, k: usize, n: usize) {
    assert!(left.len() >= m * k && right.len() >= k * n && out.len() >= m * n);
    let out = &mut out[..m * n];
    out.par_chunks_mut(TILE_ROWS * n).enumerate().for_each(|(block, out)| {
        let left = &left[block * TILE_ROWS * k..];
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the instructions; the function itself is safe code.
            return unsafe { multiply_rows_avx512(left, right, out, k, n) };
        }
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { multiply_rows_avx2(left, right, out, k, n) };
        }
        multiply_rows(left, right, out, k, n);
    });
}

/// The same code with wider registers: multiply and add stay separate, so the bits are the same.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn multiply_rows_avx512(left: &[f32], right: &[f32], out: &mut [f32], k: usize, n: usize) {
    multiply_rows(left, right, out, k, n);
}

/// As above for AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn multiply_rows_avx2(left: &[f32], right: &[f32], out: &mut [f32], k: usize, n: usize) {
    multiply_rows(left, right, out, k, n);
}

#[inline(always)]
fn multiply_rows(left: &[f32], right: &[f32], out: &mut [f32], k: usize, n: usize) {
    let rows = out.len() / n;
    for j0 in (0..n).step_by(TILE_COLS) {
        let cols = TILE_COLS.min(n - j0);
        if rows == TILE_ROWS && cols == TILE_COLS {
            let mut sums = [[0.0f32; TILE_COLS]; TILE_ROWS];
            for step in 0..k {
                let right: &[f32; TILE_COLS] =
                    right[step * n + j0..][..TILE_COLS].try_into().expect("the slice has this length");
                for (row, sums) in sums.iter_mut().enumerate() {
                    let l = left[row * k + step];
                    for (sum, &r) in sums.iter_mut().zip(right) {
                        *sum += l * r;
                    }
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                out[row * n + j0..][..TILE_COLS].copy_from_slice(sums);
            }
        } else {
            for row in 0..rows {
                let mut sums = [0.0f32; TILE_COLS];
                for step in 0..k {
                    let l = left[row * k + step];
                    for (sum, &r) in sums.iter_mut().zip(&right[step * n + j0..][..cols]) {
                        *sum += l * r;
                    }
                }
                out[row * n + j0..][..cols].copy_from_slice(&sums[..cols]);
            }
        }
    }
}
