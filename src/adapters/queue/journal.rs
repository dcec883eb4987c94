//! The journal: jobs, their history, verdicts and requests in one SQLite file.
//!
//! Write-ahead log with `synchronous=FULL` for what somebody is told of (acceptances, verdicts, ends): it is on the disk
//! when the method returns. What only this machine needs to go on (attempts, processes, events) is safe from a death of
//! the process at once and reaches the disk with the next of those: after a loss of power an earlier state is found, from
//! which recovery goes on as after a crash. Any number of processes may read
//! and leave requests; only the service, which holds the [`super::lock::ProcessLock`], moves jobs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};

use super::rows::{INTAKE_COLUMNS, JOB_COLUMNS, Parsed};
use super::statements::{KEPT_MAX, Kept};
use super::{JobStore, QueueError, outbox, rows, schema};
use crate::job::clock::now_unix_ms;
use crate::job::event::{EVENTS_PER_JOB_MAX, JobEvent};
use crate::job::ids::TaskId;
use crate::job::record::{
    CONTINUES, Change, CommandEntry, CommandKind, IntakeEntry, JobRecord, NewJob, ProcessId, WaitingJob,
    Wanted,
};
use crate::job::slot::SlotBoard;
use crate::job::state::{FailureClass, JobState};

/// How long a statement waits for another process.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The journal of one state folder.
pub struct Journal {
    pub(super) connection: Connection,
    /// What may be lost with the machine's power goes through a connection that does not wait for the disk: progress, and
    /// moves that a start after such a loss makes again. What a dead process had committed is kept either way.
    pub(super) soft: Option<Connection>,
    /// What side services are to be told of what happens; asked inside the transaction of the change.
    pub(super) dispatcher: Option<outbox::Dispatcher>,
    /// Deliveries that may wait.
    pub(super) outbox_items_max: usize,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal").field("connection", &self.connection).finish_non_exhaustive()
    }
}

pub(super) fn sql(what: &'static str) -> impl Fn(rusqlite::Error) -> QueueError {
    move |source| QueueError::Sql { what, source }
}

impl Journal {
    /// Where the journal of a state folder lies.
    pub fn path(state_dir: &Path) -> PathBuf {
        state_dir.join("journal.sqlite")
    }

    /// Opens the journal of a state folder, making it when there is none, and checks its integrity.
    ///
    /// # Errors
    /// [`QueueError::Damaged`] or [`QueueError::Version`] when it cannot be used as it is.
    pub fn open(state_dir: &Path) -> Result<Self, QueueError> {
        std::fs::create_dir_all(state_dir)
            .map_err(|source| QueueError::Folder { path: state_dir.to_owned(), source })?;
        let path = Self::path(state_dir);
        let failed = |source| QueueError::Open { path: path.clone(), source };
        let connection = Connection::open(&path).map_err(failed)?;
        let mut journal = Self::prepare(connection, &path)?;
        let soft = Connection::open(&path).map_err(failed)?;
        settle(&soft).map_err(failed)?;
        soft.pragma_update(None, "synchronous", "NORMAL").map_err(failed)?;
        soft.pragma_update(None, "foreign_keys", true).map_err(failed)?;
        journal.soft = Some(soft);
        Ok(journal)
    }

    /// Opens the journal of a state folder when there is one.
    ///
    /// # Errors
    /// As [`Journal::open`].
    pub fn open_existing(state_dir: &Path) -> Result<Option<Self>, QueueError> {
        if Self::path(state_dir).is_file() { Self::open(state_dir).map(Some) } else { Ok(None) }
    }

    /// A journal that ends with this value, for tests.
    ///
    /// # Errors
    /// Only when memory is short.
    pub fn in_memory() -> Result<Self, QueueError> {
        let path = PathBuf::from(":memory:");
        let connection =
            Connection::open_in_memory().map_err(|source| QueueError::Open { path: path.clone(), source })?;
        Self::prepare(connection, &path)
    }

    fn prepare(mut connection: Connection, path: &Path) -> Result<Self, QueueError> {
        let failed = |source| QueueError::Open { path: path.to_owned(), source };
        settle(&connection).map_err(failed)?;
        // A damaged header shows here first, as "not a database".
        let damaged = |source: rusqlite::Error| match source.sqlite_error_code() {
            Some(rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt) => {
                QueueError::Damaged { path: path.to_owned(), found: source.to_string() }
            }
            _ => QueueError::Open { path: path.to_owned(), source },
        };
        let _mode: String =
            connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).map_err(damaged)?;
        connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
        connection.pragma_update(None, "foreign_keys", true).map_err(failed)?;
        let check: String =
            connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(damaged)?;
        if check != "ok" {
            return Err(QueueError::Damaged { path: path.to_owned(), found: check });
        }
        let transaction =
            connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
        let found: i64 =
            transaction.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed)?;
        if !(0..=schema::VERSION).contains(&found) {
            return Err(QueueError::Version { path: path.to_owned(), found, known: schema::VERSION });
        }
        if found == 0 {
            transaction.execute_batch(schema::CREATE).map_err(failed)?;
        }
        for step in schema::MIGRATIONS.iter().skip(found.max(1) as usize - 1) {
            transaction.execute_batch(step).map_err(failed)?;
        }
        transaction.pragma_update(None, "user_version", schema::VERSION).map_err(failed)?;
        transaction.execute_batch(schema::CREATE_LATER).map_err(failed)?;
        transaction.commit().map_err(failed)?;
        Ok(Self { connection, soft: None, dispatcher: None, outbox_items_max: outbox::ITEMS_MAX })
    }

    /// A number that changes whenever another connection wrote to the journal. Cheap: no disk is read.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub fn data_version(&self) -> Result<i64, QueueError> {
        self.connection
            .query_row("PRAGMA data_version", [], |row| row.get(0))
            .map_err(sql("read its version"))
    }

    /// The connection for a change that must be on the disk, or one that need not.
    pub(super) fn writer(&mut self, is_durable: bool) -> &mut Connection {
        match &mut self.soft {
            Some(soft) if !is_durable => soft,
            _ => &mut self.connection,
        }
    }

    /// Moves a record and puts into the outbox what side services are to hear of it, in one transaction.
    fn move_and_tell(
        &mut self,
        seq: i64,
        change: &Change,
        retry: bool,
        what: &'static str,
    ) -> Result<JobRecord, QueueError> {
        let (dispatcher, items_max) = (self.dispatcher.clone(), self.outbox_items_max);
        let transaction = begin(self.writer(change.state.is_terminal()), what)?;
        let after = move_to(&transaction, seq, change, retry)?;
        if change.state == JobState::Moved {
            outbox::withdraw(&transaction, &after.instance)?;
        } else if let Some(dispatcher) = dispatcher {
            outbox::put(
                &transaction,
                &after.instance,
                dispatcher(&after, outbox::Occasion::State),
                items_max,
            )?;
        }
        transaction.commit().map_err(sql(what))?;
        Ok(after)
    }
}

/// What holds for every connection.
fn settle(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(KEPT_MAX);
    // Plans do not depend on the values that are bound: else kept statements are prepared anew at every other use.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    Ok(())
}

pub(super) fn begin<'a>(
    connection: &'a mut Connection,
    what: &'static str,
) -> Result<Transaction<'a>, QueueError> {
    connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(sql(what))
}

fn one<T>(found: Option<Parsed<T>>) -> Result<Option<T>, QueueError> {
    found.transpose()
}

/// The fencing number of a job that no other machine can take: its time of acceptance, or more where the clock was set back
/// since the run before. It tells a later run of a task id from an earlier one.
fn own_fence(before: Option<&JobRecord>, now_unix_ms: i64) -> u64 {
    let last = before.map_or(0, |before| before.fence.max(before.accepted_unix_ms.max(0) as u64));
    (now_unix_ms.max(0) as u64).max(last + 1)
}

pub(super) fn record(connection: &Connection, seq: i64) -> Result<JobRecord, QueueError> {
    let found = connection
        .row(&format!("SELECT {JOB_COLUMNS} FROM jobs WHERE seq = ?1"), [seq], rows::job)
        .optional()
        .map_err(sql("read a job"))?;
    one(found)?.ok_or(QueueError::Unknown { seq })
}

fn newest(connection: &Connection, task_id: &TaskId) -> Result<Option<JobRecord>, QueueError> {
    let text = format!("SELECT {JOB_COLUMNS} FROM jobs WHERE task_id = ?1 ORDER BY generation DESC LIMIT 1");
    let found = connection.row(&text, [task_id.as_str()], rows::job).optional().map_err(sql("read a job"))?;
    one(found)
}

fn many(connection: &Connection, text: &str, limit: u32) -> Result<Vec<JobRecord>, QueueError> {
    let failed = sql("read its jobs");
    let mut statement = connection.prepare_cached(text).map_err(&failed)?;
    let rows = statement.query_map([limit], rows::job).map_err(&failed)?;
    rows.map(|row| row.map_err(&failed)?).collect()
}

pub(super) fn insert_event(
    connection: &Connection,
    seq: i64,
    kind: &str,
    detail: &serde_json::Value,
) -> Result<(), QueueError> {
    let failed = sql("store an event");
    connection
        .run(
            "INSERT INTO events (seq, at, kind, detail) VALUES (?1, ?2, ?3, ?4)",
            params![seq, now_unix_ms(), kind, detail.to_string()],
        )
        .map_err(&failed)?;
    connection
        .run(
            "DELETE FROM events WHERE seq = ?1 AND kind NOT IN ('state', 'command') AND id <= \
             (SELECT id FROM events WHERE seq = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2)",
            params![seq, EVENTS_PER_JOB_MAX],
        )
        .map_err(&failed)?;
    Ok(())
}

fn insert_intake(connection: &Connection, entry: &IntakeEntry) -> Result<(), QueueError> {
    connection
        .run(
            &format!("INSERT OR REPLACE INTO intake ({INTAKE_COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)"),
            params![
                entry.path,
                entry.content_sha256,
                entry.modified_unix_ms,
                entry.accepted,
                entry.task_id.as_ref().map(TaskId::as_str),
                entry.verdict,
                entry.at_unix_ms
            ],
        )
        .map_err(sql("store a verdict"))?;
    Ok(())
}

/// Moves a record along the legal moves; `retry` counts one of its class.
pub(super) fn move_to(
    connection: &Connection,
    seq: i64,
    change: &Change,
    retry: bool,
) -> Result<JobRecord, QueueError> {
    let before = record(connection, seq)?;
    if !before.state.may_become(change.state) {
        return Err(QueueError::Illegal { task_id: before.task_id, from: before.state, to: change.state });
    }
    let mut retries = before.retries.clone();
    if let Some(class) = change.class.filter(|_| retry) {
        *retries.entry(class).or_insert(0) += 1;
    }
    let now = now_unix_ms();
    let begins = change.state == JobState::Preparing;
    let leaves = !change.state.has_process();
    connection
        .run(
            "UPDATE jobs SET state = ?2, reason = ?3, class = ?4, not_before = ?5, retries = ?6, \
             result = coalesce(?7, result), attempts = attempts + ?8, interruptions = interruptions + ?9, \
             started = CASE WHEN ?8 AND started IS NULL THEN ?10 ELSE started END, \
             finished = CASE WHEN ?11 THEN ?10 ELSE NULL END, \
             pid = CASE WHEN ?12 THEN NULL ELSE pid END, \
             pid_started = CASE WHEN ?12 THEN NULL ELSE pid_started END WHERE seq = ?1",
            params![
                seq,
                change.state.as_str(),
                change.reason,
                change.class.map(FailureClass::as_str),
                change.not_before_unix_ms,
                serde_json::to_string(&retries).unwrap_or_else(|_| "{}".to_owned()),
                change.result.as_ref().map(serde_json::Value::to_string),
                begins,
                change.state == JobState::Interrupted,
                now,
                change.state.is_terminal(),
                leaves || begins,
            ],
        )
        .map_err(sql("change the state of a job"))?;
    let detail = serde_json::json!({
        "from": before.state, "to": change.state, "reason": change.reason, "class": change.class,
    });
    insert_event(connection, seq, "state", &detail)?;
    record(connection, seq)
}

impl JobStore for Journal {
    fn accept(&mut self, job: NewJob, intake: Option<IntakeEntry>) -> Result<JobRecord, QueueError> {
        // An entry of the shared queue stays there until the job has ended; nobody was told of it yet.
        let is_durable = job.shared.is_none();
        let transaction = begin(self.writer(is_durable), "accept a job")?;
        let before = newest(&transaction, &job.spec.task_id)?;
        if let Some(active) = before.as_ref().filter(|record| !record.state.is_terminal()) {
            return Err(QueueError::Busy {
                task_id: active.task_id.clone(),
                state: active.state,
                source_name: active.source.clone(),
            });
        }
        let run_dir = job.run_dir.to_string_lossy().into_owned();
        let user: Option<String> = transaction
            .row(
                "SELECT task_id FROM jobs WHERE run_dir = ?1 AND state NOT IN ('completed', 'failed', 'cancelled', 'moved')",
                [&run_dir],
                |row| row.get(0),
            )
            .optional()
            .map_err(sql("look for the user of a run folder"))?;
        if let Some(task_id) = user.and_then(|text| text.parse().ok()) {
            return Err(QueueError::FolderBusy { run_dir: job.run_dir, task_id });
        }
        let spec = serde_json::to_string(&job.spec)
            .map_err(|source| QueueError::Decode { what: "job specification", source: Some(source) })?;
        let wanted = Wanted { device: job.spec.args.device, requires_gpu: job.spec.requires_gpu };
        let wanted = serde_json::to_string(&wanted)
            .map_err(|source| QueueError::Decode { what: "wanted device", source: Some(source) })?;
        let shared = job.shared.as_ref();
        let entry = shared
            .map(|shared| serde_json::to_string(&shared.entry))
            .transpose()
            .map_err(|source| QueueError::Decode { what: "queue entry", source: Some(source) })?;
        let instance =
            shared.map_or_else(|| uuid::Uuid::new_v4().to_string(), |shared| shared.instance.clone());
        let continues =
            job.continues.as_ref().map(|continues| (CONTINUES, serde_json::json!(continues).to_string()));
        let notes = serde_json::json!(BTreeMap::from_iter(continues)).to_string();
        let now = now_unix_ms();
        let fence = shared.map_or_else(|| own_fence(before.as_ref(), now), |shared| shared.fence);
        transaction
            .run(
                "INSERT INTO jobs (task_id, generation, source, content_sha256, spec, run_dir, state, reason, accepted, \
                 instance, entry, fence, attempts_before, priority, wanted, notes) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, 'queued', ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)",
                params![
                    job.spec.task_id.as_str(),
                    before.map_or(1, |record| record.generation + 1),
                    job.source,
                    job.content_sha256,
                    spec,
                    run_dir,
                    job.reason,
                    now,
                    instance,
                    entry,
                    fence as i64,
                    shared.map_or(0, |shared| shared.attempts_before),
                    job.spec.priority as i64,
                    wanted,
                    notes,
                ],
            )
            .map_err(sql("accept a job"))?;
        let seq = transaction.last_insert_rowid();
        insert_event(&transaction, seq, "state", &serde_json::json!({"to": "queued", "reason": job.reason}))?;
        if let Some(entry) = &intake {
            insert_intake(&transaction, entry)?;
        }
        let accepted = record(&transaction, seq)?;
        transaction.commit().map_err(sql("accept a job"))?;
        Ok(accepted)
    }

    fn record_intake(&mut self, entry: &IntakeEntry) -> Result<(), QueueError> {
        insert_intake(&self.connection, entry)
    }

    fn intake(&self, path: &str, content_sha256: &str) -> Result<Option<IntakeEntry>, QueueError> {
        let text = format!("SELECT {INTAKE_COLUMNS} FROM intake WHERE path = ?1 AND content_sha256 = ?2");
        let found = self
            .connection
            .row(&text, [path, content_sha256], rows::intake)
            .optional()
            .map_err(sql("read a verdict"))?;
        one(found)
    }

    fn last_accepted(&self, path: &str) -> Result<Option<IntakeEntry>, QueueError> {
        let text = format!(
            "SELECT {INTAKE_COLUMNS} FROM intake WHERE path = ?1 AND accepted AND task_id IS NOT NULL \
             ORDER BY at DESC, rowid DESC LIMIT 1"
        );
        let found =
            self.connection.row(&text, [path], rows::intake).optional().map_err(sql("read a verdict"))?;
        one(found)
    }

    fn job(&self, task_id: &TaskId) -> Result<Option<JobRecord>, QueueError> {
        newest(&self.connection, task_id)
    }

    fn active(&self) -> Result<Vec<JobRecord>, QueueError> {
        let text = format!(
            "SELECT {JOB_COLUMNS} FROM jobs WHERE state NOT IN ('completed', 'failed', 'cancelled', 'moved') ORDER BY seq LIMIT ?1"
        );
        many(&self.connection, &text, 1_000_000)
    }

    fn waiting(&self) -> Result<Vec<WaitingJob>, QueueError> {
        let failed = sql("read the waiting jobs");
        let text = "SELECT seq, task_id, priority, accepted, not_before, wanted, reason, entry IS NOT NULL FROM jobs \
             WHERE state NOT IN ('completed', 'failed', 'cancelled', 'moved') AND state IN ('queued', 'interrupted') \
             ORDER BY seq";
        let mut statement = self.connection.prepare_cached(text).map_err(&failed)?;
        let rows = statement.query_map([], rows::waiting).map_err(&failed)?;
        rows.map(|row| row.map_err(&failed)?).collect()
    }

    fn record(&self, seq: i64) -> Result<JobRecord, QueueError> {
        record(&self.connection, seq)
    }

    fn has_active(&self) -> Result<bool, QueueError> {
        let text = "SELECT EXISTS (SELECT 1 FROM jobs WHERE state NOT IN ('completed', 'failed', 'cancelled', 'moved'))";
        self.connection.row(text, [], |row| row.get(0)).map_err(sql("look for active jobs"))
    }

    fn recent(&self, limit: u32) -> Result<Vec<JobRecord>, QueueError> {
        many(&self.connection, &format!("SELECT {JOB_COLUMNS} FROM jobs ORDER BY seq DESC LIMIT ?1"), limit)
    }

    fn change(&mut self, seq: i64, change: Change) -> Result<JobRecord, QueueError> {
        self.move_and_tell(seq, &change, false, "change the state of a job")
    }

    fn begin_attempt(&mut self, seq: i64, reason: &str) -> Result<JobRecord, QueueError> {
        self.change(seq, Change::to(JobState::Preparing, reason))
    }

    fn retry(
        &mut self,
        seq: i64,
        class: FailureClass,
        reason: &str,
        not_before_unix_ms: i64,
    ) -> Result<JobRecord, QueueError> {
        let mut change = Change::to(JobState::Queued, reason).with_class(class);
        change.not_before_unix_ms = not_before_unix_ms;
        self.move_and_tell(seq, &change, true, "note a retry")
    }

    fn set_process(&mut self, seq: i64, process: Option<ProcessId>) -> Result<(), QueueError> {
        self.writer(false)
            .run(
                "UPDATE jobs SET pid = ?2, pid_started = ?3 WHERE seq = ?1",
                params![
                    seq,
                    process.map(|process| i64::from(process.pid)),
                    process.map(|process| process.started_ticks as i64)
                ],
            )
            .map_err(sql("note the process of a job"))?;
        Ok(())
    }

    fn set_reasons(&mut self, reasons: &[(i64, String)]) -> Result<(), QueueError> {
        let failed = sql("note why jobs wait");
        let transaction = begin(self.writer(false), "note why jobs wait")?;
        for (seq, reason) in reasons {
            transaction
                .run("UPDATE jobs SET reason = ?2 WHERE seq = ?1", params![seq, reason])
                .map_err(&failed)?;
        }
        transaction.commit().map_err(failed)
    }

    fn set_progress(&mut self, seq: i64, progress: &serde_json::Value) -> Result<(), QueueError> {
        self.soft
            .as_ref()
            .unwrap_or(&self.connection)
            .run("UPDATE jobs SET progress = ?2 WHERE seq = ?1", params![seq, progress.to_string()])
            .map_err(sql("note the progress of a job"))?;
        Ok(())
    }

    fn set_board(&mut self, board: &SlotBoard) -> Result<(), QueueError> {
        let text = serde_json::to_string(board)
            .map_err(|source| QueueError::Decode { what: "list of slots", source: Some(source) })?;
        self.soft
            .as_ref()
            .unwrap_or(&self.connection)
            .run("INSERT OR REPLACE INTO board (id, slots) VALUES (1, ?1)", [text])
            .map_err(sql("note the slots"))?;
        Ok(())
    }

    fn board(&self) -> Result<Option<SlotBoard>, QueueError> {
        let text: Option<String> = self
            .connection
            .row("SELECT slots FROM board WHERE id = 1", [], |row| row.get(0))
            .optional()
            .map_err(sql("read the slots"))?;
        // Written by another version of the program it is no use, and no harm: it is written anew at the next change.
        Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
    }

    fn add_event(&mut self, seq: i64, kind: &str, detail: &serde_json::Value) -> Result<(), QueueError> {
        let (dispatcher, items_max) = (self.dispatcher.clone(), self.outbox_items_max);
        let transaction = begin(self.writer(false), "store an event")?;
        insert_event(&transaction, seq, kind, detail)?;
        if let Some(dispatcher) = dispatcher {
            let about = record(&transaction, seq)?;
            let told = dispatcher(&about, outbox::Occasion::Event { kind, detail });
            outbox::put(&transaction, &about.instance, told, items_max)?;
        }
        transaction.commit().map_err(sql("store an event"))
    }

    fn events(&self, seq: i64, after_id: i64, limit: u32) -> Result<Vec<JobEvent>, QueueError> {
        let failed = sql("read the history of a job");
        let text =
            "SELECT id, seq, at, kind, detail FROM events WHERE seq = ?1 AND id > ?2 ORDER BY id LIMIT ?3";
        let mut statement = self.connection.prepare_cached(text).map_err(&failed)?;
        let rows = statement.query_map(params![seq, after_id, limit], rows::event).map_err(&failed)?;
        rows.map(|row| row.map_err(&failed)?).collect()
    }

    fn push_command(&mut self, task_id: &TaskId, kind: CommandKind) -> Result<(), QueueError> {
        let word = match kind {
            CommandKind::Stop => "stop",
        };
        self.connection
            .run(
                "INSERT OR IGNORE INTO commands (task_id, kind, at) VALUES (?1, ?2, ?3)",
                params![task_id.as_str(), word, now_unix_ms()],
            )
            .map_err(sql("leave a request"))?;
        Ok(())
    }

    fn commands(&self) -> Result<Vec<CommandEntry>, QueueError> {
        let failed = sql("read the requests");
        let text = "SELECT id, task_id, at FROM commands WHERE kind = 'stop' ORDER BY id LIMIT 1000";
        let mut statement = self.connection.prepare_cached(text).map_err(&failed)?;
        let rows = statement
            .query_map([], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?, row.get::<_, i64>(2)?)))
            .map_err(&failed)?;
        rows.map(|row| {
            let (id, task_id, at_unix_ms) = row.map_err(&failed)?;
            let task_id =
                task_id.parse().map_err(|_| QueueError::Decode { what: "task id", source: None })?;
            Ok(CommandEntry { id, task_id, kind: CommandKind::Stop, at_unix_ms })
        })
        .collect()
    }

    fn finish_command(&mut self, id: i64) -> Result<(), QueueError> {
        self.connection.run("DELETE FROM commands WHERE id = ?1", [id]).map_err(sql("remove a request"))?;
        Ok(())
    }
}
