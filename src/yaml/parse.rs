//! Bytes to tree, within limits.

use std::collections::HashMap;

use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, Span, StrInput, Tag};

use super::node::scalar;
use super::{Entry, Node, Value};

/// What a document may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest file, bytes.
    pub bytes_max: usize,
    /// Deepest nesting.
    pub depth_max: usize,
    /// Most values, copies made by aliases included.
    pub nodes_max: usize,
    /// Most values that all aliases together may copy.
    pub alias_nodes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes_max: 1 << 20, depth_max: 64, nodes_max: 100_000, alias_nodes_max: 10_000 }
    }
}

/// Why a document is no tree.
#[derive(Debug, thiserror::Error)]
pub enum YamlError {
    /// Nothing but white space and comments.
    #[error("{source_name}: the file is empty")]
    Empty {
        /// Name of the document.
        source_name: String,
    },
    /// Larger than the limit.
    #[error("{source_name}: the file has {bytes} bytes; at most {bytes_max} are read")]
    TooLarge {
        /// Name of the document.
        source_name: String,
        /// Its size.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// Holds bytes that no text has.
    #[error(
        "{source_name}:{line}: the file is binary (byte 0x{byte:02x} at offset {offset}); YAML text is expected"
    )]
    Binary {
        /// Name of the document.
        source_name: String,
        /// Line of the byte.
        line: usize,
        /// The byte.
        byte: u8,
        /// Its offset.
        offset: usize,
    },
    /// Not UTF-8.
    #[error(
        "{source_name}:{line}: the text is not UTF-8 (byte 0x{byte:02x} at offset {offset}); save it as UTF-8"
    )]
    NotUtf8 {
        /// Name of the document.
        source_name: String,
        /// Line of the byte.
        line: usize,
        /// The byte.
        byte: u8,
        /// Its offset.
        offset: usize,
    },
    /// Not YAML.
    #[error("{source_name}:{line}:{column}: not valid YAML: {message}")]
    Syntax {
        /// Name of the document.
        source_name: String,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What the parser says.
        message: String,
    },
    /// One key twice in one mapping.
    #[error("{source_name}:{line}: key `{key}` is given twice; it is already on line {first_line}")]
    DuplicateKey {
        /// Name of the document.
        source_name: String,
        /// Line of the second.
        line: usize,
        /// The key.
        key: String,
        /// Line of the first.
        first_line: usize,
    },
    /// A limit was passed.
    #[error("{source_name}:{line}: {what}; at most {limit} are allowed")]
    Limit {
        /// Name of the document.
        source_name: String,
        /// Where it was passed.
        line: usize,
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
}

/// Parses one YAML document within the default [`Limits`].
///
/// # Errors
/// [`YamlError`] names the file and the line.
pub fn parse(text: &[u8], source: &str) -> Result<Node, YamlError> {
    parse_with_limits(text, source, Limits::default())
}

/// Parses one YAML document.
///
/// # Errors
/// [`YamlError`] names the file and the line.
pub fn parse_with_limits(text: &[u8], source: &str, limits: Limits) -> Result<Node, YamlError> {
    let text = decode(text, source, limits)?;
    let mut builder = Builder {
        source,
        limits,
        stack: Vec::new(),
        root: None,
        anchors: HashMap::new(),
        nodes: 0,
        alias_nodes: 0,
    };
    let mut parser = Parser::new(StrInput::new(text));
    while let Some(event) = parser.next_event() {
        let (event, span) = event.map_err(|error| syntax(source, &error))?;
        builder.event(event, span)?;
    }
    match builder.root {
        Some(root) if !root.is_null() => Ok(root),
        _ => Err(YamlError::Empty { source_name: source.to_owned() }),
    }
}

/// Checks size and encoding; a byte order mark is dropped.
fn decode<'a>(text: &'a [u8], source: &str, limits: Limits) -> Result<&'a str, YamlError> {
    let source_name = source.to_owned();
    if text.len() > limits.bytes_max {
        return Err(YamlError::TooLarge { source_name, bytes: text.len(), bytes_max: limits.bytes_max });
    }
    let line_of = |offset: usize| 1 + text[..offset].iter().filter(|&&byte| byte == b'\n').count();
    let control = |byte: &u8| *byte < 0x20 && !matches!(byte, b'\t' | b'\n' | b'\r');
    if let Some(offset) = text.iter().position(control) {
        return Err(YamlError::Binary { source_name, line: line_of(offset), byte: text[offset], offset });
    }
    let decoded = std::str::from_utf8(text).map_err(|error| {
        let offset = error.valid_up_to();
        YamlError::NotUtf8 {
            source_name: source.to_owned(),
            line: line_of(offset),
            byte: text[offset],
            offset,
        }
    })?;
    let decoded = decoded.strip_prefix('\u{feff}').unwrap_or(decoded);
    if decoded.trim().is_empty() {
        return Err(YamlError::Empty { source_name });
    }
    Ok(decoded)
}

fn syntax(source: &str, error: &ScanError) -> YamlError {
    YamlError::Syntax {
        source_name: source.to_owned(),
        line: error.marker().line(),
        column: error.marker().col() + 1,
        message: error.info().to_owned(),
    }
}

/// A collection that is still open.
struct Open {
    anchor: usize,
    line: usize,
    column: usize,
    /// Values inside so far, itself included: the cost of an alias to it.
    nodes_before: usize,
    content: Content,
}

enum Content {
    Sequence(Vec<Node>),
    Mapping { entries: Vec<Entry>, merges: Vec<Node>, key: Option<(String, usize, usize)> },
}

struct Builder<'a> {
    source: &'a str,
    limits: Limits,
    stack: Vec<Open>,
    root: Option<Node>,
    anchors: HashMap<usize, (Node, usize)>,
    nodes: usize,
    alias_nodes: usize,
}

impl Builder<'_> {
    fn event(&mut self, event: Event<'_>, span: Span) -> Result<(), YamlError> {
        let (line, column) = (span.start.line(), span.start.col() + 1);
        match event {
            Event::DocumentStart(_) if self.root.is_some() => {
                Err(self.syntax(line, column, "a second document starts here; one per file is read"))
            }
            Event::Scalar(text, style, anchor, tag) => {
                let value = resolve(&text, style, tag.as_deref());
                self.count(1, line)?;
                let node = Node { value, line, column };
                if anchor > 0 {
                    self.anchors.insert(anchor, (node.clone(), 1));
                }
                self.place(node, Some(&text))
            }
            Event::SequenceStart(anchor, _) => self.open(anchor, line, column, Content::Sequence(Vec::new())),
            Event::MappingStart(anchor, _) => {
                let content = Content::Mapping { entries: Vec::new(), merges: Vec::new(), key: None };
                self.open(anchor, line, column, content)
            }
            Event::SequenceEnd | Event::MappingEnd => self.close(),
            Event::Alias(anchor) => self.alias(anchor, line, column),
            _ => Ok(()),
        }
    }

    fn syntax(&self, line: usize, column: usize, message: &str) -> YamlError {
        YamlError::Syntax { source_name: self.source.to_owned(), line, column, message: message.to_owned() }
    }

    fn limit(&self, line: usize, what: &'static str, limit: usize) -> YamlError {
        YamlError::Limit { source_name: self.source.to_owned(), line, what, limit }
    }

    fn count(&mut self, nodes: usize, line: usize) -> Result<(), YamlError> {
        self.nodes += nodes;
        if self.nodes > self.limits.nodes_max {
            return Err(self.limit(line, "too many values", self.limits.nodes_max));
        }
        Ok(())
    }

    fn open(&mut self, anchor: usize, line: usize, column: usize, content: Content) -> Result<(), YamlError> {
        if self.stack.len() >= self.limits.depth_max {
            return Err(self.limit(line, "values are nested too deep", self.limits.depth_max));
        }
        self.stack.push(Open { anchor, line, column, nodes_before: self.nodes, content });
        self.count(1, line)
    }

    fn close(&mut self) -> Result<(), YamlError> {
        let Some(open) = self.stack.pop() else { return Ok(()) };
        let value = match open.content {
            Content::Sequence(items) => Value::Sequence(items),
            Content::Mapping { entries, merges, .. } => Value::Mapping(self.merge(entries, merges)?),
        };
        let node = Node { value, line: open.line, column: open.column };
        if open.anchor > 0 {
            self.anchors.insert(open.anchor, (node.clone(), self.nodes - open.nodes_before));
        }
        self.place(node, None)
    }

    /// Applies the `<<` keys of a mapping: what it says itself wins.
    fn merge(&self, mut entries: Vec<Entry>, merges: Vec<Node>) -> Result<Vec<Entry>, YamlError> {
        for merge in merges {
            let parts = match merge.value {
                Value::Sequence(parts) => parts,
                value => vec![Node { value, line: merge.line, column: merge.column }],
            };
            for part in parts {
                let Value::Mapping(below) = part.value else {
                    return Err(self.syntax(part.line, part.column, "`<<` merges mappings only"));
                };
                for entry in below {
                    if !entries.iter().any(|known| known.key == entry.key) {
                        entries.push(entry);
                    }
                }
            }
        }
        Ok(entries)
    }

    fn alias(&mut self, anchor: usize, line: usize, column: usize) -> Result<(), YamlError> {
        let Some((node, nodes)) = self.anchors.get(&anchor) else {
            return Err(self.syntax(line, column, "an alias stands inside its own anchor"));
        };
        let nodes = *nodes;
        self.alias_nodes += nodes;
        if self.alias_nodes > self.limits.alias_nodes_max {
            return Err(self.limit(line, "aliases expand to too many values", self.limits.alias_nodes_max));
        }
        let mut node = node.clone();
        (node.line, node.column) = (line, column);
        self.count(nodes, line)?;
        let text = node.as_text();
        self.place(node, text.as_deref())
    }

    /// Puts a finished node where it belongs; `text` is its spelling when it is a scalar (keys need it).
    fn place(&mut self, node: Node, text: Option<&str>) -> Result<(), YamlError> {
        let Some(open) = self.stack.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match &mut open.content {
            Content::Sequence(items) => items.push(node),
            Content::Mapping { entries, merges, key } => match key.take() {
                None => {
                    let Some(text) = text else {
                        let message = "a key must be plain text";
                        return Err(YamlError::Syntax {
                            source_name: self.source.to_owned(),
                            line: node.line,
                            column: node.column,
                            message: message.to_owned(),
                        });
                    };
                    if let Some(first) = entries.iter().find(|entry| entry.key == text) {
                        return Err(YamlError::DuplicateKey {
                            source_name: self.source.to_owned(),
                            line: node.line,
                            key: text.to_owned(),
                            first_line: first.line,
                        });
                    }
                    *key = Some((text.to_owned(), node.line, node.column));
                }
                Some((key, _, _)) if key == "<<" => merges.push(node),
                Some((key, line, column)) => entries.push(Entry { key, line, column, value: node }),
            },
        }
        Ok(())
    }
}

/// The value of a scalar: quoted text stays text, plain text is resolved, `!!str` and its like decide.
fn resolve(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Value {
    if let Some(tag) = tag.filter(|tag| tag.is_yaml_core_schema()) {
        return match tag.suffix.as_str() {
            "str" => Value::String(text.to_owned()),
            _ => scalar(text),
        };
    }
    match style {
        ScalarStyle::Plain => scalar(text),
        _ => Value::String(text.to_owned()),
    }
}
