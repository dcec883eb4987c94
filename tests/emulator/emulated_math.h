// CUDA's functions on numbers and on memory, for `emulator.h`. Functions that CUDA computes approximately are exact
// here, so results may differ from a GPU's in the last bits.
#pragma once

// ---- bits --------------------------------------------------------------------------------------------------------

template <class To, class From> static inline To emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
static inline u32 __float_as_uint(float v) { return emulated_bits<u32>(v); }
static inline i32 __float_as_int(float v) { return emulated_bits<i32>(v); }
static inline float __uint_as_float(u32 v) { return emulated_bits<float>(v); }
static inline float __int_as_float(i32 v) { return emulated_bits<float>(v); }
static inline i64 __double_as_longlong(double v) { return emulated_bits<i64>(v); }
static inline double __longlong_as_double(i64 v) { return emulated_bits<double>(v); }

static inline i32 __popc(u32 v) { return __builtin_popcount(v); }
static inline i32 __popcll(u64 v) { return __builtin_popcountll(v); }
static inline i32 __ffs(i32 v) { return __builtin_ffs(v); }
static inline i32 __ffsll(i64 v) { return __builtin_ffsll(v); }
static inline i32 __clz(i32 v) { return v ? __builtin_clz((u32)v) : 32; }
static inline i32 __clzll(i64 v) { return v ? __builtin_clzll((u64)v) : 64; }
static inline u32 __brev(u32 v) {
  u32 reversed = 0;
  for (u32 i = 0; i < 32; ++i) reversed |= (v >> i & 1u) << (31 - i);
  return reversed;
}
static inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
  const u64 bytes = (u64)b << 32 | a;
  u32 result = 0;
  for (u32 i = 0; i < 4; ++i) result |= (u32)(bytes >> (8 * (selector >> (4 * i) & 7u)) & 0xffu) << (8 * i);
  return result;
}
static inline u32 __funnelshift_l(u32 low, u32 high, u32 by) {
  return (u32)((((u64)high << 32 | low) << (by & 31)) >> 32);
}
static inline u32 __funnelshift_r(u32 low, u32 high, u32 by) { return (u32)(((u64)high << 32 | low) >> (by & 31)); }
static inline u32 __umulhi(u32 a, u32 b) { return (u32)(((u64)a * b) >> 32); }
static inline i32 __mulhi(i32 a, i32 b) { return (i32)(((i64)a * b) >> 32); }
static inline u64 __umul64hi(u64 a, u64 b) { return (u64)(((unsigned __int128)a * b) >> 64); }

// ---- numbers -----------------------------------------------------------------------------------------------------

// Macros, since the C library declares some of these names for itself.
static inline float emulated_rsqrt(float v) { return 1.0f / sqrtf(v); }
static inline double emulated_rsqrt(double v) { return 1.0 / sqrt(v); }
#define rsqrtf(v) emulated_rsqrt((float)(v))
#define rsqrt(v) emulated_rsqrt((double)(v))
#define __expf(v) expf(v)
#define __logf(v) logf(v)
#define __log2f(v) log2f(v)
#define __cosf(v) cosf(v)
#define __sinf(v) sinf(v)
#define __powf(a, b) powf(a, b)
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float v) { return 1.0f / v; }
static inline float __fsqrt_rn(float v) { return sqrtf(v); }
static inline float __frsqrt_rn(float v) { return 1.0f / sqrtf(v); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline float __saturatef(float v) { return v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f; }

// Conversions clamp, and NaN becomes zero, as on the chip.
template <class N> static inline N emulated_clamp(double v) {
  if (v != v) return 0;
  const double low = (double)(sizeof(N) == 4 ? (N(-1) < 0 ? -2147483648.0 : 0.0) : -9223372036854775808.0);
  const double high = sizeof(N) == 4 ? (N(-1) < 0 ? 2147483647.0 : 4294967295.0) : 9223372036854774784.0;
  return (N)(v < low ? low : v > high ? high : v);
}
static inline i32 __float2int_rn(float v) { return emulated_clamp<i32>(rint((double)v)); }
static inline i32 __float2int_rd(float v) { return emulated_clamp<i32>(floor((double)v)); }
static inline i32 __float2int_ru(float v) { return emulated_clamp<i32>(ceil((double)v)); }
static inline i32 __float2int_rz(float v) { return emulated_clamp<i32>(trunc((double)v)); }
static inline u32 __float2uint_rn(float v) { return emulated_clamp<u32>(rint((double)v)); }
static inline u32 __float2uint_rz(float v) { return emulated_clamp<u32>(trunc((double)v)); }
static inline float __int2float_rn(i32 v) { return (float)v; }
static inline float __uint2float_rn(u32 v) { return (float)v; }
static inline float __double2float_rn(double v) { return (float)v; }

#define EMULATED_MINMAX(N)                                        \
  static inline N min(N a, N b) { return b < a ? b : a; }         \
  static inline N max(N a, N b) { return a < b ? b : a; }
EMULATED_MINMAX(i32)
EMULATED_MINMAX(u32)
EMULATED_MINMAX(i64)
EMULATED_MINMAX(u64)
#undef EMULATED_MINMAX
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
static inline u32 min(i32 a, u32 b) { return min((u32)a, b); }
static inline u32 min(u32 a, i32 b) { return min(a, (u32)b); }
static inline u32 max(i32 a, u32 b) { return max((u32)a, b); }
static inline u32 max(u32 a, i32 b) { return max(a, (u32)b); }

// ---- memory ------------------------------------------------------------------------------------------------------

// Hints about caches mean nothing here.
template <class T> static inline T __ldg(const T* p) { return *p; }
template <class T> static inline T __ldcg(const T* p) { return *p; }
template <class T> static inline T __ldca(const T* p) { return *p; }
template <class T> static inline T __ldcs(const T* p) { return *p; }
template <class T> static inline T __ldlu(const T* p) { return *p; }
template <class T> static inline T __ldcv(const T* p) { return *p; }
template <class T> static inline void __stcg(T* p, T v) { *p = v; }
template <class T> static inline void __stcs(T* p, T v) { *p = v; }
template <class T> static inline void __stwb(T* p, T v) { *p = v; }
template <class T> static inline void __stwt(T* p, T v) { *p = v; }

static inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// Blocks may run on several threads of the operating system, so these are real atomics. There is none on floating-
// point numbers: their result would depend on the order.
template <class N, class F> static inline N emulated_atomic(N* p, F next) {
  N old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, next(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
#define EMULATED_ATOMICS(N)                                                                                     \
  static inline N atomicAdd(N* p, N v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }                   \
  static inline N atomicExch(N* p, N v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }                 \
  static inline N atomicOr(N* p, N v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }                     \
  static inline N atomicAnd(N* p, N v) { return __atomic_fetch_and(p, v, __ATOMIC_RELAXED); }                   \
  static inline N atomicXor(N* p, N v) { return __atomic_fetch_xor(p, v, __ATOMIC_RELAXED); }                   \
  static inline N atomicMax(N* p, N v) { return emulated_atomic(p, [v](N o) { return o < v ? v : o; }); }       \
  static inline N atomicMin(N* p, N v) { return emulated_atomic(p, [v](N o) { return v < o ? v : o; }); }       \
  static inline N atomicCAS(N* p, N expected, N v) {                                                            \
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);                    \
    return expected;                                                                                            \
  }
EMULATED_ATOMICS(i32)
EMULATED_ATOMICS(u32)
EMULATED_ATOMICS(u64)
#undef EMULATED_ATOMICS
static inline i32 atomicSub(i32* p, i32 v) { return __atomic_fetch_sub(p, v, __ATOMIC_RELAXED); }
static inline u32 atomicSub(u32* p, u32 v) { return __atomic_fetch_sub(p, v, __ATOMIC_RELAXED); }
static inline u32 atomicInc(u32* p, u32 last) {
  return emulated_atomic(p, [last](u32 old) { return old >= last ? 0u : old + 1; });
}
static inline u32 atomicDec(u32* p, u32 last) {
  return emulated_atomic(p, [last](u32 old) { return old == 0 || old > last ? last : old - 1; });
}
