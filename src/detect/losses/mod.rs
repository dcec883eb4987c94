//! Training losses with their gradients, one file each; [`detection`] composes the anchor-point loss of the YOLO heads.

pub mod bce;
pub mod cross_entropy;
pub mod detection;
pub mod detection_cuda;
pub mod detr;
pub mod dfl;
pub mod focal;
pub mod varifocal;
