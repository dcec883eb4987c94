//! From a plan to pixels and boxes.

use std::sync::Arc;

use super::canvas::{Canvas, WarpScratch};
use super::layout::BaseLayout;
use super::plan::{BasePlan, SamplePlan};
use super::{PixelBox, cutmix, flip, hsv, mixup};
use crate::data::{DataError, Image};

/// Where images and labels come from.
pub trait Source {
    /// The image at an index of the split, scaled for the network input.
    ///
    /// # Errors
    /// [`DataError`] naming the file when it cannot be read or decoded.
    fn image(&self, index: u32) -> Result<Arc<Image>, DataError>;

    /// Its boxes in pixels of the image that [`Source::image`] gives, which is `height` x `width`.
    fn boxes(&self, index: u32, height: usize, width: usize) -> Vec<PixelBox>;
}

/// Makes samples; keeps its buffers between them.
#[derive(Debug, Default)]
pub struct Composer {
    warp: WarpScratch,
    partner: Vec<u8>,
}

impl Composer {
    /// Makes the planned sample: writes `out_hw` RGB pixels into `out` and returns its boxes in pixels.
    ///
    /// # Errors
    /// Those of [`Source::image`].
    pub fn compose(
        &mut self,
        plan: &SamplePlan,
        imgsz: usize,
        out_hw: (usize, usize),
        source: &impl Source,
        out: &mut [u8],
    ) -> Result<Vec<PixelBox>, DataError> {
        let mut boxes = self.base(&plan.base, imgsz, out_hw, source, out)?;
        if let Some((partner, ratio)) = &plan.mixup {
            self.with_partner(out.len(), |this, pixels| {
                let others = this.base(partner, imgsz, out_hw, source, pixels)?;
                mixup::blend(out, pixels, *ratio);
                boxes.extend(others);
                Ok(())
            })?;
        }
        if let Some((partner, draws)) = &plan.cutmix {
            self.with_partner(out.len(), |this, pixels| {
                let others = this.base(partner, imgsz, out_hw, source, pixels)?;
                cutmix::apply(draws, out_hw.1, out, &mut boxes, pixels, &others);
                Ok(())
            })?;
        }
        hsv::jitter(out, plan.hsv_gains);
        if plan.flip_vertical {
            flip::vertical(out, out_hw.1, &mut boxes);
        }
        if plan.flip_horizontal {
            flip::horizontal(out, out_hw.1, &mut boxes);
        }
        if plan.swap_channels {
            flip::swap_channels(out);
        }
        Ok(boxes)
    }

    /// Lends the partner's pixel buffer to `work`.
    fn with_partner(
        &mut self,
        bytes: usize,
        work: impl FnOnce(&mut Composer, &mut [u8]) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let mut pixels = std::mem::take(&mut self.partner);
        pixels.resize(bytes, 0);
        let result = work(self, &mut pixels);
        self.partner = pixels;
        result
    }

    /// Mosaic (or a single image) and random perspective.
    fn base(
        &mut self,
        plan: &BasePlan,
        imgsz: usize,
        out_hw: (usize, usize),
        source: &impl Source,
        out: &mut [u8],
    ) -> Result<Vec<PixelBox>, DataError> {
        let images = plan.images.iter().map(|&i| source.image(i)).collect::<Result<Vec<_>, _>>()?;
        let sizes: Vec<_> = images.iter().map(|image| (image.height, image.width)).collect();
        let layout = BaseLayout::new(plan, imgsz, out_hw, &sizes, &|i, h, w| source.boxes(i, h, w));
        let patches = layout.patches.iter().copied().zip(images.iter().map(|image| &**image)).collect();
        let canvas = Canvas::new(layout.canvas_hw.0, layout.canvas_hw.1, patches);
        canvas.warp(&layout.matrix, out_hw, out, &mut self.warp);
        Ok(layout.boxes)
    }
}
