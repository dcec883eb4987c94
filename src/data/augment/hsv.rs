//! Colour jitter in HSV, numerically as with OpenCV's 8-bit HSV (hue 0..179).

use crate::engine::rng::Rng;

/// Pixels converted together; the arrays of one block stay in the first-level cache.
const BLOCK: usize = 256;

/// Draws the three gains: `U(-1, 1) * limit` for hue, saturation, value.
pub fn draw_gains(limits: [f64; 3], rng: &mut Rng) -> [f64; 3] {
    limits.map(|limit| (2.0 * rng.uniform() - 1.0) * limit)
}

/// Applies the gains to RGB pixels, in place:
/// `H <- (H + 180 r_h) mod 180`, `S <- clip(S (1 + r_s))`, `V <- clip(V (1 + r_v))`, truncated to whole numbers; a
/// saturation of 0 stays 0. Does nothing when all gains are 0.
pub fn jitter(pixels: &mut [u8], gains: [f64; 3]) {
    if gains == [0.0; 3] {
        return;
    }
    let tables = Tables::new(gains);
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, the only requirement of the function.
        return unsafe { jitter_avx2(pixels, &tables) };
    }
    jitter_body(pixels, &tables);
}

/// What becomes of each 8-bit hue, saturation and value.
struct Tables {
    hue: [u8; 256],
    saturation: [u8; 256],
    value: [u8; 256],
}

impl Tables {
    fn new([hue, saturation, value]: [f64; 3]) -> Tables {
        let scaled = |i: usize, gain: f64| (i as f64 * (1.0 + gain)).clamp(0.0, 255.0) as u8;
        let mut tables = Tables {
            hue: std::array::from_fn(|i| (i as f64 + hue * 180.0).rem_euclid(180.0) as u8),
            saturation: std::array::from_fn(|i| scaled(i, saturation)),
            value: std::array::from_fn(|i| scaled(i, value)),
        };
        tables.saturation[0] = 0;
        tables
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn jitter_avx2(pixels: &mut [u8], tables: &Tables) {
    jitter_body(pixels, tables);
}

#[inline(always)]
fn jitter_body(pixels: &mut [u8], tables: &Tables) {
    let (mut a, mut b, mut c) = ([0f32; BLOCK], [0f32; BLOCK], [0f32; BLOCK]);
    for block in pixels.chunks_mut(BLOCK * 3) {
        for (i, rgb) in block.as_chunks::<3>().0.iter().enumerate() {
            (a[i], b[i], c[i]) = (f32::from(rgb[0]), f32::from(rgb[1]), f32::from(rgb[2]));
        }
        to_hsv(&mut a, &mut b, &mut c);
        for i in 0..BLOCK {
            a[i] = f32::from(tables.hue[a[i] as u8 as usize]);
            b[i] = f32::from(tables.saturation[b[i] as u8 as usize]);
            c[i] = f32::from(tables.value[c[i] as u8 as usize]);
        }
        to_rgb(&mut a, &mut b, &mut c);
        for (i, rgb) in block.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            *rgb = [a[i] as u8, b[i] as u8, c[i] as u8];
        }
    }
}

/// RGB to HSV in whole numbers held as floats: OpenCV's fixed-point formula with 12 fractional bits,
/// `S = (diff * round(255 * 4096 / V) + 2048) >> 12`, `H = (h * round(30 * 4096 / diff) + 2048) >> 12`.
#[inline(always)]
fn to_hsv(a: &mut [f32; BLOCK], b: &mut [f32; BLOCK], c: &mut [f32; BLOCK]) {
    for i in 0..BLOCK {
        let (red, green, blue) = (a[i], b[i], c[i]);
        let value = red.max(green).max(blue);
        let diff = value - red.min(green).min(blue);
        // The quotients have at most 20 integer bits and are never near a tie, so single precision rounds them right.
        let by_value = ((255 << 12) as f32 / value.max(1.0)).round_ties_even() as i32;
        let by_diff = ((30 << 12) as f32 / diff.max(1.0)).round_ties_even() as i32;
        let saturation = (diff as i32 * by_value + 2048) >> 12;
        let sector = if value == red {
            green - blue
        } else if value == green {
            blue - red + 2.0 * diff
        } else {
            red - green + 4.0 * diff
        };
        let hue = (sector as i32 * by_diff + 2048) >> 12;
        (a[i], b[i], c[i]) = ((if hue < 0 { hue + 180 } else { hue }) as f32, saturation as f32, value);
    }
}

/// HSV to RGB: `f(n) = V - V S clamp(min(k, 4 - k), 0, 1)`, `k = (n + H / 30) mod 6`, n = 5, 3, 1, rounded.
#[inline(always)]
fn to_rgb(a: &mut [f32; BLOCK], b: &mut [f32; BLOCK], c: &mut [f32; BLOCK]) {
    for i in 0..BLOCK {
        let (hue, chroma, value) = (a[i] * (1.0 / 30.0), c[i] * b[i] * (1.0 / 255.0), c[i]);
        let channel = |n: f32| {
            let k = n + hue;
            let k = if k >= 6.0 { k - 6.0 } else { k };
            (value - chroma * k.min(4.0 - k).clamp(0.0, 1.0)).round_ties_even()
        };
        (a[i], b[i], c[i]) = (channel(5.0), channel(3.0), channel(1.0));
    }
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
    fn vector_and_plain_code_agree() {
        let mut rng = Rng::new(9, crate::engine::rng::Use::Test, 0, 0);
        let mut a: Vec<u8> = (0..3 * 1000).map(|_| rng.next_u32() as u8).collect();
        let mut b = a.clone();
        jitter(&mut a, [0.1, -0.3, 0.4]);
        jitter_body(&mut b, &Tables::new([0.1, -0.3, 0.4]));
        assert_eq!(a, b);
    }
}
