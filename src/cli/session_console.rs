//! A session on the console: a progress bar on a terminal, plain lines otherwise.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value};

use super::signals;
use crate::train::event::{ClassFigures, Command, Observer, SessionEvent};

/// Without a terminal a line about the step in hand appears this often.
const PLAIN_INTERVAL: Duration = Duration::from_secs(30);

/// Writes to standard error, so that standard output stays free for results.
pub struct Console {
    bar: Option<ProgressBar>,
    last_plain: Instant,
}

impl Default for Console {
    fn default() -> Console {
        Console { bar: None, last_plain: Instant::now() }
    }
}

impl Console {
    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    fn begin_epoch(&mut self, batch: usize, batches: usize) {
        if !std::io::stderr().is_terminal() {
            return;
        }
        let bar = ProgressBar::with_draw_target(Some(batches as u64), ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_position(batch.saturating_sub(1) as u64);
        bar.reset_eta();
        self.bar = Some(bar);
    }

    fn step(&mut self, event: &SessionEvent, epochs: &str) {
        let SessionEvent::Step { batch, batches, box_loss, cls_loss, dfl_loss, images_per_second, .. } =
            event
        else {
            return;
        };
        let losses = format!("box {box_loss:.3} cls {cls_loss:.3} dfl {dfl_loss:.3}");
        let text = format!("epoch {epochs} {losses} {images_per_second:.1} img/s");
        if let Some(bar) = &self.bar {
            bar.set_message(text);
            bar.set_position(*batch as u64);
        } else if self.last_plain.elapsed() >= PLAIN_INTERVAL {
            self.last_plain = Instant::now();
            eprintln!("{text} batch {batch}/{batches}");
        }
    }
}

impl Observer for Console {
    fn event(&mut self, event: &SessionEvent) {
        match event {
            SessionEvent::Started { run_dir, .. } => self.line(&format!("run folder {}", run_dir.display())),
            SessionEvent::Plan { .. } => self.line(&plan_line(event)),
            SessionEvent::EpochStarted { batch, batches, .. } => self.begin_epoch(*batch, *batches),
            SessionEvent::Step { epoch, .. } => self.step(event, &epoch.to_string()),
            SessionEvent::Validating { batch, batches, images_per_second } => {
                if self.last_plain.elapsed() >= PLAIN_INTERVAL {
                    self.last_plain = Instant::now();
                    self.line(&format!("batch {batch}/{batches} {images_per_second:.1} img/s"));
                }
            }
            SessionEvent::Validated { classes, metrics, images, boxes, speed_ms, .. } => {
                if !classes.is_empty() {
                    self.line(&metrics_table(*images, *boxes, metrics, classes));
                    self.line(&speed_line(speed_ms));
                }
            }
            SessionEvent::Epoch { epoch, epochs, columns, is_best, .. } => {
                if let Some(bar) = self.bar.take() {
                    bar.finish_and_clear();
                }
                self.line(&epoch_line(*epoch, *epochs, columns, *is_best));
            }
            SessionEvent::Warning { message } => self.line(&format!("warning: {message}")),
            SessionEvent::Checkpoint { .. } | SessionEvent::Finished { .. } | SessionEvent::Failed { .. } => {
            }
        }
    }

    fn command(&mut self) -> Command {
        if signals::asked_to_end() { Command::Stop } else { Command::Continue }
    }
}

fn plan_line(event: &SessionEvent) -> String {
    let SessionEvent::Plan {
        parameters,
        batch,
        imgsz,
        device,
        threads,
        images,
        val_images,
        epochs,
        optimizer,
        lr0,
        arena_bytes,
        resumed_step,
        ..
    } = event
    else {
        return String::new();
    };
    let resumed = resumed_step.map_or(String::new(), |step| format!(", resumed at step {step}"));
    let place = if device == "cpu" { format!("{threads} threads") } else { format!("on {device}") };
    let network =
        format!("{parameters} parameters, batch {batch} at {imgsz} px ({} MiB), {place}", arena_bytes >> 20);
    if *epochs == 0 {
        return format!("{network}, {val_images} images to evaluate on");
    }
    format!(
        "{network}, {images} training and {val_images} validation images, {epochs} epochs, \
         {optimizer} lr {lr0}{resumed}"
    )
}

fn value(columns: &Map<String, Value>, name: &str) -> f64 {
    columns.get(name).and_then(Value::as_f64).unwrap_or(f64::NAN)
}

fn epoch_line(epoch: u32, epochs: u32, columns: &Map<String, Value>, is_best: bool) -> String {
    let get = |name: &str| value(columns, name);
    format!(
        "epoch {epoch}/{epochs}  box {:.4} cls {:.4} dfl {:.4}  P {:.3} R {:.3} mAP50 {:.4} mAP50-95 {:.4}  {:.0} s{}",
        get("train/box_loss"),
        get("train/cls_loss"),
        get("train/dfl_loss"),
        get("metrics/precision(B)"),
        get("metrics/recall(B)"),
        get("metrics/mAP50(B)"),
        get("metrics/mAP50-95(B)"),
        get("time"),
        if is_best { "  best" } else { "" }
    )
}

/// A table with one line for all classes and one for each.
pub fn metrics_table(
    images: usize,
    boxes: usize,
    metrics: &Map<String, Value>,
    classes: &[ClassFigures],
) -> String {
    let get = |name: &str| value(metrics, name);
    let width = classes.iter().map(|c| c.name.chars().count()).max().unwrap_or(0).clamp(5, 40);
    let mut text = format!(
        "{:<width$} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9}\n",
        "class", "images", "boxes", "P", "R", "mAP50", "mAP50-95"
    );
    let mut row = |name: &str, images: usize, boxes: usize, figures: [f64; 4]| {
        let [p, r, map50, map] = figures;
        text.push_str(&format!(
            "{name:<width$} {images:>8} {boxes:>8} {p:>8.3} {r:>8.3} {map50:>8.4} {map:>9.4}\n"
        ));
    };
    let all =
        ["metrics/precision(B)", "metrics/recall(B)", "metrics/mAP50(B)", "metrics/mAP50-95(B)"].map(get);
    row("all", images, boxes, all);
    for c in classes {
        row(&c.name, c.images, c.boxes, [c.precision, c.recall, c.map50, c.map50_95]);
    }
    text.trim_end().to_owned()
}

/// Milliseconds per image by kind of work.
pub fn speed_line(speed_ms: &[f64; 3]) -> String {
    let [load, network, after] = speed_ms;
    format!("per image: {load:.1} ms loading, {network:.1} ms network, {after:.1} ms after it")
}
