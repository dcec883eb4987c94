//! Vectors of `f32`, whatever the processor: AVX-512 (16 lanes), AVX2 with FMA (8), portable (8).
//!
//! A kernel is written once, generic over [`Simd`], as an `#[inline(always)]` function whose first
//! argument is the token `s: S`. [`simd_dispatch!`](crate::simd_dispatch) wraps it into a plain
//! function that picks the instruction set at run time:
//!
//! ```
//! use boxwright::engine::simd::{self, Simd};
//!
//! #[inline(always)]
//! fn double_body<S: Simd>(s: S, x: &mut [f32]) {
//!     let two = s.splat(2.0);
//!     let mut i = 0;
//!     while i < x.len() {
//!         let n = S::LANES.min(x.len() - i);
//!         // SAFETY: lanes i..i + n lie in the slice.
//!         unsafe {
//!             let p = x.as_mut_ptr().add(i);
//!             s.store_partial(p, s.mul(two, s.load_partial(p, n)), n);
//!         }
//!         i += n;
//!     }
//! }
//! boxwright::simd_dispatch! {
//!     /// Doubles every element.
//!     fn double(x: &mut [f32]) = double_body;
//! }
//!
//! let mut x = vec![1.0; 37];
//! double(simd::level(), &mut x);
//! assert!(x.iter().all(|&v| v == 2.0));
//! ```
//!
//! A token exists only where its instructions do, so arithmetic through it is safe; only the
//! accesses to memory are `unsafe`. Closures inside a body are not always inlined and then lose the
//! instruction set: use loops and `#[inline(always)]` functions.

mod portable;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::OnceLock;

pub use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

/// A computation generic over the instruction set, for [`Simd::call`].
pub trait Kernel {
    /// What it returns.
    type Output;
    /// The computation. Must be `#[inline(always)]`.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// One instruction set: a zero-sized proof that the processor has it, and its operations.
///
/// `min` and `max` return the second operand when either is not a number.
pub trait Simd: Copy + Send + Sync + 'static {
    /// A vector of `LANES` floats.
    type F32: Copy;
    /// Floats in a vector.
    const LANES: usize;
    /// Vector registers that a kernel may keep busy.
    const REGISTERS: usize;

    /// Runs `kernel` in a function of its own, compiled for this instruction set, never inlined.
    fn call<K: Kernel>(self, kernel: K) -> K::Output;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F32;
    /// `LANES` floats from `p`, which need not be aligned.
    ///
    /// # Safety
    /// `p..p + LANES` is readable.
    unsafe fn load(self, p: *const f32) -> Self::F32;
    /// Writes `LANES` floats to `p`, which need not be aligned.
    ///
    /// # Safety
    /// `p..p + LANES` is writable.
    unsafe fn store(self, p: *mut f32, x: Self::F32);
    /// The first `n <= LANES` lanes from `p`, zero in the others; memory past them is not touched.
    ///
    /// # Safety
    /// `p..p + n` is readable.
    unsafe fn load_partial(self, p: *const f32, n: usize) -> Self::F32;
    /// Writes the first `n <= LANES` lanes to `p`; memory past them is not touched.
    ///
    /// # Safety
    /// `p..p + n` is writable.
    unsafe fn store_partial(self, p: *mut f32, x: Self::F32, n: usize);

    /// `a + b`.
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a - b`.
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b`.
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a / b`.
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, rounded once where the hardware can.
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// `c - a * b`, rounded once where the hardware can.
    fn fnma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// The smaller; `b` if either is not a number.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// The larger; `b` if either is not a number.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Square root.
    fn sqrt(self, a: Self::F32) -> Self::F32;
    /// Per lane: `if x > 0 { a } else { b }`.
    fn select_positive(self, x: Self::F32, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Nearest integer, ties to even; `|x| < 2^22`.
    fn round(self, x: Self::F32) -> Self::F32;
    /// `2^x` for integral `-126 <= x <= 127`.
    fn exp2_integral(self, x: Self::F32) -> Self::F32;
    /// Sum of the lanes, always in the same order.
    fn sum(self, x: Self::F32) -> f32;

    /// All lanes zero.
    #[inline(always)]
    fn zero(self) -> Self::F32 {
        self.splat(0.0)
    }

    /// `e^x`, relative error about 1e-7; saturates outside [-87.3, 88.3], not a number stays so.
    ///
    /// `x = n ln 2 + r`, `|r| <= ln 2 / 2`, and a polynomial in `r` (Cephes, `expf`).
    #[inline(always)]
    fn exp(self, x: Self::F32) -> Self::F32 {
        // This order of operands lets a NaN through.
        let x = self.min(self.splat(88.3), self.max(self.splat(-87.3), x));
        let n = self.round(self.mul(x, self.splat(std::f32::consts::LOG2_E)));
        let r = self.fnma(n, self.splat(0.693_359_4), x);
        let r = self.fnma(n, self.splat(-2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_1e-4);
        p = self.fma(p, r, self.splat(1.398_199_9e-3));
        p = self.fma(p, r, self.splat(8.333_452e-3));
        p = self.fma(p, r, self.splat(4.166_579_6e-2));
        p = self.fma(p, r, self.splat(1.666_666_5e-1));
        p = self.fma(p, r, self.splat(0.5));
        let y = self.fma(self.mul(r, r), p, self.add(r, self.splat(1.0)));
        self.mul(y, self.exp2_integral(n))
    }

    /// `1 / (1 + e^-x)`.
    #[inline(always)]
    fn sigmoid(self, x: Self::F32) -> Self::F32 {
        let one = self.splat(1.0);
        self.div(one, self.add(one, self.exp(self.sub(self.zero(), x))))
    }
}

/// An instruction set that this processor has.
#[derive(Clone, Copy, Debug)]
pub enum Level {
    /// AVX-512 F, BW, DQ, VL.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// Arrays of eight floats, which the compiler vectorises for its base target.
    Portable(Portable),
}

impl Level {
    /// Name as in `BOXWRIGHT_SIMD`.
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(_) => "avx2",
            Level::Portable(_) => "portable",
        }
    }

    /// Floats in a vector.
    pub fn lanes(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(_) => Avx512::LANES,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(_) => Avx2::LANES,
            Level::Portable(_) => Portable::LANES,
        }
    }

    /// Runs a kernel with this instruction set.
    #[inline]
    pub fn call<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(s) => s.call(kernel),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(s) => s.call(kernel),
            Level::Portable(s) => s.call(kernel),
        }
    }
}

/// Every level this processor has, widest first; `Portable` is always the last.
pub fn levels() -> impl Iterator<Item = Level> {
    #[cfg(target_arch = "x86_64")]
    let wide = [Avx512::detect().map(Level::Avx512), Avx2::detect().map(Level::Avx2)];
    #[cfg(not(target_arch = "x86_64"))]
    let wide = [None, None];
    wide.into_iter().flatten().chain([Level::Portable(Portable)])
}

/// The level in use: the widest, or the one named by the environment variable `BOXWRIGHT_SIMD`
/// (`avx512`, `avx2`, `portable`) if the processor has it. Found once.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let widest = levels().next().unwrap_or(Level::Portable(Portable));
        let Some(wish) = std::env::var_os("BOXWRIGHT_SIMD") else { return widest };
        match levels().find(|level| wish == level.name()) {
            Some(level) => level,
            None => {
                let used = widest.name();
                tracing::warn!(
                    ?wish,
                    used,
                    "BOXWRIGHT_SIMD names no level of this processor; one of avx512, avx2, portable"
                );
                widest
            }
        }
    })
}

/// Defines `fn name(level: Level, args..)` that runs `body(s, args..)` with the instruction set of
/// `level`. The body is an `#[inline(always)]` function generic over `S: Simd`.
#[macro_export]
macro_rules! simd_dispatch {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($life:lifetime),+>)?
        ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:path;)+) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$($life),+>)? (level: $crate::engine::simd::Level, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512 $(<$($life),+>)? (s: $crate::engine::simd::Avx512, $($arg: $ty),*) $(-> $ret)? {
                $body(s, $($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2 $(<$($life),+>)? (s: $crate::engine::simd::Avx2, $($arg: $ty),*) $(-> $ret)? {
                $body(s, $($arg),*)
            }
            match level {
                // SAFETY: the token exists only where the processor has these instructions.
                #[cfg(target_arch = "x86_64")]
                $crate::engine::simd::Level::Avx512(s) => unsafe { avx512(s, $($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::engine::simd::Level::Avx2(s) => unsafe { avx2(s, $($arg),*) },
                $crate::engine::simd::Level::Portable(s) => $body(s, $($arg),*),
            }
        }
    )+};
}
