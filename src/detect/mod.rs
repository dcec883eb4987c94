//! Detection: networks, losses, assigners, boxes, suppression, metrics, weights in and out.

pub mod anchors;
pub mod assigners;
pub mod boxes;
pub mod decode;
pub mod embedding;
pub mod head_cuda;
pub mod losses;
pub mod metrics;
pub mod models;
pub mod nms;
pub mod nms_cuda;
pub mod targets;
pub mod weights;
