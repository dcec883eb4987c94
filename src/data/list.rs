//! From what a dataset file names to a sorted list of image files.

use std::path::{Path, PathBuf};

use super::DataError;

/// Suffixes that make a file an image.
pub const SUFFIXES: [&str; 13] =
    ["avif", "bmp", "dng", "heic", "heif", "jp2", "jpeg", "jpg", "mpo", "png", "tif", "tiff", "webp"];
/// Deepest folder that is entered.
const DEPTH_MAX: usize = 32;
/// Most files of one split.
const FILES_MAX: usize = 20_000_000;
/// Largest list file, bytes.
const LIST_BYTES_MAX: u64 = 4 << 30;

/// True for a path with an image suffix, whatever its case.
pub fn is_image(path: &Path) -> bool {
    path.extension()
        .and_then(|suffix| suffix.to_str())
        .is_some_and(|suffix| SUFFIXES.iter().any(|known| known.eq_ignore_ascii_case(suffix)))
}

/// The images of one split: folders are read with their sub-folders, `.txt` files line by line. Sorted by path,
/// each once.
///
/// # Errors
/// [`DataError::Read`] when a folder or list cannot be read.
pub fn images_of(
    places: &[PathBuf],
    resolve: &dyn Fn(&str, &Path) -> PathBuf,
) -> Result<Vec<PathBuf>, DataError> {
    let mut out = Vec::new();
    for place in places {
        let is_list = place.extension().is_some_and(|suffix| suffix.eq_ignore_ascii_case("txt"));
        if is_list && place.is_file() {
            read_list(place, resolve, &mut out)?;
        } else if place.is_file() {
            out.push(place.clone());
        } else {
            walk(place, 0, &mut out)?;
        }
    }
    out.sort();
    out.dedup();
    Ok(out)
}

fn walk(folder: &Path, depth: usize, out: &mut Vec<PathBuf>) -> Result<(), DataError> {
    if depth > DEPTH_MAX {
        return Err(DataError::read(
            folder,
            std::io::Error::other(format!("deeper than {DEPTH_MAX} folders")),
        ));
    }
    for entry in std::fs::read_dir(folder).map_err(|e| DataError::read(folder, e))? {
        let entry = entry.map_err(|e| DataError::read(folder, e))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(|e| DataError::read(&path, e))?;
        let is_folder = kind.is_dir() || (kind.is_symlink() && path.is_dir());
        if is_folder {
            walk(&path, depth + 1, out)?;
        } else if is_image(&path) && !entry.file_name().as_encoded_bytes().starts_with(b"._") {
            if out.len() == FILES_MAX {
                return Err(DataError::read(
                    folder,
                    std::io::Error::other(format!("over {FILES_MAX} images")),
                ));
            }
            out.push(path);
        }
    }
    Ok(())
}

fn read_list(
    list: &Path,
    resolve: &dyn Fn(&str, &Path) -> PathBuf,
    out: &mut Vec<PathBuf>,
) -> Result<(), DataError> {
    let size = std::fs::metadata(list).map_err(|e| DataError::read(list, e))?.len();
    if size > LIST_BYTES_MAX {
        return Err(DataError::read(list, std::io::Error::other(format!("over {LIST_BYTES_MAX} bytes"))));
    }
    let text = std::fs::read_to_string(list).map_err(|e| DataError::read(list, e))?;
    for line in text.trim_start_matches('\u{feff}').lines() {
        let line = line.trim();
        if !line.is_empty() && !line.starts_with('#') {
            out.push(resolve(line, list));
        }
    }
    Ok(())
}

/// Where an image's labels are: the last folder `images` of its path becomes `labels`, the suffix `txt`.
pub fn label_path(image: &Path) -> PathBuf {
    let parts: Vec<_> = image.components().collect();
    let folders = parts.len().saturating_sub(1);
    let last = parts[..folders].iter().rposition(|part| part.as_os_str() == "images");
    let moved: PathBuf = match last {
        Some(last) => parts
            .iter()
            .enumerate()
            .map(|(i, part)| if i == last { std::ffi::OsStr::new("labels") } else { part.as_os_str() })
            .collect(),
        None => image.to_owned(),
    };
    moved.with_extension("txt")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_paths() {
        let of = |p: &str| label_path(Path::new(p)).to_string_lossy().into_owned();
        assert_eq!(of("/a/images/train/b.c.jpg"), "/a/labels/train/b.c.txt");
        assert_eq!(of("/images/images/x.PNG"), "/images/labels/x.txt");
        assert_eq!(of("train/x.png"), "train/x.txt");
        assert_eq!(of("images/x.png"), "labels/x.txt");
        assert!(is_image(Path::new("A.JPG")) && !is_image(Path::new("a.txt")) && !is_image(Path::new("png")));
    }
}
