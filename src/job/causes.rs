//! Errors in one line, for logs and reasons.

use std::error::Error;

/// Causes that are told of an error: a faulty chain does not run on.
const CAUSES_MAX: usize = 16;

/// The message of an error and those of its causes, joined by colons. A cause that says the same as what it caused is left
/// out: some crates repeat themselves.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source()).take(CAUSES_MAX + 1);
    let mut parts: Vec<String> = causes.map(ToString::to_string).collect();
    parts.dedup();
    parts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{what}")]
    struct Layer {
        what: &'static str,
        source: Option<Box<Layer>>,
    }

    #[test]
    fn causes_follow_and_repetitions_do_not() {
        let layer = |what, source: Option<Layer>| Layer { what, source: source.map(Box::new) };
        let error = layer("a job failed", Some(layer("no room", Some(layer("no room", None)))));
        assert_eq!(chain(&error), "a job failed: no room");
        let endless = (0..40).fold(layer("end", None), |error, number| {
            layer(if number % 2 == 0 { "even" } else { "odd" }, Some(error))
        });
        assert_eq!(chain(&endless).split(": ").count(), CAUSES_MAX + 1);
    }
}
