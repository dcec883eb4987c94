//! Boxes with labels on one image.

use image::RgbImage;

use super::canvas::{Canvas, Rect};
use super::font::{Anchor, TextStyle, elide, line_height, text_width};
use super::palette::{class_colour, text_colour_on};

/// A box to draw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DrawBox {
    /// Left, top, right, bottom in pixels of the image.
    pub xyxy: [f32; 4],
    /// Class index; it picks the colour and the name.
    pub class: usize,
    /// Score of a prediction, `None` for a label.
    pub score: Option<f32>,
}

/// How boxes are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BoxStyle {
    /// Width of the outline, pixels.
    pub line_width: f32,
    /// Em size of the label, pixels.
    pub font_size: f32,
    /// Write class names and scores; without it only outlines are drawn.
    pub labels: bool,
}

impl BoxStyle {
    /// A line and a text size that suit an image of this size: thin on thumbnails, readable on
    /// photographs of many megapixels.
    pub fn for_size(width: u32, height: u32) -> BoxStyle {
        let side = (width as f32 + height as f32) / 2.0;
        BoxStyle {
            line_width: (side * 0.003).round().clamp(2.0, 12.0),
            font_size: (side * 0.022).clamp(11.0, 64.0),
            labels: true,
        }
    }
}

/// Draws boxes on an image, each in its class's colour with `name` or `name score` on a filled label.
///
/// The least confident box is drawn first, so the most confident one is on top. A class without a name
/// is written as its number. Boxes that are not finite are left out; those that overhang are clipped.
pub fn draw_boxes(image: &mut RgbImage, boxes: &[DrawBox], names: &[String], style: &BoxStyle) {
    let mut order: Vec<&DrawBox> = boxes.iter().filter(|b| b.xyxy.iter().all(|v| v.is_finite())).collect();
    order.sort_by(|a, b| a.score.unwrap_or(1.0).total_cmp(&b.score.unwrap_or(1.0)));
    let mut canvas = Canvas::new(image);
    // All outlines first: a label is not crossed by the outline of another box.
    for b in &order {
        outline(&mut canvas, b, style);
    }
    if style.labels {
        for b in &order {
            label(&mut canvas, b, names, style);
        }
    }
}

fn outline(canvas: &mut Canvas<'_>, b: &DrawBox, style: &BoxStyle) {
    let [x0, y0, x1, y1] = b.xyxy;
    let rect = Rect::new(x0.min(x1), y0.min(y1), x0.max(x1), y0.max(y1));
    let all = canvas.bounds();
    let half = style.line_width / 2.0;
    // The whole width of the line stays visible at the border of the image, and the line lies on whole
    // pixels: a crisp edge.
    let snap = |value: f32, end: f32| (value.clamp(half, (end - half).max(half)) - half).round() + half;
    let kept =
        Rect::new(snap(rect.x0, all.x1), snap(rect.y0, all.y1), snap(rect.x1, all.x1), snap(rect.y1, all.y1));
    canvas.stroke_rect(kept, style.line_width, class_colour(b.class), 1.0);
}

fn label(canvas: &mut Canvas<'_>, b: &DrawBox, names: &[String], style: &BoxStyle) {
    let all = canvas.bounds();
    let name = names.get(b.class).cloned().unwrap_or_else(|| b.class.to_string());
    let text = match b.score {
        Some(score) => format!("{name} {score:.2}"),
        None => name,
    };
    let padding = (style.font_size * 0.28).round();
    let text = elide(&text, style.font_size, all.x1 - 2.0 * padding);
    let width = text_width(&text, style.font_size) + 2.0 * padding;
    let height = (line_height(style.font_size) + 0.2 * padding).round();
    let [x0, y0, x1, y1] = b.xyxy;
    let half = style.line_width / 2.0;
    let left = (x0.min(x1) - half).round().clamp(0.0, (all.x1 - width).max(0.0));
    let edge = y0.min(y1);
    // Above the box where there is room, otherwise inside it.
    let top = if edge - half - height >= 0.0 { edge - half - height + 1.0 } else { edge - half };
    let top = top.round().clamp(0.0, (all.y1 - height).max(0.0)).min(y0.max(y1).max(0.0));
    let colour = class_colour(b.class);
    let rect = Rect::new(left, top, left + width, top + height);
    canvas.fill_rect(rect, colour, 0.92);
    let ink = TextStyle::new(style.font_size).colour(text_colour_on(colour));
    canvas.text(&text, left + padding, top + height * 0.5, Anchor::Start, &ink);
}
