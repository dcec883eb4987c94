//! The two-dimensional sine-cosine position embedding of RT-DETR's encoder.

/// Position embedding of a grid, row-major: `[ sin(y w) | cos(y w) | sin(x w) | cos(x w) ]` per cell with
/// frequencies `w_j = 10000^(-j/p)`, `j = 0..p-1`, `p = channels / 4`.
///
/// # Shapes
/// Output `[h * w][channels]`; `channels` must be divisible by four.
pub fn sine_cosine_2d(h: usize, w: usize, channels: usize) -> Vec<f32> {
    assert!(
        channels.is_multiple_of(4),
        "the position embedding needs channels divisible by 4, got {channels}"
    );
    let quarter = channels / 4;
    let frequencies: Vec<f32> =
        (0..quarter).map(|j| (1.0 / 10000f64.powf(j as f64 / quarter as f64)) as f32).collect();
    let mut out = Vec::with_capacity(h * w * channels);
    for y in 0..h {
        for x in 0..w {
            for (position, function) in
                [(y, f32::sin as fn(f32) -> f32), (y, f32::cos), (x, f32::sin), (x, f32::cos)]
            {
                out.extend(frequencies.iter().map(|frequency| function(position as f32 * frequency)));
            }
        }
    }
    out
}
