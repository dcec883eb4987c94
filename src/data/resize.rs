//! Bilinear resizing.

use super::Image;
use super::rows::{HORIZONTAL_ONE, ROW_SPARE, Tap, Taps, VERTICAL_ONE, blend, sample, split};

/// Resizes with bilinear interpolation, pixel centres at half-integers, no anti-aliasing:
/// `source = (destination + 0.5) * source_size / destination_size - 0.5`, clamped to the image.
///
/// Equal to OpenCV's `INTER_LINEAR` (and to `align_corners = false`) within one grey level.
pub fn resize(source: &Image, height: usize, width: usize) -> Image {
    if (source.height, source.width) == (height, width) {
        return source.clone();
    }
    let mut out = Image::filled(height, width, [0; 3]);
    resize_into(&source.pixels, source.height, source.width, &mut out.pixels, height, width);
    out
}

/// [`resize`] between slices of `h * w * 3` bytes. Panics when a size is zero or a slice has another length.
pub fn resize_into(
    source: &[u8],
    source_h: usize,
    source_w: usize,
    out: &mut [u8],
    height: usize,
    width: usize,
) {
    assert!(source_h * source_w * height * width > 0, "sizes are positive");
    assert_eq!(source.len(), source_h * source_w * 3, "source bytes");
    assert_eq!(out.len(), height * width * 3, "destination bytes");
    let mut taps = Taps::default();
    taps.set((0..width).map(|x| {
        let (x0, weight) = column_of(x, width, source_w);
        Tap { offset: 3 * x0 as u32, weight: weight as i16 }
    }));
    let pitch = source_w * 3;
    // The last pixel is repeated once, so that the right neighbour of the last column exists.
    let mut row = vec![0i16; pitch + 3 + ROW_SPARE];
    for (y, out) in out.chunks_exact_mut(width * 3).enumerate() {
        let (y0, weight) = row_of(y, height, source_h);
        let y0 = y0 as usize;
        let y1 = (y0 + 1).min(source_h - 1);
        blend(&source[y0 * pitch..][..pitch], &source[y1 * pitch..][..pitch], weight as u16, &mut row);
        row.copy_within(pitch - 3..pitch, pitch);
        sample(&row, &taps, out);
    }
}

/// Where output pixel `i` of `out` lies on a source of `source` pixels, clamped to the first and last centres.
fn place(i: usize, out: usize, source: usize) -> f64 {
    ((i as f64 + 0.5) * source as f64 / out as f64 - 0.5).clamp(0.0, (source - 1) as f64)
}

/// The source column at or before column `x` of `width`, and the weight of the next in units of 1 / 2048.
pub(super) fn column_of(x: usize, width: usize, source_w: usize) -> (f64, f64) {
    split(place(x, width, source_w), f64::from(HORIZONTAL_ONE))
}

/// The same for rows, in units of 1 / 256.
pub(super) fn row_of(y: usize, height: usize, source_h: usize) -> (f64, f64) {
    split(place(y, height, source_h), f64::from(VERTICAL_ONE))
}

/// Size of an image loaded for a network input of `imgsz`: the long side becomes `imgsz`, the other
/// `min(ceil(side * imgsz / long), imgsz)`. Returns (height, width).
pub fn loaded_size(height: usize, width: usize, imgsz: usize) -> (usize, usize) {
    let ratio = imgsz as f64 / height.max(width) as f64;
    if ratio == 1.0 {
        return (height, width);
    }
    let side = |length: usize| ((length as f64 * ratio).ceil() as usize).clamp(1, imgsz);
    (side(height), side(width))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::rng::{Rng, Use};

    #[test]
    fn is_near_the_exact_formula() {
        let mut rng = Rng::new(11, Use::Test, 0, 0);
        for (h, w, oh, ow) in [(5, 7, 11, 3), (1, 1, 4, 4), (16, 9, 8, 9), (33, 21, 20, 64), (4, 701, 4, 640)]
        {
            let source = Image::from_pixels(h, w, (0..h * w * 3).map(|_| rng.next_u32() as u8).collect());
            let out = resize(&source, oh, ow);
            for y in 0..oh {
                for x in 0..ow {
                    let (py, px) = (place(y, oh, h), place(x, ow, w));
                    let (y0, x0) = (py.floor() as usize, px.floor() as usize);
                    let (y1, x1) = ((y0 + 1).min(h - 1), (x0 + 1).min(w - 1));
                    let (u, v) = (py.fract(), px.fract());
                    for c in 0..3 {
                        let at = |x: usize, y: usize| f64::from(source.pixel(x, y)[c]);
                        let exact = (at(x0, y0) * (1.0 - v) + at(x1, y0) * v) * (1.0 - u)
                            + (at(x0, y1) * (1.0 - v) + at(x1, y1) * v) * u;
                        let got = f64::from(out.pixel(x, y)[c]);
                        assert!(
                            (got - exact).abs() <= 1.1,
                            "{h}x{w} to {oh}x{ow} at {x},{y}: {got} and {exact}"
                        );
                    }
                }
            }
        }
    }
}
