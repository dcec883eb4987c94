//! Host side of the device: divisors, cache, errors, copies, capture.

use super::testing::devices;
use super::*;
use crate::engine::rng::{Rng, Use};
use proptest::prelude::*;

proptest! {
    #[test]
    fn division_by_multiplication_is_exact(divisor in 1u32..1 << 31, v in 0u32..1 << 31) {
        prop_assert_eq!(FastDivisor::new(divisor).divide(v), v / divisor);
    }

    #[test]
    fn division_is_exact_around_multiples(divisor in 1u32..40_000, quotient in 0u32..50_000) {
        let fast = FastDivisor::new(divisor);
        let product = u64::from(divisor) * u64::from(quotient);
        for v in [product.saturating_sub(1), product, product + 1] {
            if v < 1 << 31 {
                prop_assert_eq!(fast.divide(v as u32), v as u32 / divisor);
            }
        }
    }
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct CastArgs {
    values: u64,
    out: u64,
    count: u64,
}

#[test]
fn cast_rounds_to_nearest_even() {
    for device in devices() {
        let stream = device.stream().expect("a stream");
        let module = device.module("cast").expect("it compiles");
        let mut rng = Rng::new(1, Use::Test, 0, 0);
        let count = 4096 + 16;
        let values: Vec<f32> = (0..count).map(|_| rng.normal() as f32 * 10.0).collect();
        let from = device.allocate(count * 4).expect("memory");
        let to = device.allocate(count * 2).expect("memory");
        stream.upload(&from, 0, &values).expect("a copy");
        let args = CastArgs { values: from.pointer(), out: to.pointer(), count: count as u64 };
        let launch = Launch::cover(count as u64 / 8, 256);
        let mut bf16 = vec![half::bf16::ZERO; count];
        // SAFETY: both buffers have `count` numbers and outlive the copy back, which waits.
        unsafe { stream.launch(&module.kernel("cast_bf16").expect("it exists"), launch, &args) }
            .expect("a launch");
        stream.download(&to, 0, &mut bf16).expect("a copy");
        assert!(values.iter().zip(&bf16).all(|(v, r)| half::bf16::from_f32(*v) == *r));
        let mut f16 = vec![half::f16::ZERO; count];
        // SAFETY: as above.
        unsafe { stream.launch(&module.kernel("cast_f16").expect("it exists"), launch, &args) }
            .expect("a launch");
        stream.download(&to, 0, &mut f16).expect("a copy");
        assert!(values.iter().zip(&f16).all(|(v, r)| half::f16::from_f32(*v) == *r));
    }
}

#[test]
fn a_captured_piece_runs_again_and_again() {
    for device in devices() {
        let stream = device.stream().expect("a stream");
        let module = device.module("cast").expect("it compiles");
        let kernel = module.kernel("cast_bf16").expect("it exists");
        let (from, to) = (device.allocate(64 * 4).expect("memory"), device.allocate(64 * 2).expect("memory"));
        let args = CastArgs { values: from.pointer(), out: to.pointer(), count: 64 };
        // SAFETY: both buffers have 64 numbers and live to the end of the test.
        let graph =
            stream.capture(|s| unsafe { s.launch(&kernel, Launch::row(1, 256), &args) }).expect("a graph");
        for value in [1.5f32, -3.0] {
            stream.upload(&from, 0, &[value; 64]).expect("a copy");
            // SAFETY: as above.
            unsafe { stream.run(&graph) }.expect("it runs");
            let mut out = [half::bf16::ZERO; 64];
            stream.download(&to, 0, &mut out).expect("a copy");
            assert!(out.iter().all(|v| v.to_f32() == value));
        }
    }
}

#[test]
fn faults_of_the_host_are_named() {
    for device in devices() {
        let stream = device.stream().expect("a stream");
        let module = device.module("cast").expect("it compiles");
        let error = module.kernel("cast_f8").err().expect("there is none").to_string();
        assert!(error.contains("cast.cu") && error.contains("cast_f8"), "{error}");
        let kernel = module.kernel("cast_bf16").expect("it exists");
        // SAFETY: refused before anything runs.
        let error =
            unsafe { stream.launch(&kernel, Launch::row(1, 256), &[0u64; 2]) }.expect_err("too short");
        assert!(matches!(error, DeviceError::Arguments { expected: 24, got: 16, .. }), "{error}");
        let memory = device.memory().expect("the device answers");
        let error = device.allocate(memory.total_bytes as usize + 1).err().expect("more than there is");
        assert!(error.is_out_of_memory() && error.to_string().contains("free"), "{error}");
    }
}

#[test]
fn a_damaged_cache_entry_is_made_anew() {
    devices();
    let folder = tempfile::tempdir().expect("a folder");
    let source = sources::find("cast").expect("it is there");
    let load = || cache::load(folder.path(), source, "sm_90a").expect("it compiles");
    let (code, origin) = load();
    assert_eq!(origin, cache::Origin::Compiled);
    assert_eq!(load(), (code.clone(), cache::Origin::Cached));
    let file =
        std::fs::read_dir(folder.path()).expect("made").next().expect("one file").expect("readable").path();
    let good = std::fs::read(&file).expect("readable");
    let mut flipped = good.clone();
    *flipped.last_mut().expect("not empty") ^= 1;
    for bad in [&good[..good.len() / 2], &good[..20], b"", &flipped] {
        std::fs::write(&file, bad).expect("writable");
        assert_eq!(load(), (code.clone(), cache::Origin::Repaired));
        assert_eq!(load().1, cache::Origin::Cached);
    }
}

/// Whatever looks for a compiler first, and whichever the environment names (CI names NVIDIA's).
#[test]
fn the_compiler_of_these_tests_is_that_of_their_device() {
    let folder = libraries::nvrtc().expect("a compiler").folder;
    if let Some(emulator) = testing::compiler_folder() {
        assert_eq!(folder.as_deref(), Some(emulator));
    }
}

#[test]
fn cached_code_that_the_driver_refuses_is_made_anew() {
    use sha2::{Digest, Sha256};
    let source = sources::find("cast").expect("it is there");
    for device in devices() {
        let folder = tempfile::tempdir().expect("a folder");
        let load = || Module::load_from(folder.path(), &device, source).expect("it loads").origin();
        assert_eq!((load(), load()), (cache::Origin::Compiled, cache::Origin::Cached));
        let file = std::fs::read_dir(folder.path()).expect("made").next().expect("one file");
        // Whole, with a good checksum, and no code of this driver: another one wrote it.
        let foreign = b"the code of another driver".as_slice();
        let whole = [b"BXWKRN01".as_slice(), Sha256::digest(foreign).as_slice(), foreign].concat();
        std::fs::write(file.expect("readable").path(), whole).expect("writable");
        assert_eq!((load(), load()), (cache::Origin::Repaired, cache::Origin::Cached));
    }
}
