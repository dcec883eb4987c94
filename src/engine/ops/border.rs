//! Fills: the zero border around a padded map, and a whole view.

use rayon::prelude::*;

use crate::engine::tensor::Dst;

/// Writes zeros into the border of `z` (its own channels only).
pub fn zero(z: Dst) {
    let v = z.view;
    let (h, w, pad) = (v.h as isize, v.w as isize, v.pad as isize);
    (0..v.n).into_par_iter().for_each(|n| {
        // SAFETY: border pixels of image `n`; each image is one task and nobody reads meanwhile.
        let clear = |y, x| unsafe { z.pixel(n, y, x) }.fill(0.0);
        for y in -pad..h + pad {
            if y < 0 || y >= h {
                (-pad..w + pad).for_each(|x| clear(y, x));
            } else {
                (-pad..0).chain(w..w + pad).for_each(|x| clear(y, x));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tensor::View;

    #[test]
    fn border_and_inside_are_told_apart() {
        let mut buffer = vec![7.0; View::storage_len(2, 3, 4, 6, 1)];
        let whole = View::new(0, 2, 3, 4, 6, 1);
        let part = whole.slice(1, 2);
        zero(Dst::of(&mut buffer, part));
        let border = 2 * (5 * 6 - 3 * 4) * 2;
        assert_eq!(buffer.iter().filter(|&&v| v == 0.0).count(), border);
        zero_inside(Dst::of(&mut buffer, part));
        assert_eq!(buffer.iter().filter(|&&v| v == 0.0).count(), border + 2 * 3 * 4 * 2);
        assert_eq!(buffer[0], 7.0, "channels outside the slice stay");
    }
}
