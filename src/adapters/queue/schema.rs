//! The tables of the journal.

/// Version written to `user_version`; raised with every change of the tables.
pub(super) const VERSION: i64 = 1;

/// Makes the tables of an empty journal. The indexes and the trigger hold what the code promises even if it errs: one
/// active record for a task id and for a run folder, and terminal states that never change.
pub(super) const CREATE: &str = "
CREATE TABLE jobs (
    seq             INTEGER PRIMARY KEY AUTOINCREMENT,
    task_id         TEXT NOT NULL,
    generation      INTEGER NOT NULL,
    source          TEXT NOT NULL,
    content_sha256  TEXT NOT NULL,
    spec            TEXT NOT NULL,
    run_dir         TEXT NOT NULL,
    state           TEXT NOT NULL,
    reason          TEXT NOT NULL,
    class           TEXT,
    attempts        INTEGER NOT NULL DEFAULT 0,
    retries         TEXT NOT NULL DEFAULT '{}',
    interruptions   INTEGER NOT NULL DEFAULT 0,
    not_before      INTEGER NOT NULL DEFAULT 0,
    accepted        INTEGER NOT NULL,
    started         INTEGER,
    finished        INTEGER,
    pid             INTEGER,
    pid_started     INTEGER,
    result          TEXT,
    progress        TEXT,
    UNIQUE (task_id, generation)
);
CREATE UNIQUE INDEX one_active_record ON jobs (task_id)
    WHERE state NOT IN ('completed', 'failed', 'cancelled');
CREATE UNIQUE INDEX one_active_folder ON jobs (run_dir)
    WHERE state NOT IN ('completed', 'failed', 'cancelled');
CREATE TRIGGER terminal_states_are_final BEFORE UPDATE OF state ON jobs
    WHEN OLD.state IN ('completed', 'failed', 'cancelled')
    BEGIN SELECT RAISE(ABORT, 'a terminal state is final'); END;
CREATE TABLE events (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    seq     INTEGER NOT NULL REFERENCES jobs (seq),
    at      INTEGER NOT NULL,
    kind    TEXT NOT NULL,
    detail  TEXT NOT NULL
);
CREATE INDEX events_of_job ON events (seq, id);
CREATE TABLE intake (
    path            TEXT NOT NULL,
    content_sha256  TEXT NOT NULL,
    modified        INTEGER NOT NULL,
    accepted        INTEGER NOT NULL,
    task_id         TEXT,
    verdict         TEXT NOT NULL,
    at              INTEGER NOT NULL,
    PRIMARY KEY (path, content_sha256)
);
CREATE TABLE commands (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    task_id  TEXT NOT NULL,
    kind     TEXT NOT NULL,
    at       INTEGER NOT NULL,
    UNIQUE (task_id, kind)
);
";

/// Tables that came later without changing the others: made when missing, unknown to earlier programs and no harm to
/// them.
pub(super) const CREATE_LATER: &str = "
CREATE TABLE IF NOT EXISTS board (
    id      INTEGER PRIMARY KEY CHECK (id = 1),
    slots   TEXT NOT NULL
);
";
