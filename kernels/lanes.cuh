// V neighbouring channels of a pixel, V = 8 (16-byte accesses, aligned) or V = 1 (any alignment), and the walk over
// the pixels of a view that kernels of one thread per (pixel, channel group) share.
#pragma once
#include "common.cuh"

// As they lie in memory: loading and converting are two steps, so that several loads can be under way.
template <class T, i32 V> struct Lanes {  // V == 1
  T raw;
  __device__ __forceinline__ void load(const T* p) { raw = *p; }
  __device__ __forceinline__ void clear() { raw = from_f32<T>(0.0f); }
  __device__ __forceinline__ void get(float (&v)[V]) const { v[0] = to_f32(raw); }
  static __device__ __forceinline__ void put(T* p, const float (&v)[V]) { *p = from_f32<T>(v[0]); }
  static __device__ __forceinline__ void zero(T* p) { *p = from_f32<T>(0.0f); }
  __device__ __forceinline__ void store(T* p) const { *p = raw; }
};
template <class T> struct Lanes<T, 8> {
  uint4 raw;
  __device__ __forceinline__ void load(const T* p) { raw = *reinterpret_cast<const uint4*>(p); }
  __device__ __forceinline__ void clear() { raw = make_uint4(0, 0, 0, 0); }
  __device__ __forceinline__ void get(float (&v)[8]) const { unpack8<T>(raw, v); }
  static __device__ __forceinline__ void put(T* p, const float (&v)[8]) { store8(p, v); }
  static __device__ __forceinline__ void zero(T* p) { *reinterpret_cast<uint4*>(p) = make_uint4(0, 0, 0, 0); }
  __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<uint4*>(p) = raw; }
};
template <> struct Lanes<float, 8> {
  float4 low, high;
  __device__ __forceinline__ void load(const float* p) {
    low = *reinterpret_cast<const float4*>(p);
    high = *reinterpret_cast<const float4*>(p + 4);
  }
  __device__ __forceinline__ void clear() { low = high = make_float4(0.0f, 0.0f, 0.0f, 0.0f); }
  __device__ __forceinline__ void get(float (&v)[8]) const {
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  }
  static __device__ __forceinline__ void put(float* p, const float (&v)[8]) { store8(p, v); }
  static __device__ __forceinline__ void zero(float* p) {
    *reinterpret_cast<float4*>(p) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    *reinterpret_cast<float4*>(p + 4) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  __device__ __forceinline__ void store(float* p) const {
    *reinterpret_cast<float4*>(p) = low;
    *reinterpret_cast<float4*>(p + 4) = high;
  }
};

// How a block of 256 threads covers a map with its border: thread = slot * groups.divisor + lane, `lane` a group of
// V channels, `slot` a pixel of the step, so that each thread keeps its channels for all its pixels and neighbours
// in a warp touch neighbouring bytes. Rust twin: `engine::ops::lanes::Walk`. 64 bytes.
struct Walk {
  FastDivisor width, height;  // of the map with its border
  FastDivisor groups;         // channel groups of one block
  u32 pixels;                 // of all images, border included; below 2^31
  u32 pad;
  u32 slots;        // 256 / groups.divisor
  u32 group_count;  // all channel groups; blockIdx.y counts blocks of them
};
struct Place {
  u32 n;
  i32 y, x;
};
DEVI Place place(const Walk& w, u32 pixel) {
  u32 x, y;
  const u32 row = divide(w.width, pixel, x);
  const u32 n = divide(w.height, row, y);
  return Place{n, (i32)y - (i32)w.pad, (i32)x - (i32)w.pad};
}
// Whether a place of the walk lies inside a map of `h` by `w`, not in its border.
DEVI bool inside(const Place& p, const Tensor& t) { return (u32)p.y < t.h && (u32)p.x < t.w; }
// Slot and first channel of this thread; false if it has nothing to do.
template <i32 V> DEVI bool seat(const Walk& w, u32& slot, u32& channel) {
  u32 lane;
  slot = divide(w.groups, threadIdx.x, lane);
  const u32 group = blockIdx.y * w.groups.divisor + lane;
  channel = group * V;
  return slot < w.slots && group < w.group_count;
}
