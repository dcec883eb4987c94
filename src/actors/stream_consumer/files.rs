//! What messages need to know of files, from the disk.

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use crate::job::message::{CONFIG_BYTES_MAX, MessageFiles, WeightsFound};
use crate::job::spec::SpecContext;
use crate::train::checkpoint;

/// The files of the machine, at the places that a job's own paths have.
pub(super) struct Disk {
    pub(super) context: Arc<SpecContext>,
}

impl Disk {
    /// The path on this machine: the service's map applied, made absolute.
    fn path(&self, path: &str) -> PathBuf {
        let mapped = self.context.mapped(path);
        self.context.working_dir.join(mapped.as_deref().unwrap_or(path))
    }
}

impl MessageFiles for Disk {
    fn read_config(&mut self, path: &str) -> std::io::Result<Vec<u8>> {
        let path = self.path(path);
        // Opening a pipe would wait for its writer.
        if !std::fs::metadata(&path)?.is_file() {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "it is no file"));
        }
        let file = std::fs::File::open(path)?;
        let mut bytes = Vec::new();
        file.take(CONFIG_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn weights(&mut self, path: &str) -> WeightsFound {
        let path = self.path(path);
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
    use crate::job::service::ServiceConfig;

    #[test]
    fn files_are_found_through_the_map_and_read_within_the_limit() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir_all(at("run/weights")).expect("writable");
        std::fs::create_dir_all(at("run/state")).expect("writable");
        std::fs::write(at("a.yaml"), "x: 1").expect("writable");
        std::fs::write(at("big.yaml"), vec![b'#'; CONFIG_BYTES_MAX + 50]).expect("writable");
        std::fs::write(at("run/weights/best.safetensors"), "w").expect("writable");
        let mut context = ServiceConfig::default().spec_context(folder.path().to_owned());
        context.data_path_map = vec![("/config_versions/".into(), format!("{}/", folder.path().display()))];
        let mut disk = Disk { context: Arc::new(context) };
        assert_eq!(disk.read_config("a.yaml").expect("is there"), b"x: 1");
        assert_eq!(disk.read_config("/config_versions/a.yaml").expect("is mapped"), b"x: 1");
        assert_eq!(disk.read_config("big.yaml").expect("is there").len(), CONFIG_BYTES_MAX + 1);
        assert!(disk.read_config("none.yaml").is_err() && disk.read_config("run").is_err());
        assert_eq!(disk.weights("run/weights/best.safetensors"), WeightsFound::Weights);
        std::fs::write(at("run/state/step-000000001.ckpt"), "c").expect("writable");
        assert_eq!(disk.weights("run/weights/best.safetensors"), WeightsFound::Resumable);
        for (path, found) in [
            ("/config_versions/run/weights/best.safetensors", WeightsFound::Resumable),
            ("run", WeightsFound::Resumable),
            ("run/state/step-000000001.ckpt", WeightsFound::Resumable),
            ("run/state/step-000000009.ckpt", WeightsFound::Missing),
            ("run/weights/gone.safetensors", WeightsFound::Missing),
            ("none.safetensors", WeightsFound::Missing),
        ] {
            assert_eq!(disk.weights(path), found, "{path}");
        }
    }
}
