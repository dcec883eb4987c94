//! The confusion matrix, as counts and normalised by column.

use std::path::Path;

use super::axes::{GRID, Range, heat, number, sheet, ticks, title};
use super::{PlotError, save_png};
use crate::data::draw::{Anchor, Canvas, INK, MUTED, Rect, TextStyle, elide, text_colour_on, text_width};

/// Counts of a confusion matrix.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConfusionPlot {
    /// Class names, without the background.
    pub names: Vec<String>,
    /// `(nc + 1) * (nc + 1)` counts, row after row: row = predicted, column = true, last = background.
    pub counts: Vec<f64>,
}

/// Colours and texts of the cells.
struct Cells {
    side: usize,
    /// 0..1 per cell, for the colour.
    shares: Vec<f32>,
    /// What is written, empty for an empty cell.
    texts: Vec<String>,
    /// Largest count, for the colour bar.
    largest: f64,
    normalized: bool,
}

/// Draws the matrix: counts, or (`normalized`) each column divided by its sum + 1e-9.
///
/// Missing counts are taken as zero. Counts are coloured by their logarithm, since the background
/// column of a low score threshold outweighs all the rest.
///
/// # Errors
/// See [`save_png`].
pub fn confusion_matrix(plot: &ConfusionPlot, normalized: bool, path: &Path) -> Result<(), PlotError> {
    let cells = cells(plot, normalized);
    let cell = (1500.0 / cells.side as f32).floor().clamp(4.0, 190.0);
    let label = (cell * 0.62).clamp(11.0, 27.0);
    let mut names = plot.names.clone();
    names.push("background".into());
    let widest = names.iter().map(|n| text_width(n, label)).fold(0.0, f32::max).min(320.0);
    let matrix = cell * cells.side as f32;
    let (left, top) = (widest + 110.0, 110.0);
    let width = (left + matrix + 190.0).max(760.0);
    let names_h = if widest + 10.0 < cell { label } else { widest };
    let height = top + matrix + names_h + 100.0;
    let mut image = sheet(width as u32, height as u32);
    let mut canvas = Canvas::new(&mut image);
    let heading = if normalized { "Confusion matrix, normalised by column" } else { "Confusion matrix" };
    title(&mut canvas, heading, 40.0, 54.0, 32.0);
    let area = Rect::new(left, top, left + matrix, top + matrix);
    draw_cells(&mut canvas, &cells, area, cell);
    draw_names(&mut canvas, &names, area, cell, label, widest);
    colour_bar(&mut canvas, &cells, Rect::new(area.x1 + 50.0, area.y0, area.x1 + 82.0, area.y1));
    save_png(&image, path)
}

fn cells(plot: &ConfusionPlot, normalized: bool) -> Cells {
    let side = plot.names.len() + 1;
    let count = |row: usize, column: usize| {
        plot.counts.get(row * side + column).copied().filter(|v| v.is_finite()).unwrap_or(0.0).max(0.0)
    };
    let sums: Vec<f64> = (0..side).map(|c| (0..side).map(|r| count(r, c)).sum()).collect();
    let largest = (0..side * side).map(|i| count(i / side, i % side)).fold(0.0, f64::max);
    let (mut shares, mut texts) = (Vec::new(), Vec::new());
    for row in 0..side {
        for (column, sum) in sums.iter().enumerate() {
            let value = count(row, column);
            if normalized {
                let share = value / (sum + 1e-9);
                shares.push(share as f32);
                texts.push(if share < 0.005 { String::new() } else { format!("{share:.2}") });
            } else {
                shares.push(if largest > 0.0 { (value.ln_1p() / largest.ln_1p()) as f32 } else { 0.0 });
                texts.push(if value == 0.0 { String::new() } else { number(value, 0) });
            }
        }
    }
    Cells { side, shares, texts, largest, normalized }
}

fn draw_cells(canvas: &mut Canvas<'_>, cells: &Cells, area: Rect, cell: f32) {
    let font = (cell * 0.3).min(32.0);
    let widest = cells.texts.iter().map(|t| text_width(t, font)).fold(0.0, f32::max);
    // Shrink a little to fit the longest number; below ten pixels a number is noise.
    let font = if widest > cell * 0.88 { font * cell * 0.88 / widest } else { font };
    for (index, (&share, text)) in cells.shares.iter().zip(&cells.texts).enumerate() {
        let x = area.x0 + (index % cells.side) as f32 * cell;
        let y = area.y0 + (index / cells.side) as f32 * cell;
        let colour = heat(share);
        canvas.fill_rect(Rect::new(x, y, x + cell, y + cell), colour, 1.0);
        if font >= 10.0 {
            let style = TextStyle::new(font).colour(text_colour_on(colour));
            canvas.text(text, x + cell / 2.0, y + cell / 2.0, Anchor::Middle, &style);
        }
    }
    for i in 0..=cells.side {
        // The background row and column are set apart by a stronger line.
        let (colour, alpha) = if i + 1 == cells.side { (MUTED, 0.8) } else { (GRID, 0.8) };
        let at = i as f32 * cell;
        canvas.fill_rect(Rect::new(area.x0 + at - 0.5, area.y0, area.x0 + at + 0.5, area.y1), colour, alpha);
        canvas.fill_rect(Rect::new(area.x0, area.y0 + at - 0.5, area.x1, area.y0 + at + 0.5), colour, alpha);
    }
}

fn draw_names(canvas: &mut Canvas<'_>, names: &[String], area: Rect, cell: f32, size: f32, widest: f32) {
    let style = TextStyle::new(size);
    // With very many classes every k-th name is written; the background's always.
    let every = (size * 1.1 / cell).ceil().max(1.0) as usize;
    let last = names.len() - 1;
    for (index, name) in names.iter().enumerate() {
        if index != last && (index % every != 0 || index + every > last) && every > 1 {
            continue;
        }
        let at = (index as f32 + 0.5) * cell;
        let name = elide(name, size, widest + 1.0);
        canvas.text(&name, area.x0 - 14.0, area.y0 + at, Anchor::End, &style);
        if cell > text_width(&name, size) + 10.0 && widest + 10.0 < cell {
            canvas.text(&name, area.x0 + at, area.y1 + 14.0 + size * 0.5, Anchor::Middle, &style);
        } else {
            canvas.text_upwards(&name, area.x0 + at, area.y1 + 14.0, Anchor::End, &style);
        }
    }
    let below = if widest + 10.0 < cell { size + 24.0 } else { widest + 24.0 };
    let axis = TextStyle::new(26.0).colour(INK);
    let (centre_x, centre_y) = ((area.x0 + area.x1) / 2.0, (area.y0 + area.y1) / 2.0);
    canvas.text("true class", centre_x, area.y1 + below + 26.0, Anchor::Middle, &axis);
    canvas.text_upwards("predicted class", area.x0 - widest - 60.0, centre_y, Anchor::Middle, &axis);
}

fn colour_bar(canvas: &mut Canvas<'_>, cells: &Cells, bar: Rect) {
    let steps = bar.height() as usize;
    for step in 0..steps {
        let y = bar.y1 - step as f32 - 1.0;
        let colour = heat(step as f32 / steps.saturating_sub(1).max(1) as f32);
        canvas.fill_rect(Rect::new(bar.x0, y, bar.x1, y + 1.0), colour, 1.0);
    }
    canvas.stroke_rect(bar, 1.0, GRID, 1.0);
    let style = TextStyle::new(21.0).colour(MUTED);
    let mut mark = |share: f64, text: &str| {
        let y = bar.y1 - share as f32 * bar.height();
        canvas.text(text, bar.x1 + 12.0, y.clamp(bar.y0 + 8.0, bar.y1 - 8.0), Anchor::Start, &style);
    };
    if cells.normalized {
        for tick in ticks(Range::new(0.0, 1.0), 5, false) {
            mark(tick.value, &tick.text);
        }
        return;
    }
    mark(0.0, "0");
    if cells.largest <= 0.0 {
        return;
    }
    // Powers of ten that stand clear of the two ends.
    for power in 0..15 {
        let value = 10f64.powi(power);
        let share = value.ln_1p() / cells.largest.ln_1p();
        if share > 0.06 && share < 0.94 {
            mark(share, &number(value, 0));
        }
    }
    mark(1.0, &number(cells.largest, 0));
}
