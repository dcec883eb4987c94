//! Nearest-neighbour enlargement on the CPU.

use rayon::prelude::*;

use crate::engine::tensor::{Dst, Src};

/// `z[n, y, x] = x[n, y / factor, x / factor]`.
pub fn forward(x: Src, z: Dst, factor: usize) {
    let v = z.view;
    assert_eq!((v.h, v.w, v.c), (x.view.h * factor, x.view.w * factor, x.view.c), "upsample shapes");
    (0..v.n * v.h).into_par_iter().for_each(|row| {
        let (n, y) = (row / v.h, row % v.h);
        for column in 0..v.w {
            // SAFETY: both pixels lie in their maps; each output row is one task; `x` is only read.
            unsafe {
                let from = x.pixel(n, (y / factor) as isize, (column / factor) as isize);
                z.pixel(n, y as isize, column as isize).copy_from_slice(from);
            }
        }
    });
}

/// `dx (+)= ` the sum of `dz` over each `factor * factor` square.
pub fn backward(dz: Src, dx: Dst, factor: usize, accumulate: bool) {
    let v = dx.view;
    assert_eq!((dz.view.h, dz.view.w, dz.view.c), (v.h * factor, v.w * factor, v.c), "upsample shapes");
    (0..v.n * v.h).into_par_iter().for_each(|row| {
        let (n, y) = (row / v.h, row % v.h);
        for column in 0..v.w {
            // SAFETY: the pixel lies in the map; each row of `dx` is one task.
            let to = unsafe { dx.pixel(n, y as isize, column as isize) };
            if !accumulate {
                to.fill(0.0);
            }
            for tap in 0..factor * factor {
                let (sy, sx) = (y * factor + tap / factor, column * factor + tap % factor);
                // SAFETY: the pixel lies in the map of `dz`, which is only read.
                let from = unsafe { dz.pixel(n, sy as isize, sx as isize) };
                to.iter_mut().zip(from).for_each(|(t, f)| *t += f);
            }
        }
    });
}
