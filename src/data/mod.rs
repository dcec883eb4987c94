//! Data.

pub mod draw;
