//! The device's batches against the CPU's.

use std::path::Path;
use std::sync::Arc;

use super::kernels::{AugmentKernels, SPARE_BYTES};
use super::tables::{Source as Place, Tables};
use super::*;
use crate::data::augment::{Composer, PixelBox, PlanContext, SampleLayout, SamplePlan, Scale, Source};
use crate::data::cache::CacheArgs;
use crate::data::dataset::{Sample, SplitName};
use crate::data::labels::Label;
use crate::data::{Batch, Image, TrainLoader, resize_batch};
use crate::engine::device::cuda::{Buffer, Stream, testing::devices};
use crate::engine::rng::{Rng, Use};

/// Everything at once.
fn wild() -> AugmentArgs {
    AugmentArgs {
        degrees: 30.0,
        shear: 8.0,
        flipud: 0.5,
        bgr: 0.3,
        mosaic: 0.7,
        mixup: 0.5,
        cutmix: 0.6,
        ..AugmentArgs::default()
    }
}

fn noise(rng: &mut Rng, height: usize, width: usize) -> Image {
    // Smooth in places, so that a wrong neighbour shows and a wrong rounding too.
    let flat = rng.next_u32() as u8;
    let pixels =
        (0..height * width * 3).map(|i| if i / 40 % 3 == 0 { flat } else { rng.next_u32() as u8 }).collect();
    Image::from_pixels(height, width, pixels)
}

/// Images in memory, each with a few boxes.
struct Gallery {
    images: Vec<Arc<Image>>,
    labels: Vec<Vec<Label>>,
}

impl Gallery {
    fn new(count: usize, side: usize, rng: &mut Rng) -> Gallery {
        let images = (0..count).map(|_| {
            let (h, w) = (1 + rng.below(side), 1 + rng.below(side));
            Arc::new(noise(rng, h, w))
        });
        let images = images.collect();
        Gallery { images, labels: (0..count).map(|_| labels(rng)).collect() }
    }
}

fn labels(rng: &mut Rng) -> Vec<Label> {
    (0..rng.below(4))
        .map(|_| {
            let (w, h) = (rng.range(0.05, 0.4), rng.range(0.05, 0.4));
            let (cx, cy) = (rng.range(w / 2.0, 1.0 - w / 2.0), rng.range(h / 2.0, 1.0 - h / 2.0));
            Label { class: rng.below(3) as u32, cxcywh: [cx as f32, cy as f32, w as f32, h as f32] }
        })
        .collect()
}

impl Source for Gallery {
    fn image(&self, index: u32) -> Result<Arc<Image>, DataError> {
        Ok(Arc::clone(&self.images[index as usize]))
    }

    fn boxes(&self, index: u32, height: usize, width: usize) -> Vec<PixelBox> {
        self.labels[index as usize]
            .iter()
            .map(|l| PixelBox::from_cxcywh(l.class, l.cxcywh, width as f32, height as f32))
            .collect()
    }
}

/// Images one behind the other in a buffer that they fill.
fn upload(device: &Arc<Device>, stream: &Stream, images: &[Arc<Image>]) -> (Buffer, Vec<Place>) {
    let mut bytes = Vec::new();
    let mut places = Vec::new();
    for image in images {
        // Not at whole words: any address must do.
        places.push((bytes.len() as u64, image.width));
        bytes.extend_from_slice(&image.pixels);
    }
    bytes.resize(bytes.len() + SPARE_BYTES, 0xff);
    let buffer = device.allocate(bytes.len()).expect("memory");
    stream.upload(&buffer, 0, &bytes).expect("a copy");
    let place = |(offset, width)| Place { address: buffer.pointer() + offset, width };
    let places = places.into_iter().map(place).collect();
    (buffer, places)
}

/// Makes `plans` on the device; the buffer must be untouched behind the images.
fn made(
    device: &Arc<Device>,
    plans: &[SamplePlan],
    gallery: &Gallery,
    imgsz: usize,
    hw: (usize, usize),
) -> (Vec<u8>, Vec<Vec<PixelBox>>, bool) {
    let stream = device.stream().expect("a stream");
    let kernels = AugmentKernels::load(device).expect("it compiles");
    let (_memory, places) = upload(device, &stream, &gallery.images);
    let sizes = |i: u32| (gallery.images[i as usize].height, gallery.images[i as usize].width);
    let boxes = |i: u32, h: usize, w: usize| gallery.boxes(i, h, w);
    let (mut tables, mut all_boxes) = (Tables::default(), Vec::new());
    for plan in plans {
        let layout = SampleLayout::new(plan, imgsz, hw, &sizes, &boxes);
        tables.push(plan, &layout, hw, &|i| places[i as usize]);
        all_boxes.push(layout.boxes);
    }
    let mut bytes = vec![0u8; Tables::bytes_max(plans.len(), hw.0, hw.1)];
    let offsets = tables.write(&mut bytes);
    let table = device.allocate(bytes.len()).expect("memory");
    stream.upload(&table, 0, &bytes).expect("a copy");
    let count = plans.len() * hw.0 * hw.1 * 3;
    let out = device.allocate(count + 64).expect("memory");
    // SAFETY: the buffer is that long.
    unsafe { stream.fill(out.pointer(), 0xab, count + 64) }.expect("a fill");
    // SAFETY: all buffers outlive the copy back, which waits.
    unsafe { kernels.launch(&stream, &tables, (table.pointer(), offsets), out.pointer(), hw) }.expect("runs");
    let mut pixels = vec![0u8; count + 64];
    stream.download(&out, 0, &mut pixels).expect("a copy");
    assert!(pixels[count..].iter().all(|&v| v == 0xab), "written past the end");
    pixels.truncate(count);
    (pixels, all_boxes, tables.needs_everything())
}

#[test]
fn the_kernel_equals_the_composer() {
    let plain = AugmentArgs { flipud: 0.5, bgr: 0.5, ..AugmentArgs::default() };
    let bent = AugmentArgs { perspective: 0.002, ..wild() };
    let single = AugmentArgs { hsv_h: 0.5, ..wild() }.closed();
    let still = AugmentArgs::none();
    let far = AugmentArgs { scale: Scale::Range(0.05, 4.0), translate: 1.0, ..plain.clone() };
    let cases = [
        (&plain, 40, (40, 40)),
        (&plain, 32, (32, 64)),
        (&far, 64, (64, 64)),
        (&wild(), 40, (40, 40)),
        (&wild(), 24, (37, 51)),
        (&bent, 33, (33, 70)),
        (&single, 48, (48, 48)),
        (&single, 17, (17, 1)),
        (&still, 29, (29, 33)),
    ];
    for device in devices() {
        let mut rng = Rng::new(31, Use::Test, 0, 0);
        for (case, (args, imgsz, hw)) in cases.iter().enumerate() {
            let gallery = Gallery::new(9, *imgsz, &mut rng);
            let order: Vec<u32> = (0..9).collect();
            let plans: Vec<SamplePlan> = (0..9)
                .map(|position| {
                    let (seed, order) = (case as u64, &order[..]);
                    let context = PlanContext { seed, epoch: 0, order, position, imgsz: *imgsz, out_hw: *hw };
                    SamplePlan::draw(args, &context)
                })
                .collect();
            let (pixels, boxes, everything) = made(&device, &plans, &gallery, *imgsz, *hw);
            assert_eq!(everything, args.degrees > 0.0, "case {case}");
            let mut composer = Composer::default();
            for (i, (plan, got)) in plans.iter().zip(pixels.chunks_exact(hw.0 * hw.1 * 3)).enumerate() {
                let mut want = vec![0u8; got.len()];
                let want_boxes = composer.compose(plan, *imgsz, *hw, &gallery, &mut want).expect("composed");
                let wrong = got.iter().zip(&want).position(|(a, b)| a != b);
                assert_eq!(wrong, None, "case {case}, image {i}: {plan:?}");
                assert_eq!(boxes[i], want_boxes);
            }
        }
    }
}

#[test]
fn a_transform_that_cannot_be_undone_is_grey() {
    for device in devices() {
        let mut rng = Rng::new(32, Use::Test, 0, 0);
        let gallery = Gallery::new(1, 20, &mut rng);
        let context =
            PlanContext { seed: 0, epoch: 0, order: &[0], position: 0, imgsz: 20, out_hw: (20, 20) };
        let mut plan = SamplePlan::draw(&AugmentArgs::none(), &context);
        plan.base.perspective.scale = 0.0;
        let (pixels, _, _) = made(&device, &[plan], &gallery, 20, (20, 20));
        assert!(pixels.iter().all(|&v| v == crate::data::augment::BORDER));
    }
}

#[test]
fn scaling_equals_the_cpu() {
    for device in devices() {
        let stream = device.stream().expect("a stream");
        let mut resizer = DeviceResizer::new(&device, 3, (96, 64)).expect("memory");
        let mut rng = Rng::new(33, Use::Test, 0, 0);
        for ((h, w), to) in [
            ((32, 64), (96, 64)),
            ((64, 32), (32, 32)),
            ((5, 7), (11, 3)),
            ((1, 1), (4, 6)),
            ((32, 64), (64, 64)),
        ] {
            let images: Vec<u8> = (0..3).flat_map(|_| noise(&mut rng, h, w).pixels).collect();
            let from = device.allocate(images.len() + SPARE_BYTES).expect("memory");
            stream.upload(&from, 0, &images).expect("a copy");
            // SAFETY: the buffers live on; the result is copied back before the next call.
            let address = unsafe { resizer.resize(&stream, from.pointer(), 3, (h, w), to) }.expect("runs");
            let out = device.allocate(3 * to.0 * to.1 * 3).expect("memory");
            // SAFETY: both are that long.
            unsafe { stream.copy(out.pointer(), address, out.bytes()) }.expect("a copy");
            let mut got = vec![0u8; out.bytes()];
            stream.download(&out, 0, &mut got).expect("a copy");
            let mut batch = Batch { images, n: 3, h, w, ..Batch::default() };
            resize_batch(&mut batch, to.0, to.1);
            assert_eq!(got, batch.images, "{h}x{w} to {to:?}");
        }
    }
}

/// A split of images of many shapes, written to a folder.
fn split(folder: &Path, count: usize) -> Split {
    let mut rng = Rng::new(34, Use::Test, 0, 0);
    let samples = (0..count).map(|i| {
        let image = noise(&mut rng, 20 + 7 * (i % 9), 20 + 11 * (i % 6));
        let path = folder.join(format!("{i:03}.png"));
        let (width, height) = (image.width as u32, image.height as u32);
        image::save_buffer(&path, &image.pixels, width, height, image::ExtendedColorType::Rgb8)
            .expect("written");
        Sample { path, width, height, labels: labels(&mut rng) }
    });
    Split { name: SplitName::Train, samples: Arc::new(samples.collect()) }
}

fn args() -> LoaderArgs {
    let cache = CacheArgs { ram_bytes_max: Some(1 << 20), ..CacheArgs::default() };
    LoaderArgs { imgsz: 64, batch: 4, workers: 2, seed: 5, cache, ..LoaderArgs::default() }
}

/// Takes the rest of the epoch from both and compares.
fn compare(device: &Arc<Device>, cpu: &mut TrainLoader, gpu: &mut DeviceLoader, most: usize) -> usize {
    let stream = device.stream().expect("a stream");
    let mut count = 0;
    while count < most {
        let (want, got) = (cpu.next().expect("made"), gpu.next().expect("made"));
        let (Some(want), Some(got)) = (&want, got) else {
            assert!(want.is_none());
            break;
        };
        stream.wait(&got.ready).expect("ordered");
        assert_eq!(gpu.buffers()[got.buffer()], got.images);
        assert_eq!((got.n, got.h, got.w), (want.n, want.h, want.w));
        let out = device.allocate(want.images.len()).expect("memory");
        // SAFETY: the batch holds that many bytes and is not given back yet.
        unsafe { stream.copy(out.pointer(), got.images, out.bytes()) }.expect("a copy");
        let done = stream.mark().expect("marked");
        assert_eq!((&got.targets, &got.samples), (&want.targets, &want.samples));
        assert_eq!(got.swapped, want.swapped);
        gpu.recycle(got, &done).expect("given back");
        let mut pixels = vec![0u8; out.bytes()];
        stream.download(&out, 0, &mut pixels).expect("a copy");
        assert!(pixels == want.images, "batch {count} differs");
        count += 1;
    }
    count
}

#[test]
fn the_loader_equals_the_cpu_loader() {
    let folder = tempfile::tempdir().expect("a folder");
    let split = split(folder.path(), 27);
    for device in devices() {
        // All fit, twice; budgets so small that images come and go: for mosaics, for single images, for shapes.
        let calm = AugmentArgs::default();
        let turned = AugmentArgs { degrees: 10.0, ..calm.clone() };
        let cases = [
            (calm.clone(), args(), None),
            (wild(), args(), Some(1)),
            (turned, LoaderArgs { batch: 2, ..args() }, Some(1)),
            (wild().closed(), args(), Some(60_000)),
            (calm, LoaderArgs { rect: true, stride: 32, ..args() }, Some(100_000)),
        ];
        for (case, (augment, args, bytes)) in cases.into_iter().enumerate() {
            let limits = DeviceLoaderArgs { image_bytes_max: bytes, buffers: 2 + case % 2 };
            let batches = 27usize.div_ceil(args.batch);
            let mut cpu = TrainLoader::new(&split, args.clone(), augment.clone()).expect("a loader");
            let mut gpu = DeviceLoader::new(&device, &split, args, augment, limits).expect("a loader");
            assert_eq!(gpu.batches(), batches);
            assert_eq!(
                (gpu.input_max(), gpu.boxes_per_image_max()),
                (cpu.input_max(), cpu.boxes_per_image_max())
            );
            assert!(gpu.next().expect("nothing begun").is_none());
            // A whole epoch, one that is broken off, one entered in the middle, one with the mosaic closed.
            for (epoch, first, most, close) in
                [(0, 0, 99, false), (1, 0, 2, false), (1, 3, 99, false), (2, 5, 99, true)]
            {
                cpu.start_epoch(epoch, first, close);
                gpu.start_epoch(epoch, first, close);
                assert_eq!(
                    compare(&device, &mut cpu, &mut gpu, most),
                    most.min(batches - first),
                    "case {case}"
                );
            }
            let counts = gpu.counts();
            // With next to no room an image may always be gone before it is wanted again.
            assert!(counts.hits > 0 || case >= 2, "case {case}: {counts:?}");
            assert!(counts.bytes > 0 && counts.misses >= 27, "case {case}: {counts:?}");
            assert_eq!(counts.evictions > 0, case >= 2, "case {case}: {counts:?}");
            assert_eq!(counts.misses > 27, case >= 2, "case {case}: {counts:?}");
            assert_eq!(gpu.notes().iter().any(|note| note.contains("MiB of images")), case == 2);
            assert!(gpu.wait_seconds() >= 0.0);
        }
    }
}

#[test]
fn a_bad_image_ends_the_epoch_and_not_the_loader() {
    let folder = tempfile::tempdir().expect("a folder");
    let split = split(folder.path(), 6);
    let path = &split.samples[3].path;
    let good = std::fs::read(path).expect("readable");
    for device in devices() {
        let args = LoaderArgs { batch: 2, ..args() };
        let limits = DeviceLoaderArgs::default();
        let mut gpu =
            DeviceLoader::new(&device, &split, args.clone(), AugmentArgs::none(), limits).expect("a loader");
        std::fs::write(path, &good[..good.len() / 2]).expect("written");
        let stream = device.stream().expect("a stream");
        let error = loop {
            gpu.start_epoch(0, 0, false);
            let mut failed = None;
            for _ in 0..3 {
                match gpu.next() {
                    Ok(Some(batch)) => {
                        gpu.recycle(batch, &stream.mark().expect("marked")).expect("given back")
                    }
                    Ok(None) => break,
                    Err(error) => failed = Some(error),
                }
            }
            if let Some(error) = failed {
                break error.to_string();
            }
        };
        assert!(error.contains("003.png"), "{error}");
        assert!(gpu.next().expect("over").is_none());
        std::fs::write(path, &good).expect("written");
        let mut cpu = TrainLoader::new(&split, args, AugmentArgs::none()).expect("a loader");
        cpu.start_epoch(1, 0, false);
        gpu.start_epoch(1, 0, false);
        assert_eq!(compare(&device, &mut cpu, &mut gpu, 9), 3);
    }
}
