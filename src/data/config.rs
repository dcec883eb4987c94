//! The dataset file, `data.yaml`: where the splits are and what the classes are called.

use std::path::{Path, PathBuf};

use crate::yaml::{self, Faults, Node, Value};

use super::DataError;

/// Most classes.
pub const CLASSES_MAX: usize = 65_536;

/// File names that are looked for when a folder is given.
const FILE_NAMES: [&str; 4] = ["data.yaml", "dataset.yaml", "data.yml", "dataset.yml"];

/// How places named in a dataset file are found on this machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PathRules {
    /// Prefixes of absolute paths and what stands for them here; the first that fits and exists wins.
    pub prefixes: Vec<(String, PathBuf)>,
    /// Folders under which a relative root that does not exist is looked for.
    pub dataset_folders: Vec<PathBuf>,
}

/// A dataset file, read and resolved.
#[derive(Clone, Debug, PartialEq)]
pub struct DataConfig {
    /// The file.
    pub file: PathBuf,
    /// Root folder of the splits.
    pub root: PathBuf,
    /// Folders and lists of the training split.
    pub train: Vec<PathBuf>,
    /// Of the validation split.
    pub val: Vec<PathBuf>,
    /// Of the test split; empty when there is none.
    pub test: Vec<PathBuf>,
    /// Of the small validation split; empty when there is none.
    pub minival: Vec<PathBuf>,
    /// Class names by index.
    pub names: Vec<String>,
    /// Remarks: keys that were renamed or that mean nothing here.
    pub notes: Vec<String>,
}

/// Keys that are read.
const KNOWN: [&str; 10] =
    ["path", "train", "val", "validation", "test", "minival", "names", "nc", "channels", "download"];

/// Finds the dataset file: the path itself, or in a folder `data.yaml`, `dataset.yaml` or the only YAML file there.
///
/// # Errors
/// [`DataError::NoDataset`].
pub fn find_file(path: &Path) -> Result<PathBuf, DataError> {
    if path.is_file() {
        return Ok(path.to_owned());
    }
    if path.is_dir() {
        if let Some(found) = FILE_NAMES.iter().map(|name| path.join(name)).find(|file| file.is_file()) {
            return Ok(found);
        }
        let mut yamls: Vec<PathBuf> = std::fs::read_dir(path)
            .map_err(|e| DataError::read(path, e))?
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .filter(|file| file.extension().is_some_and(|s| s == "yaml" || s == "yml") && file.is_file())
            .collect();
        if yamls.len() == 1 {
            return Ok(yamls.remove(0));
        }
    }
    Err(DataError::NoDataset { path: path.to_owned() })
}

impl DataConfig {
    /// Reads a dataset file and finds its places.
    ///
    /// # Errors
    /// [`DataError::Read`], [`DataError::Yaml`], [`DataError::Config`] with all faults of the keys, or
    /// [`DataError::Missing`] for a place that does not exist.
    pub fn read(file: &Path, rules: &PathRules) -> Result<DataConfig, DataError> {
        let text = std::fs::read(file).map_err(|e| DataError::read(file, e))?;
        DataConfig::parse(&text, file, rules)
    }

    /// [`DataConfig::read`] for a text in memory; `file` gives the folder that relative places are sought in.
    ///
    /// # Errors
    /// As [`DataConfig::read`].
    pub fn parse(text: &[u8], file: &Path, rules: &PathRules) -> Result<DataConfig, DataError> {
        let source = file.display().to_string();
        let tree = yaml::parse(text, &source).map_err(|e| DataError::Yaml(Box::new(e)))?;
        let mut faults = Faults::new(&source);
        let mut notes = Vec::new();
        if tree.as_mapping().is_none() {
            faults.refuse(&tree, "(document)", "a mapping with the keys path, train, val, names");
            return Err(DataError::Config(Box::new(faults)));
        }
        let names = read_names(&tree, &mut faults);
        read_channels(&tree, &mut faults);
        let val_key = if tree.get("val").is_some_and(|n| !n.is_null()) { "val" } else { "validation" };
        if val_key == "validation" && tree.get(val_key).is_some() {
            notes.push("key `validation` is read as `val`".to_owned());
        }
        for required in ["train", "val"] {
            let key = if required == "val" { val_key } else { required };
            if tree.get(key).is_none_or(Node::is_null) {
                faults.add(0, required, "is missing; allowed: a folder, a .txt list, or a list of those");
            }
        }
        let values = |key: &str, faults: &mut Faults| read_places(&tree, key, faults);
        let (train, val) = (values("train", &mut faults), values(val_key, &mut faults));
        let (test, minival) = (values("test", &mut faults), values("minival", &mut faults));
        let path = tree.get("path").filter(|node| !node.is_null());
        if let Some(node) = path.filter(|node| node.as_text().is_none()) {
            faults.refuse(node, "path", "a folder");
        }
        faults.into_result(()).map_err(|faults| DataError::Config(Box::new(faults)))?;
        note_unknown(&tree, &mut notes);
        let root = find_root(path, file, rules, &mut notes);
        let finder = Finder { file, root: &root, rules, can_download: tree.get("download").is_some() };
        Ok(DataConfig {
            train: finder.places("train", &train)?,
            val: finder.places(val_key, &val)?,
            test: finder.optional("test", &test, &mut notes),
            minival: finder.optional("minival", &minival, &mut notes),
            file: file.to_owned(),
            root,
            names,
            notes,
        })
    }

    /// Finds a line of a list file: `./` means the list's folder; other relative paths are tried there and under the
    /// root. A path that is nowhere is returned as it would be under the root, so that it can be named.
    pub fn resolve_line(&self, line: &str, list: &Path, rules: &PathRules) -> PathBuf {
        let folder = list.parent().unwrap_or(Path::new("."));
        if let Some(rest) = line.strip_prefix("./") {
            return folder.join(rest);
        }
        let mut tried = absolute_forms(line, rules);
        if !Path::new(line).is_absolute() {
            tried = vec![self.root.join(line), folder.join(line), PathBuf::from(line)];
        }
        tried.iter().find(|path| path.is_file()).cloned().unwrap_or_else(|| tried.swap_remove(0))
    }
}

/// One value of a split with its line.
type Place = (String, usize);

fn read_places(tree: &Node, key: &str, faults: &mut Faults) -> Vec<Place> {
    let Some(node) = tree.get(key).filter(|node| !node.is_null()) else { return Vec::new() };
    let allowed = "a folder, a .txt list, or a list of those";
    let items = node.as_sequence().unwrap_or(std::slice::from_ref(node));
    if items.is_empty() {
        faults.refuse(node, key, allowed);
    }
    let mut out = Vec::new();
    for item in items {
        match item.as_text().filter(|text| !text.trim().is_empty()) {
            Some(text) => out.push((text.trim().to_owned(), item.line)),
            None => faults.refuse(item, key, allowed),
        }
    }
    out
}

fn read_names(tree: &Node, faults: &mut Faults) -> Vec<String> {
    let count = tree.get("nc").filter(|node| !node.is_null());
    let count =
        count.and_then(|node| faults.int(node, "nc", 1, CLASSES_MAX as i64).map(|n| (n as usize, node.line)));
    let Some(node) = tree.get("names").filter(|node| !node.is_null()) else {
        return match count {
            Some((count, _)) => (0..count).map(|i| format!("class_{i}")).collect(),
            None => {
                faults.add(0, "names", "is missing; give `names`, or `nc` (the number of classes)");
                Vec::new()
            }
        };
    };
    let names = match &node.value {
        Value::Sequence(items) => named(items.iter().map(|item| ("names".to_owned(), item)), faults),
        Value::Mapping(entries) => {
            let mut sorted = Vec::new();
            for entry in entries {
                match entry.key.parse::<usize>() {
                    Ok(id) => sorted.push((id, entry)),
                    Err(_) => faults.add(
                        entry.line,
                        &format!("names.{}", entry.key),
                        "is no class number; allowed: whole numbers from 0",
                    ),
                }
            }
            sorted.sort_by_key(|(id, _)| *id);
            if let Some((place, (id, entry))) = sorted.iter().enumerate().find(|(place, (id, _))| place != id)
            {
                let message =
                    format!("class numbers must be 0 to n - 1 without a gap; {place} is missing before {id}");
                faults.add(entry.line, "names", message);
            }
            named(sorted.iter().map(|(id, entry)| (format!("names.{id}"), &entry.value)), faults)
        }
        _ => {
            faults.refuse(node, "names", "a list of names, or a mapping from class number to name");
            return Vec::new();
        }
    };
    if names.is_empty() || names.len() > CLASSES_MAX {
        faults.add(node.line, "names", format!("{} names; allowed: 1 to {CLASSES_MAX}", names.len()));
    }
    if let Some((count, line)) = count.filter(|(count, _)| *count != names.len()) {
        faults.add(line, "nc", format!("is {count}, but `names` holds {}; they must agree", names.len()));
    }
    names
}

fn named<'a>(items: impl Iterator<Item = (String, &'a Node)>, faults: &mut Faults) -> Vec<String> {
    let mut out = Vec::new();
    for (key, item) in items {
        match item.as_text() {
            Some(name) => out.push(name),
            None => {
                faults.refuse(item, &key, "a name");
                out.push(String::new());
            }
        }
    }
    out
}

fn read_channels(tree: &Node, faults: &mut Faults) {
    if let Some(node) = tree.get("channels").filter(|node| !node.is_null() && node.as_int() != Some(3)) {
        faults.refuse(node, "channels", "3 (images are read as RGB)");
    }
}

/// Keys that mean nothing here are no fault: dataset files carry remarks of the tools that made them.
fn note_unknown(tree: &Node, notes: &mut Vec<String>) {
    for entry in tree.as_mapping().unwrap_or(&[]) {
        if KNOWN.contains(&entry.key.as_str()) {
            continue;
        }
        let near = yaml::nearest(&entry.key, KNOWN.iter().copied())
            .map_or(String::new(), |near| format!(" (did you mean `{near}`?)"));
        notes.push(format!("line {}: key `{}` is not used{near}", entry.line, entry.key));
    }
}

fn folder_of(file: &Path) -> &Path {
    match file.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// An absolute path as given and under each replaced prefix.
fn absolute_forms(value: &str, rules: &PathRules) -> Vec<PathBuf> {
    let mut out = vec![PathBuf::from(value)];
    for (prefix, here) in &rules.prefixes {
        if let Some(rest) = value.strip_prefix(prefix.as_str()) {
            out.push(here.join(rest.trim_start_matches('/')));
        }
    }
    out
}

/// The root: `path` as given, relative to the file, or under a datasets folder; the file's folder otherwise.
fn find_root(path: Option<&Node>, file: &Path, rules: &PathRules, notes: &mut Vec<String>) -> PathBuf {
    let folder = folder_of(file);
    let Some((value, line)) = path.and_then(|node| Some((node.as_text()?, node.line))) else {
        return folder.to_owned();
    };
    let tried = if Path::new(&value).is_absolute() {
        absolute_forms(&value, rules)
    } else {
        let mut tried = vec![folder.join(&value), PathBuf::from(&value)];
        tried.extend(rules.dataset_folders.iter().map(|folder| folder.join(&value)));
        tried
    };
    tried.into_iter().find(|root| root.is_dir()).map(plain).unwrap_or_else(|| {
        notes.push(format!("line {line}: path {value:?} does not exist; {} is used", folder.display()));
        folder.to_owned()
    })
}

/// Without `.` parts, so that messages and caches see one spelling.
fn plain(path: PathBuf) -> PathBuf {
    let out: PathBuf = path.components().collect();
    if out.as_os_str().is_empty() { PathBuf::from(".") } else { out }
}

struct Finder<'a> {
    file: &'a Path,
    root: &'a Path,
    rules: &'a PathRules,
    can_download: bool,
}

impl Finder<'_> {
    fn places(&self, key: &str, values: &[Place]) -> Result<Vec<PathBuf>, DataError> {
        values.iter().map(|value| self.place(key, value)).collect()
    }

    /// Splits that training does not need may be absent; a note says so.
    fn optional(&self, key: &str, values: &[Place], notes: &mut Vec<String>) -> Vec<PathBuf> {
        self.places(key, values).unwrap_or_else(|error| {
            notes.push(format!("{error}; the split is left out"));
            Vec::new()
        })
    }

    fn place(&self, key: &str, (value, line): &Place) -> Result<PathBuf, DataError> {
        let tried = if Path::new(value).is_absolute() {
            absolute_forms(value, self.rules)
        } else {
            // Exports often say `../train/images` although `train` lies beside the file.
            let mut inner = value.as_str();
            while let Some(rest) = inner.strip_prefix("../") {
                inner = rest;
            }
            let folder = folder_of(self.file);
            vec![self.root.join(value), folder.join(value), self.root.join(inner), folder.join(inner)]
        };
        if let Some(found) = tried.iter().find(|path| path.exists()) {
            return Ok(plain(found.clone()));
        }
        let mut shown: Vec<String> =
            tried.into_iter().map(|path| plain(path).display().to_string()).collect();
        shown.dedup();
        let mut tried = shown.join(", ");
        if self.can_download {
            tried.push_str("; the key `download` is not followed: fetch the data first");
        }
        Err(DataError::Missing {
            file: self.file.display().to_string(),
            line: *line,
            key: key.to_owned(),
            value: value.clone(),
            tried,
        })
    }
}
