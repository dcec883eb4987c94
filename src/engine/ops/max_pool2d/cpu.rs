//! Max-pool on the CPU. SPPF runs it on the smallest map, so plain loops over channels are enough.

use rayon::prelude::*;

use crate::engine::tensor::{Dst, Src};

/// The window: size, step, border.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Side of the window.
    pub kernel: usize,
    /// Step between windows.
    pub stride: usize,
    /// How far the first window reaches outside.
    pub pad: usize,
}

/// Start of the row of positions that belongs to an output row.
struct Indices {
    data: *mut u8,
    len: usize,
}

// SAFETY: each output pixel's positions are written by the task of its row only.
unsafe impl Sync for Indices {}

impl Indices {
    /// # Safety
    /// Only one task at a time uses the positions of one pixel.
    #[allow(clippy::mut_from_ref)]
    unsafe fn pixel(&self, pixel: usize, c: usize) -> &mut [u8] {
        assert!((pixel + 1) * c <= self.len);
        // SAFETY: in bounds as just asserted, unshared by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(pixel * c), c) }
    }
}

/// `z = max over the window`; keeps the positions when `indices` is given (`n * h * w * c` bytes).
pub fn forward(x: Src, z: Dst, window: Window, indices: Option<&mut [u8]>) {
    let v = z.view;
    let kept = indices.map(|i| Indices { data: i.as_mut_ptr(), len: i.len() });
    (0..v.n * v.h).into_par_iter().for_each(|row| {
        let (n, y) = (row / v.h, row % v.h);
        for column in 0..v.w {
            // SAFETY: a pixel of the map; each output row is one task.
            let out = unsafe { z.pixel(n, y as isize, column as isize) };
            out.fill(f32::NEG_INFINITY);
            // SAFETY: as above, for the positions of the same pixel.
            let mut at = kept.as_ref().map(|k| unsafe { k.pixel(row * v.w + column, v.c) });
            if let Some(at) = &mut at {
                // The first position inside the map: right also for a window of minus infinities.
                at.fill(first_inside(y, column, window));
            }
            for (tap, sy, sx) in taps(y, column, window, x.view.h, x.view.w) {
                // SAFETY: `taps` yields pixels inside the map of `x`, which is only read.
                let from = unsafe { x.pixel(n, sy, sx) };
                for c in 0..v.c {
                    if from[c] > out[c] || from[c].is_nan() {
                        out[c] = from[c];
                        if let Some(at) = &mut at {
                            at[c] = tap;
                        }
                    }
                }
            }
        }
    });
}

/// `dx (+)= dz` at the kept positions.
pub fn backward(dz: Src, indices: &[u8], dx: Dst, window: Window, accumulate: bool) {
    let v = dz.view;
    assert_eq!(indices.len(), v.len(), "one position for each output");
    let c_task = 32;
    let blocks = v.c.div_ceil(c_task);
    // Windows overlap, so an image and a block of channels is one task; the order inside is row-major.
    (0..v.n * blocks).into_par_iter().for_each(|task| {
        let n = task / blocks;
        let channels = task % blocks * c_task..v.c.min((task % blocks + 1) * c_task);
        if !accumulate {
            for pixel in 0..dx.view.h * dx.view.w {
                let (y, x) = ((pixel / dx.view.w) as isize, (pixel % dx.view.w) as isize);
                // SAFETY: these channels of this image belong to this task.
                unsafe { channel_pointer(&dx, n, y, x, channels.start, channels.len()) }.fill(0.0);
            }
        }
        for pixel in 0..v.h * v.w {
            let (y, x) = (pixel / v.w, pixel % v.w);
            // SAFETY: a pixel of `dz`, which is only read.
            let gradient = unsafe { dz.pixel(n, y as isize, x as isize) };
            let base = (n * v.h * v.w + pixel) * v.c;
            for c in channels.clone() {
                let tap = usize::from(indices[base + c]);
                let sy = (y * window.stride + tap / window.kernel) as isize - window.pad as isize;
                let sx = (x * window.stride + tap % window.kernel) as isize - window.pad as isize;
                // SAFETY: the forward pass keeps only positions inside the map; this channel is this task's.
                let to = unsafe { channel_pointer(&dx, n, sy, sx, c, 1) };
                to[0] += gradient[c];
            }
        }
    });
}

/// `len` channels of a pixel from channel `c`.
///
/// # Safety
/// The pixel lies in the map and nobody else touches these channels meanwhile.
unsafe fn channel_pointer<'a>(
    d: &Dst<'a>,
    n: usize,
    y: isize,
    x: isize,
    c: usize,
    len: usize,
) -> &'a mut [f32] {
    debug_assert!(y >= 0 && x >= 0 && (y as usize) < d.view.h && (x as usize) < d.view.w);
    // SAFETY: by the contract of this function and of `Dst::new`.
    unsafe { std::slice::from_raw_parts_mut(d.data.add(d.view.at(n, y, x) + c), len) }
}

/// The window's positions inside the map: (position, y, x).
fn taps(y: usize, x: usize, window: Window, h: usize, w: usize) -> impl Iterator<Item = (u8, isize, isize)> {
    let Window { kernel, stride, pad } = window;
    (0..kernel * kernel).filter_map(move |tap| {
        let sy = (y * stride + tap / kernel) as isize - pad as isize;
        let sx = (x * stride + tap % kernel) as isize - pad as isize;
        let inside = sy >= 0 && sx >= 0 && (sy as usize) < h && (sx as usize) < w;
        inside.then_some((tap as u8, sy, sx))
    })
}

/// The first position of a window that lies inside the map.
fn first_inside(y: usize, x: usize, window: Window) -> u8 {
    let skip = |at: usize| window.pad.saturating_sub(at * window.stride);
    (skip(y) * window.kernel + skip(x)) as u8
}
