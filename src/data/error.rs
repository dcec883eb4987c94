//! What can go wrong with data.

use std::path::{Path, PathBuf};

use crate::engine::device::cuda::DeviceError;
use crate::yaml::{Faults, YamlError};

/// Why a dataset cannot be used, or an image cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The dataset file is not YAML.
    #[error("the dataset file cannot be read as YAML")]
    Yaml(#[source] Box<YamlError>),
    /// Keys of the dataset file are missing or wrong.
    #[error("{0}")]
    Config(Box<Faults>),
    /// A folder, list or file that the dataset file names is not there.
    #[error("{file}:{line}: key `{key}`: {value:?} does not exist (tried {tried})")]
    Missing {
        /// The dataset file.
        file: String,
        /// Line of the value; 0 when unknown.
        line: usize,
        /// The key.
        key: String,
        /// What it says.
        value: String,
        /// The places that were looked at.
        tried: String,
    },
    /// No dataset file at the path given.
    #[error("no dataset at {}: expected a data.yaml or a folder that holds one", path.display())]
    NoDataset {
        /// The path given.
        path: PathBuf,
    },
    /// A split has no image.
    #[error("split `{split}` of {} has no usable image ({found} found, {dropped} dropped{first})", file.display())]
    NoImages {
        /// The dataset file.
        file: PathBuf,
        /// The split.
        split: String,
        /// Files with an image suffix.
        found: usize,
        /// Those that were dropped.
        dropped: usize,
        /// The first reason, with a separator, or nothing.
        first: String,
    },
    /// The training images have no label at all.
    #[error("none of the {images} images of split `{split}` has a label; labels were looked for like {}", example.display())]
    NoLabels {
        /// The split.
        split: String,
        /// Images of the split.
        images: usize,
        /// Where the first image's labels would be.
        example: PathBuf,
    },
    /// A split that was asked for is not in the dataset file.
    #[error("{}: split `{split}` is not defined; defined: {defined}", file.display())]
    NoSplit {
        /// The dataset file.
        file: PathBuf,
        /// The split.
        split: String,
        /// The splits that are.
        defined: String,
    },
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// An image cannot be decoded.
    #[error("image {}: {reason}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An option is out of range.
    #[error("{key} is {value}; allowed: {allowed}")]
    Option {
        /// The option.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// A loader thread panicked.
    #[error("a loader thread failed while making batch {batch} of epoch {epoch}: {message}")]
    Worker {
        /// Epoch, from 0.
        epoch: u32,
        /// Batch within it, from 0.
        batch: usize,
        /// The panic's message.
        message: String,
    },
    /// No batch came in time.
    #[error("no batch from the loader threads for {seconds} s (waiting for batch {batch} of epoch {epoch})")]
    Stalled {
        /// Epoch, from 0.
        epoch: u32,
        /// Batch within it, from 0.
        batch: usize,
        /// How long was waited.
        seconds: u64,
    },
    /// The GPU refuses memory for training images, or fails while making them.
    #[error("training images cannot be made on the GPU")]
    Device(#[from] DeviceError),
}

impl DataError {
    /// True when the dataset file or an option is at fault rather than the data: the command line answers these with
    /// the exit code for wrong use.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            DataError::Yaml(_)
                | DataError::Config(_)
                | DataError::Missing { .. }
                | DataError::NoDataset { .. }
                | DataError::NoSplit { .. }
                | DataError::Option { .. }
        )
    }

    /// A reading fault.
    pub(crate) fn read(path: &Path, source: std::io::Error) -> DataError {
        DataError::Read { path: path.to_owned(), source }
    }

    /// A writing fault.
    pub(crate) fn write(path: &Path, source: std::io::Error) -> DataError {
        DataError::Write { path: path.to_owned(), source }
    }

    /// A bad image.
    pub(crate) fn image(path: &Path, reason: impl Into<String>) -> DataError {
        DataError::Image { path: path.to_owned(), reason: reason.into() }
    }
}
