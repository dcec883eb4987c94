//! One line of a log, and its three spellings.

use serde_json::{Map, Value as Json};
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use time::{OffsetDateTime, UtcOffset};
use tracing::Level;

/// How lines are spelt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// `12:34:56 | INFO     | message`.
    Simple,
    /// `2026-01-02 12:34:56.789 | INFO     | module:line - message key=value`.
    Detailed,
    /// One JSON object.
    Json,
}

impl LogFormat {
    /// The format of a word; detailed for an unknown one.
    pub fn parse(word: &str) -> Self {
        match word {
            "simple" => Self::Simple,
            "json" => Self::Json,
            _ => Self::Detailed,
        }
    }
}

/// What was logged.
#[derive(Debug, Clone)]
pub struct LogLine {
    /// When.
    pub time: OffsetDateTime,
    /// How serious.
    pub level: Level,
    /// Module.
    pub module: String,
    /// Line of the source; 0 when not known.
    pub line: u32,
    /// The message.
    pub message: String,
    /// The job it is about.
    pub task_id: Option<String>,
    /// Everything else.
    pub fields: Map<String, Json>,
}

const CLOCK: &[BorrowedFormatItem<'_>] = format_description!("[hour]:[minute]:[second]");
const FULL: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day] [hour]:[minute]:[second].[subsecond digits:3]");

/// The offset of local time, or UTC where it cannot be known (more than one thread runs).
pub(super) fn local_offset() -> UtcOffset {
    UtcOffset::current_local_offset().unwrap_or(UtcOffset::UTC)
}

/// The word for a level, as wide as the widest.
pub(super) fn level_word(level: Level) -> &'static str {
    match level {
        Level::TRACE => "TRACE",
        Level::DEBUG => "DEBUG",
        Level::INFO => "INFO",
        Level::WARN => "WARNING",
        Level::ERROR => "ERROR",
    }
}

fn level_colour(level: Level) -> &'static str {
    match level {
        Level::TRACE => "\x1b[36m",
        Level::DEBUG => "\x1b[34m",
        Level::INFO => "\x1b[1m",
        Level::WARN => "\x1b[33m",
        Level::ERROR => "\x1b[31m",
    }
}

impl LogLine {
    /// The line in a format, without its end.
    pub fn text(&self, format: LogFormat, colour: bool) -> String {
        match format {
            LogFormat::Json => self.json(),
            LogFormat::Simple => {
                let time = self.time.format(CLOCK).unwrap_or_default();
                let message = self.message_and_fields();
                self.columns(&time, None, &message, colour)
            }
            LogFormat::Detailed => {
                let time = self.time.format(FULL).unwrap_or_default();
                let place = format!("{}:{}", self.module, self.line);
                let message = self.message_and_fields();
                self.columns(&time, Some(&place), &message, colour)
            }
        }
    }

    fn columns(&self, time: &str, place: Option<&str>, message: &str, colour: bool) -> String {
        let word = level_word(self.level);
        if !colour {
            return match place {
                Some(place) => format!("{time} | {word:<8} | {place} - {message}"),
                None => format!("{time} | {word:<8} | {message}"),
            };
        }
        let (tone, off) = (level_colour(self.level), "\x1b[0m");
        match place {
            Some(place) => {
                format!(
                    "\x1b[32m{time}{off} | {tone}{word:<8}{off} | \x1b[36m{place}{off} - {tone}{message}{off}"
                )
            }
            None => format!("\x1b[32m{time}{off} | {tone}{word:<8}{off} | {tone}{message}{off}"),
        }
    }

    fn message_and_fields(&self) -> String {
        let mut text = self.message.clone();
        let task = self.task_id.as_ref().map(|id| ("task_id", id.clone()));
        let fields = self.fields.iter().map(|(key, value)| {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            (key.as_str(), value)
        });
        for (key, value) in task.into_iter().chain(fields) {
            if !text.is_empty() {
                text.push(' ');
            }
            text.push_str(&format!("{key}={value}"));
        }
        text
    }

    fn json(&self) -> String {
        let mut map = Map::new();
        let time = self.time.format(&time::format_description::well_known::Rfc3339).unwrap_or_default();
        map.insert("time".into(), time.into());
        map.insert("level".into(), level_word(self.level).into());
        map.insert("module".into(), self.module.clone().into());
        map.insert("line".into(), self.line.into());
        map.insert("message".into(), self.message.clone().into());
        if let Some(task_id) = &self.task_id {
            map.insert("task_id".into(), task_id.clone().into());
        }
        for (key, value) in &self.fields {
            map.entry(key.clone()).or_insert_with(|| value.clone());
        }
        Json::Object(map).to_string()
    }
}
