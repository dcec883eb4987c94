//! Devices for tests: the emulator (built from `tests/emulator` when first needed), or the real GPU.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

use super::{Device, use_libraries};

/// Environment: `1` runs the kernel tests on the real GPU, and fails without one.
const TEST_GPU: &str = "BOXWRIGHT_TEST_GPU";

/// The devices to test kernels on.
pub(crate) fn devices() -> Vec<Arc<Device>> {
    static OPENED: OnceLock<Arc<Device>> = OnceLock::new();
    let device = OPENED.get_or_init(|| {
        if let Some(folder) = compiler_folder() {
            use_libraries(Some(folder), Some(folder));
        }
        match Device::open(0) {
            Ok(device) => device,
            Err(error) => panic!("no device to test on: {error}"),
        }
    });
    vec![Arc::clone(device)]
}

/// The folder of the emulator and its compiler, built when first needed; `None` where another driver is meant.
pub(super) fn compiler_folder() -> Option<&'static Path> {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    // A driver that is named by the environment is meant, for example the emulator under the sanitizers.
    let is_given = std::env::var_os("BOXWRIGHT_CUDA_DRIVER").is_some();
    let is_real = std::env::var_os(TEST_GPU).is_some_and(|v| v == "1");
    (!is_given && !is_real).then(|| BUILT.get_or_init(emulator).as_path())
}

/// Builds the emulator; its folder.
fn emulator() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/emulator.sh");
    let output = Command::new(&script).output().unwrap_or_else(|e| panic!("{}: {e}", script.display()));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "the emulator does not build:\n{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    PathBuf::from(text.lines().last().expect("the script prints the folder"))
}
