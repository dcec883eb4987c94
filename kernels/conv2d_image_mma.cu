// The first convolution on tensor cores, from bytes: three channels, a stride that is even, 16-bit storage.
//
//  forward          y[pixel][o] = sum over (a, b, c) of byte * w / 255; epilogues raw, stats, apply
//  backward_weight  dw[a, b, c][o] += sum over pixels of byte * dy / 255: each block sums its runs of pixels and leaves
//                   one partial weight, `conv2d_image_add_splits` adds them in order
//
// Bytes must move: for each output pixel of a 3 x 3 stride-2 layer 12 bytes in and 2 c_out out (forward) or in (weight
// gradient), 54 c_out operations; memory is the limit when the products run on tensor cores, but not on ordinary ones.
// A byte is a number that bfloat16 and half hold exactly, so the products take the bytes as they are and the factor
// 1/255 is applied to the sum in f32: this is more exact than rounding each fraction.
//
// A block takes a run of neighbouring output pixels, in the order of memory, over the ends of rows and images. The
// bytes under the run are read once, row by row, and kept in shared memory as 16-bit numbers: for each kernel row one
// line, in which the window of pixel p begins at 3 * stride * p + gap * (rows ended before p), so a lane finds any
// number of the implicit matrix by adding two offsets. A kernel row takes 3 k numbers, padded to an even number so that
// the pairs which mma wants lie in one word; weights are zero there. Weights are rounded to T from the f32 masters.
#include "common.cuh"

struct ImageRun {
  FastDivisor out_width, out_height;
  u64 bytes;
  u32 h, w;          // of the image
  u32 kernel;
  u32 stride, pad;
  u32 pixels;        // output pixels of all images
  u32 row_numbers;   // 3 * kernel, made even
  u32 depth;         // kernel * row_numbers, made a multiple of 16
  u32 line, gap;     // numbers of a line in shared memory; extra numbers where a row of pixels ends
};

#if defined(BOXWRIGHT_EMULATOR) || __CUDA_ARCH__ >= 800

// Bits of a whole number below 256, by integer instructions: conversions are slow.
template <class T> struct ByteAs;
template <> struct ByteAs<bf16> {
  static __device__ __forceinline__ u32 bits(u32 v) {
    return __float_as_uint(__uint_as_float(0x4b000000u | v) - 8388608.0f) >> 16;
  }
};
template <> struct ByteAs<f16> {
  static __device__ __forceinline__ u32 bits(u32 v) {
    const u32 f = __float_as_uint(__uint_as_float(0x4b000000u | v) - 8388608.0f);
    return v == 0 ? 0 : (f >> 13) - 0x1c000u;  // the exponent's bias is 15, not 127
  }
};

// Where the run of a block begins: flat output row, and column.
struct RunStart {
  u32 first, row, column;
};
DEVI RunStart run_start(const ImageRun& g, u32 first) {
  RunStart s;
  s.first = first;
  s.row = divide(g.out_width, first, s.column);
  return s;
}
// Offset in a line of the window of the run's pixel `p`.
DEVI u32 window_start(const ImageRun& g, const RunStart& s, u32 p) {
  u32 rest;
  return p * g.stride * 3 + divide(g.out_width, s.column + p, rest) * g.gap;
}

// Fills the lines of a run of at most N pixels. Each warp takes a kernel row of a piece of an output row.
template <class T> DEVI void stage_image(const ImageRun& g, const RunStart& s, u32 run, u16* lines) {
  const u32 width = g.out_width.divisor, lane = threadIdx.x & 31u;
  u32 rest;
  const u32 last = min(s.first + run, g.pixels) - 1;
  const u32 pieces = divide(g.out_width, last, rest) - s.row + 1;
  for (u32 r = threadIdx.x >> 5; r < pieces * g.kernel; r += blockDim.x >> 5) {
    const u32 piece = r / g.kernel, a = r - piece * g.kernel;
    const u32 column = piece == 0 ? s.column : 0, start = piece == 0 ? 0 : piece * width - s.column;
    u32 row;
    const u32 n = divide(g.out_height, s.row + piece, row);
    const i32 y = (i32)(row * g.stride + a) - (i32)g.pad;
    const bool valid = (u32)y < g.h;
    const u8* from = reinterpret_cast<const u8*>(g.bytes) + ((u64)n * g.h + (valid ? (u32)y : 0)) * g.w * 3;
    const i32 left = ((i32)(column * g.stride) - (i32)g.pad) * 3;
    const u32 bytes = valid ? g.w * 3 : 0, count = min(width - column, run - start) * g.stride * 3 + g.gap;
    u32* to = reinterpret_cast<u32*>(lines + a * g.line + start * g.stride * 3 + piece * g.gap);
#pragma unroll 4
    for (u32 i = lane * 2; i < count; i += 64) {
      const u32 at0 = (u32)(left + (i32)i), at1 = at0 + 1;
      const u32 v0 = at0 < bytes ? from[at0] : 0, v1 = at1 < bytes ? from[at1] : 0;
      to[i >> 1] = ByteAs<T>::bits(v0) | ByteAs<T>::bits(v1) << 16;
    }
  }
}
// Offset in the lines of number `k` of a window; padding reads number 0, whose weight there is zero.
DEVI u32 number_offset(const ImageRun& g, u32 k) {
  const u32 a = k / g.row_numbers;
  return a < g.kernel ? a * g.line + (k - a * g.row_numbers) : 0;
}
// Index in the depth of the weight of number `k` of a window; false for padding.
DEVI bool weight_row(const ImageRun& g, u32 k, u32& row) {
  const u32 a = k / g.row_numbers, i = k - a * g.row_numbers;
  row = a * 3 * g.kernel + i;
  return a < g.kernel && i < 3 * g.kernel;
}

#endif

// ---- forward ----------------------------------------------------------------------------------------------------

enum class ImageEpilogue : u32 { raw, stats, apply };

struct ImageMmaArgs {
  ImageRun run;
  Tensor out, residual;  // residual.data == 0: none
  u64 weight;            // f32 [depth][c_out]
  u64 partials, scale, shift;
  u32 activation, vector;  // vector: four channels of `out` lie together and aligned
};

// Blocks of 256 threads, runs of 512 pixels: 64 pixels to a warp, 16 channels at a time. Column 2 q + i of fragment j
// is channel 4 q + 2 j + i, so that a lane holds four neighbouring channels of a pixel and writes them at once.
template <class T, ImageEpilogue E> DEVI void image_forward(const ImageMmaArgs& args) {
#if defined(BOXWRIGHT_EMULATOR) || __CUDA_ARCH__ >= 800
  constexpr u32 RUN = 512, TILES = 4;
  DYN_SMEM(shared);
  __shared__ float board[8][16], mean[16];
  const ImageRun& g = args.run;
  const u32 c_out = args.out.c, channels = (c_out + 15) / 16 * 16, pitch = g.depth + 8;
  u16* weights = reinterpret_cast<u16*>(shared);                          // [channels][pitch]
  u32* offsets = reinterpret_cast<u32*>(weights + channels * pitch);      // [depth / 2]
  u16* lines = reinterpret_cast<u16*>(offsets + g.depth / 2);             // [kernel][line]
  const u32 lane = threadIdx.x & 31u, warp = threadIdx.x >> 5, row = lane >> 2, quad = lane & 3u;
  const RunStart start = run_start(g, blockIdx.x * RUN);

  for (u32 i = threadIdx.x; i < channels * g.depth; i += 256) {
    const u32 k = i / channels, channel = i - k * channels;
    u32 from;
    const bool real = weight_row(g, k, from) && channel < c_out;
    const float w = real ? reinterpret_cast<const float*>(args.weight)[from * c_out + channel] : 0.0f;
    weights[channel * pitch + k] = from_f32<T>(w).bits;
  }
  for (u32 i = threadIdx.x; i < g.depth / 2; i += 256) offsets[i] = number_offset(g, 2 * i);
  stage_image<T>(g, start, RUN, lines);

  u32 base[TILES][2];
#pragma unroll
  for (u32 m = 0; m < TILES; ++m) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      const u32 p = warp * 64 + m * 16 + half * 8 + row;
      base[m][half] = start.first + p < g.pixels ? window_start(g, start, p) : 0;
    }
  }
  __syncthreads();

  for (u32 c0 = 0; c0 < channels; c0 += 16) {
    float sums[TILES][2][4];
#pragma unroll
    for (u32 m = 0; m < TILES; ++m) {
#pragma unroll
      for (u32 j = 0; j < 2; ++j) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) sums[m][j][i] = 0.0f;
      }
    }
    for (u32 k = 0; k < g.depth; k += 16) {
      u32 b[2][2];
#pragma unroll
      for (u32 j = 0; j < 2; ++j) {
        const u16* w = weights + (c0 + (row >> 1) * 4 + j * 2 + (row & 1u)) * pitch + k + 2 * quad;
        b[j][0] = *reinterpret_cast<const u32*>(w), b[j][1] = *reinterpret_cast<const u32*>(w + 8);
      }
      const u32 low = offsets[k / 2 + quad], high = offsets[k / 2 + quad + 4];
#pragma unroll
      for (u32 m = 0; m < TILES; ++m) {
        const u32 a[4] = {*reinterpret_cast<const u32*>(lines + base[m][0] + low),
                          *reinterpret_cast<const u32*>(lines + base[m][1] + low),
                          *reinterpret_cast<const u32*>(lines + base[m][0] + high),
                          *reinterpret_cast<const u32*>(lines + base[m][1] + high)};
        mma_16x8x16(T{}, sums[m][0], a, b[0][0], b[0][1]);
        mma_16x8x16(T{}, sums[m][1], a, b[1][0], b[1][1]);
      }
    }

    // Four neighbouring channels of pixel (m, half).
    const u32 channel = c0 + 4 * quad;
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (u32 m = 0; m < TILES; ++m) {
#pragma unroll
      for (u32 half = 0; half < 2; ++half) {
        const u32 pixel = start.first + warp * 64 + m * 16 + half * 8 + row;
        if (pixel >= g.pixels) continue;
        float v[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) v[i] = sums[m][i >> 1][2 * half + (i & 1u)] * (1.0f / 255.0f);
        u32 x, y;
        const u32 n = divide(g.out_height, divide(g.out_width, pixel, x), y);
        T* out = at<T>(args.out, n, (i32)y, (i32)x) + channel;
        if (E == ImageEpilogue::apply) {
          const T* residual = at<T>(args.residual, n, (i32)y, (i32)x) + channel;
#pragma unroll
          for (u32 i = 0; i < 4; ++i) {
            if (channel + i >= c_out) continue;
            const float scale = reinterpret_cast<const float*>(args.scale)[channel + i];
            v[i] = fmaf(v[i], scale, reinterpret_cast<const float*>(args.shift)[channel + i]);
            v[i] = activate(args.activation, v[i]);
            if (args.residual.data != 0) v[i] += to_f32(residual[i]);
          }
        }
        if (args.vector != 0) {
          if (channel < c_out) {
            *reinterpret_cast<uint2*>(out) = make_uint2(Pair<T>::pack(v[0], v[1]), Pair<T>::pack(v[2], v[3]));
          }
        } else {
#pragma unroll
          for (u32 i = 0; i < 4; ++i) {
            if (channel + i < c_out) out[i] = from_f32<T>(v[i]);
          }
        }
        if (E == ImageEpilogue::stats) {
#pragma unroll
          for (u32 i = 0; i < 4; ++i) part[i] += sums[m][i >> 1][2 * half + (i & 1u)] = rounded<T>(v[i]);
        }
      }
    }
    if (E != ImageEpilogue::stats) continue;

    // Statistics of the run: sums over lanes, warps; then the squared deviations the same way.
    const u32 count = min(RUN + 0u, g.pixels - start.first);
    float* partials = reinterpret_cast<float*>(args.partials) + (u64)blockIdx.x * 2 * c_out + c0;
    for (u32 pass = 0; pass < 2; ++pass) {
      if (pass == 1) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) part[i] = 0.0f;
#pragma unroll
        for (u32 m = 0; m < TILES; ++m) {
#pragma unroll
          for (u32 half = 0; half < 2; ++half) {
            if (start.first + warp * 64 + m * 16 + half * 8 + row >= g.pixels) continue;
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
              const float d = sums[m][i >> 1][2 * half + (i & 1u)] - mean[4 * quad + i];
              part[i] = fmaf(d, d, part[i]);
            }
          }
        }
      }
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
#pragma unroll
        for (i32 by = 4; by < 32; by <<= 1) part[i] += __shfl_xor_sync(0xffffffffu, part[i], by);
      }
      if (row == 0) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) board[warp][4 * quad + i] = part[i];
      }
      __syncthreads();
      if (threadIdx.x < 16) {
        float sum = 0.0f;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) sum += board[i][threadIdx.x];
        if (pass == 0) mean[threadIdx.x] = sum / (float)count;
        if (c0 + threadIdx.x < c_out) partials[pass * c_out + threadIdx.x] = sum;
      }
      __syncthreads();
    }
  }
#endif
}

// ---- weight gradient --------------------------------------------------------------------------------------------

struct ImageMmaWeightArgs {
  ImageRun run;
  Tensor dy;
  u64 sums;  // f32 [block][3 * kernel * kernel][c_out]
  u32 runs, vector;
};

// Blocks of 256 threads, runs of 256 pixels, 32 channels (blockIdx.y) and 32 numbers of the window (blockIdx.z): the
// products are dw transposed, rows channels, columns numbers, depth pixels; a warp takes 32 pixels of each run. dy goes
// through shared memory, from where ldmatrix turns it; the sums of the warps are added in order at the end.
template <class T> DEVI void image_backward_weight(const ImageMmaWeightArgs& args) {
#if defined(BOXWRIGHT_EMULATOR) || __CUDA_ARCH__ >= 800
  constexpr u32 RUN = 256, PITCH = 40;
  DYN_SMEM(shared);
  const ImageRun& g = args.run;
  u16* gradient = reinterpret_cast<u16*>(shared);                          // [RUN][PITCH]
  u32* base = reinterpret_cast<u32*>(gradient + RUN * PITCH);              // [RUN]
  u16* lines = reinterpret_cast<u16*>(base + RUN);                         // [kernel][line]
  float* board = reinterpret_cast<float*>(shared);                         // [8][32][33], at the end
  const u32 lane = threadIdx.x & 31u, warp = threadIdx.x >> 5, row = lane >> 2, quad = lane & 3u;
  const u32 c_out = args.dy.c, c0 = blockIdx.y * 32, k0 = blockIdx.z * 32;
  const bool both = c0 + 16 < c_out;
  u32 offset[4];
#pragma unroll
  for (u32 j = 0; j < 4; ++j) offset[j] = number_offset(g, k0 + 8 * j + row);
  float sums[2][4][4];
#pragma unroll
  for (u32 m = 0; m < 2; ++m) {
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
#pragma unroll
      for (u32 i = 0; i < 4; ++i) sums[m][j][i] = 0.0f;
    }
  }

  for (u32 run = blockIdx.x; run < args.runs; run += gridDim.x) {
    const RunStart start = run_start(g, run * RUN);
    __syncthreads();
    stage_image<T>(g, start, RUN, lines);
    {
      const u32 p = threadIdx.x;
      base[p] = start.first + p < g.pixels ? window_start(g, start, p) : 0;
    }
    // A thread takes eight channels of every 64th pixel.
    const u32 group = (threadIdx.x & 3u) * 8;
#pragma unroll
    for (u32 i = 0; i < RUN / 64; ++i) {
      const u32 p = (threadIdx.x >> 2) + i * 64, pixel = start.first + p;
      uint4 q = make_uint4(0, 0, 0, 0);
      u32 x, y;
      const u32 n = divide(g.out_height, divide(g.out_width, min(pixel, g.pixels - 1), x), y);
      const T* from = at<T>(args.dy, n, (i32)y, (i32)x) + c0 + group;
      if (pixel < g.pixels && c0 + group < c_out) {
        if (args.vector != 0) {
          q = *reinterpret_cast<const uint4*>(from);
        } else {
          u32 h[8];
#pragma unroll
          for (u32 j = 0; j < 8; ++j) h[j] = c0 + group + j < c_out ? from[j].bits : 0;
          q = make_uint4(h[0] | h[1] << 16, h[2] | h[3] << 16, h[4] | h[5] << 16, h[6] | h[7] << 16);
        }
      }
      *reinterpret_cast<uint4*>(gradient + p * PITCH + group) = q;
    }
    __syncthreads();
#pragma unroll
    for (u32 step = 0; step < 2; ++step) {
      const u32 p0 = warp * 32 + step * 16;
      const uint2 first = *reinterpret_cast<const uint2*>(base + p0 + 2 * quad);
      const uint2 second = *reinterpret_cast<const uint2*>(base + p0 + 2 * quad + 8);
      u32 b[4][2];
#pragma unroll
      for (u32 j = 0; j < 4; ++j) {
        b[j][0] = (u32)lines[first.x + offset[j]] | (u32)lines[first.y + offset[j]] << 16;
        b[j][1] = (u32)lines[second.x + offset[j]] | (u32)lines[second.y + offset[j]] << 16;
      }
      const u16* from = gradient + (p0 + (lane >> 4) * 8 + (lane & 7u)) * PITCH + ((lane >> 3) & 1u) * 8;
#pragma unroll
      for (u32 m = 0; m < 2; ++m) {
        if (m == 1 && !both) continue;
        u32 a[4];
        ldmatrix_x4_trans(a, from + 16 * m);
#pragma unroll
        for (u32 j = 0; j < 4; ++j) mma_16x8x16(T{}, sums[m][j], a, b[j][0], b[j][1]);
      }
    }
  }

  __syncthreads();
#pragma unroll
  for (u32 m = 0; m < 2; ++m) {
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        const u32 channel = 16 * m + row + (i >> 1) * 8, number = 8 * j + 2 * quad + (i & 1u);
        board[(warp * 32 + number) * 33 + channel] = sums[m][j][i];
      }
    }
  }
  __syncthreads();
  float* out = reinterpret_cast<float*>(args.sums) + (u64)blockIdx.x * (3 * g.kernel * g.kernel) * c_out;
  for (u32 number = warp; number < 32; number += 8) {
    u32 to;
    float sum = 0.0f;
    for (u32 i = 0; i < 8; ++i) sum += board[(i * 32 + number) * 33 + lane];
    if (weight_row(g, k0 + number, to) && c0 + lane < c_out) out[to * c_out + c0 + lane] = sum * (1.0f / 255.0f);
  }
#endif
}

// ---- kernels ----------------------------------------------------------------------------------------------------

#define KERNELS(T, SUFFIX)                                                                  \
  KERNEL(conv2d_image_mma_forward_raw_##SUFFIX, ImageMmaArgs, 256) {                        \
    image_forward<T, ImageEpilogue::raw>(args);                                             \
  }                                                                                         \
  KERNEL(conv2d_image_mma_forward_stats_##SUFFIX, ImageMmaArgs, 256) {                      \
    image_forward<T, ImageEpilogue::stats>(args);                                           \
  }                                                                                         \
  KERNEL(conv2d_image_mma_forward_apply_##SUFFIX, ImageMmaArgs, 256) {                      \
    image_forward<T, ImageEpilogue::apply>(args);                                           \
  }                                                                                         \
  KERNEL(conv2d_image_mma_backward_weight_##SUFFIX, ImageMmaWeightArgs, 256) { image_backward_weight<T>(args); }

KERNELS(bf16, bf16)
KERNELS(f16, f16)
