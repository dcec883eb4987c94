//! Detection: networks, losses, assigners, boxes, suppression, metrics, weights in and out.

pub mod models;
pub mod targets;
