//! Maps in device memory for the tests of kernels: poisoned around, read back as `f64`.

use std::sync::Arc;

use crate::engine::device::cuda::{Buffer, Device, Precision, Stream, Tensor, testing};
use crate::engine::rng::{Rng, Use};
use crate::engine::tensor::View;

/// The storage types.
pub(crate) const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::Bf16, Precision::F16];

/// A device, a stream, a storage type.
pub(crate) struct Bench {
    pub device: Arc<Device>,
    pub stream: Stream,
    pub precision: Precision,
}

/// Calls `test` for each device and storage type.
pub(crate) fn on_all(mut test: impl FnMut(&Bench)) {
    for device in testing::devices() {
        for precision in PRECISIONS {
            let stream = device.stream().expect("a stream");
            test(&Bench { device: Arc::clone(&device), stream, precision });
        }
    }
}

/// Shape and place of a map: `c` channels from `from` on of a buffer with `parent` channels and a border of `pad`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub n: usize,
    pub h: usize,
    pub w: usize,
    pub c: usize,
    pub from: usize,
    pub parent: usize,
    pub pad: usize,
}

impl Layout {
    pub fn dense(n: usize, h: usize, w: usize, c: usize) -> Layout {
        Layout { n, h, w, c, from: 0, parent: c, pad: 0 }
    }

    /// A slice with `beyond` channels before and after it, and a border.
    pub fn within(self, beyond: usize, pad: usize) -> Layout {
        Layout { from: beyond, parent: self.c + 2 * beyond, pad, ..self }
    }

    pub fn len(&self) -> usize {
        self.n * self.h * self.w * self.c
    }
}

/// A map on the device; everything that is not its own is poison (all bits set: not a number).
pub(crate) struct Map {
    pub view: View,
    buffer: Buffer,
    precision: Precision,
}

/// Numbers of the storage beyond the map, on both sides.
const MARGIN: usize = 16;

impl Map {
    /// All poison.
    pub fn poisoned(bench: &Bench, at: Layout) -> Map {
        Map::stored(bench, at, bench.precision)
    }

    /// All poison, stored as `precision`.
    pub fn stored(bench: &Bench, at: Layout, precision: Precision) -> Map {
        let view = View::new(MARGIN, at.n, at.h, at.w, at.parent, at.pad).slice(at.from, at.c);
        let len = View::storage_len(at.n, at.h, at.w, at.parent, at.pad) + 2 * MARGIN;
        let buffer = bench.device.allocate(len * precision.bytes()).expect("memory");
        bench.stream.upload(&buffer, 0, &vec![0xffu8; len * precision.bytes()]).expect("a copy");
        Map { view, buffer, precision }
    }

    /// With these values (dense), zeros in the border.
    pub fn of(bench: &Bench, at: Layout, values: &[f64]) -> Map {
        let map = Map::poisoned(bench, at);
        assert_eq!(values.len(), map.view.len());
        let mut bytes = map.bytes(bench);
        let pad = map.view.pad as isize;
        let mut values = values.iter();
        map.each(pad, |index, inside| {
            let value = if inside { *values.next().expect("counted") } else { 0.0 };
            encode(map.precision, value, &mut bytes[index * map.precision.bytes()..]);
        });
        bench.stream.upload(&map.buffer, 0, &bytes).expect("a copy");
        map
    }

    pub fn tensor(&self) -> Tensor {
        // SAFETY: the buffer holds the view and its border, and the map outlives the launches of its test.
        unsafe { Tensor::new(self.buffer.pointer(), self.precision.bytes(), &self.view) }
    }

    fn bytes(&self, bench: &Bench) -> Vec<u8> {
        let mut bytes = vec![0u8; self.buffer.bytes()];
        bench.stream.download(&self.buffer, 0, &mut bytes).expect("a copy");
        bytes
    }

    /// Calls `f(index, inside)` for each element of the view and `pad` pixels around it, in order.
    fn each(&self, pad: isize, mut f: impl FnMut(usize, bool)) {
        let v = self.view;
        for n in 0..v.n {
            for y in -pad..v.h as isize + pad {
                for x in -pad..v.w as isize + pad {
                    let inside = y >= 0 && x >= 0 && y < v.h as isize && x < v.w as isize;
                    (0..v.c).for_each(|c| f(v.at(n, y, x) + c, inside));
                }
            }
        }
    }

    /// The values, dense.
    pub fn read(&self, bench: &Bench) -> Vec<f64> {
        let bytes = self.bytes(bench);
        let mut values = Vec::with_capacity(self.view.len());
        self.each(0, |index, _| {
            values.push(decode(self.precision, &bytes[index * self.precision.bytes()..]))
        });
        values
    }

    /// The values, after a check that all else is as it was: the border zero where `zero_border` (else poison), the
    /// neighbours poison.
    pub fn read_written(&self, bench: &Bench, zero_border: bool) -> Vec<f64> {
        let mut bytes = self.bytes(bench);
        let size = self.precision.bytes();
        let pad = self.view.pad as isize;
        self.each(pad, |index, inside| {
            let at = &mut bytes[index * size..(index + 1) * size];
            if !inside && zero_border {
                assert!(at.iter().all(|b| *b == 0), "border element {index} is not zero");
            }
            if inside || zero_border {
                at.fill(0xff);
            }
        });
        assert!(bytes.iter().all(|b| *b == 0xff), "something outside the view was written");
        self.read(bench)
    }
}

/// `f32` numbers on the device.
pub(crate) struct Floats(Buffer);

impl Floats {
    pub fn of(bench: &Bench, values: &[f64]) -> Floats {
        let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
        let buffer = bench.device.allocate(4 * values.len().max(1)).expect("memory");
        bench.stream.upload(&buffer, 0, &values).expect("a copy");
        Floats(buffer)
    }

    pub fn poisoned(bench: &Bench, len: usize) -> Floats {
        Floats::of(bench, &vec![f64::NAN; len])
    }

    pub fn pointer(&self) -> u64 {
        self.0.pointer()
    }

    pub fn read(&self, bench: &Bench) -> Vec<f64> {
        let mut values = vec![0.0f32; self.0.bytes() / 4];
        bench.stream.download(&self.0, 0, &mut values).expect("a copy");
        values.into_iter().map(f64::from).collect()
    }
}

fn encode(precision: Precision, value: f64, to: &mut [u8]) {
    let value = value as f32;
    match precision {
        Precision::F32 => to[..4].copy_from_slice(&value.to_le_bytes()),
        Precision::Bf16 => to[..2].copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
        Precision::F16 => to[..2].copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
    }
}

fn decode(precision: Precision, from: &[u8]) -> f64 {
    match precision {
        Precision::F32 => f64::from(f32::from_le_bytes([from[0], from[1], from[2], from[3]])),
        Precision::Bf16 => half::bf16::from_le_bytes([from[0], from[1]]).to_f64(),
        Precision::F16 => half::f16::from_le_bytes([from[0], from[1]]).to_f64(),
    }
}

/// The nearest number of the storage type.
pub(crate) fn rounded(precision: Precision, value: f64) -> f64 {
    let mut bytes = [0; 4];
    encode(precision, value, &mut bytes);
    decode(precision, &bytes)
}

/// Half a unit in the last place of the storage type, relative, with room for a sum in `f32`.
pub(crate) fn tolerance(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 4e-6,
        Precision::Bf16 => 1.0 / 256.0,
        Precision::F16 => 1.0 / 2048.0,
    }
}

/// `len` normal numbers of the storage type.
pub(crate) fn normals(precision: Precision, seed: u64, len: usize, mean: f64) -> Vec<f64> {
    let mut rng = Rng::new(seed, Use::Test, 0, len as u32);
    (0..len).map(|_| rounded(precision, mean + rng.normal())).collect()
}

/// Asserts `|got - want| <= relative * (|want| + size)` for all, NaN failing.
pub(crate) fn assert_close(what: &str, got: &[f64], want: &[f64], relative: f64, size: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let limit = relative * (w.abs() + size);
        assert!((g - w).abs() <= limit, "{what} [{i}]: {g} for {w}, limit {limit}");
    }
}
