//! Pixels in memory.

/// An RGB image, 8 bits per channel, rows top to bottom, channels innermost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
    /// `height * width * 3` bytes.
    pub pixels: Vec<u8>,
}

impl Image {
    /// An image of one colour.
    pub fn filled(height: usize, width: usize, rgb: [u8; 3]) -> Image {
        Image { height, width, pixels: rgb.repeat(height * width) }
    }

    /// Takes `height * width * 3` bytes; panics when the count differs.
    pub fn from_pixels(height: usize, width: usize, pixels: Vec<u8>) -> Image {
        assert_eq!(pixels.len(), height * width * 3, "an RGB image of {height}x{width}");
        Image { height, width, pixels }
    }

    /// One row, `width * 3` bytes.
    pub fn row(&self, y: usize) -> &[u8] {
        &self.pixels[y * self.width * 3..(y + 1) * self.width * 3]
    }

    /// The three channels at a place.
    pub fn pixel(&self, x: usize, y: usize) -> [u8; 3] {
        let at = (y * self.width + x) * 3;
        [self.pixels[at], self.pixels[at + 1], self.pixels[at + 2]]
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.pixels.len()
    }
}
