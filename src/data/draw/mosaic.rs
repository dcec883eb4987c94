//! A grid of images with their boxes and names.

use image::{RgbImage, imageops};

use super::boxes::{BoxStyle, DrawBox, draw_boxes};
use super::canvas::{Canvas, Rect};
use super::font::{Anchor, TextStyle, elide, line_height, text_width};

/// One cell of a mosaic.
#[derive(Clone, Debug)]
pub struct DrawImage {
    /// The picture.
    pub image: RgbImage,
    /// Boxes in pixels of that picture.
    pub boxes: Vec<DrawBox>,
    /// Written in the upper left corner, usually the file name; may be empty.
    pub title: String,
}

/// How a mosaic is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MosaicArgs {
    /// Images per row; 0 picks the smallest square grid.
    pub columns: usize,
    /// Longest side of a cell in pixels; every image is scaled to it, so that labels find room on small ones.
    pub cell_px: u32,
}

impl Default for MosaicArgs {
    fn default() -> MosaicArgs {
        MosaicArgs { columns: 0, cell_px: 480 }
    }
}

/// Space between cells, pixels.
const GAP: u32 = 4;
/// Colour of the gaps and of cells that an image does not fill.
const PAPER: [u8; 3] = [241, 245, 249];

/// Draws images in a grid, in reading order. Boxes and text are drawn after scaling, so they are
/// readable whatever the size of the images. An empty list gives one empty cell.
pub fn mosaic(images: &[DrawImage], names: &[String], args: MosaicArgs) -> RgbImage {
    let cell_max = args.cell_px.clamp(32, 4096);
    let scales: Vec<(u32, u32)> = images.iter().map(|i| scaled_size(&i.image, cell_max)).collect();
    let cell_w = scales.iter().map(|s| s.0).max().unwrap_or(cell_max);
    let cell_h = scales.iter().map(|s| s.1).max().unwrap_or(cell_max);
    let square = (images.len().max(1) as f64).sqrt().ceil() as usize;
    let columns = if args.columns == 0 { square } else { args.columns.min(images.len().max(1)) };
    let rows = images.len().max(1).div_ceil(columns);
    let (columns, rows) = (columns as u32, rows as u32);
    let width = columns * cell_w + (columns + 1) * GAP;
    let height = rows * cell_h + (rows + 1) * GAP;
    let mut sheet = RgbImage::from_pixel(width, height, image::Rgb(PAPER));
    for (index, (cell, &size)) in images.iter().zip(&scales).enumerate() {
        let picture = draw_cell(cell, size, names);
        let (row, column) = (index as u32 / columns, index as u32 % columns);
        let x = GAP + column * (cell_w + GAP) + (cell_w - size.0) / 2;
        let y = GAP + row * (cell_h + GAP) + (cell_h - size.1) / 2;
        imageops::replace(&mut sheet, &picture, i64::from(x), i64::from(y));
    }
    sheet
}

/// Size at which an image is shown in a cell.
fn scaled_size(image: &RgbImage, cell: u32) -> (u32, u32) {
    let (w, h) = image.dimensions();
    let scale = f64::from(cell) / f64::from(w.max(h).max(1));
    let fit = |side: u32| ((f64::from(side) * scale).round() as u32).max(1);
    (fit(w), fit(h))
}

fn draw_cell(cell: &DrawImage, (width, height): (u32, u32), names: &[String]) -> RgbImage {
    let (from_w, from_h) = cell.image.dimensions();
    let mut picture = if (from_w, from_h) == (width, height) {
        cell.image.clone()
    } else if from_w == 0 || from_h == 0 {
        RgbImage::from_pixel(width, height, image::Rgb(PAPER))
    } else {
        imageops::resize(&cell.image, width, height, imageops::FilterType::Triangle)
    };
    let (sx, sy) = (width as f32 / from_w.max(1) as f32, height as f32 / from_h.max(1) as f32);
    let boxes: Vec<DrawBox> = cell
        .boxes
        .iter()
        .map(|b| DrawBox { xyxy: [b.xyxy[0] * sx, b.xyxy[1] * sy, b.xyxy[2] * sx, b.xyxy[3] * sy], ..*b })
        .collect();
    let style = BoxStyle { font_size: 12.0, line_width: 2.0, labels: true };
    draw_boxes(&mut picture, &boxes, names, &style);
    title(&mut picture, &cell.title);
    picture
}

fn title(picture: &mut RgbImage, text: &str) {
    if text.is_empty() {
        return;
    }
    let style = TextStyle::new(12.0).colour([255, 255, 255]);
    let (width, height) = (picture.width() as f32, picture.height() as f32);
    let text = elide(text, style.size, width - 12.0);
    if text.is_empty() {
        return;
    }
    let strip = line_height(style.size) + 4.0;
    // At the foot of the cell: labels of boxes crowd the upper edge.
    let rect = Rect::new(0.0, height - strip, text_width(&text, style.size) + 12.0, height);
    let mut canvas = Canvas::new(picture);
    canvas.fill_rect(rect, [15, 23, 42], 0.66);
    canvas.text(&text, 6.0, height - strip / 2.0, Anchor::Start, &style);
}
