//! The emulator that the kernels' tests run on: right kernels give the right numbers in every order of threads and
//! with early and late copies, and planted faults are noticed. Needs g++.

#[path = "emulator/driver_calls.rs"]
mod driver_calls;
#[path = "emulator/kernels.rs"]
mod kernels;
#[path = "emulator/library.rs"]
mod library;
#[path = "emulator/warpgroup.rs"]
mod warpgroup;

use std::process::Command;

use half::{bf16, f16};
use kernels::{MapArgs, Outcome, gemm, reduce, tiled, twice};
use library::{Device, MODES, SANITIZED};
use warpgroup::multiply;

#[test]
fn right_kernels_are_right_in_every_mode() {
    let device = Device::next();
    for mode in MODES {
        device.set(mode);
        for shape in [(64, 64, 32), (1, 1, 8), (70, 130, 72), (33, 65, 200), (128, 5, 16)] {
            for name in ["gemm_bf16", "gemm_f16"] {
                assert_eq!(gemm(&device, name, shape), Outcome::Right, "{name} {shape:?} {mode}");
            }
        }
        for shape in [(16, 16, 16), (1, 1, 1), (37, 50, 45)] {
            assert_eq!(tiled(&device, "tiled", shape), Outcome::Right, "{shape:?} {mode}");
        }
        for n in [1, 128, 1000] {
            assert_eq!(twice(&device, "twice", n, 0), Outcome::Right, "{n} {mode}");
        }
    }
    assert_eq!(device.stats()[3], 0, "these matrix loads have no bank conflicts");
}

#[test]
fn a_sum_has_the_same_bits_in_every_mode() {
    let device = Device::next();
    for n in [1, 255, 256, 5000, 20_011] {
        let mut seen = Vec::new();
        for mode in MODES {
            device.set(mode);
            let (outcome, bits) = reduce(&device, "reduce", n);
            assert_eq!(outcome, Outcome::Right, "{n} {mode}");
            seen.push(bits);
        }
        seen.dedup();
        assert_eq!(seen.len(), 1, "{n}: {seen:x?}");
    }
}

/// Modes of `MODES` in which a run does not come out right.
fn caught(device: &Device, run: impl Fn() -> Outcome) -> Vec<(&'static str, Outcome)> {
    let mut found = Vec::new();
    for mode in MODES {
        device.set(mode);
        let outcome = run();
        if outcome != Outcome::Right {
            found.push((mode, outcome));
        }
    }
    found
}

#[test]
fn a_race_is_seen_in_some_mode() {
    let device = Device::next();
    let seen = |name: &str, found: Vec<(&'static str, Outcome)>| {
        assert!(!found.is_empty(), "{name} was not caught");
        eprintln!("{name}: caught in {} of {} modes", found.len(), MODES.len());
    };
    for name in ["tiled_no_first_barrier", "tiled_no_second_barrier"] {
        seen(name, caught(&device, || tiled(&device, name, (37, 50, 45))));
    }
    for name in ["gemm_weak_wait", "gemm_no_barrier"] {
        seen(name, caught(&device, || gemm(&device, name, (70, 130, 72))));
    }
}

#[test]
fn a_weak_wait_is_seen_by_late_copies_only() {
    let device = Device::next();
    device.set("order=fifo,async=early");
    assert_eq!(gemm(&device, "gemm_weak_wait", (64, 64, 128)), Outcome::Right);
    device.set("order=fifo,async=late");
    assert_eq!(gemm(&device, "gemm_weak_wait", (64, 64, 128)), Outcome::WrongNumbers);
}

/// Asserts that the launch fails in every mode with a sentence that has all of `words`.
fn fails_with(device: &Device, name: &str, words: &[&str], run: impl Fn() -> Outcome) {
    for mode in MODES {
        device.set(mode);
        match run() {
            Outcome::Failed(sentence) => {
                for word in words {
                    assert!(sentence.contains(word), "{name} {mode}: `{word}` is not in `{sentence}`");
                }
            }
            other => panic!("{name} {mode}: {other:?}"),
        }
    }
}

#[test]
fn what_must_not_be_is_named() {
    let device = Device::next();
    let reduction = |name: &'static str, words: &[&str]| {
        fails_with(&device, name, words, || reduce(&device, name, 200).0);
    };
    // The warp that leaves out the barrier comes to the next one.
    reduction("reduce_divergent_barrier", &["different barriers", "reduce.cu:"]);
    reduction("reduce_early_return", &["deadlock", "waits at reduce.cu:", "56 of 256 threads have ended"]);
    reduction("reduce_wrong_lane", &["reduce.cu:", "reads lane", "not in mask 0000ffff"]);
    reduction("reduce_own_lane", &["reduce.cu:", "the lane is not in its own mask"]);
    reduction("reduce_different_places", &["different collectives", "reduce.cu:"]);
    reduction("reduce_different_barriers", &["different barriers", "reduce.cu:"]);
    // The other lanes wait in the shuffle; lane 7 has gone on to the next one, at another place.
    reduction("reduce_lost_lane", &["reduce.cu:"]);
    fails_with(&device, "gemm_misaligned", &["cp_async16", "not aligned"], || {
        gemm(&device, "gemm_misaligned", (64, 64, 72))
    });
}

#[test]
fn warpgroups_are_right_in_every_mode() {
    let device = Device::next();
    for mode in MODES {
        device.set(mode);
        for shape in [(64, 128, 64), (1, 8, 8), (70, 136, 200), (33, 64, 328), (130, 8, 72)] {
            for name in ["warpgroup_bf16", "warpgroup_f16", "warpgroup_rows_bf16", "warpgroup_rows_f16"] {
                assert_eq!(multiply(&device, name, shape), Outcome::Right, "{name} {shape:?} {mode}");
            }
        }
    }
}

#[test]
fn faults_of_warpgroups_are_noticed() {
    let device = Device::next();
    let shape = (70, 136, 328);
    // Where a copy comes as soon as it is asked for, and its asker first, a missing wait does no harm: not every mode
    // notices every fault.
    for name in [
        "warpgroup_no_empty_wait",
        "warpgroup_early_release",
        "warpgroup_no_last_wait",
        "warpgroup_few_bytes",
        "warpgroup_no_full_wait",
    ] {
        assert!(!caught(&device, || multiply(&device, name, shape)).is_empty(), "{name} was not caught");
    }
    let named = |name: &'static str, words: &[&str]| {
        fails_with(&device, name, words, || multiply(&device, name, shape));
    };
    named("warpgroup_no_fence", &["no wgmma_fence before it"]);
    named("warpgroup_no_swizzle", &["without 128-byte swizzle"]);
    named("warpgroup_many_bytes", &["deadlock", "waits at warpgroup.cu:"]);
}

#[test]
fn writes_outside_of_an_allocation_are_noticed() {
    let device = Device::next();
    let map = |name: &'static str, n: usize, shared: u32, words: &[&str]| {
        fails_with(&device, name, words, || twice(&device, name, n, shared));
    };
    map("twice_one_more", 100, 0, &["twice_one_more", "byte 400 of an allocation of 400 bytes was written"]);
    map("twice_tail", 100, 0, &["of an allocation of 400 bytes was written"]);
    map("twice_before", 100, 0, &["byte -4 of an allocation of 400 bytes was written"]);
    map("twice_null", 100, 0, &["touches address", "at memory.cu:"]);
    map("twice_misaligned", 100, 0, &["not aligned to its type", "at memory.cu:"]);
    map("twice_index", 100, 0, &["outside of its array", "at memory.cu:"]);
    map("past_shared", 100, 508, &["past the 508 bytes of dynamic shared memory"]);
    // 64 numbers fill their pages' end exactly: one more is another page.
    map("twice_one_more", 64, 0, &["touches address"]);
}

#[test]
fn what_nobody_wrote_is_not_a_number() {
    let device = Device::next();
    let out = device.put(&[0f32; 128]);
    let args = MapArgs { x: 0, out, n: 128 };
    for mode in MODES {
        device.set(mode);
        device.launch(device.kernel("memory", "unwritten_shared"), ([1, 1], 128, 512), &args).unwrap();
        assert!(device.read::<f32>(out, 128).unwrap().iter().all(|v| v.is_nan()), "{mode}");
    }
    let fresh = device.allocate(64).unwrap();
    assert!(device.read::<f32>(fresh, 16).unwrap().iter().all(|v| v.is_nan()));
}

#[test]
fn bank_conflicts_are_counted() {
    let device = Device::next();
    assert_eq!(gemm(&device, "gemm_bank_conflicts", (64, 64, 64)), Outcome::Right);
    let [.., conflicts, loads, _, _, _, _] = device.stats();
    assert!(loads > 0 && conflicts > loads, "{conflicts} conflicts in {loads} loads");
}

#[test]
fn an_unguarded_depth_is_seen_by_ragged_shapes() {
    let device = Device::next();
    assert_eq!(gemm(&device, "gemm_no_k_guard", (64, 64, 64)), Outcome::Right);
    let found = caught(&device, || gemm(&device, "gemm_no_k_guard", (64, 64, 40)));
    assert_eq!(found.len(), MODES.len(), "{found:?}");
}

#[test]
fn conversions_round_as_the_formats_say() {
    let device = Device::next();
    // Every pattern of the upper half word with lower ones at and around the ties of both formats.
    let lows = [0u32, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xf000, 0xffff];
    let x: Vec<f32> = (0..=0xffffu32)
        .flat_map(|high| lows.map(|low| f32::from_bits(high << 16 | low)))
        .chain((0..=0xffffu16).map(|h| f16::from_bits(h).to_f32()))
        .chain((0..0x2000u32).flat_map(|i| [1, 2, 3].map(|d| f32::from_bits(0x3300_0000 + i * 0xf00 + d))))
        .collect();
    let n = x.len();
    let (x_at, out) = (device.put(&x), device.allocate(n * 16).unwrap());
    let args = MapArgs { x: x_at, out, n: n as u64 };
    let kernel = device.kernel("memory", "convert");
    device.launch(kernel, ([n.div_ceil(128) as u32, 1], 128, 0), &args).unwrap();
    let got = device.read::<u32>(out, n * 4).unwrap();
    for (x, got) in x.iter().zip(got.chunks(4)) {
        let bits = x.to_bits();
        if x.is_nan() {
            assert_eq!(&got[..2], &[0x7fff, 0x7fff], "{bits:08x}");
            assert!(f32::from_bits(got[2]).is_nan() && f32::from_bits(got[3]).is_nan(), "{bits:08x}");
            continue;
        }
        let (half, brain) = (f16::from_f32(*x), bf16::from_f32(*x));
        assert_eq!((got[0], got[1]), (half.to_bits().into(), brain.to_bits().into()), "{bits:08x}");
        assert_eq!((got[2], got[3]), (half.to_f32().to_bits(), brain.to_f32().to_bits()), "{bits:08x}");
    }
    let args = MapArgs { x: 0, out, n: 1 << 16 };
    device.launch(device.kernel("memory", "halves"), ([512, 1], 128, 0), &args).unwrap();
    for (pattern, got) in (0..=0xffffu16).zip(device.read::<f32>(out, 1 << 16).unwrap()) {
        let want = f16::from_bits(pattern).to_f32();
        assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()), "{pattern:04x}");
    }
}

#[test]
fn collectives_do_what_cuda_says() {
    let device = Device::next();
    let out = device.put(&[0xffff_ffffu32; 96 * 12]);
    let args = MapArgs { x: 0, out, n: 96 };
    for mode in MODES {
        device.set(mode);
        device.launch(device.kernel("memory", "collectives"), ([1, 1], 96, 0), &args).unwrap();
        let got = device.read::<u32>(out, 96 * 12).unwrap();
        for (t, got) in (0u32..).zip(got.chunks(12)) {
            let (lane, first) = (t % 32, t / 32 * 32);
            let thirds = (0..32).filter(|l| l % 3 == 0).fold(0, |a, l| a | 1 << l);
            assert_eq!(got[..2], [thirds, 2], "{t} {mode}");
            assert_eq!(got[2], first + 5, "{t} {mode}");
            assert_eq!(got[3], if lane >= 3 { t - 3 } else { t }, "{t} {mode}");
            assert_eq!(got[4], if lane < 29 { t + 3 } else { t }, "{t} {mode}");
            assert_eq!(got[5], t ^ 1, "{t} {mode}");
            assert_eq!(got[6], first + 2, "{t} {mode}");
            assert_eq!(got[7..9], [48, 1], "{t} {mode}");
            assert_eq!(got[9], if lane < 16 { t ^ 15 } else { 0xaaaa_0000 }, "{t} {mode}");
            assert_eq!(got[10], (((0x8000_0000 + u64::from(t)) * 6) >> 32) as u32, "{t} {mode}");
            assert_eq!(got[11], (f64::from(t) * 0.5).round_ties_even() as u32, "{t} {mode}");
        }
    }
}

/// Environment of a sanitized child: the kernel that must end it.
const WRONG: &str = "BOXWRIGHT_EMULATOR_WRONG";

/// Runs a test of this program in a child under the sanitizers. `None` where they are not installed.
fn sanitized(test: &str, wrong: Option<&str>) -> Option<std::process::Output> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned());
    let asked = Command::new(compiler).arg("-print-file-name=libasan.so").output().expect("g++ is here");
    let runtime = String::from_utf8_lossy(&asked.stdout).trim().to_owned();
    if !runtime.contains('/') {
        eprintln!("SKIPPED: libasan.so is not installed, so the kernels do not run under AddressSanitizer");
        return None;
    }
    let folder = library::build(&["--faults", "--sanitize"]);
    let mut child = Command::new(std::env::current_exe().expect("a test has a program"));
    child.args([test, "--exact", "--nocapture", "--test-threads=1"]);
    child.env("LD_PRELOAD", runtime).env(SANITIZED, folder);
    child.env("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0:handle_segv=1");
    if let Some(name) = wrong {
        child.env(WRONG, name);
    }
    Some(child.output().expect("the child runs"))
}

#[test]
fn right_kernels_are_right_under_the_sanitizers() {
    if std::env::var_os(SANITIZED).is_some() {
        return;
    }
    for test in ["right_kernels_are_right_in_every_mode", "collectives_do_what_cuda_says"] {
        let Some(output) = sanitized(test, None) else { return };
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{test}:\n{text}");
    }
}

#[test]
fn a_sanitizer_names_the_line() {
    if let Ok(name) = std::env::var(WRONG) {
        twice(&Device::next(), &name, 100, 0);
        return;
    }
    for name in ["twice_one_more", "twice_read_one_more", "twice_tail"] {
        let Some(output) = sanitized("a_sanitizer_names_the_line", Some(name)) else { return };
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{name} went unnoticed");
        assert!(text.contains("AddressSanitizer") && text.contains("memory.cu:"), "{name}:\n{text}");
    }
}
