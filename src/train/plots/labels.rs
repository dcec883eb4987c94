//! `labels.png`: what the labels of the training set look like.

use std::path::Path;

use super::axes::{Axes, AxesText, GRID, Range, heat, note, number, sheet, ticks, title};
use super::{PlotError, save_png};
use crate::data::draw::{Anchor, Canvas, MUTED, Rect, TextStyle, class_colour, elide, text_width};

/// The labels of a data set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LabelsPlot {
    /// Class names.
    pub names: Vec<String>,
    /// Class of each box.
    pub classes: Vec<usize>,
    /// The boxes, `cxcywh`, 0..1.
    pub boxes: Vec<[f32; 4]>,
}

/// Boxes drawn centred; more only hide each other.
const OUTLINES_MAX: usize = 500;
/// Cells of a two-dimensional histogram, each way.
const BINS: usize = 50;
const SIDE: f32 = 900.0;

/// Draws the class histogram, the boxes laid on one centre, and the histograms of centre and size.
///
/// # Errors
/// See [`save_png`].
pub fn labels(plot: &LabelsPlot, path: &Path) -> Result<(), PlotError> {
    let mut image = sheet(2 * SIDE as u32, 2 * SIDE as u32);
    let mut canvas = Canvas::new(&mut image);
    let frame = |row: f32, column: f32| {
        Rect::new(SIDE * column, SIDE * row, SIDE * (column + 1.0), SIDE * (row + 1.0))
    };
    class_histogram(&mut canvas, plot, frame(0.0, 0.0));
    outlines(&mut canvas, plot, frame(0.0, 1.0));
    let centres = plot.boxes.iter().map(|b| (b[0], b[1]));
    density(&mut canvas, centres, ("Box centres", "x", "y"), true, frame(1.0, 0.0));
    let sizes = plot.boxes.iter().map(|b| (b[2], b[3]));
    density(&mut canvas, sizes, ("Box sizes", "width", "height"), false, frame(1.0, 1.0));
    save_png(&image, path)
}

fn plot_area(frame: Rect) -> Rect {
    frame.inset(130.0, 100.0, 50.0, 100.0)
}

fn class_histogram(canvas: &mut Canvas<'_>, plot: &LabelsPlot, frame: Rect) {
    let known = plot.classes.iter().map(|c| c + 1).max().unwrap_or(0);
    let nc = plot.names.len().max(known);
    let mut counts = vec![0usize; nc];
    for &class in &plot.classes {
        counts[class] += 1;
    }
    title(canvas, "Boxes per class", frame.x0 + 130.0, frame.y0 + 56.0, 30.0);
    let total = format!("{} boxes, {nc} {}", plot.classes.len(), if nc == 1 { "class" } else { "classes" });
    let muted = TextStyle::new(22.0).colour(MUTED);
    canvas.text(&total, frame.x1 - 50.0, frame.y0 + 57.0, Anchor::End, &muted);
    let mut area = plot_area(frame);
    if nc == 0 {
        return note(canvas, area, "no labels", 28.0);
    }
    let pitch = area.width() / nc as f32;
    let size = (pitch * 0.75).clamp(9.0, 24.0);
    let name = |class: usize| plot.names.get(class).cloned().unwrap_or_else(|| class.to_string());
    let widest = (0..nc).map(|c| text_width(&name(c), size)).fold(0.0, f32::max).min(260.0);
    let flat = widest < pitch * 0.92;
    if !flat {
        area.y1 = frame.y1 - widest - 40.0;
    }
    let top = counts.iter().copied().max().unwrap_or(0).max(1) as f64;
    let axes = Axes { area, x: Range::new(0.0, nc as f64), y: Range::new(0.0, top * 1.08) };
    let y_ticks = ticks(axes.y, 6, true);
    axes.draw(canvas, &AxesText { x_ticks: &[], y_ticks: &y_ticks, x_label: "", y_label: "", size: 24.0 });
    let value = TextStyle::new(size.min(22.0)).colour(MUTED);
    let count_text = |count: usize| number(count as f64, 0);
    let counted = counts.iter().all(|c| text_width(&count_text(*c), value.size) < pitch);
    let every = (size * 1.1 / pitch).ceil().max(1.0) as usize;
    for (class, &count) in counts.iter().enumerate() {
        let (x0, y) = axes.at(class as f64 + 0.14, count as f64);
        let x1 = axes.at(class as f64 + 0.86, 0.0).0;
        canvas.fill_rect(Rect::new(x0, y.round(), x1, area.y1), class_colour(class), 0.9);
        let centre = (x0 + x1) / 2.0;
        if counted {
            canvas.text(&count_text(count), centre, y - value.size * 0.75, Anchor::Middle, &value);
        }
        let label = elide(&name(class), size, if flat { pitch } else { 260.0 });
        if flat {
            canvas.text(&label, centre, area.y1 + 30.0, Anchor::Middle, &TextStyle::new(size));
        } else if class % every == 0 {
            canvas.text_upwards(&label, centre, area.y1 + 14.0, Anchor::End, &TextStyle::new(size));
        }
    }
}

fn outlines(canvas: &mut Canvas<'_>, plot: &LabelsPlot, frame: Rect) {
    let shown = plot.boxes.len().min(OUTLINES_MAX);
    title(canvas, "Box shapes", frame.x0 + 130.0, frame.y0 + 56.0, 30.0);
    let text = format!("{shown} of {} boxes, centred", plot.boxes.len());
    let muted = TextStyle::new(22.0).colour(MUTED);
    canvas.text(&text, frame.x1 - 50.0, frame.y0 + 57.0, Anchor::End, &muted);
    let area = plot_area(frame);
    canvas.stroke_rect(area, 2.0, GRID, 1.0);
    if shown == 0 {
        return note(canvas, area, "no labels", 28.0);
    }
    let (cx, cy) = ((area.x0 + area.x1) / 2.0, (area.y0 + area.y1) / 2.0);
    canvas.set_clip(Some(area));
    // Spread over the whole set, not only its first images.
    for i in 0..shown {
        let index = i * plot.boxes.len() / shown;
        let [_, _, w, h] = plot.boxes[index];
        let (half_w, half_h) = (w * area.width() / 2.0, h * area.height() / 2.0);
        let class = plot.classes.get(index).copied().unwrap_or(0);
        let rect = Rect::new(cx - half_w, cy - half_h, cx + half_w, cy + half_h);
        canvas.stroke_rect(rect, 2.0, class_colour(class), if shown > 100 { 0.4 } else { 0.7 });
    }
    canvas.set_clip(None);
}

/// A two-dimensional histogram over 0..1; `downwards` puts 0 of the second value at the top, as rows of
/// an image run.
fn density(
    canvas: &mut Canvas<'_>,
    values: impl Iterator<Item = (f32, f32)>,
    (heading, x_label, y_label): (&str, &str, &str),
    downwards: bool,
    frame: Rect,
) {
    title(canvas, heading, frame.x0 + 130.0, frame.y0 + 56.0, 30.0);
    let area = plot_area(frame);
    let mut bins = vec![0usize; BINS * BINS];
    let place = |v: f32| ((v.clamp(0.0, 1.0) * BINS as f32) as usize).min(BINS - 1);
    for (x, y) in values.filter(|(x, y)| x.is_finite() && y.is_finite()) {
        bins[place(y) * BINS + place(x)] += 1;
    }
    let y_range = if downwards { Range::new(1.0, 0.0) } else { Range::new(0.0, 1.0) };
    let axes = Axes { area, x: Range::new(0.0, 1.0), y: y_range };
    let marks = ticks(Range::new(0.0, 1.0), 5, false);
    axes.draw(canvas, &AxesText { x_ticks: &marks, y_ticks: &marks, x_label, y_label, size: 24.0 });
    let largest = bins.iter().copied().max().unwrap_or(0);
    if largest == 0 {
        return note(canvas, area, "no labels", 28.0);
    }
    let edge = |i: usize| i as f64 / BINS as f64;
    for (index, &count) in bins.iter().enumerate().filter(|(_, c)| **c > 0) {
        let (column, row) = (index % BINS, index / BINS);
        let (x0, ya) = axes.at(edge(column), edge(row));
        let (x1, yb) = axes.at(edge(column + 1), edge(row + 1));
        let rect = Rect::new(x0.round(), ya.min(yb).round(), x1.round(), ya.max(yb).round());
        // The root shows sparse cells beside crowded ones; the floor keeps a single box visible.
        let share = (count as f32 / largest as f32).sqrt().mul_add(0.82, 0.18);
        canvas.fill_rect(rect, heat(share), 1.0);
    }
}
