//! One dropped file: read, claimed, decided, its verdict written beside it.

use std::io::{Error, ErrorKind};
use std::path::Path;
use std::sync::Arc;

use super::claims::{self, Claim, Content, Foreign, Held};
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
    /// It is another service's.
    Foreign(Foreign),
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
    let looked = {
        let (path, taker) = (path.to_owned(), taker.clone());
        tokio::task::spawn_blocking(move || {
            let Some(submission) = read(&path, seen, &taker)? else { return Ok(None) };
            let content = content_of(&submission);
            Ok(Some((claims::claim(&path, &taker, &content)?, submission)))
        })
        .await
    };
    let (claim, submission) = match looked {
        Ok(Ok(Some(looked))) => looked,
        Ok(Err(error)) => {
            let is_gone = Error::kind(&error) == ErrorKind::NotFound;
            return Ok((if is_gone { Taken::Moved } else { Taken::Unreadable(error) }, None));
        }
        _ => return Ok((Taken::Moved, None)),
    };
    let (held, unclaimable) = match claim {
        Claim::Ours(held) => (Some(held), None),
        Claim::Free(error) => (None, Some(error)),
        Claim::Foreign(foreign) => return Ok((Taken::Foreign(foreign), None)),
    };
    let (context, content) = (context.clone(), content_of(&submission));
    let decided = async {
        let verdict = keeper.with(move |journal| intake::decide(journal, &submission, &context)).await?;
        let sidecar = sidecar_text(keeper, taker, &verdict).await?;
        Ok((verdict, sidecar))
    };
    match decided.await {
        Ok((verdict, sidecar)) => {
            if let Some(error) = tell(path, taker, content, held, sidecar).await {
                tracing::warn!(%error, "cannot write the verdict beside {}; the journal has it", path.display());
            }
            Ok((Taken::Decided(verdict), unclaimable))
        }
        Err(error) => {
            // The journal may have it all the same; the next look finds out.
            if let Some(held) = held {
                held.keep();
            }
            Err(error)
        }
    }
}

/// Writes what was decided beside the file and lets the claim go. When that did not work it says why, and the claim stays, so
/// that no other service takes the file; the next start finds it and writes the verdict.
async fn tell(
    path: &Path,
    taker: &Arc<Taker>,
    content: Content,
    held: Option<Held>,
    sidecar: Option<(bool, String)>,
) -> Option<Error> {
    let (path, taker) = (path.to_owned(), taker.clone());
    // Shares may hang: also the claim is removed away from this thread.
    let told = tokio::task::spawn_blocking(move || {
        let (accepted, text) = sidecar?;
        let written = intake::write_sidecar(&path, accepted, &text)
            .and_then(|()| claims::sign_refusal(&path, &taker, (!accepted).then_some(&content)));
        match (written, held) {
            (Err(error), Some(held)) => {
                held.keep();
                Some(error)
            }
            (Err(error), None) => Some(error),
            (Ok(()), _) => None,
        }
    });
    told.await.unwrap_or_else(|error| Some(Error::other(error)))
}

fn content_of(submission: &Submission) -> Content {
    Content { sha256: submission.content_sha256(), modified_unix_ms: submission.modified_unix_ms }
}

/// What the sidecar says, and whether it is an acceptance.
async fn sidecar_text(
    keeper: &Keeper,
    taker: &Taker,
    verdict: &Verdict,
) -> Result<Option<(bool, String)>, QueueError> {
    Ok(match verdict {
        Verdict::Accepted(record) => {
            let (source, hash) = (record.source.clone(), record.content_sha256.clone());
            let entry = keeper.with(move |journal| journal.intake(&source, &hash)).await?;
            debug_assert!(entry.is_some(), "an accepted file has its verdict: {}", record.source);
            entry.map(|entry| (true, entry.verdict))
        }
        Verdict::DryRun(text) => Some((true, text.clone())),
        Verdict::Known(entry) if entry.accepted => Some((true, signed(&entry.verdict, taker))),
        Verdict::Known(entry) => Some((false, entry.verdict.clone())),
        Verdict::Rejected(reason) => Some((false, reason.clone())),
    })
}

/// An acceptance with its signature: one of before there were any has none.
fn signed(verdict: &str, taker: &Taker) -> String {
    match serde_json::from_str::<serde_json::Value>(verdict) {
        Ok(mut sidecar) if sidecar.is_object() && !sidecar["taken_by"].is_object() => {
            sidecar["taken_by"] = serde_json::json!(taker);
            format!("{sidecar:#}\n")
        }
        _ => verdict.to_owned(),
    }
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
