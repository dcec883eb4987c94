//! The built-in "shapes" set: circles, squares and triangles on textured grounds.
//!
//! It exists so that a fresh machine can train something real to see without fetching anything. It is a function of its
//! arguments: the same seed gives the same bytes. Each class has a base hue (circles red, squares green, triangles
//! blue) that is varied, as are brightness, size and rotation, so that a small network learns it within minutes.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use image::{ExtendedColorType, ImageEncoder, codecs::jpeg::JpegEncoder, codecs::png::PngEncoder};

use super::labels::Label;
use super::{DataError, Image};
use crate::engine::rng::{Rng, Use};

/// Class names in order.
pub const NAMES: [&str; 3] = ["circle", "square", "triangle"];
/// Name of the folder that is made when it is asked for and absent.
pub const FOLDER_NAME: &str = "shapes";
/// Objects per image: at least one, at most this.
const OBJECTS_MAX: usize = 6;
/// Places tried for one object.
const TRIES: usize = 40;
/// Objects may overlap up to this IoU.
const OVERLAP_MAX: f32 = 0.05;
/// Cells of the ground texture per side.
const CELLS: usize = 6;
/// Sample points per pixel side, against jagged edges.
const SUBPIXELS: usize = 3;

/// File format of the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// JPEG, quality 92.
    Jpeg,
    /// PNG.
    Png,
}

/// What to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SynthArgs {
    /// Training images.
    pub images: usize,
    /// Validation images.
    pub val_images: usize,
    /// Side of the square images, pixels.
    pub imgsz: usize,
    /// Seed.
    pub seed: u64,
    /// File format.
    pub format: Format,
}

impl Default for SynthArgs {
    fn default() -> SynthArgs {
        SynthArgs { images: 256, val_images: 64, imgsz: 160, seed: 0, format: Format::Jpeg }
    }
}

/// Makes the shapes set when `path` is missing and its folder is called `shapes` and absent or empty. Says so loudly.
///
/// # Errors
/// [`DataError::Write`].
pub fn provide_shapes(path: &Path, args: &SynthArgs) -> Result<(), DataError> {
    let is_yaml = path.extension().is_some_and(|suffix| suffix == "yaml" || suffix == "yml");
    let folder = if is_yaml { path.parent().unwrap_or(path) } else { path };
    let is_ours = folder.file_name().is_some_and(|name| name == FOLDER_NAME);
    let default_file = !is_yaml || path.file_name().is_some_and(|name| name == "data.yaml");
    if !is_ours || !default_file || !is_vacant(folder) {
        return Ok(());
    }
    tracing::warn!(
        folder = %folder.display(),
        images = args.images,
        val_images = args.val_images,
        "the built-in shapes dataset is not there; it is being made"
    );
    match write_dataset(folder, args) {
        // Another process was quicker.
        Err(_) if folder.join("data.yaml").is_file() => Ok(()),
        result => result,
    }
}

fn is_vacant(folder: &Path) -> bool {
    !folder.exists() || std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// Writes a dataset folder: `images/{train,val}`, `labels/{train,val}`, `data.yaml`. It appears as a whole or not at all.
///
/// # Errors
/// [`DataError::Option`] for sizes out of range; [`DataError::Write`] when the folder holds something already or cannot
/// be written.
pub fn write_dataset(folder: &Path, args: &SynthArgs) -> Result<(), DataError> {
    check(args)?;
    if !is_vacant(folder) {
        return Err(DataError::write(folder, std::io::Error::other("the folder is not empty")));
    }
    let parent = folder.parent().filter(|p| *p != Path::new("")).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(|e| DataError::write(parent, e))?;
    let name = folder.file_name().map_or("dataset".into(), |name| name.to_string_lossy());
    let temporary = parent.join(format!(".{name}.part-{}", std::process::id()));
    let result = fill(&temporary, args)
        .and_then(|()| std::fs::rename(&temporary, folder).map_err(|e| DataError::write(folder, e)));
    if result.is_err() {
        // What is left is only ours; that it cannot be removed changes nothing about the failure.
        let _ = std::fs::remove_dir_all(&temporary);
    }
    result
}

fn check(args: &SynthArgs) -> Result<(), DataError> {
    let ranges = [
        ("images", args.images, 1..=1_000_000, "1 to 1000000"),
        ("val_images", args.val_images, 1..=1_000_000, "1 to 1000000"),
        ("imgsz", args.imgsz, 32..=4096, "32 to 4096"),
    ];
    for (key, value, range, allowed) in ranges {
        if !range.contains(&value) {
            return Err(DataError::Option { key, value: value.to_string(), allowed });
        }
    }
    Ok(())
}

fn fill(folder: &Path, args: &SynthArgs) -> Result<(), DataError> {
    use rayon::prelude::*;
    for (number, (split, count)) in [("train", args.images), ("val", args.val_images)].into_iter().enumerate()
    {
        let (images, labels) = (folder.join("images").join(split), folder.join("labels").join(split));
        for folder in [&images, &labels] {
            std::fs::create_dir_all(folder).map_err(|e| DataError::write(folder, e))?;
        }
        (0..count).into_par_iter().try_for_each(|i| {
            let (image, objects) = scene(args, number as u32, i as u32);
            let suffix = if args.format == Format::Jpeg { "jpg" } else { "png" };
            write(&images.join(format!("{i:06}.{suffix}")), &encode(&image, args.format)?)?;
            let text: String = objects
                .iter()
                .map(|l| {
                    let [cx, cy, w, h] = l.cxcywh;
                    format!("{} {cx:.6} {cy:.6} {w:.6} {h:.6}\n", l.class)
                })
                .collect();
            write(&labels.join(format!("{i:06}.txt")), text.as_bytes())
        })?;
    }
    let names: String = NAMES.iter().enumerate().map(|(i, name)| format!("  {i}: {name}\n")).collect();
    let yaml = format!(
        "# Synthetic shapes, seed {}: {} + {} images of {} px.\npath: .\ntrain: images/train\nval: images/val\nnc: 3\nnames:\n{names}",
        args.seed, args.images, args.val_images, args.imgsz
    );
    write(&folder.join("data.yaml"), yaml.as_bytes())
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    std::fs::write(path, bytes).map_err(|e| DataError::write(path, e))
}

fn encode(image: &Image, format: Format) -> Result<Vec<u8>, DataError> {
    let mut bytes = Cursor::new(Vec::new());
    let (w, h) = (image.width as u32, image.height as u32);
    match format {
        Format::Jpeg => JpegEncoder::new_with_quality(&mut bytes, 92).write_image(
            &image.pixels,
            w,
            h,
            ExtendedColorType::Rgb8,
        ),
        Format::Png => PngEncoder::new(&mut bytes).write_image(&image.pixels, w, h, ExtendedColorType::Rgb8),
    }
    .map_err(|e| DataError::image(&PathBuf::from("(synthetic)"), e.to_string()))?;
    Ok(bytes.into_inner())
}

/// One object: its outline in pixels.
struct Shape {
    class: u32,
    centre: [f32; 2],
    /// Radius of the circle around it.
    radius: f32,
    /// Corners; empty for a circle.
    corners: Vec<[f32; 2]>,
    rgb: [f32; 3],
}

impl Shape {
    fn draw(class: u32, side: f32, rng: &mut Rng) -> Shape {
        let mut range = |low: f32, high: f32| rng.range(f64::from(low), f64::from(high)) as f32;
        let radius = side * range(0.15, 0.5) / 2.0;
        let centre = [range(radius, side - radius), range(radius, side - radius)];
        let turn = range(0.0, std::f32::consts::TAU);
        let hue = [0.0, 120.0, 230.0][class as usize] + range(-25.0, 25.0);
        let rgb = hsv_to_rgb(hue.rem_euclid(360.0), range(0.65, 1.0), range(150.0, 255.0));
        let count = [0, 4, 3][class as usize];
        let corners = (0..count)
            .map(|i| {
                let angle = turn + std::f32::consts::TAU * i as f32 / count as f32;
                [centre[0] + radius * angle.cos(), centre[1] + radius * angle.sin()]
            })
            .collect();
        Shape { class, centre, radius, corners, rgb }
    }

    /// Left, top, right, bottom.
    fn xyxy(&self) -> [f32; 4] {
        if self.corners.is_empty() {
            let [x, y] = self.centre;
            return [x - self.radius, y - self.radius, x + self.radius, y + self.radius];
        }
        self.corners.iter().fold([f32::MAX, f32::MAX, f32::MIN, f32::MIN], |b, &[x, y]| {
            [b[0].min(x), b[1].min(y), b[2].max(x), b[3].max(y)]
        })
    }

    fn contains(&self, x: f32, y: f32) -> bool {
        if self.corners.is_empty() {
            return (x - self.centre[0]).hypot(y - self.centre[1]) <= self.radius;
        }
        // Corners go around once, so the point is inside when it lies on one side of all edges.
        (0..self.corners.len()).all(|i| {
            let ([ax, ay], [bx, by]) = (self.corners[i], self.corners[(i + 1) % self.corners.len()]);
            (bx - ax) * (y - ay) - (by - ay) * (x - ax) >= 0.0
        })
    }

    fn paint(&self, image: &mut Image) {
        let [x1, y1, x2, y2] = self.xyxy();
        let columns = x1.max(0.0) as usize..(x2.ceil() as usize).min(image.width);
        for y in y1.max(0.0) as usize..(y2.ceil() as usize).min(image.height) {
            for x in columns.clone() {
                let at = |i: usize| (i as f32 + 0.5) / SUBPIXELS as f32;
                let inside = (0..SUBPIXELS * SUBPIXELS)
                    .filter(|i| self.contains(x as f32 + at(i % SUBPIXELS), y as f32 + at(i / SUBPIXELS)))
                    .count();
                let cover = inside as f32 / (SUBPIXELS * SUBPIXELS) as f32;
                let pixel = &mut image.pixels[(y * image.width + x) * 3..][..3];
                for (value, colour) in pixel.iter_mut().zip(self.rgb) {
                    *value = (f32::from(*value) * (1.0 - cover) + colour * cover).round() as u8;
                }
            }
        }
    }
}

fn hsv_to_rgb(hue: f32, saturation: f32, value: f32) -> [f32; 3] {
    [5.0, 3.0, 1.0].map(|n| {
        let k = (n + hue / 60.0) % 6.0;
        value - value * saturation * k.min(4.0 - k).clamp(0.0, 1.0)
    })
}

/// One image and its labels, from `Rng::new(seed, Use::Synth, split, index)`.
pub fn scene(args: &SynthArgs, split: u32, index: u32) -> (Image, Vec<Label>) {
    let rng = &mut Rng::new(args.seed, Use::Synth, split, index);
    let side = args.imgsz as f32;
    let mut image = ground(args.imgsz, rng);
    let mut shapes: Vec<Shape> = Vec::new();
    for _ in 0..1 + rng.below(OBJECTS_MAX) {
        let class = rng.below(NAMES.len()) as u32;
        let free = (0..TRIES)
            .map(|_| Shape::draw(class, side, rng))
            .find(|new| shapes.iter().all(|old| iou(old.xyxy(), new.xyxy()) <= OVERLAP_MAX));
        shapes.extend(free);
    }
    let labels = shapes
        .iter()
        .map(|shape| {
            shape.paint(&mut image);
            let [x1, y1, x2, y2] = shape.xyxy().map(|v| (v / side).clamp(0.0, 1.0));
            Label { class: shape.class, cxcywh: [(x1 + x2) / 2.0, (y1 + y2) / 2.0, x2 - x1, y2 - y1] }
        })
        .collect();
    (image, labels)
}

/// A muted patchwork of smooth colour with grain.
fn ground(side: usize, rng: &mut Rng) -> Image {
    let base = rng.range(60.0, 190.0);
    let grid: Vec<[f32; 3]> = (0..(CELLS + 1) * (CELLS + 1))
        .map(|_| {
            let level = base + rng.range(-40.0, 40.0);
            std::array::from_fn(|_| (level + rng.range(-12.0, 12.0)) as f32)
        })
        .collect();
    let mut image = Image::filled(side, side, [0; 3]);
    for (i, pixel) in image.pixels.as_chunks_mut::<3>().0.iter_mut().enumerate() {
        let place = |v: usize| v as f32 / side as f32 * CELLS as f32;
        let (x, y) = (place(i % side), place(i / side));
        let (x0, y0) = (x as usize, y as usize);
        let (u, v) = (x.fract(), y.fract());
        let grain = (rng.next_u32() % 17) as f32 - 8.0;
        for (c, value) in pixel.iter_mut().enumerate() {
            let at = |dx: usize, dy: usize| grid[(y0 + dy) * (CELLS + 1) + x0 + dx][c];
            let upper = at(0, 0) * (1.0 - u) + at(1, 0) * u;
            let lower = at(0, 1) * (1.0 - u) + at(1, 1) * u;
            *value = (upper * (1.0 - v) + lower * v + grain).round().clamp(0.0, 255.0) as u8;
        }
    }
    image
}

fn iou(a: [f32; 4], b: [f32; 4]) -> f32 {
    let w = (a[2].min(b[2]) - a[0].max(b[0])).max(0.0);
    let h = (a[3].min(b[3]) - a[1].max(b[1])).max(0.0);
    let area = |r: [f32; 4]| (r[2] - r[0]) * (r[3] - r[1]);
    w * h / (area(a) + area(b) - w * h)
}
