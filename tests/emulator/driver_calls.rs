//! The stand-in driver answers as the driver does: what the host code does wrong must not work here.

use std::ffi::{CStr, c_int, c_void};

use super::kernels::{MapArgs, numbers};
use super::library::{Device, Library, check, folder};

type Handle = *mut c_void;
const NONE: Handle = std::ptr::null_mut();

const INVALID_VALUE: c_int = 1;
const OUT_OF_MEMORY: c_int = 2;
const NOT_FOUND: c_int = 500;
const LAUNCH_FAILED: c_int = 719;
const CAPTURE_UNSUPPORTED: c_int = 900;
const CAPTURE_INVALIDATED: c_int = 901;
const CAPTURE_UNJOINED: c_int = 904;
const THREAD_LOCAL: c_int = 1;

impl Device {
    fn stream(&self) -> Handle {
        let create: extern "C" fn(*mut Handle, u32) -> c_int = self.function(c"cuStreamCreate");
        let mut stream = NONE;
        assert_eq!(create(&mut stream, 1), 0);
        stream
    }
    fn event(&self) -> Handle {
        let create: extern "C" fn(*mut Handle, u32) -> c_int = self.function(c"cuEventCreate");
        let mut event = NONE;
        assert_eq!(create(&mut event, 0), 0);
        event
    }
    /// A call that takes one handle.
    fn call(&self, name: &CStr, handle: Handle) -> Result<(), c_int> {
        let call: extern "C" fn(Handle) -> c_int = self.function(name);
        check(call(handle))
    }
    fn record(&self, event: Handle, stream: Handle) -> Result<(), c_int> {
        let record: extern "C" fn(Handle, Handle) -> c_int = self.function(c"cuEventRecord");
        check(record(event, stream))
    }
    fn wait(&self, stream: Handle, event: Handle) -> Result<(), c_int> {
        let wait: extern "C" fn(Handle, Handle, u32) -> c_int = self.function(c"cuStreamWaitEvent");
        check(wait(stream, event, 0))
    }
    fn begin_capture(&self, stream: Handle) -> Result<(), c_int> {
        let begin: extern "C" fn(Handle, c_int) -> c_int = self.function(c"cuStreamBeginCapture_v2");
        check(begin(stream, THREAD_LOCAL))
    }
    fn end_capture(&self, stream: Handle) -> Result<Handle, c_int> {
        let end: extern "C" fn(Handle, *mut Handle) -> c_int = self.function(c"cuStreamEndCapture");
        let mut graph = NONE;
        check(end(stream, &mut graph)).map(|()| graph)
    }
    fn instantiate(&self, graph: Handle) -> Handle {
        let make: extern "C" fn(*mut Handle, Handle, u64) -> c_int =
            self.function(c"cuGraphInstantiateWithFlags");
        let mut executable = NONE;
        assert_eq!(make(&mut executable, graph, 0), 0);
        executable
    }
    fn launch_graph(&self, executable: Handle, stream: Handle) -> Result<(), c_int> {
        let launch: extern "C" fn(Handle, Handle) -> c_int = self.function(c"cuGraphLaunch");
        check(launch(executable, stream))
    }
    fn copy_on(&self, stream: Handle, to: u64, from: u64, bytes: usize) -> Result<(), c_int> {
        let copy: extern "C" fn(u64, u64, usize, Handle) -> c_int = self.function(c"cuMemcpyDtoDAsync_v2");
        check(copy(to, from, bytes, stream))
    }
    fn attribute(&self, attribute: c_int) -> c_int {
        let get: extern "C" fn(*mut c_int, c_int, c_int) -> c_int = self.function(c"cuDeviceGetAttribute");
        let current: extern "C" fn(*mut c_int) -> c_int = self.function(c"cuCtxGetDevice");
        let (mut value, mut number) = (0, 0);
        assert_eq!(current(&mut number), 0);
        assert_eq!(get(&mut value, attribute, number), 0);
        value
    }
}

/// `twice` on 100 numbers.
struct Twice {
    x: Vec<f32>,
    out: u64,
    kernel: Handle,
    args: MapArgs,
}

const SHAPE: ([u32; 2], u32, u32) = ([1, 1], 128, 0);

impl Twice {
    fn new(device: &Device) -> Twice {
        let x = numbers(9, 100);
        let x_at = device.put(&x);
        let out = device.put(&[f32::NAN; 100]);
        let kernel = device.kernel("memory", "twice");
        Twice { x, out, kernel, args: MapArgs { x: x_at, out, n: 100 } }
    }
    fn is_done(&self, device: &Device) -> bool {
        let got = device.read::<f32>(self.out, 100).unwrap();
        got.iter().zip(&self.x).all(|(got, x)| *got == 2.0 * x)
    }
}

#[test]
fn launches_are_checked() {
    let device = Device::next();
    let t = Twice::new(&device);
    for (shape, words) in [
        (([0, 1], 128, 0), "grid is empty"),
        (([1, 70_000], 128, 0), "grid is too large"),
        (([1, 1], 64, 0), "blocks of 64 threads; it is written for 128"),
        (([1, 1], 128, 50_000), "50000 bytes of shared memory"),
    ] {
        assert_eq!(device.launch(t.kernel, shape, &t.args), Err(INVALID_VALUE));
        assert!(device.failure().contains(words), "{}", device.failure());
    }
    let allow: extern "C" fn(Handle, c_int, c_int) -> c_int = device.function(c"cuFuncSetAttribute");
    assert_eq!(allow(t.kernel, 8, 232_449), INVALID_VALUE);
    assert_eq!(allow(t.kernel, 8, 232_448), 0);
    device.launch(t.kernel, ([1, 1], 128, 232_448), &t.args).unwrap();
    assert!(t.is_done(&device));
}

#[test]
fn arguments_have_a_size() {
    let device = Device::next();
    let t = Twice::new(&device);
    let info: extern "C" fn(Handle, usize, *mut usize, *mut usize) -> c_int =
        device.function(c"cuFuncGetParamInfo");
    let (mut offset, mut bytes) = (9, 9);
    assert_eq!(info(t.kernel, 0, &mut offset, &mut bytes), 0);
    assert_eq!((offset, bytes), (0, 24));
    assert_eq!(info(t.kernel, 1, &mut offset, &mut bytes), INVALID_VALUE);

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
        *mut Handle,
        *mut *const c_void,
    ) -> c_int;
    let launch: Launch = device.function(c"cuLaunchKernel");
    for (given, answer) in [(16usize, INVALID_VALUE), (32, INVALID_VALUE), (24, 0)] {
        let mut extra: [*const c_void; 5] = [
            std::ptr::without_provenance(1),
            std::ptr::from_ref(&t.args).cast(),
            std::ptr::without_provenance(2),
            std::ptr::from_ref(&given).cast(),
            std::ptr::null(),
        ];
        let none = std::ptr::null_mut();
        assert_eq!(
            launch(t.kernel, 1, 1, 1, 128, 1, 1, 0, NONE, none, extra.as_mut_ptr()),
            answer,
            "{given}"
        );
    }
    assert!(t.is_done(&device));
    let find: extern "C" fn(*mut Handle, Handle, *const i8) -> c_int =
        device.function(c"cuModuleGetFunction");
    let module: extern "C" fn(*mut Handle, Handle) -> c_int = device.function(c"cuFuncGetModule");
    let (mut owner, mut function) = (NONE, NONE);
    assert_eq!(module(&mut owner, t.kernel), 0);
    assert_eq!(find(&mut function, owner, c"thrice".as_ptr()), NOT_FOUND);
}

#[test]
fn a_failure_stays() {
    let device = Device::next();
    let t = Twice::new(&device);
    device.set("fail_launch=2");
    device.launch(t.kernel, SHAPE, &t.args).unwrap();
    assert!(t.is_done(&device));
    assert_eq!(device.launch(t.kernel, SHAPE, &t.args), Err(LAUNCH_FAILED));
    assert_eq!(device.launch(t.kernel, SHAPE, &t.args), Err(LAUNCH_FAILED));
    assert_eq!(device.allocate(16), Err(LAUNCH_FAILED));
    assert_eq!(device.read::<f32>(t.out, 1), Err(LAUNCH_FAILED));
    device.set("reset=1");
    device.launch(t.kernel, SHAPE, &t.args).unwrap();
}

#[test]
fn memory_has_an_end() {
    let device = Device::next();
    device.set("memory_mib=4");
    let info: extern "C" fn(*mut usize, *mut usize) -> c_int = device.function(c"cuMemGetInfo_v2");
    let free = || {
        let (mut free, mut total) = (0, 0);
        assert_eq!(info(&mut free, &mut total), 0);
        assert_eq!(total, 4 << 20);
        free
    };
    let a = device.allocate(3 << 20).unwrap();
    assert_eq!(free(), 1 << 20);
    assert_eq!(device.allocate((1 << 20) + 1), Err(OUT_OF_MEMORY));
    device.free(a).unwrap();
    assert_eq!(device.free(a), Err(INVALID_VALUE));
    assert_eq!(free(), 4 << 20);
    device.set("largest_bytes=1000");
    assert_eq!(device.allocate(1001), Err(OUT_OF_MEMORY));
    let b = device.allocate(1000).unwrap();
    assert_eq!(device.write(b, &[0u8; 1001]), Err(INVALID_VALUE));
    assert_eq!(device.write(b + 999, &[0u8; 1]), Ok(()));
    assert_eq!(device.read::<u8>(b + 999, 2), Err(INVALID_VALUE));
    assert_eq!(device.read::<u8>(b - 1, 1), Err(INVALID_VALUE));
    let fill: extern "C" fn(u64, u32, usize) -> c_int = device.function(c"cuMemsetD32_v2");
    assert_eq!(fill(b, 7, 251), INVALID_VALUE);
    assert_eq!(fill(b, 7, 250), 0);
    assert_eq!(device.read::<u32>(b, 250), Ok(vec![7; 250]));
    device.free(b).unwrap();
    assert_eq!(device.stats()[5..8], [0, 0, 3 << 20]);
}

#[test]
fn a_graph_repeats_what_was_captured() {
    let device = Device::next();
    let t = Twice::new(&device);
    let (stream, other, event, back) = (device.stream(), device.stream(), device.event(), device.event());
    let copy = device.put(&[f32::NAN; 100]);
    for mode in ["streams=now", "streams=late"] {
        device.set(mode);
        device.begin_capture(stream).unwrap();
        // The arguments are copied at capture: what happens to the host's structure later means nothing.
        let mut args = t.args;
        device.launch_on(stream, t.kernel, SHAPE, &args).unwrap();
        args.n = 0;
        // A second stream joins and comes back.
        device.record(event, stream).unwrap();
        device.wait(other, event).unwrap();
        device.copy_on(other, copy, t.out, 400).unwrap();
        device.record(back, other).unwrap();
        device.wait(stream, back).unwrap();
        let graph = device.end_capture(stream).unwrap();
        let count: extern "C" fn(Handle, *mut Handle, *mut usize) -> c_int =
            device.function(c"cuGraphGetNodes");
        let mut nodes = 0;
        assert_eq!(count(graph, std::ptr::null_mut(), &mut nodes), 0);
        assert_eq!((nodes, args.n), (2, 0));
        let executable = device.instantiate(graph);
        device.call(c"cuGraphDestroy", graph).unwrap();
        for _ in 0..3 {
            for at in [t.out, copy] {
                device.write(at, &[f32::NAN; 100]).unwrap();
            }
            device.launch_graph(executable, stream).unwrap();
            device.call(c"cuStreamSynchronize", stream).unwrap();
            assert!(t.is_done(&device), "{mode}");
            assert_eq!(device.read::<f32>(copy, 100), device.read::<f32>(t.out, 100));
        }
        device.call(c"cuGraphExecDestroy", executable).unwrap();
    }
    assert_eq!(device.stats()[8], 6);
}

#[test]
fn a_capture_forbids_what_it_cannot_hold() {
    let device = Device::next();
    let t = Twice::new(&device);
    let (stream, other, event) = (device.stream(), device.stream(), device.event());
    let broken = |call: &dyn Fn() -> Result<(), c_int>| {
        device.begin_capture(stream).unwrap();
        device.launch_on(stream, t.kernel, SHAPE, &t.args).unwrap();
        assert_eq!(call(), Err(CAPTURE_UNSUPPORTED));
        assert_eq!(device.launch_on(stream, t.kernel, SHAPE, &t.args), Err(CAPTURE_INVALIDATED));
        assert_eq!(device.end_capture(stream), Err(CAPTURE_INVALIDATED));
    };
    broken(&|| device.call(c"cuStreamSynchronize", stream));
    broken(&|| device.allocate(64).map(|_| ()));
    broken(&|| device.read::<f32>(t.out, 1).map(|_| ()));
    broken(&|| {
        let synchronize: extern "C" fn() -> c_int = device.function(c"cuCtxSynchronize");
        check(synchronize())
    });
    // A stream that joined must come back.
    device.begin_capture(stream).unwrap();
    device.record(event, stream).unwrap();
    device.wait(other, event).unwrap();
    device.launch_on(other, t.kernel, SHAPE, &t.args).unwrap();
    assert_eq!(device.end_capture(stream), Err(CAPTURE_UNJOINED));
    // Nothing of all this has run, and the streams can be used again.
    assert!(device.read::<f32>(t.out, 100).unwrap().iter().all(|v| v.is_nan()));
    device.launch_on(other, t.kernel, SHAPE, &t.args).unwrap();
    device.call(c"cuStreamSynchronize", other).unwrap();
    assert!(t.is_done(&device));
}

#[test]
fn late_streams_show_a_missing_order() {
    let device = Device::next();
    let t = Twice::new(&device);
    let (producer, consumer, event) = (device.stream(), device.stream(), device.event());
    let copy = device.put(&[0f32; 100]);
    let got = |ordered: bool| {
        device.write(t.out, &[f32::NAN; 100]).unwrap();
        device.launch_on(producer, t.kernel, SHAPE, &t.args).unwrap();
        device.record(event, producer).unwrap();
        if ordered {
            device.wait(consumer, event).unwrap();
        }
        device.copy_on(consumer, copy, t.out, 400).unwrap();
        device.call(c"cuStreamSynchronize", consumer).unwrap();
        let first = device.read::<f32>(copy, 1).unwrap()[0];
        device.call(c"cuStreamSynchronize", producer).unwrap();
        first
    };
    assert_eq!((got(false), got(true)), (2.0 * t.x[0], 2.0 * t.x[0]), "at once, any order seems right");
    device.set("streams=late");
    assert!(got(false).is_nan(), "the copy does not wait for the kernel");
    assert_eq!(got(true), 2.0 * t.x[0]);
}

#[test]
fn late_streams_read_pinned_memory_when_they_run() {
    let device = Device::next();
    device.set("streams=late");
    let (stream, at) = (device.stream(), device.put(&[0u32]));
    let pin: extern "C" fn(*mut *mut u32, usize, u32) -> c_int = device.function(c"cuMemHostAlloc");
    let upload: extern "C" fn(u64, *const u32, usize, Handle) -> c_int =
        device.function(c"cuMemcpyHtoDAsync_v2");
    let mut pinned = std::ptr::null_mut();
    assert_eq!(pin(&mut pinned, 4, 0), 0);
    let mut pageable = 1u32;
    assert_eq!(upload(at, &raw const pageable, 4, stream), 0);
    pageable += 1;
    device.call(c"cuStreamSynchronize", stream).unwrap();
    assert_eq!((device.read::<u32>(at, 1).unwrap()[0], pageable), (1, 2));
    // SAFETY: four bytes that this test was given.
    unsafe { *pinned = 3 };
    assert_eq!(upload(at, pinned, 4, stream), 0);
    // SAFETY: as above; a mistake in a program that meant to send 3.
    unsafe { *pinned = 4 };
    device.call(c"cuStreamSynchronize", stream).unwrap();
    assert_eq!(device.read::<u32>(at, 1).unwrap(), [4]);
    device.call(c"cuMemFreeHost", pinned.cast()).unwrap();
}

#[test]
fn the_device_says_what_it_is() {
    let device = Device::next();
    assert_eq!((device.attribute(75), device.attribute(76), device.attribute(97)), (9, 0, 232_448));
    device.set("chip=75,multiprocessors=7");
    assert_eq!((device.attribute(75), device.attribute(76), device.attribute(97)), (7, 5, 65_536));
    assert_eq!((device.attribute(16), device.attribute(38), device.attribute(115)), (7, 50 << 20, 0));
    device.set("chip=120");
    assert_eq!((device.attribute(75), device.attribute(76), device.attribute(97)), (12, 0, 101_376));
    let (start, end) = (device.event(), device.event());
    device.record(start, NONE).unwrap();
    device.record(end, NONE).unwrap();
    let elapsed: extern "C" fn(*mut f32, Handle, Handle) -> c_int = device.function(c"cuEventElapsedTime_v2");
    let mut milliseconds = -1.0;
    assert_eq!(elapsed(&mut milliseconds, start, end), 0);
    assert!((0.0..1000.0).contains(&milliseconds));
    let text: extern "C" fn(c_int, *mut *const i8) -> c_int = device.function(c"cuGetErrorName");
    let mut name = std::ptr::null();
    assert_eq!(text(LAUNCH_FAILED, &mut name), 0);
    // SAFETY: the driver gives a constant text.
    assert_eq!(unsafe { CStr::from_ptr(name) }, c"CUDA_ERROR_LAUNCH_FAILED");
}

#[test]
fn the_compiler_takes_a_program_or_says_why_not() {
    let library = Library::open(&folder().join("libnvrtc.so.13"));
    type Create =
        extern "C" fn(*mut Handle, *const i8, *const i8, c_int, *const *const i8, *const *const i8) -> c_int;
    let create: Create = library.function(c"nvrtcCreateProgram");
    let compile: extern "C" fn(Handle, c_int, *const *const i8) -> c_int =
        library.function(c"nvrtcCompileProgram");
    let text = |program: Handle, size: &CStr, get: &CStr| {
        let size: extern "C" fn(Handle, *mut usize) -> c_int = library.function(size);
        let get: extern "C" fn(Handle, *mut u8) -> c_int = library.function(get);
        let mut bytes = 0;
        assert_eq!(size(program, &mut bytes), 0);
        let mut text = vec![1; bytes];
        assert_eq!(get(program, text.as_mut_ptr()), 0);
        assert_eq!(text.pop(), Some(0));
        String::from_utf8(text).expect("it is text")
    };
    let none = std::ptr::null();
    for (source, answer) in [(c"KERNEL", 0), (c"one\n#error emulated", 6)] {
        let mut program = NONE;
        assert_eq!(create(&mut program, source.as_ptr(), c"memory.cu".as_ptr(), 0, none, none), 0);
        assert_eq!(compile(program, 0, none), answer);
        if answer == 0 {
            let image = text(program, c"nvrtcGetCUBINSize", c"nvrtcGetCUBIN");
            assert_eq!(image, "boxwright-emulated:memory");
        } else {
            let log = text(program, c"nvrtcGetProgramLogSize", c"nvrtcGetProgramLog");
            assert!(log.starts_with("memory.cu(2): error"), "{log}");
        }
    }
}
