//! Image input on the CPU.

use rayon::prelude::*;

use crate::engine::tensor::{Dst, View};

/// `dst = bytes / 255`; `bytes` is dense `[n, h, w, c]`.
pub fn forward_u8(bytes: &[u8], dst: Dst) {
    rows(bytes, dst, |from, to| {
        for (out, &byte) in to.iter_mut().zip(from) {
            // A true division: the reference divides, and multiplying by 1/255 differs in the last bit.
            *out = f32::from(byte) / 255.0;
        }
    });
}

/// `dst = floats`, dense `[n, h, w, c]`.
pub fn forward_f32(floats: &[f32], dst: Dst) {
    rows(floats, dst, |from, to| to.copy_from_slice(from));
}

/// Calls `copy` for each pixel (or whole row where pixels lie together), rows in parallel.
fn rows<T: Sync>(source: &[T], dst: Dst, copy: impl Fn(&[T], &mut [f32]) + Sync) {
    let v = dst.view;
    assert_eq!(source.len(), v.len(), "input numbers");
    // Where pixels lie together, a row is one run of floats: a pixel with `w * c` channels.
    let together = v.pixel_pitch == v.c;
    let (run, runs) = if together { (v.w * v.c, 1) } else { (v.c, v.w) };
    // SAFETY: the same floats as `dst`, only grouped differently.
    let dst = unsafe { Dst::new(dst.data, View { c: run, ..v }) };
    (0..v.n * v.h).into_par_iter().for_each(|row| {
        let from = &source[row * v.w * v.c..(row + 1) * v.w * v.c];
        for (x, pixels) in from.chunks_exact(run).enumerate().take(runs) {
            // SAFETY: inside the map; each row is one task.
            copy(pixels, unsafe { dst.pixel(row / v.h, (row % v.h) as isize, x as isize) });
        }
    });
}
