//! What lies in a folder right now.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::job::clock::unix_ms;

/// A file as it was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) bytes: u64,
    pub(super) modified_unix_ms: i64,
    /// Nanoseconds of the modification: two writes in one millisecond differ here.
    modified_ns: i64,
    inode: u64,
}

/// The files of a folder.
pub(super) type Listing = Vec<(PathBuf, Seen)>;

/// Looks at one file.
pub(super) fn seen(path: &Path) -> std::io::Result<Seen> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(std::io::Error::other("no regular file"));
    }
    Ok(Seen {
        bytes: metadata.len(),
        modified_unix_ms: metadata.modified().map(unix_ms).unwrap_or(0),
        modified_ns: metadata.mtime_nsec(),
        inode: metadata.ino(),
    })
}

/// True for the name of a job: `*.yaml` or `*.yml`, and neither hidden nor some editor's temporary file.
pub(super) fn is_job_name(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    (lower.ends_with(".yaml") || lower.ends_with(".yml")) && !name.starts_with(['.', '#', '~'])
}

/// The jobs of a folder, oldest first; sub-folders are not entered.
pub(super) fn jobs(folder: &Path, files_max: usize) -> std::io::Result<Listing> {
    let mut files = files(folder, files_max, is_job_name)?;
    files.sort_by(|(a_path, a), (b_path, b)| {
        (a.modified_unix_ms, a.modified_ns, a_path).cmp(&(b.modified_unix_ms, b.modified_ns, b_path))
    });
    Ok(files)
}

/// The stop files of a folder.
pub(super) fn stop_files(folder: &Path, files_max: usize) -> std::io::Result<Listing> {
    files(folder, files_max, |name| crate::actors::stop_files::task_id_of(name).is_some())
}

fn files(folder: &Path, files_max: usize, wanted: impl Fn(&str) -> bool) -> std::io::Result<Listing> {
    let entries = std::fs::read_dir(folder)
        .map_err(|error| std::io::Error::new(error.kind(), format!("{}: {error}", folder.display())))?;
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
        if !wanted(&name) {
            continue;
        }
        // A file that went away since, or that we may not look at, is none.
        if let Ok(seen) = seen(&entry.path()) {
            files.push((entry.path(), seen));
        }
        if files.len() == files_max {
            break;
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_jobs_are_jobs() {
        for good in ["a.yaml", "a.yml", "A.YAML", "a.b.yaml"] {
            assert!(is_job_name(good), "{good}");
        }
        for bad in [
            ".a.yaml",
            "a.yaml~",
            "a.yaml.tmp",
            "a.yaml.part",
            ".a.yaml.swp",
            "#a.yaml#",
            "a.yaml.accepted.json",
            "a.yaml.rejected.txt",
            "a.json",
            "yaml",
            "a.swp",
            "~a.yaml",
        ] {
            assert!(!is_job_name(bad), "{bad}");
        }
    }

    #[test]
    fn sub_folders_are_not_entered_and_folders_are_no_files() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(folder.path().join("service")).expect("writable");
        std::fs::create_dir(folder.path().join("folder.yaml")).expect("writable");
        std::fs::write(folder.path().join("service/b.yaml"), "x").expect("writable");
        std::fs::write(folder.path().join("a.yaml"), "x").expect("writable");
        let names: Vec<PathBuf> =
            jobs(folder.path(), 10).expect("reads").into_iter().map(|(path, _)| path).collect();
        assert_eq!(names, [folder.path().join("a.yaml")]);
        assert!(jobs(&folder.path().join("none"), 10).is_err());
    }
}
