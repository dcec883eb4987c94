//! Walking a mapping key by key.

use super::{Entry, Faults, Node, Value, nearest};

/// Reads the keys of one mapping and knows which were asked for.
///
/// `finish` names every key that was not, with the nearest of those that could have been.
#[derive(Debug)]
pub struct MapReader<'a> {
    entries: &'a [Entry],
    line: usize,
    path: String,
    asked: Vec<String>,
}

impl<'a> MapReader<'a> {
    /// A reader over `node`, whose dotted path is `path` (empty for the document itself). An absent value (null) reads
    /// as an empty mapping; anything else that is no mapping is a fault.
    pub fn new(node: &'a Node, path: &str, faults: &mut Faults) -> Option<Self> {
        let entries: &[Entry] = match &node.value {
            Value::Mapping(entries) => entries,
            Value::Null => &[],
            _ => {
                faults.refuse(node, path, "a mapping (`key: value` lines)");
                return None;
            }
        };
        Some(Self { entries, line: node.line, path: path.to_owned(), asked: Vec::new() })
    }

    /// The value of `key`, present or not null alike; asking makes the key known.
    pub fn get(&mut self, key: &str) -> Option<&'a Node> {
        if !self.asked.iter().any(|known| known == key) {
            self.asked.push(key.to_owned());
        }
        self.entries.iter().find(|entry| entry.key == key).map(|entry| &entry.value)
    }

    /// The value of `key` when it is there and not null.
    pub fn set(&mut self, key: &str) -> Option<&'a Node> {
        self.get(key).filter(|node| !node.is_null())
    }

    /// The value of a key that must be there; its absence is a fault that says what it is for.
    pub fn required(&mut self, key: &str, meaning: &str, faults: &mut Faults) -> Option<&'a Node> {
        let found = self.set(key);
        if found.is_none() {
            faults.add(self.line, &self.path_of(key), format!("missing; it gives {meaning}"));
        }
        found
    }

    /// Dotted path of one of this mapping's keys.
    pub fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// The entries that nobody asked for so far, with the nearest known key.
    pub fn unknown(&self) -> Vec<(&'a Entry, Option<&str>)> {
        self.entries
            .iter()
            .filter(|entry| !self.asked.contains(&entry.key))
            .map(|entry| (entry, nearest(&entry.key, self.asked.iter().map(String::as_str))))
            .collect()
    }

    /// Makes a fault of every key that nobody asked for.
    pub fn finish(self, faults: &mut Faults) {
        for (entry, hint) in self.unknown() {
            let message = match hint {
                Some(hint) => format!("unknown key; did you mean `{hint}`?"),
                None => format!("unknown key; known here: {}", self.asked.join(", ")),
            };
            faults.add(entry.line, &self.path_of(&entry.key), message);
        }
    }
}
