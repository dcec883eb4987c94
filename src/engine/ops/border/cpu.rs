//! Fills on the CPU.

use rayon::prelude::*;

use crate::engine::tensor::{Dst, View};

/// Writes zeros into the border of `z` (its own channels only).
pub fn zero(z: Dst) {
    let v = z.view;
    let (h, w, pad) = (v.h as isize, v.w as isize, v.pad as isize);
    // A whole buffer's border is made of runs; a slice's border pixels have other channels between them.
    let run = if v.pixel_pitch == v.c { v.w + 2 * v.pad } else { 1 };
    // SAFETY: the same floats as `z`, grouped into runs of `run` pixels.
    let runs = unsafe { Dst::new(z.data, View { c: run * v.c, ..v }) };
    (0..v.n).into_par_iter().for_each(|n| {
        for y in -pad..h + pad {
            if y < 0 || y >= h {
                for x in (-pad..w + pad).step_by(run) {
                    // SAFETY: a stretch of a border row of image `n`; each image is one task, nobody reads.
                    unsafe { runs.pixel(n, y, x) }.fill(0.0);
                }
            } else {
                for x in (-pad..0).chain(w..w + pad) {
                    // SAFETY: a border pixel of image `n`, as above.
                    unsafe { z.pixel(n, y, x) }.fill(0.0);
                }
            }
        }
    });
}

/// Writes zeros into every pixel of `z`, not its border.
pub fn zero_inside(z: Dst) {
    let v = z.view;
    (0..v.n * v.h).into_par_iter().for_each(|row| {
        for x in 0..v.w {
            // SAFETY: a pixel of the map; each row is one task.
            unsafe { z.pixel(row / v.h, (row % v.h) as isize, x as isize) }.fill(0.0);
        }
    });
}
