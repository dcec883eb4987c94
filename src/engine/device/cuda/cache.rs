//! Compiled kernels on disk, by (source, headers, options, chip, compiler version).
//!
//! A file is a mark, the SHA-256 of what follows, and the machine code. One that does not verify is compiled anew.
//! Losing the folder costs time only, so writing to it may fail silently.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::compile::{self, options};
use super::error::DeviceError;
use super::sources::{HEADERS, Source};

/// First bytes of a cache file; the number is the version of its form.
const MARK: &[u8; 8] = b"BXWKRN01";
/// Environment: the folder of the cache.
const FOLDER: &str = "BOXWRIGHT_KERNEL_CACHE";
/// Largest file that is taken for machine code, bytes.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Where compiled kernels are kept: `$BOXWRIGHT_KERNEL_CACHE`, or below the user's cache folder, or below the
/// system's temporary folder.
pub fn folder() -> PathBuf {
    if let Some(folder) = std::env::var_os(FOLDER) {
        return PathBuf::from(folder);
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let base = cache.filter(|p| p.is_absolute()).or_else(home).unwrap_or_else(std::env::temp_dir);
    base.join("boxwright").join("kernels")
}

/// How machine code was come by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Read from the cache.
    Cached,
    /// Compiled now.
    Compiled,
    /// Compiled now because the cached file was damaged.
    Repaired,
}

/// The machine code of a kernel file for `target`, from `folder` or the compiler.
///
/// Without a compiler on this machine, code that any version of it made for the same text serves.
///
/// # Errors
/// As [`compile::compile`].
pub fn load(folder: &Path, source: &Source, target: &str) -> Result<(Vec<u8>, Origin), DeviceError> {
    let path = place(folder, source, target);
    let mut origin = Origin::Compiled;
    if let Some(path) = &path {
        match read(path) {
            Ok(Some(code)) => return Ok((code, Origin::Cached)),
            Ok(None) => {}
            Err(damage) => {
                tracing::warn!(file = %path.display(), "a cached kernel is damaged ({damage}); compiling it anew");
                origin = Origin::Repaired;
            }
        }
    }
    Ok((compile_to(path.as_deref(), source, target)?, origin))
}

/// The same from the compiler, whatever is cached: the driver refused what is there.
///
/// # Errors
/// As [`compile::compile`].
pub fn renew(folder: &Path, source: &Source, target: &str) -> Result<(Vec<u8>, Origin), DeviceError> {
    let path = place(folder, source, target);
    Ok((compile_to(path.as_deref(), source, target)?, Origin::Repaired))
}

/// The cache file of a kernel file; `None` when there is no compiler and no file of any version of it.
fn place(folder: &Path, source: &Source, target: &str) -> Option<PathBuf> {
    let key = key(source, target);
    match compile::compiler_version() {
        Some((major, minor)) => Some(folder.join(format!("{key}-{major}.{minor}.cubin"))),
        None => any_version(folder, &key),
    }
}

fn compile_to(path: Option<&Path>, source: &Source, target: &str) -> Result<Vec<u8>, DeviceError> {
    let compiled = compile::compile(source, target)?;
    if let Some(path) = path
        && let Err(error) = write(path, &compiled.cubin)
    {
        tracing::debug!(file = %path.display(), "a compiled kernel cannot be kept: {error}");
    }
    Ok(compiled.cubin)
}

/// Name of a cache file, without the compiler's version.
fn key(source: &Source, target: &str) -> String {
    let mut hash = Sha256::new();
    let mut add = |part: &[u8]| {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    };
    add(source.text.as_bytes());
    for (name, body) in HEADERS {
        add(name.as_bytes());
        add(body.as_bytes());
    }
    for option in options(target) {
        add(option.as_bytes());
    }
    let digest = hash.finalize();
    let short: String = digest[..12].iter().map(|b| format!("{b:02x}")).collect();
    format!("{}-{target}-{short}", source.stem)
}

fn any_version(folder: &Path, key: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?;
    let mut found: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    found.retain(|p| {
        let name = p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        name.starts_with(&format!("{key}-")) && name.ends_with(".cubin")
    });
    found.sort();
    found.pop()
}

/// The code in a cache file; `None` when there is no such file.
fn read(path: &Path) -> Result<Option<Vec<u8>>, String> {
    let bytes = match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
        Ok(meta) if meta.len() > FILE_BYTES_MAX => return Err(format!("{} bytes long", meta.len())),
        Ok(_) => std::fs::read(path).map_err(|e| e.to_string())?,
    };
    let Some(rest) = bytes.strip_prefix(MARK) else { return Err("not a kernel of this program".into()) };
    if rest.len() < 32 {
        return Err("cut off".into());
    }
    let (sum, code) = rest.split_at(32);
    if Sha256::digest(code).as_slice() != sum {
        return Err("its checksum differs".into());
    }
    Ok(Some(code.to_vec()))
}

/// Writes beside and renames, so that nobody reads half a file.
fn write(path: &Path, code: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let beside = path.with_extension(format!("{}.part", std::process::id()));
    let bytes = [MARK.as_slice(), Sha256::digest(code).as_slice(), code].concat();
    std::fs::write(&beside, bytes)?;
    std::fs::rename(&beside, path).inspect_err(|_| {
        std::fs::remove_file(&beside).ok();
    })
}
