//! What every training loader is made of: the split, the order of an epoch, the draws of a sample.

use std::ops::Range;
use std::sync::Arc;

use super::DataError;
use super::augment::{AugmentArgs, PixelBox, PlanContext, SamplePlan, copy_paste};
use super::cache::ImageStore;
use super::dataset::Split;
use super::loader::{LoaderArgs, Samples, largest, sizes_of};
use super::rect::{self, RectPlan};
use crate::detect::targets::Target;
use crate::engine::rng::{Rng, Use};

/// A training split and how batches are made of it.
pub(super) struct TrainSet {
    /// Images and boxes.
    pub samples: Samples,
    /// The arguments; the batch is capped.
    pub args: LoaderArgs,
    augment: AugmentArgs,
    rect: Option<RectPlan>,
}

/// What is fixed for an epoch.
pub(super) struct TrainEpoch {
    /// From 0.
    pub number: u32,
    /// Indices into the split.
    pub order: Vec<u32>,
    augment: AugmentArgs,
}

impl TrainSet {
    /// Checks the arguments. The second value says what a user should know.
    pub fn new(
        split: &Split,
        mut args: LoaderArgs,
        mut augment: AugmentArgs,
    ) -> Result<(TrainSet, Vec<String>), DataError> {
        args.check()?;
        augment.check()?;
        args.batch = args.batch.min(split.len().max(1));
        let mut notes: Vec<String> = copy_paste::note(&augment).into_iter().collect();
        let rect = args.rect.then(|| {
            if augment.mosaic > 0.0 {
                notes.push("rect: mosaic is off and images are not shuffled".to_owned());
                augment.mosaic = 0.0;
            }
            rect::plan(&sizes_of(split), args.batch, args.imgsz, args.stride, 0.0)
        });
        let (store, note) = ImageStore::new(Arc::clone(&split.samples), args.imgsz, &args.cache);
        notes.extend(note);
        Ok((TrainSet { samples: Samples { store }, args, augment, rect }, notes))
    }

    /// Images of the split.
    pub fn len(&self) -> usize {
        self.samples.store.samples().len()
    }

    /// Batches per epoch.
    pub fn batches(&self) -> usize {
        self.len().div_ceil(self.args.batch)
    }

    /// An upper bound on the boxes of one sample: mosaics hold four images, mixup and cutmix add a partner's.
    pub fn boxes_per_image_max(&self) -> usize {
        let most = self.samples.store.samples().iter().map(|s| s.labels.len()).max().unwrap_or(0);
        most * self.images_per_sample_max()
    }

    /// Most images that one sample is made of.
    pub fn images_per_sample_max(&self) -> usize {
        let partners = 1 + usize::from(self.augment.mixup > 0.0) + usize::from(self.augment.cutmix > 0.0);
        if self.augment.mosaic > 0.0 { 4 * partners } else { partners }
    }

    /// The largest height and width of a batch.
    pub fn input_max(&self) -> (usize, usize) {
        let square = (self.args.imgsz, self.args.imgsz);
        self.rect.as_ref().map_or(square, |plan| largest(&plan.shapes))
    }

    /// Height and width of a batch.
    pub fn shape(&self, batch: usize) -> (usize, usize) {
        self.rect.as_ref().map_or((self.args.imgsz, self.args.imgsz), |plan| plan.shapes[batch])
    }

    /// Order and augmentation of an epoch.
    pub fn epoch(&self, number: u32, close_mosaic: bool) -> TrainEpoch {
        let order = self.rect.as_ref().map_or_else(
            || {
                let mut order: Vec<u32> = (0..self.len() as u32).collect();
                Rng::new(self.args.seed, Use::Shuffle, number, 0).shuffle(&mut order);
                order
            },
            |plan| plan.order.clone(),
        );
        let augment = if close_mosaic { self.augment.closed() } else { self.augment.clone() };
        TrainEpoch { number, order, augment }
    }

    /// Places of a batch in the order.
    pub fn positions(&self, epoch: &TrainEpoch, batch: usize) -> Range<usize> {
        let first = batch * self.args.batch;
        first..(first + self.args.batch).min(epoch.order.len())
    }

    /// The draws of the sample at a place of the order.
    pub fn draw(&self, epoch: &TrainEpoch, position: usize, out_hw: (usize, usize)) -> SamplePlan {
        let context = PlanContext {
            seed: self.args.seed,
            epoch: epoch.number,
            order: &epoch.order,
            position,
            imgsz: self.args.imgsz,
            out_hw,
        };
        SamplePlan::draw(&epoch.augment, &context)
    }
}

/// Appends the boxes (pixels) of image `i` of a batch of inputs of `out_hw` as targets.
pub(super) fn push_targets(out: &mut Vec<Target>, i: usize, out_hw: (usize, usize), boxes: &[PixelBox]) {
    let (w, h) = (out_hw.1 as f32, out_hw.0 as f32);
    out.extend(boxes.iter().map(|b| Target { image: i as u32, class: b.class, cxcywh: b.cxcywh(w, h) }));
}
