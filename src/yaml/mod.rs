//! YAML with a place for every value.
//!
//! [`parse`] turns bytes into a tree of [`Node`]s that remember line and column; [`Faults`] collects everything
//! that is wrong with a document so that a user sees all of it at once; [`MapReader`] walks a mapping key by key and
//! names the keys that nobody asked for, with the nearest valid one. Limits on size, depth, nodes and alias expansion
//! make hostile files cheap to refuse. Start reading at [`parse`].

mod fault;
mod nearest;
mod node;
mod parse;
mod reader;
#[cfg(test)]
mod tests;

pub use fault::{Fault, Faults};
pub use nearest::nearest;
pub use node::{Entry, Node, Value};
pub use parse::{Limits, YamlError, parse, parse_with_limits};
pub use reader::MapReader;
