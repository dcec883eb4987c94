// A matrix product on ordinary cores, for convolutions as implicit matrices: 64 rows by 64 columns to a block of 128
// threads, 16 deep to a step, 8 x 4 sums to a thread, everything in f32.
//
// A thread does 32 multiply-adds on 12 numbers from shared memory; the next step's 16 numbers are on their way from
// global memory to registers meanwhile, and two buffers make one barrier a step enough. Loaders know where the numbers
// come from: each fills eight of a step, either eight deep in one row ("deep") or eight rows at one depth ("flat").
#pragma once
#include "common.cuh"

struct PlainTile {
  static constexpr u32 rows = 64, columns = 64, depth = 16, threads = 128, pitch = 68;
};
typedef float PlainPanel[PlainTile::depth][PlainTile::pitch];

// Eight numbers at depths of one row. Neighbouring threads hold neighbouring rows: no bank conflicts.
DEVI u32 deep_row() { return threadIdx.x & 63u; }
DEVI u32 deep_first() { return threadIdx.x >> 6 << 3; }
DEVI void store_deep(PlainPanel& panel, const float (&v)[8]) {
#pragma unroll
  for (i32 j = 0; j < 8; ++j) panel[deep_first() + j][deep_row()] = v[j];
}
// Eight neighbouring rows at one depth.
DEVI u32 flat_depth() { return threadIdx.x >> 3; }
DEVI u32 flat_first() { return (threadIdx.x & 7u) << 3; }
DEVI void store_flat(PlainPanel& panel, const float (&v)[8]) { store8(&panel[flat_depth()][flat_first()], v); }

DEVI void clear8(float (&v)[8]) {
#pragma unroll
  for (i32 j = 0; j < 8; ++j) v[j] = 0.0f;
}

// sums += A B over `steps` steps; the thread's rows are 8 * (thread / 16) .., its columns 4 * (thread % 16) ..
template <class A, class B> DEVI void plain_multiply(A& a, B& b, u32 steps, float (&sums)[8][4]) {
  __shared__ __align__(16) PlainPanel panel_a[2], panel_b[2];
  const u32 row = threadIdx.x >> 4 << 3, column = (threadIdx.x & 15u) << 2;
#pragma unroll
  for (i32 i = 0; i < 8; ++i) {
#pragma unroll
    for (i32 j = 0; j < 4; ++j) sums[i][j] = 0.0f;
  }
  if (steps == 0) return;
  float next_a[8], next_b[8];
  a.load(0, next_a), b.load(0, next_b);
  A::store(panel_a[0], next_a), B::store(panel_b[0], next_b);
  __syncthreads();
  for (u32 step = 0; step < steps; ++step) {
    const bool more = step + 1 < steps;
    if (more) a.load(step + 1, next_a), b.load(step + 1, next_b);
    const PlainPanel &pa = panel_a[step & 1], &pb = panel_b[step & 1];
#pragma unroll
    for (i32 d = 0; d < (i32)PlainTile::depth; ++d) {
      float va[8];
      load8(&pa[d][row], va);
      const float4 q = *reinterpret_cast<const float4*>(&pb[d][column]);
      const float vb[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (i32 i = 0; i < 8; ++i) {
#pragma unroll
        for (i32 j = 0; j < 4; ++j) sums[i][j] = fmaf(va[i], vb[j], sums[i][j]);
      }
    }
    if (more) A::store(panel_a[~step & 1], next_a), B::store(panel_b[~step & 1], next_b);
    __syncthreads();
  }
}

// ---- geometry ---------------------------------------------------------------------------------------------------

// A convolution and its output grid. Rust twin: `conv2d::cuda::plain::Geometry`. 96 bytes.
struct PlainConv {
  FastDivisor out_width, out_height;  // of the map of y
  FastDivisor c_in, c_out, kernel;
  u32 rows;   // output pixels of all images, below 2^31
  u32 depth;  // kernel * kernel * c_in
  i32 stride, pad;
};

struct Pixel {
  u32 n;
  i32 y, x;
};
DEVI Pixel output_pixel(const PlainConv& g, u32 row) {
  u32 x, y;
  const u32 line = divide(g.out_width, row, x);
  const u32 n = divide(g.out_height, line, y);
  return Pixel{n, (i32)y, (i32)x};
}

// Position in the kernel and channel of a number of the implicit matrix: depth = (a * kernel + b) * channels + c.
struct Tap {
  u32 a, b, c;
};
DEVI Tap tap_at(const FastDivisor& kernel, const FastDivisor& channels, u32 depth) {
  Tap t;
  t.a = divide(kernel, divide(channels, depth, t.c), t.b);
  return t;
}
DEVI void next(Tap& t, u32 kernel, u32 channels) {
  if (++t.c < channels) return;
  t.c = 0;
  if (++t.b < kernel) return;
  t.b = 0;
  ++t.a;
}

// ---- where the input comes from ---------------------------------------------------------------------------------

// A view with its border of zeros: no edge tests. `vector`: eight channels lie together and aligned.
template <class T> struct PlainViewInput {
  const Tensor& t;
  bool vector;
  const T* origin;
  __device__ __forceinline__ void seek(const Pixel& p, i32 stride, i32 pad) {
    origin = at<T>(t, p.n, p.y * stride - pad, p.x * stride - pad);
  }
  __device__ __forceinline__ const T* tap(const Tap& k) const {
    return origin + ((i64)(k.a * t.row_pitch) + (i64)(k.b * t.pixel_pitch) + k.c);
  }
  __device__ __forceinline__ float one(const Tap& k) const { return to_f32(*tap(k)); }
  __device__ __forceinline__ void eight(const Tap& k, float (&v)[8]) const { load8(tap(k), v); }
};

// Bytes, dense [n, h, w, 3], as fractions; zeros outside the image.
struct PlainImageInput {
  const u8* bytes;
  i32 h, w;
  bool vector;  // never
  Pixel corner;
  __device__ __forceinline__ void seek(const Pixel& p, i32 stride, i32 pad) {
    corner = Pixel{p.n, p.y * stride - pad, p.x * stride - pad};
  }
  __device__ __forceinline__ float one(const Tap& k) const {
    const i32 y = corner.y + (i32)k.a, x = corner.x + (i32)k.b;
    if ((u32)y >= (u32)h || (u32)x >= (u32)w) return 0.0f;
    return (float)bytes[(((u64)corner.n * (u32)h + (u32)y) * (u32)w + (u32)x) * 3 + k.c] / 255.0f;
  }
  __device__ __forceinline__ void eight(const Tap&, float (&v)[8]) const { clear8(v); }
};

// ---- loaders of the forward pass: rows are output pixels --------------------------------------------------------

template <class Input> struct PlainInputRows {
  Input input;
  const PlainConv& g;
  bool valid;
  static __device__ __forceinline__ void store(PlainPanel& panel, const float (&v)[8]) { store_deep(panel, v); }
  __device__ __forceinline__ void begin(u32 first_row) {
    const u32 row = first_row + deep_row();
    valid = row < g.rows;
    input.seek(output_pixel(g, valid ? row : 0), g.stride, g.pad);
  }
  __device__ __forceinline__ void load(u32 step, float (&v)[8]) const {
    clear8(v);
    const u32 depth = step * PlainTile::depth + deep_first();
    if (!valid || depth >= g.depth) return;
    Tap tap = tap_at(g.kernel, g.c_in, depth);
    if (input.vector) {
      input.eight(tap, v);
      return;
    }
#pragma unroll
    for (i32 j = 0; j < 8; ++j) {
      if (depth + j < g.depth) v[j] = input.one(tap);
      next(tap, g.kernel.divisor, g.c_in.divisor);
    }
  }
};

// The weight as it lies: [depth][c_out].
template <class T> struct PlainWeightRows {
  const T* weight;
  const PlainConv& g;
  bool vector;
  u32 column;
  static __device__ __forceinline__ void store(PlainPanel& panel, const float (&v)[8]) { store_flat(panel, v); }
  __device__ __forceinline__ void begin(u32 first_column) { column = first_column + flat_first(); }
  __device__ __forceinline__ void load(u32 step, float (&v)[8]) const {
    clear8(v);
    const u32 depth = step * PlainTile::depth + flat_depth(), columns = g.c_out.divisor;
    if (depth >= g.depth || column >= columns) return;
    const T* from = weight + (u64)depth * columns + column;
    if (vector) {
      load8(from, v);
      return;
    }
#pragma unroll
    for (i32 j = 0; j < 8; ++j) {
      if (column + j < columns) v[j] = to_f32(from[j]);
    }
  }
};

// ---- epilogues of the forward pass ------------------------------------------------------------------------------

enum class Epilogue : u32 { raw, stats, bias, apply };

struct PlainOutput {
  Tensor out, residual;      // residual.data == 0: none
  u64 partials;              // stats: f32 [row tile][2][c_out]
  u64 bias, scale, shift;    // bias; apply: f32 [c_out]
  u32 activation, vector;    // vector: four channels of `out` lie together and aligned
};

DEVI void store4(float* p, const float (&v)[4]) {
  *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
}
template <class T> DEVI void store4(T* p, const float (&v)[4]) {
  *reinterpret_cast<uint2*>(p) = make_uint2(Pair<T>::pack(v[0], v[1]), Pair<T>::pack(v[2], v[3]));
}

// Adds four numbers of each thread over the eight row groups of the block; threads below 64 get those of a column.
DEVI float plain_column_sum(float (&board)[8][64], const float (&v)[4]) {
  const u32 group = threadIdx.x >> 4, column = (threadIdx.x & 15u) << 2;
#pragma unroll
  for (i32 j = 0; j < 4; ++j) board[group][column + j] = v[j];
  __syncthreads();
  float sum = 0.0f;
  if (threadIdx.x < 64) {
#pragma unroll
    for (i32 i = 0; i < 8; ++i) sum += board[i][threadIdx.x];
  }
  __syncthreads();
  return sum;
}

// Statistics of the tile: the sum, and the squared deviations from the tile's own mean, so that nothing cancels.
DEVI void plain_statistics(const PlainConv& g, float* partials, const float (&v)[8][4]) {
  __shared__ float board[8][64], mean[64];
  const u32 first_row = blockIdx.x * PlainTile::rows, row = first_row + (threadIdx.x >> 4 << 3);
  const u32 count = min(PlainTile::rows + 0u, g.rows - first_row), column = (threadIdx.x & 15u) << 2;
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (i32 i = 0; i < 8; ++i) {
#pragma unroll
    for (i32 j = 0; j < 4; ++j) part[j] += row + i < g.rows ? v[i][j] : 0.0f;
  }
  const float sum = plain_column_sum(board, part);
  if (threadIdx.x < 64) mean[threadIdx.x] = sum / (float)count;
  __syncthreads();
#pragma unroll
  for (i32 j = 0; j < 4; ++j) part[j] = 0.0f;
#pragma unroll
  for (i32 i = 0; i < 8; ++i) {
#pragma unroll
    for (i32 j = 0; j < 4; ++j) {
      const float d = row + i < g.rows ? v[i][j] - mean[column + j] : 0.0f;
      part[j] = fmaf(d, d, part[j]);
    }
  }
  const float squares = plain_column_sum(board, part);
  const u32 channel = blockIdx.y * PlainTile::columns + threadIdx.x, columns = g.c_out.divisor;
  if (threadIdx.x < 64 && channel < columns) {
    float* out = partials + (u64)blockIdx.x * 2 * columns + channel;
    out[0] = sum;
    out[columns] = squares;
  }
}

// Writes a tile. O is the type of the output: T, or float for `bias`.
template <class T, class O, Epilogue E> DEVI void plain_finish(const PlainConv& g, const PlainOutput& o, float (&v)[8][4]) {
  const u32 row = blockIdx.x * PlainTile::rows + (threadIdx.x >> 4 << 3);
  const u32 column = blockIdx.y * PlainTile::columns + ((threadIdx.x & 15u) << 2), columns = g.c_out.divisor;
  if (E == Epilogue::stats) {
#pragma unroll
    for (i32 i = 0; i < 8; ++i) {
#pragma unroll
      for (i32 j = 0; j < 4; ++j) v[i][j] = rounded<O>(v[i][j]);
    }
    plain_statistics(g, reinterpret_cast<float*>(o.partials), v);
  }
  if (column >= columns) return;
  float scale[4] = {1.0f, 1.0f, 1.0f, 1.0f}, shift[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (i32 j = 0; j < 4; ++j) {
    if (column + j < columns && E == Epilogue::bias) shift[j] = reinterpret_cast<const float*>(o.bias)[column + j];
    if (column + j < columns && E == Epilogue::apply) {
      scale[j] = reinterpret_cast<const float*>(o.scale)[column + j];
      shift[j] = reinterpret_cast<const float*>(o.shift)[column + j];
    }
  }
#pragma unroll
  for (i32 i = 0; i < 8; ++i) {
    if (row + i >= g.rows) break;
    const Pixel p = output_pixel(g, row + i);
    O* out = at<O>(o.out, p.n, p.y, p.x) + column;
    if (E == Epilogue::bias) {
#pragma unroll
      for (i32 j = 0; j < 4; ++j) v[i][j] += shift[j];
    }
    if (E == Epilogue::apply) {
      const T* residual = o.residual.data == 0 ? nullptr : at<T>(o.residual, p.n, p.y, p.x) + column;
#pragma unroll
      for (i32 j = 0; j < 4; ++j) {
        v[i][j] = activate(o.activation, fmaf(v[i][j], scale[j], shift[j]));
        if (residual != nullptr && column + j < columns) v[i][j] += to_f32(residual[j]);
      }
    }
    if (o.vector != 0) {
      store4(out, v[i]);
    } else {
#pragma unroll
      for (i32 j = 0; j < 4; ++j) {
        if (column + j < columns) out[j] = from_f32<O>(v[i][j]);
      }
    }
  }
}

// ---- weight gradient: rows are numbers of the weight's depth, columns output channels, depth is pixels -----------

struct PlainWeightArgs {
  Tensor x, dy;  // of an image: x.data is the bytes, x.h and x.w the size
  PlainConv conv;
  u64 sums;  // f32 [split][depth][c_out]; or, with `direct`, the gradient, added to
  u32 pixels_per_split, direct, vector_x, vector_dy;
};

template <class Input> struct PlainInputColumns {
  Input input;
  const PlainConv& g;
  u32 depth, pixel, end;
  Tap first;
  static __device__ __forceinline__ void store(PlainPanel& panel, const float (&v)[8]) { store_flat(panel, v); }
  __device__ __forceinline__ void begin(u32 first_depth, u32 first_pixel, u32 last_pixel) {
    depth = first_depth + flat_first();
    first = tap_at(g.kernel, g.c_in, min(depth, g.depth - 1));
    pixel = first_pixel + flat_depth();
    end = last_pixel;
  }
  __device__ __forceinline__ void load(u32 step, float (&v)[8]) {
    clear8(v);
    const u32 row = pixel + step * PlainTile::depth;
    if (row >= end || depth >= g.depth) return;
    input.seek(output_pixel(g, row), g.stride, g.pad);
    if (input.vector) {
      input.eight(first, v);
      return;
    }
    Tap tap = first;
#pragma unroll
    for (i32 j = 0; j < 8; ++j) {
      if (depth + j < g.depth) v[j] = input.one(tap);
      next(tap, g.kernel.divisor, g.c_in.divisor);
    }
  }
};

template <class T> struct PlainGradientColumns {
  const Tensor& dy;
  const PlainConv& g;
  bool vector;
  u32 column, pixel, end;
  static __device__ __forceinline__ void store(PlainPanel& panel, const float (&v)[8]) { store_flat(panel, v); }
  __device__ __forceinline__ void begin(u32 first_column, u32 first_pixel, u32 last_pixel) {
    column = first_column + flat_first();
    pixel = first_pixel + flat_depth();
    end = last_pixel;
  }
  __device__ __forceinline__ void load(u32 step, float (&v)[8]) const {
    clear8(v);
    const u32 row = pixel + step * PlainTile::depth, columns = g.c_out.divisor;
    if (row >= end || column >= columns) return;
    const Pixel p = output_pixel(g, row);
    const T* from = at<T>(dy, p.n, p.y, p.x) + column;
    if (vector) {
      load8(from, v);
      return;
    }
#pragma unroll
    for (i32 j = 0; j < 8; ++j) {
      if (column + j < columns) v[j] = to_f32(from[j]);
    }
  }
};

template <class T, class Input> DEVI void plain_backward_weight(const PlainWeightArgs& args, const Input& input) {
  const PlainConv& g = args.conv;
  const u32 begin = blockIdx.z * args.pixels_per_split, end = min(g.rows, begin + args.pixels_per_split);
  const u32 first_depth = blockIdx.x * PlainTile::rows, first_column = blockIdx.y * PlainTile::columns;
  PlainInputColumns<Input> a{input, g};
  a.begin(first_depth, begin, end);
  PlainGradientColumns<T> b{args.dy, g, args.vector_dy != 0};
  b.begin(first_column, begin, end);
  float sums[8][4];
  plain_multiply(a, b, (end - begin + PlainTile::depth - 1) / PlainTile::depth, sums);
  const u32 depth = first_depth + (threadIdx.x >> 4 << 3), column = first_column + ((threadIdx.x & 15u) << 2);
  const u32 columns = g.c_out.divisor;
  float* out = reinterpret_cast<float*>(args.sums) + (u64)blockIdx.z * g.depth * columns;
#pragma unroll
  for (i32 i = 0; i < 8; ++i) {
#pragma unroll
    for (i32 j = 0; j < 4; ++j) {
      if (depth + i >= g.depth || column + j >= columns) continue;
      float* to = out + (u64)(depth + i) * columns + column + j;
      *to = args.direct != 0 ? *to + sums[i][j] : sums[i][j];
    }
  }
}

// 32 neighbouring numbers to a block of 256 threads, which take every eighth split each; then a fixed tree.
struct PlainSumArgs {
  u64 sums, gradient;  // f32 [split][count]; f32 [count], added to
  u32 splits, count;
};
DEVI void plain_add_splits(const PlainSumArgs& args) {
  __shared__ float board[8][32];
  const u32 lane = threadIdx.x & 31u, slot = threadIdx.x >> 5, i = blockIdx.x * 32 + lane;
  float sum = 0.0f;
  if (i < args.count) {
    const float* sums = reinterpret_cast<const float*>(args.sums) + i;
#pragma unroll 8
    for (u32 split = slot; split < args.splits; split += 8) sum += sums[(u64)split * args.count];
  }
  board[slot][lane] = sum;
  __syncthreads();
  for (u32 half = 4; half > 0; half >>= 1) {
    if (slot < half) board[slot][lane] += board[slot + half][lane];
    __syncthreads();
  }
  if (slot == 0 && i < args.count) reinterpret_cast<float*>(args.gradient)[i] += board[0][lane];
}
