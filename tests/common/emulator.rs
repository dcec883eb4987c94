//! The emulated GPU of the integration tests, or the real one when `BOXWRIGHT_TEST_GPU=1`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

use boxwright::engine::device::cuda::{Device, use_libraries};

/// Builds the emulator if anything changed; its folder, with the driver and the compiler.
pub fn folder() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/emulator.sh");
    let output = Command::new(&script).output().unwrap_or_else(|e| panic!("{}: {e}", script.display()));
    let (text, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "the emulator does not build:\n{text}\n{log}");
    PathBuf::from(text.lines().last().expect("the script prints the folder"))
}

/// The device to test on, opened once for the process.
pub fn device() -> Arc<Device> {
    static OPENED: OnceLock<Arc<Device>> = OnceLock::new();
    let device = OPENED.get_or_init(|| {
        // A driver that is named by the environment is meant, for example the emulator under the sanitizers.
        let is_given = std::env::var_os("BOXWRIGHT_CUDA_DRIVER").is_some();
        if !is_given && std::env::var_os("BOXWRIGHT_TEST_GPU").is_none_or(|v| v != "1") {
            let folder = folder();
            use_libraries(Some(&folder), Some(&folder));
        }
        Device::open(0).unwrap_or_else(|error| panic!("no device to test on: {error}"))
    });
    Arc::clone(device)
}
