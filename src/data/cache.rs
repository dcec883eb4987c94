//! Decoded images, kept: in memory within a limit, or on disk as plain files of this program.
//!
//! Every loader has a store. With `cache: false` it holds the images last used (training draws mosaic partners from
//! those) within a modest limit; with `ram` it holds all of them when they fit; with `disk` the scaled pixels are
//! kept as files, each with a header and a checksum. The images of the dataset are never touched.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::UNIX_EPOCH;

use sha2::{Digest, Sha256};

use super::dataset::Sample;
use super::resize::{loaded_size, resize};
use super::{DataError, Image, decode, index};

/// What the key `cache` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Keep the images last used.
    #[default]
    Recent,
    /// Keep all images in memory.
    Ram,
    /// Keep all images, scaled, on disk.
    Disk,
}

/// Limits of a store.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheArgs {
    /// What to keep.
    pub mode: CacheMode,
    /// Most bytes in memory; `None` for a share of what the machine has available: a half for `ram`, an eighth and at
    /// most 1 GiB otherwise.
    pub ram_bytes_max: Option<u64>,
    /// Most bytes on disk; `None` for nine tenths of what is free there.
    pub disk_bytes_max: Option<u64>,
    /// Folder of the files; `None` for the user's cache folder.
    pub folder: Option<PathBuf>,
}

impl Default for CacheArgs {
    fn default() -> CacheArgs {
        CacheArgs { mode: CacheMode::Recent, ram_bytes_max: None, disk_bytes_max: None, folder: None }
    }
}

/// Most bytes that recently used images may take when nothing else is said.
const RECENT_BYTES_MAX: u64 = 1 << 30;
/// First bytes of a cached image.
const MAGIC: &[u8; 8] = b"BWIMAGE1";
/// Magic, height, width, checksum.
const HEADER_BYTES: usize = 8 + 4 + 4 + 32;

/// Images of a split, scaled for an input size.
#[derive(Debug)]
pub struct ImageStore {
    samples: Arc<Vec<Sample>>,
    imgsz: usize,
    ram_bytes_max: u64,
    disk: Option<PathBuf>,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    images: HashMap<u32, Arc<Image>>,
    /// Oldest first.
    order: VecDeque<u32>,
    bytes: u64,
}

impl ImageStore {
    /// A store for the images of a split. The second value says why the mode asked for was not taken, if so.
    pub fn new(samples: Arc<Vec<Sample>>, imgsz: usize, args: &CacheArgs) -> (ImageStore, Option<String>) {
        let needed: u64 = samples
            .iter()
            .map(|s| {
                let (h, w) = loaded_size(s.height as usize, s.width as usize, imgsz);
                (h * w * 3) as u64
            })
            .sum();
        let available = available_ram_bytes();
        let recent = args.ram_bytes_max.unwrap_or((available / 8).min(RECENT_BYTES_MAX));
        let mut note = None;
        let mut ram_bytes_max = recent;
        let mut disk = None;
        match args.mode {
            CacheMode::Recent => {}
            CacheMode::Ram => {
                let limit = args.ram_bytes_max.unwrap_or(available / 2);
                if needed <= limit {
                    ram_bytes_max = limit;
                } else {
                    note = Some(format!(
                        "cache: ram needs {} MiB, the limit is {} MiB; only recent images are kept",
                        needed >> 20,
                        limit >> 20
                    ));
                }
            }
            CacheMode::Disk => match open_folder(args, needed) {
                Ok(folder) => disk = Some(folder),
                Err(reason) => note = Some(format!("cache: disk cannot be used: {reason}")),
            },
        }
        (ImageStore { samples, imgsz, ram_bytes_max, disk, kept: Mutex::default() }, note)
    }

    /// The images this is for.
    pub fn samples(&self) -> &Arc<Vec<Sample>> {
        &self.samples
    }

    /// The image, scaled so that its long side is the input size; decoded when it is not kept.
    ///
    /// # Errors
    /// [`DataError::Read`] or [`DataError::Image`] with the path.
    pub fn get(&self, sample: u32) -> Result<Arc<Image>, DataError> {
        if let Some(image) = self.lock().images.get(&sample) {
            return Ok(Arc::clone(image));
        }
        self.load(sample)
    }

    /// Like [`ImageStore::get`], but decodes although the image is kept (to measure decoding).
    ///
    /// # Errors
    /// As [`ImageStore::get`].
    pub fn load(&self, sample: u32) -> Result<Arc<Image>, DataError> {
        let image = Arc::new(self.read(sample)?);
        self.keep(sample, &image);
        Ok(image)
    }

    /// Bytes in memory.
    pub fn ram_bytes(&self) -> u64 {
        self.lock().bytes
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // The map is whole after every statement, so a panic elsewhere leaves nothing half done.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, sample: u32) -> Result<Image, DataError> {
        let source = &self.samples[sample as usize];
        let file = self.disk.as_ref().and_then(|folder| Some(folder.join(self.disk_name(&source.path)?)));
        if let Some(image) = file.as_ref().and_then(|file| read_cached(file)) {
            return Ok(image);
        }
        let decoded = decode::decode_file(&source.path)?;
        let (h, w) = loaded_size(decoded.height, decoded.width, self.imgsz);
        let image = if (h, w) == (decoded.height, decoded.width) { decoded } else { resize(&decoded, h, w) };
        if let Some(file) = file
            && let Err(error) = write_cached(&file, &image)
        {
            tracing::warn!(file = %file.display(), %error, "a decoded image is not kept on disk");
        }
        Ok(image)
    }

    fn keep(&self, sample: u32, image: &Arc<Image>) {
        let bytes = image.bytes() as u64;
        if bytes > self.ram_bytes_max {
            return;
        }
        let mut kept = self.lock();
        if let Some(old) = kept.images.insert(sample, Arc::clone(image)) {
            kept.bytes -= old.bytes() as u64;
        } else {
            kept.order.push_back(sample);
        }
        kept.bytes += bytes;
        while kept.bytes > self.ram_bytes_max {
            let Some(oldest) = kept.order.pop_front() else { break };
            if let Some(old) = kept.images.remove(&oldest) {
                kept.bytes -= old.bytes() as u64;
            }
        }
    }

    /// Name by path, size and time of the image and by input size: a changed image has another name.
    fn disk_name(&self, path: &Path) -> Option<String> {
        let meta = std::fs::metadata(path).ok()?;
        let time = meta.modified().ok()?.duration_since(UNIX_EPOCH).ok()?.as_nanos();
        let whole = std::path::absolute(path).ok()?;
        let mut hash = Sha256::new();
        hash.update(whole.as_os_str().as_encoded_bytes());
        hash.update(format!("\n{} {time} {}", meta.len(), self.imgsz));
        Some(format!("{}.rgb", &index::hex(&hash.finalize())[..32]))
    }
}

/// Memory that can be had without swapping; the container's limit counts.
pub fn available_ram_bytes() -> u64 {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let free = system.available_memory();
    system.cgroup_limits().map_or(free, |limits| free.min(limits.free_memory))
}

fn open_folder(args: &CacheArgs, needed: u64) -> Result<PathBuf, String> {
    let folder = args.folder.clone().unwrap_or_else(index::default_cache_folder).join("images");
    std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let whole = folder.canonicalize().map_err(|e| format!("{}: {e}", folder.display()))?;
    let disks = sysinfo::Disks::new_with_refreshed_list();
    let free = disks
        .list()
        .iter()
        .filter(|disk| whole.starts_with(disk.mount_point()))
        .max_by_key(|disk| disk.mount_point().components().count())
        .map_or(u64::MAX, |disk| disk.available_space());
    let limit = args.disk_bytes_max.unwrap_or(free / 10 * 9);
    if needed > limit {
        return Err(format!("it needs {} MiB, the limit is {} MiB", needed >> 20, limit >> 20));
    }
    Ok(folder)
}

/// Reads a cached image; one that does not verify is removed and counts as absent.
fn read_cached(file: &Path) -> Option<Image> {
    let bytes = std::fs::read(file).ok()?;
    let image = parse_cached(&bytes);
    if image.is_none() {
        tracing::warn!(file = %file.display(), "a cached image is damaged; it is decoded anew");
        let _ = std::fs::remove_file(file);
    }
    image
}

fn parse_cached(bytes: &[u8]) -> Option<Image> {
    let (header, pixels) = bytes.split_at_checked(HEADER_BYTES)?;
    let number = |at: usize| Some(u32::from_le_bytes(header.get(at..at + 4)?.try_into().ok()?) as usize);
    let (height, width) = (number(8)?, number(12)?);
    let whole = &header[..8] == MAGIC
        && height.checked_mul(width)?.checked_mul(3)? == pixels.len()
        && Sha256::digest(pixels)[..] == header[16..];
    whole.then(|| Image::from_pixels(height, width, pixels.to_vec()))
}

fn write_cached(file: &Path, image: &Image) -> std::io::Result<()> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + image.bytes());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&(image.height as u32).to_le_bytes());
    bytes.extend_from_slice(&(image.width as u32).to_le_bytes());
    bytes.extend_from_slice(&Sha256::digest(&image.pixels));
    bytes.extend_from_slice(&image.pixels);
    // Two threads may decode one image at once: each writes its own temporary file.
    let temporary =
        file.with_extension(format!("{}-{:?}.part", std::process::id(), std::thread::current().id()));
    std::fs::write(&temporary, bytes)?;
    std::fs::rename(&temporary, file)
}
