//! A dataset: its splits, its classes, and the report on it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::config::{DataConfig, PathRules, find_file};
use super::labels::Label;
use super::list::{images_of, label_path};
use super::probe::Verify;
use super::report::DatasetReport;
use super::scan::{ScanSettings, scan, summarise};
use super::{DataError, index, synth};

/// One usable image with its labels.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The image file.
    pub path: PathBuf,
    /// Width in pixels as displayed.
    pub width: u32,
    /// Height in pixels as displayed.
    pub height: u32,
    /// Its boxes; empty for a background image.
    pub labels: Vec<Label>,
}

/// The splits a dataset file may define.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SplitName {
    /// What is trained on.
    Train,
    /// What is measured on while training.
    Val,
    /// What is measured on at the end.
    Test,
    /// A small part of the validation images.
    Minival,
}

impl SplitName {
    /// The key in the dataset file.
    pub fn key(self) -> &'static str {
        match self {
            SplitName::Train => "train",
            SplitName::Val => "val",
            SplitName::Test => "test",
            SplitName::Minival => "minival",
        }
    }

    /// The split of a key; `validation` is `val`.
    pub fn from_key(key: &str) -> Option<SplitName> {
        match key {
            "train" => Some(SplitName::Train),
            "val" | "validation" => Some(SplitName::Val),
            "test" => Some(SplitName::Test),
            "minival" => Some(SplitName::Minival),
            _ => None,
        }
    }
}

/// How much of a split is used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fraction {
    /// The first `round(n * share)` images by path.
    Share(f64),
    /// The first images by path.
    Count(usize),
}

impl Fraction {
    /// Images to use of `n`; at least one of a split that has any.
    pub fn of(self, n: usize) -> usize {
        let count = match self {
            Fraction::Share(share) => (n as f64 * share).round_ties_even() as usize,
            Fraction::Count(count) => count,
        };
        count.clamp(1.min(n), n)
    }
}

/// How a dataset is read.
#[derive(Clone, Debug)]
pub struct DatasetOptions {
    /// The splits to read.
    pub splits: Vec<SplitName>,
    /// Treat all objects as one class, called `item`.
    pub single_cls: bool,
    /// Keep only objects of these classes.
    pub classes: Option<Vec<u32>>,
    /// Parts of train, val and test (minival goes with val) to use.
    pub fraction: [Fraction; 3],
    /// How closely images are looked at.
    pub verify: Verify,
    /// Where indexes are kept; `None` for the user's cache folder.
    pub cache_folder: Option<PathBuf>,
    /// Read and write no index.
    pub no_index: bool,
    /// How places are found on this machine.
    pub paths: PathRules,
    /// Compare all images by content.
    pub find_equal_images: bool,
    /// Seed and sizes for the built-in shapes set, should it be asked for and absent.
    pub shapes: synth::SynthArgs,
}

impl Default for DatasetOptions {
    fn default() -> DatasetOptions {
        DatasetOptions {
            splits: vec![SplitName::Train, SplitName::Val],
            single_cls: false,
            classes: None,
            fraction: [Fraction::Share(1.0); 3],
            verify: Verify::Structure,
            cache_folder: None,
            no_index: false,
            paths: PathRules { prefixes: Vec::new(), dataset_folders: vec![PathBuf::from("datasets")] },
            find_equal_images: false,
            shapes: synth::SynthArgs::default(),
        }
    }
}

/// One split, ready to be loaded.
#[derive(Clone, Debug)]
pub struct Split {
    /// Which one.
    pub name: SplitName,
    /// Its images by path.
    pub samples: Arc<Vec<Sample>>,
}

impl Split {
    /// Number of images.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// True for a split without images; none is opened that way.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// The largest number of boxes in one image.
    pub fn boxes_per_image_max(&self) -> usize {
        self.samples.iter().map(|s| s.labels.len()).max().unwrap_or(0)
    }

    /// Number of boxes of each class.
    pub fn class_counts(&self, class_count: usize) -> Vec<usize> {
        let mut counts = vec![0; class_count];
        for label in self.samples.iter().flat_map(|s| &s.labels) {
            counts[label.class as usize] += 1;
        }
        counts
    }
}

/// An opened dataset.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// The dataset file.
    pub config: DataConfig,
    /// Class names in use (`item` alone with `single_cls`).
    pub names: Vec<String>,
    /// The splits that were asked for.
    pub splits: Vec<Split>,
    /// What was found.
    pub report: DatasetReport,
}

impl Dataset {
    /// Opens a dataset: a `data.yaml`, or a folder that holds one. A path whose folder is called `shapes` and does not
    /// exist is synthesised (see [`synth`]).
    ///
    /// # Errors
    /// [`DataError`]: the file is missing or faulty, a place does not exist, a split has no usable image, or the
    /// training split has no label.
    pub fn open(path: &Path, options: &DatasetOptions) -> Result<Dataset, DataError> {
        synth::provide_shapes(path, &options.shapes)?;
        let file = find_file(path)?;
        let config = DataConfig::read(&file, &options.paths)?;
        let names = if options.single_cls { vec!["item".to_owned()] } else { config.names.clone() };
        check_classes(options, names.len())?;
        let mut report =
            DatasetReport { names: names.clone(), notes: config.notes.clone(), ..DatasetReport::default() };
        let mut splits = Vec::new();
        for &name in &options.splits {
            let (split, split_report) = open_split(&config, &names, name, options)?;
            splits.push(split);
            if split_report.boxes == 0 {
                report
                    .notes
                    .push(format!("split `{}` has no boxes: nothing can be measured on it", name.key()));
            }
            report.splits.push(split_report);
        }
        if options.find_equal_images {
            report.equal_images = equal_images(&splits);
        }
        Ok(Dataset { config, names, splits, report })
    }

    /// A split that was asked for.
    ///
    /// # Errors
    /// [`DataError::NoSplit`] when it was not among [`DatasetOptions::splits`].
    pub fn split(&self, name: SplitName) -> Result<&Split, DataError> {
        self.splits.iter().find(|split| split.name == name).ok_or_else(|| DataError::NoSplit {
            file: self.config.file.clone(),
            split: name.key().to_owned(),
            defined: self.splits.iter().map(|s| s.name.key()).collect::<Vec<_>>().join(", "),
        })
    }
}

fn check_classes(options: &DatasetOptions, class_count: usize) -> Result<(), DataError> {
    let allowed = "class numbers below the number of classes";
    match options.classes.iter().flatten().find(|&&class| class as usize >= class_count) {
        Some(class) => Err(DataError::Option { key: "classes", value: class.to_string(), allowed }),
        None => Ok(()),
    }
}

/// The images of a split by path: those that [`DatasetOptions::fraction`] leaves, looked at by nobody yet.
pub(super) fn split_images(
    config: &DataConfig,
    name: SplitName,
    options: &DatasetOptions,
) -> Result<Vec<PathBuf>, DataError> {
    let places = match name {
        SplitName::Train => &config.train,
        SplitName::Val => &config.val,
        SplitName::Test => &config.test,
        SplitName::Minival => &config.minival,
    };
    if places.is_empty() {
        let all = [
            ("train", &config.train),
            ("val", &config.val),
            ("test", &config.test),
            ("minival", &config.minival),
        ];
        let defined: Vec<&str> = all.iter().filter(|(_, p)| !p.is_empty()).map(|(key, _)| *key).collect();
        let split = name.key().to_owned();
        return Err(DataError::NoSplit { file: config.file.clone(), split, defined: defined.join(", ") });
    }
    let mut images = images_of(places, &|line, list| config.resolve_line(line, list, &options.paths))?;
    let fraction = options.fraction[match name {
        SplitName::Train => 0,
        SplitName::Val | SplitName::Minival => 1,
        SplitName::Test => 2,
    }];
    images.truncate(fraction.of(images.len()));
    Ok(images)
}

fn open_split(
    config: &DataConfig,
    names: &[String],
    name: SplitName,
    options: &DatasetOptions,
) -> Result<(Split, super::report::SplitReport), DataError> {
    let images = split_images(config, name, options)?;
    let cache_folder =
        (!options.no_index).then(|| options.cache_folder.clone().unwrap_or_else(index::default_cache_folder));
    let settings = ScanSettings {
        class_count: names.len(),
        single_cls: options.single_cls,
        verify: options.verify,
        cache_folder,
    };
    let (mut samples, mut report) = scan(&config.file, name.key(), &images, &settings);
    if samples.is_empty() {
        let first = report.findings.first().map_or(String::new(), |finding| format!("; first: {finding}"));
        return Err(DataError::NoImages {
            file: config.file.clone(),
            split: name.key().to_owned(),
            found: images.len(),
            dropped: report.images_dropped,
            first,
        });
    }
    if name == SplitName::Train && report.boxes == 0 {
        let example = label_path(&samples[0].path);
        return Err(DataError::NoLabels { split: name.key().to_owned(), images: samples.len(), example });
    }
    if let Some(classes) = &options.classes {
        for sample in &mut samples {
            sample.labels.retain(|label| classes.contains(&label.class));
        }
        summarise(&samples, names.len(), &mut report);
    }
    Ok((Split { name, samples: Arc::new(samples) }, report))
}

/// Pairs of images with equal bytes, within and across splits: the first of its kind with each later one.
fn equal_images(splits: &[Split]) -> Vec<(PathBuf, PathBuf)> {
    use std::collections::HashMap;
    let mut by_size: HashMap<u64, Vec<&Path>> = HashMap::new();
    for sample in splits.iter().flat_map(|split| split.samples.iter()) {
        if let Ok(meta) = std::fs::metadata(&sample.path) {
            by_size.entry(meta.len()).or_default().push(&sample.path);
        }
    }
    let mut pairs = Vec::new();
    for paths in by_size.values().filter(|paths| paths.len() > 1) {
        let mut by_content: HashMap<[u8; 32], &Path> = HashMap::new();
        for path in paths {
            let Ok(bytes) = std::fs::read(path) else { continue };
            match by_content.get(&<[u8; 32]>::from(Sha256::digest(&bytes))) {
                Some(first) if first != path => pairs.push((first.to_path_buf(), path.to_path_buf())),
                Some(_) => {}
                None => {
                    by_content.insert(Sha256::digest(&bytes).into(), path);
                }
            }
        }
    }
    pairs.sort();
    pairs
}
