//! Drawing: boxes and labels on images, mosaics of images, and the small canvas the plots use.
//!
//! Everything is drawn in software on RGB u8 images with fonts that are part of the program, so that
//! the same input gives the same picture on every machine. Start reading at [`draw_boxes`] and
//! [`mosaic`]; [`Canvas`] holds the anti-aliased lines, rectangles and text below them.

mod boxes;
mod canvas;
mod font;
mod mosaic;
mod palette;

#[cfg(test)]
mod tests;

pub use boxes::{BoxStyle, DrawBox, draw_boxes};
pub use canvas::{Canvas, Rect};
pub use font::{Anchor, TextStyle, elide, line_height, text_width};
pub use mosaic::{DrawImage, MosaicArgs, mosaic};
pub use palette::{Colour, INK, MUTED, PALETTE, WHITE, class_colour, mix, text_colour_on};
