//! The thread that owns the journal.
//!
//! Owns: the [`Journal`]. In: closures over it, in order, at most 256 waiting. Out: their results. A panic
//! inside a closure rolls its transaction back and is answered with [`QueueError::NoAnswer`]; the thread lives on. It
//! ends when the last [`Keeper`] is gone.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokio::sync::{mpsc, oneshot};

use crate::adapters::queue::QueueError;
use crate::adapters::queue::journal::Journal;

/// Closures that may wait.
const WAITING_MAX: usize = 256;

type Work = Box<dyn FnOnce(&mut Journal) + Send>;

/// A way to the journal's thread.
#[derive(Clone)]
pub struct Keeper {
    sender: mpsc::Sender<Work>,
}

impl Keeper {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(mut journal: Journal) -> std::io::Result<Self> {
        let (sender, mut receiver) = mpsc::channel::<Work>(WAITING_MAX);
        std::thread::Builder::new().name("journal".into()).spawn(move || {
            while let Some(work) = receiver.blocking_recv() {
                if catch_unwind(AssertUnwindSafe(|| work(&mut journal))).is_err() {
                    tracing::error!("work on the journal panicked; its transaction is rolled back");
                }
            }
        })?;
        Ok(Self { sender })
    }

    /// Runs `work` on the journal's thread some time; nobody waits for it, and it is dropped when too much waits. For
    /// samples.
    pub fn later<F>(&self, work: F)
    where
        F: FnOnce(&mut Journal) -> Result<(), QueueError> + Send + 'static,
    {
        let work: Work = Box::new(move |journal| {
            if let Err(error) = work(journal) {
                tracing::debug!("a sample cannot be kept: {error}");
            }
        });
        if self.sender.try_send(work).is_err() {
            tracing::debug!("a sample is dropped: too much waits for the journal");
        }
    }

    /// Runs `work` on the journal's thread and waits for its result.
    ///
    /// # Errors
    /// Those of `work`, and [`QueueError::NoAnswer`] when it panicked or the thread is gone.
    pub async fn with<R, F>(&self, work: F) -> Result<R, QueueError>
    where
        R: Send + 'static,
        F: FnOnce(&mut Journal) -> Result<R, QueueError> + Send + 'static,
    {
        let (answer, result) = oneshot::channel();
        let work: Work = Box::new(move |journal| {
            // A caller that stopped waiting does not need the answer.
            drop(answer.send(work(journal)));
        });
        self.sender.send(work).await.map_err(|_| QueueError::NoAnswer)?;
        result.await.unwrap_or(Err(QueueError::NoAnswer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::queue::JobStore;

    #[test]
    fn a_panic_is_an_answer_and_the_thread_lives_on() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async {
            let keeper = Keeper::start(Journal::in_memory().expect("opens")).expect("starts");
            let failed = keeper.with::<(), _>(|_| panic!("on purpose")).await;
            assert!(matches!(failed, Err(QueueError::NoAnswer)));
            assert_eq!(keeper.with(|journal| journal.active()).await.expect("lives"), []);
        });
    }
}
