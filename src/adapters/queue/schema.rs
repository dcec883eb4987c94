//! The tables of the journal.

/// Version written to `user_version`; raised with every change of the tables.
pub(super) const VERSION: i64 = 2;

/// What brings a journal from version `index + 1` to the next.
pub(super) const MIGRATIONS: [&str; 1] = [TO_2];

/// Makes the tables of an empty journal, version 1. The indexes and the trigger hold what the code promises even if it errs: one
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

/// Tables and indexes that came later without changing the others: made when missing, unknown to earlier programs and no
/// harm to them.
pub(super) const CREATE_LATER: &str = "
CREATE TABLE IF NOT EXISTS board (
    id      INTEGER PRIMARY KEY CHECK (id = 1),
    slots   TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS jobs_by_end ON jobs (finished);
CREATE INDEX IF NOT EXISTS outbox_by_instance ON outbox (instance);
";

/// Version 2: jobs that machines share, the state `moved`, what scheduling needs without reading a specification, and
/// the outbox. `instance` of older jobs is their number, which is all that this machine ever said of them.
const TO_2: &str = "
ALTER TABLE jobs ADD COLUMN instance TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN entry TEXT;
ALTER TABLE jobs ADD COLUMN fence INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN attempts_before INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN notes TEXT NOT NULL DEFAULT '{}';
ALTER TABLE jobs ADD COLUMN priority INTEGER NOT NULL DEFAULT 1;
ALTER TABLE jobs ADD COLUMN wanted TEXT NOT NULL DEFAULT '{}';
UPDATE jobs SET instance = 'job-' || seq, priority = CASE json_extract(spec, '$.priority')
    WHEN 'low' THEN 0 WHEN 'high' THEN 2 ELSE 1 END,
    wanted = json_object('device', json_extract(spec, '$.args.device'));
DROP INDEX one_active_record;
DROP INDEX one_active_folder;
DROP TRIGGER terminal_states_are_final;
CREATE UNIQUE INDEX one_active_record ON jobs (task_id)
    WHERE state NOT IN ('completed', 'failed', 'cancelled', 'moved');
CREATE UNIQUE INDEX one_active_folder ON jobs (run_dir)
    WHERE state NOT IN ('completed', 'failed', 'cancelled', 'moved');
CREATE INDEX jobs_by_instance ON jobs (instance);
CREATE INDEX jobs_by_state ON jobs (state, not_before);
CREATE INDEX active_jobs ON jobs (seq) WHERE state NOT IN ('completed', 'failed', 'cancelled', 'moved');
CREATE TRIGGER terminal_states_are_final BEFORE UPDATE OF state ON jobs
    WHEN OLD.state IN ('completed', 'failed', 'cancelled', 'moved')
    BEGIN SELECT RAISE(ABORT, 'a terminal state is final'); END;
CREATE TABLE outbox (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    sink         TEXT NOT NULL,
    lane         TEXT NOT NULL,
    key          TEXT NOT NULL,
    droppable    INTEGER NOT NULL,
    instance     TEXT NOT NULL,
    body         TEXT NOT NULL,
    attempts     INTEGER NOT NULL DEFAULT 0,
    not_before   INTEGER NOT NULL DEFAULT 0,
    at           INTEGER NOT NULL,
    error        TEXT,
    UNIQUE (sink, key)
);
CREATE INDEX outbox_order ON outbox (sink, lane, id);
CREATE TABLE services (
    name        TEXT PRIMARY KEY,
    state       TEXT NOT NULL
);
CREATE TABLE flags (
    name        TEXT PRIMARY KEY,
    value       TEXT NOT NULL
);
";
