//! From kernel text to machine code for one chip, by NVRTC.

use std::ffi::{CStr, CString, c_char};

use cudarc::nvrtc::{result, sys};

use super::error::DeviceError;
use super::libraries;
use super::sources::{HEADERS, Source};

/// What the compiler gave.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// Machine code, ready to load.
    pub cubin: Vec<u8>,
    /// The compiler's words: registers, shared memory and spills of each kernel.
    pub log: String,
}

/// Version of the compiler, if there is one.
pub fn compiler_version() -> Option<(u32, u32)> {
    libraries::nvrtc().ok().map(|n| n.version)
}

/// Where the compiler lies, or why there is none.
///
/// # Errors
/// A sentence that says where was looked.
pub fn compiler() -> Result<String, String> {
    let found = libraries::nvrtc()?;
    let place = found.folder.map_or("the loader's path".to_owned(), |f| f.display().to_string());
    Ok(format!("NVRTC {}.{} from {place}", found.version.0, found.version.1))
}

/// The compiler's options for a target. Contraction of `a * b + c` is on, fast division and roots are off: the
/// tolerances of the tests rest on this.
pub fn options(target: &str) -> Vec<String> {
    vec![
        format!("--gpu-architecture={target}"),
        "--std=c++17".into(),
        "--fmad=true".into(),
        "--generate-line-info".into(),
        "--ptxas-options=-v".into(),
        "--ptxas-options=--warn-on-spills".into(),
    ]
}

/// Compiles a kernel file for `target`, for example `sm_90a`.
///
/// # Errors
/// No compiler, or the compiler's complaint with file and line.
pub fn compile(source: &Source, target: &str) -> Result<Compiled, DeviceError> {
    libraries::nvrtc().map_err(|reason| DeviceError::NoCompiler { stem: source.stem.into(), reason })?;
    let fail = |log: String| DeviceError::Compile { stem: source.stem.into(), target: target.into(), log };
    let text = |s: &str| CString::new(s).map_err(|_| fail("the text holds a zero byte".into()));
    let code = text(source.text)?;
    let name = text(&format!("{}.cu", source.stem))?;
    let headers: Vec<(CString, CString)> = HEADERS
        .iter()
        .map(|(name, body)| Ok((text(name)?, text(body)?)))
        .collect::<Result<_, DeviceError>>()?;
    let names: Vec<*const c_char> = headers.iter().map(|h| h.0.as_ptr()).collect();
    let bodies: Vec<*const c_char> = headers.iter().map(|h| h.1.as_ptr()).collect();
    let mut program = std::ptr::null_mut();
    // SAFETY: all strings end in zero and outlive the call, which copies them; both arrays have the same length.
    let created = unsafe {
        sys::nvrtcCreateProgram(
            &mut program,
            code.as_ptr(),
            name.as_ptr(),
            headers.len() as i32,
            bodies.as_ptr(),
            names.as_ptr(),
        )
    };
    created.result().map_err(|e| fail(format!("{e:?}")))?;
    // SAFETY: `program` was just made and is destroyed below, after its last use.
    let compiled = unsafe { finish(program, target) };
    // SAFETY: as above.
    unsafe { result::destroy_program(program) }.ok();
    compiled.map_err(fail)
}

/// # Safety
/// `program` is alive.
unsafe fn finish(program: sys::nvrtcProgram, target: &str) -> Result<Compiled, String> {
    // SAFETY: alive by the contract of this function.
    let outcome = unsafe { result::compile_program(program, &options(target)) };
    // SAFETY: as above; the log ends in zero.
    let log = unsafe { result::get_program_log(program) }
        .map(|l| unsafe { CStr::from_ptr(l.as_ptr()) }.to_string_lossy().trim().to_owned())
        .unwrap_or_default();
    if let Err(error) = outcome {
        return Err(if log.is_empty() { format!("{error:?}") } else { log });
    }
    let mut bytes = 0usize;
    // SAFETY: writes one integer.
    unsafe { sys::nvrtcGetCUBINSize(program, &mut bytes) }.result().map_err(|e| format!("{e:?}"))?;
    let mut cubin = vec![0u8; bytes];
    // SAFETY: the buffer has the length that was just asked for.
    unsafe { sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()) }
        .result()
        .map_err(|e| format!("{e:?}"))?;
    Ok(Compiled { cubin, log })
}

/// Registers, shared memory and spills of one kernel, read from the compiler's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Name of the kernel.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Static shared memory of a block, bytes.
    pub shared_bytes: u32,
    /// Bytes spilled (stores and loads together).
    pub spill_bytes: u32,
    /// Bytes of stack of a thread.
    pub stack_bytes: u32,
}

/// Reads the figures of every kernel from the log of [`compile`].
///
/// A function that was not inlined has a stack and spills of its own; they count to the kernel listed before it, so
/// that none is lost.
pub fn usage(log: &str) -> Vec<Usage> {
    let mut found: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            found.push(Usage { kernel, registers: 0, shared_bytes: 0, spill_bytes: 0, stack_bytes: 0 });
        }
        let Some(last) = found.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            let spilled =
                number_before(line, "bytes spill stores") + number_before(line, "bytes spill loads");
            last.spill_bytes = last.spill_bytes.max(spilled);
            last.stack_bytes = last.stack_bytes.max(number_before(line, "bytes stack frame"));
        }
        if line.contains(": Used ") {
            last.registers = number_before(line, "registers");
            last.shared_bytes = number_before(line, "bytes smem");
            last.stack_bytes = last.stack_bytes.max(number_before(line, "bytes cumulative stack size"));
        }
    }
    found
}

/// The number that stands before `words`; 0 where the line lacks them.
fn number_before(line: &str, words: &str) -> u32 {
    let Some(at) = line.find(words) else { return 0 };
    let before = line[..at].trim_end();
    let digits = before.len() - before.bytes().rev().take_while(u8::is_ascii_digit).count();
    before[digits..].parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As NVRTC 13.0 wrote it.
    const LOG: &str = "\
ptxas warning : Registers are spilled to local memory in function 'spilly', 824 bytes spill stores, 836 bytes spill loads
ptxas info    : 12 bytes gmem
ptxas info    : Compiling entry function 'spilly' for 'sm_90a'
ptxas info    : Function properties for spilly
ptxas         .     552 bytes stack frame, 824 bytes spill stores, 836 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 552 bytes cumulative stack size, 1200 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 23.341 ms
ptxas info    : Compiling entry function 'calls' for 'sm_90a'
ptxas info    : Function properties for calls
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 25 registers, used 0 barriers, 64 bytes cumulative stack size
ptxas info    : Compile time = 3.230 ms
ptxas info    : Function properties for _Z6helperPfi
ptxas         .     16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function 'cast_f16' for 'sm_90a'
ptxas info    : Function properties for cast_f16
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 22 registers, used 0 barriers
ptxas info    : Compile time = 2.765 ms";

    #[test]
    fn figures_are_read_from_the_compilers_log() {
        let figures: Vec<_> = usage(LOG)
            .into_iter()
            .map(|u| (u.kernel, u.registers, u.shared_bytes, u.spill_bytes, u.stack_bytes))
            .collect();
        let row = |name: &str, a, b, c, d| (name.to_owned(), a, b, c, d);
        let expected =
            [row("spilly", 32, 1200, 1660, 552), row("calls", 25, 0, 12, 64), row("cast_f16", 22, 0, 0, 0)];
        assert_eq!(figures, expected);
        assert_eq!(usage("k.cu(3): error: identifier \"x\" is undefined"), []);
    }
}
