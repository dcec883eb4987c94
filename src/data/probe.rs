//! Whether an image file is whole and usable, without decoding it where that can be told from its structure.

use std::path::Path;

use super::{DataError, decode};

/// Images with a side below this are dropped, pixels.
pub const SIDE_MIN: u32 = 10;

/// How closely an image is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verify {
    /// Header and structure: finds files that were cut short.
    Structure,
    /// Decode it: finds damage anywhere.
    Decode,
}

/// What the file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageFacts {
    /// Width in pixels as displayed.
    pub width: u32,
    /// Height in pixels as displayed.
    pub height: u32,
}

/// Looks at an image file.
///
/// # Errors
/// A [`DataError`] with the path and the reason: unreadable, unknown format, cut short, damaged, too small, too large.
pub fn probe(path: &Path, verify: Verify) -> Result<ImageFacts, DataError> {
    let bytes = decode::read_limited(path)?;
    if bytes.is_empty() {
        return Err(DataError::image(path, "the file is empty"));
    }
    let whole = completeness(&bytes);
    if whole == Some(false) {
        return Err(DataError::image(path, "the file is cut short (its end marker is missing)"));
    }
    let (width, height) = decode::displayed_size(path, &bytes)?;
    if width < SIDE_MIN || height < SIDE_MIN {
        return Err(DataError::image(
            path,
            format!("{width}x{height} pixels; allowed: sides of at least {SIDE_MIN}"),
        ));
    }
    if u64::from(width) * u64::from(height) > decode::PIXELS_MAX {
        let allowed = decode::PIXELS_MAX;
        return Err(DataError::image(path, format!("{width}x{height} pixels; allowed: at most {allowed}")));
    }
    // Formats without a structure that is cheap to walk are decoded whatever was asked for.
    if whole.is_none() || verify == Verify::Decode {
        decode::decode_bytes(path, &bytes)?;
    }
    Ok(ImageFacts { width, height })
}

/// Whether the file reaches its end marker; `None` for formats where that says little.
fn completeness(bytes: &[u8]) -> Option<bool> {
    if bytes.starts_with(&[0xff, 0xd8]) {
        Some(jpeg_is_whole(bytes))
    } else if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        Some(png_is_whole(bytes))
    } else {
        None
    }
}

/// Walks the segments of a JPEG to its end-of-image marker; what follows that marker does not matter.
fn jpeg_is_whole(bytes: &[u8]) -> bool {
    if bytes.ends_with(&[0xff, 0xd9]) {
        return true;
    }
    let mut at = 2;
    while at + 2 <= bytes.len() {
        if bytes[at] != 0xff {
            // Entropy-coded data, or padding between segments.
            at += 1;
            continue;
        }
        match bytes[at + 1] {
            0xd9 => return true,
            // A stuffed byte, a fill byte, a restart marker: no segment of their own.
            0x00 | 0x01 | 0xd0..=0xd8 => at += 2,
            0xff => at += 1,
            _ => {
                let Some(length) = bytes.get(at + 2..at + 4) else { return false };
                at += 2 + usize::from(u16::from_be_bytes([length[0], length[1]])).max(2);
            }
        }
    }
    false
}

/// Walks the chunks of a PNG to `IEND`.
fn png_is_whole(bytes: &[u8]) -> bool {
    let mut at = 8;
    while let Some(header) = bytes.get(at..at + 8) {
        let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]) as usize;
        at = at.saturating_add(12).saturating_add(length);
        if &header[4..] == b"IEND" {
            return at <= bytes.len();
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn encoded(format: image::ImageFormat) -> Vec<u8> {
        let picture =
            image::RgbImage::from_fn(40, 30, |x, y| image::Rgb([x as u8 * 6, y as u8 * 8, (x * y) as u8]));
        let mut bytes = Vec::new();
        picture.write_to(&mut Cursor::new(&mut bytes), format).expect("encodes");
        bytes
    }

    #[test]
    fn cut_files_are_found_and_whole_ones_pass() {
        let dir = tempfile::tempdir().expect("a folder");
        use image::ImageFormat::{Bmp, Jpeg, Png, Tiff, WebP};
        for (format, name) in
            [(Jpeg, "a.jpg"), (Png, "a.png"), (Bmp, "a.bmp"), (WebP, "a.webp"), (Tiff, "a.tif")]
        {
            let bytes = encoded(format);
            let path = dir.path().join(name);
            for verify in [Verify::Structure, Verify::Decode] {
                std::fs::write(&path, &bytes).expect("written");
                let facts = probe(&path, verify).expect(name);
                assert_eq!((facts.width, facts.height), (40, 30));
                for cut in [bytes.len() - 3, bytes.len() / 2, 4, 0] {
                    std::fs::write(&path, &bytes[..cut]).expect("written");
                    let error = probe(&path, verify).expect_err(name).to_string();
                    assert!(error.contains(name), "{error}");
                }
            }
        }
        let path = dir.path().join("text.jpg");
        std::fs::write(&path, "hello, I am no image").expect("written");
        assert!(probe(&path, Verify::Structure).is_err());
    }

    #[test]
    fn a_jpeg_with_something_after_its_end_is_whole() {
        let mut bytes = encoded(image::ImageFormat::Jpeg);
        bytes.extend_from_slice(b"trailing text");
        assert!(jpeg_is_whole(&bytes));
    }
}
