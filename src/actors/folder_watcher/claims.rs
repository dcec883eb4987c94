//! One file, one service: several services may watch one folder.
//!
//! Who takes a file says so in its sidecar (`taken_by`), and the sidecar stays: a file belongs to the service that took it,
//! its later edits too, as its journal alone knows the job. Until the sidecar is written, a claim (`.name.yaml.claim`,
//! made with `O_EXCL`, which local file systems, NFS and SMB keep) holds the others off. A claim is never broken by a
//! clock: a service that died with it goes on with its file when it is back, as with every job of its folder.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::actors::intake::{Taker, sidecars};

/// Bytes of a claim or a sidecar that are read.
const BYTES_MAX: u64 = 1 << 20;

/// Whose a file is.
#[derive(Debug)]
pub(super) enum Claim {
    /// Ours until the claim is dropped; the sidecar speaks from then on.
    Ours(Held),
    /// Another service took it.
    Taken {
        /// Its machine.
        machine_id: String,
        /// It was edited since, if the sidecar tells.
        edited: bool,
    },
    /// Another service is deciding about it.
    Claimed {
        /// What the claim says of its machine; empty in the moment before it is written.
        machine_id: String,
    },
    /// The folder takes no claims (read-only, say), so any service may take the file.
    Free(std::io::Error),
}

/// A claim of ours; goes when this is dropped.
#[derive(Debug)]
pub(super) struct Held {
    path: PathBuf,
}

impl Drop for Held {
    fn drop(&mut self) {
        // One that stays is known as ours at the next look.
        drop(std::fs::remove_file(&self.path));
    }
}

/// The claim of a file.
pub(super) fn claim_path(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.claim"))
}

/// Claims `path`, whose content has the hash `content_sha256`, for `taker`.
pub(super) fn claim(path: &Path, taker: &Taker, content_sha256: &str) -> Claim {
    if let Some(taken) = taken(path, taker, content_sha256) {
        return taken;
    }
    let file = claim_path(path);
    let written =
        std::fs::OpenOptions::new().write(true).create_new(true).open(&file).and_then(|mut claim| {
            let held = Held { path: file.clone() };
            writeln!(claim, "{}\n{}", taker.installation, taker.machine_id)?;
            Ok(held)
        });
    let held = match written {
        Ok(held) => held,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            let text = read(&file).unwrap_or_default();
            let mut lines = text.lines();
            if lines.next() != Some(taker.installation.as_str()) {
                return Claim::Claimed { machine_id: lines.next().unwrap_or_default().to_owned() };
            }
            Held { path: file }
        }
        Err(error) => return Claim::Free(error),
    };
    // The other may have written its sidecar and let go between the first look and the claim.
    taken(path, taker, content_sha256).unwrap_or(Claim::Ours(held))
}

/// The other service that the sidecar names, if any.
fn taken(path: &Path, taker: &Taker, content_sha256: &str) -> Option<Claim> {
    let sidecar: serde_json::Value = serde_json::from_str(&read(&sidecars(path).0).ok()?).ok()?;
    let by = sidecar.get("taken_by")?;
    let installation = by.get("installation")?.as_str()?;
    (installation != taker.installation).then(|| Claim::Taken {
        machine_id: by.get("machine_id").and_then(|name| name.as_str()).unwrap_or_default().to_owned(),
        edited: sidecar["content_sha256"].as_str() != Some(content_sha256),
    })
}

fn read(path: &Path) -> std::io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)?.take(BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actors::intake::write_sidecar;

    fn taker(name: &str) -> Taker {
        Taker { machine_id: format!("machine {name}"), installation: name.into() }
    }

    fn sidecar(name: &str, hash: &str) -> String {
        serde_json::json!({"content_sha256": hash, "taken_by": taker(name)}).to_string()
    }

    #[test]
    fn a_claim_holds_others_off_and_the_sidecar_after_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("a.yaml");
        let (one, two) = (taker("one"), taker("two"));
        let Claim::Ours(held) = claim(&file, &one, "x") else { panic!("the first has it") };
        assert!(
            matches!(claim(&file, &two, "x"), Claim::Claimed { machine_id } if machine_id == "machine one")
        );
        let Claim::Ours(again) = claim(&file, &one, "x") else { panic!("ours after a crash") };
        std::mem::forget(again);
        write_sidecar(&file, true, &sidecar("one", "x")).expect("writable");
        drop(held);
        assert!(!claim_path(&file).exists());
        assert!(matches!(claim(&file, &two, "x"), Claim::Taken { edited: false, .. }));
        assert!(matches!(claim(&file, &two, "y"), Claim::Taken { edited: true, .. }));
        assert!(!claim_path(&file).exists(), "nothing stays behind");
        assert!(matches!(claim(&file, &one, "y"), Claim::Ours(_)), "its own edit");
        std::fs::remove_file(sidecars(&file).0).expect("there");
        assert!(matches!(claim(&file, &two, "x"), Claim::Ours(_)), "given away by hand");
    }

    #[test]
    fn sidecars_that_name_nobody_hold_nobody_off() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("a.yaml");
        for text in ["{}", "no JSON", "{\"taken_by\": 3}"] {
            write_sidecar(&file, true, text).expect("writable");
            assert!(matches!(claim(&file, &taker("one"), "x"), Claim::Ours(_)), "{text}");
        }
        let nowhere = folder.path().join("gone/a.yaml");
        assert!(matches!(claim(&nowhere, &taker("one"), "x"), Claim::Free(_)));
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
                        match claim(file, &taker(&name), "x") {
                            Claim::Ours(_held) => {
                                write_sidecar(file, true, &sidecar(&name, "x")).expect("writable");
                                *winners.lock().expect("no panic") += 1;
                                return;
                            }
                            Claim::Taken { .. } => return,
                            Claim::Claimed { .. } => std::thread::yield_now(),
                            Claim::Free(error) => panic!("{error}"),
                        }
                    }
                });
            }
        });
        assert_eq!(winners.into_inner().expect("no panic"), 1);
    }
}
