//! Everything that is wrong with one document, collected.

use super::{Node, Value};

/// At most this many faults are kept for one document; the rest are counted.
const FAULTS_MAX: usize = 200;

/// One thing that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Line, counted from 1; 0 when there is no place (a key that is missing from an empty file, say).
    pub line: usize,
    /// Dotted path of the key, e.g. `train.epochs`.
    pub key: String,
    /// What is wrong, what was seen, what is allowed.
    pub message: String,
}

/// The faults of one document, shown together.
///
/// Each is printed on its own line as ``file:line: key `train.epochs`: got "abc"; allowed: a whole number``.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Faults {
    source: String,
    list: Vec<Fault>,
    uncounted: usize,
}

impl Faults {
    /// An empty collection for the document called `source`.
    pub fn new(source: &str) -> Self {
        Self { source: source.to_owned(), list: Vec::new(), uncounted: 0 }
    }

    /// Name of the document.
    pub fn source_name(&self) -> &str {
        &self.source
    }

    /// True when nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The faults, in the order found.
    pub fn list(&self) -> &[Fault] {
        &self.list
    }

    /// Adds a fault at a line (0: no place).
    pub fn add(&mut self, line: usize, key: &str, message: impl Into<String>) {
        if self.list.len() == FAULTS_MAX {
            self.uncounted += 1;
            return;
        }
        self.list.push(Fault { line, key: key.to_owned(), message: message.into() });
    }

    /// Adds "got .., allowed: .." for a value.
    pub fn refuse(&mut self, node: &Node, key: &str, allowed: &str) {
        self.add(node.line, key, format!("got {}; allowed: {allowed}", node.describe()));
    }

    /// Takes over the faults of another collection.
    pub fn extend(&mut self, other: impl IntoIterator<Item = Fault>) {
        for fault in other {
            self.add(fault.line, &fault.key, fault.message);
        }
    }

    /// `Ok(value)` when nothing is wrong.
    ///
    /// # Errors
    /// The collection itself when it holds a fault.
    pub fn into_result<T>(self, value: T) -> Result<T, Faults> {
        if self.is_empty() { Ok(value) } else { Err(self) }
    }

    /// Reads a whole number in `min..=max`.
    pub fn int(&mut self, node: &Node, key: &str, min: i64, max: i64) -> Option<i64> {
        match node.as_int() {
            Some(number) if (min..=max).contains(&number) => Some(number),
            _ => {
                let allowed = match (min, max) {
                    (i64::MIN, i64::MAX) => "a whole number".to_owned(),
                    (min, i64::MAX) => format!("a whole number of at least {min}"),
                    (min, max) => format!("a whole number from {min} to {max}"),
                };
                self.refuse(node, key, &allowed);
                None
            }
        }
    }

    /// Reads a finite number in `min..=max`; not-a-number is refused.
    pub fn float(&mut self, node: &Node, key: &str, min: f64, max: f64) -> Option<f64> {
        match node.as_float() {
            Some(number) if number.is_finite() && number >= min && number <= max => Some(number),
            _ => {
                let allowed = match (min.is_finite(), max.is_finite()) {
                    (true, true) => format!("a number from {min} to {max}"),
                    (true, false) => format!("a finite number of at least {min}"),
                    (false, true) => format!("a finite number of at most {max}"),
                    (false, false) => "a finite number".to_owned(),
                };
                self.refuse(node, key, &allowed);
                None
            }
        }
    }

    /// Reads a truth value.
    pub fn boolean(&mut self, node: &Node, key: &str) -> Option<bool> {
        let flag = node.as_bool();
        if flag.is_none() {
            self.refuse(node, key, "true or false");
        }
        flag
    }

    /// Reads text; a number or a truth value is taken in its spelling, an empty text is refused.
    pub fn text(&mut self, node: &Node, key: &str) -> Option<String> {
        match node.as_text() {
            Some(text) if !text.trim().is_empty() => Some(text),
            _ => {
                self.refuse(node, key, "a text that is not empty");
                None
            }
        }
    }

    /// Reads one of the listed words, whatever its case; the listed spelling is returned.
    pub fn choice<'a>(&mut self, node: &Node, key: &str, words: &[&'a str]) -> Option<&'a str> {
        let seen = node.as_text().unwrap_or_default();
        let found = words.iter().copied().find(|word| word.eq_ignore_ascii_case(seen.trim()));
        if found.is_none() {
            let hint = super::nearest(&seen, words.iter().copied())
                .map_or(String::new(), |word| format!(" (did you mean `{word}`?)"));
            self.refuse(node, key, &format!("one of {}{hint}", words.join(", ")));
        }
        found
    }

    /// Reads a list of texts; a single text counts as a list of one.
    pub fn texts(&mut self, node: &Node, key: &str) -> Option<Vec<String>> {
        match &node.value {
            Value::Sequence(items) => {
                let mut texts = Vec::with_capacity(items.len());
                for (index, item) in items.iter().enumerate() {
                    texts.push(self.text(item, &format!("{key}[{index}]"))?);
                }
                Some(texts)
            }
            _ => self.text(node, key).map(|text| vec![text]),
        }
    }
}

impl std::fmt::Display for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, fault) in self.list.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{}", self.source)?;
            if fault.line > 0 {
                write!(f, ":{}", fault.line)?;
            }
            if !fault.key.is_empty() {
                write!(f, ": key `{}`", fault.key)?;
            }
            write!(f, ": {}", fault.message)?;
        }
        if self.uncounted > 0 {
            write!(f, "\n{}: and {} more", self.source, self.uncounted)?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}
