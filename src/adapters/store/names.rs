//! Names of buckets and keys of objects, checked once.

use std::fmt;

use super::error::StoreError;

/// Bytes of a key, as the protocol limits them.
const KEY_BYTES_MAX: usize = 1024;
/// Bytes of one part of a key: what file systems allow.
const SEGMENT_BYTES_MAX: usize = 255;

/// Name of a bucket: 3 to 63 of `a-z`, `0-9`, `.` and `-`, beginning and ending with a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BucketName(String);

impl BucketName {
    /// Checks a name.
    ///
    /// # Errors
    /// [`StoreError::Name`].
    pub fn new(name: impl Into<String>) -> Result<Self, StoreError> {
        let name = name.into();
        let refused = |reason| Err(StoreError::Name { what: "bucket", name: name.clone(), reason });
        let is_end = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        if !(3..=63).contains(&name.len()) {
            return refused("a bucket has 3 to 63 characters");
        }
        if !name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.') {
            return refused("a bucket has small letters, digits, `-` and `.`");
        }
        if !is_end(name.chars().next()) || !is_end(name.chars().next_back()) {
            return refused("a bucket begins and ends with a letter or digit");
        }
        if ["..", ".-", "-."].iter().any(|pair| name.contains(pair)) {
            return refused("a bucket has no `..`, `.-` or `-.`");
        }
        if name.chars().all(|c| c.is_ascii_digit() || c == '.') && name.split('.').count() == 4 {
            return refused("a bucket does not look like an IP address");
        }
        if name.starts_with("xn--") || name.starts_with("sthree-") || name.ends_with("-s3alias") {
            return refused("the protocol reserves such names");
        }
        Ok(Self(name))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BucketName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Key of an object: parts with `/` between them that are also good names of folders and files.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey(String);

impl ObjectKey {
    /// Checks a key: no empty part, no `.` or `..`, no backslash, no control characters, at most 1024 bytes and
    /// 255 a part.
    ///
    /// # Errors
    /// [`StoreError::Name`].
    pub fn new(key: impl Into<String>) -> Result<Self, StoreError> {
        let key = key.into();
        match fault_of_path(&key) {
            Some(reason) => Err(StoreError::Name { what: "key", name: key, reason }),
            None => Ok(Self(key)),
        }
    }

    /// The key of something below this one.
    ///
    /// # Errors
    /// [`StoreError::Name`].
    pub fn join(&self, below: &str) -> Result<Self, StoreError> {
        Self::new(format!("{}/{below}", self.0))
    }

    /// The key.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is wrong with a relative path of `/`-separated parts, whoever named it.
pub(super) fn fault_of_path(path: &str) -> Option<&'static str> {
    if path.is_empty() || path.len() > KEY_BYTES_MAX {
        return Some("it has 1 to 1024 bytes");
    }
    if path.chars().any(|c| c.is_control() || c == '\\') {
        return Some("it has no control characters and no backslash");
    }
    for part in path.split('/') {
        if part.is_empty() || part == "." || part == ".." {
            return Some("no part of it is empty, `.` or `..`");
        }
        if part.len() > SEGMENT_BYTES_MAX {
            return Some("no part of it has more than 255 bytes");
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_and_keys_are_checked() {
        for good in ["models", "better-models", "a.b.c", "123", "1.2.3.4.5"] {
            assert!(BucketName::new(good).is_ok(), "{good}");
        }
        for bad in ["", "ab", "Models", "a_b", "-ab", "ab-", "a..b", "a.-b", "10.0.0.1", "xn--a", "../x"] {
            assert!(BucketName::new(bad).is_err(), "{bad}");
        }
        for good in ["a", "a/b.c", "study x/täsk/weights/last.safetensors", "..a/b..", ".hidden"] {
            assert!(ObjectKey::new(good).is_ok(), "{good}");
        }
        let long = "x".repeat(256);
        for bad in ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\nb", "a\\b", "a\0", long.as_str()] {
            assert!(ObjectKey::new(bad).is_err(), "{bad:?}");
        }
        assert!(ObjectKey::new("x".repeat(255)).is_ok());
        assert!(ObjectKey::new("ab/".repeat(400) + "c").is_err());
    }
}
