//! Flips and channel order, in place.

use super::PixelBox;

/// Mirrors left and right: `x <- width - x`.
pub fn horizontal(pixels: &mut [u8], width: usize, boxes: &mut [PixelBox]) {
    for row in pixels.chunks_exact_mut(width * 3) {
        row.as_chunks_mut::<3>().0.reverse();
    }
    horizontal_boxes(width, boxes);
}

/// What [`horizontal`] does to boxes.
pub fn horizontal_boxes(width: usize, boxes: &mut [PixelBox]) {
    for b in boxes {
        let [x1, y1, x2, y2] = b.xyxy;
        b.xyxy = [width as f32 - x2, y1, width as f32 - x1, y2];
    }
}

/// Mirrors top and bottom: `y <- height - y`.
pub fn vertical(pixels: &mut [u8], width: usize, boxes: &mut [PixelBox]) {
    let pitch = width * 3;
    let height = pixels.len() / pitch;
    let (top, bottom) = pixels.split_at_mut(height / 2 * pitch);
    let skip = if height.is_multiple_of(2) { 0 } else { pitch };
    for (a, b) in top.chunks_exact_mut(pitch).zip(bottom[skip..].chunks_exact_mut(pitch).rev()) {
        a.swap_with_slice(b);
    }
    vertical_boxes(height, boxes);
}

/// What [`vertical`] does to boxes.
pub fn vertical_boxes(height: usize, boxes: &mut [PixelBox]) {
    for b in boxes {
        let [x1, y1, x2, y2] = b.xyxy;
        b.xyxy = [x1, height as f32 - y2, x2, height as f32 - y1];
    }
}

/// Swaps red and blue.
pub fn swap_channels(pixels: &mut [u8]) {
    for pixel in pixels.as_chunks_mut::<3>().0 {
        pixel.swap(0, 2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twice_is_nothing_and_boxes_follow_pixels() {
        for (height, width) in [(4usize, 3usize), (5, 4), (1, 1)] {
            let original: Vec<u8> = (0..height * width * 3).map(|v| v as u8).collect();
            let mut pixels = original.clone();
            let boxes = [PixelBox { class: 0, xyxy: [0.0, 0.0, 1.0, 1.0] }];
            let mut flipped = boxes;
            horizontal(&mut pixels, width, &mut flipped);
            assert_eq!(pixels[(width - 1) * 3..width * 3], original[..3]);
            assert_eq!(flipped[0].xyxy[2], width as f32);
            vertical(&mut pixels, width, &mut flipped);
            assert_eq!(pixels[pixels.len() - 3..], original[..3]);
            assert_eq!(flipped[0].xyxy[3], height as f32);
            horizontal(&mut pixels, width, &mut flipped);
            vertical(&mut pixels, width, &mut flipped);
            assert_eq!((pixels, flipped), (original, boxes));
        }
    }
}
