//! The tree: values with their place.

/// A YAML value with the place where it starts.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// What stands there.
    pub value: Value,
    /// Line, counted from 1; 0 for a value that came from no file.
    pub line: usize,
    /// Column, counted from 1; 0 for a value that came from no file.
    pub column: usize,
}

/// What a YAML node holds. Plain scalars are resolved by the YAML 1.2 core schema.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `null`, `~` or nothing.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number with a fraction or an exponent; `.inf` and `.nan` included.
    Float(f64),
    /// Any other text, and everything quoted.
    String(String),
    /// A list.
    Sequence(Vec<Node>),
    /// A mapping in the order of the file; keys are unique.
    Mapping(Vec<Entry>),
}

/// One key of a mapping and its value.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The key as text (numbers keep their spelling).
    pub key: String,
    /// Line of the key, counted from 1.
    pub line: usize,
    /// Column of the key, counted from 1.
    pub column: usize,
    /// The value.
    pub value: Node,
}

impl Node {
    /// A node that came from no file (line and column 0).
    pub fn synthetic(value: Value) -> Self {
        Self { value, line: 0, column: 0 }
    }

    /// True for `null`, `~` and an empty value.
    pub fn is_null(&self) -> bool {
        self.value == Value::Null
    }

    /// The entries of a mapping.
    pub fn as_mapping(&self) -> Option<&[Entry]> {
        match &self.value {
            Value::Mapping(entries) => Some(entries),
            _ => None,
        }
    }

    /// The items of a list.
    pub fn as_sequence(&self) -> Option<&[Node]> {
        match &self.value {
            Value::Sequence(items) => Some(items),
            _ => None,
        }
    }

    /// The value under `key` when this is a mapping that has it.
    pub fn get(&self, key: &str) -> Option<&Node> {
        self.as_mapping()?.iter().find(|entry| entry.key == key).map(|entry| &entry.value)
    }

    /// The text of a string node (not of a number or a boolean).
    pub fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// A truth value; `yes`, `no`, `on`, `off` of YAML 1.1 count when they stand as text.
    pub fn as_bool(&self) -> Option<bool> {
        match &self.value {
            Value::Bool(flag) => Some(*flag),
            Value::String(text) => match text.to_ascii_lowercase().as_str() {
                "true" | "yes" | "on" => Some(true),
                "false" | "no" | "off" => Some(false),
                _ => None,
            },
            _ => None,
        }
    }

    /// A whole number; text that spells one counts (`"16"`), and so does a float without a fraction (`1e3`).
    pub fn as_int(&self) -> Option<i64> {
        match &self.value {
            Value::Int(number) => Some(*number),
            Value::Float(number) => whole(*number),
            Value::String(text) => match scalar(text.trim()) {
                Value::Int(number) => Some(number),
                Value::Float(number) => whole(number),
                _ => None,
            },
            _ => None,
        }
    }

    /// A number; text that spells one counts (`"1e-5"`, which YAML 1.1 readers hand over as a string).
    pub fn as_float(&self) -> Option<f64> {
        match &self.value {
            Value::Int(number) => Some(*number as f64),
            Value::Float(number) => Some(*number),
            Value::String(text) => match scalar(text.trim()) {
                Value::Int(number) => Some(number as f64),
                Value::Float(number) => Some(number),
                _ => None,
            },
            _ => None,
        }
    }

    /// Any scalar as text: `7` becomes `"7"`, `true` becomes `"true"`; `None` for null, lists and mappings.
    pub fn as_text(&self) -> Option<String> {
        match &self.value {
            Value::Bool(flag) => Some(flag.to_string()),
            Value::Int(number) => Some(number.to_string()),
            Value::Float(number) => Some(number.to_string()),
            Value::String(text) => Some(text.clone()),
            Value::Null | Value::Sequence(_) | Value::Mapping(_) => None,
        }
    }

    /// The value in one short line, for messages: `"abc"`, `12`, `a list of 3`, `a mapping`.
    pub fn describe(&self) -> String {
        match &self.value {
            Value::Null => "nothing".to_owned(),
            Value::Bool(flag) => flag.to_string(),
            Value::Int(number) => number.to_string(),
            Value::Float(number) => number.to_string(),
            Value::String(text) if text.chars().count() > 60 => {
                format!("{:?}…", text.chars().take(60).collect::<String>())
            }
            Value::String(text) => format!("{text:?}"),
            Value::Sequence(items) => format!("a list of {}", items.len()),
            Value::Mapping(_) => "a mapping".to_owned(),
        }
    }

    /// Deep merge: mappings merge key by key, anything else (lists too) is replaced by `top`.
    pub fn merged_with(&self, top: &Node) -> Node {
        let (Value::Mapping(below), Value::Mapping(above)) = (&self.value, &top.value) else {
            return top.clone();
        };
        let mut merged = below.clone();
        for entry in above {
            match merged.iter_mut().find(|known| known.key == entry.key) {
                Some(known) => {
                    *known = Entry { value: known.value.merged_with(&entry.value), ..entry.clone() }
                }
                None => merged.push(entry.clone()),
            }
        }
        Node { value: Value::Mapping(merged), line: top.line, column: top.column }
    }

    /// Sets the value at a dotted path, making mappings on the way (`train.epochs`). A scalar in the way is replaced.
    pub fn set_path(&mut self, path: &str, value: Node) {
        let (head, rest) = path.split_once('.').map_or((path, None), |(head, rest)| (head, Some(rest)));
        if !matches!(self.value, Value::Mapping(_)) {
            self.value = Value::Mapping(Vec::new());
        }
        let Value::Mapping(entries) = &mut self.value else { return };
        let index = entries.iter().position(|entry| entry.key == head).unwrap_or_else(|| {
            let empty = Node { value: Value::Null, line: value.line, column: value.column };
            entries.push(Entry {
                key: head.to_owned(),
                line: value.line,
                column: value.column,
                value: empty,
            });
            entries.len() - 1
        });
        match rest {
            Some(rest) => entries[index].value.set_path(rest, value),
            None => entries[index].value = value,
        }
    }

    /// The same data as JSON; `.inf` and `.nan`, which JSON lacks, become text.
    pub fn to_json(&self) -> serde_json::Value {
        match &self.value {
            Value::Null => serde_json::Value::Null,
            Value::Bool(flag) => (*flag).into(),
            Value::Int(number) => (*number).into(),
            Value::Float(number) => match serde_json::Number::from_f64(*number) {
                Some(number) => serde_json::Value::Number(number),
                None => number.to_string().into(),
            },
            Value::String(text) => text.clone().into(),
            Value::Sequence(items) => items.iter().map(Node::to_json).collect(),
            Value::Mapping(entries) => serde_json::Value::Object(
                entries.iter().map(|entry| (entry.key.clone(), entry.value.to_json())).collect(),
            ),
        }
    }

    /// A tree without places from JSON.
    pub fn from_json(json: &serde_json::Value) -> Node {
        use serde_json::Value as Json;
        Node::synthetic(match json {
            Json::Null => Value::Null,
            Json::Bool(flag) => Value::Bool(*flag),
            Json::Number(number) => match number.as_i64() {
                Some(whole) => Value::Int(whole),
                None => Value::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(text) => Value::String(text.clone()),
            Json::Array(items) => Value::Sequence(items.iter().map(Node::from_json).collect()),
            Json::Object(map) => Value::Mapping(
                map.iter()
                    .map(|(key, value)| Entry {
                        key: key.clone(),
                        line: 0,
                        column: 0,
                        value: Node::from_json(value),
                    })
                    .collect(),
            ),
        })
    }
}

/// A float without a fraction as a whole number, when it is small enough to be exact.
fn whole(number: f64) -> Option<i64> {
    (number.fract() == 0.0 && number.abs() < 9.0e15).then_some(number as i64)
}

/// Resolves plain text by the YAML 1.2 core schema.
pub(super) fn scalar(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        ".nan" | ".NaN" | ".NAN" => return Value::Float(f64::NAN),
        _ => {}
    }
    let (sign, body) = match text.as_bytes()[0] {
        b'-' => (-1.0, &text[1..]),
        b'+' => (1.0, &text[1..]),
        _ => (1.0, text),
    };
    if matches!(body, ".inf" | ".Inf" | ".INF") {
        return Value::Float(sign * f64::INFINITY);
    }
    if let Some(digits) = text.strip_prefix("0x") {
        return i64::from_str_radix(digits, 16).map_or(Value::String(text.to_owned()), Value::Int);
    }
    if let Some(digits) = text.strip_prefix("0o") {
        return i64::from_str_radix(digits, 8).map_or(Value::String(text.to_owned()), Value::Int);
    }
    let starts_like_a_number = body.bytes().next().is_some_and(|byte| byte.is_ascii_digit() || byte == b'.');
    let number_characters =
        body.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'e' | b'E' | b'+' | b'-'));
    if !starts_like_a_number || !number_characters {
        return Value::String(text.to_owned());
    }
    if body.bytes().all(|byte| byte.is_ascii_digit())
        && let Ok(number) = text.parse::<i64>()
    {
        return Value::Int(number);
    }
    text.parse::<f64>().map_or(Value::String(text.to_owned()), Value::Float)
}
