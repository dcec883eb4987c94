//! AVX-512 and AVX2 with FMA.
//!
//! Every `unsafe` block around an intrinsic rests on one argument: the token that reaches it was
//! made by `detect`, so the processor has the instruction. Loads and stores add their caller's
//! promise about the memory.

use std::arch::x86_64::*;

use super::{Kernel, Simd};

/// Proof that the processor has AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy, Debug)]
pub struct Avx512(());

/// Proof that the processor has AVX2 and FMA.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

impl Avx512 {
    /// The token, if the processor and the operating system have the instructions.
    pub fn detect() -> Option<Avx512> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && Avx2::detect().is_some();
        has.then_some(Avx512(()))
    }
}

impl Avx2 {
    /// The token, if the processor and the operating system have the instructions.
    pub fn detect() -> Option<Avx2> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Avx2(()))
    }
}

#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn call_avx512<K: Kernel>(s: Avx512, kernel: K) -> K::Output {
    kernel.run(s)
}

#[inline(never)]
#[target_feature(enable = "avx2,fma")]
fn call_avx2<K: Kernel>(s: Avx2, kernel: K) -> K::Output {
    kernel.run(s)
}

/// An operation that is one intrinsic on values.
macro_rules! operations {
    ($($name:ident($($arg:ident),+) = $value:expr;)+) => {$(
        #[inline(always)]
        fn $name(self, $($arg: Self::F32),+) -> Self::F32 {
            // SAFETY: the token proves the instructions.
            unsafe { $value }
        }
    )+};
}

impl Simd for Avx512 {
    type F32 = __m512;
    const LANES: usize = 16;
    const REGISTERS: usize = 32;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token proves the instructions.
        unsafe { call_avx512(self, kernel) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        // SAFETY: the token proves the instructions.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F32 {
        // SAFETY: token and caller.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: Self::F32) {
        // SAFETY: token and caller.
        unsafe { _mm512_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn load_partial(self, p: *const f32, n: usize) -> Self::F32 {
        // SAFETY: token and caller; masked lanes are not accessed.
        unsafe { _mm512_maskz_loadu_ps(((1u32 << n) - 1) as __mmask16, p) }
    }
    #[inline(always)]
    unsafe fn store_partial(self, p: *mut f32, x: Self::F32, n: usize) {
        // SAFETY: token and caller; masked lanes are not accessed.
        unsafe { _mm512_mask_storeu_ps(p, ((1u32 << n) - 1) as __mmask16, x) }
    }
    operations! {
        add(a, b) = _mm512_add_ps(a, b);
        sub(a, b) = _mm512_sub_ps(a, b);
        mul(a, b) = _mm512_mul_ps(a, b);
        div(a, b) = _mm512_div_ps(a, b);
        fma(a, b, c) = _mm512_fmadd_ps(a, b, c);
        fnma(a, b, c) = _mm512_fnmadd_ps(a, b, c);
        min(a, b) = _mm512_min_ps(a, b);
        max(a, b) = _mm512_max_ps(a, b);
        sqrt(a) = _mm512_sqrt_ps(a);
        select_positive(x, a, b) =
            _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_setzero_ps()), b, a);
        round(x) = _mm512_roundscale_ps::<_MM_FROUND_TO_NEAREST_INT>(x);
        exp2_integral(x) = _mm512_scalef_ps(_mm512_set1_ps(1.0), x);
    }
    #[inline(always)]
    fn sum(self, x: Self::F32) -> f32 {
        // SAFETY: the token proves the instructions.
        let half = unsafe { _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x)) };
        Avx2(()).sum(half)
    }
}

/// `n` lanes of all ones, for masked moves.
#[inline(always)]
fn mask_avx2(n: usize) -> __m256i {
    const ONES_THEN_ZEROS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    assert!(n <= 8);
    // SAFETY: 8 - n + 8 <= 16; only Avx2 methods call this, so the instructions exist.
    unsafe { _mm256_loadu_si256(ONES_THEN_ZEROS.as_ptr().add(8 - n).cast()) }
}

impl Simd for Avx2 {
    type F32 = __m256;
    const LANES: usize = 8;
    const REGISTERS: usize = 16;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token proves the instructions.
        unsafe { call_avx2(self, kernel) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        // SAFETY: the token proves the instructions.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F32 {
        // SAFETY: token and caller.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: Self::F32) {
        // SAFETY: token and caller.
        unsafe { _mm256_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn load_partial(self, p: *const f32, n: usize) -> Self::F32 {
        // SAFETY: token and caller; masked lanes are not accessed.
        unsafe { _mm256_maskload_ps(p, mask_avx2(n)) }
    }
    #[inline(always)]
    unsafe fn store_partial(self, p: *mut f32, x: Self::F32, n: usize) {
        // SAFETY: token and caller; masked lanes are not accessed.
        unsafe { _mm256_maskstore_ps(p, mask_avx2(n), x) }
    }
    operations! {
        add(a, b) = _mm256_add_ps(a, b);
        sub(a, b) = _mm256_sub_ps(a, b);
        mul(a, b) = _mm256_mul_ps(a, b);
        div(a, b) = _mm256_div_ps(a, b);
        fma(a, b, c) = _mm256_fmadd_ps(a, b, c);
        fnma(a, b, c) = _mm256_fnmadd_ps(a, b, c);
        min(a, b) = _mm256_min_ps(a, b);
        max(a, b) = _mm256_max_ps(a, b);
        sqrt(a) = _mm256_sqrt_ps(a);
        select_positive(x, a, b) =
            _mm256_blendv_ps(b, a, _mm256_cmp_ps::<_CMP_GT_OQ>(x, _mm256_setzero_ps()));
        round(x) = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
        exp2_integral(x) = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
            _mm256_cvtps_epi32(x),
            _mm256_set1_epi32(127),
        )));
    }
    #[inline(always)]
    fn sum(self, x: Self::F32) -> f32 {
        // SAFETY: the token proves the instructions.
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
}
