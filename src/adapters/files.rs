//! The files that messages of the shared queue speak of, on this machine.

use std::io::{Error, ErrorKind, Read};
use std::path::PathBuf;

use crate::job::message::{CONFIG_BYTES_MAX, MessageFiles, WeightsFound};
use crate::train::checkpoint;

/// Files of this machine; relative paths start from `working_dir`.
#[derive(Debug, Clone)]
pub struct LocalFiles {
    /// The service's working folder.
    pub working_dir: PathBuf,
}

impl MessageFiles for LocalFiles {
    fn read_config(&mut self, path: &str) -> std::io::Result<Vec<u8>> {
        let path = self.working_dir.join(path);
        // A pipe or a device would be read for ever.
        if !std::fs::metadata(&path)?.is_file() {
            return Err(Error::new(ErrorKind::InvalidInput, "it is no regular file"));
        }
        let mut bytes = Vec::new();
        std::fs::File::open(&path)?.take(CONFIG_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn weights(&mut self, path: &str) -> WeightsFound {
        let path = self.working_dir.join(path);
        match () {
            () if checkpoint::can_resume_from(&path) => WeightsFound::Resumable,
            () if path.is_file() => WeightsFound::Weights,
            () => WeightsFound::Missing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_what_they_are() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut files = LocalFiles { working_dir: folder.path().to_owned() };
        let make = |path: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("writable");
            std::fs::write(path, "x").expect("writable");
        };
        make("jobs/a.yaml");
        make("plain/weights/last.safetensors");
        make("run/weights/last.safetensors");
        make("run/state/step-000000003.ckpt");
        std::fs::create_dir_all(folder.path().join("empty/state")).expect("writable");
        make("empty/weights/last.safetensors");
        assert_eq!(files.read_config("jobs/a.yaml").expect("is there"), b"x");
        assert_eq!(files.read_config("jobs").expect_err("a folder").kind(), ErrorKind::InvalidInput);
        assert_eq!(files.read_config("/dev/zero").expect_err("a device").kind(), ErrorKind::InvalidInput);
        assert_eq!(files.read_config("b.yaml").expect_err("missing").kind(), ErrorKind::NotFound);
        std::fs::write(folder.path().join("big"), vec![b'x'; CONFIG_BYTES_MAX + 9]).expect("writable");
        assert_eq!(files.read_config("big").expect("is there").len(), CONFIG_BYTES_MAX + 1);
        for (path, found) in [
            ("plain/weights/last.safetensors", WeightsFound::Weights),
            ("run/weights/last.safetensors", WeightsFound::Resumable),
            ("run", WeightsFound::Resumable),
            ("run/state/step-000000003.ckpt", WeightsFound::Resumable),
            ("run/state/step-000000009.ckpt", WeightsFound::Missing),
            ("run/weights/gone.safetensors", WeightsFound::Missing),
            ("empty/weights/last.safetensors", WeightsFound::Weights),
            ("plain", WeightsFound::Missing),
        ] {
            assert_eq!(files.weights(path), found, "{path}");
        }
    }
}
