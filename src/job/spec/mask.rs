//! Secrets leave no trace in files, logs or the journal.

use serde_json::Value as Json;

/// Parts of key names that hold a secret.
const SECRET_PARTS: &[&str] = &[
    "pass",
    "secret",
    "token",
    "api_key",
    "apikey",
    "access_key",
    "credential",
    "minio_id",
    "webhook",
    "private_key",
];

/// What stands where a secret was.
const MASK: &str = "***";

/// A copy in which the values of secret-looking keys, and the user part of addresses, are masked.
pub fn masked(json: &Json) -> Json {
    match json {
        Json::Object(map) => map
            .iter()
            .map(|(key, value)| {
                let lower = key.to_ascii_lowercase();
                let secret = SECRET_PARTS.iter().any(|part| lower.contains(part));
                let value = if secret && !value.is_null() { Json::from(MASK) } else { masked(value) };
                (key.clone(), value)
            })
            .collect(),
        Json::Array(items) => items.iter().map(masked).collect(),
        Json::String(text) => Json::String(masked_address(text)),
        other => other.clone(),
    }
}

/// `scheme://user:word@host/` becomes `scheme://***@host/`.
fn masked_address(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    match authority.rfind('@') {
        Some(at) => format!("{scheme}://{MASK}{}", &rest[at..]),
        None => text.to_owned(),
    }
}
