//! What to look at before training.

use super::words::{count, counted, percent};
use crate::data::metadata::{Metadata, SplitMetadata};

/// Classes named one by one; of more only the number is told.
const CLASSES_SHOWN: usize = 5;
/// The commonest class may have so many times the boxes of the rarest.
const IMBALANCE_MAX: usize = 10;
/// Boxes that a class should have.
const CLASS_BOXES_MIN: usize = 50;
/// Share of boxes under 8 px that is worth a word, in hundredths.
const TINY_PERCENT: usize = 5;
/// Share of images without boxes that is worth a word, in hundredths.
const UNLABELLED_PERCENT: usize = 10;
/// Validation images below which a score says little.
const VAL_IMAGES_MIN: usize = 30;
/// Boxes of an image that are reported at most (`max_det`).
const MAX_DET: usize = 300;
/// Longest box that the network can describe, pixels: 15 cells of 32 px to either side.
const BOX_PX_MAX: usize = 2 * 15 * 32;

/// All warnings, the gravest first.
pub(super) fn warnings(data: &Metadata, imgsz: usize) -> Vec<String> {
    let mut out = Vec::new();
    duplicates(data, &mut out);
    faulty(data, &mut out);
    classes(data, &mut out);
    unlabelled(&data.train, &mut out);
    boxes(data, imgsz, &mut out);
    validation(data, &mut out);
    out
}

fn duplicates(data: &Metadata, out: &mut Vec<String>) {
    let found = &data.duplicates;
    let pair = |examples: &[[String; 2]]| match examples.first() {
        Some([first, second]) => format!(" (for example {second} equals {first})"),
        None => String::new(),
    };
    if found.across > 0 {
        out.push(format!(
            "{} of {} validation images are training images too{}: the score will flatter",
            count(found.across),
            count(data.val.images),
            pair(&found.across_examples)
        ));
    }
    let within = found.within_train + found.within_val;
    if within > 0 {
        out.push(format!(
            "{} within a split ({} in train, {} in val){}",
            counted(within, "image is there twice", "images are there twice"),
            count(found.within_train),
            count(found.within_val),
            pair(&found.examples)
        ));
    }
}

fn faulty(data: &Metadata, out: &mut Vec<String>) {
    for (name, split) in [("train", &data.train), ("val", &data.val)] {
        if split.images_dropped > 0 {
            let first = split.dropped_examples.first().map(|e| format!("; the first: {e}"));
            out.push(format!(
                "{name}: {} cannot be used{}",
                counted(split.images_dropped, "image", "images"),
                first.unwrap_or_default()
            ));
        }
        if split.boxes_dropped > 0 {
            out.push(format!(
                "{name}: {} left out as faulty; `boxwright dataset check` names them",
                counted(split.boxes_dropped, "box is", "boxes are")
            ));
        }
    }
}

fn classes(data: &Metadata, out: &mut Vec<String>) {
    let named = |which: &mut dyn Iterator<Item = usize>| -> Option<String> {
        let which: Vec<usize> = which.collect();
        let list: Vec<String> = which
            .iter()
            .take(CLASSES_SHOWN)
            .filter_map(|i| Some(format!("`{}`", data.names.get(*i)?)))
            .collect();
        let more = which.len().saturating_sub(CLASSES_SHOWN);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        (!which.is_empty()).then(|| format!("{}{more}", list.join(", ")))
    };
    let (train, val) = (&data.train.class_counts, &data.val.class_counts);
    if let Some(names) = named(&mut (0..train.len()).filter(|&i| train[i] == 0)) {
        out.push(format!("no training box of {names}: nothing can be learnt of it"));
    }
    if let Some(names) = named(&mut (0..train.len().min(val.len())).filter(|&i| train[i] > 0 && val[i] == 0))
    {
        out.push(format!("no validation box of {names}: it is not measured"));
    }
    if let Some(names) = named(&mut (0..train.len()).filter(|&i| (1..CLASS_BOXES_MIN).contains(&train[i]))) {
        out.push(format!("fewer than {CLASS_BOXES_MIN} training boxes of {names}: few to learn from"));
    }
    let present = || (0..train.len()).filter(|&i| train[i] > 0);
    let (Some(most), Some(least)) =
        (present().max_by_key(|&i| (train[i], train.len() - i)), present().min_by_key(|&i| (train[i], i)))
    else {
        return;
    };
    if train[most] / train[least] >= IMBALANCE_MAX {
        out.push(format!(
            "classes are uneven: `{}` has {} training boxes, `{}` {}; `cls_pw: 0.5` gives rare ones more weight",
            data.names.get(most).map_or("?", String::as_str),
            count(train[most]),
            data.names.get(least).map_or("?", String::as_str),
            count(train[least])
        ));
    }
}

fn unlabelled(train: &SplitMetadata, out: &mut Vec<String>) {
    let unlabelled = train.unlabelled();
    if unlabelled * 100 > train.images * UNLABELLED_PERCENT {
        out.push(format!(
            "{} of the training images have no boxes ({} without a label file, {} with an empty one): they are \
             learnt as background; are they?",
            percent(unlabelled, train.images),
            count(train.labels_missing),
            count(train.labels_empty)
        ));
    }
}

fn boxes(data: &Metadata, imgsz: usize, out: &mut Vec<String>) {
    let train = &data.train;
    let tiny = train.tiny_boxes(imgsz);
    if tiny * 100 > train.boxes * TINY_PERCENT {
        out.push(format!(
            "{} of the training boxes measure less than 8 px at {imgsz} px, less than one cell of the finest level: \
             cut the images into tiles to find them",
            percent(tiny, train.boxes)
        ));
    }
    let widest = (train.widest_ppm as usize * imgsz).div_ceil(1_000_000);
    if widest > BOX_PX_MAX {
        out.push(format!(
            "the longest box is {} px at {imgsz} px; the network describes boxes up to {BOX_PX_MAX} px",
            count(widest)
        ));
    }
    let crowd = train.boxes_per_image_max.max(data.val.boxes_per_image_max);
    if crowd > MAX_DET {
        out.push(format!("an image has {} boxes; `max_det` reports {MAX_DET} of an image", count(crowd)));
    }
}

fn validation(data: &Metadata, out: &mut Vec<String>) {
    let val = &data.val;
    if val.boxes == 0 {
        out.push("the validation images have no box: nothing can be measured".to_owned());
    } else if val.images < VAL_IMAGES_MIN {
        let images = counted(val.images, "validation image", "validation images");
        out.push(format!("{images} with {}: the score will jump", counted(val.boxes, "box", "boxes")));
    }
}
