// Maximum over k * k windows, and its gradient.
//
//  max_pool2d_forward   z = max over the window, positions outside the map left out; the first in row-major order
//                       wins ties, a NaN wins over everything. Keeps the position (ky * k + kx, one byte) if asked,
//                       and writes the zeros of z's border. Moves x and z once, one byte for each number.
//  max_pool2d_backward  dx (+)= sum of dz over the windows that chose the pixel: a gather, in row-major order of the
//                       windows, so nothing is added atomically. Moves dz, the bytes and dx.
//
// A thread takes eight channels of a pixel (16-byte accesses; one where views are not aligned). The k * k reads of a
// pixel are served by the L1 cache: windows of neighbouring pixels overlap, and a block's pixels are neighbours. Pools
// stand on the smallest map of the networks, so their time is small beside the convolutions'.
#include "lanes.cuh"

struct PoolArgs {
  Tensor x, z;  // backward: their gradients
  Walk walk;    // forward: over z with its border; backward: over x
  u64 indices;  // u8, dense [n, h, w, c] as z; 0: not kept
  u32 kernel, stride, pad, accumulate;
};

// One byte for each of V channels.
template <i32 V> struct PoolBytes {
  uint2 raw;
  __device__ __forceinline__ void load(const u8* p) { raw = *reinterpret_cast<const uint2*>(p); }
  __device__ __forceinline__ u32 get(i32 k) const { return ((k < 4 ? raw.x : raw.y) >> (8 * (k & 3))) & 0xffu; }
  static __device__ __forceinline__ void put(u8* p, const u32 (&v)[8]) {
    *reinterpret_cast<uint2*>(p) = make_uint2(v[0] | v[1] << 8 | v[2] << 16 | v[3] << 24,
                                              v[4] | v[5] << 8 | v[6] << 16 | v[7] << 24);
  }
};
template <> struct PoolBytes<1> {
  u32 raw;
  __device__ __forceinline__ void load(const u8* p) { raw = *p; }
  __device__ __forceinline__ u32 get(i32) const { return raw; }
  static __device__ __forceinline__ void put(u8* p, const u32 (&v)[1]) { *p = (u8)v[0]; }
};

template <class T, i32 V> DEVI void max_pool2d_forward(const PoolArgs& a) {
  u32 slot, channel;
  if (!seat<V>(a.walk, slot, channel)) return;
  for (u32 pixel = blockIdx.x * a.walk.slots + slot; pixel < a.walk.pixels; pixel += gridDim.x * a.walk.slots) {
    const Place p = place(a.walk, pixel);
    T* z = at<T>(a.z, p.n, p.y, p.x) + channel;
    if (!inside(p, a.z)) {
      Lanes<T, V>::zero(z);
      continue;
    }
    const i32 top = p.y * (i32)a.stride - (i32)a.pad, left = p.x * (i32)a.stride - (i32)a.pad;
    const u32 y0 = top < 0 ? (u32)-top : 0, x0 = left < 0 ? (u32)-left : 0;
    const u32 y1 = min(a.kernel, (u32)((i32)a.x.h - top)), x1 = min(a.kernel, (u32)((i32)a.x.w - left));
    float best[V];
    u32 position[V];
#pragma unroll
    for (i32 k = 0; k < V; ++k) best[k] = __uint_as_float(0xff800000u), position[k] = y0 * a.kernel + x0;
    for (u32 ky = y0; ky < y1; ++ky) {
      for (u32 kx = x0; kx < x1; ++kx) {
        Lanes<T, V> x;
        float v[V];
        x.load(at<T>(a.x, p.n, top + (i32)ky, left + (i32)kx) + channel);
        x.get(v);
#pragma unroll
        for (i32 k = 0; k < V; ++k) {
          if (v[k] > best[k] || v[k] != v[k]) best[k] = v[k], position[k] = ky * a.kernel + kx;
        }
      }
    }
    Lanes<T, V>::put(z, best);
    if (a.indices != 0) {
      const u64 dense = ((u64)p.n * a.z.h + (u32)p.y) * a.z.w + (u32)p.x;
      PoolBytes<V>::put(reinterpret_cast<u8*>(a.indices) + dense * a.z.c + channel, position);
    }
  }
}

template <class T, i32 V> DEVI void max_pool2d_backward(const PoolArgs& a) {
  u32 slot, channel;
  if (!seat<V>(a.walk, slot, channel)) return;
  for (u32 pixel = blockIdx.x * a.walk.slots + slot; pixel < a.walk.pixels; pixel += gridDim.x * a.walk.slots) {
    const Place p = place(a.walk, pixel);
    T* dx = at<T>(a.x, p.n, p.y, p.x) + channel;
    // Windows that cover this pixel: from the first whose end reaches it to the last that begins at or before it.
    const u32 y = (u32)p.y + a.pad, x = (u32)p.x + a.pad;
    const u32 y0 = y < a.kernel ? 0 : (y - a.kernel) / a.stride + 1, y1 = min(a.z.h, y / a.stride + 1);
    const u32 x0 = x < a.kernel ? 0 : (x - a.kernel) / a.stride + 1, x1 = min(a.z.w, x / a.stride + 1);
    Lanes<T, V> old;
    float sum[V];
    old.clear();
    if (a.accumulate != 0) old.load(dx);
    old.get(sum);
    for (u32 oy = y0; oy < y1; ++oy) {
      for (u32 ox = x0; ox < x1; ++ox) {
        const u32 tap = (y - oy * a.stride) * a.kernel + (x - ox * a.stride);
        const u64 dense = ((u64)p.n * a.z.h + oy) * a.z.w + ox;
        PoolBytes<V> chosen;
        chosen.load(reinterpret_cast<const u8*>(a.indices) + dense * a.z.c + channel);
        Lanes<T, V> dz;
        float d[V];
        dz.load(at<T>(a.z, p.n, (i32)oy, (i32)ox) + channel);
        dz.get(d);
#pragma unroll
        for (i32 k = 0; k < V; ++k) {
          if (chosen.get(k) == tap) sum[k] += d[k];
        }
      }
    }
    Lanes<T, V>::put(dx, sum);
  }
}

#define KERNELS(T, V, SUFFIX)                                                            \
  KERNEL(max_pool2d_forward_##SUFFIX, PoolArgs, 256) { max_pool2d_forward<T, V>(args); } \
  KERNEL(max_pool2d_backward_##SUFFIX, PoolArgs, 256) { max_pool2d_backward<T, V>(args); }

KERNELS(float, 8, f32)
KERNELS(float, 1, scalar_f32)
KERNELS(bf16, 8, bf16)
KERNELS(bf16, 1, scalar_bf16)
KERNELS(f16, 8, f16)
KERNELS(f16, 1, scalar_f16)
