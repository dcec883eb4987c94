//! What the integration tests share: golden vectors, comparisons, tolerances.
//!
//! Each test binary uses a part of it, hence the allowance for unused code.
#![allow(dead_code)]

pub mod compare;
pub mod emulator;
pub mod golden;
pub mod tiny;
pub mod tolerances;

#[allow(unused_imports)]
pub use compare::{assert_close, assert_exact, assert_rel_l2, assert_scalar_close};
#[allow(unused_imports)]
pub use golden::{Golden, GoldenArray};
