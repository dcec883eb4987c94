//! The stand-in driver as tests use it: built by `scripts/emulator.sh`, opened by path, called by name.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

/// Environment of a child that runs under the sanitizers: the folder of that build.
pub const SANITIZED: &str = "BOXWRIGHT_EMULATOR_SANITIZED";

/// Runs `scripts/emulator.sh` and returns the folder it built.
pub fn build(options: &[&str]) -> PathBuf {
    let root = env!("CARGO_MANIFEST_DIR");
    let mut script = Command::new("bash");
    script.arg(format!("{root}/scripts/emulator.sh")).args(options);
    let output = script.output().expect("bash is here");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "scripts/emulator.sh needs g++ and failed:\n{errors}");
    let text = String::from_utf8(output.stdout).expect("the folder is text");
    PathBuf::from(text.lines().last().expect("the folder is printed"))
}

/// The folder of the libraries with the emulator's own test kernels.
pub fn folder() -> PathBuf {
    std::env::var_os(SANITIZED).map_or_else(|| build(&["--faults"]), PathBuf::from)
}

/// The driver with the emulator's own test kernels.
pub struct Library(*mut c_void);

// SAFETY: the handle is only used for look-ups, which may happen on any thread.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

/// Devices made ready: each test takes one of its own.
const DEVICES: i32 = 64;

impl Library {
    /// The library of this process, built and opened once.
    pub fn get() -> &'static Library {
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        LIBRARY.get_or_init(|| {
            let library = Library::open(&folder().join("libcuda.so.1"));
            let set: extern "C" fn(*const c_char) -> c_int = library.function(c"boxwright_emulator_set");
            let devices = CString::new(format!("devices={DEVICES}")).expect("no zero byte");
            assert_eq!(set(devices.as_ptr()), 0);
            let init: extern "C" fn(u32) -> c_int = library.function(c"cuInit");
            assert_eq!(init(0), 0);
            library
        })
    }

    /// Opens one of our own libraries.
    pub fn open(path: &Path) -> Library {
        let path = CString::new(path.as_os_str().as_encoded_bytes()).expect("a path has no zero byte");
        // SAFETY: our own library; its initialisers only fill a table.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            // SAFETY: dlerror gives a text after a failure.
            panic!("{}", unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy());
        }
        Library(handle)
    }

    /// A function of the library; `F` must be its type.
    pub fn function<F: Copy>(&self, name: &CStr) -> F {
        assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
        // SAFETY: the name ends with a zero byte.
        let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        assert!(!address.is_null(), "the stand-in driver lacks {name:?}");
        // SAFETY: both are pointers; the caller vouches for the type.
        unsafe { std::mem::transmute_copy(&address) }
    }
}

/// The six ways in which right kernels must give the same.
pub const MODES: [&str; 6] = [
    "order=fifo,async=late",
    "order=lifo,async=late",
    "order=random,seed=11,async=late,threads=2",
    "order=fifo,async=early,threads=2",
    "order=lifo,async=early",
    "order=random,seed=5,async=early",
];

type Handle = *mut c_void;

/// One emulated device that no other test uses, current on this thread.
pub struct Device {
    library: &'static Library,
    number: c_int,
}

impl Device {
    /// The next unused device.
    pub fn next() -> Device {
        static USED: AtomicI32 = AtomicI32::new(0);
        let number = USED.fetch_add(1, Ordering::Relaxed);
        assert!(number < DEVICES, "more devices are needed");
        let library = Library::get();
        let retain: extern "C" fn(*mut Handle, c_int) -> c_int =
            library.function(c"cuDevicePrimaryCtxRetain");
        let current: extern "C" fn(Handle) -> c_int = library.function(c"cuCtxSetCurrent");
        let mut context = std::ptr::null_mut();
        assert_eq!(retain(&mut context, number), 0);
        assert_eq!(current(context), 0);
        Device { library, number }
    }

    /// Changes how this device behaves.
    pub fn set(&self, words: &str) {
        let set: extern "C" fn(*const c_char) -> c_int = self.library.function(c"boxwright_emulator_set");
        let words = CString::new(format!("device={},{words}", self.number)).expect("no zero byte");
        assert_eq!(set(words.as_ptr()), 0, "{words:?}");
    }

    /// Why the latest launch failed.
    pub fn failure(&self) -> String {
        let get: extern "C" fn(c_int, *mut c_char, usize) -> c_int =
            self.library.function(c"boxwright_emulator_failure");
        let mut text = [0u8; 1024];
        assert_eq!(get(self.number, text.as_mut_ptr().cast(), text.len()), 0);
        CStr::from_bytes_until_nul(&text).expect("ends with a zero byte").to_string_lossy().into_owned()
    }

    /// Launches, blocks, switches, bank conflicts, matrix loads, allocations, bytes, most bytes, graph launches.
    pub fn stats(&self) -> [u64; 9] {
        let get: extern "C" fn(c_int, *mut u64, c_int) -> c_int =
            self.library.function(c"boxwright_emulator_stats");
        let mut values = [0; 9];
        assert_eq!(get(self.number, values.as_mut_ptr(), 9), 0);
        values
    }

    /// Memory, or the driver's answer.
    pub fn allocate(&self, bytes: usize) -> Result<u64, c_int> {
        let allocate: extern "C" fn(*mut u64, usize) -> c_int = self.library.function(c"cuMemAlloc_v2");
        let mut address = 0;
        check(allocate(&mut address, bytes))?;
        Ok(address)
    }

    /// Gives memory back.
    pub fn free(&self, address: u64) -> Result<(), c_int> {
        let free: extern "C" fn(u64) -> c_int = self.library.function(c"cuMemFree_v2");
        check(free(address))
    }

    /// Gives several back.
    pub fn free_all(&self, addresses: &[u64]) {
        for address in addresses {
            self.free(*address).expect("it was allocated");
        }
    }

    /// A new allocation with these numbers.
    pub fn put<T: bytemuck::Pod>(&self, values: &[T]) -> u64 {
        let address = self.allocate(size_of_val(values)).expect("there is memory");
        self.write(address, values).expect("the allocation is as long");
        address
    }

    /// Copies to the device.
    pub fn write<T: bytemuck::Pod>(&self, address: u64, values: &[T]) -> Result<(), c_int> {
        let copy: extern "C" fn(u64, *const c_void, usize) -> c_int =
            self.library.function(c"cuMemcpyHtoD_v2");
        check(copy(address, values.as_ptr().cast(), size_of_val(values)))
    }

    /// Copies from the device.
    pub fn read<T: bytemuck::Pod>(&self, address: u64, count: usize) -> Result<Vec<T>, c_int> {
        let copy: extern "C" fn(*mut c_void, u64, usize) -> c_int = self.library.function(c"cuMemcpyDtoH_v2");
        let mut values = vec![T::zeroed(); count];
        check(copy(values.as_mut_ptr().cast(), address, size_of::<T>() * count))?;
        Ok(values)
    }

    /// A kernel of one of the files in `faults/`.
    pub fn kernel(&self, stem: &str, name: &str) -> Handle {
        let load: extern "C" fn(*mut Handle, *const c_char) -> c_int =
            self.library.function(c"cuModuleLoadData");
        let find: extern "C" fn(*mut Handle, Handle, *const c_char) -> c_int =
            self.library.function(c"cuModuleGetFunction");
        let image = CString::new(format!("boxwright-emulated:{stem}")).expect("no zero byte");
        let name = CString::new(name).expect("no zero byte");
        let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
        assert_eq!(load(&mut module, image.as_ptr()), 0, "{image:?}");
        assert_eq!(find(&mut function, module, name.as_ptr()), 0, "{name:?}");
        function
    }

    /// Launches a kernel on a stream and waits for nothing.
    pub fn launch_on<A: Copy>(
        &self,
        stream: Handle,
        function: Handle,
        shape: ([u32; 2], u32, u32),
        args: &A,
    ) -> Result<(), c_int> {
        type Launch = extern "C" fn(
            Handle,
            u32,
            u32,
            u32,
            u32,
            u32,
            u32,
            u32,
            Handle,
            *mut *const c_void,
            *mut *mut c_void,
        ) -> c_int;
        let launch: Launch = self.library.function(c"cuLaunchKernel");
        let (grid, threads, shared) = shape;
        let mut pointers: [*const c_void; 1] = [std::ptr::from_ref(args).cast()];
        let none = std::ptr::null_mut();
        check(launch(
            function,
            grid[0],
            grid[1],
            1,
            threads,
            1,
            1,
            shared,
            stream,
            pointers.as_mut_ptr(),
            none,
        ))
    }

    /// Launches a kernel on the default stream.
    pub fn launch<A: Copy>(
        &self,
        function: Handle,
        shape: ([u32; 2], u32, u32),
        args: &A,
    ) -> Result<(), c_int> {
        self.launch_on(std::ptr::null_mut(), function, shape, args)
    }

    /// A function of the driver, to be called as it is.
    pub fn function<F: Copy>(&self, name: &CStr) -> F {
        self.library.function(name)
    }
}

/// The driver's answer as a result.
pub fn check(code: c_int) -> Result<(), c_int> {
    if code == 0 { Ok(()) } else { Err(code) }
}
