//! What stands above the text of a job: fields of the message that brought it.

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::Loader;
use crate::job::ids::TaskId;
use crate::yaml::{Node, Value};

/// Values that win over those of a job's text. The same from every way in, so that a job reads the same wherever it is
/// read.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Overlay {
    /// Dotted keys and their values (`train.resume`, `task_id`).
    pub overrides: Vec<(String, Json)>,
    /// The task id of a job that neither these values nor the text name; a random one without.
    pub task_id: Option<TaskId>,
}

impl Loader<'_> {
    /// Lays the values over the document and notes each as overridden. A document that is no mapping, or a value that
    /// stands where a mapping should be, is left as it is: its own fault is to be heard.
    pub(super) fn lay_over(&mut self, root: &mut Node, overlay: &Overlay) {
        for (key, value) in &overlay.overrides {
            if !is_way_clear(root, key) {
                continue;
            }
            let value = Node::from_json(value);
            let below = at(root, key).filter(|below| !below.is_null());
            let reason = match below {
                Some(below) if below.to_json() == value.to_json() => "the message says the same".to_owned(),
                Some(below) => format!("the message wins; the job said {}", below.describe()),
                None => "the message gives it".to_owned(),
            };
            self.override_(key.as_str(), reason);
            root.set_path(key, value);
        }
    }
}

/// The value at a dotted path.
fn at<'n>(root: &'n Node, path: &str) -> Option<&'n Node> {
    path.split('.').try_fold(root, |node, key| node.get(key))
}

/// True when every value on the way to `path` is a mapping, or not there yet.
fn is_way_clear(root: &Node, path: &str) -> bool {
    let mut node = root;
    for key in path.split('.') {
        match &node.value {
            Value::Mapping(_) => {}
            // A document of nothing but null has a fault of its own.
            Value::Null => return !std::ptr::eq(node, root),
            _ => return false,
        }
        match node.get(key) {
            Some(next) => node = next,
            None => return true,
        }
    }
    true
}
