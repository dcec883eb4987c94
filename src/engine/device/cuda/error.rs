//! What can go wrong with a CUDA device.

use cudarc::driver::sys::CUresult;

/// An error of the CUDA device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// There is no device that could be used, which is a normal answer on most machines.
    #[error("no usable CUDA device: {reason}")]
    Unavailable {
        /// One sentence for the user.
        reason: String,
    },
    /// The driver refused memory.
    #[error(
        "the GPU has no room for {needed_bytes} bytes: {free_bytes} of {total_bytes} are free (other processes counted)"
    )]
    OutOfMemory {
        /// Bytes asked for.
        needed_bytes: u64,
        /// Bytes free when asked.
        free_bytes: u64,
        /// Bytes of the device.
        total_bytes: u64,
    },
    /// A call to the driver failed.
    #[error("{operation} failed with {code}: {meaning}{}", earlier(.queued))]
    Driver {
        /// What was asked for.
        operation: String,
        /// Name of the driver's error.
        code: String,
        /// The driver's words.
        meaning: String,
        /// Kernels queued last, newest first: the driver reports a kernel's fault at some later call.
        queued: Vec<String>,
    },
    /// A kernel file does not compile.
    #[error("kernels/{stem}.cu does not compile for {target}: {log}")]
    Compile {
        /// File without ending.
        stem: String,
        /// Target of the compiler.
        target: String,
        /// The compiler's words.
        log: String,
    },
    /// The compiler is needed and not here.
    #[error("the CUDA run-time compiler (NVRTC) is needed for kernels/{stem}.cu and was not found: {reason}")]
    NoCompiler {
        /// File without ending.
        stem: String,
        /// Where was looked.
        reason: String,
    },
    /// A compiled file lacks a kernel.
    #[error("kernels/{stem}.cu has no kernel {kernel:?}")]
    NoKernel {
        /// File without ending.
        stem: String,
        /// Name of the kernel.
        kernel: String,
    },
    /// The argument structures of host and kernel differ.
    #[error("kernel {kernel} takes {expected} bytes of arguments, the host gives {got}")]
    Arguments {
        /// Name of the kernel.
        kernel: String,
        /// Bytes of the kernel's structure.
        expected: usize,
        /// Bytes of the host's structure.
        got: usize,
    },
}

fn earlier(queued: &[String]) -> String {
    if queued.is_empty() {
        return String::new();
    }
    format!(" (it may belong to an earlier launch; queued last: {})", queued.join(", "))
}

impl DeviceError {
    /// True when less memory could help.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, DeviceError::OutOfMemory { .. })
    }
}

/// Turns a driver's answer into an error with its name and meaning.
pub(super) fn driver_error(operation: &str, code: CUresult, queued: Vec<String>) -> DeviceError {
    let error = cudarc::driver::DriverError(code);
    let text = |result: Result<&std::ffi::CStr, _>| result.ok().map(|s| s.to_string_lossy().into_owned());
    DeviceError::Driver {
        operation: operation.to_owned(),
        code: text(error.error_name()).unwrap_or_else(|| format!("error {}", code as u32)),
        meaning: text(error.error_string()).unwrap_or_else(|| "no description".to_owned()),
        queued,
    }
}

/// For `map_err` where nothing was queued.
pub(super) fn driver(operation: &'static str) -> impl Fn(cudarc::driver::DriverError) -> DeviceError {
    move |error| driver_error(operation, error.0, Vec::new())
}
