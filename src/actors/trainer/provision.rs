//! What a job needs before its process starts: its run folder from the store, its dataset from the store.
//!
//! Runs on a thread of its own with a runtime of its own: files of gigabytes must not hold up the supervisor.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::Control;
use crate::actors::endings::Ending;
use crate::actors::outgoing::run_of;
use crate::adapters::store::archive::claim;
use crate::adapters::store::restore::{Restored, has_checkpoint, restore};
use crate::adapters::store::stage::{InUse, dataset_ref, stage};
use crate::adapters::store::{BucketName, ObjectStore, StoreError};
use crate::job::causes::chain;
use crate::job::delivery::is_shared_instance;
use crate::job::record::JobRecord;
use crate::job::state::FailureClass;
use crate::train::child::JobMode;

/// How long a store that does not answer is waited for when a job's checkpoints lie nowhere else.
const RESTORE_LIMIT: Duration = Duration::from_secs(300);
/// Between two tries.
const PAUSE: Duration = Duration::from_secs(2);

/// The store, as trainers use it.
#[derive(Clone)]
pub struct Supply {
    /// The store.
    pub store: Arc<dyn ObjectStore>,
    /// The bucket of runs.
    pub bucket: BucketName,
    /// Where datasets are staged.
    pub datasets_dir: PathBuf,
    /// The name of this machine in the fleet.
    pub machine_id: String,
}

impl std::fmt::Debug for Supply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supply").field("bucket", &self.bucket).finish_non_exhaustive()
    }
}

/// What provisioning came to.
#[derive(Debug, Default)]
pub(super) struct Provided {
    /// The dataset's place on this machine, when it came from the store.
    pub(super) data: Option<String>,
    /// Keeps that dataset as it is; to be held until the process has ended.
    pub(super) in_use: Option<InUse>,
}

/// Brings what is missing; an order ends it at once.
pub(super) async fn provide(
    record: &JobRecord,
    supply: Option<&Supply>,
    orders: &mut mpsc::Receiver<Control>,
) -> Result<Provided, Ending> {
    let needs_data = record.spec.args.data.starts_with("s3://");
    let Some(supply) = supply else {
        if needs_data {
            let reason = format!("{} lies in an object store, and none is configured", record.spec.args.data);
            return Err(Ending::Failed { class: FailureClass::Config, reason });
        }
        return match is_gone(record) {
            true => Err(gone(record, "there is no store")),
            false => Ok(Provided::default()),
        };
    };
    if !needs_data && !must_restore(record) {
        return Ok(Provided::default());
    }
    let (cancel, cancelled) = oneshot::channel::<()>();
    let (record, supply) = (record.clone(), supply.clone());
    let work = move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| internal(format!("cannot start a runtime: {error}")))?;
        runtime.block_on(async move {
            tokio::select! {
                provided = bring(&record, &supply) => provided,
                // A dropped sender ends it too.
                _ = cancelled => Err(Ending::Interrupted("it was told to leave".to_owned())),
            }
        })
    };
    let mut thread = tokio::task::spawn_blocking(work);
    let order = tokio::select! {
        provided = &mut thread => return flatten(provided),
        order = orders.recv() => order,
    };
    drop(cancel);
    // The thread must be gone before another attempt writes to the same folder.
    let _ = thread.await;
    Err(match order {
        Some(Control::Stop { .. }) => Ending::Cancelled(None),
        Some(Control::Interrupt { .. } | Control::Kill) | None => {
            Ending::Interrupted("the service was shut down".to_owned())
        }
    })
}

fn flatten(provided: Result<Result<Provided, Ending>, tokio::task::JoinError>) -> Result<Provided, Ending> {
    provided.unwrap_or_else(|error| Err(internal(format!("fetching from the store failed: {error}"))))
}

fn internal(reason: String) -> Ending {
    Ending::Failed { class: FailureClass::Internal, reason }
}

/// True when the run was begun before and this machine may not have the newest of it.
fn must_restore(record: &JobRecord) -> bool {
    let is_begun = record.attempts_all() > 1 || record.continued().is_some();
    let was_elsewhere =
        record.attempts_before > 0 || record.continued().is_some_and(|continued| continued.was_elsewhere);
    is_begun && (was_elsewhere || !has_checkpoint(&record.run_dir))
}

/// True when the work that was done lies in the store and not here, or may do so: to begin without it would do that work
/// again and replace what is stored of it.
fn is_elsewhere(record: &JobRecord) -> bool {
    let is_ours = record.has_made_checkpoint() || was_brought(record);
    let is_here = is_ours && has_checkpoint(&record.run_dir);
    let continued = record.continued();
    let was_done = record.attempts_before > 0
        || record.has_made_checkpoint()
        || continued.is_some_and(|continued| continued.has_checkpoint || continued.was_elsewhere);
    record.spec.mode == JobMode::Train && was_done && !is_here
}

/// Beside the run folder's checkpoints: the owner for whom they were brought from the store.
const BROUGHT: &str = "state/brought";

fn owner(record: &JobRecord) -> String {
    format!("{} {}\n", record.instance, record.fence)
}

/// True when the newest checkpoint was brought from the store for this very owner: what it makes comes on top of it.
fn was_brought(record: &JobRecord) -> bool {
    std::fs::read_to_string(record.run_dir.join(BROUGHT)).is_ok_and(|text| text == owner(record))
}

fn note_brought(record: &JobRecord) {
    let path = record.run_dir.join(BROUGHT);
    let folder = path.parent().unwrap_or(&record.run_dir);
    // Losing it costs a wait in an outage, nothing else.
    if let Err(error) = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&path, owner(record))) {
        tracing::debug!(task_id = %record.task_id, "{} is not written: {error}", path.display());
    }
}

/// True when it was told to go on from a checkpoint, and the run folder has none.
fn is_gone(record: &JobRecord) -> bool {
    let had_checkpoint = record.continued().is_some_and(|continued| continued.has_checkpoint);
    record.spec.mode == JobMode::Train && had_checkpoint && !has_checkpoint(&record.run_dir)
}

fn gone(record: &JobRecord, but: &str) -> Ending {
    let reason = format!(
        "no checkpoint to go on from is left: {} has none and {but}; `boxwright submit --again` trains it from its \
         beginning",
        record.run_dir.display()
    );
    Ending::Failed { class: FailureClass::Config, reason }
}

async fn bring(record: &JobRecord, supply: &Supply) -> Result<Provided, Ending> {
    if must_restore(record) {
        bring_run(record, supply).await?;
    }
    if !record.spec.args.data.starts_with("s3://") {
        return Ok(Provided::default());
    }
    let refused = |error: StoreError| {
        let class = match error.retry() {
            crate::adapters::store::Retry::Never => FailureClass::Data,
            _ => FailureClass::Storage,
        };
        let reason = format!("the dataset {} cannot be fetched: {}", record.spec.args.data, chain(&error));
        Ending::Failed { class, reason }
    };
    let Some(dataset) = dataset_ref(&record.spec.args.data).map_err(refused)? else {
        return Ok(Provided::default());
    };
    let began = Instant::now();
    let user = format!("the job {}", record.task_id);
    let staged = stage(&*supply.store, &supply.datasets_dir, &dataset, &user).await;
    let (staged, in_use) = staged.map_err(refused)?;
    tracing::info!(
        task_id = %record.task_id,
        "the dataset {} is at {} ({} objects fetched in {:.1} s)",
        record.spec.args.data,
        staged.path.display(),
        staged.fetched,
        began.elapsed().as_secs_f64()
    );
    Ok(Provided { data: Some(staged.path.to_string_lossy().into_owned()), in_use: Some(in_use) })
}

/// Claims the run in the store and brings its folder back. Where its work lies in the store alone, a store that stays
/// silent is waited for, and the attempt fails when nothing comes: it is tried again.
async fn bring_run(record: &JobRecord, supply: &Supply) -> Result<(), Ending> {
    let id = record.task_id.as_str();
    let until = Instant::now() + RESTORE_LIMIT;
    let is_elsewhere = is_elsewhere(record);
    let mut was_said = false;
    let mut ownership = Ownership::default();
    loop {
        match ownership.claim_and_restore(record, supply).await {
            Ok(restored) => {
                check_restored(record, restored.as_ref())?;
                note_brought(record);
                say_restored(id, restored.as_ref(), ownership.left_by.as_deref());
                return Ok(());
            }
            Err(error) if error.is_outage() && is_elsewhere && Instant::now() < until => {
                if !was_said {
                    was_said = true;
                    tracing::warn!(
                        task_id = id,
                        "its checkpoints lie in the store, which does not answer; waiting: {}",
                        chain(&error)
                    );
                }
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) if is_elsewhere => {
                let reason =
                    format!("its checkpoints cannot be brought back from the store: {}", chain(&error));
                return Err(Ending::Failed { class: FailureClass::Storage, reason });
            }
            Err(error) => {
                tracing::error!(
                    task_id = id,
                    "the run cannot be brought back from the store, it goes on with what is here: {}",
                    chain(&error)
                );
                return Ok(());
            }
        }
    }
}

/// Fails where work that is known of did not come back.
fn check_restored(record: &JobRecord, restored: Option<&Restored>) -> Result<(), Ending> {
    if let Some(restored) = restored.filter(|restored| restored.is_lost) {
        let reason = format!("no checkpoint of it in the store is whole: {}", restored.problems.join("; "));
        return Err(Ending::Failed { class: FailureClass::Storage, reason });
    }
    if is_gone(record) {
        return Err(gone(record, "the store has none of it"));
    }
    if record.has_made_checkpoint() && !has_checkpoint(&record.run_dir) {
        tracing::warn!(
            task_id = %record.task_id,
            "its checkpoints are gone, here and in the store: it starts from its beginning"
        );
    }
    Ok(())
}

fn say_restored(task_id: &str, restored: Option<&Restored>, left_by: Option<&str>) {
    let is_something =
        |restored: &&Restored| left_by.is_some() || restored.checkpoint.is_some() || restored.files > 0;
    let Some(restored) = restored.filter(is_something) else {
        tracing::info!(task_id, "the store has nothing of this run; it starts from its beginning");
        return;
    };
    for problem in &restored.problems {
        tracing::warn!(task_id, "from the store: {problem}");
    }
    let checkpoint = restored.checkpoint.as_deref().and_then(Path::file_name);
    let checkpoint = checkpoint.map(|name| name.to_string_lossy().into_owned());
    tracing::info!(
        task_id,
        "the run folder is brought back from the store as the machine {} left it ({})",
        left_by.unwrap_or(&restored.machine_id),
        checkpoint.as_deref().unwrap_or("no checkpoint")
    );
}

/// Whose the run is in the store.
#[derive(Default)]
struct Ownership {
    /// True once the claim was made, or cannot be.
    is_settled: bool,
    /// The machine that had it before.
    left_by: Option<String>,
}

impl Ownership {
    /// Claims before it restores: what comes back is then what stays.
    async fn claim_and_restore(
        &mut self,
        record: &JobRecord,
        supply: &Supply,
    ) -> Result<Option<Restored>, StoreError> {
        let (store, bucket) = (supply.store.as_ref(), &supply.bucket);
        // A job of this machine alone has no other owner.
        if is_shared_instance(&record.instance) && !self.is_settled {
            match claim(store, bucket, &run_of(&supply.machine_id, record)).await {
                Ok(claimed) => self.left_by = claimed.left_by,
                Err(error @ (StoreError::Unavailable { .. } | StoreError::Timeout { .. })) => {
                    return Err(error);
                }
                // To read may be allowed all the same.
                Err(error) => tracing::warn!(
                    task_id = %record.task_id,
                    "the store does not show yet that the run is here: {}",
                    chain(&error)
                ),
            }
            self.is_settled = true;
        }
        let (spec, id) = (&record.spec, record.task_id.as_str());
        let earlier = record.continued().map(|continued| continued.instances).unwrap_or_default();
        let mut instances = vec![record.instance.as_str()];
        instances.extend(earlier.iter().map(String::as_str));
        let restored = restore(store, bucket, &spec.study_name, id, &instances, &record.run_dir).await?;
        // A server that compares first and writes afterwards may have let a write of the earlier owner overtake the claim.
        // By now that write is there.
        if is_shared_instance(&record.instance)
            && let Err(error) = claim(store, bucket, &run_of(&supply.machine_id, record)).await
        {
            tracing::debug!(task_id = %record.task_id, "the claim is not looked at again: {}", chain(&error));
        }
        Ok(restored)
    }
}

#[cfg(test)]
mod tests;
