//! Mosaic of four: where the patches go, and their boxes.

use super::PixelBox;
use crate::engine::rng::Rng;

/// One rectangle of a source image on the canvas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PatchRect {
    /// Destination on the canvas: left, top, right, bottom (right and bottom exclusive).
    pub dest: [usize; 4],
    /// Left and top of the same rectangle in the source image.
    pub source: [usize; 2],
}

/// Draws the centre: y first, then x, each `floor(U(s / 2, 3 s / 2))`. Returns (x, y).
pub fn draw_centre(imgsz: usize, rng: &mut Rng) -> (usize, usize) {
    let s = imgsz as f64;
    let y = rng.range(s / 2.0, 1.5 * s) as usize;
    let x = rng.range(s / 2.0, 1.5 * s) as usize;
    (x, y)
}

/// Places patch `position` (0 top-left, 1 top-right, 2 bottom-left, 3 bottom-right) of `height` x `width` pixels on a
/// canvas of `2 s` x `2 s` so that its inner corner lies on the centre, cropped on its outer sides.
pub fn place(
    position: usize,
    centre: (usize, usize),
    height: usize,
    width: usize,
    imgsz: usize,
) -> PatchRect {
    assert!(position < 4, "a mosaic has four patches");
    let side = 2 * imgsz;
    let axis = |before: bool, centre: usize, length: usize| {
        if before {
            let start = centre.saturating_sub(length);
            (start, centre, length - (centre - start))
        } else {
            (centre, side.min(centre + length), 0)
        }
    };
    let (x1, x2, source_x) = axis(position.is_multiple_of(2), centre.0, width);
    let (y1, y2, source_y) = axis(position < 2, centre.1, height);
    PatchRect { dest: [x1, y1, x2, y2], source: [source_x, source_y] }
}

/// Moves boxes of a source image (pixels) onto the canvas, clips them to it, drops the empty ones, and appends them.
pub fn append_boxes(rect: &PatchRect, imgsz: usize, boxes: &[PixelBox], out: &mut Vec<PixelBox>) {
    let side = (2 * imgsz) as f32;
    let (dx, dy) = (rect.dest[0] as f32 - rect.source[0] as f32, rect.dest[1] as f32 - rect.source[1] as f32);
    out.extend(
        boxes
            .iter()
            .map(|b| {
                let [x1, y1, x2, y2] = b.xyxy;
                PixelBox { class: b.class, xyxy: [x1 + dx, y1 + dy, x2 + dx, y2 + dy] }.clipped(side, side)
            })
            .filter(|b| b.area() > 0.0),
    );
}
