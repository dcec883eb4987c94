//! A new owner of a run says so in the store, before it begins.

use serde_json::Map;

use super::manifest::{Manifest, manifest_key, prefix_of, read_manifest, text_of};
use super::{WRITE_TRIES_MAX, now_unix_ms};
use crate::adapters::store::error::StoreError;
use crate::adapters::store::{BucketName, ObjectStore};
use crate::job::delivery::{FilesBody, FilesMoment, RunRef};

/// What a claim found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimed {
    /// The machine that wrote the manifest before; `None` when there was none of this instance.
    pub left_by: Option<String>,
}

/// Puts the owner's fencing number, its machine and `running` into the run's manifest, which keeps all that it names: from
/// then on deliveries of earlier owners end without changing anything. Where there is no manifest, one that names nothing
/// is written. The manifest of an earlier submission keeps its state, too. One with this number or a manifest that cannot be
/// read is left as it is.
///
/// # Errors
/// [`StoreError::Fenced`] when a later owner was here; others. It may be called again.
pub async fn claim(
    store: &dyn ObjectStore,
    bucket: &BucketName,
    run: &RunRef,
) -> Result<Claimed, StoreError> {
    let prefix = prefix_of(run)?;
    let key = manifest_key(&prefix)?;
    for _ in 0..WRITE_TRIES_MAX {
        let there = read_manifest(store, bucket, &prefix).await?;
        there.fence(run)?;
        if there.fault.is_some() {
            return Ok(Claimed { left_by: None });
        }
        let old = there.manifest.as_ref();
        let is_same_run = old.is_some_and(|old| old.instance == run.instance);
        let left_by = old.filter(|_| is_same_run).map(|old| old.machine_id.clone());
        if old.is_some_and(|old| old.fence == run.fence) {
            return Ok(Claimed { left_by });
        }
        let mut manifest = match old {
            Some(old) => Manifest { written_unix_ms: now_unix_ms(), ..old.clone() },
            None => {
                store.prepare(bucket).await?;
                Manifest::of(&nothing_yet(run), None, now_unix_ms())
            }
        };
        manifest.machine_id.clone_from(&run.machine_id);
        manifest.fence = run.fence;
        if is_same_run {
            manifest.status = "running".into();
            manifest.parent.clone_from(&there.sha256);
        }
        let text = text_of(&manifest, &prefix)?;
        if store.put_if(bucket, &key, text, there.expected()).await?.is_some() {
            return Ok(Claimed { left_by });
        }
    }
    Err(StoreError::Busy { object: format!("{bucket}/{key}") })
}

fn nothing_yet(run: &RunRef) -> FilesBody {
    FilesBody {
        run: run.clone(),
        continues: Vec::new(),
        moment: FilesMoment::Checkpoint,
        status: "running".into(),
        epoch: 0,
        step: 0,
        metrics: Map::new(),
        fitness: None,
        fitness_name: String::new(),
        val_fingerprint: None,
    }
}
