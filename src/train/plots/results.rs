//! `results.png`: one panel per loss and metric, raw and smoothed.

use std::path::Path;

use super::axes::{Axes, AxesText, LegendRow, Range, legend, number, sheet, ticks, title};
use super::{PlotError, save_png};
use crate::data::draw::{Anchor, Canvas, Colour, MUTED, Rect, TextStyle, WHITE, elide, mix};

/// One column of the results table.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ResultsColumn {
    /// The column's name in the table, for example `train/box_loss` or `metrics/mAP50(B)`.
    pub name: String,
    /// One value per epoch; a value that is not finite is a gap.
    pub values: Vec<f64>,
}

/// The results of a run, epoch by epoch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ResultsPlot {
    /// Written above the panels, for example model and data set; may be empty.
    pub title: String,
    /// Epoch numbers, 1-based, one per row of the table.
    pub epochs: Vec<f64>,
    /// The columns. Those of `train/`, `val/` and `metrics/` get a panel, the others are left out.
    pub columns: Vec<ResultsColumn>,
}

impl ResultsPlot {
    /// Reads `results.csv`.
    ///
    /// # Errors
    /// [`PlotError::Table`] where the file cannot be read or a row has another number of fields than the
    /// header. A field that is not a number is a gap, not an error.
    pub fn from_csv(path: &Path, title: &str) -> Result<ResultsPlot, PlotError> {
        let fault = |line, reason| PlotError::Table { path: path.to_path_buf(), line, reason };
        let text = std::fs::read_to_string(path).map_err(|e| fault(0, e.to_string()))?;
        let mut lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
        let header: Vec<&str> =
            lines.next().map(|(_, l)| l.split(',').map(str::trim).collect()).unwrap_or_default();
        let mut columns: Vec<ResultsColumn> =
            header.iter().map(|n| ResultsColumn { name: n.to_string(), values: Vec::new() }).collect();
        for (index, line) in lines {
            let fields: Vec<&str> = line.split(',').collect();
            if fields.len() != columns.len() {
                let reason = format!("expected {} fields, got {}", columns.len(), fields.len());
                return Err(fault(index + 1, reason));
            }
            for (column, field) in columns.iter_mut().zip(fields) {
                column.values.push(field.trim().parse().unwrap_or(f64::NAN));
            }
        }
        let rows = columns.first().map_or(0, |c| c.values.len());
        let epochs = match columns.iter().position(|c| c.name == "epoch") {
            Some(index) => columns.remove(index).values,
            None => (1..=rows).map(|e| e as f64).collect(),
        };
        Ok(ResultsPlot { title: title.to_string(), epochs, columns })
    }
}

const TRAIN: Colour = [37, 99, 235];
const VAL: Colour = [234, 88, 12];
const METRIC: Colour = [21, 128, 61];

/// Draws the curves of a run and writes them to `path`.
///
/// # Errors
/// See [`save_png`].
pub fn results(plot: &ResultsPlot, path: &Path) -> Result<(), PlotError> {
    let (panels, columns) = arrange(&plot.columns);
    let (panel_w, panel_h, header, foot) = (520.0, 400.0, 110.0, 24.0);
    let rows = panels.len().div_ceil(columns).max(1);
    let width = panel_w * columns.max(1) as f32 + 40.0;
    let height = header + panel_h * rows as f32 + foot;
    let mut image = sheet(width as u32, height as u32);
    let mut canvas = Canvas::new(&mut image);
    let heading = if plot.title.is_empty() { "Training results" } else { &plot.title };
    title(&mut canvas, &elide(heading, 32.0, width - 520.0), 40.0, 50.0, 32.0);
    key(&mut canvas, width);
    for (index, column) in panels.iter().enumerate() {
        let x = 20.0 + panel_w * (index % columns) as f32;
        let y = header + panel_h * (index / columns) as f32;
        panel(&mut canvas, plot, column, Rect::new(x, y, x + panel_w, y + panel_h));
    }
    if panels.is_empty() {
        super::axes::note(&mut canvas, Rect::new(0.0, header, width, height), "no epochs yet", 26.0);
    }
    save_png(&image, path)
}

/// The panels in reading order and how many stand in a row. With as many validation as training losses,
/// the two rows are: training losses and half of the metrics, validation losses and the other half.
fn arrange(columns: &[ResultsColumn]) -> (Vec<&ResultsColumn>, usize) {
    let of = |prefix: &str| columns.iter().filter(|c| c.name.starts_with(prefix)).collect::<Vec<_>>();
    let (train, val, metrics) = (of("train/"), of("val/"), of("metrics/"));
    if !train.is_empty() && train.len() == val.len() && metrics.len() % 2 == 0 {
        let half = metrics.len() / 2;
        let row = train.len() + half;
        let first = train.iter().chain(&metrics[..half]);
        return (first.chain(val.iter()).chain(&metrics[half..]).copied().collect(), row);
    }
    let all: Vec<_> = train.into_iter().chain(val).chain(metrics).collect();
    let row = all.len().clamp(1, 5);
    (all, row)
}

/// What the two kinds of line mean, once for all panels.
fn key(canvas: &mut Canvas<'_>, width: f32) {
    let grey = [71, 85, 105];
    let row = |colour: Colour, width: f32, name: &str| LegendRow {
        swatch: Some((colour, width)),
        name: name.into(),
        value: String::new(),
        bold: false,
    };
    let raw = row(mix(WHITE, grey, 0.4), 2.5, "each epoch");
    legend(canvas, &[raw], Rect::new(width - 420.0, 32.0, width - 220.0, 90.0), 22.0);
    let smooth = row(grey, 4.5, "smoothed");
    legend(canvas, &[smooth], Rect::new(width - 200.0, 32.0, width - 20.0, 90.0), 22.0);
}

fn panel(canvas: &mut Canvas<'_>, plot: &ResultsPlot, column: &ResultsColumn, frame: Rect) {
    let metric = column.name.starts_with("metrics/");
    let colour = match column.name.split('/').next() {
        Some("train") => TRAIN,
        Some("val") => VAL,
        _ => METRIC,
    };
    let area = frame.inset(92.0, 56.0, 28.0, 76.0);
    title(canvas, &elide(&readable(&column.name), 25.0, 300.0), area.x0, frame.y0 + 22.0, 25.0);
    let points: Vec<(f64, f64)> = plot.epochs.iter().copied().zip(column.values.iter().copied()).collect();
    let finite: Vec<(f64, f64)> = points.iter().copied().filter(|p| p.1.is_finite()).collect();
    let values = || finite.iter().map(|p| p.1);
    let mut y = Range::covering(values(), 0.06);
    if metric && !finite.is_empty() {
        y = Range::new(0.0, (values().fold(0.0, f64::max) * 1.1).clamp(0.01, 1.0));
    }
    let x = match (plot.epochs.first(), plot.epochs.last()) {
        (Some(&first), Some(&last)) if last > first => Range::new(first, last),
        (Some(&only), _) => Range::new(only - 1.0, only + 1.0),
        _ => Range::new(0.0, 1.0),
    };
    let axes = Axes { area, x, y };
    let (x_ticks, y_ticks) = (ticks(x, 5, true), ticks(y, 5, false));
    axes.draw(
        canvas,
        &AxesText { x_ticks: &x_ticks, y_ticks: &y_ticks, x_label: "epoch", y_label: "", size: 21.0 },
    );
    if finite.is_empty() {
        return axes.note(canvas, "no values", 22.0);
    }
    // Too few epochs to smooth: the raw line is all there is.
    let few = finite.len() < 5;
    axes.line(
        canvas,
        points.iter().copied(),
        if few { 3.5 } else { 2.5 },
        colour,
        if few { 1.0 } else { 0.4 },
    );
    if points.len() <= 40 {
        for &(x, y) in &finite {
            canvas.disc(axes.at(x, y), if few { 6.0 } else { 3.5 }, colour, if few { 1.0 } else { 0.55 });
        }
    }
    if !few {
        let smooth = smoothed(&column.values);
        axes.line(canvas, plot.epochs.iter().copied().zip(smooth), 4.5, colour, 1.0);
    }
    let best = if metric { values().fold(f64::MIN, f64::max) } else { values().fold(f64::MAX, f64::min) };
    let epoch = finite.iter().find(|p| p.1 == best).map_or(0.0, |p| p.0);
    let decimals = if best.abs() >= 100.0 { 0 } else { 3 };
    let text = format!("best {} at {epoch:.0}", number(best, decimals));
    canvas.text(&text, area.x1, frame.y0 + 23.0, Anchor::End, &TextStyle::new(19.0).colour(MUTED));
}

/// `train/box_loss` as `train box loss`, `metrics/mAP50-95(B)` as `mAP50-95`.
fn readable(name: &str) -> String {
    let name = name.strip_prefix("metrics/").unwrap_or(name);
    name.replace("(B)", "").replace(['/', '_'], " ")
}

/// Gaussian smoothing over epochs (sigma 3), the weights normalised over the values that are finite.
fn smoothed(values: &[f64]) -> Vec<f64> {
    const SIGMA: f64 = 3.0;
    const REACH: usize = 9;
    (0..values.len())
        .map(|i| {
            let (from, to) = (i.saturating_sub(REACH), (i + REACH).min(values.len() - 1));
            let (mut sum, mut weights) = (0.0, 0.0);
            for (j, value) in values.iter().enumerate().take(to + 1).skip(from) {
                if value.is_finite() {
                    let weight = (-0.5 * ((i as f64 - j as f64) / SIGMA).powi(2)).exp();
                    sum += weight * value;
                    weights += weight;
                }
            }
            if weights > 0.0 && values[i].is_finite() { sum / weights } else { f64::NAN }
        })
        .collect()
}
