//! Axes, ticks and legends shared by the plots.

use image::RgbImage;

use crate::data::draw::{Anchor, Canvas, Colour, INK, MUTED, Rect, TextStyle, WHITE, elide, text_width};

/// Lines of the grid.
pub(super) const GRID: Colour = [226, 232, 240];
/// Lines of the axes.
pub(super) const AXIS: Colour = [148, 163, 184];

/// A white sheet.
pub(super) fn sheet(width: u32, height: u32) -> RgbImage {
    RgbImage::from_pixel(width, height, image::Rgb(WHITE))
}

/// One direction of a plot: the values at its two ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Range {
    pub min: f64,
    pub max: f64,
}

impl Range {
    pub fn new(min: f64, max: f64) -> Range {
        Range { min, max }
    }

    /// Covers the finite values with `margin` (a share of their spread) at both ends; 0..1 where there
    /// is none, and a little room around a single value.
    pub fn covering(values: impl Iterator<Item = f64>, margin: f64) -> Range {
        let (mut min, mut max) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|v| v.is_finite()) {
            min = min.min(value);
            max = max.max(value);
        }
        if min > max {
            return Range::new(0.0, 1.0);
        }
        let spread = max - min;
        if spread <= 1e-12 * max.abs().max(1e-12) {
            let room = if max == 0.0 { 1.0 } else { max.abs() * 0.5 };
            return Range::new(min - room, max + room);
        }
        Range::new(min - spread * margin, max + spread * margin)
    }

    fn share(&self, value: f64) -> f64 {
        (value - self.min) / (self.max - self.min)
    }
}

/// A tick: where it stands and what is written there.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tick {
    pub value: f64,
    pub text: String,
}

/// Round values inside `range`, about `count` of them. Whole numbers only where `whole`.
pub(super) fn ticks(range: Range, count: usize, whole: bool) -> Vec<Tick> {
    let span = range.max - range.min;
    if !(span > 0.0 && span.is_finite()) {
        return Vec::new();
    }
    let raw = span / count.max(1) as f64;
    let power = 10f64.powf(raw.log10().floor());
    let mut step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= raw * 0.999);
    if whole {
        step = step.map(|s| s.max(1.0).round());
    }
    let step = step.unwrap_or(power * 10.0);
    let first = (range.min / step - 1e-9).ceil();
    let last = (range.max / step + 1e-9).floor();
    // The number of steps is bounded by `count` and the choice of step; the limit guards rounding.
    let steps = ((last - first).max(-1.0) as usize + 1).min(64);
    let decimals = if step >= 1.0 { 0 } else { (-step.log10() - 1e-9).ceil() as usize };
    (0..steps)
        .map(|i| {
            let value = (first + i as f64) * step;
            Tick { value, text: number(value, decimals) }
        })
        .collect()
}

/// A number for a tick: thousands as `12k`, millions as `3M`, no negative zero.
pub(super) fn number(value: f64, decimals: usize) -> String {
    let magnitude = value.abs();
    let short = |scaled: f64, suffix: &str| {
        let text = format!("{scaled:.1}");
        format!("{}{suffix}", text.strip_suffix(".0").unwrap_or(&text))
    };
    if magnitude >= 1e15 {
        format!("{value:.0e}")
    } else if magnitude >= 1e9 {
        short(value / 1e9, "G")
    } else if magnitude >= 1e6 {
        short(value / 1e6, "M")
    } else if magnitude >= 1e4 {
        short(value / 1e3, "k")
    } else if decimals > 5 {
        if value == 0.0 { "0".into() } else { format!("{value:.0e}") }
    } else {
        let text = format!("{value:.decimals$}");
        if text.trim_start_matches(['-', '0', '.']).is_empty() { text.replace('-', "") } else { text }
    }
}

/// A plot area with its two ranges.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axes {
    pub area: Rect,
    pub x: Range,
    pub y: Range,
}

/// What is written around a plot area.
pub(super) struct AxesText<'a> {
    pub x_ticks: &'a [Tick],
    pub y_ticks: &'a [Tick],
    pub x_label: &'a str,
    pub y_label: &'a str,
    /// Em size of the labels; ticks are a little smaller.
    pub size: f32,
}

impl Axes {
    /// Pixel of a pair of values; not finite where a value is not.
    pub fn at(&self, x: f64, y: f64) -> (f32, f32) {
        (
            self.area.x0 + (self.x.share(x) * f64::from(self.area.width())) as f32,
            self.area.y1 - (self.y.share(y) * f64::from(self.area.height())) as f32,
        )
    }

    /// Grid, ticks, axis lines and labels.
    pub fn draw(&self, canvas: &mut Canvas<'_>, text: &AxesText<'_>) {
        let tick_style = TextStyle::new(text.size * 0.86).colour(MUTED);
        let area = self.area;
        let line = (text.size / 14.0).round().max(1.0);
        for tick in text.y_ticks {
            let y = self.at(self.x.min, tick.value).1.round() + 0.5;
            canvas.fill_rect(Rect::new(area.x0, y - line / 2.0, area.x1, y + line / 2.0), GRID, 1.0);
            canvas.text(&tick.text, area.x0 - text.size * 0.5, y, Anchor::End, &tick_style);
        }
        for tick in text.x_ticks {
            let x = self.at(tick.value, self.y.min).0.round() + 0.5;
            canvas.fill_rect(Rect::new(x - line / 2.0, area.y0, x + line / 2.0, area.y1), GRID, 1.0);
            canvas.text(&tick.text, x, area.y1 + text.size, Anchor::Middle, &tick_style);
        }
        canvas.fill_rect(Rect::new(area.x0 - line, area.y1, area.x1, area.y1 + line), AXIS, 1.0);
        canvas.fill_rect(Rect::new(area.x0 - line, area.y0, area.x0, area.y1 + line), AXIS, 1.0);
        let style = TextStyle::new(text.size);
        let centre_x = (area.x0 + area.x1) / 2.0;
        canvas.text(text.x_label, centre_x, area.y1 + text.size * 2.5, Anchor::Middle, &style);
        if !text.y_label.is_empty() {
            let widest =
                text.y_ticks.iter().map(|t| text_width(&t.text, tick_style.size)).fold(0.0, f32::max);
            let x = area.x0 - widest - text.size * 1.7;
            canvas.text_upwards(text.y_label, x, (area.y0 + area.y1) / 2.0, Anchor::Middle, &style);
        }
    }

    /// A line through values, clipped to the area (with room for its width).
    pub fn line(
        &self,
        canvas: &mut Canvas<'_>,
        points: impl Iterator<Item = (f64, f64)>,
        width: f32,
        colour: Colour,
        alpha: f32,
    ) {
        let points: Vec<(f32, f32)> = points.map(|(x, y)| self.at(x, y)).collect();
        canvas.set_clip(Some(self.area.inset(-width, -width, -width, -width)));
        canvas.polyline(&points, width, colour, alpha);
        canvas.set_clip(None);
    }

    /// Says in the middle of the area why it is empty.
    pub fn note(&self, canvas: &mut Canvas<'_>, text: &str, size: f32) {
        note(canvas, self.area, text, size);
    }
}

/// Says in the middle of an area why it is empty.
pub(super) fn note(canvas: &mut Canvas<'_>, area: Rect, text: &str, size: f32) {
    let (x, y) = ((area.x0 + area.x1) / 2.0, (area.y0 + area.y1) / 2.0);
    canvas.text(text, x, y, Anchor::Middle, &TextStyle::new(size).colour(MUTED));
}

/// Title of a plot, at the left edge of its area.
pub(super) fn title(canvas: &mut Canvas<'_>, text: &str, x: f32, y: f32, size: f32) {
    canvas.text(text, x, y, Anchor::Start, &TextStyle::new(size).colour(INK).bold());
}

/// A row of a legend.
pub(super) struct LegendRow {
    /// Swatch: colour and line width; `None` for a heading.
    pub swatch: Option<(Colour, f32)>,
    pub name: String,
    pub value: String,
    pub bold: bool,
}

/// Draws a legend downwards from the upper left corner of `area`; rows that do not fit are left out.
pub(super) fn legend(canvas: &mut Canvas<'_>, rows: &[LegendRow], area: Rect, size: f32) {
    let pitch = size * 1.55;
    for (index, row) in rows.iter().enumerate() {
        let y = area.y0 + pitch * (index as f32 + 0.5);
        if y + pitch * 0.5 > area.y1 {
            break;
        }
        let mut style = TextStyle::new(size);
        if row.bold {
            style = style.bold();
        }
        let mut x = area.x0;
        if let Some((colour, width)) = row.swatch {
            canvas.polyline(&[(x + width / 2.0, y), (x + size * 1.3, y)], width, colour, 1.0);
            x += size * 1.9;
        } else {
            style = style.colour(MUTED);
        }
        let value_width = text_width(&row.value, size);
        let room = area.x1 - x - value_width - if row.value.is_empty() { 0.0 } else { size * 0.8 };
        canvas.text(&elide(&row.name, size, room), x, y, Anchor::Start, &style);
        canvas.text(&row.value, area.x1, y, Anchor::End, &style);
    }
}

/// White at 0 to deep blue at 1, even steps in lightness.
pub(super) fn heat(share: f32) -> Colour {
    const STOPS: [Colour; 5] =
        [[255, 255, 255], [207, 225, 247], [125, 170, 228], [45, 104, 190], [14, 44, 110]];
    let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
    let place = share * (STOPS.len() - 1) as f32;
    let index = (place as usize).min(STOPS.len() - 2);
    crate::data::draw::mix(STOPS[index], STOPS[index + 1], place - index as f32)
}
