//! A canvas over an RGB image: anti-aliased rectangles, lines and text, with clipping.
//!
//! Coordinates are pixels with the origin at the top left corner of the image; pixel (0, 0) covers
//! 0..1 in both directions. Whatever lies outside the image or the clip rectangle is not drawn.

use image::RgbImage;

use super::font::{self, Anchor, TextStyle};
use super::palette::Colour;

/// A rectangle in pixels: left, top, right, bottom.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rect {
    /// Left edge.
    pub x0: f32,
    /// Upper edge.
    pub y0: f32,
    /// Right edge.
    pub x1: f32,
    /// Lower edge.
    pub y1: f32,
}

impl Rect {
    /// From the edges.
    pub fn new(x0: f32, y0: f32, x1: f32, y1: f32) -> Rect {
        Rect { x0, y0, x1, y1 }
    }

    /// Width in pixels.
    pub fn width(&self) -> f32 {
        self.x1 - self.x0
    }

    /// Height in pixels.
    pub fn height(&self) -> f32 {
        self.y1 - self.y0
    }

    /// The same rectangle with every edge moved inwards (or outwards where negative).
    pub fn inset(&self, left: f32, top: f32, right: f32, bottom: f32) -> Rect {
        Rect::new(self.x0 + left, self.y0 + top, self.x1 - right, self.y1 - bottom)
    }

    fn is_finite(&self) -> bool {
        self.x0.is_finite() && self.y0.is_finite() && self.x1.is_finite() && self.y1.is_finite()
    }
}

/// Draws on a borrowed image.
pub struct Canvas<'a> {
    image: &'a mut RgbImage,
    clip: Rect,
    mask: Vec<f32>,
}

impl<'a> Canvas<'a> {
    /// A canvas over the whole image.
    pub fn new(image: &'a mut RgbImage) -> Canvas<'a> {
        let clip = Rect::new(0.0, 0.0, image.width() as f32, image.height() as f32);
        Canvas { image, clip, mask: Vec::new() }
    }

    /// The whole image as a rectangle.
    pub fn bounds(&self) -> Rect {
        Rect::new(0.0, 0.0, self.image.width() as f32, self.image.height() as f32)
    }

    /// Draws nothing outside `clip` (rounded to whole pixels) until the next call; `None` lifts it.
    pub fn set_clip(&mut self, clip: Option<Rect>) {
        let all = self.bounds();
        self.clip = clip.map_or(all, |c| {
            Rect::new(
                c.x0.round().max(0.0),
                c.y0.round().max(0.0),
                c.x1.round().min(all.x1),
                c.y1.round().min(all.y1),
            )
        });
    }

    fn blend(&mut self, x: usize, y: usize, colour: Colour, alpha: f32) {
        let pixel = self.image.get_pixel_mut(x as u32, y as u32);
        for (value, ink) in pixel.0.iter_mut().zip(colour) {
            let mixed = f32::from(*value) + (f32::from(ink) - f32::from(*value)) * alpha;
            *value = mixed.round() as u8;
        }
    }

    /// Whole pixels touched by `x0..x1`, `y0..y1` inside the clip; `None` when there are none.
    fn span(&self, area: Rect) -> Option<(usize, usize, usize, usize)> {
        if !area.is_finite() {
            return None;
        }
        let x0 = area.x0.floor().max(self.clip.x0) as usize;
        let y0 = area.y0.floor().max(self.clip.y0) as usize;
        let x1 = area.x1.ceil().min(self.clip.x1).max(0.0) as usize;
        let y1 = area.y1.ceil().min(self.clip.y1).max(0.0) as usize;
        (x0 < x1 && y0 < y1).then_some((x0, y0, x1, y1))
    }

    /// Fills a rectangle; edges between pixels are anti-aliased. `alpha` 0..1.
    pub fn fill_rect(&mut self, rect: Rect, colour: Colour, alpha: f32) {
        let Some((x0, y0, x1, y1)) = self.span(rect) else { return };
        for y in y0..y1 {
            let rows = (rect.y1.min(y as f32 + 1.0) - rect.y0.max(y as f32)).clamp(0.0, 1.0);
            for x in x0..x1 {
                let columns = (rect.x1.min(x as f32 + 1.0) - rect.x0.max(x as f32)).clamp(0.0, 1.0);
                self.blend(x, y, colour, alpha * rows * columns);
            }
        }
    }

    /// Fills a rectangle with rounded corners of `radius` pixels.
    pub fn fill_rounded(&mut self, rect: Rect, radius: f32, colour: Colour, alpha: f32) {
        let radius = radius.min(rect.width() / 2.0).min(rect.height() / 2.0).max(0.0);
        let Some((x0, y0, x1, y1)) = self.span(rect) else { return };
        let (half_w, half_h) = (rect.width() / 2.0, rect.height() / 2.0);
        let (centre_x, centre_y) = (rect.x0 + half_w, rect.y0 + half_h);
        for y in y0..y1 {
            for x in x0..x1 {
                // Signed distance to the rounded rectangle, negative inside.
                let dx = (x as f32 + 0.5 - centre_x).abs() - half_w + radius;
                let dy = (y as f32 + 0.5 - centre_y).abs() - half_h + radius;
                let outside = dx.max(0.0).hypot(dy.max(0.0));
                let distance = outside + dx.max(dy).min(0.0) - radius;
                let coverage = (0.5 - distance).clamp(0.0, 1.0);
                if coverage > 0.0 {
                    self.blend(x, y, colour, alpha * coverage);
                }
            }
        }
    }

    /// Draws the outline of a rectangle; the line of `width` pixels is centred on the edges.
    pub fn stroke_rect(&mut self, rect: Rect, width: f32, colour: Colour, alpha: f32) {
        let half = width / 2.0;
        let outer = rect.inset(-half, -half, -half, -half);
        let inner = rect.inset(half, half, half, half);
        if inner.width() <= 0.0 || inner.height() <= 0.0 {
            self.fill_rect(outer, colour, alpha);
            return;
        }
        self.fill_rect(Rect { y1: inner.y0, ..outer }, colour, alpha);
        self.fill_rect(Rect { y0: inner.y1, ..outer }, colour, alpha);
        self.fill_rect(Rect::new(outer.x0, inner.y0, inner.x0, inner.y1), colour, alpha);
        self.fill_rect(Rect::new(inner.x1, inner.y0, outer.x1, inner.y1), colour, alpha);
    }

    /// Draws connected segments of `width` pixels with round joins and ends. Where a point is not
    /// finite the line is broken; a point alone between breaks is drawn as a dot.
    pub fn polyline(&mut self, points: &[(f32, f32)], width: f32, colour: Colour, alpha: f32) {
        for run in points.split(|p| !(p.0.is_finite() && p.1.is_finite())) {
            self.stroke_run(run, width / 2.0, colour, alpha);
        }
    }

    /// Draws a polyline as dashes of `dash` pixels with gaps of `gap` pixels.
    pub fn dashed(&mut self, points: &[(f32, f32)], dash: f32, gap: f32, width: f32, colour: Colour) {
        let mut along = 0.0f32;
        for pair in points.windows(2) {
            let ((ax, ay), (bx, by)) = (pair[0], pair[1]);
            let length = (bx - ax).hypot(by - ay);
            if !length.is_finite() || length <= 0.0 {
                along = 0.0;
                continue;
            }
            let at = |t: f32| (ax + (bx - ax) * t / length, ay + (by - ay) * t / length);
            let mut t = 0.0;
            while t < length {
                let phase = (along + t) % (dash + gap);
                let step = if phase < dash { dash - phase } else { dash + gap - phase };
                // A step below one part in a million of the line would not move `t`.
                let end = (t + step.max(0.01)).min(length);
                if phase < dash {
                    self.stroke_run(&[at(t), at(end)], width / 2.0, colour, 1.0);
                }
                t = end;
            }
            along += length;
        }
    }

    /// Fills a disc.
    pub fn disc(&mut self, centre: (f32, f32), radius: f32, colour: Colour, alpha: f32) {
        self.polyline(&[centre], radius * 2.0, colour, alpha);
    }

    /// One run of finite points. Coverage is gathered in a mask first and blended once, so that a line
    /// with `alpha < 1` does not darken where its own segments meet.
    fn stroke_run(&mut self, run: &[(f32, f32)], half: f32, colour: Colour, alpha: f32) {
        let Some(&first) = run.first() else { return };
        let mut area = Rect::new(first.0, first.1, first.0, first.1);
        for &(x, y) in run {
            area = Rect::new(area.x0.min(x), area.y0.min(y), area.x1.max(x), area.y1.max(y));
        }
        let reach = half + 1.0;
        let Some((x0, y0, x1, y1)) = self.span(area.inset(-reach, -reach, -reach, -reach)) else {
            return;
        };
        let width = x1 - x0;
        let mut mask = std::mem::take(&mut self.mask);
        mask.clear();
        mask.resize(width * (y1 - y0), 0.0);
        let segments = (run.len() - 1).max(1);
        for i in 0..segments {
            let (a, b) = (run[i], run[(i + 1).min(run.len() - 1)]);
            let around = Rect::new(
                a.0.min(b.0) - reach,
                a.1.min(b.1) - reach,
                a.0.max(b.0) + reach,
                a.1.max(b.1) + reach,
            );
            let Some((sx0, sy0, sx1, sy1)) = self.span(around) else { continue };
            for y in sy0..sy1 {
                for x in sx0..sx1 {
                    let distance = segment_distance((x as f32 + 0.5, y as f32 + 0.5), a, b);
                    let coverage = (half + 0.5 - distance).clamp(0.0, 1.0).min(half * 2.0);
                    let cell = &mut mask[(y - y0) * width + x - x0];
                    *cell = cell.max(coverage);
                }
            }
        }
        for (row, line) in mask.chunks_exact(width).enumerate() {
            for (column, &coverage) in line.iter().enumerate() {
                if coverage > 0.0 {
                    self.blend(x0 + column, y0 + row, colour, alpha * coverage);
                }
            }
        }
        self.mask = mask;
    }

    /// Draws one line of text; `y` is the vertical middle of the line's capitals and digits.
    pub fn text(&mut self, text: &str, x: f32, y: f32, anchor: Anchor, style: &TextStyle) {
        let mask = font::rasterise(text, style);
        let left = x - mask.advance * anchor_share(anchor) - font::MASK_MARGIN as f32;
        // Capitals of the text face are 0.69 em high.
        let top = (y + 0.345 * style.size - mask.baseline).round() as i64;
        let left = left.round() as i64;
        for row in 0..mask.height {
            for column in 0..mask.width {
                let coverage = mask.coverage[row * mask.width + column];
                self.blend_checked(left + column as i64, top + row as i64, style.colour, coverage);
            }
        }
    }

    /// Draws one line of text that reads from bottom to top; `x` is the middle of its capitals.
    pub fn text_upwards(&mut self, text: &str, x: f32, y: f32, anchor: Anchor, style: &TextStyle) {
        let mask = font::rasterise(text, style);
        let bottom = (y + mask.advance * anchor_share(anchor) + font::MASK_MARGIN as f32).round() as i64;
        let left = (x + 0.345 * style.size - mask.baseline).round() as i64;
        for row in 0..mask.height {
            for column in 0..mask.width {
                let coverage = mask.coverage[row * mask.width + column];
                self.blend_checked(left + row as i64, bottom - 1 - column as i64, style.colour, coverage);
            }
        }
    }

    fn blend_checked(&mut self, x: i64, y: i64, colour: Colour, alpha: f32) {
        let (fx, fy) = (x as f32, y as f32);
        let inside = fx >= self.clip.x0 && fx < self.clip.x1 && fy >= self.clip.y0 && fy < self.clip.y1;
        if alpha > 0.0 && inside {
            self.blend(x as usize, y as usize, colour, alpha);
        }
    }
}

fn anchor_share(anchor: Anchor) -> f32 {
    match anchor {
        Anchor::Start => 0.0,
        Anchor::Middle => 0.5,
        Anchor::End => 1.0,
    }
}

/// Distance from `p` to the segment `a`-`b`.
fn segment_distance(p: (f32, f32), a: (f32, f32), b: (f32, f32)) -> f32 {
    let (dx, dy) = (b.0 - a.0, b.1 - a.1);
    let length2 = dx * dx + dy * dy;
    let t = if length2 > 0.0 { ((p.0 - a.0) * dx + (p.1 - a.1) * dy) / length2 } else { 0.0 };
    let t = t.clamp(0.0, 1.0);
    (p.0 - a.0 - t * dx).hypot(p.1 - a.1 - t * dy)
}
