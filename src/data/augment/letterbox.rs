//! Letterbox: an image scaled to fit, centred on grey; and the way back.

use super::{BORDER, PixelBox};
use crate::data::resize::resize_into;
use crate::data::{Geometry, Image};

/// How an image is fitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Keep the shape; fill up to exactly the size asked for.
    Pad,
    /// Keep the shape; fill up only to the next multiple of this stride.
    PadToStride(usize),
    /// Stretch to exactly the size asked for; no padding.
    Stretch,
}

/// Where an image lies on the network input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Letterbox {
    /// Height and width of the image given.
    pub in_hw: (usize, usize),
    /// Height and width of the scaled image.
    pub scaled_hw: (usize, usize),
    /// Height and width of the result.
    pub out_hw: (usize, usize),
    /// Rows above.
    pub top: usize,
    /// Columns to the left.
    pub left: usize,
    /// Factors of width and of height.
    pub ratio: (f64, f64),
}

impl Letterbox {
    /// `r = min(H / h, W / w)`, at most 1 unless `scale_up`; scaled size `max(round(side * r), 1)`; the rest is split
    /// in halves with `top = round(rest / 2 - 0.1)`, `left` alike.
    pub fn new(in_hw: (usize, usize), out_hw: (usize, usize), fit: Fit, scale_up: bool) -> Letterbox {
        let (h, w) = (in_hw.0 as f64, in_hw.1 as f64);
        if fit == Fit::Stretch {
            let ratio = (out_hw.1 as f64 / w, out_hw.0 as f64 / h);
            return Letterbox { in_hw, scaled_hw: out_hw, out_hw, top: 0, left: 0, ratio };
        }
        let fitted = (out_hw.0 as f64 / h).min(out_hw.1 as f64 / w);
        let r = if scale_up { fitted } else { fitted.min(1.0) };
        let side = |length: f64| ((length * r).round_ties_even() as usize).max(1);
        let scaled_hw = (side(h), side(w));
        let rest = |out: usize, scaled: usize| {
            let rest = out.saturating_sub(scaled);
            if let Fit::PadToStride(stride) = fit { rest % stride.max(1) } else { rest }
        };
        let half = |rest: usize, nudge: f64| (rest as f64 / 2.0 + nudge).round_ties_even().max(0.0) as usize;
        let (rest_h, rest_w) = (rest(out_hw.0, scaled_hw.0), rest(out_hw.1, scaled_hw.1));
        let (top, left) = (half(rest_h, -0.1), half(rest_w, -0.1));
        let (bottom, right) = (half(rest_h, 0.1), half(rest_w, 0.1));
        let out_hw = (scaled_hw.0 + top + bottom, scaled_hw.1 + left + right);
        Letterbox { in_hw, scaled_hw, out_hw, top, left, ratio: (r, r) }
    }

    /// Draws the image into `out` (`out_hw` pixels), bilinear, on grey 114.
    pub fn draw(&self, image: &Image, out: &mut [u8]) {
        assert_eq!((image.height, image.width), self.in_hw, "the image this was made for");
        assert_eq!(out.len(), self.out_hw.0 * self.out_hw.1 * 3, "bytes of the result");
        let (h, w) = self.scaled_hw;
        if self.scaled_hw == self.out_hw {
            return resize_into(&image.pixels, image.height, image.width, out, h, w);
        }
        let scaled;
        let pixels = if self.scaled_hw == self.in_hw {
            &image.pixels
        } else {
            scaled = crate::data::resize::resize(image, h, w).pixels;
            &scaled
        };
        out.fill(BORDER);
        for y in 0..h {
            let at = ((self.top + y) * self.out_hw.1 + self.left) * 3;
            out[at..at + w * 3].copy_from_slice(&pixels[y * w * 3..(y + 1) * w * 3]);
        }
    }

    /// Moves a box (centre and size as fractions of the image given) to pixels of the result.
    pub fn place_box(&self, class: u32, cxcywh: [f32; 4]) -> PixelBox {
        let (w, h) = (self.in_hw.1 as f64 * self.ratio.0, self.in_hw.0 as f64 * self.ratio.1);
        let mut b = PixelBox::from_cxcywh(class, cxcywh, w as f32, h as f32);
        let (left, top) = (self.left as f32, self.top as f32);
        b.xyxy = [b.xyxy[0] + left, b.xyxy[1] + top, b.xyxy[2] + left, b.xyxy[3] + top];
        b
    }

    /// What is needed to map boxes back to an original image of `orig_hw`, from which the image given was scaled.
    pub fn geometry(&self, orig_hw: (usize, usize)) -> Geometry {
        Geometry {
            orig_h: orig_hw.0 as u32,
            orig_w: orig_hw.1 as u32,
            ratio_x: (self.in_hw.1 as f64 / orig_hw.1 as f64 * self.ratio.0) as f32,
            ratio_y: (self.in_hw.0 as f64 / orig_hw.0 as f64 * self.ratio.1) as f32,
            pad_x: self.left as f32,
            pad_y: self.top as f32,
        }
    }
}

/// Maps a box from a letterboxed input back to the original image when only the two sizes are known, as for
/// prediction: `gain = min(H / h, W / w)`, padding `round((W - round(w * gain)) / 2 - 0.1)`, clipped to the original.
pub fn unletterbox(xyxy: [f32; 4], input_hw: (usize, usize), orig_hw: (usize, usize)) -> [f32; 4] {
    let (h, w) = (orig_hw.0 as f64, orig_hw.1 as f64);
    let gain = (input_hw.0 as f64 / h).min(input_hw.1 as f64 / w);
    let side = |length: f64| (length * gain).round_ties_even().max(1.0);
    let pad = |input: usize, scaled: f64| ((input as f64 - scaled) / 2.0 - 0.1).round_ties_even();
    let (scaled_w, scaled_h) = (side(w), side(h));
    let (pad_x, pad_y) = (pad(input_hw.1, scaled_w), pad(input_hw.0, scaled_h));
    let x = |v: f32| ((f64::from(v) - pad_x) / (scaled_w / w)).clamp(0.0, w) as f32;
    let y = |v: f32| ((f64::from(v) - pad_y) / (scaled_h / h)).clamp(0.0, h) as f32;
    [x(xyxy[0]), y(xyxy[1]), x(xyxy[2]), y(xyxy[3])]
}
