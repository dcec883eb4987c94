// The first convolution, from bytes: x[n, y, x, c] = byte / 255 for three channels, zero outside the image. No copy of
// the image in the storage type is made, nor a border.
//
//  forward          as conv2d_forward, all epilogues
//  backward_weight  as conv2d_backward_weight; there is no data gradient
//
// This file is for f32 and for chips without bfloat16; see conv2d_image_mma.cu for the others. The tiles are those of
// conv2d_plain.cuh with a loader that converts bytes and tests edges: for each output pixel 27 bytes (3 x 3) come from
// the cache, 12 new ones from memory, and c_out numbers are written. The master weights are read as they are, f32.
#include "conv2d_plain.cuh"

struct ImageForwardArgs {
  PlainConv conv;
  PlainOutput output;
  u64 bytes, weight;  // u8 [n, h, w, 3]; f32 [depth][c_out]
  i32 h, w;
  u32 vector_weight, reserved;
};

template <class T, class O, Epilogue E> DEVI void image_forward(const ImageForwardArgs& args) {
  const PlainImageInput image{reinterpret_cast<const u8*>(args.bytes), args.h, args.w, false};
  PlainInputRows<PlainImageInput> a{image, args.conv};
  a.begin(blockIdx.x * PlainTile::rows);
  PlainWeightRows<float> b{reinterpret_cast<const float*>(args.weight), args.conv, args.vector_weight != 0};
  b.begin(blockIdx.y * PlainTile::columns);
  float sums[8][4];
  plain_multiply(a, b, (args.conv.depth + PlainTile::depth - 1) / PlainTile::depth, sums);
  plain_finish<T, O, E>(args.conv, args.output, sums);
}

template <class T> DEVI void image_backward_weight(const PlainWeightArgs& args) {
  const u8* bytes = reinterpret_cast<const u8*>(args.x.data);
  plain_backward_weight<T>(args, PlainImageInput{bytes, (i32)args.x.h, (i32)args.x.w, false});
}

#define KERNELS(T, SUFFIX)                                                                                            \
  KERNEL(conv2d_image_forward_raw_##SUFFIX, ImageForwardArgs, 128) { image_forward<T, T, Epilogue::raw>(args); }      \
  KERNEL(conv2d_image_forward_stats_##SUFFIX, ImageForwardArgs, 128) { image_forward<T, T, Epilogue::stats>(args); }  \
  KERNEL(conv2d_image_forward_bias_##SUFFIX, ImageForwardArgs, 128) { image_forward<T, float, Epilogue::bias>(args); } \
  KERNEL(conv2d_image_forward_apply_##SUFFIX, ImageForwardArgs, 128) { image_forward<T, T, Epilogue::apply>(args); }  \
  KERNEL(conv2d_image_backward_weight_##SUFFIX, PlainWeightArgs, 128) { image_backward_weight<T>(args); }

KERNELS(float, f32)
KERNELS(bf16, bf16)
KERNELS(f16, f16)

KERNEL(conv2d_image_add_splits, PlainSumArgs, 256) { plain_add_splits(args); }
