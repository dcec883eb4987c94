//! Batches for training and validation.
//!
//! A training batch is a function of (seed, epoch, batch index): the order of an epoch comes from
//! `Rng::new(seed, Use::Shuffle, epoch, 0)` and every sample from `Rng::new(seed, Use::Augment, epoch, position)`. The
//! number of threads, the caches and the batch an epoch is entered at change nothing.

use std::sync::Arc;
use std::time::Duration;

use super::augment::letterbox::{Fit, Letterbox};
use super::augment::{AugmentArgs, Composer, PixelBox, Source};
use super::cache::{CacheArgs, ImageStore};
use super::dataset::Split;
use super::pool::{Build, Pool};
use super::rect::{self, RectPlan};
use super::training::{TrainEpoch, TrainSet, push_targets};
use super::{Batch, DataError, Geometry, Image};
use crate::detect::targets::Target;

/// Most threads of one loader.
pub const WORKERS_MAX: usize = 64;
/// Extra share of a stride that rectangular validation batches are padded by.
const VALIDATION_PAD: f64 = 0.5;

/// How batches are made.
#[derive(Clone, Debug, PartialEq)]
pub struct LoaderArgs {
    /// Network input size, pixels, a multiple of `stride`.
    pub imgsz: usize,
    /// Images per batch; capped at the size of the split.
    pub batch: usize,
    /// Threads; 0 makes batches when they are asked for.
    pub workers: usize,
    /// Batches made ahead; `None` for two per thread.
    pub prefetch: Option<usize>,
    /// Which decoded images are kept.
    pub cache: CacheArgs,
    /// Seed of the run.
    pub seed: u64,
    /// Rectangular batches.
    pub rect: bool,
    /// Largest stride of the network.
    pub stride: usize,
    /// Decode the image a training sample is built around each time, kept or not (to measure decoding).
    pub decode_always: bool,
}

impl Default for LoaderArgs {
    fn default() -> LoaderArgs {
        LoaderArgs {
            imgsz: 640,
            batch: 16,
            workers: 0,
            prefetch: None,
            cache: CacheArgs::default(),
            seed: 0,
            rect: false,
            stride: 32,
            decode_always: false,
        }
    }
}

impl LoaderArgs {
    pub(super) fn check(&self) -> Result<(), DataError> {
        let fail =
            |key, value: usize, allowed| Err(DataError::Option { key, value: value.to_string(), allowed });
        if self.imgsz == 0 || self.imgsz > 8192 {
            return fail("imgsz", self.imgsz, "1 to 8192");
        }
        if self.stride == 0 || !self.imgsz.is_multiple_of(self.stride) {
            return fail("imgsz", self.imgsz, "a multiple of the network's stride");
        }
        if self.batch == 0 {
            return fail("batch", self.batch, "1 or more");
        }
        Ok(())
    }

    fn pool<B: Build>(&self, build: B) -> Pool<B> {
        let workers = self.workers.min(WORKERS_MAX);
        Pool::new(build, workers, self.prefetch.unwrap_or(2 * workers))
    }
}

/// Images of a split with their boxes.
pub(super) struct Samples {
    pub store: ImageStore,
}

impl Samples {
    /// Boxes of an image in pixels of that image scaled to `height` x `width`.
    pub fn boxes(&self, index: u32, height: usize, width: usize) -> Vec<PixelBox> {
        self.store.samples()[index as usize]
            .labels
            .iter()
            .map(|label| PixelBox::from_cxcywh(label.class, label.cxcywh, width as f32, height as f32))
            .collect()
    }
}

/// A sample's images; the one it is built around may be decoded anew.
struct SampleSource<'a> {
    samples: &'a Samples,
    decode_always: Option<u32>,
}

impl Source for SampleSource<'_> {
    fn image(&self, index: u32) -> Result<Arc<Image>, DataError> {
        if self.decode_always == Some(index) {
            return self.samples.store.load(index);
        }
        self.samples.store.get(index)
    }

    fn boxes(&self, index: u32, height: usize, width: usize) -> Vec<PixelBox> {
        self.samples.boxes(index, height, width)
    }
}

impl Build for TrainSet {
    type Epoch = TrainEpoch;
    type Scratch = Composer;

    fn build(
        &self,
        epoch: &TrainEpoch,
        index: usize,
        composer: &mut Composer,
        out: &mut Batch,
    ) -> Result<(), DataError> {
        let positions = self.positions(epoch, index);
        let (h, w) = self.shape(index);
        out.reset(positions.len(), h, w);
        let mut images = std::mem::take(&mut out.images);
        for (i, (position, pixels)) in positions.zip(images.chunks_exact_mut(h * w * 3)).enumerate() {
            let plan = self.draw(epoch, position, (h, w));
            let own = epoch.order[position];
            let source = SampleSource {
                samples: &self.samples,
                decode_always: self.args.decode_always.then_some(own),
            };
            let boxes = composer.compose(&plan, self.args.imgsz, (h, w), &source, pixels)?;
            push_targets(&mut out.targets, i, (h, w), &boxes);
            out.samples.push(own);
            out.geometry.push(Geometry {
                orig_h: h as u32,
                orig_w: w as u32,
                ratio_x: 1.0,
                ratio_y: 1.0,
                pad_x: 0.0,
                pad_y: 0.0,
            });
            if plan.swap_channels {
                out.swapped.push(i as u32);
            }
        }
        out.images = images;
        Ok(())
    }

    fn number(epoch: &TrainEpoch) -> u32 {
        epoch.number
    }
}

/// Augmented batches of the training split, shuffled anew each epoch.
pub struct TrainLoader {
    pool: Pool<TrainSet>,
    notes: Vec<String>,
    waited: Duration,
}

impl TrainLoader {
    /// A loader over a split. With `rect`, batches have the shapes of their images, mosaic is off and the order is
    /// that of the aspect ratios in every epoch, as in the published recipe.
    ///
    /// # Errors
    /// [`DataError::Option`] when an argument is out of range.
    pub fn new(split: &Split, args: LoaderArgs, augment: AugmentArgs) -> Result<TrainLoader, DataError> {
        let (set, notes) = TrainSet::new(split, args.clone(), augment)?;
        Ok(TrainLoader { pool: args.pool(set), notes, waited: Duration::ZERO })
    }

    /// Things a user should know: keys without effect, caches that do not fit.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Batches per epoch; the last may be smaller.
    pub fn batches(&self) -> usize {
        self.pool.build().batches()
    }

    /// Images per batch after the cap.
    pub fn batch_size(&self) -> usize {
        self.pool.build().args.batch
    }

    /// An upper bound on the boxes of one sample: mosaics hold four images, mixup and cutmix add a partner's.
    pub fn boxes_per_image_max(&self) -> usize {
        self.pool.build().boxes_per_image_max()
    }

    /// The largest height and width of a batch.
    pub fn input_max(&self) -> (usize, usize) {
        self.pool.build().input_max()
    }

    /// Begins epoch `epoch` (from 0) at batch `first_batch`. With `close_mosaic`, mosaic, mixup, cutmix and copy-paste
    /// are off for this epoch. Batches of an earlier epoch that were not taken are dropped.
    pub fn start_epoch(&mut self, epoch: u32, first_batch: usize, close_mosaic: bool) {
        let set = self.pool.build();
        let (epoch, batches) = (set.epoch(epoch, close_mosaic), set.batches());
        self.pool.start(epoch, first_batch.min(batches), batches);
    }

    /// The next batch; `None` at the end of the epoch.
    ///
    /// # Errors
    /// [`DataError`] naming the file that could not be read. The epoch is then over; images are not skipped, because a
    /// run that trains on fewer images than its report says would be wrong in silence.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<Batch>, DataError> {
        let (result, waited) = self.pool.next();
        self.waited += waited;
        result
    }

    /// Gives a batch back so that its memory is used again.
    pub fn recycle(&self, batch: Batch) {
        self.pool.recycle(batch);
    }

    /// Time spent in [`TrainLoader::next`] since the last call of this: what the step waited for data (without
    /// threads: what making the batches took).
    pub fn wait_seconds(&mut self) -> f64 {
        std::mem::take(&mut self.waited).as_secs_f64()
    }
}

struct ValBuild {
    samples: Samples,
    plan: RectPlan,
    batch: usize,
}

impl Build for ValBuild {
    type Epoch = ();
    type Scratch = ();

    fn build(&self, (): &(), index: usize, (): &mut (), out: &mut Batch) -> Result<(), DataError> {
        let first = index * self.batch;
        let images = &self.plan.order[first..(first + self.batch).min(self.plan.order.len())];
        let (h, w) = self.plan.shapes[index];
        out.reset(images.len(), h, w);
        for (i, &sample) in images.iter().enumerate() {
            let image = self.samples.store.get(sample)?;
            let letterbox = Letterbox::new((image.height, image.width), (h, w), Fit::Pad, false);
            letterbox.draw(&image, &mut out.images[i * h * w * 3..(i + 1) * h * w * 3]);
            let source = &self.samples.store.samples()[sample as usize];
            for label in &source.labels {
                let cxcywh = letterbox.place_box(label.class, label.cxcywh).cxcywh(w as f32, h as f32);
                out.targets.push(Target { image: i as u32, class: label.class, cxcywh });
            }
            out.samples.push(sample);
            out.geometry.push(letterbox.geometry((source.height as usize, source.width as usize)));
        }
        Ok(())
    }

    fn number((): &()) -> u32 {
        0
    }
}

/// Letterboxed batches of a split, not augmented, in a fixed order.
pub struct ValLoader {
    pool: Pool<ValBuild>,
    notes: Vec<String>,
    waited: Duration,
}

impl ValLoader {
    /// A loader over a split. With `rect` (the published way of validating) images are ordered by aspect ratio and each
    /// batch is as small as its shapes allow; otherwise inputs are squares in the order of the paths.
    ///
    /// # Errors
    /// [`DataError::Option`] when an argument is out of range.
    pub fn new(split: &Split, args: LoaderArgs) -> Result<ValLoader, DataError> {
        args.check()?;
        let batch = args.batch.min(split.len().max(1));
        let plan = if args.rect {
            rect::plan(&sizes_of(split), batch, args.imgsz, args.stride, VALIDATION_PAD)
        } else {
            RectPlan {
                order: (0..split.len() as u32).collect(),
                shapes: vec![(args.imgsz, args.imgsz); split.len().div_ceil(batch)],
            }
        };
        let (store, note) = ImageStore::new(Arc::clone(&split.samples), args.imgsz, &args.cache);
        let build = ValBuild { samples: Samples { store }, plan, batch };
        Ok(ValLoader { pool: args.pool(build), notes: note.into_iter().collect(), waited: Duration::ZERO })
    }

    /// Things a user should know: caches that do not fit.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Number of batches; the last may be smaller.
    pub fn batches(&self) -> usize {
        self.pool.build().plan.shapes.len()
    }

    /// Images per batch after the cap.
    pub fn batch_size(&self) -> usize {
        self.pool.build().batch
    }

    /// Height and width of every batch in order, so that plans can be sized before the first.
    pub fn shapes(&self) -> &[(usize, usize)] {
        &self.pool.build().plan.shapes
    }

    /// The largest height and width of a batch (not necessarily of the same one).
    pub fn input_max(&self) -> (usize, usize) {
        largest(self.shapes())
    }

    /// Begins a pass from the first batch.
    pub fn start(&mut self) {
        let batches = self.batches();
        self.pool.start((), 0, batches);
    }

    /// The next batch; `None` at the end of the pass.
    ///
    /// # Errors
    /// [`DataError`] naming the file that could not be read. The pass is then over.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<Batch>, DataError> {
        let (result, waited) = self.pool.next();
        self.waited += waited;
        result
    }

    /// Gives a batch back so that its memory is used again.
    pub fn recycle(&self, batch: Batch) {
        self.pool.recycle(batch);
    }

    /// Time spent in [`ValLoader::next`] since the last call of this.
    pub fn wait_seconds(&mut self) -> f64 {
        std::mem::take(&mut self.waited).as_secs_f64()
    }
}

pub(super) fn sizes_of(split: &Split) -> Vec<(u32, u32)> {
    split.samples.iter().map(|s| (s.height, s.width)).collect()
}

pub(super) fn largest(shapes: &[(usize, usize)]) -> (usize, usize) {
    shapes.iter().fold((0, 0), |(h, w), shape| (h.max(shape.0), w.max(shape.1)))
}
