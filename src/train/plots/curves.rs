//! Precision-recall, F1, precision and recall curves.

use std::path::Path;

use super::axes::{Axes, AxesText, GRID, LegendRow, Range, legend, sheet, ticks, title};
use super::{PlotError, save_png};
use crate::data::draw::{Anchor, Canvas, Colour, INK, MUTED, Rect, TextStyle, class_colour};

/// The curves of one class that has targets. All four have the same number of points, spread evenly
/// over 0..1 (both ends included).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClassCurves {
    /// Class index; it picks the colour.
    pub class: usize,
    /// Class name.
    pub name: String,
    /// Average precision at IoU 0.5.
    pub ap50: f32,
    /// Precision as a function of recall.
    pub precision_at_recall: Vec<f32>,
    /// Precision as a function of the score threshold.
    pub precision: Vec<f32>,
    /// Recall as a function of the score threshold.
    pub recall: Vec<f32>,
    /// F1 as a function of the score threshold.
    pub f1: Vec<f32>,
}

/// The curves of one validation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CurvesPlot {
    /// One entry per class that has targets.
    pub classes: Vec<ClassCurves>,
    /// Mean average precision at IoU 0.5.
    pub map50: f32,
    /// Score threshold at which the mean F1 is best (0..1), where known; otherwise the plain maximum of
    /// the mean curve is taken.
    pub best_confidence: Option<f32>,
}

/// Which curve to draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CurveKind {
    /// Precision over recall.
    PrecisionRecall,
    /// F1 over score threshold.
    F1,
    /// Precision over score threshold.
    Precision,
    /// Recall over score threshold.
    Recall,
}

impl CurveKind {
    /// All four, in the order they are written.
    pub const ALL: [CurveKind; 4] =
        [CurveKind::PrecisionRecall, CurveKind::F1, CurveKind::Precision, CurveKind::Recall];

    /// File name in a run folder.
    pub fn file_name(self) -> &'static str {
        match self {
            CurveKind::PrecisionRecall => "BoxPR_curve.png",
            CurveKind::F1 => "BoxF1_curve.png",
            CurveKind::Precision => "BoxP_curve.png",
            CurveKind::Recall => "BoxR_curve.png",
        }
    }

    fn title(self) -> &'static str {
        match self {
            CurveKind::PrecisionRecall => "Precision–recall curve",
            CurveKind::F1 => "F1–confidence curve",
            CurveKind::Precision => "Precision–confidence curve",
            CurveKind::Recall => "Recall–confidence curve",
        }
    }

    fn labels(self) -> (&'static str, &'static str) {
        match self {
            CurveKind::PrecisionRecall => ("recall", "precision"),
            CurveKind::F1 => ("confidence", "F1"),
            CurveKind::Precision => ("confidence", "precision"),
            CurveKind::Recall => ("confidence", "recall"),
        }
    }

    fn of(self, class: &ClassCurves) -> &[f32] {
        match self {
            CurveKind::PrecisionRecall => &class.precision_at_recall,
            CurveKind::F1 => &class.f1,
            CurveKind::Precision => &class.precision,
            CurveKind::Recall => &class.recall,
        }
    }
}

/// Up to so many classes each has its own colour and legend row; above, all are drawn in grey.
const CLASSES_COLOURED_MAX: usize = 20;
const SIZE: f32 = 26.0;

/// Draws all four curves into `folder`.
///
/// # Errors
/// See [`save_png`]; the first failure ends it.
pub fn curves(plot: &CurvesPlot, folder: &Path) -> Result<(), PlotError> {
    for kind in CurveKind::ALL {
        curve(plot, kind, &folder.join(kind.file_name()))?;
    }
    Ok(())
}

/// Draws one curve per class and their mean.
///
/// # Errors
/// See [`save_png`].
pub fn curve(plot: &CurvesPlot, kind: CurveKind, path: &Path) -> Result<(), PlotError> {
    let mut image = sheet(1800, 1100);
    let mut canvas = Canvas::new(&mut image);
    let axes = Axes {
        area: Rect::new(140.0, 110.0, 1300.0, 980.0),
        x: Range::new(0.0, 1.0),
        y: Range::new(0.0, 1.02),
    };
    title(&mut canvas, kind.title(), axes.area.x0, 56.0, 34.0);
    let (x_label, y_label) = kind.labels();
    let marks = ticks(Range::new(0.0, 1.0), 5, false);
    axes.draw(&mut canvas, &AxesText { x_ticks: &marks, y_ticks: &marks, x_label, y_label, size: SIZE });
    let mean = mean_curve(plot, kind);
    if mean.is_empty() {
        axes.note(&mut canvas, "no targets: nothing to draw", 28.0);
        return save_png(&image, path);
    }
    let coloured = plot.classes.len() <= CLASSES_COLOURED_MAX;
    for class in &plot.classes {
        let (colour, alpha, width) =
            if coloured { (class_colour(class.class), 0.9, 2.5) } else { ([148, 163, 184], 0.35, 2.0) };
        axes.line(&mut canvas, spread(kind.of(class)), width, colour, alpha);
    }
    axes.line(&mut canvas, spread(&mean), 8.0, [255, 255, 255], 0.85);
    axes.line(&mut canvas, spread(&mean), 5.5, MEAN, 1.0);
    let best = operating_point(plot);
    if kind != CurveKind::PrecisionRecall {
        mark(&mut canvas, &axes, best, value_at(&mean, best));
    }
    let rows = legend_rows(plot, kind, &mean, best, coloured);
    legend(&mut canvas, &rows, Rect::new(1345.0, 100.0, 1765.0, 1090.0), 24.0);
    save_png(&image, path)
}

const MEAN: Colour = INK;

/// Values spread evenly over 0..1.
fn spread(values: &[f32]) -> impl Iterator<Item = (f64, f64)> + '_ {
    let last = values.len().saturating_sub(1).max(1) as f64;
    values.iter().enumerate().map(move |(i, v)| (i as f64 / last, f64::from(*v)))
}

/// Mean over the classes, value by value, leaving out what is not finite.
fn mean_curve(plot: &CurvesPlot, kind: CurveKind) -> Vec<f32> {
    let points = plot.classes.iter().map(|c| kind.of(c).len()).max().unwrap_or(0);
    (0..points)
        .map(|i| {
            let finite = plot.classes.iter().filter_map(|c| kind.of(c).get(i)).filter(|v| v.is_finite());
            let (sum, count) = finite.fold((0.0f64, 0usize), |(s, n), v| (s + f64::from(*v), n + 1));
            if count == 0 { f32::NAN } else { (sum / count as f64) as f32 }
        })
        .collect()
}

/// The confidence at which the mean F1 is best.
fn operating_point(plot: &CurvesPlot) -> f32 {
    if let Some(best) = plot.best_confidence.filter(|b| b.is_finite()) {
        return best.clamp(0.0, 1.0);
    }
    let f1 = mean_curve(plot, CurveKind::F1);
    let mut best = (0usize, f32::NEG_INFINITY);
    for (i, &value) in f1.iter().enumerate() {
        if value > best.1 {
            best = (i, value);
        }
    }
    best.0 as f32 / f1.len().saturating_sub(1).max(1) as f32
}

fn value_at(curve: &[f32], x: f32) -> f32 {
    let last = curve.len().saturating_sub(1);
    curve.get((x * last as f32).round() as usize).copied().unwrap_or(f32::NAN)
}

/// A dashed line at the operating point and a dot where it meets the mean curve.
fn mark(canvas: &mut Canvas<'_>, axes: &Axes, confidence: f32, value: f32) {
    let (x, y) = axes.at(f64::from(confidence), f64::from(value));
    canvas.dashed(&[(x, axes.area.y0), (x, axes.area.y1)], 12.0, 9.0, 2.0, MUTED);
    if y.is_finite() {
        canvas.disc((x, y), 11.0, [255, 255, 255], 1.0);
        canvas.disc((x, y), 8.0, MEAN, 1.0);
    }
    let text = format!("{confidence:.2}");
    // The note stands beside its line, inside the area, on the side with more room.
    let (at, anchor) = if confidence > 0.5 { (x - 12.0, Anchor::End) } else { (x + 12.0, Anchor::Start) };
    let style = TextStyle::new(22.0).colour(MUTED);
    let width = crate::data::draw::text_width(&text, style.size);
    let left = if confidence > 0.5 { at - width } else { at };
    let y = axes.area.y1 - 26.0;
    canvas.fill_rect(Rect::new(left - 6.0, y - 18.0, left + width + 6.0, y + 18.0), [255, 255, 255], 0.8);
    canvas.text(&text, at, y, anchor, &style);
}

/// The legend: the mean first, then the classes (or, where there are many, the best and worst).
fn legend_rows(
    plot: &CurvesPlot,
    kind: CurveKind,
    mean: &[f32],
    best: f32,
    coloured: bool,
) -> Vec<LegendRow> {
    let pr = kind == CurveKind::PrecisionRecall;
    let figure = |class: &ClassCurves| if pr { class.ap50 } else { value_at(kind.of(class), best) };
    let text = |v: f32| if v.is_finite() { format!("{v:.3}") } else { "–".into() };
    let heading =
        |name: &str, value: String| LegendRow { swatch: None, name: name.into(), value, bold: false };
    let row = |class: &ClassCurves, colour: Colour| LegendRow {
        swatch: Some((colour, 4.0)),
        name: class.name.clone(),
        value: text(figure(class)),
        bold: false,
    };
    let measure = if pr { "AP at IoU 0.5".to_string() } else { format!("at confidence {best:.2}") };
    let mean_value = if pr { plot.map50 } else { value_at(mean, best) };
    // The mean of one class is that class.
    let single = plot.classes.len() == 1;
    let mut rows = vec![
        heading("", measure),
        LegendRow {
            swatch: Some((MEAN, 5.5)),
            name: if single { plot.classes[0].name.clone() } else { "mean of classes".into() },
            value: text(mean_value),
            bold: true,
        },
    ];
    if single {
        return rows;
    }
    if coloured {
        rows.extend(plot.classes.iter().map(|c| row(c, class_colour(c.class))));
        return rows;
    }
    let mut order: Vec<&ClassCurves> = plot.classes.iter().collect();
    order.sort_by(|a, b| figure(b).total_cmp(&figure(a)));
    rows.push(heading(&format!("highest of {} classes", order.len()), String::new()));
    rows.extend(order.iter().take(10).map(|c| row(c, GRID_TEXT)));
    rows.push(heading("lowest", String::new()));
    rows.extend(order.iter().skip(order.len() - 10).map(|c| row(c, GRID_TEXT)));
    rows
}

/// Swatch of a class drawn in grey.
const GRID_TEXT: Colour = [GRID[0] - 50, GRID[1] - 46, GRID[2] - 40];
