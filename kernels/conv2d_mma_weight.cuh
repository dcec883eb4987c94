// Weight gradient on the tensor cores:
// dw[a, b, c, o] += sum over pixels (n, i, j) of x[n, i s + a - pad, j s + b - pad, c] dy[n, i, j, o].
//
// A matrix product whose inner dimension is the pixels: x and dy lie in shared memory [pixel][channel], and
// ldmatrix.trans makes fragments of both. Pixels are split over blocks (grid.y); each split leaves its sum in the
// workspace, laid out as dw, and `conv2d_weight_reduce` adds the splits to dw in order. With one split a block adds
// to dw itself. Splits depend on the shape and on the number of multiprocessors alone.
//
// Work: 2 * k * k * c_in * c_out FLOP a pixel; bytes: x and dy once, plus 8 * splits * k * k * c_in * c_out for the
// partial sums; through L2 x is read once for each tile of c_out and dy once for each tile of c_in.
//
//  * conv_weight_patch, 3x3: a block holds all nine taps of CI x CO channels in registers and goes over tiles of
//    TH x TW output pixels; x comes as a patch (as in `conv2d_mma_patch.cuh`), so a tap is a shifted view and x and
//    dy are loaded once for nine taps. Warps divide the taps (WT: by rows of the kernel), the columns (WCO) and,
//    where the channels are few, the pixels of a tile (WK; summed in order at the end). Two stages.
//  * conv_weight_tap, any kernel: one tap for each block, BM x BN channels, 3 or 4 stages of BK pixels, whose addresses
//    are computed once a step into a table.
#pragma once
#include "conv2d_mma.cuh"

#if __CUDA_ARCH__ >= 800 || defined(BOXWRIGHT_EMULATOR)

// Pitches count groups of 8 numbers.
struct ConvWeightArgs {
  u64 x;    // first pixel of the border of the input
  u64 dy;   // element (0, 0, 0, 0)
  u64 out;  // partial sums [splits][k][k][c_in][c_out], or dw
  FastDivisor map_h, map_w;              // of dy
  FastDivisor tiles_y, tiles_x, tile_w;  // patch: tiles of TH x TW pixels
  FastDivisor patch_w, co_tiles, ci_tiles;
  u32 row_pitch, pixel_pitch, padded_h, padded_w;  // of the input
  u32 dy_image_pitch, dy_row_pitch, dy_pixel_pitch;
  u32 first;                                       // padded row and column that tap (0, 0) of pixel (0, 0) reads
  u32 height, width;                               // of dy
  u32 tile_h, patch_pixels;
  u32 kernel, stride, c_in, c_out;
  u32 units, units_per_split;                      // patch: tiles; tap: steps of BK pixels
  u32 pixels;
  u32 add;                                         // `out` is dw: add to it
};

// Sums the accumulators of the warps that share a piece of the result; those of part 0 hold the sum, in order.
template <i32 WK, i32 WARPS, i32 MT, i32 NT>
DEVI void conv_weight_join(float (&acc)[MT][NT][4], u32 part, u32 piece, u8* smem) {
  float4* buffer = reinterpret_cast<float4*>(smem) + piece * (MT * NT * 32) + (threadIdx.x & 31);
  for (u32 w = 1; w < WK; ++w) {
    __syncthreads();
#pragma unroll
    for (i32 i = 0; i < MT; ++i) {
#pragma unroll
      for (i32 j = 0; j < NT; ++j) {
        if (part == w)
          buffer[(i * NT + j) * 32] = make_float4(acc[i][j][0], acc[i][j][1], acc[i][j][2], acc[i][j][3]);
      }
    }
    __syncthreads();
    if (part != 0) continue;
#pragma unroll
    for (i32 i = 0; i < MT; ++i) {
#pragma unroll
      for (i32 j = 0; j < NT; ++j) {
        const float4 v = buffer[(i * NT + j) * 32];
        acc[i][j][0] += v.x, acc[i][j][1] += v.y, acc[i][j][2] += v.z, acc[i][j][3] += v.w;
      }
    }
  }
}

// Writes or adds one 16x8 fragment of tap `tap`; (c, o) is the lane's first element.
DEVI void conv_weight_store(const ConvWeightArgs& args, float* out, const float (&v)[4], u32 tap, u32 c, u32 o) {
  if (o >= args.c_out) return;
#pragma unroll
  for (u32 h = 0; h < 2; ++h) {
    if (c + h * 8 >= args.c_in) continue;
    float* to = out + (u64)(tap * args.c_in + c + h * 8) * args.c_out + o;
    if (args.add) {
      to[0] += v[2 * h], to[1] += v[2 * h + 1];
    } else {
      *reinterpret_cast<float2*>(to) = make_float2(v[2 * h], v[2 * h + 1]);
    }
  }
}

DEVI float* conv_weight_out(const ConvWeightArgs& args) {
  return reinterpret_cast<float*>(args.out) +
         (u64)blockIdx.y * args.kernel * args.kernel * args.c_in * args.c_out;
}

#define CONV_WEIGHT_ROWS 128

template <class T, i32 CI, i32 CO, i32 WT, i32 WCO, i32 WK> DEVI void conv_weight_patch(const ConvWeightArgs& args) {
  constexpr i32 THREADS = 32 * WT * WCO * WK, TAPS = 9 / WT, CT = CI / 16, MT = TAPS * CT, NT = CO / WCO / 8;
  constexpr u32 X_PITCH = CI * 2 + 16, Y_PITCH = CO * 2 + 16, Y_BYTES = CONV_WEIGHT_ROWS * Y_PITCH;
  constexpr u32 X_GROUPS = CI / 8, Y_GROUPS = CO / 8;
  DYN_SMEM(smem);
  __shared__ u32 patch_at[CONV_WEIGHT_ROWS], tile_y[CONV_WEIGHT_ROWS], tile_x[CONV_WEIGHT_ROWS];
  const u32 tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const u32 wt = warp % WT, wco = warp / WT % WCO, wk = warp / (WT * WCO);
  u32 co_tile;
  const u32 ci_tile = divide(args.co_tiles, blockIdx.x, co_tile);
  const u32 group_in0 = ci_tile * X_GROUPS, group_out0 = co_tile * Y_GROUPS;
  const u32 patch_bytes = (args.patch_pixels * X_PITCH + 127) & ~127u, stage_bytes = patch_bytes + Y_BYTES;
  const u32 rows = args.tile_h * args.tile_w.divisor;
  for (u32 r = tid; r < CONV_WEIGHT_ROWS; r += THREADS) {
    u32 x;
    const u32 y = divide(args.tile_w, r, x);
    patch_at[r] = r < rows ? (y * args.patch_w.divisor + x) * args.stride * X_PITCH : 0;
    tile_y[r] = r < rows ? y : 0x40000000u, tile_x[r] = x;
  }
  __syncthreads();
  const uint4* x = reinterpret_cast<const uint4*>(args.x);
  const uint4* dy = reinterpret_cast<const uint4*>(args.dy);

  auto load = [&](u32 tile, u32 slot) {
    u8* to_x = smem + slot * stage_bytes;
    u8* to_y = to_x + patch_bytes;
    u32 column, row;
    const u32 n = divide(args.tiles_y, divide(args.tiles_x, tile, column), row);
    const u32 y0 = row * args.tile_h, x0 = column * args.tile_w.divisor;
    for (u32 i = tid; i < args.patch_pixels * X_GROUPS; i += THREADS) {
      const u32 pixel = i / X_GROUPS, group = i % X_GROUPS;
      u32 px;
      const u32 py = divide(args.patch_w, pixel, px);
      // Pixels beyond the border meet a gradient of zero: any finite number will do.
      const u32 in_y = min(y0 * args.stride + args.first + py, args.padded_h - 1);
      const u32 in_x = min(x0 * args.stride + args.first + px, args.padded_w - 1);
      const bool valid = (group_in0 + group) * 8 < args.c_in;
      const u64 at = (u64)(n * args.padded_h + in_y) * args.row_pitch + in_x * args.pixel_pitch +
                     (valid ? group_in0 + group : 0);
      cp_async16(to_x + pixel * X_PITCH + group * 16, x + at, valid);
    }
    for (u32 i = tid; i < CONV_WEIGHT_ROWS * Y_GROUPS; i += THREADS) {
      const u32 r = i / Y_GROUPS, group = i % Y_GROUPS;
      const u32 out_y = y0 + tile_y[r], out_x = x0 + tile_x[r];
      const bool valid =
          out_y < args.height && out_x < args.width && (group_out0 + group) * 8 < args.c_out;
      const u64 at = (u64)n * args.dy_image_pitch + out_y * args.dy_row_pitch + out_x * args.dy_pixel_pitch +
                     group_out0 + group;
      cp_async16(to_y + r * Y_PITCH + group * 16, dy + (valid ? at : 0), valid);
    }
  };

  float acc[MT][NT][4];
  conv_clear(acc);
  const u32 first = blockIdx.y * args.units_per_split;
  const u32 last = min(first + args.units_per_split, args.units);
  const u32 inner = (rows + 15) / 16;
  if (first < last) load(first, 0);
  cp_async_commit();
  for (u32 tile = first; tile < last; ++tile) {
    const u32 slot = (tile - first) & 1;
    cp_async_wait<0>();
    __syncthreads();
    if (tile + 1 < last) load(tile + 1, slot ^ 1);
    cp_async_commit();
    const u8* patch = smem + slot * stage_bytes;
    const u8* gradient = patch + patch_bytes + (lane & 15) * Y_PITCH + (wco * NT * 8 + (lane >> 4) * 8) * 2;
#pragma unroll 1
    for (u32 k = wk; k < inner; k += WK) {
      u32 fb[NT / 2][4];
#pragma unroll
      for (i32 j = 0; j < NT / 2; ++j) ldmatrix_x4_trans(fb[j], gradient + k * 16 * Y_PITCH + j * 32);
      const u8* rows_x = patch + patch_at[k * 16 + (lane & 7) + (lane >> 4) * 8] + (lane >> 3 & 1) * 16;
#pragma unroll
      for (i32 t = 0; t < TAPS; ++t) {
        const u32 a = WT == 3 ? wt : t / 3, b = t % 3;
        const u8* shifted = rows_x + (a * args.patch_w.divisor + b) * X_PITCH;
#pragma unroll
        for (i32 c = 0; c < CT; ++c) {
          u32 fa[4];
          ldmatrix_x4_trans(fa, shifted + c * 32);
#pragma unroll
          for (i32 j = 0; j < NT / 2; ++j) {
            mma_16x8x16(T{}, acc[t * CT + c][2 * j], fa, fb[j][0], fb[j][1]);
            mma_16x8x16(T{}, acc[t * CT + c][2 * j + 1], fa, fb[j][2], fb[j][3]);
          }
        }
      }
    }
  }
  cp_async_wait<0>();
  if (WK > 1) conv_weight_join<WK, WT * WCO>(acc, wk, warp % (WT * WCO), smem);
  if (wk != 0) return;
  float* out = conv_weight_out(args);
#pragma unroll
  for (i32 i = 0; i < MT; ++i) {
    const u32 tap = wt * TAPS + i / CT, c = ci_tile * CI + i % CT * 16 + (lane >> 2);
#pragma unroll
    for (i32 j = 0; j < NT; ++j)
      conv_weight_store(args, out, acc[i][j], tap, c, co_tile * CO + (wco * NT + j) * 8 + 2 * (lane & 3));
  }
}

template <class T, i32 BM, i32 BN, i32 BK, i32 WARPS_M, i32 WARPS_N, i32 WK, i32 STAGES>
DEVI void conv_weight_tap(const ConvWeightArgs& args) {
  constexpr i32 THREADS = 32 * WARPS_M * WARPS_N * WK, MT = BM / WARPS_M / 16, NT = BN / WARPS_N / 8;
  constexpr u32 X_PITCH = BM * 2 + 16, Y_PITCH = BN * 2 + 16, X_BYTES = BK * X_PITCH, STAGE = X_BYTES + BK * Y_PITCH;
  constexpr u32 X_GROUPS = BM / 8, Y_GROUPS = BN / 8;
  DYN_SMEM(smem);
  __shared__ u32 in_at[2 * BK], out_at[2 * BK];
  const u32 tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const u32 warp_m = warp % WARPS_M, warp_n = warp / WARPS_M % WARPS_N, wk = warp / (WARPS_M * WARPS_N);
  u32 co_tile, ci_tile;
  const u32 tap = divide(args.ci_tiles, divide(args.co_tiles, blockIdx.x, co_tile), ci_tile);
  const u32 group_in0 = ci_tile * X_GROUPS, group_out0 = co_tile * Y_GROUPS;
  const u32 tap_y = tap / args.kernel + args.first, tap_x = tap % args.kernel + args.first;
  const uint4* x = reinterpret_cast<const uint4*>(args.x);
  const uint4* dy = reinterpret_cast<const uint4*>(args.dy);

  // Where the pixels of a step lie.
  auto place = [&](u32 step) {
    if (tid >= BK) return;
    const u32 m = step * BK + tid, slot = (step & 1) * BK + tid;
    u32 px, py;
    const u32 n = divide(args.map_h, divide(args.map_w, m < args.pixels ? m : 0, px), py);
    in_at[slot] = (n * args.padded_h + py * args.stride + tap_y) * args.row_pitch +
                  (px * args.stride + tap_x) * args.pixel_pitch;
    out_at[slot] = m < args.pixels ? n * args.dy_image_pitch + py * args.dy_row_pitch + px * args.dy_pixel_pitch
                                   : CONV_NO_ROW;
  };
  auto load = [&](u32 step, u32 slot) {
    u8* to = smem + slot * STAGE;
    const u32 table = (step & 1) * BK;
#pragma unroll
    for (u32 i = tid; i < BK * X_GROUPS; i += THREADS) {
      const u32 r = i / X_GROUPS, group = i % X_GROUPS;
      const bool valid = (group_in0 + group) * 8 < args.c_in && out_at[table + r] != CONV_NO_ROW;
      cp_async16(to + r * X_PITCH + group * 16, x + (valid ? in_at[table + r] + group_in0 + group : 0), valid);
    }
#pragma unroll
    for (u32 i = tid; i < BK * Y_GROUPS; i += THREADS) {
      const u32 r = i / Y_GROUPS, group = i % Y_GROUPS;
      const bool valid = (group_out0 + group) * 8 < args.c_out && out_at[table + r] != CONV_NO_ROW;
      cp_async16(to + X_BYTES + r * Y_PITCH + group * 16, dy + (valid ? out_at[table + r] + group_out0 + group : 0),
                 valid);
    }
  };

  float acc[MT][NT][4];
  conv_clear(acc);
  const u32 first = blockIdx.y * args.units_per_split;
  const u32 last = min(first + args.units_per_split, args.units);
  // The table of a step is written one turn before its loads are issued, over the one of two steps earlier.
#pragma unroll
  for (u32 s = 0; s < STAGES - 1; ++s) {
    place(first + s);
    __syncthreads();
    if (first + s < last) load(first + s, s);
    cp_async_commit();
  }
  place(first + STAGES - 1);
  u32 slot = 0, next_slot = STAGES - 1;
  for (u32 step = first; step < last; ++step) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < last) load(step + STAGES - 1, next_slot);
    cp_async_commit();
    place(step + STAGES);
    const u8* rows_x = smem + slot * STAGE + ((lane & 7) + (lane >> 4) * 8) * X_PITCH +
                       (warp_m * MT * 16 + (lane >> 3 & 1) * 8) * 2;
    const u8* rows_y =
        smem + slot * STAGE + X_BYTES + (lane & 15) * Y_PITCH + (warp_n * NT * 8 + (lane >> 4) * 8) * 2;
#pragma unroll
    for (u32 k = 0; k < BK / 16 / WK; ++k) {
      const u32 row = (k * WK + wk) * 16;
      u32 fa[MT][4];
#pragma unroll
      for (i32 i = 0; i < MT; ++i) ldmatrix_x4_trans(fa[i], rows_x + row * X_PITCH + i * 32);
      conv_mma<T, MT, NT>(
          acc, fa, [&](i32 j, u32(&fb)[4]) { ldmatrix_x4_trans(fb, rows_y + row * Y_PITCH + j * 32); });
    }
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    next_slot = next_slot + 1 == STAGES ? 0 : next_slot + 1;
  }
  cp_async_wait<0>();
  if (WK > 1) conv_weight_join<WK, WARPS_M * WARPS_N>(acc, wk, warp % (WARPS_M * WARPS_N), smem);
  if (wk != 0) return;
  float* out = conv_weight_out(args);
#pragma unroll
  for (i32 i = 0; i < MT; ++i) {
#pragma unroll
    for (i32 j = 0; j < NT; ++j)
      conv_weight_store(args, out, acc[i][j], tap, ci_tile * BM + (warp_m * MT + i) * 16 + (lane >> 2),
                        co_tile * BN + (warp_n * NT + j) * 8 + 2 * (lane & 3));
  }
}

// dw[i] += sum over splits s of partial[s][i], i < len (a multiple of 4). 32 / lanes groups of 4 numbers a warp; the
// lanes of a group take every lanes-th split and are summed in order of the lane. Bound by memory: 4 bytes a partial.
struct ConvWeightReduceArgs {
  u64 partials, out;
  u32 len, splits;
  u32 lanes;  // 1, 2, 4, ... 32
  u32 reserved;
};

DEVI void conv_weight_reduce(const ConvWeightReduceArgs& args) {
  __shared__ float4 sums[256];
  const u32 tid = threadIdx.x, groups = 256 / args.lanes;
  const u32 part = tid / groups, group = blockIdx.x * groups + tid % groups;
  const bool live = group * 4 < args.len;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (live) {
    const float4* from = reinterpret_cast<const float4*>(args.partials) + group;
#pragma unroll 4
    for (u32 s = part; s < args.splits; s += args.lanes) {
      const float4 v = from[(u64)s * (args.len / 4)];
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
  }
  sums[tid] = sum;
  __syncthreads();
  if (!live || part != 0) return;
  for (u32 p = 1; p < args.lanes; ++p) {
    const float4 v = sums[p * groups + tid];
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  float* out = reinterpret_cast<float*>(args.out) + group * 4;
  out[0] += sum.x, out[1] += sum.y, out[2] += sum.z, out[3] += sum.w;
}

#endif
