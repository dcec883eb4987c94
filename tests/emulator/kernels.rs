//! The kernels in `faults/` with their references.

use half::{bf16, f16};

use super::library::Device;

/// Repeatable numbers in -1 to 1.
pub fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Arguments of the matrix products.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmArgs {
    pub a: u64,
    pub b: u64,
    pub c: u64,
    pub m: u32,
    pub n: u32,
    pub k: u32,
    pub reserved: u32,
}

/// Arguments of `reduce.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ReduceArgs {
    pub x: u64,
    pub partials: u64,
    pub counter: u64,
    pub out: u64,
    pub n: u64,
}

/// Arguments of `memory.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MapArgs {
    pub x: u64,
    pub out: u64,
    pub n: u64,
}

/// How a kernel that may be wrong was found out, or that it was not.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    /// Nothing was noticed.
    Right,
    /// The numbers are wrong.
    WrongNumbers,
    /// The launch failed, with this sentence.
    Failed(String),
}

/// Runs something on the device; whatever state a failure leaves is cleared.
pub fn judge(device: &Device, result: Result<bool, i32>) -> Outcome {
    let outcome = match result {
        Ok(true) => Outcome::Right,
        Ok(false) => Outcome::WrongNumbers,
        Err(_) => Outcome::Failed(device.failure()),
    };
    device.set("reset=1");
    outcome
}

fn close(got: f32, want: f64, magnitude: f64) -> bool {
    // Written so that NaN is not close.
    (f64::from(got) - want).abs() <= magnitude * 1e-5
}

/// Whether `c` with one guard row of NaN is the product of `a [m][k]` and `b [n][k]`.
pub fn is_product(
    c: &[f32],
    (m, n, k): (usize, usize, usize),
    term: impl Fn(usize, usize, usize) -> f64,
) -> bool {
    let right = (0..m * n).all(|at| {
        let terms = (0..k).map(|l| term(at / n, at % n, l));
        let (sum, magnitude) = terms.fold((0.0, 1e-3), |(s, a), t| (s + t, a + t.abs()));
        close(c[at], sum, magnitude)
    });
    right && c[m * n..].iter().all(|v| v.is_nan())
}

/// One 16-bit matrix product.
pub fn gemm(device: &Device, name: &str, (m, n, k): (usize, usize, usize)) -> Outcome {
    let round: fn(f32) -> (u16, f64) = if name.ends_with("f16") && !name.ends_with("bf16") {
        |v| (f16::from_f32(v).to_bits(), f16::from_f32(v).to_f64())
    } else {
        |v| (bf16::from_f32(v).to_bits(), bf16::from_f32(v).to_f64())
    };
    let (a_bits, a): (Vec<u16>, Vec<f64>) = numbers(1, m * k).into_iter().map(round).unzip();
    let (b_bits, b): (Vec<u16>, Vec<f64>) = numbers(2, n * k).into_iter().map(round).unzip();
    let (a_at, b_at) = (device.put(&a_bits), device.put(&b_bits));
    let c_at = device.allocate((m + 1) * n * 4).expect("there is memory");
    let args = GemmArgs { a: a_at, b: b_at, c: c_at, m: m as u32, n: n as u32, k: k as u32, reserved: 0 };
    let grid = [n.div_ceil(64) as u32, m.div_ceil(64) as u32];
    let pitch = if name == "gemm_bank_conflicts" { 32 } else { 40 };
    let shared = 2 * 3 * 64 * pitch * 2;
    let result = device.launch(device.kernel("gemm", name), (grid, 128, shared), &args);
    let result = result.and_then(|()| device.read::<f32>(c_at, (m + 1) * n));
    let outcome =
        judge(device, result.map(|c| is_product(&c, (m, n, k), |i, j, l| a[i * k + l] * b[j * k + l])));
    device.free_all(&[a_at, b_at, c_at]);
    outcome
}

/// One f32 matrix product with tiles in static shared memory.
pub fn tiled(device: &Device, name: &str, (m, n, k): (usize, usize, usize)) -> Outcome {
    let (a, b) = (numbers(3, m * k), numbers(4, k * n));
    let (a_at, b_at) = (device.put(&a), device.put(&b));
    let c_at = device.allocate((m + 1) * n * 4).expect("there is memory");
    let args = GemmArgs { a: a_at, b: b_at, c: c_at, m: m as u32, n: n as u32, k: k as u32, reserved: 0 };
    let grid = [n.div_ceil(16) as u32, m.div_ceil(16) as u32];
    let result = device.launch(device.kernel("tiled", name), (grid, 256, 0), &args);
    let result = result.and_then(|()| device.read::<f32>(c_at, (m + 1) * n));
    let term = |i: usize, j: usize, l: usize| f64::from(a[i * k + l]) * f64::from(b[l * n + j]);
    let outcome = judge(device, result.map(|c| is_product(&c, (m, n, k), term)));
    device.free_all(&[a_at, b_at, c_at]);
    outcome
}

/// The sum of `n` numbers, twice, so that a counter that was not reset shows; also the sum's bits.
pub fn reduce(device: &Device, name: &str, n: usize) -> (Outcome, u32) {
    let x = numbers(5, n);
    let blocks = n.div_ceil(512).min(40);
    let (x_at, counter) = (device.put(&x), device.put(&[0u32]));
    let partials = device.allocate(blocks * 4).expect("there is memory");
    let out = device.put(&[f32::NAN]);
    let args = ReduceArgs { x: x_at, partials, counter, out, n: n as u64 };
    let kernel = device.kernel("reduce", name);
    let mut bits = 0;
    let mut run = || {
        for _ in 0..2 {
            device.write(out, &[f32::NAN])?;
            device.launch(kernel, ([blocks as u32, 1], 256, 0), &args)?;
        }
        let sum = device.read::<f32>(out, 1)?[0];
        bits = sum.to_bits();
        let want: f64 = x.iter().map(|v| f64::from(*v)).sum();
        Ok(close(sum, want, x.iter().map(|v| f64::from(v.abs())).sum()))
    };
    let result = run();
    let outcome = judge(device, result);
    device.free_all(&[x_at, counter, partials, out]);
    (outcome, bits)
}

/// `out = 2 x` for `n` numbers, `blocks` of 128 threads.
pub fn twice(device: &Device, name: &str, n: usize, shared: u32) -> Outcome {
    let x = numbers(6, n);
    let x_at = device.put(&x);
    let out = device.allocate(n * 4).expect("there is memory");
    let args = MapArgs { x: x_at, out, n: n as u64 };
    let grid = [n.div_ceil(128) as u32, 1];
    let result = device.launch(device.kernel("memory", name), (grid, 128, shared), &args);
    let result = result.and_then(|()| device.read::<f32>(out, n));
    let right = |got: Vec<f32>| got.iter().zip(&x).all(|(got, x)| *got == 2.0 * x);
    let outcome = judge(device, result.map(right));
    device.free_all(&[x_at, out]);
    outcome
}
