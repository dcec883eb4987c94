//! Training augmentation: mosaic, random perspective, mixup, cutmix, colour jitter, flips.
//!
//! One sample is made in two parts. [`plan`] draws every random number of the sample from one stream
//! `Rng::new(seed, Use::Augment, epoch, index)`, so a sample is a function of those three numbers alone. [`compose`]
//! turns the plan into pixels and boxes without further randomness. Each step is a function of its own
//! (draws in, image and boxes out), so stored draws can be replayed.
//!
//! Order, as in the published recipe: mosaic, copy-paste (see [`copy_paste`]), random perspective, mixup, cutmix, HSV,
//! vertical flip, horizontal flip, channel order.

pub mod canvas;
pub mod compose;
pub mod copy_paste;
pub mod cutmix;
pub mod flip;
pub mod hsv;
pub mod layout;
pub mod letterbox;
pub mod mixup;
pub mod mosaic;
pub mod perspective;
pub mod plan;

pub use compose::{Composer, Source};
pub use layout::{BaseLayout, SampleLayout};
pub use plan::{PlanContext, SamplePlan};

use super::DataError;

/// Grey of everything that no image covers.
pub const BORDER: u8 = 114;

/// A labelled box in pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PixelBox {
    /// Class index.
    pub class: u32,
    /// Left, top, right, bottom in pixels.
    pub xyxy: [f32; 4],
}

impl PixelBox {
    /// Width times height; negative sides count as zero.
    pub fn area(&self) -> f32 {
        let [x1, y1, x2, y2] = self.xyxy;
        (x2 - x1).max(0.0) * (y2 - y1).max(0.0)
    }

    /// The part inside `[0, width] x [0, height]`.
    pub fn clipped(self, width: f32, height: f32) -> PixelBox {
        let [x1, y1, x2, y2] = self.xyxy;
        let xyxy = [x1.clamp(0.0, width), y1.clamp(0.0, height), x2.clamp(0.0, width), y2.clamp(0.0, height)];
        PixelBox { class: self.class, xyxy }
    }

    /// From centre and size as fractions of an image of `width` x `height` pixels.
    pub fn from_cxcywh(class: u32, cxcywh: [f32; 4], width: f32, height: f32) -> PixelBox {
        let [cx, cy, w, h] = cxcywh;
        let xyxy = [
            (cx - w / 2.0) * width,
            (cy - h / 2.0) * height,
            (cx + w / 2.0) * width,
            (cy + h / 2.0) * height,
        ];
        PixelBox { class, xyxy }
    }

    /// Centre and size as fractions of an image of `width` x `height` pixels.
    pub fn cxcywh(&self, width: f32, height: f32) -> [f32; 4] {
        let [x1, y1, x2, y2] = self.xyxy;
        [(x1 + x2) / 2.0 / width, (y1 + y2) / 2.0 / height, (x2 - x1) / width, (y2 - y1) / height]
    }
}

/// How far an image may be zoomed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    /// Zoom drawn from `[1 - gain, 1 + gain]`.
    Gain(f64),
    /// Zoom drawn from `[low, high]`.
    Range(f64, f64),
}

impl Scale {
    /// The interval the zoom is drawn from.
    pub fn interval(self) -> (f64, f64) {
        match self {
            Scale::Gain(gain) => (1.0 - gain, 1.0 + gain),
            Scale::Range(low, high) => (low, high),
        }
    }
}

/// What copy-paste would do with segments; kept so that the key is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyPasteMode {
    /// Objects of the mirrored image are pasted.
    Flip,
    /// Objects of another image are pasted.
    Mixup,
}

/// The augmentation keys of a training job, with the published defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct AugmentArgs {
    /// Hue gain: hue turns by up to this fraction of a full turn.
    pub hsv_h: f64,
    /// Saturation gain: factor `1 + U(-1, 1) * hsv_s`.
    pub hsv_s: f64,
    /// Value gain: factor `1 + U(-1, 1) * hsv_v`.
    pub hsv_v: f64,
    /// Rotation, degrees either way.
    pub degrees: f64,
    /// Translation, fraction of the output either way.
    pub translate: f64,
    /// Zoom.
    pub scale: Scale,
    /// Shear, degrees either way.
    pub shear: f64,
    /// Perspective terms, either way; up to about 0.001.
    pub perspective: f64,
    /// Probability of a vertical flip.
    pub flipud: f64,
    /// Probability of a horizontal flip.
    pub fliplr: f64,
    /// Probability that the channels are handed over as BGR.
    pub bgr: f64,
    /// Probability of a mosaic of four.
    pub mosaic: f64,
    /// Probability that another sample is blended in.
    pub mixup: f64,
    /// Probability that a part of another sample is pasted.
    pub cutmix: f64,
    /// Probability of copy-paste; has no effect on boxes (see [`copy_paste`]).
    pub copy_paste: f64,
    /// How copy-paste would choose its source.
    pub copy_paste_mode: CopyPasteMode,
}

impl Default for AugmentArgs {
    fn default() -> AugmentArgs {
        AugmentArgs {
            hsv_h: 0.015,
            hsv_s: 0.7,
            hsv_v: 0.4,
            degrees: 0.0,
            translate: 0.1,
            scale: Scale::Gain(0.5),
            shear: 0.0,
            perspective: 0.0,
            flipud: 0.0,
            fliplr: 0.5,
            bgr: 0.0,
            mosaic: 1.0,
            mixup: 0.0,
            cutmix: 0.0,
            copy_paste: 0.0,
            copy_paste_mode: CopyPasteMode::Flip,
        }
    }
}

impl AugmentArgs {
    /// No augmentation at all: images are only centred on the network input.
    pub fn none() -> AugmentArgs {
        AugmentArgs {
            hsv_h: 0.0,
            hsv_s: 0.0,
            hsv_v: 0.0,
            translate: 0.0,
            scale: Scale::Gain(0.0),
            fliplr: 0.0,
            mosaic: 0.0,
            ..AugmentArgs::default()
        }
    }

    /// The same without the steps that mix several images, for the last epochs (`close_mosaic`).
    pub fn closed(&self) -> AugmentArgs {
        AugmentArgs { mosaic: 0.0, mixup: 0.0, cutmix: 0.0, copy_paste: 0.0, ..self.clone() }
    }

    /// Checks every range.
    ///
    /// # Errors
    /// [`DataError::Option`] with the first key that is out of range or not a number.
    pub fn check(&self) -> Result<(), DataError> {
        let fail = |key, value: String, allowed| Err(DataError::Option { key, value, allowed });
        let fractions = [
            ("hsv_h", self.hsv_h),
            ("hsv_s", self.hsv_s),
            ("hsv_v", self.hsv_v),
            ("translate", self.translate),
            ("flipud", self.flipud),
            ("fliplr", self.fliplr),
            ("bgr", self.bgr),
            ("mosaic", self.mosaic),
            ("mixup", self.mixup),
            ("cutmix", self.cutmix),
            ("copy_paste", self.copy_paste),
        ];
        for (key, value) in fractions {
            if !(0.0..=1.0).contains(&value) {
                return fail(key, value.to_string(), "a number from 0 to 1");
            }
        }
        if !(0.0..=180.0).contains(&self.degrees) {
            return fail("degrees", self.degrees.to_string(), "a number from 0 to 180");
        }
        if !(0.0..90.0).contains(&self.shear) {
            return fail("shear", self.shear.to_string(), "a number from 0 to below 90");
        }
        if !(0.0..=0.01).contains(&self.perspective) {
            return fail("perspective", self.perspective.to_string(), "a number from 0 to 0.01");
        }
        match self.scale {
            Scale::Gain(gain) if (0.0..=1.0).contains(&gain) => Ok(()),
            Scale::Gain(gain) => fail("scale", gain.to_string(), "a number from 0 to 1, or a pair"),
            Scale::Range(low, high) if low > 0.0 && low <= high && high <= 100.0 => Ok(()),
            Scale::Range(low, high) => {
                fail("scale", format!("[{low}, {high}]"), "a pair with 0 < low <= high <= 100")
            }
        }
    }
}
