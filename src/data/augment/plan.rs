//! Every random number of one training sample, drawn before any pixel is touched.

use super::cutmix::CutmixDraws;
use super::perspective::PerspectiveDraws;
use super::{AugmentArgs, hsv, mixup, mosaic};
use crate::engine::rng::{Rng, Use};

/// Partners (for mosaic, mixup, cutmix) are drawn from this many images: those last seen in the epoch's order, the one
/// at hand included. A set that is no larger is drawn from as a whole. The bound lets a large set be read with one
/// decoding per sample, because partners are still in memory.
pub const PARTNER_WINDOW: usize = 1024;

/// One to four images and the warp that brings them to the network input.
#[derive(Clone, Debug, PartialEq)]
pub struct BasePlan {
    /// Indices of the images in the split: one, or the four of a mosaic.
    pub images: Vec<u32>,
    /// Centre (x, y) of the mosaic on its canvas; `None` for a single image.
    pub mosaic_centre: Option<(usize, usize)>,
    /// The random perspective.
    pub perspective: PerspectiveDraws,
}

/// Everything random about one sample.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplePlan {
    /// The sample itself.
    pub base: BasePlan,
    /// Partner and share of the sample itself.
    pub mixup: Option<(BasePlan, f64)>,
    /// Partner and rectangles.
    pub cutmix: Option<(BasePlan, CutmixDraws)>,
    /// Gains of hue, saturation, value; all zero for none.
    pub hsv_gains: [f64; 3],
    /// Mirror top and bottom.
    pub flip_vertical: bool,
    /// Mirror left and right.
    pub flip_horizontal: bool,
    /// Hand over blue, green, red.
    pub swap_channels: bool,
}

/// Where a sample stands.
#[derive(Clone, Copy, Debug)]
pub struct PlanContext<'a> {
    /// Seed of the run.
    pub seed: u64,
    /// Epoch, from 0.
    pub epoch: u32,
    /// The epoch's order: indices into the split.
    pub order: &'a [u32],
    /// Place in the order.
    pub position: usize,
    /// Mosaic cell size (the nominal network input), pixels.
    pub imgsz: usize,
    /// Network input of the sample's batch, pixels.
    pub out_hw: (usize, usize),
}

impl SamplePlan {
    /// Draws a sample from `Rng::new(seed, Use::Augment, epoch, position)`.
    ///
    /// Order of the draws: base (mosaic yes or no; centre y, centre x, three partners; eight of the perspective); mixup yes
    /// or no (partner, its base, ratio); cutmix yes or no (partner, its base, rectangles, choice); three gains;
    /// vertical flip; horizontal flip; channel order. A yes-or-no is drawn even where its probability is 0.
    pub fn draw(args: &AugmentArgs, context: &PlanContext) -> SamplePlan {
        let rng = &mut Rng::new(context.seed, Use::Augment, context.epoch, context.position as u32);
        let own = context.order[context.position];
        let base = BasePlan::draw(args, context, own, rng);
        let mixup = (rng.uniform() < args.mixup).then(|| {
            let partner = context.partner(rng);
            (BasePlan::draw(args, context, partner, rng), mixup::draw_ratio(rng))
        });
        let cutmix = (rng.uniform() < args.cutmix).then(|| {
            let partner = context.partner(rng);
            let base = BasePlan::draw(args, context, partner, rng);
            (base, CutmixDraws::draw(context.out_hw.0, context.out_hw.1, rng))
        });
        SamplePlan {
            base,
            mixup,
            cutmix,
            hsv_gains: hsv::draw_gains([args.hsv_h, args.hsv_s, args.hsv_v], rng),
            flip_vertical: rng.uniform() < args.flipud,
            flip_horizontal: rng.uniform() < args.fliplr,
            swap_channels: rng.uniform() < args.bgr,
        }
    }
}

impl BasePlan {
    fn draw(args: &AugmentArgs, context: &PlanContext, own: u32, rng: &mut Rng) -> BasePlan {
        let mut images = vec![own];
        let mosaic_centre = (rng.uniform() < args.mosaic).then(|| {
            let centre = mosaic::draw_centre(context.imgsz, rng);
            images.extend((0..3).map(|_| context.partner(rng)));
            centre
        });
        BasePlan { images, mosaic_centre, perspective: PerspectiveDraws::draw(args, rng) }
    }
}

impl PlanContext<'_> {
    /// An image among the [`PARTNER_WINDOW`] last seen; before the epoch's start the window wraps to its end.
    fn partner(&self, rng: &mut Rng) -> u32 {
        let count = self.order.len();
        let back = rng.below(count.min(PARTNER_WINDOW));
        self.order[(self.position + count - back) % count]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_a_function_of_seed_epoch_and_position() {
        let order: Vec<u32> = (0..50).rev().collect();
        let args =
            AugmentArgs { mixup: 0.5, cutmix: 0.5, degrees: 3.0, mosaic: 0.7, ..AugmentArgs::default() };
        let at = |seed, epoch, position| {
            let context = PlanContext { seed, epoch, order: &order, position, imgsz: 64, out_hw: (64, 64) };
            SamplePlan::draw(&args, &context)
        };
        assert_eq!(at(1, 2, 3), at(1, 2, 3));
        assert_ne!(at(1, 2, 3), at(1, 2, 4));
        assert_ne!(at(1, 2, 3), at(1, 3, 3));
        assert_ne!(at(1, 2, 3), at(2, 2, 3));
        let mosaics = (0..50).filter(|&p| at(7, 0, p).base.mosaic_centre.is_some()).count();
        assert!((20..50).contains(&mosaics), "{mosaics}");
    }

    #[test]
    fn partners_of_a_large_set_are_recent() {
        let order: Vec<u32> = (0..5000).collect();
        for position in [0usize, 100, 4999] {
            let context =
                PlanContext { seed: 1, epoch: 0, order: &order, position, imgsz: 64, out_hw: (64, 64) };
            let plan = SamplePlan::draw(&AugmentArgs::default(), &context);
            for &image in &plan.base.images {
                assert!((position + 5000 - image as usize) % 5000 < PARTNER_WINDOW);
            }
        }
    }
}
