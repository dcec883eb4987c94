//! The house rules as tests: who may import whom, what every operation has, what source may not hold,
//! that shipped configurations parse, that the documentation agrees with the program.
//!
//! Each test lists every breach with its file and line, not only the first.

mod compose;
mod configs;
mod docs;
mod rooms;
mod rules;
mod source;

/// Fails with all breaches, one per line.
fn none(breaches: Vec<String>) {
    assert!(breaches.is_empty(), "{} breach(es):\n  {}", breaches.len(), breaches.join("\n  "));
}
