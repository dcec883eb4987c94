//! Finding the driver and the run-time compiler without linking them.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use cudarc::{driver, nvrtc};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};

/// Environment: a folder with another `libcuda.so.1` than the system's.
const DRIVER_FOLDER: &str = "BOXWRIGHT_CUDA_DRIVER";
/// Environment: the folder with `libnvrtc.so.*`.
const NVRTC_FOLDER: &str = "BOXWRIGHT_NVRTC";

/// Folders given by [`use_libraries`].
static GIVEN: Mutex<(Option<PathBuf>, Option<PathBuf>)> = Mutex::new((None, None));

/// Takes the driver and the compiler from these folders. Has an effect only before CUDA is first looked for.
pub fn use_libraries(driver: Option<&Path>, nvrtc: Option<&Path>) {
    let mut given = GIVEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    *given = (driver.map(Path::to_owned), nvrtc.map(Path::to_owned));
}

fn given() -> (Option<PathBuf>, Option<PathBuf>) {
    let given = GIVEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    let or_environment =
        |path: Option<PathBuf>, name| path.or_else(|| std::env::var_os(name).map(PathBuf::from));
    (or_environment(given.0, DRIVER_FOLDER), or_environment(given.1, NVRTC_FOLDER))
}

/// Loads a library for good, so that a later look-up by its name finds this copy.
fn preload(path: &Path) -> bool {
    // SAFETY: these libraries' initialisers only prepare themselves; the handle is never closed.
    match unsafe { Library::open(Some(path), RTLD_LAZY | RTLD_GLOBAL) } {
        Ok(library) => {
            std::mem::forget(library);
            true
        }
        Err(_) => false,
    }
}

/// Whether the driver's library is here. Loads it once; an answer of no is asked again the next time.
pub(super) fn driver_present() -> bool {
    static PRESENT: Mutex<bool> = Mutex::new(false);
    let mut present = PRESENT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if *present {
        return true;
    }
    if let Some(folder) = given().0 {
        // A folder that was named is meant: another driver would be a surprise.
        if !preload(&folder.join("libcuda.so.1")) {
            return false;
        }
    }
    // SAFETY: only tries to load the library; it initialises nothing until called.
    *present = unsafe { driver::sys::is_culib_present() };
    *present
}

/// Version of the driver as `1000 * major + 10 * minor` of the CUDA it speaks; `None` without a driver.
pub fn driver_version() -> Option<u32> {
    if !driver_present() {
        return None;
    }
    let mut version = 0;
    // SAFETY: the library is present, and the call writes one integer.
    let result = unsafe { driver::sys::cuDriverGetVersion(&mut version) };
    (result == driver::sys::CUresult::CUDA_SUCCESS).then_some(version as u32)
}

/// The compiler that was found.
#[derive(Clone, Debug)]
pub(super) struct Nvrtc {
    pub version: (u32, u32),
    /// Where it lies, if it was not simply on the loader's path.
    pub folder: Option<PathBuf>,
}

/// The compiler, or where it was looked for. Loads it once; a search in vain is repeated the next time.
pub(super) fn nvrtc() -> Result<Nvrtc, String> {
    static FOUND: Mutex<Option<Nvrtc>> = Mutex::new(None);
    let mut found = FOUND.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(found) = &*found {
        return Ok(found.clone());
    }
    let now = find_nvrtc()?;
    *found = Some(now.clone());
    Ok(now)
}

fn find_nvrtc() -> Result<Nvrtc, String> {
    let named = given().1;
    // Unit tests share this process, and whichever looks first decides: their code is for the emulator.
    #[cfg(test)]
    let named = super::testing::compiler_folder().map(Path::to_owned).or(named);
    let folders = match &named {
        Some(folder) => vec![folder.clone()],
        None => nvrtc_folders(),
    };
    let folder = folders.iter().find(|folder| preload_nvrtc(folder)).cloned();
    // SAFETY: only tries to load the library.
    if (named.is_some() && folder.is_none()) || !unsafe { nvrtc::sys::is_culib_present() } {
        let shown: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
        return Err(format!(
            "looked in {} and on the loader's path; install the CUDA toolkit or the PyPI wheel nvidia-cuda-nvrtc, \
             or set {NVRTC_FOLDER} to the folder with libnvrtc.so",
            if shown.is_empty() { "no folder".to_owned() } else { shown.join(", ") }
        ));
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is present, and the call writes two integers.
    let result = unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) };
    result.result().map_err(|error| format!("it does not tell its version: {error:?}"))?;
    Ok(Nvrtc { version: (major as u32, minor as u32), folder })
}

/// Loads the compiler and the library it looks for at run time, which it cannot find by itself.
fn preload_nvrtc(folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else { return false };
    let mut names: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    names.sort();
    // Only versions follow the name: toolkits also have `.alt.` twins, and other files may lie beside.
    let find = |prefix: &str| {
        names.iter().rev().find(|p| {
            let name = p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            // Nothing but a version may follow: other files lie beside the libraries.
            name.strip_prefix(prefix).is_some_and(|v| v.chars().all(|c| c.is_ascii_digit() || c == '.'))
        })
    };
    let Some(compiler) = find("libnvrtc.so.") else { return false };
    if let Some(builtins) = find("libnvrtc-builtins.so.") {
        preload(builtins);
    }
    preload(compiler)
}

/// Folders in which toolkits and wheels put the compiler, those that exist, best first.
fn nvrtc_folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(home) = std::env::var_os(name) {
            folders.extend(["lib64", "lib"].map(|lib| Path::new(&home).join(lib)));
        }
    }
    folders.push("/usr/local/cuda/lib64".into());
    for name in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        if let Some(prefix) = std::env::var_os(name) {
            folders.extend(wheel_folders(&Path::new(&prefix).join("lib")));
        }
    }
    for prefix in ["/usr/local/lib", "/usr/lib"] {
        folders.extend(wheel_folders(Path::new(prefix)));
    }
    folders.retain(|f| f.is_dir());
    folders
}

/// `lib/python3.*/{site,dist}-packages/nvidia/{cu13/lib,cuda_nvrtc/lib}` under a prefix.
fn wheel_folders(lib: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(lib) else { return Vec::new() };
    let pythons = entries.flatten().map(|e| e.path());
    let pythons =
        pythons.filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python3")));
    let mut folders = Vec::new();
    for python in pythons {
        for packages in ["site-packages", "dist-packages"] {
            for wheel in ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"] {
                folders.push(python.join(packages).join(wheel));
            }
        }
    }
    folders
}
