//! Names that are spliced into paths: checked once, safe ever after.

use serde::{Deserialize, Serialize};

/// What a name may be, for messages.
pub const NAME_ALLOWED: &str = "1 to 128 of the characters A-Z a-z 0-9 . _ -, and not `.` or `..`";

/// Identity of a job: `[A-Za-z0-9._-]{1,128}`, not `.` or `..`. It is part of paths and keys.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TaskId(String);

/// A text is no [`TaskId`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no task id; allowed: {NAME_ALLOWED}")]
pub struct InvalidTaskId(pub String);

impl TaskId {
    /// A random identity (UUID, version 4).
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().to_string())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for TaskId {
    type Error = InvalidTaskId;

    fn try_from(text: String) -> Result<Self, InvalidTaskId> {
        if is_safe_name(&text) {
            Ok(Self(text))
        } else {
            Err(InvalidTaskId(text.chars().take(200).collect()))
        }
    }
}

impl std::str::FromStr for TaskId {
    type Err = InvalidTaskId;

    fn from_str(text: &str) -> Result<Self, InvalidTaskId> {
        Self::try_from(text.to_owned())
    }
}

impl From<TaskId> for String {
    fn from(id: TaskId) -> String {
        id.0
    }
}

impl std::fmt::Display for TaskId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// True when a text can be one component of a path on any system we run on: [`NAME_ALLOWED`].
pub fn is_safe_name(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
        && text != "."
        && text != ".."
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_folder_or_reach_a_shell_are_refused() {
        let long = "a".repeat(129);
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "../x",
            "x; touch /tmp/p",
            "$(id)",
            "a b",
            "a\nb",
            "é",
            "a\0",
            "`id`",
            &long,
        ] {
            assert!(bad.parse::<TaskId>().is_err(), "{bad:?}");
        }
        for good in ["a", "test_training_001", "A.b-c_9", "...", &"a".repeat(128)] {
            assert!(good.parse::<TaskId>().is_ok(), "{good:?}");
        }
        assert!(TaskId::random().as_str().len() == 36 && TaskId::random() != TaskId::random());
    }
}
