//! One file for each job, written by one thread.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use tracing::Level;

use super::line::{LogFormat, LogLine};

/// Lines that may wait for the disk.
const QUEUE_LINES_MAX: usize = 8192;
/// Files open at a time.
const OPEN_FILES_MAX: usize = 16;
/// A job's file is set aside (`.log.1`) when it has grown to this size.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Jobs of which something is remembered: settings, that the file is kept, where a run begins in it.
const REMEMBERED_MAX: usize = 4096;

/// What the writing thread is told.
pub enum Message {
    /// Write this.
    Line(LogLine),
    /// Settings of one job's file.
    Settings {
        /// The job.
        task_id: String,
        /// Least level.
        level: Option<Level>,
        /// Format.
        format: Option<LogFormat>,
        /// The run that begins, by the number of its record: what is in the file when it is first named is of earlier ones.
        run: Option<i64>,
    },
    /// Leave.
    End,
}

/// The writing thread; dropping it writes out what waits.
pub struct JobLogs {
    sender: SyncSender<Message>,
    thread: Option<JoinHandle<()>>,
}

/// The process-wide way to the writing thread, for [`set_job_log`].
static SENDER: OnceLock<SyncSender<Message>> = OnceLock::new();

/// What the process knows of the files beyond those of one writing thread.
struct Known {
    /// Jobs whose files are not removed.
    kept: BTreeSet<String>,
    /// The present run of a job, and the bytes that its file had when that began.
    begins: BTreeMap<String, (i64, u64)>,
}

static KNOWN: Mutex<Known> = Mutex::new(Known { kept: BTreeSet::new(), begins: BTreeMap::new() });

fn known() -> MutexGuard<'static, Known> {
    // Both are whole after every statement, whoever panicked.
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on the log file of this job is not removed to make room for others, until [`let_job_log_go`]. Beyond 4,096 such
/// jobs it may be.
pub fn keep_job_log(task_id: &str) {
    let mut known = known();
    if known.kept.len() < REMEMBERED_MAX {
        known.kept.insert(task_id.to_owned());
    }
}

/// The job has ended: its log file goes when others need the room and it is the oldest.
pub fn let_job_log_go(task_id: &str) {
    known().kept.remove(task_id);
}

/// The byte of a job's log file at which its present run begins; 0 when that is not known.
pub fn job_log_begin(task_id: &str) -> u64 {
    known().begins.get(task_id).map_or(0, |(_, bytes)| *bytes)
}

/// The log file of a job.
pub fn job_log_path(log_dir: &Path, task_id: &str) -> PathBuf {
    log_dir.join("jobs").join(format!("{task_id}.log"))
}

/// Sets level and format of one job's log; words as in the configuration. The next line is the first of
/// `run`, when that is given for the first time. Nothing happens without log files.
pub fn set_job_log(task_id: &str, level: Option<&str>, format: Option<&str>, run: Option<i64>) {
    let Some(sender) = SENDER.get() else { return };
    let level = level.map(|word| match word {
        "TRACE" => Level::TRACE,
        "DEBUG" => Level::DEBUG,
        "WARNING" => Level::WARN,
        "ERROR" => Level::ERROR,
        _ => Level::INFO,
    });
    let format = format.map(LogFormat::parse);
    let settings = Message::Settings { task_id: task_id.to_owned(), level, format, run };
    // Losing it would lose a preference of spelling, and show lines of an earlier run again; nothing else.
    let _ = sender.try_send(settings);
}

impl JobLogs {
    /// Starts the thread for the files of `dir`.
    ///
    /// # Errors
    /// When the folder cannot be made or the thread not be started.
    pub fn start(dir: PathBuf, format: LogFormat, files_max: usize) -> std::io::Result<Self> {
        std::fs::create_dir_all(&dir)?;
        let (sender, receiver) = sync_channel(QUEUE_LINES_MAX);
        let writer =
            Writer { dir, format, files_max, files: HashMap::new(), settings: HashMap::new(), uses: 0 };
        let thread =
            std::thread::Builder::new().name("job-logs".into()).spawn(move || writer.run(&receiver))?;
        let _ = SENDER.set(sender.clone());
        Ok(Self { sender, thread: Some(thread) })
    }

    /// A way to the thread.
    pub fn sender(&self) -> SyncSender<Message> {
        self.sender.clone()
    }
}

impl Drop for JobLogs {
    fn drop(&mut self) {
        // Other senders live in the global subscriber, so the thread is told to end rather than left to notice.
        let told = self.sender.send(Message::End).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| told) {
            // A panic of the thread has already been reported on standard error.
            let _ = thread.join();
        }
    }
}

struct OpenFile {
    file: File,
    bytes: u64,
    last_use: u64,
}

#[derive(Clone, Copy)]
struct Settings {
    level: Option<Level>,
    format: Option<LogFormat>,
}

struct Writer {
    dir: PathBuf,
    format: LogFormat,
    files_max: usize,
    files: HashMap<String, OpenFile>,
    settings: HashMap<String, Settings>,
    uses: u64,
}

impl Writer {
    fn run(mut self, receiver: &Receiver<Message>) {
        while let Ok(message) = receiver.recv() {
            match message {
                Message::End => break,
                Message::Settings { task_id, level, format, run } => {
                    if self.settings.len() > REMEMBERED_MAX {
                        self.settings.clear();
                    }
                    if let Some(run) = run {
                        self.note_begin(&task_id, run);
                    }
                    self.settings.insert(task_id, Settings { level, format });
                }
                // A full disk loses lines of the log; the job's own files and the journal report it.
                Message::Line(line) => drop(self.write(&line)),
            }
        }
    }

    /// Notes where in its file the run of a job begins.
    fn note_begin(&self, task_id: &str, run: i64) {
        let path = self.dir.join(format!("{task_id}.log"));
        let bytes = path.metadata().map_or(0, |metadata| metadata.len());
        let begins = &mut known().begins;
        if begins.get(task_id).is_some_and(|(known, _)| *known == run) {
            return;
        }
        if begins.len() >= REMEMBERED_MAX {
            begins.clear();
        }
        begins.insert(task_id.to_owned(), (run, bytes));
    }

    fn write(&mut self, line: &LogLine) -> std::io::Result<()> {
        let Some(task_id) = line.task_id.as_deref().filter(|id| crate::job::ids::is_safe_name(id)) else {
            return Ok(());
        };
        let settings = self.settings.get(task_id).copied().unwrap_or(Settings { level: None, format: None });
        if settings.level.is_some_and(|least| line.level > least) {
            return Ok(());
        }
        let text = line.text(settings.format.unwrap_or(self.format), false);
        if !self.files.contains_key(task_id) {
            self.open(task_id)?;
        }
        self.uses += 1;
        let uses = self.uses;
        let Some(open) = self.files.get_mut(task_id) else { return Ok(()) };
        open.last_use = uses;
        open.bytes += text.len() as u64 + 1;
        open.file.write_all(format!("{text}\n").as_bytes())?;
        if open.bytes > FILE_BYTES_MAX {
            self.files.remove(task_id);
            let path = self.dir.join(format!("{task_id}.log"));
            std::fs::rename(&path, path.with_extension("log.1"))?;
        }
        Ok(())
    }

    fn open(&mut self, task_id: &str) -> std::io::Result<()> {
        if self.files.len() >= OPEN_FILES_MAX
            && let Some(oldest) =
                self.files.iter().min_by_key(|(_, open)| open.last_use).map(|(id, _)| id.clone())
        {
            self.files.remove(&oldest);
        }
        let path = self.dir.join(format!("{task_id}.log"));
        if !path.exists() {
            self.prune();
        }
        let file = File::options().append(true).create(true).open(&path)?;
        let bytes = file.metadata()?.len();
        self.files.insert(task_id.to_owned(), OpenFile { file, bytes, last_use: self.uses });
        Ok(())
    }

    /// Removes the oldest files of jobs that have not begun or have ended, so that one more fits the limit. Files of jobs
    /// that have begun stay, however old: an epoch may last for days.
    fn prune(&mut self) {
        let Ok(entries) = std::fs::read_dir(&self.dir) else { return };
        let mut files: Vec<_> = entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                Some((entry.metadata().ok()?.modified().ok()?, entry.path()))
            })
            .collect();
        files.sort();
        let surplus = (files.len() + 1).saturating_sub(self.files_max);
        let doomed: Vec<PathBuf> = {
            let known = known();
            let is_kept = |path: &Path| job_of(path).is_some_and(|task_id| known.kept.contains(task_id));
            let free = files.into_iter().map(|(_, path)| path).filter(|path| !is_kept(path));
            free.take(surplus).collect()
        };
        for path in doomed {
            // Lines of a job that begins after all must not go into a file that is no longer there.
            if let Some(task_id) = job_of(&path) {
                self.files.remove(task_id);
            }
            // What cannot be removed now is tried again with the next job.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The job of a file.
fn job_of(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?;
    name.strip_suffix(".log").or_else(|| name.strip_suffix(".log.1"))
}
