// Convolution on ordinary cores, for f32 and for chips or shapes that the tensor-core kernels do not serve: any
// channel counts, any alignment, every chip. Implicit matrix products in tiles of 64 x 64 x 16 (conv2d_plain.cuh).
//
//  forward          y[pixel][o] = sum over depth = (tap, c_in) of x * w. Rows are output pixels, columns output
//                   channels. Epilogues: raw; stats (also the partial statistics of the values as stored, one pair
//                   for each tile of 64 pixels and channel); bias (output in f32); apply (scale, shift, activation,
//                   shortcut: evaluation). Reads x once for each 64 output channels, from the cache for the
//                   overlapping taps; 2 * pixels * c_out * k * k * c_in operations.
//  backward_data    dx[pixel][c] (+)= sum over (tap, c_out) of dy * w. Rows are input pixels. With a stride s the
//                   pixels fall into s * s classes (blockIdx.z), each with the taps that reach it; no product with a
//                   zero between pixels is made.
//  backward_weight  dw[depth][o] += sum over pixels of x * dy. Rows are numbers of the depth; the pixels are split
//                   over blockIdx.z, and `add_splits` adds the parts in their order.
//
// x carries a border of `pad` zeros and dy one of `gradient_border()`, so no edge is tested. 16-byte accesses where
// channels are a multiple of eight and aligned.
#include "conv2d_plain.cuh"

struct ForwardArgs {
  Tensor x;
  PlainConv conv;
  PlainOutput output;
  u64 weight;  // T [depth][c_out]
  u32 vector_x, vector_weight;
};

template <class T, class O, Epilogue E> DEVI void plain_forward(const ForwardArgs& args) {
  PlainInputRows<PlainViewInput<T>> a{{args.x, args.vector_x != 0}, args.conv};
  a.begin(blockIdx.x * PlainTile::rows);
  PlainWeightRows<T> b{reinterpret_cast<const T*>(args.weight), args.conv, args.vector_weight != 0};
  b.begin(blockIdx.y * PlainTile::columns);
  float sums[8][4];
  plain_multiply(a, b, (args.conv.depth + PlainTile::depth - 1) / PlainTile::depth, sums);
  plain_finish<T, O, E>(args.conv, args.output, sums);
}

// ---- data gradient ----------------------------------------------------------------------------------------------

struct DataArgs {
  Tensor dy, dx;
  PlainConv conv;
  u64 weight;
  u32 vector_dy, vector_weight, accumulate, reserved;
};

// Input pixels whose distance from the padded corner is `offset` modulo the stride, along one axis: the taps
// offset + stride * i reach them, i < taps; pixel first + stride * j reads the output pixel begin + j - i.
struct Axis {
  u32 taps, first, count, begin;
};
DEVI Axis axis(u32 offset, u32 size, u32 kernel, u32 stride, u32 pad) {
  Axis a;
  a.taps = kernel > offset ? (kernel - offset + stride - 1) / stride : 0;
  a.first = (offset + stride - pad % stride) % stride;
  a.count = size > a.first ? (size - a.first + stride - 1) / stride : 0;
  a.begin = (a.first + pad - offset) / stride;  // exact; pad < offset only where first makes up for it
  return a;
}

// The class of pixels of a block.
struct Class {
  Axis y, x;
  u32 offset_y, offset_x, rows, depth;
};
DEVI Class class_of(const DataArgs& args) {
  const PlainConv& g = args.conv;
  const u32 stride = (u32)g.stride;
  Class k;
  k.offset_y = blockIdx.z / stride, k.offset_x = blockIdx.z % stride;
  k.y = axis(k.offset_y, args.dx.h, g.kernel.divisor, stride, (u32)g.pad);
  k.x = axis(k.offset_x, args.dx.w, g.kernel.divisor, stride, (u32)g.pad);
  k.rows = args.dx.n * k.y.count * k.x.count;
  k.depth = k.y.taps * k.x.taps * g.c_out.divisor;
  return k;
}
// Image and place in the class.
DEVI Pixel class_pixel(const Class& k, u32 row) {
  const u32 x = row % k.x.count, line = row / k.x.count;
  return Pixel{line / k.y.count, (i32)(line % k.y.count), (i32)x};
}

template <class T> struct PlainGradientRows {
  const DataArgs& args;
  const Class& k;
  const T* origin;
  bool valid;
  static __device__ __forceinline__ void store(PlainPanel& panel, const float (&v)[8]) { store_deep(panel, v); }
  __device__ __forceinline__ void begin(u32 first_row) {
    const u32 row = first_row + deep_row();
    valid = row < k.rows;
    const Pixel p = class_pixel(k, valid ? row : 0);
    origin = at<T>(args.dy, p.n, p.y + (i32)k.y.begin, p.x + (i32)k.x.begin);
  }
  __device__ __forceinline__ float one(u32 tap, u32 o) const { return to_f32(*address(tap, o)); }
  __device__ __forceinline__ const T* address(u32 tap, u32 o) const {
    const u32 a = tap / k.x.taps, b = tap - a * k.x.taps;
    return origin + ((i64)o - (i64)(a * args.dy.row_pitch) - (i64)(b * args.dy.pixel_pitch));
  }
  __device__ __forceinline__ void load(u32 step, float (&v)[8]) const {
    clear8(v);
    const u32 depth = step * PlainTile::depth + deep_first();
    if (!valid || depth >= k.depth) return;
    u32 o, tap = divide(args.conv.c_out, depth, o);
    if (args.vector_dy != 0) {
      load8(address(tap, o), v);
      return;
    }
#pragma unroll
    for (i32 j = 0; j < 8; ++j) {
      if (depth + j < k.depth) v[j] = one(tap, o);
      if (++o == args.conv.c_out.divisor) o = 0, ++tap;
    }
  }
};

// The weight with rows c_in and depth (tap, c_out).
template <class T> struct PlainWeightColumns {
  const DataArgs& args;
  const Class& k;
  u32 channel;
  static __device__ __forceinline__ void store(PlainPanel& panel, const float (&v)[8]) { store_deep(panel, v); }
  __device__ __forceinline__ void begin(u32 first) { channel = first + deep_row(); }
  __device__ __forceinline__ const T* address(u32 tap, u32 o) const {
    const PlainConv& g = args.conv;
    const u32 a = tap / k.x.taps, b = tap - a * k.x.taps, stride = (u32)g.stride;
    const u32 full = (k.offset_y + stride * a) * g.kernel.divisor + k.offset_x + stride * b;
    return reinterpret_cast<const T*>(args.weight) +
           ((u64)(full * g.c_in.divisor + channel) * g.c_out.divisor + o);
  }
  __device__ __forceinline__ void load(u32 step, float (&v)[8]) const {
    clear8(v);
    const u32 depth = step * PlainTile::depth + deep_first();
    if (channel >= args.conv.c_in.divisor || depth >= k.depth) return;
    u32 o, tap = divide(args.conv.c_out, depth, o);
    if (args.vector_weight != 0) {
      load8(address(tap, o), v);
      return;
    }
#pragma unroll
    for (i32 j = 0; j < 8; ++j) {
      if (depth + j < k.depth) v[j] = to_f32(*address(tap, o));
      if (++o == args.conv.c_out.divisor) o = 0, ++tap;
    }
  }
};

template <class T> DEVI void plain_backward_data(const DataArgs& args) {
  const Class k = class_of(args);
  const u32 first_row = blockIdx.x * PlainTile::rows;
  if (first_row >= k.rows) return;
  PlainGradientRows<T> a{args, k};
  a.begin(first_row);
  PlainWeightColumns<T> b{args, k};
  b.begin(blockIdx.y * PlainTile::columns);
  float sums[8][4];
  plain_multiply(a, b, (k.depth + PlainTile::depth - 1) / PlainTile::depth, sums);
  const u32 row = first_row + (threadIdx.x >> 4 << 3), stride = (u32)args.conv.stride;
  const u32 channel = blockIdx.y * PlainTile::columns + ((threadIdx.x & 15u) << 2);
#pragma unroll
  for (i32 i = 0; i < 8; ++i) {
    if (row + i >= k.rows) break;
    const Pixel p = class_pixel(k, row + i);
    T* dx = at<T>(args.dx, p.n, (i32)(k.y.first + stride * (u32)p.y), (i32)(k.x.first + stride * (u32)p.x)) + channel;
#pragma unroll
    for (i32 j = 0; j < 4; ++j) {
      if (channel + j >= args.dx.c) continue;
      const float old = args.accumulate != 0 ? to_f32(dx[j]) : 0.0f;
      dx[j] = from_f32<T>(old + sums[i][j]);
    }
  }
}

// ---- kernels ----------------------------------------------------------------------------------------------------

#define KERNELS(T, SUFFIX)                                                                                       \
  KERNEL(conv2d_forward_raw_##SUFFIX, ForwardArgs, 128) { plain_forward<T, T, Epilogue::raw>(args); }            \
  KERNEL(conv2d_forward_stats_##SUFFIX, ForwardArgs, 128) { plain_forward<T, T, Epilogue::stats>(args); }        \
  KERNEL(conv2d_forward_bias_##SUFFIX, ForwardArgs, 128) { plain_forward<T, float, Epilogue::bias>(args); }      \
  KERNEL(conv2d_forward_apply_##SUFFIX, ForwardArgs, 128) { plain_forward<T, T, Epilogue::apply>(args); }        \
  KERNEL(conv2d_backward_data_##SUFFIX, DataArgs, 128) { plain_backward_data<T>(args); }                         \
  KERNEL(conv2d_backward_weight_##SUFFIX, PlainWeightArgs, 128) {                                                \
    plain_backward_weight<T>(args, PlainViewInput<T>{args.x, args.vector_x != 0});                                    \
  }

KERNELS(float, f32)
KERNELS(bf16, bf16)
KERNELS(f16, f16)

KERNEL(conv2d_add_splits, PlainSumArgs, 256) { plain_add_splits(args); }
