//! The small files of a run, through the server's own door for artifacts.

use std::path::{Path, PathBuf};

use tokio::io::AsyncReadExt;

use super::runs::RunView;
use super::{MlflowSink, names};
use crate::adapters::tracking::TrackingError;
use crate::job::delivery::RunRef;

/// Tag of a run: what became of its files.
pub(super) const ARTIFACTS: &str = "boxwright.artifacts";
/// Files of one run.
const FILES_MAX: usize = 100;
/// Bytes of one file.
const FILE_BYTES_MAX: u64 = 10 << 20;
/// Files of one delivery at which the server fails before the rest is left out unasked.
const FAILURES_MAX: u32 = 3;
/// Entries of a run folder that are looked at.
const ENTRIES_MAX: usize = 10_000;
/// Files that are sent beside the pictures.
const NAMED: [&str; 3] = ["config.effective.yaml", "args.yaml", "results.csv"];
/// Where the server's door is.
const DOOR: &str = "/api/2.0/mlflow-artifacts/artifacts";

/// The files to send, by name, and how many were too large or too many.
fn files(folder: &Path) -> std::io::Result<(Vec<(String, PathBuf)>, usize)> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        // The folder was cleaned up since: there is nothing to send.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((Vec::new(), 0)),
        Err(error) => return Err(error),
    };
    let (mut chosen, mut left_out) = (Vec::new(), 0);
    for entry in entries.take(ENTRIES_MAX) {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if !NAMED.contains(&name.as_str()) && !name.ends_with(".png") {
            continue;
        }
        // Of the entry itself: a link may lead anywhere.
        let Ok(facts) = entry.metadata() else { continue };
        if facts.is_file() && facts.len() <= FILE_BYTES_MAX {
            chosen.push((name, entry.path()));
        } else {
            left_out += 1;
        }
    }
    // Settings and results before pictures, then by name.
    chosen.sort_by_key(|(name, _)| (!NAMED.contains(&name.as_str()), name.clone()));
    left_out += chosen.len().saturating_sub(FILES_MAX);
    chosen.truncate(FILES_MAX);
    Ok((chosen, left_out))
}

/// A path as a part of an address: everything but letters, digits, `-._~/` as `%XX`.
fn escaped(path: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    let mut text = String::with_capacity(path.len());
    for byte in path.bytes() {
        match plain(byte) {
            true => text.push(char::from(byte)),
            false => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

/// The address under which the server at `base` takes the files of a run, if it takes them.
fn door(base: &str, artifact_uri: &str) -> Option<String> {
    let own = format!("{base}{DOOR}");
    let path = match artifact_uri.strip_prefix("mlflow-artifacts:") {
        // With a host it may be another server, to which our credentials do not go.
        Some(rest) if rest.starts_with("//") && !rest.starts_with("///") => return None,
        Some(rest) => rest.trim_start_matches('/'),
        None => artifact_uri.strip_prefix(&own)?.strip_prefix('/')?,
    };
    let is_safe = !path.is_empty() && !path.split('/').any(|part| part == "..");
    is_safe.then(|| format!("{own}/{}", escaped(path.trim_end_matches('/'))))
}

/// An artifact address without what may be a secret (`s3://key:word@host`, `?sig=`).
pub(super) fn without_secrets(uri: &str) -> String {
    let uri = uri.split(['?', '#']).next().unwrap_or_default();
    match uri.split_once("://") {
        Some((scheme, rest)) => {
            let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
            let host = host.rsplit('@').next().unwrap_or_default();
            format!("{scheme}://{host}/{path}")
        }
        None => uri.to_owned(),
    }
}

impl MlflowSink {
    /// Sends the small files of a run folder, or says in a tag where they are. After `attempts` that failed, those that the server
    /// does not take are left out.
    pub(super) async fn send_files(
        &self,
        view: &RunView,
        run: &RunRef,
        delivery: i64,
    ) -> Result<(), TrackingError> {
        let Some(door) = door(self.client.base(), &view.artifact_uri) else {
            let uri = without_secrets(&view.artifact_uri);
            let place = self.place(run);
            let said = format!("not sent: the server takes none for {uri}; they are in {place}");
            return self.tag(view, &[(ARTIFACTS, said.as_str())]).await;
        };
        let folder = run.run_dir.clone();
        let unreadable = |source| TrackingError::File { path: run.run_dir.clone(), source };
        let listed = tokio::task::spawn_blocking(move || files(&folder)).await;
        let (chosen, mut left_out) =
            listed.map_err(|error| unreadable(std::io::Error::other(error)))?.map_err(unreadable)?;
        let (mut sent, mut failures, mut trouble) = (0, 0, None);
        for (name, path) in chosen {
            if failures >= FAILURES_MAX {
                left_out += 1;
                continue;
            }
            match contents(&path).await {
                Ok(Some(bytes)) => {
                    let put = self.client.put(&format!("{door}/{}", escaped(&name)), bytes).await;
                    match put {
                        Ok(()) => sent += 1,
                        // One picture less is no reason to lose the others.
                        Err(error) if self.does_without(delivery, &error) => {
                            tracing::warn!(task_id = %run.task_id, file = name, %error, "a file was not taken");
                            left_out += 1;
                            if !matches!(error, TrackingError::Refused { .. } | TrackingError::Missing { .. })
                            {
                                failures += 1;
                            }
                            trouble = Some(format!("{name}: {error}; they are in {}", self.place(run)));
                        }
                        Err(error) => return Err(error),
                    }
                }
                Ok(None) => left_out += 1,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(source) => return Err(TrackingError::File { path, source }),
            }
        }
        let mut said = format!("{sent} files sent");
        if left_out > 0 {
            let why = trouble.unwrap_or_else(|| format!("beyond {FILES_MAX} files of 10 MiB"));
            said.push_str(&format!(", {left_out} left out ({why})"));
        }
        let (said, _) = names::cut(&said, names::TAG_CHARS_MAX);
        self.tag(view, &[(ARTIFACTS, said.as_str())]).await
    }

    /// Where the files of a run are besides, for people.
    fn place(&self, run: &RunRef) -> String {
        let place = format!("{}/{}/", run.study_name, run.task_id);
        match &self.store_url {
            Some(base) => format!("{}/{place}", base.trim_end_matches('/')),
            None => format!("the object store under {place}"),
        }
    }
}

/// A whole file, or `None` when it has grown beyond the limit.
async fn contents(path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    let file = tokio::fs::File::open(path).await?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).await?;
    Ok((bytes.len() as u64 <= FILE_BYTES_MAX).then_some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_small_files_are_chosen() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        for name in ["b.png", "a.png", "results.csv", "events.jsonl", "weights.safetensors"] {
            std::fs::write(at(name), name).expect("writable");
        }
        std::fs::File::create(at("big.png")).and_then(|f| f.set_len(FILE_BYTES_MAX + 1)).expect("writable");
        std::os::unix::fs::symlink("/etc/passwd", at("link.png")).expect("linkable");
        std::fs::create_dir(at("dir.png")).expect("writable");
        let (chosen, left_out) = files(folder.path()).expect("readable");
        let names: Vec<&str> = chosen.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!((names, left_out), (vec!["results.csv", "a.png", "b.png"], 3));
        for number in 0..120 {
            std::fs::write(at(&format!("p{number:03}.png")), "").expect("writable");
        }
        let (chosen, left_out) = files(folder.path()).expect("readable");
        assert_eq!((chosen.len(), left_out), (100, 3 + 23));
        assert!(files(Path::new("/no/such/folder")).expect("no error").0.is_empty());
    }

    #[test]
    fn files_go_to_this_server_only() {
        let base = "http://h:1/sub";
        let expected = Some("http://h:1/sub/api/2.0/mlflow-artifacts/artifacts/1/ab/artifacts".to_owned());
        for uri in [
            "mlflow-artifacts:/1/ab/artifacts",
            "mlflow-artifacts:///1/ab/artifacts/",
            "http://h:1/sub/api/2.0/mlflow-artifacts/artifacts/1/ab/artifacts",
        ] {
            assert_eq!(door(base, uri), expected, "{uri}");
        }
        for uri in [
            "s3://bucket/1",
            "file:///x",
            "/x",
            "mlflow-artifacts://other/1/ab",
            "mlflow-artifacts:/a/../b",
            "",
        ] {
            assert_eq!(door(base, uri), None, "{uri}");
        }
        assert_eq!(escaped("a b/ü%.png"), "a%20b/%C3%BC%25.png");
        assert_eq!(without_secrets("s3://k:w@h/b?sig=1"), "s3://h/b");
    }
}
