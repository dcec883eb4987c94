//! The fields of a message, read one by one; what nobody asked for is named.

use serde_json::Value as Json;

use super::{CONFIG_BYTES_MAX, FIELDS_MAX, shown};
use crate::job::ids::{NAME_ALLOWED, TaskId};
use crate::yaml::{Faults, Node, Value, nearest};

/// Longest path, bytes.
const PATH_BYTES_MAX: usize = 4096;
/// Longest `user_code` or `fitness`, bytes.
const WORD_BYTES_MAX: usize = 256;

/// See the module.
pub(super) struct Fields<'j> {
    json: &'j Json,
    faults: Faults,
    asked: Vec<&'static str>,
    overrides: Vec<(String, Json)>,
    warnings: Vec<String>,
    /// What `requires_gpu` says.
    pub requires_gpu: Option<bool>,
}

impl<'j> Fields<'j> {
    /// Reads the fields that every message may have: `task_id`, `trial_number`, `priority`, `fitness`, `user_code`,
    /// `requires_gpu`.
    pub fn read(json: &'j Json, faults: Faults) -> Self {
        let mut fields = Self {
            json,
            faults,
            asked: Vec::new(),
            overrides: Vec::new(),
            warnings: Vec::new(),
            requires_gpu: None,
        };
        let count = json.as_object().map_or(0, serde_json::Map::len);
        if count > FIELDS_MAX {
            fields.faults.add(0, "", format!("more than {FIELDS_MAX} fields; allowed: {FIELDS_MAX}"));
        }
        fields.task_id();
        if let Some(node) = fields.set("trial_number")
            && let Some(number) = fields.faults.int(&node, "trial_number", 0, 1_000_000)
        {
            fields.give("trial_number", number);
        }
        if let Some(node) = fields.set("priority")
            && let Some(word) = fields.faults.choice(&node, "priority", &["high", "medium", "low"])
        {
            fields.give("priority", word);
        }
        for key in ["fitness", "user_code"] {
            if let Some(word) = fields.word(key, WORD_BYTES_MAX) {
                fields.give(key, word);
            }
        }
        fields.gpu();
        fields
    }

    fn give(&mut self, key: &str, value: impl Into<Json>) {
        self.overrides.push((key.to_owned(), value.into()));
    }

    /// The value of a field that is there and not empty. Producers write an empty text for what they do not know.
    fn set(&mut self, key: &'static str) -> Option<Node> {
        self.asked.push(key);
        let value = self.json.get(key)?;
        let is_empty = value.is_null() || value.as_str().is_some_and(|text| text.trim().is_empty());
        (!is_empty).then(|| Node::from_json(value))
    }

    fn task_id(&mut self) {
        let Some(node) = self.set("task_id") else { return };
        match node.as_text().map(|text| text.trim().parse::<TaskId>()) {
            Some(Ok(id)) => self.give("task_id", String::from(id)),
            _ => self.faults.refuse(&node, "task_id", NAME_ALLOWED),
        }
    }

    fn gpu(&mut self) {
        let Some(node) = self.set("requires_gpu") else { return };
        // A stream carries text, and programs write truth in many ways.
        let flag = node.as_bool().or_else(|| match node.as_int() {
            Some(1) => Some(true),
            Some(0) => Some(false),
            _ => None,
        });
        match flag {
            Some(flag) => {
                self.requires_gpu = Some(flag);
                self.give("requires_gpu", flag);
            }
            None => self.faults.refuse(&node, "requires_gpu", "true, false, 1 or 0"),
        }
    }

    /// A text without control characters.
    fn word(&mut self, key: &'static str, bytes_max: usize) -> Option<String> {
        let node = self.set(key)?;
        let text = node.as_text().map(|text| text.trim().to_owned());
        let text = text.filter(|text| text.len() <= bytes_max && !text.chars().any(char::is_control));
        if text.is_none() {
            let allowed = format!("a text of at most {bytes_max} bytes without control characters");
            self.faults.refuse(&node, key, &allowed);
        }
        text
    }

    /// A path; its absence is a fault when it is required.
    pub fn path(&mut self, key: &'static str, is_required: bool) -> Option<String> {
        let before = self.faults.list().len();
        let path = self.word(key, PATH_BYTES_MAX);
        if path.is_none() && is_required && self.faults.list().len() == before {
            let seen = if self.json.get(key).is_some() { "is empty" } else { "is missing" };
            let other = if key == "config_path" { ", unless `config` holds the job itself" } else { "" };
            self.faults.add(0, key, format!("{seen}; allowed: the path of a file{other}"));
        }
        path
    }

    /// The text of a job that stands in the message: YAML or JSON as text, or an object.
    pub fn config(&mut self) -> Option<Vec<u8>> {
        let node = self.set("config")?;
        let text = match (&node.value, self.json.get("config")) {
            (Value::String(text), _) => text.clone(),
            (Value::Mapping(_), Some(json)) => json.to_string(),
            _ => {
                self.faults.refuse(&node, "config", "a job as YAML or JSON");
                return None;
            }
        };
        if text.len() > CONFIG_BYTES_MAX {
            let seen = format!("got a text of {} bytes", text.len());
            self.faults.add(0, "config", format!("{seen}; allowed: at most {CONFIG_BYTES_MAX}"));
        }
        Some(text.into_bytes())
    }

    /// A field that is known and does nothing.
    pub fn no_effect(&mut self, key: &'static str, reason: &str) {
        if self.set(key).is_some() {
            self.warn(format!("field `{key}` has no effect: {reason}"));
        }
    }

    /// Notes something that had no effect.
    pub fn warn(&mut self, sentence: impl Into<String>) {
        self.warnings.push(sentence.into());
    }

    /// Names the fields that nobody asked for, and ends the reading.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn finish(&mut self) -> Result<(), Faults> {
        let names = self.json.as_object().into_iter().flatten().map(|(name, _)| name);
        for name in names.filter(|name| !self.asked.contains(&name.as_str())).take(FIELDS_MAX) {
            let hint = match nearest(name, self.asked.iter().copied()) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("known here: {}", self.asked.join(", ")),
            };
            self.warnings.push(format!("field `{}` is not known and ignored; {hint}", shown(name)));
        }
        let source_name = self.faults.source_name().to_owned();
        std::mem::replace(&mut self.faults, Faults::new(&source_name)).into_result(())
    }

    /// The values that win over the text of the job.
    pub fn overrides(&mut self) -> Vec<(String, Json)> {
        std::mem::take(&mut self.overrides)
    }

    /// Fields that had no effect, a sentence each.
    pub fn warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }
}
