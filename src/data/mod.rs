//! Data: dataset files, decoding, caches, augmentation, loaders, the dataset report.
//!
//! The path of an image: [`config`] finds the splits that a `data.yaml` names, [`scan`] checks every image and label
//! and says what it dropped, [`decode`] and [`resize`] make pixels, [`cache`] keeps them, [`augment`] composes one
//! training sample from a plan of random draws, [`loader`] hands over batches. Start reading at [`Dataset::open`].

pub mod augment;
pub mod batch;
pub mod cache;
pub mod config;
pub mod dataset;
pub mod decode;
pub mod device_loader;
pub mod draw;
pub mod error;
pub mod image;
mod index;
pub mod labels;
pub mod list;
pub mod loader;
pub mod metadata;
mod pool;
pub mod probe;
pub mod rect;
pub mod report;
pub mod resize;
mod rows;
pub mod scan;
pub mod shelf;
pub mod stats;
pub mod synth;
mod training;

pub use batch::{Batch, Geometry, resize_batch};
pub use dataset::{Dataset, DatasetOptions, Split, SplitName};
pub use device_loader::{DeviceBatch, DeviceLoader, DeviceLoaderArgs, DeviceResizer};
pub use error::DataError;
pub use image::Image;
pub use loader::{LoaderArgs, TrainLoader, ValLoader};
pub use report::{DatasetReport, Finding, FindingKind};
