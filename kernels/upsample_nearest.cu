// Nearest-neighbour enlargement by a whole factor, and its gradient.
//
//  upsample_nearest_forward   z[y, x] = x[y / f, x / f], and the zeros of z's border: reads x (each pixel f * f times,
//                             from the cache after the first), writes z.
//  upsample_nearest_backward  dx (+)= sum of dz over the f * f copies, row by row: reads dz, writes dx.
//
// A thread takes eight channels of a pixel (one where views are not aligned); bound by memory: every byte of x and z
// once.
#include "lanes.cuh"

struct UpsampleArgs {
  Tensor x, z;  // backward: their gradients
  Walk walk;    // forward: over z with its border; backward: over x
  FastDivisor factor;
  u32 accumulate, reserved;
};

template <class T, i32 V> DEVI void upsample_nearest_forward(const UpsampleArgs& a) {
  u32 slot, channel;
  if (!seat<V>(a.walk, slot, channel)) return;
  for (u32 pixel = blockIdx.x * a.walk.slots + slot; pixel < a.walk.pixels; pixel += gridDim.x * a.walk.slots) {
    const Place p = place(a.walk, pixel);
    Lanes<T, V> v;
    v.clear();
    if (inside(p, a.z)) {
      u32 rest;
      const i32 y = (i32)divide(a.factor, (u32)p.y, rest), x = (i32)divide(a.factor, (u32)p.x, rest);
      v.load(at<T>(a.x, p.n, y, x) + channel);
    }
    v.store(at<T>(a.z, p.n, p.y, p.x) + channel);
  }
}

template <class T, i32 V> DEVI void upsample_nearest_backward(const UpsampleArgs& a) {
  u32 slot, channel;
  if (!seat<V>(a.walk, slot, channel)) return;
  const i32 factor = (i32)a.factor.divisor;
  for (u32 pixel = blockIdx.x * a.walk.slots + slot; pixel < a.walk.pixels; pixel += gridDim.x * a.walk.slots) {
    const Place p = place(a.walk, pixel);
    T* dx = at<T>(a.x, p.n, p.y, p.x) + channel;
    Lanes<T, V> v;
    float sum[V];
    v.clear();
    if (a.accumulate != 0) v.load(dx);
    v.get(sum);
    for (i32 i = 0; i < factor; ++i) {
      for (i32 j = 0; j < factor; ++j) {
        float d[V];
        v.load(at<T>(a.z, p.n, p.y * factor + i, p.x * factor + j) + channel);
        v.get(d);
#pragma unroll
        for (i32 k = 0; k < V; ++k) sum[k] += d[k];
      }
    }
    Lanes<T, V>::put(dx, sum);
  }
}

#define KERNELS(T, V, SUFFIX)                                                                            \
  KERNEL(upsample_nearest_forward_##SUFFIX, UpsampleArgs, 256) { upsample_nearest_forward<T, V>(args); } \
  KERNEL(upsample_nearest_backward_##SUFFIX, UpsampleArgs, 256) { upsample_nearest_backward<T, V>(args); }

KERNELS(float, 8, f32)
KERNELS(float, 1, scalar_f32)
KERNELS(bf16, 8, bf16)
KERNELS(bf16, 1, scalar_bf16)
KERNELS(f16, 8, f16)
KERNELS(f16, 1, scalar_f16)
