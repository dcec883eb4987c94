//! Every kernel file becomes machine code for every supported chip, and no kernel wastes what a chip has.
//!
//! The real run-time compiler is needed (no GPU and no driver are): `BOXWRIGHT_NVRTC` names its folder where it does
//! not lie in a usual place. Without it the test says so and passes, unless `BOXWRIGHT_REQUIRE_NVRTC=1`.
//! `BOXWRIGHT_BLESS=1` writes the table `docs/kernel-resources.md` anew. What was compiled once is not compiled again
//! until it changes.

mod cubin;
mod kept;
mod table;

use std::collections::BTreeMap;

use boxwright::engine::device::cuda::compile::{self, Usage};
use boxwright::engine::device::cuda::sources::{SOURCES, Source};
use rayon::prelude::*;

/// The targets: Turing, Ampere (data centre, desktop), Ada, Hopper, Blackwell (data centre, desktop).
const TARGETS: [&str; 7] = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"];
/// Registers of a multiprocessor, on every target.
const REGISTERS: u32 = 65_536;
/// Registers are given to a warp in such portions per thread.
const REGISTER_PORTION: u32 = 8;
/// Static shared memory of a block, bytes, on every target.
const STATIC_SHARED_BYTES_MAX: u32 = 48 << 10;

/// Kernels that may spill or use a stack, with the reason. All others are hot.
const NOT_HOT: &[(&str, &str)] = &[];

/// Figures of one kernel, by target.
pub struct Kernel {
    pub stem: &'static str,
    /// Threads of a block.
    pub threads: u32,
    /// In the order of [`TARGETS`]; `None` where the file has no such kernel for the target.
    pub usage: [Option<Usage>; TARGETS.len()],
}

/// By file and name.
pub type Kernels = BTreeMap<(&'static str, String), Kernel>;

/// Machine code of one file for one target: what the compiler says and what stands in the code.
struct Built {
    source: &'static Source,
    target: usize,
    usage: Vec<Usage>,
    threads: BTreeMap<String, u32>,
}

fn build(source: &'static Source, target: usize) -> Result<Built, String> {
    let place = kept::place(source, TARGETS[target]);
    if let Some((usage, threads)) = kept::read(&place) {
        return Ok(Built { source, target, usage, threads });
    }
    let compiled = compile::compile(source, TARGETS[target]).map_err(|e| e.to_string())?;
    let threads = cubin::threads(&compiled.cubin)
        .ok_or_else(|| format!("kernels/{}.cu: no machine code for {}", source.stem, TARGETS[target]))?;
    let usage = compile::usage(&compiled.log);
    kept::write(&place, &usage, &threads);
    Ok(Built { source, target, usage, threads })
}

/// Compiles everything on all cores.
fn build_all() -> Result<Kernels, Vec<String>> {
    let pairs: Vec<(usize, &'static Source)> =
        (0..TARGETS.len()).flat_map(|target| SOURCES.iter().map(move |source| (target, source))).collect();
    let (built, failed): (Vec<_>, Vec<_>) =
        pairs.into_par_iter().map(|(target, source)| build(source, target)).partition(Result::is_ok);
    let failed: Vec<String> = failed.into_iter().filter_map(Result::err).collect();
    if !failed.is_empty() {
        return Err(failed);
    }
    let mut kernels = Kernels::new();
    for built in built.into_iter().flatten() {
        for usage in built.usage {
            let threads = built.threads.get(&usage.kernel).copied().unwrap_or(0);
            let kernel = kernels.entry((built.source.stem, usage.kernel.clone())).or_insert(Kernel {
                stem: built.source.stem,
                threads,
                usage: Default::default(),
            });
            kernel.usage[built.target] = Some(usage);
        }
    }
    Ok(kernels)
}

/// What is wrong with a kernel.
fn breaches(name: &str, kernel: &Kernel) -> Vec<String> {
    let mut found = Vec::new();
    let is_hot = !NOT_HOT.iter().any(|(cold, _)| *cold == name);
    if kernel.threads == 0 {
        found.push("it states no block size".to_owned());
    }
    for (usage, target) in kernel.usage.iter().zip(TARGETS) {
        let Some(usage) = usage else { continue };
        if is_hot && usage.spill_bytes + usage.stack_bytes > 0 {
            let (spilled, stack) = (usage.spill_bytes, usage.stack_bytes);
            found.push(format!("{target}: {spilled} bytes spilled, {stack} bytes of stack"));
        }
        let registers = usage.registers.next_multiple_of(REGISTER_PORTION) * kernel.threads;
        if registers > REGISTERS {
            found.push(format!(
                "{target}: {} registers with {} threads: no block fits",
                usage.registers, kernel.threads
            ));
        }
        if usage.shared_bytes > STATIC_SHARED_BYTES_MAX {
            found.push(format!("{target}: {} bytes of static shared memory", usage.shared_bytes));
        }
    }
    found.into_iter().map(|breach| format!("kernels/{}.cu: {name}: {breach}", kernel.stem)).collect()
}

#[test]
fn every_kernel_compiles_for_every_chip_without_spills() {
    let compiler = match compile::compiler() {
        Ok(compiler) => compiler,
        Err(reason) => {
            let needed = std::env::var_os("BOXWRIGHT_REQUIRE_NVRTC").is_some_and(|v| v == "1");
            assert!(!needed, "the run-time compiler is required and was not found: {reason}");
            eprintln!(
                "\n==== SKIPPED: no kernel was compiled, the run-time compiler was not found: {reason}\n"
            );
            return;
        }
    };
    let kernels = build_all().unwrap_or_else(|failed| panic!("{compiler}:\n{}", failed.join("\n")));
    for source in SOURCES {
        let has_kernels = kernels.keys().any(|(stem, _)| *stem == source.stem);
        assert!(has_kernels, "kernels/{}.cu holds no kernel", source.stem);
    }
    for (cold, _) in NOT_HOT {
        assert!(kernels.keys().any(|(_, name)| name == cold), "{cold} is excepted and does not exist");
    }
    let breaches: Vec<String> =
        kernels.iter().flat_map(|((_, name), kernel)| breaches(name, kernel)).collect();
    assert!(breaches.is_empty(), "{} breach(es):\n  {}", breaches.len(), breaches.join("\n  "));
    let version = compile::compiler_version().expect("it was found");
    table::check(&kernels, version);
    eprintln!("{} kernels for {} targets with {compiler}", kernels.len(), TARGETS.len());
}
