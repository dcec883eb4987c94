//! From tracing events to lines to sinks.

use std::io::Write;
use std::sync::mpsc::SyncSender;

use serde_json::{Map, Value as Json};
use time::{OffsetDateTime, UtcOffset};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Event, Subscriber};
use tracing_appender::non_blocking::NonBlocking;
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use super::ConsoleWriter;
use super::jobs::Message;
use super::line::{LogFormat, LogLine};

/// Where lines go.
pub enum Sink {
    /// A terminal or a pipe.
    Console {
        /// Format.
        format: LogFormat,
        /// Colours.
        colour: bool,
        /// Writes a line.
        write: ConsoleWriter,
    },
    /// The service's file.
    File {
        /// Format.
        format: LogFormat,
        /// Writes from its own thread.
        writer: NonBlocking,
    },
    /// The jobs' files.
    Jobs(SyncSender<Message>),
}

/// Turns events into [`LogLine`]s and hands them to the sinks.
pub struct LogLayer {
    sinks: Vec<Sink>,
    offset: UtcOffset,
}

impl LogLayer {
    /// A layer over these sinks; times are shown at this offset.
    pub fn new(sinks: Vec<Sink>, offset: UtcOffset) -> Self {
        Self { sinks, offset }
    }
}

/// The fields of an event or a span.
#[derive(Debug, Default)]
struct Fields {
    message: String,
    map: Map<String, Json>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Json) {
        if field.name() == "message" {
            self.message = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        } else {
            self.map.insert(field.name().to_owned(), value);
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
}

impl<S> Layer<S> for LogLayer
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(outer) = span.extensions().get::<Fields>() {
                for (key, value) in &outer.map {
                    fields.map.entry(key.clone()).or_insert_with(|| value.clone());
                }
            }
        }
        event.record(&mut fields);
        let metadata = event.metadata();
        let task_id = match fields.map.shift_remove("task_id") {
            Some(Json::String(id)) => Some(id),
            _ => None,
        };
        let line = LogLine {
            time: OffsetDateTime::now_utc().to_offset(self.offset),
            level: *metadata.level(),
            module: metadata.target().to_owned(),
            line: metadata.line().unwrap_or(0),
            message: fields.message,
            task_id,
            fields: fields.map,
        };
        for sink in &self.sinks {
            write(sink, &line);
        }
    }
}

fn write(sink: &Sink, line: &LogLine) {
    match sink {
        Sink::Console { format, colour, write } => write(&line.text(*format, *colour)),
        Sink::File { format, writer } => {
            // The writer has its own thread; a line that does not fit its queue is lost, which is said to be acceptable.
            let _ = writeln!(writer.clone(), "{}", line.text(*format, false));
        }
        // As above: a full queue loses a line, never a job.
        Sink::Jobs(sender) if line.task_id.is_some() => drop(sender.try_send(Message::Line(line.clone()))),
        Sink::Jobs(_) => {}
    }
}
