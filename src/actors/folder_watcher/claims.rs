//! One file, one service: several services may watch one folder.
//!
//! Who takes a file says so in its sidecar (`taken_by`), and the sidecar stays: a file belongs to the service that took it,
//! its later edits too, as its journal alone knows the job. A refusal is signed in a file beside it (`.name.yaml.refused`)
//! and stands until the file is written again, as everywhere. Until one of the two is there, a claim (`.name.yaml.claim`,
//! made whole and exclusively by a hard link, or with `O_EXCL` where there are no links) holds the others off. A claim is
//! never broken by a clock: a service that died with it goes on with its file when it is back, as with every job of its
//! folder.

use std::io::{Error, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use crate::actors::intake::{Taker, sidecars};

/// Bytes of a claim or a sidecar that are read.
const BYTES_MAX: u64 = 1 << 20;

/// A file as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Content {
    /// SHA-256 of its text, hexadecimal.
    pub(super) sha256: String,
    /// When it was written, Unix milliseconds.
    pub(super) modified_unix_ms: i64,
}

/// Whose a file is.
#[derive(Debug)]
pub(super) enum Claim {
    /// Ours until the claim is dropped; the sidecar speaks from then on.
    Ours(Held),
    /// Another service's.
    Foreign(Foreign),
    /// The folder takes no claims from us (it is read-only, say), so any service may take the file.
    Free(Error),
}

/// What another service has done with a file.
#[derive(Debug)]
pub(super) enum Foreign {
    /// It took it.
    Taken {
        /// Its machine.
        machine_id: String,
        /// That is the name of this machine too: an earlier state folder, or a name that two services have.
        is_namesake: bool,
        /// It was edited since, if the sidecar tells.
        edited: bool,
    },
    /// It refused it, as it is now.
    Refused {
        /// Its machine.
        machine_id: String,
    },
    /// It is deciding about it.
    Claimed {
        /// What the claim says of its machine; empty where it was cut short.
        machine_id: String,
    },
}

/// A claim of ours; goes when this is dropped.
#[derive(Debug)]
pub(super) struct Held {
    path: PathBuf,
}

impl Held {
    /// Leaves the claim where it is: the verdict is not beside the file yet. The next look of this service finds it.
    pub(super) fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // One that stays is known as ours at the next look.
        drop(std::fs::remove_file(&self.path));
    }
}

/// The claim of a file.
pub(super) fn claim_path(path: &Path) -> PathBuf {
    hidden(path, "claim")
}

fn hidden(path: &Path, suffix: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{suffix}"))
}

/// Claims the file `path` with this content for `taker`.
///
/// # Errors
/// What is there cannot be read, or the share fails otherwise than by refusing: nothing is known then.
pub(super) fn claim(path: &Path, taker: &Taker, content: &Content) -> std::io::Result<Claim> {
    if let Some(decided) = decided(path, taker, content)? {
        return Ok(Claim::Foreign(decided));
    }
    let file = claim_path(path);
    let held = match place(path, &file, taker) {
        Ok(()) => Held { path: file },
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            // It may have gone since, with a verdict in its place; the next look sees that.
            let text = read(&file)?.unwrap_or_default();
            let mut lines = text.lines();
            if lines.next() != Some(taker.installation.as_str()) {
                let machine_id = lines.next().unwrap_or_default().to_owned();
                return Ok(Claim::Foreign(Foreign::Claimed { machine_id }));
            }
            Held { path: file }
        }
        Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {
            return Ok(Claim::Free(error));
        }
        Err(error) => return Err(error),
    };
    // The other may have written its verdict and let go between the first look and the claim.
    Ok(decided(path, taker, content)?.map_or(Claim::Ours(held), Claim::Foreign))
}

/// Makes the claim `file`, whole or not at all.
fn place(path: &Path, file: &Path, taker: &Taker) -> std::io::Result<()> {
    let text = format!("{}\n{}\n", taker.installation, taker.machine_id);
    let draft = hidden(path, &format!("{}.tmp", taker.installation));
    let mut written = std::fs::File::create(&draft)?;
    written.write_all(text.as_bytes())?;
    written.sync_data()?;
    let linked = std::fs::hard_link(&draft, file);
    drop(std::fs::remove_file(&draft));
    match linked {
        Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::PermissionDenied) => {
            // A file system without links.
            let mut claim = std::fs::OpenOptions::new().write(true).create_new(true).open(file)?;
            claim.write_all(text.as_bytes())
        }
        other => other,
    }
}

/// Signs the refusal of a file, or takes the signature away when it was accepted.
///
/// # Errors
/// Those of the file system; other services judge for themselves then.
pub(super) fn sign_refusal(path: &Path, taker: &Taker, refused: Option<&Content>) -> std::io::Result<()> {
    let file = hidden(path, "refused");
    let Some(content) = refused else {
        return match std::fs::remove_file(&file) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    };
    let Content { sha256, modified_unix_ms } = content;
    let text = format!("{}\n{}\n{sha256}\n{modified_unix_ms}\n", taker.installation, taker.machine_id);
    if read(&file)?.as_ref() == Some(&text) {
        return Ok(());
    }
    let draft = hidden(path, &format!("{}.tmp", taker.installation));
    std::fs::write(&draft, text)?;
    std::fs::rename(draft, file)
}

/// What another service decided, if any did.
fn decided(path: &Path, taker: &Taker, content: &Content) -> std::io::Result<Option<Foreign>> {
    if let Some(text) = read(&sidecars(path).0)?
        // A sidecar that is none, or that names nobody, holds nobody off.
        && let Ok(sidecar) = serde_json::from_str::<serde_json::Value>(&text)
        && let Some(installation) = sidecar["taken_by"]["installation"].as_str()
        && installation != taker.installation
    {
        let machine_id = sidecar["taken_by"]["machine_id"].as_str().unwrap_or_default().to_owned();
        return Ok(Some(Foreign::Taken {
            is_namesake: machine_id == taker.machine_id,
            machine_id,
            edited: sidecar["content_sha256"].as_str() != Some(&content.sha256),
        }));
    }
    let Some(text) = read(&hidden(path, "refused"))? else { return Ok(None) };
    let mut lines = text.lines();
    let (installation, machine_id) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let is_as_now = lines.next() == Some(content.sha256.as_str())
        && lines.next().and_then(|text| text.parse().ok()) == Some(content.modified_unix_ms);
    let is_foreign = installation != taker.installation && is_as_now;
    Ok(is_foreign.then(|| Foreign::Refused { machine_id: machine_id.to_owned() }))
}

/// The text of a file; `None` when it is not there.
fn read(path: &Path) -> std::io::Result<Option<String>> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actors::intake::write_sidecar;

    fn taker(name: &str) -> Taker {
        Taker { machine_id: format!("machine {name}"), installation: name.into() }
    }

    fn content(sha256: &str) -> Content {
        Content { sha256: sha256.into(), modified_unix_ms: 7 }
    }

    fn look(file: &Path, name: &str, sha256: &str) -> Claim {
        claim(file, &taker(name), &content(sha256)).expect("reads")
    }

    fn sidecar(name: &str, hash: &str) -> String {
        serde_json::json!({"content_sha256": hash, "taken_by": taker(name)}).to_string()
    }

    #[test]
    fn a_claim_holds_others_off_and_the_sidecar_after_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("a.yaml");
        let Claim::Ours(held) = look(&file, "one", "x") else { panic!("the first has it") };
        assert!(
            matches!(look(&file, "two", "x"), Claim::Foreign(Foreign::Claimed { machine_id }) if machine_id == "machine one")
        );
        let Claim::Ours(again) = look(&file, "one", "x") else { panic!("ours after a crash") };
        again.keep();
        write_sidecar(&file, true, &sidecar("one", "x")).expect("writable");
        drop(held);
        assert!(!claim_path(&file).exists());
        assert!(matches!(
            look(&file, "two", "x"),
            Claim::Foreign(Foreign::Taken { edited: false, is_namesake: false, .. })
        ));
        assert!(matches!(look(&file, "two", "y"), Claim::Foreign(Foreign::Taken { edited: true, .. })));
        assert_eq!(std::fs::read_dir(folder.path()).expect("reads").count(), 1, "nothing stays behind");
        assert!(matches!(look(&file, "one", "y"), Claim::Ours(_)), "its own edit");
        std::fs::remove_file(sidecars(&file).0).expect("there");
        assert!(matches!(look(&file, "two", "x"), Claim::Ours(_)), "given away by hand");
    }

    #[test]
    fn a_refusal_holds_others_off_until_the_file_is_written_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("a.yaml");
        sign_refusal(&file, &taker("one"), Some(&content("x"))).expect("writable");
        assert!(
            matches!(look(&file, "two", "x"), Claim::Foreign(Foreign::Refused { machine_id }) if machine_id == "machine one")
        );
        assert!(matches!(look(&file, "one", "x"), Claim::Ours(_)), "who refused it has it in its journal");
        assert!(matches!(look(&file, "two", "y"), Claim::Ours(_)), "another text");
        let later = Content { modified_unix_ms: 8, ..content("x") };
        assert!(matches!(claim(&file, &taker("two"), &later), Ok(Claim::Ours(_))), "written again");
        sign_refusal(&file, &taker("two"), None).expect("removed");
        sign_refusal(&file, &taker("two"), None).expect("nothing to remove");
        assert!(matches!(look(&file, "two", "x"), Claim::Ours(_)));
    }

    #[test]
    fn what_names_nobody_holds_nobody_off_and_what_fails_is_no_answer() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("a.yaml");
        for text in ["{}", "no JSON", "{\"taken_by\": 3}"] {
            write_sidecar(&file, true, text).expect("writable");
            assert!(matches!(look(&file, "one", "x"), Claim::Ours(_)), "{text}");
        }
        std::fs::remove_file(sidecars(&file).0).expect("there");
        std::fs::create_dir(sidecars(&file).0).expect("writable");
        assert!(claim(&file, &taker("one"), &content("x")).is_err(), "a sidecar that cannot be read");
        let nowhere = folder.path().join("gone/a.yaml");
        assert!(claim(&nowhere, &taker("one"), &content("x")).is_err());
    }

    #[test]
    fn of_many_at_once_one_has_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("a.yaml");
        let winners = std::sync::Mutex::new(0);
        std::thread::scope(|scope| {
            for number in 0..8 {
                let (file, winners) = (&file, &winners);
                scope.spawn(move || {
                    let name = format!("{number}");
                    loop {
                        match look(file, &name, "x") {
                            Claim::Ours(_held) => {
                                write_sidecar(file, true, &sidecar(&name, "x")).expect("writable");
                                *winners.lock().expect("no panic") += 1;
                                return;
                            }
                            Claim::Foreign(Foreign::Taken { .. }) => return,
                            Claim::Foreign(Foreign::Claimed { .. }) => std::thread::yield_now(),
                            other => panic!("{other:?}"),
                        }
                    }
                });
            }
        });
        assert_eq!(winners.into_inner().expect("no panic"), 1);
    }
}
