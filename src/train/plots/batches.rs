//! Batches as they enter the network, with their boxes.

use std::path::Path;

use image::RgbImage;

use super::{PlotError, save_png};
use crate::data::draw::{DrawBox, DrawImage, MosaicArgs, mosaic};

/// A batch to draw.
#[derive(Clone, Debug)]
pub struct BatchPlot<'a> {
    /// RGB pixels, `[n, h, w, 3]`.
    pub images: &'a [u8],
    /// Rows of each image.
    pub h: usize,
    /// Columns of each image.
    pub w: usize,
    /// Boxes of each image, `xyxy` in pixels of the batch's images; images without an entry have none.
    pub boxes: Vec<Vec<DrawBox>>,
    /// Written on each image, usually its file name; may be shorter than the batch.
    pub titles: Vec<String>,
}

/// Images drawn of one batch.
pub const IMAGES_MAX: usize = 16;
/// Longest side of the whole picture, pixels.
const SHEET_MAX: u32 = 1920;

/// Draws up to sixteen images of a batch in a grid, boxes and names on them.
///
/// # Errors
/// See [`save_png`].
pub fn batch(plot: &BatchPlot<'_>, names: &[String], path: &Path) -> Result<(), PlotError> {
    let bytes = plot.h * plot.w * 3;
    let count = plot.images.len().checked_div(bytes).unwrap_or(0).min(IMAGES_MAX);
    let cells: Vec<DrawImage> = (0..count)
        .map(|i| {
            let pixels = plot.images[i * bytes..(i + 1) * bytes].to_vec();
            DrawImage {
                image: RgbImage::from_raw(plot.w as u32, plot.h as u32, pixels)
                    .expect("the slice is exactly one image long"),
                boxes: plot.boxes.get(i).cloned().unwrap_or_default(),
                title: plot.titles.get(i).cloned().unwrap_or_default(),
            }
        })
        .collect();
    let columns = (count.max(1) as f64).sqrt().ceil() as u32;
    let cell_px = (SHEET_MAX / columns).min(960);
    save_png(&mosaic(&cells, names, MosaicArgs { columns: columns as usize, cell_px }), path)
}
