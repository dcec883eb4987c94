//! Which data a run trains on and is measured on.

use std::path::Path;

use super::feeding::{data_error, dataset_options, split_name};
use crate::data::metadata::{fingerprint, val_fingerprint_of};
use crate::train::args::TrainArgs;
use crate::train::error::TrainError;

/// Two hashes; see [`crate::data::metadata`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DataIdentity {
    /// Of training and validation data, on this machine.
    pub data: Option<String>,
    /// Of the split that is measured on, equal on all machines.
    pub val: Option<String>,
}

/// The identity of the data that these arguments name, as the run sees them: `split`, `single_cls`, `classes` and
/// `fraction` count. Costs a look at the directory entry of every file; label files are read once after a change.
///
/// # Errors
/// [`TrainError::Data`], or [`TrainError::Config`] for an unknown split.
pub fn data_identity(args: &TrainArgs) -> Result<DataIdentity, TrainError> {
    let (data, options) = (Path::new(&args.data), dataset_options(args)?);
    let told = |error| data_error(&args.data, error);
    let val = val_fingerprint_of(data, &options, split_name(args)?).map_err(told)?;
    let data = fingerprint(data, &options).map_err(told)?;
    Ok(DataIdentity { data: Some(data), val: Some(val) })
}
