//! The rules on data whose numbers are known.

use proptest::prelude::*;

use super::rules::{IMAGES_FROM, LADDER};
use super::*;
use crate::data::metadata::{
    ASPECT_BINS, Duplicates, REACH_BINS, SIDE_BINS, SplitMetadata, count as count_dataset,
};
use crate::data::synth::{SynthArgs, write_dataset};
use crate::data::{Dataset, DatasetOptions};

/// A device whose memory grows with the network, the area and the batch.
struct Plain {
    free: u64,
    gpu: bool,
}

impl Room for Plain {
    fn device(&self) -> String {
        if self.gpu { "cuda:0 Test".into() } else { "the CPU".into() }
    }

    fn is_gpu(&self) -> bool {
        self.gpu
    }

    fn largest(&self, model: &str, imgsz: usize) -> Result<usize, TrainError> {
        let one = self.bytes(model, imgsz, 1)?;
        let (needed_mib, available_mib) = (one >> 20, self.free >> 20);
        match (self.free / one) as usize {
            0 => Err(TrainError::Memory { batch: 1, imgsz, needed_mib, available_mib, largest: 0 }),
            batch => Ok(batch),
        }
    }

    fn bytes(&self, model: &str, imgsz: usize, batch: usize) -> Result<u64, TrainError> {
        let rung = LADDER.iter().position(|name| *name == model).expect("a rung") as u64;
        Ok((rung + 1) * 100 * (imgsz * imgsz * batch) as u64)
    }
}

const LARGE: Plain = Plain { free: 1 << 44, gpu: true };
const HOST: Plain = Plain { free: 1 << 33, gpu: false };

/// Data with so many images of this length, two classes, and boxes of this side.
fn data(images: usize, longer_px: u32, side_ppm: u32) -> Metadata {
    let split = |images: usize| SplitMetadata {
        images,
        boxes: 4 * images,
        boxes_per_image_max: 8,
        class_counts: vec![2 * images; 2],
        class_images: vec![images; 2],
        side_bins: vec![0; SIDE_BINS],
        aspect_bins: vec![0; ASPECT_BINS],
        reach_bins: vec![0; REACH_BINS],
        side_p10_ppm: side_ppm,
        side_p50_ppm: side_ppm,
        side_p90_ppm: side_ppm,
        widest_ppm: side_ppm,
        longer_min_px: longer_px,
        longer_p50_px: longer_px,
        longer_max_px: longer_px,
        ..SplitMetadata::default()
    };
    Metadata {
        fingerprint: "f".repeat(64),
        names: vec!["a".into(), "b".into()],
        train: split(images),
        val: split(images.div_ceil(4).max(30)),
        ..Metadata::default()
    }
}

fn earlier(task_id: &str, model: &str, map: f64, data: &Metadata) -> EarlierRun {
    EarlierRun {
        task_id: task_id.into(),
        model: model.into(),
        data_fingerprint: data.fingerprint.clone(),
        names: data.names.clone(),
        map,
        weights: format!("runs/{task_id}/best.safetensors").into(),
    }
}

fn of(data: &Metadata, room: &Plain, history: &[EarlierRun], goal: Goal) -> Recommendation {
    recommend(data, room, history, goal).expect("recommended")
}

/// Index of a network's size.
fn rung(model: &str) -> usize {
    LADDER.iter().position(|name| *name == model).expect("a rung")
}

/// The shapes set is a function of its arguments, and so is the text; only the fingerprint holds times.
#[test]
fn the_text_on_the_shapes_set() {
    let dir = tempfile::tempdir().expect("a folder");
    let set = dir.path().join("set");
    let args = SynthArgs { images: 48, val_images: 12, ..SynthArgs::default() };
    write_dataset(&set, &args).expect("written");
    let options = DatasetOptions { no_index: true, ..DatasetOptions::default() };
    let mut shapes = count_dataset(&Dataset::open(&set, &options).expect("opens")).expect("counted");
    shapes.fingerprint = "0123456789abcdef".into();
    let best = earlier("shapes", "yolov8n", 0.865_149, &shapes);
    let text = of(&shapes, &HOST, &[best], Goal::Balanced).text(&shapes);
    let expected = "\
data        48 + 12 images, 215 boxes (3.5 an image), 3 classes; fingerprint 0123456789ab
imgsz       160: nine tenths of the 169 training boxes have a side of 15.6 % or more of the image's longer side, which is 32 px and more at 224 px; the median image is 160 px long, and enlarging adds no detail
model       yolov8n: yolov8n is the size for fewer than 1,500 training images, and there are 48
batch       8: 8 images are what batch normalisation should have at least; it takes 20 MiB on the CPU, where a batch of 3355 would fit if nothing else used it
epochs      150: 48 images make 6 batches an epoch; the goal balanced is 5,000 batches, 840 epochs, of which 300 is the most; half of it, since it starts from trained weights
pretrained  runs/shapes/best.safetensors: job shapes reached mAP50-95 0.8651 with yolov8n on the same data and classes, the best of 1 such run
warning: fewer than 50 training boxes of `circle`: few to learn from
warning: 12 validation images with 46 boxes: the score will jump
";
    assert_eq!(text, expected, "\n{text}");
}

#[test]
fn the_input_follows_the_boxes_within_its_bounds() {
    let of = |longer_px, side_ppm, goal| rules::input_size(&data(500, longer_px, side_ppm), goal).value;
    // A twentieth of the side measures 32 px at 640.
    assert_eq!(of(4000, 50_000, Goal::Balanced), 640);
    assert_eq!(of(4000, 50_000, Goal::Fast), 320);
    assert_eq!(of(4000, 50_000, Goal::Accurate), 1280);
    assert_eq!(of(500, 50_000, Goal::Balanced), 512, "no larger than the images, rounded up");
    assert_eq!(of(4000, 500_000, Goal::Balanced), 320, "the least");
    assert_eq!(of(4000, 1, Goal::Balanced), 960, "the most");
    assert_eq!(of(20, 1, Goal::Balanced), 64);
    assert_eq!(of(4000, 0, Goal::Balanced), 960, "no boxes");
    let said = rules::input_size(&data(500, 640, 126_321), Goal::Accurate).because;
    assert!(said.contains("64 px and more at 512 px; 640 px is the least for the goal accurate"), "{said}");
}

#[test]
fn the_network_follows_data_device_and_goal() {
    let of = |images, gpu, goal| LADDER[rules::network(&data(images, 640, 1), gpu, goal).value];
    let usual = [1_499, 1_500, 10_000, 50_000, 100_000].map(|images| of(images, true, Goal::Balanced));
    assert_eq!(usual, LADDER);
    assert_eq!(of(10_000, true, Goal::Fast), "yolov8s");
    assert_eq!(of(10_000, true, Goal::Accurate), "yolov8l");
    assert_eq!(of(1_000_000, true, Goal::Accurate), "yolov8x");
    assert_eq!(of(1_000_000, false, Goal::Balanced), "yolov8n");
    assert_eq!(of(1_000_000, false, Goal::Accurate), "yolov8s");
    let said = rules::network(&data(20_000, 640, 1), false, Goal::Balanced).because;
    assert!(said.contains("10,000 to 50,000 training images, and there are 20,000"), "{said}");
    assert!(said.ends_with("on a CPU no more than yolov8n, whose steps it can do"), "{said}");
}

#[test]
fn memory_takes_the_network_down_first_and_the_input_then() {
    let set = data(60_000, 4000, 50_000);
    // yolov8l at 640 needs 8 x 164 MB; this is room for 8 of yolov8s.
    let some = Plain { free: 8 * 2 * 100 * 640 * 640, gpu: true };
    let got = of(&set, &some, &[], Goal::Balanced);
    assert_eq!((got.model.as_str(), got.imgsz, got.batch), ("yolov8s", 640, 8));
    assert!(got.lines[1].because.ends_with("only 4 images of 640 px fit with yolov8l"), "{:?}", got.lines[1]);
    let little = Plain { free: 8 * 100 * 480 * 480, gpu: true };
    let got = of(&set, &little, &[], Goal::Balanced);
    assert_eq!((got.model.as_str(), got.imgsz, got.batch), ("yolov8n", 480, 8));
    assert!(got.lines[0].because.ends_with("only 4 images of 640 px fit with yolov8n"), "{:?}", got.lines[0]);
    let least = Plain { free: 100 * 64 * 64, gpu: true };
    let got = of(&set, &least, &[], Goal::Balanced);
    assert_eq!((got.imgsz, got.batch), (64, 1));
    let none = Plain { free: 100 * 64 * 64 - 1, gpu: true };
    let error = recommend(&set, &none, &[], Goal::Balanced).expect_err("no room");
    assert!(matches!(error, TrainError::Memory { largest: 0, .. }), "{error}");
}

#[test]
fn batch_and_epochs_follow_the_number_of_images() {
    let of = |images, room: &Plain| {
        let got = of(&data(images, 640, 100_000), room, &[], Goal::Balanced);
        (got.batch, got.epochs)
    };
    assert_eq!(of(1, &LARGE), (1, 300));
    assert_eq!(of(5, &LARGE), (4, 300));
    assert_eq!(of(200, &LARGE), (16, 300));
    assert_eq!(of(5_000, &LARGE), (64, 70));
    assert_eq!(of(5_000, &HOST), (16, 50));
    assert_eq!(of(1_000_000, &LARGE), (64, 50));
}

#[test]
fn only_a_run_on_the_same_data_with_the_same_classes_gives_weights() {
    let set = data(200, 640, 100_000);
    let run = |task_id, model, map| earlier(task_id, model, map, &set);
    let other_data = EarlierRun { data_fingerprint: "0".repeat(64), ..run("other", "yolov8n", 0.9) };
    let other_names = EarlierRun { names: vec!["b".into(), "a".into()], ..run("names", "yolov8n", 0.9) };
    let odd = run("odd", "yolov8n", f64::NAN);
    let warm = |history: &[EarlierRun]| of(&set, &LARGE, history, Goal::Balanced);
    let cold = warm(&[]);
    assert_eq!(cold.warm_start, None);
    let refused = warm(&[other_data.clone(), other_names.clone(), odd.clone()]);
    assert_eq!(refused, cold);
    let larger = warm(&[run("big", "yolov8m", 0.8)]);
    assert_eq!(larger.warm_start, None);
    assert!(larger.lines[4].because.ends_with("the weights of yolov8m do not fit yolov8n"));
    let history = [
        other_data,
        run("newer", "yolov8n", 0.512_34),
        run("big", "yolov8m", 0.8),
        run("older", "yolov8n", 0.512_34),
        run("worse", "yolov8n", 0.4),
        other_names,
        odd,
    ];
    let got = warm(&history);
    let start = got.warm_start.clone().expect("a run that fits");
    assert_eq!((start.task_id.as_str(), start.map), ("newer", 0.5123));
    assert!(got.lines[4].because.contains("the best of 3 such runs"), "{:?}", got.lines[4]);
    assert_eq!(got.epochs, cold.epochs / 2);
    assert!(got.is_sound(Goal::Balanced, &history));
    assert!(!got.is_sound(Goal::Fast, &history) && !got.is_sound(Goal::Balanced, &history[2..]));
}

/// What is warned of for data with these faults.
fn warned(change: impl FnOnce(&mut Metadata)) -> Vec<String> {
    let mut set = data(100, 640, 100_000);
    change(&mut set);
    of(&set, &LARGE, &[], Goal::Balanced).warnings
}

#[test]
fn every_fault_is_warned_of_and_a_sound_set_of_nothing() {
    assert_eq!(warned(|_| {}), Vec::<String>::new());
    let twice = warned(|set| {
        let pair = ["images/train/a.jpg".to_owned(), "images/val/b.jpg".to_owned()];
        set.duplicates =
            Duplicates { within_train: 1, across: 3, across_examples: vec![pair], ..Duplicates::default() };
    });
    assert_eq!(
        twice,
        [
            "3 of 30 validation images are training images too (for example images/val/b.jpg equals \
             images/train/a.jpg): the score will flatter",
            "1 image is there twice within a split (1 in train, 0 in val)"
        ]
    );
    let uneven = warned(|set| set.train.class_counts = vec![360, 36]);
    assert_eq!(
        uneven,
        [
            "fewer than 50 training boxes of `b`: few to learn from",
            "classes are uneven: `a` has 360 training boxes, `b` 36; `cls_pw: 0.5` gives rare ones more weight"
        ]
    );
    assert!(warned(|set| set.train.class_counts = vec![599, 60]).is_empty(), "not yet ten times");
    let absent = warned(|set| {
        set.train.class_counts = vec![400, 0];
        set.val.class_counts = vec![0, 120];
    });
    assert_eq!(absent.len(), 2);
    assert!(absent[0].starts_with("no training box of `b`"), "{absent:?}");
    assert!(absent[1].starts_with("no validation box of `a`"), "{absent:?}");
    let bare = warned(|set| (set.train.labels_missing, set.train.labels_empty) = (8, 3));
    assert!(bare[0].starts_with("11.0 % of the training images have no boxes (8 without a label file, 3 "));
    assert!(warned(|set| set.train.labels_empty = 10).is_empty(), "a tenth of backgrounds is usual");
    let tiny = warned(|set| set.train.reach_bins[20] = 21);
    assert!(tiny[0].starts_with("5.2 % of the training boxes measure less than 8 px at 320 px"), "{tiny:?}");
    assert!(warned(|set| set.train.reach_bins[9] = 400).is_empty(), "8 px at 320 px are enough");
    let broken = warned(|set| {
        set.train.images_dropped = 2;
        set.train.dropped_examples = vec!["images/x.jpg: cut short".into()];
        set.val.boxes_dropped = 1;
    });
    assert_eq!(broken[0], "train: 2 images cannot be used; the first: images/x.jpg: cut short");
    assert!(broken[1].starts_with("val: 1 box is left out as faulty"), "{broken:?}");
    let small = warned(|set| (set.val.images, set.val.boxes) = (29, 40));
    assert_eq!(small, ["29 validation images with 40 boxes: the score will jump"]);
    assert_eq!(warned(|set| set.train.boxes_per_image_max = 301).len(), 1);
}

proptest! {
    #[test]
    fn recommendations_hold_what_they_promise(
        images in 1usize..300_000,
        more in 0usize..300_000,
        longer_px in 10u32..6000,
        side_ppm in 0u32..1_000_000,
        smaller in 0u32..1_000_000,
        free in 20u32..44,
        gpu in any::<bool>(),
    ) {
        let room = Plain { free: 1 << free, gpu };
        let goals = [Goal::Fast, Goal::Balanced, Goal::Accurate];
        let set = data(images, longer_px, side_ppm);
        let mut sizes = Vec::new();
        for goal in goals {
            let got = of(&set, &room, &[], goal);
            prop_assert_eq!(&got, &of(&set, &room, &[], goal));
            let text = serde_json::to_string(&got).expect("JSON");
            prop_assert_eq!(&got, &serde_json::from_str::<Recommendation>(&text).expect("read"));
            prop_assert!(got.is_sound(goal, &[]));
            prop_assert!(got.imgsz < longer_px as usize + 32 || got.imgsz == 64);
            prop_assert!(got.batch.is_power_of_two() && got.batch <= images && got.batch <= 64);
            let needed = room.bytes(&got.model, got.imgsz, got.batch).expect("known");
            prop_assert!(needed <= room.free);
            prop_assert!((15..=500).contains(&got.epochs));
            // Smaller boxes never ask for a smaller input, more images never for a smaller network.
            let finer = data(images, longer_px, side_ppm.saturating_sub(smaller));
            let [wide, fine] = [&set, &finer].map(|set| rules::input_size(set, goal).value);
            prop_assert!(fine >= wide);
            let grown = data(images + more, longer_px, side_ppm);
            let [few, many] = [&set, &grown].map(|set| rules::network(set, gpu, goal).value);
            prop_assert!(many >= few);
            // More memory never makes the network smaller.
            let roomy = of(&set, &Plain { free: 2 * room.free, gpu }, &[], goal);
            prop_assert!(rung(&roomy.model) >= rung(&got.model));
            sizes.push((wide, few, rules::epochs(&set, 8, false, goal).value));
        }
        for pair in sizes.windows(2) {
            prop_assert!(pair[0].0 <= pair[1].0 && pair[0].1 <= pair[1].1 && pair[0].2 <= pair[1].2);
        }
    }
}

#[test]
fn the_ladder_is_what_this_program_trains() {
    assert!(LADDER.iter().all(|name| MODELS.contains(name)));
    assert_eq!(IMAGES_FROM.len() + 1, LADDER.len());
}
