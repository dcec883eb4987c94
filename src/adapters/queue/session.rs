//! What a session says of its job, written down in one transaction.

use rusqlite::params;
use serde_json::Value as Json;

use super::QueueError;
use super::journal::{Journal, begin, insert_event, move_to, record, sql};
use super::outbox::{self, Occasion};
use super::statements::Kept;
use crate::job::delivery::NewDelivery;
use crate::job::record::{Change, JobRecord};
use crate::job::state::JobState;

/// One word of a session.
#[derive(Debug)]
pub struct SessionNote {
    /// The job runs from now on, and where, in a sentence; `None` when that is known.
    pub runs: Option<String>,
    /// The last sign of progress.
    pub progress: Json,
    /// Samples for side services.
    pub samples: Vec<NewDelivery>,
    /// The kind and the event that the history keeps, if it keeps this one.
    pub kept: Option<(String, Json)>,
}

impl Journal {
    /// Writes down what a session said: all of it or nothing. The record when it moved. It may be lost with the machine's
    /// power.
    ///
    /// # Errors
    /// As [`super::JobStore::change`], and when it cannot be stored.
    pub fn note_session(&mut self, seq: i64, note: SessionNote) -> Result<Option<JobRecord>, QueueError> {
        const WHAT: &str = "note what a session said";
        let (dispatcher, items_max) = (self.dispatcher.clone(), self.outbox_items_max);
        let transaction = begin(self.writer(false), WHAT)?;
        let moved = match note.runs {
            Some(reason) => {
                let change = Change::to(JobState::Running, reason);
                let after = move_to(&transaction, seq, &change, false)?;
                if let Some(dispatcher) = &dispatcher {
                    let told = dispatcher(&after, Occasion::State);
                    outbox::put(&transaction, &after.instance, told, items_max)?;
                }
                Some(after)
            }
            None => None,
        };
        // What is told of a checkpoint reads the progress.
        transaction
            .run("UPDATE jobs SET progress = ?2 WHERE seq = ?1", params![seq, note.progress.to_string()])
            .map_err(sql(WHAT))?;
        if !note.samples.is_empty() || note.kept.is_some() {
            let about = record(&transaction, seq)?;
            outbox::put(&transaction, &about.instance, note.samples, items_max)?;
            if let Some((kind, detail)) = &note.kept {
                insert_event(&transaction, seq, kind, detail)?;
                if let Some(dispatcher) = &dispatcher {
                    let told = dispatcher(&about, Occasion::Event { kind, detail });
                    outbox::put(&transaction, &about.instance, told, items_max)?;
                }
            }
        }
        transaction.commit().map_err(sql(WHAT))?;
        Ok(moved)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::adapters::queue::JobStore;
    use crate::adapters::queue::contract::new_job;

    fn note(runs: Option<&str>) -> SessionNote {
        SessionNote {
            runs: runs.map(str::to_owned),
            progress: json!({"epoch": 3}),
            samples: Vec::new(),
            kept: Some(("epoch".to_owned(), json!({"epoch": 3}))),
        }
    }

    #[test]
    fn all_of_it_is_written_or_nothing() {
        let mut journal = Journal::in_memory().expect("opens");
        let job = journal.accept(new_job("a"), None).expect("accepted");
        let kinds = |journal: &Journal| -> Vec<String> {
            let events = journal.events(job.seq, 0, 100).expect("readable");
            events.into_iter().map(|event| event.kind).filter(|kind| kind != "state").collect()
        };
        // A job that waits cannot run, so nothing of it is kept.
        let refused = journal.note_session(job.seq, note(Some("trains")));
        assert!(matches!(refused, Err(QueueError::Illegal { .. })), "{refused:?}");
        assert_eq!(journal.record(job.seq).expect("known").progress, None);
        assert_eq!(kinds(&journal), [""; 0]);

        journal.begin_attempt(job.seq, "starts").expect("legal");
        let moved = journal.note_session(job.seq, note(Some("trains"))).expect("stored").expect("moved");
        assert_eq!((moved.state, moved.reason.as_str()), (JobState::Running, "trains"));
        assert_eq!(journal.note_session(job.seq, note(None)).expect("stored"), None);
        let now = journal.record(job.seq).expect("known");
        assert_eq!((now.state, now.progress), (JobState::Running, Some(json!({"epoch": 3}))));
        assert_eq!(kinds(&journal), ["epoch", "epoch"]);
    }
}
