//! The supervisor's part in keeping the journal small: a batch of old rows at the start and once an hour, once a minute
//! while there are more.

use std::path::Path;
use std::time::Duration;

use actix::{ActorFutureExt, AsyncContext, Context, WrapFuture};

use super::{Supervisor, log_journal};
use crate::adapters::queue::QueueError;
use crate::adapters::queue::prune::ROWS_MAX;
use crate::job::clock::now_unix_ms;

/// Between two batches while there are more.
const BUSY_INTERVAL: Duration = Duration::from_secs(60);
/// Between two looks otherwise.
const IDLE_INTERVAL: Duration = Duration::from_secs(3600);

/// What one batch came to.
struct Batch {
    jobs: usize,
    verdicts: usize,
    /// Verdicts up to this place were looked at; 0 when all were.
    looked_to: i64,
}

impl Supervisor {
    /// Forgets a batch of what ended long ago, and plans the next one. Verdicts are looked at from `after` on.
    pub(super) fn prune(&mut self, after: i64, ctx: &mut Context<Self>) {
        let keep_ms = self.config.journal.keep_ms();
        if keep_ms == 0 || self.shutting_down {
            return;
        }
        let (keeper, before) = (self.keeper.clone(), now_unix_ms() - keep_ms);
        let work = async move {
            let jobs = keeper.with(move |journal| journal.prune_jobs(before)).await?;
            let old = keeper.with(move |journal| journal.old_verdicts(after, before)).await?;
            let looked_to = old.last().filter(|_| old.len() >= ROWS_MAX).map_or(0, |last| last.id);
            // The folders may lie on a slow share, and the journal must not wait for it.
            let gone = tokio::task::spawn_blocking(move || {
                old.into_iter().filter(|old| is_gone(&old.path)).map(|old| old.id).collect::<Vec<i64>>()
            });
            let gone = gone.await.unwrap_or_default();
            let verdicts = gone.len();
            if verdicts > 0 {
                keeper.with(move |journal| journal.prune_verdicts(&gone)).await?;
            }
            Ok::<_, QueueError>(Batch { jobs, verdicts, looked_to })
        };
        ctx.spawn(work.into_actor(self).map(move |result, _actor, ctx| {
            let (next, pause) = match result {
                Ok(Batch { jobs, verdicts, looked_to }) => {
                    if jobs + verdicts > 0 {
                        tracing::info!("the journal forgets {jobs} old jobs and {verdicts} verdicts on files that are gone");
                    }
                    let is_more = jobs > 0 || looked_to > 0;
                    (looked_to, if is_more { BUSY_INTERVAL } else { IDLE_INTERVAL })
                }
                Err(error) => {
                    log_journal("forget old jobs", &error);
                    (after, IDLE_INTERVAL)
                }
            };
            ctx.run_later(pause, move |actor, ctx| actor.prune(next, ctx));
        }));
    }
}

/// True when a file is not there and its folder is. A folder without any file may be a share that is not there, in which case
/// the files come back and must not run again.
fn is_gone(path: &Path) -> bool {
    let found = std::fs::symlink_metadata(path);
    if !found.is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
        return false;
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let is_file = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.and_then(|entry| entry.file_type()).is_ok_and(|kind| kind.is_file())
    };
    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.any(is_file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_gone_only_from_a_folder_that_is_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let (here, gone) = (folder.path().join("here.yaml"), folder.path().join("gone.yaml"));
        std::fs::create_dir(folder.path().join("stop")).expect("writable");
        assert!(!is_gone(&gone), "an empty mount point looks like this");
        std::fs::write(&here, "").expect("writable");
        assert!(is_gone(&gone) && !is_gone(&here));
        assert!(!is_gone(&folder.path().join("none/gone.yaml")));
    }
}
