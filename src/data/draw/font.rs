//! Text: measuring and rasterising with the fonts that are part of the program.

use std::sync::OnceLock;

use ab_glyph::{Font, FontRef, GlyphId, PxScale, point};

use super::palette::{Colour, INK};

/// Which part of the text lies at the point given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// The text begins at the point.
    Start,
    /// The text is centred on the point.
    Middle,
    /// The text ends at the point.
    End,
}

/// How a line of text looks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TextStyle {
    /// Em size in pixels.
    pub size: f32,
    /// Ink.
    pub colour: Colour,
    /// Heavier strokes, for titles.
    pub bold: bool,
}

impl TextStyle {
    /// Regular weight in the house's ink.
    pub fn new(size: f32) -> TextStyle {
        TextStyle { size, colour: INK, bold: false }
    }

    /// The same in another colour.
    pub fn colour(self, colour: Colour) -> TextStyle {
        TextStyle { colour, ..self }
    }

    /// The same with heavier strokes.
    pub fn bold(self) -> TextStyle {
        TextStyle { bold: true, ..self }
    }

    /// The bundled text face is a light one: strokes are thickened by this many pixels.
    fn embolden(&self) -> f32 {
        self.size * if self.bold { 0.065 } else { 0.022 }
    }
}

/// The text face first, then the faces asked for a character that the ones before lack.
fn fonts() -> &'static [FontRef<'static>; 3] {
    static FONTS: OnceLock<[FontRef<'static>; 3]> = OnceLock::new();
    FONTS.get_or_init(|| {
        [
            epaint_default_fonts::UBUNTU_LIGHT,
            epaint_default_fonts::HACK_REGULAR,
            epaint_default_fonts::NOTO_EMOJI_REGULAR,
        ]
        .map(|bytes| FontRef::try_from_slice(bytes).expect("the fonts in the binary parse"))
    })
}

/// A glyph placed on a line: x of its origin, 0 at the start of the line.
struct Placed {
    font: &'static FontRef<'static>,
    id: GlyphId,
    scale: PxScale,
    x: f32,
}

/// ab_glyph's scale is the height of the face; ours is the em.
fn scale_of(font: &FontRef<'static>, size: f32) -> PxScale {
    let units = font.units_per_em().unwrap_or(1000.0);
    PxScale::from(size * font.height_unscaled() / units)
}

fn layout(text: &str, size: f32) -> (Vec<Placed>, f32) {
    let mut placed = Vec::with_capacity(text.len());
    let mut x = 0.0;
    let mut previous: Option<(usize, GlyphId)> = None;
    for ch in text.chars() {
        let ch = if ch.is_control() { ' ' } else { ch };
        let index = fonts().iter().position(|f| f.glyph_id(ch).0 != 0).unwrap_or(0);
        let font = &fonts()[index];
        let scale = scale_of(font, size);
        let factor = scale.x / font.height_unscaled();
        let id = font.glyph_id(ch);
        if let Some((before, before_id)) = previous
            && before == index
        {
            x += font.kern_unscaled(before_id, id) * factor;
        }
        placed.push(Placed { font, id, scale, x });
        x += font.h_advance_unscaled(id) * factor;
        previous = Some((index, id));
    }
    (placed, x)
}

/// Width of one line of text in pixels at an em of `size` pixels.
pub fn text_width(text: &str, size: f32) -> f32 {
    layout(text, size).1
}

/// Height of one line in pixels, from the highest ascender to the lowest descender.
pub fn line_height(size: f32) -> f32 {
    ascent(size) + descent(size)
}

/// From the top of a line to its baseline, pixels.
pub(super) fn ascent(size: f32) -> f32 {
    let font = &fonts()[0];
    font.ascent_unscaled() * scale_of(font, size).y / font.height_unscaled()
}

fn descent(size: f32) -> f32 {
    let font = &fonts()[0];
    -font.descent_unscaled() * scale_of(font, size).y / font.height_unscaled()
}

/// The text, or as much of it as fits `width` pixels with an ellipsis at the end.
pub fn elide(text: &str, size: f32, width: f32) -> String {
    if text_width(text, size) <= width {
        return text.to_string();
    }
    let chars: Vec<char> = text.chars().collect();
    let fits = |keep: usize| {
        let short: String = chars[..keep].iter().collect::<String>().trim_end().to_string() + "…";
        (text_width(&short, size) <= width).then_some(short)
    };
    // Width grows with the number of characters, so the longest prefix is found by bisection.
    let (mut low, mut high) = (0, chars.len());
    while low < high {
        let middle = (low + high).div_ceil(2);
        if fits(middle).is_some() { low = middle } else { high = middle - 1 }
    }
    fits(low).unwrap_or_default()
}

/// Coverage of a line of text: a mask of `width` x `height` values in 0..1, baseline at `baseline` rows
/// from its top, origin of the text at column `MASK_MARGIN`.
pub(super) struct TextMask {
    pub width: usize,
    pub height: usize,
    pub coverage: Vec<f32>,
    /// Advance of the whole line, pixels.
    pub advance: f32,
    /// Rows from the top of the mask to the baseline.
    pub baseline: f32,
}

/// Columns and rows left free around the text in a mask, for overhang and thickened strokes.
pub(super) const MASK_MARGIN: usize = 3;

/// Rasterises one line.
pub(super) fn rasterise(text: &str, style: &TextStyle) -> TextMask {
    let (placed, advance) = layout(text, style.size);
    let width = advance.ceil() as usize + 2 * MASK_MARGIN + (style.size * 0.5) as usize;
    let height = line_height(style.size).ceil() as usize + 2 * MASK_MARGIN;
    let baseline = (MASK_MARGIN as f32 + ascent(style.size)).round();
    let mut coverage = vec![0.0f32; width * height];
    // The outline is laid down shifted by parts of the thickening, each less than a stroke's width, so
    // that no gap opens between the copies.
    let side = if style.bold { 4 } else { 2 };
    let thick = style.embolden() / (side - 1) as f32;
    for glyph in &placed {
        for step in 0..side * side {
            let (dx, dy) = (thick * (step % side) as f32, -thick * (step / side) as f32);
            let at = point(MASK_MARGIN as f32 + glyph.x + dx, baseline + dy);
            let Some(outline) = glyph.font.outline_glyph(glyph.id.with_scale_and_position(glyph.scale, at))
            else {
                continue;
            };
            let bounds = outline.px_bounds();
            let (left, top) = (bounds.min.x as i64, bounds.min.y as i64);
            outline.draw(|gx, gy, value| {
                let (x, y) = (left + i64::from(gx), top + i64::from(gy));
                if x >= 0 && y >= 0 && (x as usize) < width && (y as usize) < height {
                    let cell = &mut coverage[y as usize * width + x as usize];
                    *cell = cell.max(value.min(1.0));
                }
            });
        }
    }
    TextMask { width, height, coverage, advance, baseline }
}
