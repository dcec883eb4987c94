//! Paths of a job: where they lie on this machine.

use std::path::Path;

use super::{Loader, SpecContext};
use crate::train::args::{Source, TrainArgs};

impl SpecContext {
    /// The path on this machine: the longest prefix of the service's map that fits, replaced.
    pub fn mapped(&self, path: &str) -> Option<String> {
        let fitting = self.data_path_map.iter().filter(|(prefix, _)| path.starts_with(prefix));
        let (prefix, replacement) = fitting.max_by_key(|(prefix, _)| prefix.len())?;
        Some(format!("{replacement}{}", &path[prefix.len()..]))
    }
}

impl Loader<'_> {
    /// The path with the service's map applied, which is noted; absolute where something is there.
    pub(super) fn place(&mut self, key: &str, path: &str) -> String {
        let mapped = self.context.mapped(path);
        if let Some(mapped) = &mapped {
            self.override_(key, format!("`{path}` is read as `{mapped}` by the data path map"));
        }
        absolute(mapped.as_deref().unwrap_or(path), &self.context.working_dir)
    }

    /// The paths among the training arguments.
    pub(super) fn place_args(&mut self, args: &mut TrainArgs) {
        args.data = self.place("train.data", &args.data);
        for (key, source) in [("train.pretrained", &mut args.pretrained), ("train.resume", &mut args.resume)]
        {
            if let Source::Path(path) = source {
                *path = self.place(key, path);
            }
        }
    }
}

/// A relative path made absolute when something is there; otherwise as written, for the reader of it to judge.
fn absolute(path: &str, folder: &Path) -> String {
    let joined = folder.join(path);
    if joined.exists() { joined.to_string_lossy().into_owned() } else { path.to_owned() }
}
