//! CutMix (Yun et al., "CutMix: regularization strategy to train strong classifiers", ICCV 2019) for boxes: a
//! rectangle of another sample is pasted where this one has no object.

use super::PixelBox;
use crate::engine::rng::Rng;

/// Rectangles tried.
pub const CANDIDATES: usize = 3;
/// A pasted box must have at least this part of its area inside the rectangle.
const AREA_INSIDE_MIN: f32 = 0.10;

/// The random numbers of one cutmix, in the order they are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CutmixDraws {
    /// Candidates: left, top, right, bottom in pixels, right and bottom exclusive.
    pub rects: [[usize; 4]; CANDIDATES],
    /// Uniform number that picks one of the free candidates.
    pub choice: f64,
}

impl CutmixDraws {
    /// Draws three rectangles: lambda from Beta(1, 1), sides `floor(side * sqrt(1 - lambda))`, then a centre (x, y)
    /// anywhere; clipped to the image.
    pub fn draw(height: usize, width: usize, rng: &mut Rng) -> CutmixDraws {
        let rects = std::array::from_fn(|_| {
            let share = (1.0 - rng.uniform()).sqrt();
            let (w, h) = ((width as f64 * share) as usize, (height as f64 * share) as usize);
            let (cx, cy) = (rng.below(width), rng.below(height));
            [
                cx.saturating_sub(w / 2),
                cy.saturating_sub(h / 2),
                (cx + w / 2).min(width),
                (cy + h / 2).min(height),
            ]
        });
        CutmixDraws { rects, choice: rng.uniform() }
    }

    /// The candidate to use: uniform among those that touch no box; `None` when all do.
    pub fn choose(&self, boxes: &[PixelBox]) -> Option<[usize; 4]> {
        let free: Vec<[usize; 4]> = self
            .rects
            .into_iter()
            .filter(|rect| rect[2] > rect[0] && rect[3] > rect[1])
            .filter(|rect| boxes.iter().all(|b| inside(b, *rect).area() <= 0.0))
            .collect();
        let pick = (self.choice * free.len() as f64) as usize;
        free.get(pick.min(free.len().saturating_sub(1))).copied()
    }
}

/// The part of a box inside a rectangle (empty parts have no area).
fn inside(b: &PixelBox, rect: [usize; 4]) -> PixelBox {
    let [x1, y1, x2, y2] = b.xyxy;
    let [rx1, ry1, rx2, ry2] = rect.map(|v| v as f32);
    PixelBox { class: b.class, xyxy: [x1.max(rx1), y1.max(ry1), x2.min(rx2), y2.min(ry2)] }
}

/// Boxes of the partner as they appear in the rectangle: those with a tenth of their area or more inside, clipped.
pub fn pasted_boxes(partner: &[PixelBox], rect: [usize; 4]) -> Vec<PixelBox> {
    partner
        .iter()
        .filter_map(|b| {
            let part = inside(b, rect);
            (part.area() > 0.0 && part.area() >= AREA_INSIDE_MIN * b.area()).then_some(part)
        })
        .collect()
}

/// The rectangle to paste, if any, and appends the partner's boxes in it: `None`, and nothing appended, when no
/// candidate is free or no box of the partner would come along.
pub fn decide(
    draws: &CutmixDraws,
    boxes: &mut Vec<PixelBox>,
    partner_boxes: &[PixelBox],
) -> Option<[usize; 4]> {
    let rect = draws.choose(boxes)?;
    let pasted = pasted_boxes(partner_boxes, rect);
    if pasted.is_empty() {
        return None;
    }
    boxes.extend(pasted);
    Some(rect)
}

/// Pastes the rectangle that [`decide`] gives of `partner` into `image`, both `width * 3` bytes per row. Returns
/// whether there was one.
pub fn apply(
    draws: &CutmixDraws,
    width: usize,
    image: &mut [u8],
    boxes: &mut Vec<PixelBox>,
    partner: &[u8],
    partner_boxes: &[PixelBox],
) -> bool {
    let Some(rect) = decide(draws, boxes, partner_boxes) else { return false };
    for y in rect[1]..rect[3] {
        let row = (y * width + rect[0]) * 3..(y * width + rect[2]) * 3;
        image[row.clone()].copy_from_slice(&partner[row]);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boxed(xyxy: [f32; 4]) -> PixelBox {
        PixelBox { class: 1, xyxy }
    }

    #[test]
    fn pastes_only_where_it_is_free() {
        let draws = CutmixDraws { rects: [[0, 0, 4, 4], [4, 4, 8, 8], [2, 2, 6, 6]], choice: 0.99 };
        let mut boxes = vec![boxed([0.0, 0.0, 3.0, 3.0])];
        let (mut image, partner) = (vec![0u8; 8 * 8 * 3], vec![9u8; 8 * 8 * 3]);
        let other = [boxed([5.0, 5.0, 7.0, 7.0]), boxed([0.0, 0.0, 4.2, 8.0])];
        assert!(apply(&draws, 8, &mut image, &mut boxes, &partner, &other));
        assert_eq!(image.iter().filter(|&&v| v == 9).count(), 4 * 4 * 3);
        assert_eq!(boxes[1..], [boxed([5.0, 5.0, 7.0, 7.0])]);
        // Now every candidate touches a box.
        boxes.push(boxed([0.0, 0.0, 8.0, 8.0]));
        assert!(!apply(&draws, 8, &mut image, &mut boxes, &partner, &other));
    }
}
