//! Hand-made datasets whose counts are known.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use tempfile::TempDir;

use super::*;
use crate::data::dataset::Fraction;

/// An image of its own content with these labels; `None` writes no label file.
fn image(set: &Path, name: &str, (width, height): (u32, u32), shade: u8, labels: Option<&str>) {
    let path = set.join("images").join(name).with_extension("png");
    fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    image::RgbImage::from_pixel(width, height, image::Rgb([shade; 3])).save(&path).expect("saved");
    if let Some(labels) = labels {
        let path = set.join("labels").join(name).with_extension("txt");
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        fs::write(path, labels).expect("written");
    }
}

/// Four usable training images, one cut short; two validation images, one of which is a training image.
fn hand_made() -> (TempDir, PathBuf, DatasetOptions) {
    let dir = tempfile::tempdir().expect("a folder");
    let set = dir.path().join("set");
    // Sides of 0.5, 0.25 and 0.1 of the longer side (200), the last one four times as wide as high.
    let boxes = "0 0.5 0.5 0.5 1.0\n1 0.5 0.5 0.25 0.5\n0 0.5 0.5 0.2 0.1\n";
    image(&set, "train/a", (200, 100), 10, Some(boxes));
    image(&set, "train/b", (100, 100), 20, Some("0 0.5 0.5 0.04 0.04\n0 0.5 0.5 0.04\n"));
    image(&set, "train/c", (100, 100), 30, None);
    image(&set, "train/d", (100, 100), 20, Some(""));
    image(&set, "train/e", (100, 100), 40, Some("0 0.5 0.5 0.5 0.5\n"));
    let cut = set.join("images/train/e.png");
    let bytes = fs::read(&cut).expect("read");
    fs::write(&cut, &bytes[..bytes.len() - 6]).expect("cut");
    image(&set, "val/a", (100, 100), 50, Some("1 0.5 0.5 0.3 0.3\n"));
    image(&set, "val/z", (100, 100), 20, Some("1 0.5 0.5 0.3 0.3\n"));
    let yaml = "path: .\ntrain: images/train\nval: images/val\nnames: [one, two, three]\n";
    fs::write(set.join("data.yaml"), yaml).expect("written");
    let options =
        DatasetOptions { cache_folder: Some(dir.path().join("cache")), ..DatasetOptions::default() };
    (dir, set, options)
}

/// Moves the time of a file by a second.
fn touch(path: &Path) {
    let file = File::options().append(true).open(path).expect("opens");
    let time = file.metadata().expect("known").modified().expect("known");
    file.set_modified(time + Duration::from_secs(1)).expect("set");
}

fn copy_all(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("made");
    for entry in fs::read_dir(from).expect("listed") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_all(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).expect("copied");
        }
    }
}

#[test]
fn a_hand_made_set_is_counted_right() {
    let (_dir, set, options) = hand_made();
    let described = describe(&set, &options, None, false).expect("described");
    assert!(!described.is_hit);
    assert_eq!(described.images_scanned, 7);
    let Metadata { train, val, duplicates, names, .. } = described.metadata;
    assert_eq!(names, ["one", "two", "three"]);
    assert_eq!((train.images, train.images_dropped, val.images), (4, 1, 2));
    assert!(train.dropped_examples[0].starts_with("images/train/e.png: "), "{:?}", train.dropped_examples);
    assert_eq!((train.labels_missing, train.labels_empty, train.unlabelled()), (1, 1, 2));
    assert_eq!((train.boxes, train.boxes_dropped, train.boxes_per_image_max), (4, 1, 3));
    assert_eq!((train.class_counts.clone(), train.class_images.clone()), (vec![3, 1, 0], vec![2, 1, 0]));
    assert_eq!((val.class_counts.clone(), val.boxes_per_image()), (vec![0, 2, 0], 1.0));
    // 0.5: 100 x 100 of 200; 0.25: 50 x 50; sqrt(40 * 10) / 200 = 0.1; 4 of 100.
    assert_eq!(train.side_bins, [1, 1, 0, 1, 1, 0, 0, 0, 0, 0]);
    assert_eq!((train.side_p10_ppm, train.side_p50_ppm, train.side_p90_ppm), (40_000, 100_000, 500_000));
    assert_eq!(train.aspect_bins, [0, 0, 0, 0, 3, 0, 1, 0]);
    assert_eq!(train.widest_ppm, 500_000);
    assert_eq!((train.longer_min_px, train.longer_p50_px, train.longer_max_px), (100, 100, 200));
    // 0.1 measures 8 pixels at 80, 0.04 at 200: first at 96 and at 224.
    let tiny: Vec<usize> = [32, 64, 96, 192, 224].iter().map(|&imgsz| train.tiny_boxes(imgsz)).collect();
    assert_eq!(tiny, [2, 2, 1, 1, 0]);
    assert_eq!((duplicates.within_train, duplicates.within_val, duplicates.across), (1, 0, 1));
    assert_eq!(duplicates.examples, [["images/train/b.png", "images/train/d.png"]]);
    assert_eq!(duplicates.across_examples, [["images/train/b.png", "images/val/z.png"]]);
}

#[test]
fn a_hit_a_touched_label_and_a_damaged_cache() {
    let (dir, set, options) = hand_made();
    let first = describe(&set, &options, None, false).expect("described");
    let second = describe(&set, &options, None, false).expect("described");
    assert!(second.is_hit && second.images_scanned == 0);
    assert_eq!(first.metadata, second.metadata);

    touch(&set.join("labels/train/a.txt"));
    let third = describe(&set, &options, None, false).expect("described");
    assert!(!third.is_hit);
    assert_eq!(third.images_scanned, 1, "only the image whose label was touched");
    assert_ne!(third.metadata.fingerprint, first.metadata.fingerprint);
    assert_eq!(third.metadata.val_fingerprint, first.metadata.val_fingerprint);

    fs::write(set.join("labels/val/a.txt"), "2 0.5 0.5 0.3 0.3\n").expect("written");
    touch(&set.join("labels/val/a.txt"));
    let fourth = describe(&set, &options, None, false).expect("described");
    assert_eq!((fourth.is_hit, fourth.images_scanned), (false, 1));
    assert_eq!(fourth.metadata.val.class_counts, [0, 1, 1]);
    assert_ne!(fourth.metadata.val_fingerprint, first.metadata.val_fingerprint);

    for shelf in ["metadata", "val-fingerprint", "index"] {
        for entry in fs::read_dir(dir.path().join("cache").join(shelf)).expect("listed") {
            let path = entry.expect("an entry").path();
            let mut bytes = fs::read(&path).expect("read");
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(&path, bytes).expect("damaged");
        }
    }
    let fifth = describe(&set, &options, None, false).expect("described");
    assert_eq!((fifth.is_hit, fifth.images_scanned), (false, 7));
    let same = |metadata: &Metadata| Metadata { counted_in_ms: 0, ..metadata.clone() };
    assert_eq!(same(&fifth.metadata), same(&fourth.metadata));
    assert!(describe(&set, &options, None, false).expect("described").is_hit);
    let sixth = describe(&set, &options, None, true).expect("described");
    assert!(!sixth.is_hit, "asked to work it out anew");
}

#[test]
fn values_of_another_machine_are_used_when_they_add_up() {
    use std::cell::RefCell;
    use std::collections::HashMap;
    let (dir, set, options) = hand_made();
    let shared: RefCell<HashMap<String, String>> = RefCell::default();
    let get = |key: &str| shared.borrow().get(key).cloned();
    let set_value = |key: &str, text: &str, _: Duration| {
        shared.borrow_mut().insert(key.to_owned(), text.to_owned());
    };
    let second = (get, set_value);
    let first = describe(&set, &options, Some(&second), false).expect("described");
    let elsewhere = DatasetOptions { cache_folder: Some(dir.path().join("other")), ..options.clone() };
    let hit = describe(&set, &elsewhere, Some(&second), false).expect("described");
    assert!(hit.is_hit);
    assert_eq!(hit.metadata, first.metadata);
    let mut odd = first.metadata.clone();
    odd.train.class_counts = vec![usize::MAX, 2, 3];
    assert!(!is_whole(&odd, &odd.fingerprint));
    odd.train.class_counts = vec![4];
    assert!(!is_whole(&odd, &odd.fingerprint));
    assert!(is_whole(&first.metadata, &first.metadata.fingerprint));
}

#[test]
fn a_fingerprint_changes_with_anything_that_counts_and_with_nothing_else() {
    let (dir, set, options) = hand_made();
    let of = || fingerprint(&set, &options).expect("told");
    let first = of();
    assert_eq!(first, of());
    assert_eq!(first.len(), 64);
    touch(&set.join("images/val/z.png"));
    let touched = of();
    assert_ne!(touched, first);
    fs::write(set.join("labels/train/notes.md"), "no label").expect("written");
    assert_eq!(of(), touched, "a file that is no image and no label");
    fs::rename(set.join("images/train/c.png"), set.join("images/train/c2.png")).expect("renamed");
    let renamed = of();
    assert_ne!(renamed, touched);
    let yaml = fs::read_to_string(set.join("data.yaml")).expect("read");
    fs::write(set.join("data.yaml"), yaml.replace("three", "four")).expect("written");
    assert_ne!(of(), renamed, "a class was renamed");
    let here = of();
    let moved = dir.path().join("moved");
    fs::rename(&set, &moved).expect("moved");
    assert_eq!(fingerprint(&moved, &options).expect("told"), here, "a set that was moved is the same");
    assert!(matches!(fingerprint(&set, &options), Err(DataError::NoDataset { .. })));
}

#[test]
fn a_validation_set_is_the_same_on_every_machine() {
    let (dir, set, options) = hand_made();
    let of = |set: &Path, options: &DatasetOptions| {
        val_fingerprint_of(set, options, SplitName::Val).expect("told")
    };
    let first = of(&set, &options);
    let copy = dir.path().join("elsewhere/copy");
    copy_all(&set, &copy);
    for name in ["images/val/a.png", "labels/val/a.txt"] {
        let file = File::options().append(true).open(copy.join(name)).expect("opens");
        file.set_modified(UNIX_EPOCH + Duration::from_secs(1_000_000)).expect("set");
    }
    assert_eq!(of(&copy, &options), first, "other times, other place");
    let plain = DatasetOptions { no_index: true, ..options.clone() };
    assert_eq!(of(&copy, &plain), first, "and without a cache");
    image(&copy, "train/new", (50, 50), 1, Some("0 0.5 0.5 0.5 0.5\n"));
    assert_eq!(of(&copy, &options), first, "training images do not count");
    let single = DatasetOptions { single_cls: true, ..options.clone() };
    let some = DatasetOptions { classes: Some(vec![1]), ..options.clone() };
    let half = DatasetOptions { fraction: [Fraction::Share(0.5); 3], ..options.clone() };
    let mut seen = vec![first];
    for other in [single, some, half] {
        seen.push(of(&set, &other));
    }
    seen.push(val_fingerprint_of(&set, &options, SplitName::Train).expect("told"));
    fs::remove_file(set.join("labels/val/z.txt")).expect("removed");
    seen.push(of(&set, &options));
    fs::write(set.join("labels/val/z.txt"), "").expect("written");
    seen.push(of(&set, &options));
    let distinct: std::collections::BTreeSet<&String> = seen.iter().collect();
    assert_eq!(distinct.len(), seen.len(), "{seen:?}");
}
