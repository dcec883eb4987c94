// Bytes or floats into the first activation, for graphs whose first operation is not a convolution that reads bytes
// itself (`conv2d_image.cu`).
//
//  image_input_u8   x = byte / 255 (a true division: a multiplication by 1/255 differs in the last bit)
//  image_input_f32  x = value
//
// The source is dense [n, h, w, c]; x is a view, whose border gets zeros. One thread for each number (three channels
// do not fill a vector), neighbours in a warp at neighbouring addresses. Bound by memory: reads 1 or 4 bytes and
// writes one T for each number.
#include "lanes.cuh"

struct InputArgs {
  Tensor x;
  Walk walk;  // over x with its border
  u64 source;
};

DEVI float fraction(u8 v) { return (float)v / 255.0f; }
DEVI float fraction(float v) { return v; }

template <class S, class T> DEVI void image_input(const InputArgs& a) {
  u32 slot, channel;
  if (!seat<1>(a.walk, slot, channel)) return;
  for (u32 pixel = blockIdx.x * a.walk.slots + slot; pixel < a.walk.pixels; pixel += gridDim.x * a.walk.slots) {
    const Place p = place(a.walk, pixel);
    float v = 0.0f;
    if (inside(p, a.x)) {
      const u64 dense = ((u64)p.n * a.x.h + (u32)p.y) * a.x.w + (u32)p.x;
      v = fraction(reinterpret_cast<const S*>(a.source)[dense * a.x.c + channel]);
    }
    at<T>(a.x, p.n, p.y, p.x)[channel] = from_f32<T>(v);
  }
}

KERNEL(image_input_u8_f32, InputArgs, 256) { image_input<u8, float>(args); }
KERNEL(image_input_u8_bf16, InputArgs, 256) { image_input<u8, bf16>(args); }
KERNEL(image_input_u8_f16, InputArgs, 256) { image_input<u8, f16>(args); }
KERNEL(image_input_f32_f32, InputArgs, 256) { image_input<float, float>(args); }
KERNEL(image_input_f32_bf16, InputArgs, 256) { image_input<float, bf16>(args); }
KERNEL(image_input_f32_f16, InputArgs, 256) { image_input<float, f16>(args); }
