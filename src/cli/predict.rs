//! `boxwright predict`: objects in images, as JSON and as drawn images.

mod targets;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Instant;

use image::RgbImage;
use serde::Serialize;

use super::CliError;
use crate::data::draw::{BoxStyle, DrawBox, draw_boxes};
use crate::data::{DataError, Image, decode, list};
use crate::detect::nms::{Detection, NmsArgs};
use crate::train::args::{Amp, Device};
use crate::train::device;
use crate::train::error::{FailureClass, TrainError};
use crate::train::files;
use crate::train::predictor::Predictor;
use crate::train::run_folder::RunFolder;

/// Quality of drawn JPEG images, 1..=100.
const JPEG_QUALITY: u8 = 92;
/// Images decoded ahead of the network.
const DECODED_MAX: usize = 2;

/// Finds objects in images: JSON and drawn images
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Trained weights (.safetensors)
    weights: PathBuf,
    /// Images, or folders of images (read with their sub-folders)
    #[arg(required = true, value_name = "SOURCE")]
    sources: Vec<PathBuf>,
    /// Longer side of the network's input in pixels, rounded up to a multiple of 32 [default: as trained]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=8192))]
    imgsz: Option<u32>,
    /// Least score of an object, 0..1
    #[arg(long, default_value_t = 0.25, value_parser = share)]
    conf: f32,
    /// Boxes of one class that overlap by more than this are one object, 0..1
    #[arg(long, default_value_t = 0.7, value_parser = share)]
    iou: f32,
    /// Most objects per image
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=30_000))]
    max_det: u32,
    /// Only these classes, by number, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "N,N")]
    classes: Option<Vec<usize>>,
    /// Let boxes of different classes suppress each other
    #[arg(long)]
    agnostic_nms: bool,
    /// Folder of the results [default: a new runs/detect/predict]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print one JSON object per image instead of words
    #[arg(long)]
    json: bool,
    /// Also write labels/<name>.txt: class cx cy w h per object, as fractions of the image
    #[arg(long)]
    save_txt: bool,
    /// Write no drawn images
    #[arg(long)]
    no_draw: bool,
    /// cpu, cuda or cuda:N; the best device there is when not given
    #[arg(long, value_name = "DEVICE", default_value = "", hide_default_value = true)]
    device: Device,
    /// Threads that compute [default: all cores]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
}

fn share(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err("allowed: 0 to 1".into()),
    }
}

/// Why nothing could be predicted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PredictError {
    /// The network cannot be used.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// A source cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A source is not there.
    #[error("source {} does not exist", path.display())]
    NoSource {
        /// What was asked for.
        path: PathBuf,
    },
    /// No image in any source.
    #[error("no image in {sources}")]
    NoImage {
        /// What was searched.
        sources: String,
    },
    /// A class number that the network does not have.
    #[error("class {class} does not exist; the network has 0 to {last}")]
    NoClass {
        /// What was asked for.
        class: usize,
        /// The last class.
        last: usize,
    },
    /// A result would take the place of a file that was given.
    #[error("the results would overwrite {}, which was given; name another folder with --out", path.display())]
    Overwrites {
        /// The file.
        path: PathBuf,
    },
    /// A result cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file; `-` is the standard output.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A drawn image cannot be encoded.
    #[error("cannot encode {}", path.display())]
    Encode {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: image::ImageError,
    },
}

impl From<PredictError> for CliError {
    fn from(error: PredictError) -> CliError {
        let usage = match &error {
            PredictError::NoSource { .. }
            | PredictError::NoImage { .. }
            | PredictError::NoClass { .. }
            | PredictError::Overwrites { .. } => true,
            PredictError::Train(error) => error.class() == FailureClass::Config,
            _ => false,
        };
        let what = "prediction cannot be done";
        if usage { CliError::usage_from(what, error) } else { CliError::failed_from(what, error) }
    }
}

/// Runs the command.
///
/// # Errors
/// See [`PredictError`].
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    Ok(execute(&args, &mut std::io::stdout().lock())?)
}

/// One object as it is written.
#[derive(Clone, Debug, Serialize)]
struct FoundObject<'a> {
    class: u32,
    name: &'a str,
    score: f32,
    /// Pixels of the original image.
    xyxy: [f32; 4],
}

/// One image as it is written.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
enum FoundImage<'a> {
    Read { path: Cow<'a, str>, width: usize, height: usize, detections: Vec<FoundObject<'a>> },
    Unreadable { path: Cow<'a, str>, error: String },
}

/// Runs the command; results go to `out` line by line.
///
/// An image that cannot be read is named on standard error and in the results, the others are still done, and the
/// exit code is 1.
///
/// # Errors
/// [`PredictError`] when there is nothing to do or a result cannot be written.
pub fn execute(args: &Args, out: &mut dyn Write) -> Result<ExitCode, PredictError> {
    let images = images_of(&args.sources)?;
    let stems = targets::stems(&images);
    if let Some(folder) = &args.out {
        targets::check(args, folder, &images, &stems)?;
    }
    let nms = NmsArgs {
        conf: args.conf,
        iou: f64::from(args.iou),
        max_det: args.max_det as usize,
        agnostic: args.agnostic_nms,
        classes: args.classes.clone(),
        ..NmsArgs::prediction()
    };
    let imgsz = args.imgsz.map(|side| side as usize);
    let compute = device::open(args.device, Amp::On, args.threads)?;
    let mut predictor = Predictor::open(&args.weights, imgsz, nms, &compute)?;
    let names = predictor.names().to_vec();
    if let Some(&class) = args.classes.iter().flatten().find(|c| **c >= names.len()) {
        return Err(PredictError::NoClass { class, last: names.len().saturating_sub(1) });
    }
    let folder = match &args.out {
        Some(folder) => folder.clone(),
        None => RunFolder::claim(None, Some("predict"), false)?,
    };
    files::create_folder(&folder)?;
    let mut writer = ResultWriter::new(args, &folder, &names, out)?;
    let (sender, receiver) = mpsc::sync_channel(DECODED_MAX);
    std::thread::scope(|scope| {
        let (images, stems) = (&images, &stems);
        scope.spawn(move || {
            for (path, stem) in images.iter().zip(stems) {
                // The receiver is gone after an error there: nothing is left to decode for.
                if sender.send((path.as_path(), stem, decode::decode_file(path))).is_err() {
                    break;
                }
            }
        });
        for (path, stem, decoded) in receiver {
            let begin = Instant::now();
            match decoded {
                Ok(image) => {
                    let found = predictor.predict(&image)?;
                    writer.image((path, stem), &image, &found, begin)?;
                }
                Err(error) => writer.unreadable(path, &error)?,
            }
        }
        Ok::<(), PredictError>(())
    })?;
    writer.finish()
}

/// All images of the sources, each source's sorted by path, none twice.
fn images_of(sources: &[PathBuf]) -> Result<Vec<PathBuf>, PredictError> {
    let mut images = Vec::new();
    let mut seen = HashSet::new();
    for source in sources {
        if !source.exists() {
            return Err(PredictError::NoSource { path: source.clone() });
        }
        let beside = |line: &str, list: &Path| list.parent().unwrap_or(Path::new("")).join(line);
        let found = list::images_of(std::slice::from_ref(source), &beside)?;
        images.extend(found.into_iter().filter(|path| seen.insert(path.clone())));
    }
    if images.is_empty() {
        let sources: Vec<String> = sources.iter().map(|s| s.display().to_string()).collect();
        return Err(PredictError::NoImage { sources: sources.join(", ") });
    }
    Ok(images)
}

/// Where results go, and what was counted.
struct ResultWriter<'a> {
    args: &'a Args,
    folder: &'a Path,
    names: &'a [String],
    out: &'a mut dyn Write,
    lines: Vec<String>,
    objects: usize,
    unreadable: usize,
}

impl<'a> ResultWriter<'a> {
    fn new(
        args: &'a Args,
        folder: &'a Path,
        names: &'a [String],
        out: &'a mut dyn Write,
    ) -> Result<ResultWriter<'a>, PredictError> {
        if args.save_txt {
            files::create_folder(&folder.join("labels"))?;
        }
        Ok(ResultWriter { args, folder, names, out, lines: Vec::new(), objects: 0, unreadable: 0 })
    }

    fn image(
        &mut self,
        (path, stem): (&Path, &str),
        image: &Image,
        found: &[Detection],
        begin: Instant,
    ) -> Result<(), PredictError> {
        let (width, height) = (image.width, image.height);
        let time_ms = begin.elapsed().as_secs_f64() * 1000.0;
        self.objects += found.len();
        if !self.args.no_draw {
            self.draw(path, stem, image, found)?;
        }
        if self.args.save_txt {
            self.labels(stem, (width, height), found)?;
        }
        let line =
            format!("{}: {width}x{height}, {}, {time_ms:.0} ms", path.display(), summary(found, self.names));
        let detections = found
            .iter()
            .map(|d| FoundObject {
                class: d.class,
                name: &self.names[d.class as usize],
                score: d.score,
                xyxy: d.xyxy,
            })
            .collect();
        let path = path.to_string_lossy();
        self.line(&FoundImage::Read { path, width, height, detections }, &line)
    }

    fn unreadable(&mut self, path: &Path, error: &DataError) -> Result<(), PredictError> {
        self.unreadable += 1;
        eprintln!("warning: {error}");
        let line = format!("{}: not read", path.display());
        let path = path.to_string_lossy();
        self.line(&FoundImage::Unreadable { path, error: error.to_string() }, &line)
    }

    fn line(&mut self, found: &FoundImage<'_>, words: &str) -> Result<(), PredictError> {
        let json = serde_json::to_string(found)
            .map_err(|e| TrainError::Internal { message: format!("results as JSON: {e}") })?;
        self.print(if self.args.json { &json } else { words })?;
        self.lines.push(json);
        Ok(())
    }

    fn print(&mut self, line: &str) -> Result<(), PredictError> {
        writeln!(self.out, "{line}").map_err(|source| PredictError::Write { path: "-".into(), source })
    }

    fn draw(&self, path: &Path, stem: &str, image: &Image, found: &[Detection]) -> Result<(), PredictError> {
        let (width, height) = (image.width as u32, image.height as u32);
        let mut picture = RgbImage::from_raw(width, height, image.pixels.clone())
            .expect("an image holds three bytes for each of its pixels");
        let boxes: Vec<DrawBox> = found
            .iter()
            .map(|d| DrawBox { xyxy: d.xyxy, class: d.class as usize, score: Some(d.score) })
            .collect();
        draw_boxes(&mut picture, &boxes, self.names, &BoxStyle::for_size(width, height));
        let target = targets::drawn(self.folder, path, stem);
        let mut bytes = Vec::new();
        let encoded = if targets::is_jpeg(path) {
            picture.write_with_encoder(image::codecs::jpeg::JpegEncoder::new_with_quality(
                &mut bytes,
                JPEG_QUALITY,
            ))
        } else {
            picture.write_to(&mut std::io::Cursor::new(&mut bytes), image::ImageFormat::Png)
        };
        encoded.map_err(|source| PredictError::Encode { path: target.clone(), source })?;
        self.write(&target, &bytes)
    }

    fn labels(
        &self,
        stem: &str,
        (width, height): (usize, usize),
        found: &[Detection],
    ) -> Result<(), PredictError> {
        let (width, height) = (width as f32, height as f32);
        let mut text = String::new();
        for d in found {
            let [x0, y0, x1, y1] = d.xyxy;
            let (cx, cy) = ((x0 + x1) / 2.0 / width, (y0 + y1) / 2.0 / height);
            let (w, h) = ((x1 - x0) / width, (y1 - y0) / height);
            text.push_str(&format!("{} {cx:.6} {cy:.6} {w:.6} {h:.6}\n", d.class));
        }
        self.write(&targets::labels(self.folder, stem), text.as_bytes())
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), PredictError> {
        std::fs::write(path, bytes).map_err(|source| PredictError::Write { path: path.to_owned(), source })
    }

    /// Writes `predictions.json`, says what was done, and gives the exit code.
    fn finish(mut self) -> Result<ExitCode, PredictError> {
        let path = self.folder.join(targets::ALL);
        let text = format!("[\n{}\n]\n", self.lines.join(",\n"));
        files::write_atomically(&path, |file| file.write_all(text.as_bytes()))?;
        if !self.args.json {
            let missing = match self.unreadable {
                0 => String::new(),
                count => format!(", {count} not read"),
            };
            let line = format!(
                "{} images{missing}, {} objects; results in {}",
                self.lines.len(),
                self.objects,
                self.folder.display()
            );
            self.print(&line)?;
        }
        Ok(if self.unreadable == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// `3 circle, 1 square`, by class number; `no objects`.
fn summary(found: &[Detection], names: &[String]) -> String {
    let mut counts = BTreeMap::new();
    for d in found {
        *counts.entry(d.class as usize).or_insert(0usize) += 1;
    }
    if counts.is_empty() {
        return "no objects".into();
    }
    let parts: Vec<String> =
        counts.iter().map(|(class, count)| format!("{count} {}", names[*class])).collect();
    parts.join(", ")
}
