//! The rules, each with where it comes from.
//!
//! | choice | rule | from |
//! |---|---|---|
//! | `imgsz` | nine tenths of the boxes measure 16 px (fast), 32 px (balanced) or 64 px (accurate) or more | the finest cells of the network are 8 px; COCO's measure calls boxes under 32 px small, and detectors score about half on them |
//! | | no more than the median image has, no less than 256, 320 or 640 px where the images have that | enlarged images hold no more detail; the reference trains at 640 |
//! | | at most 640, 960 or 1280 px | work and memory grow with the square |
//! | `model` | n below 1,500 training images, s below 10,000, m below 50,000, l below 100,000, else x; one less for fast, one more for accurate | a rule of thumb: on COCO's 118,000 images every step up still gains; small sets are learnt by heart by large networks |
//! | | on a CPU n, and s for accurate | the work of a step: s costs 3.3 times n, m 9 times |
//! | | smaller until a batch of 8 fits | batch normalisation needs several images for its statistics |
//! | `batch` | the largest power of two that fits the memory, at most 64 on a GPU and 16 on a CPU | `nbs` is 64: beyond it the step itself changes; a CPU gains nothing from more |
//! | | at least ten batches an epoch | warm-up lasts three epochs and has to be many steps |
//! | `epochs` | so many that 2,000, 5,000 or 12,000 batches are learnt, between 30 and 100, 50 and 300, 100 and 500; half of it from trained weights | a rule of thumb: the reference's recipe is 100 to 300 epochs on sets of usual size |
//! | `pretrained` | the best earlier run of the same network on the same data and classes | its score is comparable, and its weights fit |

use super::words::{bytes, count, counted, percent};
use super::{EarlierRun, Goal, Room, WarmStart};
use crate::data::metadata::Metadata;
use crate::train::error::TrainError;

/// A choice and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen<T> {
    /// What was chosen.
    pub value: T,
    /// Why, with the numbers.
    pub because: String,
}

/// The networks from small to large.
pub(super) const LADDER: [&str; 5] = ["yolov8n", "yolov8s", "yolov8m", "yolov8l", "yolov8x"];
/// Training images from which the next network of the ladder is taken.
pub(super) const IMAGES_FROM: [usize; 4] = [1_500, 10_000, 50_000, 100_000];
/// Input sizes are multiples of the coarsest stride.
const STRIDE: usize = 32;
/// No input is smaller, pixels.
const SIDE_MIN: usize = 64;
/// Images that batch normalisation should have.
const NORM_BATCH: usize = 8;
/// Largest batches.
const BATCH_MAX: (usize, usize) = (64, 16);
/// Batches that an epoch should have.
const BATCHES_MIN: usize = 10;

/// What a goal means in numbers.
struct Aim {
    /// Pixels that nine tenths of the boxes should measure.
    side_px: usize,
    /// Least and largest input, pixels.
    input_px: (usize, usize),
    /// Batches to be learnt.
    batches: usize,
    /// Fewest and most epochs.
    epochs: (usize, usize),
}

fn aim(goal: Goal) -> Aim {
    match goal {
        Goal::Fast => Aim { side_px: 16, input_px: (256, 640), batches: 2_000, epochs: (30, 100) },
        Goal::Balanced => Aim { side_px: 32, input_px: (320, 960), batches: 5_000, epochs: (50, 300) },
        Goal::Accurate => Aim { side_px: 64, input_px: (640, 1280), batches: 12_000, epochs: (100, 500) },
    }
}

fn up(pixels: usize) -> usize {
    pixels.div_ceil(STRIDE) * STRIDE
}

/// The input size that the boxes ask for.
pub fn input_size(data: &Metadata, goal: Goal) -> Chosen<usize> {
    let aim = aim(goal);
    let train = &data.train;
    let side = train.side_p10_ppm.max(1) as usize;
    // Boxes that no size makes large enough ask for the largest there is.
    let asked = up((aim.side_px * 1_000_000).div_ceil(side)).min(1 << 20);
    let native = up(train.longer_p50_px as usize).max(SIDE_MIN);
    let (least, most) = aim.input_px;
    let value = asked.max(least).min(native).min(most);
    let basis = format!(
        "nine tenths of the {} have a side of {} or more of the image's longer side, \
         which is {} px and more at {}",
        counted(train.boxes, "training box", "training boxes"),
        percent(side, 1_000_000),
        aim.side_px,
        if asked > 4096 { "more than 4096 px".into() } else { format!("{asked} px") }
    );
    let goal = goal.word();
    let native_px = train.longer_p50_px;
    let bound = if value == asked {
        String::new()
    } else if value < asked && value == most {
        format!("; {most} px is the most for the goal {goal}")
    } else if value > asked && value == least {
        format!("; {least} px is the least for the goal {goal}")
    } else {
        format!("; the median image is {native_px} px long, and enlarging adds no detail")
    };
    Chosen { value, because: format!("{basis}{bound}") }
}

/// The network that the data and the device are good for, as a rung of the ladder.
pub fn network(data: &Metadata, is_gpu: bool, goal: Goal) -> Chosen<usize> {
    let images = data.train.images;
    let rung = IMAGES_FROM.iter().filter(|from| images >= **from).count();
    let aimed = match goal {
        Goal::Fast => rung.saturating_sub(1),
        Goal::Balanced => rung,
        Goal::Accurate => (rung + 1).min(LADDER.len() - 1),
    };
    let most = match (is_gpu, goal) {
        (true, _) => LADDER.len() - 1,
        (false, Goal::Accurate) => 1,
        (false, _) => 0,
    };
    let range = match (rung.checked_sub(1).map(|at| IMAGES_FROM[at]), IMAGES_FROM.get(rung)) {
        (None, Some(below)) => format!("fewer than {}", count(*below)),
        (Some(from), Some(below)) => format!("{} to {}", count(from), count(*below)),
        (Some(from), None) => format!("{} and more", count(from)),
        (None, None) => unreachable!("the ladder has steps"),
    };
    let mut because =
        format!("{} is the size for {range} training images, and there are {}", LADDER[rung], count(images));
    if aimed != rung {
        let way = if aimed < rung { "smaller" } else { "larger" };
        because.push_str(&format!("; the goal {} takes one {way}, {}", goal.word(), LADDER[aimed]));
    }
    let value = aimed.min(most);
    if value < aimed {
        because.push_str(&format!("; on a CPU no more than {}, whose steps it can do", LADDER[most]));
    }
    Chosen { value, because }
}

/// What had to give way for the memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fitted {
    /// The largest batch of what was chosen.
    pub largest: usize,
    /// Why the network is smaller than the data ask for.
    pub smaller_network: Option<String>,
    /// Why the input is smaller than the boxes ask for.
    pub smaller_input: Option<String>,
}

/// Goes down the ladder, then down in size, until a batch of `NORM_BATCH` fits the memory.
///
/// # Errors
/// [`TrainError::Memory`] when one image of the least size does not fit the smallest network.
pub fn fit(
    data: &Metadata,
    room: &dyn Room,
    (rung, wanted): (usize, usize),
) -> Result<(String, usize, Fitted), TrainError> {
    let enough = NORM_BATCH.min(data.train.images.max(1));
    let mut fitted = Fitted::default();
    for rung in (0..=rung).rev() {
        let found = ask(room, LADDER[rung], wanted)?;
        if found.batch() >= enough {
            fitted.largest = found.batch();
            return Ok((LADDER[rung].into(), wanted, fitted));
        }
        let said = found.why(LADDER[rung], wanted);
        if rung > 0 {
            fitted.smaller_network.get_or_insert(said);
        } else {
            fitted.smaller_input = Some(said);
        }
    }
    let name = LADDER[0];
    let mut imgsz = wanted;
    loop {
        let smaller = ((imgsz * 3 / 4) / STRIDE * STRIDE).max(SIDE_MIN).min(imgsz);
        let is_last = smaller == imgsz;
        imgsz = smaller;
        match ask(room, name, imgsz)? {
            Found::Nothing(error) if is_last => return Err(error),
            found if is_last || found.batch() >= enough => {
                fitted.largest = found.batch();
                return Ok((name.into(), imgsz, fitted));
            }
            _ => {}
        }
    }
}

/// What fits of a network at an input size.
enum Found {
    Images(usize),
    /// Not even one image; the refusal.
    Nothing(TrainError),
}

fn ask(room: &dyn Room, name: &str, imgsz: usize) -> Result<Found, TrainError> {
    match room.largest(name, imgsz) {
        Ok(batch) => Ok(Found::Images(batch)),
        Err(error @ TrainError::Memory { .. }) => Ok(Found::Nothing(error)),
        Err(error) => Err(error),
    }
}

impl Found {
    fn batch(&self) -> usize {
        match self {
            Found::Images(batch) => *batch,
            Found::Nothing(_) => 0,
        }
    }

    /// Why this is too little.
    fn why(&self, name: &str, imgsz: usize) -> String {
        match self {
            Found::Images(batch) => {
                format!("only {} of {imgsz} px fit with {name}", counted(*batch, "image", "images"))
            }
            Found::Nothing(error) => format!("with {name} at {imgsz} px: {error}"),
        }
    }
}

/// The batch.
///
/// # Errors
/// The device does not answer.
pub fn batch(
    data: &Metadata,
    room: &dyn Room,
    (model, imgsz): (&str, usize),
    largest: usize,
) -> Result<Chosen<usize>, TrainError> {
    let images = data.train.images;
    let most = if room.is_gpu() { BATCH_MAX.0 } else { BATCH_MAX.1 };
    let of_epoch = (images / BATCHES_MIN).max(NORM_BATCH.min(images)).max(1);
    let limit = largest.min(most).min(of_epoch).max(1);
    let value = 1 << limit.ilog2();
    let reason = if limit == largest && largest < most.min(of_epoch) {
        "the largest power of two that fits".to_owned()
    } else if limit == most {
        let why = if room.is_gpu() { "the nominal batch" } else { "more does not make a CPU faster" };
        format!("at most {most}: {why}")
    } else if of_epoch <= NORM_BATCH {
        format!("{NORM_BATCH} images are what batch normalisation should have at least")
    } else {
        format!("{} should make {BATCHES_MIN} batches or more", counted(images, "image", "images"))
    };
    let needed = bytes(room.bytes(model, imgsz, value)?);
    let because = format!(
        "{reason}; it takes {needed} on {}, where a batch of {largest} would fit if nothing else used it",
        room.device()
    );
    Ok(Chosen { value, because })
}

/// The best earlier run whose weights fit: same data, same classes, same network.
pub fn warm_start(data: &Metadata, history: &[EarlierRun], model: &str) -> Chosen<Option<WarmStart>> {
    let same: Vec<&EarlierRun> = history
        .iter()
        .filter(|run| run.data_fingerprint == data.fingerprint && run.names == data.names)
        .filter(|run| run.map.is_finite())
        .collect();
    let best = |runs: &mut dyn Iterator<Item = &&EarlierRun>| -> Option<EarlierRun> {
        // Of equal runs the one that history names first, which is the newest.
        runs.fold(None, |best: Option<&EarlierRun>, run| match best {
            Some(best) if best.map >= run.map => Some(best),
            _ => Some(run),
        })
        .cloned()
    };
    if let Some(run) = best(&mut same.iter().filter(|run| run.model == model)) {
        let because = format!(
            "job {} reached mAP50-95 {:.4} with {model} on the same data and classes, the best of {}",
            run.task_id,
            run.map,
            counted(same.iter().filter(|run| run.model == model).count(), "such run", "such runs")
        );
        // Four places are what a cache in decimal text keeps exactly.
        let map = (run.map * 1e4).round() / 1e4;
        let warm = WarmStart { task_id: run.task_id, weights: run.weights, map };
        return Chosen { value: Some(warm), because };
    }
    let because = match best(&mut same.iter()) {
        Some(run) => format!(
            "job {} reached mAP50-95 {:.4} on the same data, but the weights of {} do not fit {model}",
            run.task_id, run.map, run.model
        ),
        None => "no earlier run on the same data and classes is known here".to_owned(),
    };
    Chosen { value: None, because }
}

/// The epochs.
pub fn epochs(data: &Metadata, batch: usize, is_warm: bool, goal: Goal) -> Chosen<u32> {
    let Aim { batches, epochs: (least, most), .. } = aim(goal);
    let images = data.train.images.max(1);
    let of_epoch = images.div_ceil(batch);
    let asked = batches.div_ceil(of_epoch).div_ceil(10) * 10;
    let cold = asked.clamp(least, most);
    let value = if is_warm { cold.div_ceil(2) } else { cold };
    let mut because = format!(
        "{} make {} an epoch; the goal {} is {} batches, {asked} epochs",
        counted(images, "image", "images"),
        counted(of_epoch, "batch", "batches"),
        goal.word(),
        count(batches)
    );
    if cold != asked {
        let which = if cold == most { "most" } else { "least" };
        because.push_str(&format!(", of which {cold} is the {which}"));
    }
    if is_warm {
        because.push_str("; half of it, since it starts from trained weights");
    }
    Chosen { value: value as u32, because }
}
