//! The fixed colours of the house.

/// Red, green and blue, 0..=255.
pub type Colour = [u8; 3];

/// Text and axes on white.
pub const INK: Colour = [30, 41, 59];
/// Secondary text on white.
pub const MUTED: Colour = [100, 116, 139];
/// Paper.
pub const WHITE: Colour = [255, 255, 255];

/// One colour per class, repeated after twenty. Neighbours in the list differ strongly in hue, and all
/// are dark enough to read as a thin line on white and bright enough to be seen on a photograph.
pub const PALETTE: [Colour; 20] = [
    [37, 99, 235],
    [249, 115, 22],
    [22, 163, 74],
    [220, 38, 38],
    [147, 51, 234],
    [8, 145, 178],
    [219, 39, 119],
    [202, 138, 4],
    [71, 85, 105],
    [101, 163, 13],
    [30, 64, 175],
    [180, 83, 9],
    [13, 148, 136],
    [192, 38, 211],
    [20, 83, 45],
    [244, 63, 94],
    [14, 165, 233],
    [136, 19, 55],
    [124, 92, 246],
    [133, 100, 80],
];

/// The colour of a class.
pub fn class_colour(class: usize) -> Colour {
    PALETTE[class % PALETTE.len()]
}

/// Black or white, whichever reads better on `background` (relative luminance of ITU-R BT.709).
pub fn text_colour_on(background: Colour) -> Colour {
    let linear = |v: u8| (f32::from(v) / 255.0).powf(2.2);
    let luminance =
        0.2126 * linear(background[0]) + 0.7152 * linear(background[1]) + 0.0722 * linear(background[2]);
    if luminance > 0.36 { [15, 23, 42] } else { WHITE }
}

/// `from` at 0, `to` at 1, a straight line between them.
pub fn mix(from: Colour, to: Colour, share: f32) -> Colour {
    let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
    std::array::from_fn(|i| {
        (f32::from(from[i]) + (f32::from(to[i]) - f32::from(from[i])) * share).round() as u8
    })
}
