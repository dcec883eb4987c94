// Zeros: the border around a padded map, and the inside of a view. Writes each byte once, bound by memory; a view's own
// channels only, since other channels of the buffer belong to others.
//
//  border_zero         one thread for each border pixel and group of channels: the rows above and below first, then
//                      the columns at the sides, so no thread looks at a pixel inside.
//  border_zero_inside  one thread for each pixel and group of channels, in steps (lanes.cuh).
#include "lanes.cuh"

struct BorderArgs {
  Tensor z;
  FastDivisor groups;  // of V channels
  FastDivisor per_image, row, sides;  // border pixels of an image, of a row with its border, of the two sides of a row
  u32 count, reserved[3];             // threads
};

template <class T, i32 V> DEVI void border_zero(const BorderArgs& a) {
  const u32 thread = blockIdx.x * 256 + threadIdx.x;
  if (thread >= a.count) return;
  u32 group, rest, x, y;
  const u32 n = divide(a.per_image, divide(a.groups, thread, group), rest);
  const u32 pad = a.z.pad, across = 2 * pad * a.row.divisor;
  i32 row, column;
  if (rest < across) {
    y = divide(a.row, rest, x);
    row = (i32)(y < pad ? y : y + a.z.h) - (i32)pad;
    column = (i32)x - (i32)pad;
  } else {
    row = (i32)divide(a.sides, rest - across, x);
    column = (i32)(x < pad ? x : x + a.z.w) - (i32)pad;
  }
  Lanes<T, V>::zero(at<T>(a.z, n, row, column) + group * V);
}

struct InsideArgs {
  Tensor z;
  Walk walk;
};

template <class T, i32 V> DEVI void border_zero_inside(const InsideArgs& a) {
  u32 slot, channel;
  if (!seat<V>(a.walk, slot, channel)) return;
  for (u32 pixel = blockIdx.x * a.walk.slots + slot; pixel < a.walk.pixels; pixel += gridDim.x * a.walk.slots) {
    const Place p = place(a.walk, pixel);
    Lanes<T, V>::zero(at<T>(a.z, p.n, p.y, p.x) + channel);
  }
}

#define KERNELS(T, V, SUFFIX)                                                  \
  KERNEL(border_zero_##SUFFIX, BorderArgs, 256) { border_zero<T, V>(args); }   \
  KERNEL(border_zero_inside_##SUFFIX, InsideArgs, 256) { border_zero_inside<T, V>(args); }

KERNELS(float, 8, f32)
KERNELS(float, 1, scalar_f32)
KERNELS(bf16, 8, bf16)
KERNELS(bf16, 1, scalar_bf16)
KERNELS(f16, 8, f16)
KERNELS(f16, 1, scalar_f16)
