//! Colour jitter in HSV, numerically as with OpenCV's 8-bit HSV (hue 0..179).

use crate::engine::rng::Rng;

/// Draws the three gains: `U(-1, 1) * limit` for hue, saturation, value.
pub fn draw_gains(limits: [f64; 3], rng: &mut Rng) -> [f64; 3] {
    limits.map(|limit| (2.0 * rng.uniform() - 1.0) * limit)
}

/// Applies the gains to RGB pixels, in place:
/// `H <- (H + 180 r_h) mod 180`, `S <- clip(S (1 + r_s))`, `V <- clip(V (1 + r_v))`, truncated to whole numbers; a
/// saturation of 0 stays 0. Does nothing when all gains are 0.
///
/// RGB to HSV is OpenCV's fixed-point formula with 12 fractional bits,
/// `S = (diff * round(255 * 4096 / V) + 2048) >> 12`, `H = (sector * round(30 * 4096 / diff) + 2048) >> 12`;
/// the way back is `channel = V - V S weight(H)` in single precision, rounded.
pub fn jitter(pixels: &mut [u8], gains: [f64; 3]) {
    if gains == [0.0; 3] {
        return;
    }
    let change = Change::new(gains);
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, the only requirement of the function.
        return unsafe { jitter_avx2(pixels, &change) };
    }
    jitter_plain(pixels, &change);
}

/// The gains as they are applied.
struct Change {
    /// Added to the hue, `0..180`: hues are whole, so truncation leaves only the whole part of the shift.
    hue: i32,
    /// Factors in double precision: `x * factor` often falls just beside a whole number, and is then truncated.
    saturation: f64,
    value: f64,
}

impl Change {
    fn new([hue, saturation, value]: [f64; 3]) -> Change {
        let factor = |gain: f64| (1.0 + gain).max(0.0);
        Change {
            hue: (hue * 180.0).floor().rem_euclid(180.0) as i32,
            saturation: factor(saturation),
            value: factor(value),
        }
    }
}

/// The jitter as tables, for whoever cannot afford double precision: the whole hue to add, and what each saturation
/// (first 256) and each value grow to. `None` when all gains are 0.
pub fn tables(gains: [f64; 3]) -> Option<(i32, [u8; 512])> {
    if gains == [0.0; 3] {
        return None;
    }
    let change = Change::new(gains);
    let growth = std::array::from_fn(|i| {
        let factor = if i < 256 { change.saturation } else { change.value };
        ((i % 256) as f64 * factor).min(255.0) as u8
    });
    Some((change.hue, growth))
}

/// One pixel after the other: the form the vector code must equal bit for bit.
fn jitter_plain(pixels: &mut [u8], change: &Change) {
    for pixel in pixels.as_chunks_mut::<3>().0 {
        let [red, green, blue] = pixel.map(i32::from);
        let value = red.max(green).max(blue);
        let diff = value - red.min(green).min(blue);
        // The quotients have at most 20 integer bits and are never near a tie, so single precision rounds them right.
        let by_value = ((255 << 12) as f32 / value.max(1) as f32).round_ties_even() as i32;
        let by_diff = ((30 << 12) as f32 / diff.max(1) as f32).round_ties_even() as i32;
        let saturation = (diff * by_value + 2048) >> 12;
        let sector = if value == red {
            green - blue
        } else if value == green {
            blue - red + 2 * diff
        } else {
            red - green + 4 * diff
        };
        let hue = (sector * by_diff + 2048) >> 12;
        let hue = if hue < 0 { hue + 180 } else { hue } + change.hue;
        let hue = if hue >= 180 { hue - 180 } else { hue };
        let grown = |v: i32, factor: f64| (v as f64 * factor).min(255.0).trunc() as f32;
        let (saturation, value) = (grown(saturation, change.saturation), grown(value, change.value));
        let hue = hue as f32 * (1.0 / 30.0);
        let chroma = value * saturation * (1.0 / 255.0);
        let channel = |weight: f32| (value - chroma * weight).round_ties_even() as u8;
        let near = |centre: f32| 1.0 - (2.0 - (hue - centre).abs()).clamp(0.0, 1.0);
        *pixel = [
            channel(1.0 - ((hue - 3.0).abs() - 1.0).clamp(0.0, 1.0)),
            channel(near(2.0)),
            channel(near(4.0)),
        ];
    }
}

/// Eight pixels at a time.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn jitter_avx2(pixels: &mut [u8], change: &Change) {
    use std::arch::x86_64::*;
    const STEP: usize = 24;
    // Both loads of a step read 16 bytes, the second at 12: 28 bytes in all, so the last pixels go the plain way.
    let steps = pixels.len().saturating_sub(4) / STEP;
    let start = pixels.as_mut_ptr();
    let spread = |c: i8| {
        let lane = _mm_setr_epi8(c, -1, -1, -1, c + 3, -1, -1, -1, c + 6, -1, -1, -1, c + 9, -1, -1, -1);
        _mm256_broadcastsi128_si256(lane)
    };
    let masks = [spread(0), spread(1), spread(2)];
    let gather =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    let int = |v: i32| _mm256_set1_epi32(v);
    let real = |v: f32| _mm256_set1_ps(v);
    let unit = |v: __m256| _mm256_min_ps(_mm256_max_ps(v, _mm256_setzero_ps()), _mm256_set1_ps(1.0));
    let magnitude = |v: __m256| _mm256_andnot_ps(_mm256_set1_ps(-0.0), v);
    // round(numerator / max(v, 1)); the conversion rounds to nearest even.
    let quotient = |numerator: i32, v: __m256i| {
        let v = _mm256_cvtepi32_ps(_mm256_max_epi32(v, _mm256_set1_epi32(1)));
        _mm256_cvtps_epi32(_mm256_div_ps(_mm256_set1_ps(numerator as f32), v))
    };
    let scaled = |a: __m256i, b: __m256i| {
        _mm256_srai_epi32(_mm256_add_epi32(_mm256_mullo_epi32(a, b), _mm256_set1_epi32(2048)), 12)
    };
    let grown = |v: __m256i, factor: f64| {
        let half = |v: __m128i| {
            let v = _mm256_mul_pd(_mm256_cvtepi32_pd(v), _mm256_set1_pd(factor));
            _mm256_cvttpd_epi32(_mm256_min_pd(v, _mm256_set1_pd(255.0)))
        };
        let (low, high) = (half(_mm256_castsi256_si128(v)), half(_mm256_extracti128_si256(v, 1)));
        _mm256_cvtepi32_ps(_mm256_set_m128i(high, low))
    };
    for step in 0..steps {
        // SAFETY: `step * 24 + 28 <= pixels.len()`, because `steps * 24 + 4 <= pixels.len()`.
        let (packed, at) = unsafe {
            let at = start.add(step * STEP);
            (_mm256_loadu2_m128i(at.add(12).cast(), at.cast()), at)
        };
        let [red, green, blue] = masks.map(|mask| _mm256_shuffle_epi8(packed, mask));
        let value = _mm256_max_epi32(_mm256_max_epi32(red, green), blue);
        let diff = _mm256_sub_epi32(value, _mm256_min_epi32(_mm256_min_epi32(red, green), blue));
        let saturation = scaled(diff, quotient(255 << 12, value));
        let twice = _mm256_slli_epi32(diff, 1);
        let on_red = _mm256_sub_epi32(green, blue);
        let on_green = _mm256_add_epi32(_mm256_sub_epi32(blue, red), twice);
        let on_blue = _mm256_add_epi32(_mm256_sub_epi32(red, green), _mm256_slli_epi32(diff, 2));
        let sector = _mm256_blendv_epi8(on_blue, on_green, _mm256_cmpeq_epi32(value, green));
        let sector = _mm256_blendv_epi8(sector, on_red, _mm256_cmpeq_epi32(value, red));
        let hue = scaled(sector, quotient(30 << 12, diff));
        let wrap = _mm256_and_si256(_mm256_cmpgt_epi32(int(0), hue), int(180));
        let hue = _mm256_add_epi32(_mm256_add_epi32(hue, wrap), int(change.hue));
        let wrap = _mm256_and_si256(_mm256_cmpgt_epi32(hue, int(179)), int(180));
        let hue = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(hue, wrap)), real(1.0 / 30.0));
        let (saturation, value) = (grown(saturation, change.saturation), grown(value, change.value));
        let chroma = _mm256_mul_ps(_mm256_mul_ps(value, saturation), real(1.0 / 255.0));
        let channel = |inner: __m256| {
            let weight = _mm256_sub_ps(_mm256_set1_ps(1.0), unit(inner));
            _mm256_cvtps_epi32(_mm256_sub_ps(value, _mm256_mul_ps(chroma, weight)))
        };
        let away = |centre: f32| magnitude(_mm256_sub_ps(hue, _mm256_set1_ps(centre)));
        let red = channel(_mm256_sub_ps(away(3.0), real(1.0)));
        let green = channel(_mm256_sub_ps(real(2.0), away(2.0)));
        let blue = channel(_mm256_sub_ps(real(2.0), away(4.0)));
        let together =
            _mm256_or_si256(red, _mm256_or_si256(_mm256_slli_epi32(green, 8), _mm256_slli_epi32(blue, 16)));
        let bytes = _mm256_shuffle_epi8(together, gather);
        let (low, high) = (_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
        // SAFETY: as for the load; the first store ends at byte 16, the second at 20, the third at 24. What the first
        // writes beyond byte 12 belongs to this step and is overwritten by the second.
        unsafe {
            _mm_storeu_si128(at.cast(), low);
            _mm_storel_epi64(at.add(12).cast(), high);
            at.add(20).cast::<i32>().write_unaligned(_mm_extract_epi32(high, 2));
        }
    }
    jitter_plain(&mut pixels[steps * STEP..], change);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_gain_and_grey_stay() {
        let mut pixels: Vec<u8> = (0..=255).flat_map(|v| [v, v, v]).collect();
        let before = pixels.clone();
        jitter(&mut pixels, [0.0; 3]);
        assert_eq!(pixels, before);
        jitter(&mut pixels, [0.3, 0.5, 0.0]);
        assert_eq!(pixels, before, "grey has no hue and no saturation");
        jitter(&mut pixels, [0.0, 0.0, -0.5]);
        assert_eq!(pixels[3 * 200], 100);
    }

    #[test]
    fn divisions_equal_the_tables_of_the_reference() {
        for v in 1..256i64 {
            let table = |numerator: i64| {
                let (q, r) = (numerator / v, numerator % v);
                q + i64::from(2 * r > v || (2 * r == v && q % 2 == 1))
            };
            let quotient = |numerator: i64| (numerator as f32 / v as f32).round_ties_even() as i64;
            assert_eq!(quotient(255 << 12), table(255 << 12), "{v}");
            assert_eq!(quotient(30 << 12), table(30 << 12), "{v}");
        }
    }

    #[test]
    fn growth_truncates_the_product_in_double_precision() {
        // 45 * 1.4 lies just below 63, 90 * 1.3 at 117 and 100 * 1.15 just below 115.
        for (value, gain) in [(45u8, 0.4), (90, 0.3), (170, 0.3), (100, 0.15), (180, 0.4)] {
            let mut pixels = [value; 3 * 17];
            jitter(&mut pixels, [0.0, 0.0, gain]);
            let expected = (f64::from(value) * (1.0 + gain)).min(255.0) as u8;
            assert_eq!(pixels, [expected; 3 * 17], "{value} * (1 + {gain})");
        }
    }

    #[test]
    fn vector_and_plain_code_agree() {
        let mut rng = Rng::new(9, crate::engine::rng::Use::Test, 0, 0);
        let mut a: Vec<u8> = (0..3 * 10_001).map(|_| rng.next_u32() as u8).collect();
        let mut b = a.clone();
        jitter(&mut a, [0.1, -0.3, 0.4]);
        jitter_plain(&mut b, &Change::new([0.1, -0.3, 0.4]));
        assert_eq!(a, b);
    }
}
