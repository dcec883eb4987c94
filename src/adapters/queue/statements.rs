//! Statements that are prepared once and kept: the journal says the same things thousands of times.

use rusqlite::{Connection, Params, Result, Row};

/// Statements that a connection keeps.
pub(super) const KEPT_MAX: usize = 128;

/// What [`Connection`] does, with a statement that is kept.
pub(super) trait Kept {
    /// [`Connection::execute`].
    ///
    /// # Errors
    /// Those of SQLite.
    fn run(&self, text: &str, params: impl Params) -> Result<usize>;

    /// [`Connection::query_row`].
    ///
    /// # Errors
    /// Those of SQLite, and that there is no row.
    fn row<T>(&self, text: &str, params: impl Params, read: impl FnOnce(&Row<'_>) -> Result<T>) -> Result<T>;
}

impl Kept for Connection {
    fn run(&self, text: &str, params: impl Params) -> Result<usize> {
        self.prepare_cached(text)?.execute(params)
    }

    fn row<T>(&self, text: &str, params: impl Params, read: impl FnOnce(&Row<'_>) -> Result<T>) -> Result<T> {
        self.prepare_cached(text)?.query_row(params, read)
    }
}
