//! What `run` shows: a progress bar for each running job on a terminal, plain lines otherwise.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value as Json;

use crate::actors::supervisor::{Notice, Observer};
use crate::adapters::logs::ConsoleWriter;
use crate::job::record::JobRecord;
use crate::job::state::JobState;

/// Shows notices on the console.
pub struct Console {
    bars: MultiProgress,
    terminal: bool,
    jobs: Mutex<HashMap<String, ProgressBar>>,
}

impl Console {
    /// A console on standard error; bars only when that is a terminal.
    pub fn new() -> Arc<Self> {
        let terminal = std::io::stderr().is_terminal();
        let target =
            if terminal { ProgressDrawTarget::stderr_with_hz(8) } else { ProgressDrawTarget::hidden() };
        Arc::new(Self { bars: MultiProgress::with_draw_target(target), terminal, jobs: Mutex::default() })
    }

    /// True when standard error is a terminal.
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// A writer of log lines that keeps clear of the bars.
    pub fn writer(self: &Arc<Self>) -> ConsoleWriter {
        let console = self.clone();
        Arc::new(move |line| {
            use std::io::Write;
            // A closed console is no reason to fail.
            let print = || drop(writeln!(std::io::stderr().lock(), "{line}"));
            if console.terminal { console.bars.suspend(print) } else { print() }
        })
    }

    fn bar(&self, record: &JobRecord) {
        if !self.terminal {
            return;
        }
        let style = ProgressStyle::with_template("{prefix:.bold} [{bar:30.cyan/blue}] {percent:>3}% {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("━╸─");
        let bar = self.bars.add(ProgressBar::new(1000).with_style(style));
        bar.set_prefix(shorten(record.task_id.as_str(), 20));
        bar.set_message("preparing");
        bar.enable_steady_tick(Duration::from_millis(500));
        if let Ok(mut jobs) = self.jobs.lock() {
            jobs.insert(record.task_id.to_string(), bar);
        }
    }

    fn step(&self, task_id: &str, event: &Json) {
        let Ok(jobs) = self.jobs.lock() else { return };
        let Some(bar) = jobs.get(task_id) else { return };
        let number = |key: &str| event[key].as_f64();
        if let Some(epochs) = number("epochs").filter(|_| event["event"] != "finished") {
            bar.set_length((epochs * 1000.0) as u64);
        }
        match event["event"].as_str() {
            Some("plan") => bar.set_message("first step"),
            Some("step") => {
                let (epoch, batch) = (number("epoch").unwrap_or(1.0), number("batch").unwrap_or(0.0));
                let batches = number("batches").unwrap_or(1.0).max(1.0);
                bar.set_position(((epoch - 1.0 + batch / batches) * 1000.0) as u64);
                let losses: Vec<String> = ["box_loss", "cls_loss", "dfl_loss"]
                    .iter()
                    .filter_map(|name| {
                        Some(format!("{} {:.3}", name.trim_end_matches("_loss"), number(name)?))
                    })
                    .collect();
                let speed =
                    number("images_per_second").map_or(String::new(), |speed| format!(" {speed:.1} img/s"));
                bar.set_message(format!("epoch {epoch} batch {batch}/{batches} {}{speed}", losses.join(" ")));
            }
            _ => {}
        }
    }

    fn left(&self, record: &JobRecord) {
        if let Ok(mut jobs) = self.jobs.lock()
            && let Some(bar) = jobs.remove(record.task_id.as_str())
        {
            bar.finish_and_clear();
        }
        if record.state == JobState::Completed {
            self.print(&final_metrics(record));
        }
    }

    /// Results go to standard output, so that a script can read them.
    fn print(&self, text: &str) {
        use std::io::Write;
        let print = || drop(writeln!(std::io::stdout().lock(), "{text}"));
        if self.terminal { self.bars.suspend(print) } else { print() }
    }
}

impl Observer for Console {
    fn notice(&self, notice: &Notice) {
        match notice {
            Notice::Started(record) => self.bar(record),
            Notice::Event { task_id, event } => self.step(task_id.as_str(), event),
            Notice::Left(record) => self.left(record),
            // The log says these already.
            Notice::Accepted(_) | Notice::Rejected { .. } => {}
        }
    }
}

/// The last word on a completed job: its metrics and where its weights are.
pub fn final_metrics(record: &JobRecord) -> String {
    let mut lines = vec![format!("{} completed", record.task_id)];
    let result = record.result.clone().unwrap_or_default();
    let metrics = result["metrics"].as_object().into_iter().flatten();
    for (name, value) in metrics.filter(|(name, _)| name.as_str() != "fitness") {
        let value = value.as_f64().map_or_else(|| value.to_string(), |number| format!("{number:.4}"));
        lines.push(format!("  {name:<24} {value}"));
    }
    for (name, key) in [("fitness", "fitness"), ("best weights", "best"), ("last weights", "last")] {
        match &result[key] {
            Json::Null => {}
            Json::String(text) => lines.push(format!("  {name:<24} {text}")),
            other => {
                let value = other.as_f64().map_or_else(|| other.to_string(), |number| format!("{number:.4}"));
                lines.push(format!("  {name:<24} {value}"));
            }
        }
    }
    lines.push(format!("  {:<24} {}", "run folder", record.run_dir.display()));
    lines.join("\n")
}

/// A text of at most `width` characters.
pub fn shorten(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    format!("{}…", text.chars().take(width.saturating_sub(1)).collect::<String>())
}
