//! What messages need to know of files, from the disk.

use std::io::Read;
use std::path::{Path, PathBuf};

use crate::job::message::{CONFIG_BYTES_MAX, MessageFiles, WeightsFound};

/// The files of the machine; relative paths start at a folder.
pub(super) struct Disk {
    pub(super) working_dir: PathBuf,
    pub(super) data_path_map: Vec<(String, String)>,
}

impl Disk {
    /// The path on this machine: the longest prefix of the service's map replaced, made absolute.
    fn path(&self, path: &str) -> PathBuf {
        let longest = self
            .data_path_map
            .iter()
            .filter(|(prefix, _)| path.starts_with(prefix))
            .max_by_key(|(p, _)| p.len());
        match longest {
            Some((prefix, replacement)) => {
                self.working_dir.join(format!("{replacement}{}", &path[prefix.len()..]))
            }
            None => self.working_dir.join(path),
        }
    }
}

impl MessageFiles for Disk {
    fn read_config(&mut self, path: &str) -> std::io::Result<Vec<u8>> {
        let file = std::fs::File::open(self.path(path))?;
        if !file.metadata()?.is_file() {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "it is no file"));
        }
        let mut bytes = Vec::new();
        file.take(CONFIG_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn weights(&mut self, path: &str) -> WeightsFound {
        let path = self.path(path);
        if !path.is_file() {
            return WeightsFound::Missing;
        }
        let is_checkpoint = path.extension().is_some_and(|ending| ending == "ckpt");
        if is_checkpoint || has_checkpoints(&path) { WeightsFound::Resumable } else { WeightsFound::Weights }
    }
}

/// True for `RUN/weights/x.safetensors` when `RUN/state` holds checkpoints.
fn has_checkpoints(weights: &Path) -> bool {
    let Some(run) = weights.parent().and_then(Path::parent) else { return false };
    let Ok(entries) = std::fs::read_dir(run.join("state")) else { return false };
    entries.flatten().any(|entry| entry.path().extension().is_some_and(|ending| ending == "ckpt"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_through_the_map_and_read_within_the_limit() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir_all(at("run/weights")).expect("writable");
        std::fs::create_dir_all(at("run/state")).expect("writable");
        std::fs::write(at("a.yaml"), "x: 1").expect("writable");
        std::fs::write(at("big.yaml"), vec![b'#'; CONFIG_BYTES_MAX + 50]).expect("writable");
        std::fs::write(at("run/weights/best.safetensors"), "w").expect("writable");
        let mut disk = Disk {
            working_dir: folder.path().to_owned(),
            data_path_map: vec![("/config_versions/".into(), format!("{}/", folder.path().display()))],
        };
        assert_eq!(disk.read_config("a.yaml").expect("is there"), b"x: 1");
        assert_eq!(disk.read_config("/config_versions/a.yaml").expect("is mapped"), b"x: 1");
        assert_eq!(disk.read_config("big.yaml").expect("is there").len(), CONFIG_BYTES_MAX + 1);
        assert!(disk.read_config("none.yaml").is_err() && disk.read_config("run").is_err());
        assert_eq!(disk.weights("run/weights/best.safetensors"), WeightsFound::Weights);
        std::fs::write(at("run/state/step-000000001.ckpt"), "c").expect("writable");
        assert_eq!(disk.weights("run/weights/best.safetensors"), WeightsFound::Resumable);
        assert_eq!(disk.weights("none.safetensors"), WeightsFound::Missing);
    }
}
