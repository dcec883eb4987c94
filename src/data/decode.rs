//! Files to pixels: JPEG, PNG, BMP, WebP, TIFF to RGB, upright.

use std::io::Cursor;
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageReader, Limits};

use super::{DataError, Image};

/// Largest image that is decoded, pixels. Larger ones are refused before memory is taken.
pub const PIXELS_MAX: u64 = 200_000_000;

/// Largest image file that is read, bytes.
pub const FILE_BYTES_MAX: u64 = 1 << 30;

/// Reads and decodes an image file. Grey, palette, alpha and 16-bit images become 8-bit RGB (alpha is dropped),
/// and the EXIF orientation is applied.
///
/// # Errors
/// [`DataError::Read`] and [`DataError::Image`], both with the path.
pub fn decode_file(path: &Path) -> Result<Image, DataError> {
    decode_bytes(path, &read_limited(path)?)
}

/// Reads a whole file of at most [`FILE_BYTES_MAX`].
pub(crate) fn read_limited(path: &Path) -> Result<Vec<u8>, DataError> {
    let bytes = std::fs::metadata(path).map_err(|e| DataError::read(path, e))?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(DataError::image(
            path,
            format!("file of {bytes} bytes; allowed: up to {FILE_BYTES_MAX}"),
        ));
    }
    std::fs::read(path).map_err(|e| DataError::read(path, e))
}

/// Decodes an image that is in memory; `path` is for messages.
///
/// # Errors
/// [`DataError::Image`] when the bytes are no image of a known format, are cut short or are too large.
pub fn decode_bytes(path: &Path, bytes: &[u8]) -> Result<Image, DataError> {
    let mut decoder = open(path, bytes)?;
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels > PIXELS_MAX || pixels == 0 {
        return Err(DataError::image(path, format!("{width}x{height} pixels; allowed: 1 to {PIXELS_MAX}")));
    }
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut decoded = DynamicImage::from_decoder(decoder)
        .map_err(|e| DataError::image(path, format!("does not decode: {}", e.to_string().trim())))?;
    decoded.apply_orientation(orientation);
    let rgb = decoded.into_rgb8();
    Ok(Image::from_pixels(rgb.height() as usize, rgb.width() as usize, rgb.into_raw()))
}

/// Width and height as displayed (EXIF orientation applied), from the header alone.
///
/// # Errors
/// [`DataError::Image`] when the header is not that of a known format.
pub fn displayed_size(path: &Path, bytes: &[u8]) -> Result<(u32, u32), DataError> {
    let mut decoder = open(path, bytes)?;
    let (width, height) = decoder.dimensions();
    let swapped = matches!(
        decoder.orientation().unwrap_or(Orientation::NoTransforms),
        Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
    );
    Ok(if swapped { (height, width) } else { (width, height) })
}

fn open<'a>(path: &Path, bytes: &'a [u8]) -> Result<impl ImageDecoder + 'a, DataError> {
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|e| DataError::image(path, format!("header cannot be read: {}", e.to_string().trim())))?;
    if reader.format().is_none() {
        return Err(DataError::image(path, "not an image of a known format (JPEG, PNG, BMP, WebP, TIFF)"));
    }
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(PIXELS_MAX * 16);
    reader.limits(limits);
    reader
        .into_decoder()
        .map_err(|e| DataError::image(path, format!("header cannot be read: {}", e.to_string().trim())))
}
