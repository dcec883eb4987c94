//! A virtual canvas of image patches, and warping it to the network input without building it.
//!
//! A mosaic is a canvas of twice the input size of which the warp then reads a part. Here the canvas is only
//! described; [`Canvas::warp`] gathers from the source images. When the transform is axis-aligned (no rotation, shear
//! or perspective: the published defaults) each output row is a vertical blend of two canvas rows followed by a
//! horizontal sampling, which is the fast path; otherwise every pixel is gathered on its own. [`Canvas::materialise`]
//! builds the canvas in memory: the plain form that the fast ones are tested against.

use super::BORDER;
use super::mosaic::PatchRect;
use super::perspective::{Matrix, inverse};
use crate::data::Image;
use crate::data::rows::{HORIZONTAL_ONE, ROW_SPARE, Tap, Taps, VERTICAL_ONE, blend, sample, split};

/// A canvas of `height` x `width` pixels: grey, with patches on it. Patches do not overlap.
#[derive(Debug)]
pub struct Canvas<'a> {
    height: usize,
    width: usize,
    patches: Vec<(PatchRect, &'a Image)>,
}

/// Buffers of the warp, kept between calls.
#[derive(Debug, Default)]
pub struct WarpScratch {
    upper: CanvasRow,
    lower: CanvasRow,
    blended: Vec<i16>,
    taps: Taps,
}

/// A piece of one canvas row.
#[derive(Debug, Default)]
struct CanvasRow {
    y: Option<i64>,
    pixels: Vec<u8>,
}

/// Whether rows and columns stay rows and columns.
pub fn is_axis_aligned(back: &Matrix) -> bool {
    [back[0][1], back[1][0], back[2][0], back[2][1]] == [0.0; 4]
}

/// The canvas column at or before output column `x` of an axis-aligned transform (`back` leads from the output to the
/// canvas, which is `width` wide), and the weight of the next column in units of 1 / 2048. Columns -2, -1 and width,
/// width + 1 are grey; anything farther out reads the same grey.
pub fn column_of(back: &Matrix, x: usize, width: usize) -> (f64, f64) {
    let at = (back[0][0] * x as f64 + back[0][2]) / back[2][2];
    split(at.clamp(-2.0, width as f64), f64::from(HORIZONTAL_ONE))
}

/// The same for rows, in units of 1 / 256.
pub fn row_of(back: &Matrix, y: usize, height: usize) -> (f64, f64) {
    let at = (back[1][1] * y as f64 + back[1][2]) / back[2][2];
    split(at.clamp(-2.0, height as f64), f64::from(VERTICAL_ONE))
}

impl<'a> Canvas<'a> {
    /// One image and nothing else.
    pub fn single(image: &'a Image) -> Canvas<'a> {
        let rect = PatchRect { dest: [0, 0, image.width, image.height], source: [0, 0] };
        Canvas { height: image.height, width: image.width, patches: vec![(rect, image)] }
    }

    /// Patches on a canvas. Panics when a patch reaches out of the canvas or of its image.
    pub fn new(height: usize, width: usize, patches: Vec<(PatchRect, &'a Image)>) -> Canvas<'a> {
        for (rect, image) in &patches {
            let [x1, y1, x2, y2] = rect.dest;
            assert!(
                x1 <= x2 && x2 <= width && y1 <= y2 && y2 <= height,
                "{rect:?} on a {height}x{width} canvas"
            );
            let fits = rect.source[0] + x2 - x1 <= image.width && rect.source[1] + y2 - y1 <= image.height;
            assert!(fits, "{rect:?} in a {}x{} image", image.height, image.width);
        }
        Canvas { height, width, patches }
    }

    /// Height and width.
    pub fn size(&self) -> (usize, usize) {
        (self.height, self.width)
    }

    /// Builds the canvas in memory.
    pub fn materialise(&self) -> Image {
        let mut out = Image::filled(self.height, self.width, [BORDER; 3]);
        for y in 0..self.height {
            let row = &mut out.pixels[y * self.width * 3..][..self.width * 3];
            self.fill_row(y as i64, 0, row);
        }
        out
    }

    /// Warps the canvas by `matrix` (canvas to output) into `out`, `out_hw` pixels of 3 bytes: bilinear between pixel
    /// centres at whole numbers, grey outside. Within one level of exact interpolation. A matrix that cannot be
    /// inverted gives plain grey.
    pub fn warp(&self, matrix: &Matrix, out_hw: (usize, usize), out: &mut [u8], scratch: &mut WarpScratch) {
        assert_eq!(out.len(), out_hw.0 * out_hw.1 * 3, "bytes of the result");
        let Some(back) = inverse(matrix) else { return out.fill(BORDER) };
        if is_axis_aligned(&back) {
            self.warp_axis_aligned(&back, out_hw.1, out, scratch);
        } else {
            self.warp_general(&back, out_hw.1, out);
        }
    }

    /// Output rows and columns map to canvas rows and columns.
    fn warp_axis_aligned(&self, back: &Matrix, out_w: usize, out: &mut [u8], scratch: &mut WarpScratch) {
        let WarpScratch { upper, lower, blended, taps } = scratch;
        let column = |x: usize| column_of(back, x, self.width);
        let ends = [column(0).0, column(out_w - 1).0];
        let first = ends[0].min(ends[1]) as i64;
        let columns = (ends[0].max(ends[1]) as i64 + 2 - first) as usize;
        taps.set((0..out_w).map(|x| {
            let (x0, weight) = column(x);
            Tap { offset: 3 * (x0 as i64 - first) as u32, weight: weight as i16 }
        }));
        blended.clear();
        blended.resize(columns * 3 + ROW_SPARE, 0);
        for row in [&mut *upper, &mut *lower] {
            row.y = None;
            row.pixels.resize(columns * 3, 0);
        }
        for (y, out) in out.chunks_exact_mut(out_w * 3).enumerate() {
            let (y0, weight) = row_of(back, y, self.height);
            let y0 = y0 as i64;
            if y0 + 1 < 0 || y0 >= self.height as i64 {
                out.fill(BORDER);
                continue;
            }
            if upper.y != Some(y0) && lower.y == Some(y0) {
                std::mem::swap(upper, lower);
            }
            for (row, y) in [(&mut *upper, y0), (&mut *lower, y0 + 1)] {
                if row.y != Some(y) {
                    self.fill_row(y, first, &mut row.pixels);
                    row.y = Some(y);
                }
            }
            blend(&upper.pixels, &lower.pixels, weight as u16, blended);
            sample(blended, taps, out);
        }
    }

    /// Copies a piece of canvas row `y`, from column `first` on, grey where nothing is.
    fn fill_row(&self, y: i64, first: i64, row: &mut [u8]) {
        row.fill(BORDER);
        let columns = (row.len() / 3) as i64;
        for (rect, image) in &self.patches {
            let [x1, y1, x2, y2] = rect.dest.map(|v| v as i64);
            let (from, to) = (x1.max(first), x2.min(first + columns));
            if y < y1 || y >= y2 || from >= to {
                continue;
            }
            let source = (from - x1) as usize + rect.source[0];
            let count = (to - from) as usize * 3;
            let pixels = &image.row((y - y1) as usize + rect.source[1])[source * 3..][..count];
            row[(from - first) as usize * 3..][..count].copy_from_slice(pixels);
        }
    }

    /// Every pixel on its own, in single precision.
    fn warp_general(&self, back: &Matrix, out_w: usize, out: &mut [u8]) {
        let (height, width) = (self.height as f64, self.width as f64);
        let mut last = 0;
        for (i, out) in out.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            let (x, y) = ((i % out_w) as f64, (i / out_w) as f64);
            let at = |row: &[f64; 3]| row[0] * x + row[1] * y + row[2];
            let w = at(&back[2]);
            let (cx, cy) = (at(&back[0]) / w, at(&back[1]) / w);
            // Written so that a coordinate that is not a number counts as outside.
            if !(cx > -1.0 && cy > -1.0 && cx < width && cy < height) {
                *out = [BORDER; 3];
                continue;
            }
            let (x0, y0) = (cx.floor(), cy.floor());
            let (u, v) = ((cx - x0) as f32, (cy - y0) as f32);
            let [a, b, c, d] = self.square(x0 as i64, y0 as i64, &mut last);
            *out = std::array::from_fn(|k| {
                let upper = f32::from(a[k]) * (1.0 - u) + f32::from(b[k]) * u;
                let lower = f32::from(c[k]) * (1.0 - u) + f32::from(d[k]) * u;
                (upper * (1.0 - v) + lower * v).round_ties_even() as u8
            });
        }
    }

    /// The four pixels at (x, y), (x + 1, y), (x, y + 1), (x + 1, y + 1). `last` is the patch used before: neighbouring
    /// pixels mostly lie on the same.
    #[inline]
    fn square(&self, x: i64, y: i64, last: &mut usize) -> [[u8; 3]; 4] {
        if let Some((rect, image)) = self.patches.get(*last) {
            let [x1, y1, x2, y2] = rect.dest.map(|v| v as i64);
            if x >= x1 && x + 1 < x2 && y >= y1 && y + 1 < y2 {
                let at =
                    ((y - y1) as usize + rect.source[1]) * image.width + (x - x1) as usize + rect.source[0];
                let pair = |at: usize| {
                    let p = &image.pixels[at * 3..at * 3 + 6];
                    ([p[0], p[1], p[2]], [p[3], p[4], p[5]])
                };
                let ((a, b), (c, d)) = (pair(at), pair(at + image.width));
                return [a, b, c, d];
            }
        }
        [(x, y), (x + 1, y), (x, y + 1), (x + 1, y + 1)].map(|(x, y)| self.pixel(x, y, last))
    }

    /// One pixel, grey where nothing is.
    fn pixel(&self, x: i64, y: i64, last: &mut usize) -> [u8; 3] {
        for (i, (rect, image)) in self.patches.iter().enumerate() {
            let [x1, y1, x2, y2] = rect.dest.map(|v| v as i64);
            if x >= x1 && x < x2 && y >= y1 && y < y2 {
                *last = i;
                return image.pixel((x - x1) as usize + rect.source[0], (y - y1) as usize + rect.source[1]);
            }
        }
        [BORDER; 3]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::augment::perspective::PerspectiveDraws;
    use crate::data::augment::{AugmentArgs, mosaic};
    use crate::engine::rng::{Rng, Use};

    fn noise(rng: &mut Rng, height: usize, width: usize) -> Image {
        Image::from_pixels(height, width, (0..height * width * 3).map(|_| rng.next_u32() as u8).collect())
    }

    /// Plain bilinear sampling in f64.
    fn exact(canvas: &Image, back: &Matrix, x: usize, y: usize, c: usize) -> f64 {
        let at = |row: &[f64; 3]| row[0] * x as f64 + row[1] * y as f64 + row[2];
        let (cx, cy) = (at(&back[0]) / at(&back[2]), at(&back[1]) / at(&back[2]));
        let value = |x: f64, y: f64| {
            let inside = x >= 0.0 && y >= 0.0 && x < canvas.width as f64 && y < canvas.height as f64;
            f64::from(if inside { canvas.pixel(x as usize, y as usize)[c] } else { BORDER })
        };
        let (x0, y0, u, v) = (cx.floor(), cy.floor(), cx - cx.floor(), cy - cy.floor());
        (value(x0, y0) * (1.0 - u) + value(x0 + 1.0, y0) * u) * (1.0 - v)
            + (value(x0, y0 + 1.0) * (1.0 - u) + value(x0 + 1.0, y0 + 1.0) * u) * v
    }

    #[test]
    fn fused_mosaic_equals_the_canvas_in_memory() {
        let mut rng = Rng::new(21, Use::Test, 0, 0);
        let s = 24;
        let plain = AugmentArgs::default();
        let turned = AugmentArgs { degrees: 20.0, shear: 5.0, perspective: 0.001, ..plain.clone() };
        for round in 0..24 {
            let args = if round % 2 == 0 { &plain } else { &turned };
            let images: Vec<Image> = (0..4)
                .map(|_| {
                    let (h, w) = (1 + rng.below(s), 1 + rng.below(s));
                    noise(&mut rng, h, w)
                })
                .collect();
            let centre = mosaic::draw_centre(s, &mut rng);
            let patches = images
                .iter()
                .enumerate()
                .map(|(i, image)| (mosaic::place(i, centre, image.height, image.width, s), image))
                .collect();
            let canvas = Canvas::new(2 * s, 2 * s, patches);
            let memory = canvas.materialise();
            let m = PerspectiveDraws::draw(args, &mut rng).matrix((2 * s, 2 * s), (s, s));
            let back = inverse(&m).expect("regular");
            let mut scratch = WarpScratch::default();
            let (mut fused, mut two_step) = (vec![0u8; s * s * 3], vec![0u8; s * s * 3]);
            canvas.warp(&m, (s, s), &mut fused, &mut scratch);
            Canvas::single(&memory).warp(&m, (s, s), &mut two_step, &mut scratch);
            assert_eq!(fused, two_step);
            for (i, &got) in fused.iter().enumerate() {
                let want = exact(&memory, &back, i / 3 % s, i / 3 / s, i % 3);
                assert!((f64::from(got) - want).abs() <= 1.1, "round {round}: {got} for {want}");
            }
        }
    }
}
