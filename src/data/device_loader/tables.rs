//! The tables that tell the kernel what each image of a batch is made of: twins of the structures in
//! `kernels/augment.cu`.

use crate::data::augment::canvas::{column_of, is_axis_aligned, row_of};
use crate::data::augment::perspective::inverse;
use crate::data::augment::plan::BasePlan;
use crate::data::augment::{BaseLayout, SampleLayout, SamplePlan, hsv};

/// Bytes of the growth table of one image.
const GROWTH_BYTES: usize = 512;
/// Most canvases of one image: its own, what is blended in, what is pasted.
const BASES_MAX: usize = 3;

/// What stands in the flags of a sample.
mod flag {
    pub const FLIP_VERTICAL: u32 = 1;
    pub const FLIP_HORIZONTAL: u32 = 2;
    pub const SWAP_CHANNELS: u32 = 4;
    pub const JITTER: u32 = 8;
    pub const MIXED: u32 = 16;
    pub const PASTED: u32 = 32;
}

/// How a canvas is read.
mod kind {
    pub const ALIGNED: u32 = 0;
    pub const AFFINE: u32 = 1;
    pub const PROJECTIVE: u32 = 2;
}

#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct PatchEntry {
    origin: u64,
    pitch: u32,
    reserved: u32,
    rect: [i32; 4],
}

#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct BaseEntry {
    patches: [PatchEntry; 4],
    back: [f64; 9],
    centre: [i32; 2],
    width: i32,
    height: i32,
    taps: u32,
    kind: u32,
}

#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct SampleEntry {
    ratio: f64,
    own: u32,
    mixed: u32,
    pasted: u32,
    flags: u32,
    rect: [i32; 4],
    hue: i32,
    reserved: u32,
}

/// An image on the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source {
    /// Address of its first byte.
    pub address: u64,
    /// Pixels of a row.
    pub width: usize,
}

/// The tables of one batch.
#[derive(Debug, Default)]
pub(super) struct Tables {
    samples: Vec<SampleEntry>,
    bases: Vec<BaseEntry>,
    growth: Vec<u8>,
    taps: Vec<u32>,
    everything: bool,
}

/// Where the tables begin in the memory they were written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offsets {
    pub samples: u64,
    pub bases: u64,
    pub growth: u64,
    pub taps: u64,
    /// Bytes of all.
    pub end: usize,
}

impl Tables {
    /// Most bytes for a batch of `n` images of `h` x `w`.
    pub fn bytes_max(n: usize, h: usize, w: usize) -> usize {
        let base = std::mem::size_of::<BaseEntry>() + (h + w) * 4;
        n * (std::mem::size_of::<SampleEntry>() + GROWTH_BYTES + BASES_MAX * base)
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether any of the images needs the kernel that does everything.
    pub fn needs_everything(&self) -> bool {
        self.everything
    }

    /// Appends an image; `source` tells where the images of the split are.
    pub fn push(
        &mut self,
        plan: &SamplePlan,
        layout: &SampleLayout,
        out_hw: (usize, usize),
        source: &dyn Fn(u32) -> Source,
    ) {
        let mut flags = 0;
        let mut set = |on: bool, flag: u32| flags |= if on { flag } else { 0 };
        set(plan.flip_vertical, flag::FLIP_VERTICAL);
        set(plan.flip_horizontal, flag::FLIP_HORIZONTAL);
        set(plan.swap_channels, flag::SWAP_CHANNELS);
        let jitter = hsv::tables(plan.hsv_gains);
        set(jitter.is_some(), flag::JITTER);
        let (hue, growth) = jitter.unwrap_or((0, [0; GROWTH_BYTES]));
        let own = self.push_base(&plan.base, &layout.own, out_hw, source);
        let (mut mixed, mut ratio) = (0, 1.0);
        if let (Some((partner, share)), Some(layout)) = (&plan.mixup, &layout.mixed) {
            set(true, flag::MIXED);
            (mixed, ratio) = (self.push_base(partner, layout, out_hw, source), *share);
        }
        let (mut pasted, mut rect) = (0, [0; 4]);
        if let (Some((partner, _)), Some((layout, place))) = (&plan.cutmix, &layout.pasted) {
            set(true, flag::PASTED);
            (pasted, rect) = (self.push_base(partner, layout, out_hw, source), place.map(|v| v as i32));
        }
        self.everything |= flags & (flag::MIXED | flag::PASTED) != 0;
        self.growth.extend_from_slice(&growth);
        self.samples.push(SampleEntry { ratio, own, mixed, pasted, flags, rect, hue, reserved: 0 });
    }

    fn push_base(
        &mut self,
        plan: &BasePlan,
        layout: &BaseLayout,
        out_hw: (usize, usize),
        source: &dyn Fn(u32) -> Source,
    ) -> u32 {
        let mut patches = [PatchEntry { origin: 0, pitch: 0, reserved: 0, rect: [0; 4] }; 4];
        for ((patch, rect), &image) in patches.iter_mut().zip(&layout.patches).zip(&plan.images) {
            let Source { address, width } = source(image);
            let [left, top, ..] = rect.dest;
            let before = |first: usize, place: usize| first as i64 - place as i64;
            let pixels = before(rect.source[1], top) * width as i64 + before(rect.source[0], left);
            *patch = PatchEntry {
                origin: address.wrapping_add_signed(3 * pixels),
                pitch: width as u32,
                reserved: 0,
                rect: rect.dest.map(|v| v as i32),
            };
        }
        // A single image is the first patch everywhere.
        let centre = plan.mosaic_centre.map_or([i32::MAX; 2], |(x, y)| [x as i32, y as i32]);
        let (height, width) = layout.canvas_hw;
        let taps = self.taps.len() as u32;
        let back = inverse(&layout.matrix);
        let kind = match back {
            Some(back) if !is_axis_aligned(&back) => {
                self.everything = true;
                if back[2] == [0.0, 0.0, 1.0] { kind::AFFINE } else { kind::PROJECTIVE }
            }
            _ => kind::ALIGNED,
        };
        if kind == kind::ALIGNED {
            // What cannot be inverted is grey all over, as is everything at pixel -2.
            let outside = (-2.0, 0.0);
            let column = |x| back.as_ref().map_or(outside, |back| column_of(back, x, width));
            let row = |y| back.as_ref().map_or(outside, |back| row_of(back, y, height));
            self.taps.extend((0..out_hw.1).map(|x| tap(column(x))));
            self.taps.extend((0..out_hw.0).map(|y| tap(row(y))));
        }
        self.bases.push(BaseEntry {
            patches,
            back: bytemuck::cast(back.unwrap_or([[0.0; 3]; 3])),
            centre,
            width: width as i32,
            height: height as i32,
            taps,
            kind,
        });
        self.bases.len() as u32 - 1
    }

    /// Writes the tables one behind the other.
    pub fn write(&self, to: &mut [u8]) -> Offsets {
        let mut end = 0;
        let mut put = |bytes: &[u8]| {
            let begin = end;
            to[begin..begin + bytes.len()].copy_from_slice(bytes);
            // Entries of 16 bytes are read at once.
            end = (begin + bytes.len()).next_multiple_of(16);
            begin as u64
        };
        let samples = put(bytemuck::cast_slice(&self.samples));
        let bases = put(bytemuck::cast_slice(&self.bases));
        let growth = put(&self.growth);
        let taps = put(bytemuck::cast_slice(&self.taps));
        Offsets { samples, bases, growth, taps, end: end.min(to.len()) }
    }
}

/// A pixel, possibly negative, in the low half and the weight of the next in the high half.
pub(super) fn tap((at, weight): (f64, f64)) -> u32 {
    u32::from(at as i16 as u16) | (weight as u32) << 16
}
