//! Arrays of eight floats: correct everywhere, vectorised by the compiler for its base target.

use super::{Kernel, Simd};

/// The instruction set of the base target.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

/// `1.5 * 2^23`: adding it leaves the rounded integer in the low bits of the mantissa.
const ROUND: f32 = 12_582_912.0;

#[inline(always)]
fn map2(a: [f32; 8], b: [f32; 8], f: impl Fn(f32, f32) -> f32) -> [f32; 8] {
    let mut y = a;
    for i in 0..8 {
        y[i] = f(a[i], b[i]);
    }
    y
}

/// Fused where the base target has the instruction; elsewhere `f32::mul_add` is a slow library call.
#[inline(always)]
fn mul_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) { a.mul_add(b, c) } else { a * b + c }
}

impl Simd for Portable {
    type F32 = [f32; 8];
    const LANES: usize = 8;
    const REGISTERS: usize = 8;

    #[inline(never)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F32 {
        // SAFETY: the caller guarantees eight readable floats; arrays of f32 need no more alignment.
        unsafe { p.cast::<[f32; 8]>().read() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: Self::F32) {
        // SAFETY: the caller guarantees eight writable floats.
        unsafe { p.cast::<[f32; 8]>().write(x) }
    }
    #[inline(always)]
    unsafe fn load_partial(self, p: *const f32, n: usize) -> Self::F32 {
        if n >= 8 {
            // SAFETY: the caller guarantees eight readable floats.
            return unsafe { self.load(p) };
        }
        let mut x = [0.0; 8];
        // SAFETY: the caller guarantees n readable floats; at most eight are copied.
        unsafe { std::ptr::copy_nonoverlapping(p, x.as_mut_ptr(), n.min(8)) };
        x
    }
    #[inline(always)]
    unsafe fn store_partial(self, p: *mut f32, x: Self::F32, n: usize) {
        if n >= 8 {
            // SAFETY: the caller guarantees eight writable floats.
            return unsafe { self.store(p, x) };
        }
        // SAFETY: the caller guarantees n writable floats; at most eight are copied.
        unsafe { std::ptr::copy_nonoverlapping(x.as_ptr(), p, n.min(8)) };
    }
    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        let mut y = c;
        for i in 0..8 {
            y[i] = mul_add(a[i], b[i], c[i]);
        }
        y
    }
    #[inline(always)]
    fn fnma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        let mut y = c;
        for i in 0..8 {
            y[i] = mul_add(-a[i], b[i], c[i]);
        }
        y
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F32) -> Self::F32 {
        a.map(f32::sqrt)
    }
    #[inline(always)]
    fn select_positive(self, x: Self::F32, a: Self::F32, b: Self::F32) -> Self::F32 {
        let mut y = b;
        for i in 0..8 {
            y[i] = if x[i] > 0.0 { a[i] } else { b[i] };
        }
        y
    }
    #[inline(always)]
    fn round(self, x: Self::F32) -> Self::F32 {
        map2(x, x, |x, _| (x + ROUND) - ROUND)
    }
    #[inline(always)]
    fn exp2_integral(self, x: Self::F32) -> Self::F32 {
        map2(x, x, |x, _| f32::from_bits((x + ROUND).to_bits().wrapping_add(127) << 23))
    }
    #[inline(always)]
    fn sum(self, x: Self::F32) -> f32 {
        ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]))
    }
}
