//! Where events go: the observer and `events.jsonl`.

use std::time::{Duration, Instant};

use crate::train::event::{Command, Observer, SessionEvent};
use crate::train::run_folder::RunFolder;

/// Steps are logged to the file at most this often; the observer hears all of them.
const STEP_LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Passes events on.
pub(super) struct Reporter<'a> {
    observer: &'a mut dyn Observer,
    pub folder: RunFolder,
    last_step_logged: Option<Instant>,
    is_log_broken: bool,
}

impl<'a> Reporter<'a> {
    pub fn new(observer: &'a mut dyn Observer, folder: RunFolder) -> Reporter<'a> {
        Reporter { observer, folder, last_step_logged: None, is_log_broken: false }
    }

    /// Tells the observer and the log. A log that cannot be written is warned of once and does not end
    /// the run: what matters is in the checkpoints, whose errors do.
    pub fn emit(&mut self, event: SessionEvent) {
        self.observer.event(&event);
        if let SessionEvent::Step { batch, batches, .. } = event {
            let recent = self.last_step_logged.is_some_and(|at| at.elapsed() < STEP_LOG_INTERVAL);
            if recent && batch != batches {
                return;
            }
            self.last_step_logged = Some(Instant::now());
        }
        if let Err(error) = self.folder.log(&event)
            && !self.is_log_broken
        {
            self.is_log_broken = true;
            self.observer.event(&SessionEvent::Warning { message: error.chain() });
        }
    }

    pub fn warn(&mut self, message: impl Into<String>) {
        self.emit(SessionEvent::Warning { message: message.into() });
    }

    pub fn command(&mut self) -> Command {
        self.observer.command()
    }
}
