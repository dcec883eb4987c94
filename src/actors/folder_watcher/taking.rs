//! One dropped file: read, claimed, decided, its verdict written beside it.

use std::io::{Error, ErrorKind};
use std::path::Path;
use std::sync::Arc;

use super::claims::{self, Claim};
use super::listing::{self, Seen};
use crate::actors::intake::{self, Submission, Taker, Verdict};
use crate::actors::keeper::Keeper;
use crate::adapters::queue::{JobStore, QueueError};
use crate::job::spec::{Overlay, SpecContext};

/// A file may be this large; one byte more is read, so that the refusal can be exact.
const BYTES_MAX: u64 = 1 << 20;

/// What became of a file.
pub(super) enum Taken {
    /// It changed while it was read; a later look takes it.
    Moved,
    /// The system does not let us read it.
    Unreadable(Error),
    /// Another service took it.
    Elsewhere {
        /// Its machine.
        machine_id: String,
        /// The file was edited since.
        edited: bool,
    },
    /// Another service is deciding about it.
    Claimed {
        /// Its machine.
        machine_id: String,
    },
    /// It has a verdict.
    Decided(Verdict),
}

/// Takes a settled file. With it: why the file could not be claimed, when it was taken without.
pub(super) async fn take(
    keeper: &Keeper,
    context: &Arc<SpecContext>,
    taker: &Arc<Taker>,
    path: &Path,
    seen: Seen,
) -> Result<(Taken, Option<Error>), QueueError> {
    let read = {
        let (path, taker) = (path.to_owned(), taker.clone());
        tokio::task::spawn_blocking(move || {
            let submission = read(&path, seen, &taker)?;
            Ok(submission.map(|it| (claims::claim(&path, &taker, &it.content_sha256()), it)))
        })
        .await
    };
    let (claim, submission) = match read {
        Ok(Ok(Some(read))) => read,
        Ok(Err(error)) => {
            let is_gone = Error::kind(&error) == ErrorKind::NotFound;
            return Ok((if is_gone { Taken::Moved } else { Taken::Unreadable(error) }, None));
        }
        _ => return Ok((Taken::Moved, None)),
    };
    let (_held, unclaimable) = match claim {
        Claim::Ours(held) => (Some(held), None),
        Claim::Free(error) => (None, Some(error)),
        Claim::Taken { machine_id, edited } => return Ok((Taken::Elsewhere { machine_id, edited }, None)),
        Claim::Claimed { machine_id } => return Ok((Taken::Claimed { machine_id }, None)),
    };
    let context = context.clone();
    let verdict = keeper.with(move |journal| intake::decide(journal, &submission, &context)).await?;
    let (path, text) = (path.to_owned(), sidecar_text(keeper, &verdict, path).await?);
    if let Some((accepted, text)) = text {
        let shown = path.display().to_string();
        let written =
            tokio::task::spawn_blocking(move || intake::write_sidecar(&path, accepted, &text)).await;
        if let Ok(Err(error)) = written {
            tracing::warn!(%error, "cannot write the verdict beside {shown}; the journal has it");
        }
    }
    Ok((Taken::Decided(verdict), unclaimable))
}

/// What the sidecar says, and whether it is an acceptance.
async fn sidecar_text(
    keeper: &Keeper,
    verdict: &Verdict,
    path: &Path,
) -> Result<Option<(bool, String)>, QueueError> {
    Ok(match verdict {
        Verdict::Accepted(record) => {
            let (source, hash) = (record.source.clone(), record.content_sha256.clone());
            let entry = keeper.with(move |journal| journal.intake(&source, &hash)).await?;
            debug_assert!(entry.is_some(), "an accepted file has its verdict: {}", path.display());
            entry.map(|entry| (true, entry.verdict))
        }
        Verdict::DryRun(text) => Some((true, text.clone())),
        Verdict::Known(entry) => Some((entry.accepted, entry.verdict.clone())),
        Verdict::Rejected(reason) => Some((false, reason.clone())),
    })
}

/// Reads a file; `None` when it is no longer as it was seen.
fn read(path: &Path, seen: Seen, taker: &Taker) -> std::io::Result<Option<Submission>> {
    use std::io::Read;
    let file = std::fs::File::open(path)?;
    let mut bytes = Vec::new();
    file.take(BYTES_MAX + 1).read_to_end(&mut bytes)?;
    let same = listing::seen(path)? == seen;
    Ok(same.then(|| Submission {
        source: path.to_string_lossy().into_owned(),
        bytes,
        modified_unix_ms: seen.modified_unix_ms,
        keep_verdict: true,
        again: false,
        shared: None,
        overlay: Overlay::default(),
        taker: Some(taker.clone()),
    }))
}
