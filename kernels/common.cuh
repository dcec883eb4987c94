// What every kernel file includes first: number types, views of device memory, vector loads, exact division.
//
// The same files are compiled three ways: by NVRTC for a chip (no NVIDIA header is used), by NVRTC for all chips
// in the tests, and as C++ against the emulator (`tests/emulator/`), where one CUDA thread is one fiber. Rules that
// keep this possible:
//  * inline PTX stands in `ptx.cuh` and, for Hopper alone, `ptx_sm90.cuh`;
//  * a kernel is written `KERNEL(name, Args, threads) { ... }` and takes one plain struct, `args`, whose Rust twin
//    lies in the operation's `cuda.rs`; fields are 4 or 8 bytes wide and ordered so that nothing is padded;
//  * dynamic shared memory only through `DYN_SMEM`, static shared memory as plain arrays without initialiser;
//  * warp collectives name their mask and every named lane reaches them; `__syncwarp()` where lanes exchange data
//    through memory; nobody waits for another block, except that the last block to arrive may finish the work;
//  * sums have an order that depends on the shape alone; there is no floating-point atomic.
#pragma once

#if defined(BOXWRIGHT_EMULATOR)
#include "emulator.h"
#else
typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;
#define DEVI static __device__ __forceinline__
// A kernel with its block size; `KERNEL_RESIDENT` also promises how many blocks share a multiprocessor.
#define KERNEL(name, Args, threads) \
  extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Args args)
#define KERNEL_RESIDENT(name, Args, threads, blocks) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Args args)
// Dynamic shared memory as bytes, aligned to 1024.
#define DYN_SMEM(name) extern __shared__ __align__(1024) u8 name[]
#endif

// 16-bit floating-point numbers; arithmetic is done in f32.
struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

#include "ptx.cuh"

// ---- numbers of the storage type T: float, bf16 or f16 ---------------------------------------------------------

DEVI float to_f32(float v) { return v; }
DEVI float to_f32(bf16 v) { return __uint_as_float((u32)v.bits << 16); }
DEVI float to_f32(f16 v) { return f16_to_f32(v.bits); }

template <class T> struct Convert;
template <> struct Convert<float> {
  static __device__ __forceinline__ float from(float v) { return v; }
};
template <> struct Convert<bf16> {
  static __device__ __forceinline__ bf16 from(float v) { return bf16{f32_to_bf16(v)}; }
};
template <> struct Convert<f16> {
  static __device__ __forceinline__ f16 from(float v) { return f16{f32_to_f16(v)}; }
};
// Rounds to nearest, ties to even.
template <class T> DEVI T from_f32(float v) { return Convert<T>::from(v); }
// The value that reading back would give.
template <class T> DEVI float rounded(float v) { return to_f32(Convert<T>::from(v)); }

// Two numbers as one word, the first in the low half.
template <class T> struct Pair;
template <> struct Pair<bf16> {
  static __device__ __forceinline__ u32 pack(float low, float high) { return f32x2_to_bf16x2(low, high); }
  static __device__ __forceinline__ float low(u32 v) { return __uint_as_float(v << 16); }
  static __device__ __forceinline__ float high(u32 v) { return __uint_as_float(v & 0xffff0000u); }
};
template <> struct Pair<f16> {
  static __device__ __forceinline__ u32 pack(float low, float high) { return f32x2_to_f16x2(low, high); }
  static __device__ __forceinline__ float low(u32 v) { return f16_to_f32((u16)(v & 0xffffu)); }
  static __device__ __forceinline__ float high(u32 v) { return f16_to_f32((u16)(v >> 16)); }
};

// ---- eight numbers at a time; the address is aligned to 16 bytes ------------------------------------------------

DEVI void load8(const float* p, float (&v)[8]) {
  const float4 a = *reinterpret_cast<const float4*>(p);
  const float4 b = *reinterpret_cast<const float4*>(p + 4);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
  v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
template <class T> DEVI void unpack8(const uint4 q, float (&v)[8]) {
  v[0] = Pair<T>::low(q.x), v[1] = Pair<T>::high(q.x), v[2] = Pair<T>::low(q.y), v[3] = Pair<T>::high(q.y);
  v[4] = Pair<T>::low(q.z), v[5] = Pair<T>::high(q.z), v[6] = Pair<T>::low(q.w), v[7] = Pair<T>::high(q.w);
}
DEVI void load8(const bf16* p, float (&v)[8]) { unpack8<bf16>(*reinterpret_cast<const uint4*>(p), v); }
DEVI void load8(const f16* p, float (&v)[8]) { unpack8<f16>(*reinterpret_cast<const uint4*>(p), v); }

DEVI void store8(float* p, const float (&v)[8]) {
  *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
  *reinterpret_cast<float4*>(p + 4) = make_float4(v[4], v[5], v[6], v[7]);
}
template <class T> DEVI uint4 pack8(const float (&v)[8]) {
  return make_uint4(Pair<T>::pack(v[0], v[1]), Pair<T>::pack(v[2], v[3]), Pair<T>::pack(v[4], v[5]),
                    Pair<T>::pack(v[6], v[7]));
}
DEVI void store8(bf16* p, const float (&v)[8]) { *reinterpret_cast<uint4*>(p) = pack8<bf16>(v); }
DEVI void store8(f16* p, const float (&v)[8]) { *reinterpret_cast<uint4*>(p) = pack8<f16>(v); }

// ---- views ------------------------------------------------------------------------------------------------------

// A view `[n, h, w, c]` of device memory; Rust twin: `engine::device::cuda::Tensor`. Pitches count elements.
// `data` is the address of element (0, 0, 0, 0); `pad` zero pixels lie around each image, at negative coordinates
// and past the end. 48 bytes.
struct Tensor {
  u64 data;
  u64 image_pitch;
  u32 n, h, w, c;
  u32 pixel_pitch, row_pitch;
  u32 pad, reserved;
};

// Address of element (n, y, x, 0); y and x may reach `pad` pixels outside.
template <class T> DEVI T* at(const Tensor& t, u32 n, i32 y, i32 x) {
  return reinterpret_cast<T*>(t.data) + (i64)n * (i64)t.image_pitch + (i64)y * (i64)t.row_pitch +
         (i64)x * (i64)t.pixel_pitch;
}

// ---- exact division by a number known to the host ---------------------------------------------------------------

// Division of numbers below 2^31 by `divisor`; Rust twin: `engine::device::cuda::FastDivisor`. 16 bytes.
struct FastDivisor {
  u32 divisor, multiplier, shift, reserved;
};
// Quotient; `rest` is set to the remainder.
DEVI u32 divide(const FastDivisor& d, u32 v, u32& rest) {
  const u32 q = d.divisor == 1 ? v : __umulhi(v, d.multiplier) >> d.shift;
  rest = v - q * d.divisor;
  return q;
}

// ---- reductions in a fixed order --------------------------------------------------------------------------------

// Sum over the 32 lanes of a full warp; every lane gets it.
template <class N> DEVI N warp_sum(N v) {
#pragma unroll
  for (i32 offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}
DEVI float warp_max(float v) {
#pragma unroll
  for (i32 offset = 16; offset > 0; offset >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

// ---- activations: 0 identity, 1 SiLU, 2 ReLU; as `engine::activation::Activation` ---------------------------------

DEVI float sigmoid(float u) { return 1.0f / (1.0f + expf(-u)); }
struct Activation {
  static constexpr u32 identity = 0, silu = 1, relu = 2;
};
DEVI float activate(u32 kind, float u) {
  if (kind == Activation::silu) return u * sigmoid(u);
  return kind == Activation::relu ? (u > 0.0f ? u : 0.0f * u) : u;  // `0 * u` keeps NaN
}
DEVI float activate_derivative(u32 kind, float u) {
  if (kind == Activation::silu) {
    const float s = sigmoid(u);
    return s * (1.0f + u * (1.0f - s));
  }
  return kind == Activation::relu ? (u > 0.0f ? 1.0f : 0.0f) : 1.0f;
}
