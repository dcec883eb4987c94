//! What a loader hands over.

use super::resize::resize_into;
use crate::detect::targets::Target;

/// How to map a box from the network input back to the original image:
/// `original = (input - pad) / ratio`, then clipped to the original.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Geometry {
    /// Height of the original image, pixels.
    pub orig_h: u32,
    /// Width of the original image, pixels.
    pub orig_w: u32,
    /// Scale of x from the original to the input.
    pub ratio_x: f32,
    /// Scale of y from the original to the input.
    pub ratio_y: f32,
    /// Columns of padding to the left.
    pub pad_x: f32,
    /// Rows of padding above.
    pub pad_y: f32,
}

impl Geometry {
    /// Maps left, top, right, bottom from input pixels to pixels of the original image, clipped to it.
    pub fn to_original(&self, xyxy: [f32; 4]) -> [f32; 4] {
        let x = |v: f32| ((v - self.pad_x) / self.ratio_x).clamp(0.0, self.orig_w as f32);
        let y = |v: f32| ((v - self.pad_y) / self.ratio_y).clamp(0.0, self.orig_h as f32);
        [x(xyxy[0]), y(xyxy[1]), x(xyxy[2]), y(xyxy[3])]
    }

    /// Maps left, top, right, bottom from pixels of the original image to input pixels.
    pub fn to_input(&self, xyxy: [f32; 4]) -> [f32; 4] {
        let (x, y) = (|v: f32| v * self.ratio_x + self.pad_x, |v: f32| v * self.ratio_y + self.pad_y);
        [x(xyxy[0]), y(xyxy[1]), x(xyxy[2]), y(xyxy[3])]
    }
}

/// Images and targets of one step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// `n * h * w * 3` bytes, RGB, rows top to bottom.
    pub images: Vec<u8>,
    /// Number of images.
    pub n: usize,
    /// Height of each, pixels.
    pub h: usize,
    /// Width of each, pixels.
    pub w: usize,
    /// Boxes, grouped by image, images ascending.
    pub targets: Vec<Target>,
    /// Which image of the split each one is (with mosaic: the one it was built around).
    pub samples: Vec<u32>,
    /// The way back to the original image. For training batches, whose images have none, the ratios are 1.
    pub geometry: Vec<Geometry>,
    /// Bytes changed order to blue, green, red for these images (`bgr`); usually none.
    pub swapped: Vec<u32>,
}

impl Batch {
    /// Empties the batch for `n` images of `h` x `w`, keeping its memory.
    pub(super) fn reset(&mut self, n: usize, h: usize, w: usize) {
        (self.n, self.h, self.w) = (n, h, w);
        self.images.resize(n * h * w * 3, 0);
        self.targets.clear();
        self.samples.clear();
        self.geometry.clear();
        self.swapped.clear();
    }

    /// The pixels of image `i`.
    pub fn image(&self, i: usize) -> &[u8] {
        let bytes = self.h * self.w * 3;
        &self.images[i * bytes..(i + 1) * bytes]
    }
}

/// Scales all images of a batch to `h` x `w` (bilinear, pixel centres at half-integers), as `multi_scale` does.
/// Targets are fractions of the input and do not change. Does nothing when the size is right already.
pub fn resize_batch(batch: &mut Batch, h: usize, w: usize) {
    if (batch.h, batch.w) == (h, w) {
        return;
    }
    let mut out = vec![0; batch.n * h * w * 3];
    for (i, out) in out.chunks_exact_mut(h * w * 3).enumerate() {
        resize_into(batch.image(i), batch.h, batch.w, out, h, w);
    }
    let (sx, sy) = (w as f32 / batch.w as f32, h as f32 / batch.h as f32);
    for g in &mut batch.geometry {
        (g.ratio_x, g.ratio_y, g.pad_x, g.pad_y) =
            (g.ratio_x * sx, g.ratio_y * sy, g.pad_x * sx, g.pad_y * sy);
    }
    (batch.images, batch.h, batch.w) = (out, h, w);
}
