//! Two row kernels that bilinear resizing and axis-aligned warping share.
//!
//! A row is first blended vertically (contiguous, 8-bit fraction, 16-bit result), then sampled horizontally (11-bit
//! fraction). The sum of the quantisation errors is below 0.6 grey levels, so results are within one level of
//! exact interpolation. Blended values are stored with 32768 subtracted: they then fit the signed 16-bit lanes of
//! the multiply-add instruction, and since the two weights sum to 2048 the offset comes out as one constant.

/// Scale of the vertical weights.
pub(super) const VERTICAL_ONE: u16 = 256;
/// Scale of the horizontal weights.
pub(super) const HORIZONTAL_ONE: i16 = 2048;
/// Spare values after the last pixel of a blended row: whole 16-byte loads stay inside.
pub(super) const ROW_SPARE: usize = 8;

/// One output column: which two neighbouring pixels of the blended row, and the weight of the second.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tap {
    /// First value of the left pixel (pixel index times 3).
    pub offset: u32,
    /// Weight of the right pixel, 0..=2048.
    pub weight: i16,
}

/// The columns of an output row.
#[derive(Debug, Default)]
pub(super) struct Taps {
    list: Vec<Tap>,
    /// Largest offset in the list.
    last: usize,
}

impl Taps {
    /// Replaces the columns.
    pub fn set(&mut self, taps: impl Iterator<Item = Tap>) {
        self.list.clear();
        self.list.extend(taps);
        self.last = self.list.iter().map(|tap| tap.offset as usize).max().unwrap_or(0);
    }
}

/// `out[i] = a[i] * (256 - weight) + b[i] * weight - 32768`.
pub(super) fn blend(a: &[u8], b: &[u8], weight: u16, out: &mut [i16]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, the only requirement of the function.
        return unsafe { blend_avx2(a, b, weight, out) };
    }
    blend_body(a, b, weight, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn blend_avx2(a: &[u8], b: &[u8], weight: u16, out: &mut [i16]) {
    blend_body(a, b, weight, out);
}

#[inline(always)]
fn blend_body(a: &[u8], b: &[u8], weight: u16, out: &mut [i16]) {
    let first = VERTICAL_ONE - weight;
    for ((&a, &b), out) in a.iter().zip(b).zip(out) {
        *out = ((u16::from(a) * first + u16::from(b) * weight) ^ 0x8000) as i16;
    }
}

/// Samples a blended row: `out[3x + c] = row[tap.offset + c] * (1 - w) + row[tap.offset + 3 + c] * w`, rounded.
///
/// Every `tap.offset + ROW_SPARE` must lie within `row`; `out` holds 3 bytes per tap.
pub(super) fn sample(row: &[i16], taps: &Taps, out: &mut [u8]) {
    let Taps { list: taps, last } = taps;
    assert_eq!(out.len(), taps.len() * 3, "three bytes per column");
    assert!(last + ROW_SPARE <= row.len(), "a tap at {last} reads past a row of {}", row.len());
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("sse4.1") {
        // SAFETY: the processor has SSE4.1 (which includes SSSE3), and the assertion above keeps every load of eight
        // values at `tap.offset` inside `row`; the function never writes past `out`.
        return unsafe { sample_sse41(row, taps, out) };
    }
    sample_body(row, taps, out);
}

#[inline(always)]
fn sample_body(row: &[i16], taps: &[Tap], out: &mut [u8]) {
    for (tap, out) in taps.iter().zip(out.as_chunks_mut::<3>().0) {
        let at = tap.offset as usize;
        let (w0, w1) = (i32::from(HORIZONTAL_ONE - tap.weight), i32::from(tap.weight));
        for (c, out) in out.iter_mut().enumerate() {
            let sum = i32::from(row[at + c]) * w0 + i32::from(row[at + 3 + c]) * w1;
            *out = ((sum + (1 << 26) + (1 << 18)) >> 19) as u8;
        }
    }
}

/// # Safety
/// Every `tap.offset + 8 <= row.len()`, and `out.len() == 3 * taps.len()`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.1,ssse3")]
unsafe fn sample_sse41(row: &[i16], taps: &[Tap], out: &mut [u8]) {
    use std::arch::x86_64::*;
    // The last pixels go the plain way, because the vector way writes four bytes for three.
    let vector = taps.len().saturating_sub(2);
    // Lanes (r0, r1), (g0, g1), (b0, b1), unused: pairs for the multiply-add.
    let pairs = _mm_setr_epi8(0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, -1, -1, -1, -1);
    let round = _mm_set1_epi32((1 << 26) + (1 << 18));
    let bytes = _mm_setr_epi8(0, 4, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    let destination = out.as_mut_ptr();
    for (x, tap) in taps[..vector].iter().enumerate() {
        let weights = u32::from((HORIZONTAL_ONE - tap.weight) as u16) | u32::from(tap.weight as u16) << 16;
        // SAFETY: `offset + 8 <= row.len()` by the contract; `x < taps.len() - 2`, so the four bytes at `3x` are in `out`.
        unsafe {
            let pixels = _mm_loadu_si128(row.as_ptr().add(tap.offset as usize).cast());
            let sum = _mm_madd_epi16(_mm_shuffle_epi8(pixels, pairs), _mm_set1_epi32(weights as i32));
            let value = _mm_shuffle_epi8(_mm_srai_epi32(_mm_add_epi32(sum, round), 19), bytes);
            destination.add(3 * x).cast::<i32>().write_unaligned(_mm_cvtsi128_si32(value));
        }
    }
    sample_body(row, &taps[vector..], &mut out[3 * vector..]);
}

/// Splits a coordinate into the pixel at or before it and a weight of the next one in units of `1 / one`.
pub(super) fn split(at: f64, one: f64) -> (f64, f64) {
    let floor = at.floor();
    let weight = ((at - floor) * one).round();
    (floor, weight)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::rng::{Rng, Use};

    #[test]
    fn vector_and_plain_kernels_agree_and_are_near_exact() {
        let mut rng = Rng::new(3, Use::Test, 0, 0);
        for width in [1usize, 2, 3, 7, 64, 131] {
            let a: Vec<u8> = (0..width * 3).map(|_| rng.next_u32() as u8).collect();
            let b: Vec<u8> = (0..width * 3).map(|_| rng.next_u32() as u8).collect();
            let weight = rng.below(257) as u16;
            let mut row = vec![0i16; width * 3 + ROW_SPARE + 3];
            blend(&a, &b, weight, &mut row);
            let mut plain_row = vec![0i16; row.len()];
            blend_body(&a, &b, weight, &mut plain_row);
            assert_eq!(row, plain_row);
            let list: Vec<Tap> = (0..50)
                .map(|_| Tap { offset: 3 * rng.below(width) as u32, weight: rng.below(2049) as i16 })
                .collect();
            let (mut fast, mut plain) = (vec![0u8; 150], vec![0u8; 150]);
            let mut taps = Taps::default();
            taps.set(list.iter().copied());
            sample(&row, &taps, &mut fast);
            sample_body(&row, &list, &mut plain);
            assert_eq!(fast, plain);
            for (x, tap) in list.iter().enumerate() {
                let at = tap.offset as usize;
                if at + 6 > a.len() {
                    continue;
                }
                let (u, v) = (f64::from(weight) / 256.0, f64::from(tap.weight) / 2048.0);
                let lerp = |i: usize| f64::from(a[i]) * (1.0 - u) + f64::from(b[i]) * u;
                let exact = lerp(at) * (1.0 - v) + lerp(at + 3) * v;
                assert!((f64::from(fast[3 * x]) - exact).abs() < 0.51, "{} {exact}", fast[3 * x]);
            }
        }
    }
}
