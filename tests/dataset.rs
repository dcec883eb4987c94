//! Datasets from files: what is found, what is dropped and why, and loaders that repeat themselves.

use std::fs;
use std::path::{Path, PathBuf};

use boxwright::data::augment::{AugmentArgs, CopyPasteMode, Scale};
use boxwright::data::cache::{CacheArgs, CacheMode};
use boxwright::data::config::{DataConfig, PathRules};
use boxwright::data::dataset::Fraction;
use boxwright::data::probe::Verify;
use boxwright::data::synth::{self, Format, SynthArgs};
use boxwright::data::{
    Batch, DataError, Dataset, DatasetOptions, FindingKind, LoaderArgs, SplitName, TrainLoader, ValLoader,
    decode, resize_batch,
};
use tempfile::TempDir;

fn small() -> SynthArgs {
    SynthArgs { images: 13, val_images: 5, imgsz: 64, seed: 1, format: Format::Jpeg }
}

fn options() -> DatasetOptions {
    DatasetOptions { no_index: true, ..DatasetOptions::default() }
}

/// A folder with a small shapes set in `set`.
fn shapes() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a folder");
    let set = dir.path().join("set");
    synth::write_dataset(&set, &small()).expect("written");
    (dir, set)
}

fn picture(path: &Path, width: u32, height: u32) {
    fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    image::RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, (x ^ y) as u8]))
        .save(path)
        .expect("saved");
}

#[test]
fn synthetic_set_is_a_function_of_its_arguments() {
    let (_a, first) = shapes();
    let (_b, second) = shapes();
    let names = ["data.yaml", "images/train/000003.jpg", "labels/train/000012.txt", "images/val/000004.jpg"];
    for name in names {
        assert_eq!(
            fs::read(first.join(name)).expect(name),
            fs::read(second.join(name)).expect(name),
            "{name}"
        );
    }
    let set = Dataset::open(&first, &options()).expect("opens");
    assert_eq!(set.names, synth::NAMES);
    assert_eq!((set.splits[0].len(), set.splits[1].len()), (13, 5));
    assert_eq!(set.report.findings().count(), 0, "{:?}", set.report.findings().next());
    assert!(set.report.splits[0].boxes >= 13);
    assert!(synth::write_dataset(&first, &small()).is_err(), "a folder that is not empty is left alone");
    let left: Vec<_> = fs::read_dir(first.parent().expect("parent")).expect("listed").collect();
    assert_eq!(left.len(), 1, "nothing is left behind");
}

#[test]
fn an_absent_shapes_set_is_made_and_others_are_not() {
    let dir = tempfile::tempdir().expect("a folder");
    let options = DatasetOptions { shapes: small(), ..options() };
    let yaml = dir.path().join("datasets/shapes/data.yaml");
    assert_eq!(Dataset::open(&yaml, &options).expect("made").splits[0].len(), 13);
    let other = Dataset::open(&dir.path().join("datasets/other/data.yaml"), &options);
    assert!(matches!(other, Err(DataError::NoDataset { .. })), "{other:?}");
}

#[test]
fn every_fault_has_file_line_and_reason() {
    let dir = tempfile::tempdir().expect("a folder");
    let root = dir.path();
    for name in ["good", "bad_rows", "missing_label", "empty_label", "all_bad", "cut", "tiny"] {
        picture(&root.join(format!("images/train/{name}.jpg")), 40, 30);
    }
    picture(&root.join("images/train/tiny.jpg"), 9, 30);
    picture(&root.join("images/val/v.png"), 20, 20);
    let cut = root.join("images/train/cut.jpg");
    let bytes = fs::read(&cut).expect("read");
    fs::write(&cut, &bytes[..bytes.len() * 2 / 3]).expect("cut");
    fs::write(root.join("images/train/photo.heic"), "not supported").expect("written");
    fs::create_dir_all(root.join("labels/train")).expect("made");
    let label =
        |name: &str, text: &[u8]| fs::write(root.join(format!("labels/train/{name}.txt")), text).expect("ok");
    label("good", b"0 0.5 0.5 0.5 0.5\n");
    label(
        "bad_rows",
        b"\xef\xbb\xbf1 0.5 0.5 0.5 0.5\n1 nan 0.5 0.5 0.5\n2 0.5 0.5 0.5 0.5\n1 0.5 0.5\n1 0.5 0.5 \xff 1\n",
    );
    label("empty_label", b"\n");
    label("all_bad", b"9 0.5 0.5 0.1 0.1\n");
    label("cut", b"0 0.5 0.5 0.5 0.5\n");
    fs::write(root.join("data.yaml"), "train: images/train\nval: images/val\nnc: 2\nnames: [a, b]\n")
        .expect("ok");

    let set = Dataset::open(root, &options()).expect("opens");
    let names: Vec<_> =
        set.splits[0].samples.iter().map(|s| s.path.file_stem().expect("a name").to_owned()).collect();
    assert_eq!(names, ["bad_rows", "empty_label", "good", "missing_label"]);
    let report = &set.report.splits[0];
    assert_eq!((report.images_found, report.images_kept, report.images_dropped), (8, 4, 4));
    assert_eq!((report.labels_missing, report.labels_empty), (1, 1));
    assert_eq!((report.boxes, report.boxes_dropped), (2, 5));
    assert_eq!(report.class_counts, [1, 1]);
    let lines: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
    let has = |part: &str| assert!(lines.iter().any(|line| line.contains(part)), "{part:?} in {lines:#?}");
    has("bad_rows.txt:2: box dropped: \"nan\" is not a finite number");
    has("bad_rows.txt:3: box dropped: class 2 is out of range; allowed: 0 to 1");
    has("bad_rows.txt:4: box dropped: 3 columns");
    has("bad_rows.txt:5: box dropped: the line is not UTF-8");
    has("all_bad.jpg: image dropped: none of the 1 lines");
    has("cut.jpg: image dropped: the file is cut short");
    has("tiny.jpg: image dropped: 9x30 pixels");
    has("photo.heic: image dropped: not an image of a known format");
    assert!(set.report.notes.iter().any(|note| note.contains("split `val` has no boxes")));
    assert_eq!(fs::read(&cut).expect("read").len(), bytes.len() * 2 / 3, "the image is left as it is");
}

#[test]
fn faults_of_the_dataset_file_come_together() {
    let rules = PathRules::default();
    let parse = |text: &str| DataConfig::parse(text.as_bytes(), Path::new("d.yaml"), &rules);
    let message = |text: &str| parse(text).expect_err(text).to_string();
    let all = message("names: {0: a, 2: b}\nnc: 3\nchannels: 1\n");
    for part in ["`train`", "`val`", "1 is missing before 2", "`nc`", "`channels`", "d.yaml:3"] {
        assert!(all.contains(part), "{part} in {all}");
    }
    assert!(message("- a\n").contains("a mapping"));
    assert!(message("train: [1, [2]]\nval: x\nnc: 1\n").contains("`train`"));
    assert!(message("train: a\nval: b\nnc: 0\n").contains("`nc`"));
    let missing = message("train: ../train/images\nval: valid\nnames: [a]\ndownload: x\n");
    assert!(
        missing.contains("d.yaml:1") && missing.contains("train/images") && missing.contains("download"),
        "{missing}"
    );
    assert!(matches!(parse("a: [1"), Err(DataError::Yaml(_))));
    let bad = DataConfig::parse(b"\xff\xfe\x00", Path::new("d.yaml"), &rules);
    assert!(matches!(bad, Err(DataError::Yaml(_))));
}

#[test]
fn places_are_found_as_exports_name_them() {
    let dir = tempfile::tempdir().expect("a folder");
    let root = dir.path();
    for split in ["train", "valid", "extra/deep"] {
        picture(&root.join(split).join("images/a.png"), 16, 16);
        fs::create_dir_all(root.join(split).join("labels")).expect("made");
        fs::write(root.join(split).join("labels/a.txt"), "0 0.5 0.5 0.5 0.5").expect("written");
    }
    fs::write(root.join("list.txt"), "\u{feff}./train/images/a.png\nvalid/images/a.png\n\n")
        .expect("written");
    let open = |text: &str, options: &DatasetOptions| {
        fs::write(root.join("data.yaml"), text).expect("written");
        Dataset::open(&root.join("data.yaml"), options)
    };
    // The form of Roboflow, whose folders lie beside the file.
    let set = open(
        "train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['x']\nroboflow: {a: 1}\n",
        &options(),
    );
    let set = set.expect("opens");
    assert_eq!(set.splits[1].samples[0].path, root.join("valid/images/a.png"));
    assert!(set.report.notes[0].contains("`roboflow`"));
    // Lists, lists of places, recursion, `validation`, a root that is not here.
    let text = "path: /nowhere/else\ntrain: [list.txt, extra]\nvalidation: list.txt\nnames: {1: b, 0: a}\n";
    let set = open(text, &options()).expect("opens");
    assert_eq!((set.splits[0].len(), set.splits[1].len()), (3, 2));
    assert_eq!(set.names, ["a", "b"]);
    assert_eq!(set.report.notes.len(), 2, "{:?}", set.report.notes);
    // A prefix that stands for a folder here.
    let mut mapped = options();
    mapped.paths.prefixes = vec![("/content/data".to_owned(), root.to_owned())];
    let text = "path: /content/data\ntrain: /content/data/train/images\nval: valid/images\nnc: 2\n";
    let set = open(text, &mapped).expect("opens");
    assert_eq!(set.names, ["class_0", "class_1"]);
    assert_eq!(set.config.root, root);
    // Splits that are not there, or were not asked for.
    let error = open("train: gone\nval: valid/images\nnc: 1\n", &options()).expect_err("missing");
    assert!(error.to_string().contains("`train`: \"gone\" does not exist"), "{error}");
    let text = "train: train/images\nval: valid/images\ntest: gone\nnc: 1\n";
    assert!(open(text, &options()).expect("opens").split(SplitName::Test).is_err());
    fs::create_dir_all(root.join("empty")).expect("made");
    let error = open("train: empty\nval: valid/images\nnc: 1\n", &options()).expect_err("empty");
    assert!(matches!(error, DataError::NoImages { .. }), "{error}");
    fs::remove_dir_all(root.join("train/labels")).expect("removed");
    let error = open("train: train/images\nval: valid/images\nnc: 1\n", &options()).expect_err("no labels");
    assert!(matches!(error, DataError::NoLabels { .. }), "{error}");
}

#[test]
fn the_index_is_used_and_never_believed_when_damaged() {
    let (dir, set) = shapes();
    let cache = dir.path().join("cache");
    let options = DatasetOptions { cache_folder: Some(cache.clone()), ..DatasetOptions::default() };
    let cached = |expected: bool| {
        let opened = Dataset::open(&set, &options).expect("opens");
        assert_eq!(opened.report.splits[0].from_cache, expected);
        opened
    };
    let first = cached(false);
    let second = cached(true);
    assert_eq!(first.splits[0].samples, second.splits[0].samples);
    for entry in fs::read_dir(cache.join("index")).expect("listed") {
        let path = entry.expect("an entry").path();
        let text = fs::read_to_string(&path).expect("read").replace("\"class\":1", "\"class\":2");
        fs::write(&path, text).expect("damaged");
    }
    assert_eq!(cached(false).splits[0].samples, first.splits[0].samples);
    cached(true);
    fs::write(set.join("labels/train/000000.txt"), "2 0.25 0.25 0.1 0.125\n").expect("changed");
    assert_eq!(cached(false).splits[0].samples[0].labels[0].cxcywh, [0.25, 0.25, 0.1, 0.125]);
    // A cache that cannot be written is no fault.
    fs::write(dir.path().join("file"), "").expect("written");
    let nowhere = DatasetOptions { cache_folder: Some(dir.path().join("file")), ..DatasetOptions::default() };
    assert_eq!(Dataset::open(&set, &nowhere).expect("opens").splits[0].len(), 13);
}

#[test]
fn options_choose_images_and_classes() {
    let (_dir, set) = shapes();
    let half = DatasetOptions {
        fraction: [Fraction::Share(0.5), Fraction::Count(2), Fraction::Share(1.0)],
        classes: Some(vec![1]),
        verify: Verify::Decode,
        ..options()
    };
    let opened = Dataset::open(&set, &half).expect("opens");
    assert_eq!((opened.splits[0].len(), opened.splits[1].len()), (6, 2));
    assert!(opened.splits[0].samples.iter().flat_map(|s| &s.labels).all(|l| l.class == 1));
    let single = DatasetOptions { single_cls: true, ..options() };
    let opened = Dataset::open(&set, &single).expect("opens");
    assert_eq!(opened.names, ["item"]);
    assert_eq!(opened.report.splits[0].class_counts, [opened.report.splits[0].boxes]);
    let beyond = DatasetOptions { classes: Some(vec![3]), ..options() };
    assert!(matches!(Dataset::open(&set, &beyond), Err(DataError::Option { key: "classes", .. })));
    fs::copy(set.join("images/train/000001.jpg"), set.join("images/val/same.jpg")).expect("copied");
    let compare = DatasetOptions { find_equal_images: true, ..options() };
    assert_eq!(Dataset::open(&set, &compare).expect("opens").report.equal_images.len(), 1);
}

#[test]
fn images_of_every_kind_become_upright_rgb() {
    let dir = tempfile::tempdir().expect("a folder");
    let rgb = image::RgbImage::from_fn(24, 16, |x, y| image::Rgb([x as u8 * 10, y as u8 * 15, 77]));
    let dynamic = image::DynamicImage::ImageRgb8(rgb.clone());
    let save = |name: &str, image: &image::DynamicImage| {
        let path = dir.path().join(name);
        image.save(&path).expect(name);
        decode::decode_file(&path).expect(name)
    };
    for name in ["a.png", "a.bmp", "a.webp", "a.tiff"] {
        assert_eq!(save(name, &dynamic).pixels, *rgb.as_raw(), "{name}");
    }
    assert_eq!(save("rgba.png", &dynamic.to_rgba8().into()).pixels, *rgb.as_raw());
    assert_eq!(save("deep.png", &dynamic.to_rgb16().into()).pixels, *rgb.as_raw());
    let grey = save("grey.png", &dynamic.to_luma8().into());
    assert!(grey.pixels.as_chunks::<3>().0.iter().all(|p| p[0] == p[1] && p[1] == p[2]));
    let jpeg = save("a.jpg", &dynamic);
    // The same file with "rotate by 90 degrees" in an EXIF segment after the start marker.
    let plain = fs::read(dir.path().join("a.jpg")).expect("read");
    let tiff = b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    let mut turned = plain[..2].to_vec();
    turned.extend_from_slice(&[0xff, 0xe1, 0, 2 + 6 + tiff.len() as u8]);
    turned.extend_from_slice(b"Exif\0\0");
    turned.extend_from_slice(tiff);
    turned.extend_from_slice(&plain[2..]);
    fs::write(dir.path().join("turned.jpg"), turned).expect("written");
    let turned = decode::decode_file(&dir.path().join("turned.jpg")).expect("decodes");
    assert_eq!((turned.height, turned.width), (24, 16));
    assert_eq!(turned.pixel(15, 0), jpeg.pixel(0, 0), "the first pixel is now at the top right");
    let facts =
        boxwright::data::probe::probe(&dir.path().join("turned.jpg"), Verify::Structure).expect("probes");
    assert_eq!((facts.height, facts.width), (24, 16));
}

/// Everything on, so that every draw takes part.
fn everything() -> AugmentArgs {
    AugmentArgs {
        degrees: 10.0,
        shear: 2.0,
        perspective: 0.0005,
        scale: Scale::Range(0.6, 1.4),
        flipud: 0.3,
        bgr: 0.3,
        mosaic: 0.7,
        mixup: 0.4,
        cutmix: 0.4,
        ..AugmentArgs::default()
    }
}

fn train_batches(
    set: &Dataset,
    args: &LoaderArgs,
    augment: &AugmentArgs,
    epoch: u32,
    first: usize,
) -> Vec<Batch> {
    let split = set.split(SplitName::Train).expect("train");
    let mut loader = TrainLoader::new(split, args.clone(), augment.clone()).expect("a loader");
    // What an earlier epoch left in the making must not show.
    loader.start_epoch(9, 0, false);
    loader.next().expect("a batch");
    loader.start_epoch(epoch, first, false);
    let mut out = Vec::new();
    while let Some(batch) = loader.next().expect("a batch") {
        out.push(batch.clone());
        loader.recycle(batch);
    }
    assert!(loader.next().expect("the end").is_none());
    assert!(loader.wait_seconds() >= 0.0);
    out
}

#[test]
fn batches_do_not_depend_on_threads_caches_or_the_first_batch() {
    let (dir, set) = shapes();
    let set = Dataset::open(&set, &options()).expect("opens");
    for augment in [AugmentArgs::default(), everything()] {
        let args = LoaderArgs { imgsz: 64, batch: 4, seed: 5, ..LoaderArgs::default() };
        let want = train_batches(&set, &args, &augment, 2, 0);
        assert_eq!(want.iter().map(|b| b.n).collect::<Vec<_>>(), [4, 4, 4, 1]);
        let mut seen: Vec<u32> = want.iter().flat_map(|b| b.samples.clone()).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..13).collect::<Vec<u32>>());
        let cache = |mode, ram| CacheArgs {
            mode,
            ram_bytes_max: ram,
            folder: Some(dir.path().join("cache")),
            ..CacheArgs::default()
        };
        let caches = [
            cache(CacheMode::Recent, Some(0)),
            cache(CacheMode::Ram, None),
            cache(CacheMode::Disk, Some(20_000)),
            cache(CacheMode::Disk, None),
        ];
        for (workers, cache) in [0, 1, 3, 2].into_iter().zip(caches) {
            let args = LoaderArgs { workers, cache, ..args.clone() };
            assert!(train_batches(&set, &args, &augment, 2, 0) == want, "{workers} workers");
            assert!(
                train_batches(&set, &args, &augment, 2, 2) == want[2..],
                "{workers} workers from batch 2"
            );
        }
        assert!(train_batches(&set, &args, &augment, 3, 0) != want, "another epoch");
        let other = LoaderArgs { seed: 6, ..args };
        assert!(train_batches(&set, &other, &augment, 2, 0) != want, "another seed");
        for batch in &want {
            assert!(batch.targets.windows(2).all(|t| t[0].image <= t[1].image));
            for t in &batch.targets {
                let [cx, cy, w, h] = t.cxcywh;
                let inside = cx - w / 2.0 > -1e-5
                    && cy - h / 2.0 > -1e-5
                    && cx + w / 2.0 < 1.00001
                    && cy + h / 2.0 < 1.00001;
                assert!(inside && w > 0.0 && h > 0.0 && (t.image as usize) < batch.n && t.class < 3, "{t:?}");
            }
        }
    }
}

#[test]
fn damaged_cache_files_are_made_anew() {
    let (dir, set) = shapes();
    let set = Dataset::open(&set, &options()).expect("opens");
    let cache = CacheArgs {
        mode: CacheMode::Disk,
        ram_bytes_max: Some(0),
        folder: Some(dir.path().join("cache")),
        ..CacheArgs::default()
    };
    let args = LoaderArgs { imgsz: 64, cache, ..LoaderArgs::default() };
    let want = train_batches(&set, &args, &AugmentArgs::default(), 0, 0);
    let files: Vec<PathBuf> = fs::read_dir(dir.path().join("cache/images"))
        .expect("listed")
        .map(|e| e.expect("an entry").path())
        .collect();
    assert_eq!(files.len(), 13);
    for (i, file) in files.iter().enumerate() {
        let mut bytes = fs::read(file).expect("read");
        if i % 2 == 0 {
            bytes[100] ^= 1
        } else {
            bytes.truncate(i * 7)
        }
        fs::write(file, bytes).expect("damaged");
    }
    assert!(train_batches(&set, &args, &AugmentArgs::default(), 0, 0) == want);
    let none = CacheArgs { disk_bytes_max: Some(10), ..args.cache.clone() };
    let split = set.split(SplitName::Train).expect("train");
    let loader = TrainLoader::new(split, LoaderArgs { cache: none, ..args }, AugmentArgs::default())
        .expect("a loader");
    assert!(loader.notes()[0].contains("the limit is 0 MiB"), "{:?}", loader.notes());
}

#[test]
fn an_image_that_fails_ends_the_epoch_by_name() {
    for workers in [0, 2] {
        let (_dir, root) = shapes();
        let set = Dataset::open(&root, &options()).expect("opens");
        fs::write(root.join("images/train/000007.jpg"), "gone bad").expect("written");
        let args = LoaderArgs { imgsz: 64, batch: 4, workers, ..LoaderArgs::default() };
        let split = set.split(SplitName::Train).expect("train");
        let mut loader = TrainLoader::new(split, args, AugmentArgs::none()).expect("a loader");
        loader.start_epoch(0, 0, false);
        let error = loop {
            match loader.next() {
                Ok(Some(batch)) => loader.recycle(batch),
                Ok(None) => panic!("the epoch ended without the error"),
                Err(error) => break error,
            }
        };
        assert!(error.to_string().contains("000007.jpg"), "{error}");
        assert!(loader.next().expect("over").is_none());
    }
}

#[test]
fn validation_batches_are_letterboxed_and_map_back() {
    let dir = tempfile::tempdir().expect("a folder");
    let root = dir.path();
    let sizes = [(100, 60), (60, 100), (80, 80), (200, 90), (33, 70), (64, 64), (128, 40)];
    for (i, (w, h)) in sizes.into_iter().enumerate() {
        picture(&root.join(format!("images/{i}.png")), w, h);
        fs::create_dir_all(root.join("labels")).expect("made");
        fs::write(root.join(format!("labels/{i}.txt")), "0 0.4 0.6 0.2 0.3\n").expect("written");
    }
    fs::write(root.join("data.yaml"), "train: images\nval: images\nnc: 1\n").expect("written");
    let set = Dataset::open(root, &options()).expect("opens");
    let split = set.split(SplitName::Val).expect("val");
    for (rect, workers) in [(true, 0), (true, 2), (false, 1)] {
        let args = LoaderArgs { imgsz: 96, batch: 3, rect, workers, ..LoaderArgs::default() };
        let mut loader = ValLoader::new(split, args).expect("a loader");
        assert_eq!(loader.batches(), 3);
        for _pass in 0..2 {
            loader.start();
            let mut seen = 0;
            while let Some(batch) = loader.next().expect("a batch") {
                assert!(batch.h % 32 == 0 && batch.w % 32 == 0 && (rect || (batch.h, batch.w) == (96, 96)));
                for t in &batch.targets {
                    let g = &batch.geometry[t.image as usize];
                    let [cx, cy, w, h] = t.cxcywh;
                    let (bw, bh) = (batch.w as f32, batch.h as f32);
                    let xyxy =
                        [(cx - w / 2.0) * bw, (cy - h / 2.0) * bh, (cx + w / 2.0) * bw, (cy + h / 2.0) * bh];
                    let (ow, oh) = (g.orig_w as f32, g.orig_h as f32);
                    let back = g.to_original(xyxy);
                    for (got, want) in back.iter().zip([0.3 * ow, 0.45 * oh, 0.5 * ow, 0.75 * oh]) {
                        assert!((got - want).abs() < 0.05, "{back:?} of {ow}x{oh}");
                    }
                    let forth = g.to_input(back);
                    assert!(forth.iter().zip(xyxy).all(|(a, b)| (a - b).abs() < 1e-3));
                }
                seen += batch.n;
                loader.recycle(batch);
            }
            assert_eq!(seen, sizes.len());
        }
    }
    let args = LoaderArgs { imgsz: 96, batch: 3, rect: true, ..LoaderArgs::default() };
    let mut loader = TrainLoader::new(split, args, AugmentArgs::default()).expect("a loader");
    assert!(loader.notes()[0].contains("mosaic is off"));
    loader.start_epoch(0, 0, false);
    let mut batch = loader.next().expect("a batch").expect("there is one");
    assert!(batch.h < batch.w && batch.w == 96, "{}x{}", batch.h, batch.w);
    let targets = batch.targets.clone();
    resize_batch(&mut batch, 64, 128);
    assert_eq!((batch.h, batch.w, batch.images.len()), (64, 128, 3 * 64 * 128 * 3));
    assert_eq!(batch.targets, targets);
}

#[test]
fn options_out_of_range_are_refused_by_name() {
    let (_dir, set) = shapes();
    let set = Dataset::open(&set, &options()).expect("opens");
    let split = set.split(SplitName::Train).expect("train");
    let key = |args: LoaderArgs, augment: AugmentArgs| match TrainLoader::new(split, args, augment) {
        Err(DataError::Option { key, .. }) => key,
        Err(other) => panic!("{other}"),
        Ok(_) => "none",
    };
    let fine = || LoaderArgs { imgsz: 64, ..LoaderArgs::default() };
    assert_eq!(key(fine(), AugmentArgs::default()), "none");
    assert_eq!(key(LoaderArgs { imgsz: 65, ..fine() }, AugmentArgs::default()), "imgsz");
    assert_eq!(key(LoaderArgs { batch: 0, ..fine() }, AugmentArgs::default()), "batch");
    assert_eq!(key(fine(), AugmentArgs { mosaic: f64::NAN, ..AugmentArgs::default() }), "mosaic");
    assert_eq!(key(fine(), AugmentArgs { scale: Scale::Range(2.0, 1.0), ..AugmentArgs::default() }), "scale");
    let paste =
        AugmentArgs { copy_paste: 0.5, copy_paste_mode: CopyPasteMode::Mixup, ..AugmentArgs::default() };
    let loader = TrainLoader::new(split, fine(), paste).expect("a loader");
    assert!(loader.notes()[0].contains("copy_paste"));
    assert_eq!(FindingKind::BoxDropped.words(), "box dropped");
}
