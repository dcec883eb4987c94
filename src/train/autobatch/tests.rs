//! The choice on scripted memories, and the bytes of real plans.

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A device whose free memory other processes change: before each allocation, the next of `taken` bytes go to them.
struct Scripted {
    total: u64,
    free: u64,
    held: u64,
    taken: Vec<u64>,
    /// Largest piece that the driver gives, whatever is free.
    piece: u64,
    allocations: usize,
}

impl Scripted {
    fn new(total: u64, free: u64) -> Scripted {
        Scripted { total, free, held: 0, taken: Vec::new(), piece: u64::MAX, allocations: 0 }
    }

    fn others_take(self, taken: &[u64]) -> Scripted {
        Scripted { taken: taken.iter().rev().copied().collect(), ..self }
    }
}

impl DeviceMemory for Scripted {
    fn free(&mut self) -> u64 {
        self.free
    }

    fn total(&self) -> u64 {
        self.total
    }

    fn try_allocate(&mut self, bytes: u64) -> Result<(), NoRoom> {
        self.free += std::mem::take(&mut self.held);
        let taken = self.taken.pop().unwrap_or(0);
        self.free = self.free.saturating_sub(taken);
        self.allocations += 1;
        if bytes > self.free || bytes > self.piece {
            return Err(NoRoom);
        }
        self.free -= bytes;
        self.held = bytes;
        Ok(())
    }
}

/// 1 GiB for everything that does not depend on the batch, 100 MiB for each image.
fn usual(batch: usize) -> u64 {
    GIB + batch as u64 * 100 * MIB
}

fn wish(batch: Batch) -> Wish {
    Wish { batch, policy: BatchPolicy::Refuse, images: 10_000, auto_share: AUTO_SHARE_GPU, share_max: 1.0 }
}

fn accumulate(batch: u32) -> Wish {
    Wish { policy: BatchPolicy::Accumulate, ..wish(Batch::Images(batch)) }
}

/// The largest batch of `usual` that fits.
fn fits(limit: f64) -> usize {
    ((limit - GIB as f64) / (100 * MIB) as f64) as usize
}

#[test]
fn bisection_finds_the_edge() {
    for edge in [0, 1, 2, 63, 64, 65, 100] {
        assert_eq!(largest(|n| n <= edge, 100), edge.min(100));
    }
}

#[test]
fn automatic_batches_fill_the_share_of_what_others_leave_free() {
    // 16 GiB, of which another process has 6.
    let choose =
        |batch| choose(&wish(batch), &mut Scripted::new(16 * GIB, 10 * GIB), &usual).expect("it fits");
    assert_eq!(choose(Batch::Auto).batch, fits(0.9 * 10.0 * GIB as f64));
    assert_eq!(choose(Batch::Fraction(0.5)).batch, fits(0.5 * 10.0 * GIB as f64));
    assert_eq!(choose(Batch::Auto).passes, 1);
}

#[test]
fn what_was_chosen_is_allocated() {
    let mut memory = Scripted::new(16 * GIB, 16 * GIB);
    let choice = choose(&wish(Batch::Auto), &mut memory, &usual).expect("it fits");
    assert_eq!((memory.held, memory.allocations), (choice.bytes, 1));
    assert_eq!(choice.bytes, usual(choice.batch));
}

#[test]
fn caps_of_the_service_and_the_job_hold() {
    let capped = |batch, share_max| {
        choose(&Wish { share_max, ..wish(batch) }, &mut Scripted::new(16 * GIB, 15 * GIB), &usual)
    };
    // A cap is a share of all memory, not of what is free.
    assert_eq!(capped(Batch::Auto, 0.3).expect("it fits").batch, fits(0.3 * 16.0 * GIB as f64));
    assert_eq!(capped(Batch::Fraction(0.99), 0.3).expect("it fits").batch, fits(0.3 * 16.0 * GIB as f64));
    assert_eq!(capped(Batch::Images(30), 0.3).expect("it fits").batch, 30);
    let refusal = capped(Batch::Images(64), 0.3).expect_err("over the cap");
    assert_eq!((refusal.batch, refusal.largest), (64, fits(0.3 * 16.0 * GIB as f64)));
    assert_eq!(refusal.needed, usual(64));
    assert!(refusal.limit < refusal.needed && refusal.free == 15 * GIB);
}

#[test]
fn nothing_fits() {
    let mut memory = Scripted::new(16 * GIB, 900 * MIB);
    for wish in [wish(Batch::Auto), wish(Batch::Fraction(0.9)), wish(Batch::Images(8)), accumulate(8)] {
        let refusal = choose(&wish, &mut memory, &usual).expect_err("not even one image");
        assert_eq!(refusal.largest, 0);
        let text = refusal.error(640).to_string();
        assert!(text.contains("640 px") && text.contains("largest batch that fits is 0"), "{text}");
    }
    assert_eq!(memory.allocations, 0, "nothing is tried that cannot be");
}

#[test]
fn another_process_is_faster_twice() {
    let mut memory = Scripted::new(16 * GIB, 16 * GIB).others_take(&[4 * GIB, 3 * GIB]);
    let choice = choose(&wish(Batch::Auto), &mut memory, &usual).expect("the third choice");
    assert_eq!(memory.allocations, 3);
    assert_eq!(choice.batch, fits(0.9 * 9.0 * GIB as f64));
    assert_eq!(memory.held, choice.bytes);
}

#[test]
fn a_race_that_never_ends_is_given_up() {
    let mut memory = Scripted::new(64 * GIB, 64 * GIB).others_take(&[8 * GIB; 7]);
    let refusal = choose(&wish(Batch::Auto), &mut memory, &usual).expect_err("always too late");
    assert_eq!(memory.allocations, ATTEMPTS_MAX);
    assert!(refusal.largest > 0 && refusal.needed > refusal.limit, "{refusal:?}");
}

#[test]
fn memory_in_pieces_gives_a_smaller_batch() {
    let mut memory = Scripted::new(16 * GIB, 16 * GIB);
    memory.piece = usual(140);
    let choice = choose(&wish(Batch::Auto), &mut memory, &usual).expect("a smaller request");
    assert!(choice.batch <= 140 && memory.allocations <= ATTEMPTS_MAX, "{choice:?}");
}

#[test]
fn explicit_batches_are_honoured_refused_or_cut() {
    let memory = || Scripted::new(8 * GIB, 4 * GIB);
    let (edge, whole) = (fits(4.0 * GIB as f64), wish(Batch::Images(16)));
    assert_eq!(edge, 30);
    let choice = choose(&whole, &mut memory(), &usual).expect("it fits");
    assert_eq!((choice.batch, choice.passes), (16, 1));
    let refusal = choose(&wish(Batch::Images(64)), &mut memory(), &usual).expect_err("too large");
    assert_eq!((refusal.batch, refusal.needed, refusal.free, refusal.largest), (64, usual(64), 4 * GIB, 30));
    for (batch, parts) in
        [(30, (30, 1)), (64, (16, 4)), (60, (30, 2)), (66, (22, 3)), (61, (21, 3)), (31, (16, 2))]
    {
        let choice = choose(&accumulate(batch), &mut memory(), &usual).expect("it is cut");
        assert_eq!((choice.batch, choice.passes), parts, "batch {batch}");
        assert!(choice.batch * choice.passes >= batch as usize && choice.bytes <= 4 * GIB);
    }
}

#[test]
fn an_explicit_batch_lost_in_a_race_is_refused_or_cut() {
    let memory = || Scripted::new(16 * GIB, 12 * GIB).others_take(&[6 * GIB]);
    let refusal = choose(&wish(Batch::Images(64)), &mut memory(), &usual).expect_err("6 GiB are left");
    assert_eq!((refusal.free, refusal.largest), (6 * GIB, fits(6.0 * GIB as f64)));
    let choice = choose(&accumulate(64), &mut memory(), &usual).expect("it is cut");
    assert_eq!((choice.batch, choice.passes), (32, 2));
}

#[test]
fn no_batch_is_larger_than_the_dataset() {
    for batch in [Batch::Auto, Batch::Fraction(0.9), Batch::Images(64)] {
        let small = Wish { images: 7, ..wish(batch) };
        let choice = choose(&small, &mut Scripted::new(80 * GIB, 80 * GIB), &usual).expect("it fits");
        assert_eq!((choice.batch, choice.passes), (7, 1));
    }
    let choice = choose(&wish(Batch::Auto), &mut Scripted::new(1 << 50, 1 << 50), &usual).expect("it fits");
    assert_eq!(choice.batch, AUTO_BATCH_MAX);
}

/// A footprint of round figures.
fn footprint<'a>(
    training: &'a dyn Fn(usize) -> u64,
    validation: &'a dyn Fn(usize) -> u64,
    loss: &'a dyn Fn(usize, usize) -> u64,
) -> Footprint<'a> {
    Footprint {
        training,
        validation,
        loss,
        boxes_max: 20,
        parameter_bytes: 50 * MIB,
        input_image_bytes: MIB,
        ring: 3,
        fixed_bytes: 200 * MIB,
    }
}

#[test]
fn one_image_with_many_boxes_makes_the_batch_smaller() {
    let training = |n: usize| n as u64 * 100 * MIB;
    let validation = |n: usize| n as u64 * 20 * MIB;
    // Each box has its candidates.
    let loss = |n: usize, boxes: usize| n as u64 * MIB + boxes as u64 * 40_000;
    let batch_of = |boxes_max| {
        let footprint = Footprint { boxes_max, ..footprint(&training, &validation, &loss) };
        let mut memory = Scripted::new(8 * GIB, 8 * GIB);
        let choice = choose(&wish(Batch::Auto), &mut memory, &|n| footprint.bytes(n)).expect("it fits");
        assert_eq!(choice.bytes, footprint.bytes(choice.batch));
        choice.batch
    };
    let (few, many) = (batch_of(20), batch_of(500));
    assert!(many < few && many > few / 2, "{few} {many}");
}

#[test]
fn a_validation_batch_can_be_the_largest_thing() {
    let (training, loss) = (|n: usize| n as u64 * 10 * MIB, |_: usize, _: usize| 0);
    let (small, large) = (|n: usize| n as u64 * MIB, |n: usize| n as u64 * 30 * MIB);
    let bytes = |validation: &dyn Fn(usize) -> u64| footprint(&training, validation, &loss).bytes(4);
    assert_eq!(bytes(&large) - bytes(&small), (8 * 30 - 4 * 10) * MIB);
}

#[test]
fn the_largest_size_of_multi_scale_counts() {
    assert_eq!(largest_side(640, 0.0, 32), 640);
    assert_eq!(largest_side(640, 0.5, 32), 960);
    assert_eq!(largest_side(64, 0.1, 32), 96);
    let bytes_at = |share: f64| {
        let side = largest_side(64, share, 32);
        let detector = Detector::build("yolov8n", 3, side, side).expect("a shipped model");
        let params = ParamSet::new(&detector.graph);
        move |batch: usize| host_bytes(&detector, &params, batch)
    };
    let (fixed, scaled) = (bytes_at(0.0), bytes_at(0.5));
    let mut memory = Scripted::new(1 << 40, fixed(40));
    let whole = Wish { auto_share: 1.0, ..wish(Batch::Auto) };
    assert_eq!(choose(&whole, &mut memory, &fixed).expect("it fits").batch, 40);
    let mut memory = Scripted::new(1 << 40, fixed(40));
    let smaller = choose(&whole, &mut memory, &scaled).expect("it fits").batch;
    assert!((12..=24).contains(&smaller), "96 px need about 2.25 times as much as 64 px: {smaller}");
}

#[test]
fn the_host_is_chosen_for_as_before() {
    let detector = Detector::build("yolov8n", 3, 64, 64).expect("a shipped model");
    let params = ParamSet::new(&detector.graph);
    let need = |batch| host_bytes(&detector, &params, batch);
    let choose = |batch, images, available| {
        let wish = Wish { images, auto_share: AUTO_SHARE_HOST, ..wish(batch) };
        let mut memory = HostMemory { available, total: u64::MAX >> 8 };
        choose(&wish, &mut memory, &need).map(|choice| choice.batch)
    };
    assert_eq!(choose(Batch::Images(16), 1000, need(16)), Ok(16));
    assert_eq!(choose(Batch::Images(16), 5, need(16)), Ok(5));
    assert_eq!(choose(Batch::Fraction(0.5), 1000, 2 * need(7) + 2), Ok(7));
    assert_eq!(choose(Batch::Auto, 3, u64::MAX >> 8), Ok(3));
    let refusal = choose(Batch::Images(16), 1000, need(9)).expect_err("too large");
    assert_eq!((refusal.batch, refusal.largest), (16, 9));
    match refusal.error(64) {
        TrainError::Memory { batch: 16, imgsz: 64, largest: 9, .. } => {}
        other => panic!("{other:?}"),
    }
    let refusal = choose(Batch::Auto, 10, 1000).expect_err("nothing fits");
    assert_eq!((refusal.batch, refusal.largest), (1, 0));
}
