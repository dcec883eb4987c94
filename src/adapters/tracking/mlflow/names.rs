//! Names and values as the server takes them.

use serde_json::Value as Json;

/// Longest name of a metric, parameter or tag, characters.
const NAME_CHARS_MAX: usize = 250;
/// Longest value of a parameter, characters.
pub(super) const PARAM_CHARS_MAX: usize = 6000;
/// Longest value of a tag, characters (8000 today, 5000 on older servers).
pub(super) const TAG_CHARS_MAX: usize = 5000;
/// Bytes of one request's list; the server's limit is 1 MB for the whole.
pub(super) const BATCH_BYTES_MAX: usize = 900_000;

/// A metric's or parameter's name without what the server refuses: parentheses are dropped (`metrics/mAP50(B)` becomes
/// `metrics/mAP50B`), other characters become `_`. `None` when nothing is left.
pub(super) fn name(raw: &str) -> Option<String> {
    let kept: String = raw.chars().filter(|c| !matches!(c, '(' | ')')).take(NAME_CHARS_MAX).collect();
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ' ' | '/');
    let safe: String = kept.chars().map(|c| if allowed(c) { c } else { '_' }).collect();
    // The server takes a name for a path and wants it in its shortest form.
    let parts = safe.split('/').filter(|part| !part.is_empty());
    let parts: Vec<&str> = parts.map(|part| if part == "." || part == ".." { "_" } else { part }).collect();
    Some(parts.join("/")).filter(|name| !name.trim().is_empty())
}

/// The name of a metric's duplicate at the end of a run: `metrics/mAP50-95(B)` becomes `metrics-map50-95-b`.
pub(super) fn slug(raw: &str) -> Option<String> {
    let lower = raw.to_lowercase();
    let words = lower.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let joined = words.collect::<Vec<_>>().join("-");
    Some(joined.chars().take(NAME_CHARS_MAX).collect::<String>()).filter(|slug| !slug.is_empty())
}

/// A text of at most `chars_max` characters, and whether it was cut.
pub(super) fn cut(text: &str, chars_max: usize) -> (String, bool) {
    if text.chars().count() <= chars_max {
        return (text.to_owned(), false);
    }
    (text.chars().take(chars_max - 1).chain(['…']).collect(), true)
}

/// A word between quotation marks for a search expression; `None` when it holds such marks itself.
pub(super) fn quoted(word: &str) -> Option<String> {
    let is_plain = !word.chars().any(|c| matches!(c, '\'' | '"' | '`' | '\\') || c.is_control());
    is_plain.then(|| format!("'{word}'"))
}

/// Splits a list into ones of at most `items_max` and [`BATCH_BYTES_MAX`], in order.
pub(super) fn batches(items: Vec<Json>, items_max: usize) -> Vec<Vec<Json>> {
    let mut all: Vec<Vec<Json>> = Vec::new();
    let mut bytes = 0;
    for item in items {
        let size = item.to_string().len() + 1;
        match all.last_mut() {
            Some(batch) if batch.len() < items_max && bytes + size <= BATCH_BYTES_MAX => {
                bytes += size;
                batch.push(item);
            }
            _ => {
                bytes = size;
                all.push(vec![item]);
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_lose_what_the_server_refuses() {
        for (raw, expected) in [
            ("metrics/mAP50-95(B)", "metrics/mAP50-95B"),
            ("train/box_loss", "train/box_loss"),
            ("lr/pg0", "lr/pg0"),
            ("/a//b/", "a/b"),
            ("../x:y", "_/x_y"),
            ("größe", "gr__e"),
        ] {
            assert_eq!(name(raw).as_deref(), Some(expected), "{raw}");
        }
        assert_eq!((name("()"), name("/"), name(" ")), (None, None, None));
        assert_eq!(name(&"x".repeat(1000)).map(|n| n.len()), Some(250));
    }

    #[test]
    fn slugs_are_those_of_the_older_workers() {
        assert_eq!(slug("metrics/mAP50-95(B)").as_deref(), Some("metrics-map50-95-b"));
        assert_eq!(slug("metrics/precision(B)").as_deref(), Some("metrics-precision-b"));
        assert_eq!(slug("val/box_loss").as_deref(), Some("val-box-loss"));
        assert_eq!(slug("()"), None);
    }

    #[test]
    fn long_values_are_cut_between_characters() {
        assert_eq!(cut("äöü", 3), ("äöü".to_owned(), false));
        assert_eq!(cut("äöüß", 3), ("äö…".to_owned(), true));
    }

    #[test]
    fn a_word_cannot_leave_its_quotation_marks() {
        assert_eq!(quoted("a-b.c").as_deref(), Some("'a-b.c'"));
        assert_eq!(
            (quoted("a' or '1"), quoted("a\"b"), quoted("a`b"), quoted("a\nb")),
            (None, None, None, None)
        );
    }

    #[test]
    fn batches_keep_the_order_and_both_limits() {
        let items: Vec<Json> = (0..2500).map(|i| json!({ "key": format!("k{i}") })).collect();
        let split = batches(items.clone(), 1000);
        assert_eq!(split.iter().map(Vec::len).collect::<Vec<_>>(), [1000, 1000, 500]);
        assert_eq!(split.concat(), items);
        let large: Vec<Json> = (0..10).map(|_| json!("x".repeat(400_000))).collect();
        assert!(batches(large, 1000).iter().all(|batch| batch.len() == 2));
        assert!(batches(Vec::new(), 10).is_empty());
    }
}
