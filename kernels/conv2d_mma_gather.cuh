// Convolution as a matrix product whose rows are gathered: any kernel and stride, forward and data gradient.
//
// forward:        y[m, o] = sum over taps (a, b) and channels c of x[pixel(m) * stride + (a, b) - pad, c] w[a, b, c, o]
// data gradient:  dx[m, c] = sum over taps and channels o of dy[(pixel(m) + pad - (a, b)) / stride, o] w[a, b, c, o]
//
// Inputs carry a border of zeros, so every read lies in memory and no edge is tested. Rows are the pixels
// (n, y, x) of the output in order; a row's piece of tap (a, b) lies at a fixed distance from its piece of tap
// (0, 0). K is flattened over taps and channels in groups of 8 numbers (16 bytes), 4 groups a step, so a step may
// span taps and only the very last one is padded with zeros. In the data gradient with stride s, the pixels fall
// into s * s classes by (y mod s, x mod s), each with its own taps; grid.z counts the classes, those with the most
// taps first.
//
// Work: 2 * rows * K * columns FLOP. Bytes: input and output once, if the taps of a pixel are found in L2 (each tap
// is a read through L2: so 3x3 kernels of stride 1 go to `conv2d_mma_patch.cuh`, which reads each pixel once);
// weights once for each row of tiles, from L2.
//
// Tiling: BM x BN outputs, 32 of K a step, a ring of STAGES steps filled by cp.async. Rows of 64 bytes in shared
// memory are swizzled (16-byte unit u of row r lies at u ^ (r / 2 % 4)); weights of the forward pass lie [k][n]
// with an odd pitch of 16-byte units: ldmatrix has no bank conflicts either way. A warp computes 32 x BN (BN <= 80)
// or 64 x BN/2. Column tiles of one row tile are neighbours in the grid, so they share the gathered rows in L2.
// The sum over K may be split over blocks (grid.y): see `conv_join_splits`.
#pragma once
#include "conv2d_mma.cuh"

#if __CUDA_ARCH__ >= 800 || defined(BOXWRIGHT_EMULATOR)

// Pitches count groups of 8 numbers.
struct ConvGatherArgs {
  ConvOutput out;
  u64 x;       // first pixel of the border of the input (of dy)
  u64 weight;  // [kernel][kernel][c_in][c_out]
  FastDivisor map_h, map_w;   // rows are numbered over this grid
  FastDivisor column_tiles;
  u32 image_pitch, row_pitch, pixel_pitch;  // of the input
  u32 border;                               // of the input
  u32 rows;
  u32 height, width;                        // of the output
  u32 kernel, stride, pad;
  u32 channel_groups;                       // of the input
  u32 steps_per_split;
};

// Taps of a class of pixels, and where the first one of row (0, 0) lies, in pixels from the border's first.
struct ConvTaps {
  u32 count_y, count_x, origin_y, origin_x;
  u32 weight_first, weight_step_y, weight_step_x;
};

template <bool BACKWARD> DEVI ConvTaps conv_taps(const ConvGatherArgs& args, u32 class_y, u32 class_x) {
  ConvTaps t;
  const u32 k = args.kernel;
  if (BACKWARD) {
    const u32 s = args.stride;
    const u32 a = (class_y + args.pad) % s, b = (class_x + args.pad) % s;
    t.count_y = a < k ? (k - a + s - 1) / s : 0;
    t.count_x = b < k ? (k - b + s - 1) / s : 0;
    t.origin_y = args.border + (class_y + args.pad) / s;
    t.origin_x = args.border + (class_x + args.pad) / s;
    t.weight_first = a * k + b, t.weight_step_y = s * k, t.weight_step_x = s;
  } else {
    t.count_y = k, t.count_x = k;
    t.origin_y = args.border - args.pad, t.origin_x = args.border - args.pad;
    t.weight_first = 0, t.weight_step_y = k, t.weight_step_x = 1;
  }
  return t;
}

// Fills the tables of the tile's rows.
template <bool BACKWARD, i32 BM, i32 THREADS>
DEVI void conv_gather_rows(const ConvGatherArgs& args, const ConvTaps& taps, u32 class_y, u32 class_x, u32 row0,
                           u32* row_in, u32* row_out, u32* row_residual) {
  const ConvOutput& o = args.out;
  for (u32 r = threadIdx.x; r < BM; r += THREADS) {
    u32 x, y;
    u32 n = divide(args.map_h, divide(args.map_w, row0 + r < args.rows ? row0 + r : 0, x), y);
    bool valid = row0 + r < args.rows;
    u32 out_y = y, out_x = x;
    if (BACKWARD) {
      out_y = y * args.stride + class_y, out_x = x * args.stride + class_x;
      valid = valid && out_y < args.height && out_x < args.width;
    }
    row_out[r] = valid ? n * o.image_pitch + out_y * o.row_pitch + out_x * o.pixel_pitch : CONV_NO_ROW;
    row_residual[r] = valid ? n * o.residual_image_pitch + out_y * o.residual_row_pitch + out_x * o.residual_pixel_pitch
                            : CONV_NO_ROW;
    // A row that is no pixel reads the first one; what it computes is dropped.
    if (!valid) n = 0, y = 0, x = 0;
    const u32 step = BACKWARD ? 1 : args.stride;
    row_in[r] = n * args.image_pitch + (y * step + taps.origin_y) * args.row_pitch +
                (x * step + taps.origin_x) * args.pixel_pitch;
  }
}

template <class T, bool BACKWARD, i32 BM, i32 BN, i32 WARPS_M, i32 WARPS_N, i32 STAGES>
DEVI void conv_gather(const ConvGatherArgs& args) {
  constexpr i32 THREADS = 32 * WARPS_M * WARPS_N, MT = BM / WARPS_M / 16, NT = BN / WARPS_N / 8;
  constexpr u32 B_PITCH = BACKWARD ? 64 : BN * 2 + 16;
  constexpr u32 A_BYTES = BM * 64, B_BYTES = (BACKWARD ? BN : 32) * B_PITCH, STAGE = A_BYTES + B_BYTES;
  constexpr i32 A_LOADS = BM * 4 / THREADS, B_GROUPS = BN / 8;
  constexpr i32 B_LOADS = (BN * 4 + THREADS - 1) / THREADS;
  DYN_SMEM(smem);
  __shared__ u32 row_in[BM], row_out[BM], row_residual[BM];
  const u32 tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const u32 warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
  u32 column_tile;
  const u32 row_tile = divide(args.column_tiles, blockIdx.x, column_tile);
  const u32 column0 = column_tile * BN;
  const u32 classes = BACKWARD ? args.stride * args.stride : 1;
  const u32 pixel_class = classes - 1 - blockIdx.z;
  const u32 class_y = BACKWARD ? pixel_class / args.stride : 0;
  const u32 class_x = BACKWARD ? pixel_class % args.stride : 0;
  const ConvTaps taps = conv_taps<BACKWARD>(args, class_y, class_x);
  conv_gather_rows<BACKWARD, BM, THREADS>(args, taps, class_y, class_x, row_tile * BM, row_in, row_out, row_residual);
  __syncthreads();

  // This thread's rows, and its group of the next step as (tap, group within the tap).
  const u32 unit = tid & 3;
  // With 128 accumulators a thread has no registers to keep the offsets of its rows in.
  constexpr bool LEAN = MT * NT >= 32;
  u32 offsets[A_LOADS];
#pragma unroll
  for (i32 i = 0; i < A_LOADS; ++i) offsets[i] = LEAN ? 0 : row_in[tid / 4 + i * (THREADS / 4)];
  const u32 groups = taps.count_y * taps.count_x * args.channel_groups;
  const u32 all_steps = (groups + 3) / 4;
  const u32 first = min(blockIdx.y * args.steps_per_split, all_steps);
  const u32 steps = min(all_steps - first, args.steps_per_split);
  u32 group = first * 4 + unit;
  const u32 tap = group / args.channel_groups;
  group -= tap * args.channel_groups;
  u32 tap_y = taps.count_x == 0 ? 0 : tap / taps.count_x;
  u32 tap_x = tap - tap_y * taps.count_x;
  const uint4* x = reinterpret_cast<const uint4*>(args.x);
  const uint4* weight = reinterpret_cast<const uint4*>(args.weight);

  auto load = [&](u32 step, u32 slot) {
    u8* a = smem + slot * STAGE;
    u8* b = a + A_BYTES;
    const bool live = tap_y < taps.count_y;
    u32 delta = tap_y * args.row_pitch + tap_x * args.pixel_pitch;
    if (BACKWARD) delta = 0u - delta;
    delta = live ? delta + group : 0;
#pragma unroll
    for (i32 i = 0; i < A_LOADS; ++i) {
      const u32 row = tid / 4 + i * (THREADS / 4);
      const u32 at = (LEAN ? row_in[row] : offsets[i]) + delta;
      cp_async16(a + row * 64 + ((unit ^ (row >> 1 & 3)) << 4), x + at, live);
    }
    if (BACKWARD) {
      const u32 weight_tap = taps.weight_first + tap_y * taps.weight_step_y + tap_x * taps.weight_step_x;
#pragma unroll
      for (i32 i = 0; i < B_LOADS; ++i) {
        const u32 row = tid / 4 + i * (THREADS / 4);
        if (BN * 4 % THREADS != 0 && row >= BN) continue;
        const bool valid = live && column0 + row < args.out.columns;
        const u64 at = (u64)(weight_tap * args.out.columns + column0 + row) * args.channel_groups + group;
        cp_async16(b + row * 64 + ((unit ^ (row >> 1 & 3)) << 4), weight + (valid ? at : 0), valid);
      }
    } else {
#pragma unroll
      for (i32 i = 0; i < B_LOADS; ++i) {
        const u32 index = tid + i * THREADS;
        if (BN * 4 % THREADS != 0 && index >= BN * 4) continue;
        const u32 k = index / B_GROUPS, n = index % B_GROUPS;
        const bool valid = (first + step) * 32 + k < groups * 8 && column0 + n * 8 < args.out.columns;
        const u64 at = (u64)((first + step) * 32 + k) * (args.out.columns / 8) + column0 / 8 + n;
        cp_async16(b + k * B_PITCH + n * 16, weight + (valid ? at : 0), valid);
      }
    }
    group += 4;
    while (group >= args.channel_groups) {
      group -= args.channel_groups;
      if (++tap_x >= taps.count_x) tap_x = 0, ++tap_y;
    }
  };

  // Addresses of this lane's rows for ldmatrix at k = 0; k = 16 is 32 bytes further, swizzled, and the next fragment a
  // fixed distance away, which the swizzle does not see.
  const u32 a_row = warp_m * MT * 16 + (lane & 15);
  const u32 a_at = a_row * 64 + (((lane >> 4) ^ (a_row >> 1 & 3)) << 4);
  const u32 b_row = warp_n * NT * 8 + (lane & 7) + (lane >> 4) * 8;
  const u32 b_at = A_BYTES + (BACKWARD ? b_row * 64 + (((lane >> 3 & 1) ^ (b_row >> 1 & 3)) << 4)
                                       : (lane & 15) * B_PITCH + (warp_n * NT * 8 + (lane >> 4) * 8) * 2);

  float acc[MT][NT][4];
  conv_clear(acc);
#pragma unroll
  for (i32 s = 0; s < STAGES - 1; ++s) {
    if (s < steps) load(s, s);
    cp_async_commit();
  }
  u32 slot = 0, next_slot = STAGES - 1;
  for (u32 step = 0; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < steps) load(step + STAGES - 1, next_slot);
    cp_async_commit();
    const u8* stage = smem + slot * STAGE;
#pragma unroll
    for (u32 k = 0; k < 2; ++k) {
      u32 a[MT][4];
#pragma unroll
      for (i32 i = 0; i < MT; ++i) ldmatrix_x4(a[i], stage + (a_at ^ (k << 5)) + i * 1024);
      conv_mma<T, MT, NT>(acc, a, [&](i32 j, u32(&b)[4]) {
        if (BACKWARD)
          ldmatrix_x4(b, stage + (b_at ^ (k << 5)) + j * 1024);
        else
          ldmatrix_x4_trans(b, stage + b_at + k * 16 * B_PITCH + j * 32);
      });
    }
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    next_slot = next_slot + 1 == STAGES ? 0 : next_slot + 1;
  }
  cp_async_wait<0>();
  __syncthreads();
  const ConvPlace place{warp_m * MT * 16 + (lane >> 2), warp_n * NT * 8 + 2 * (lane & 3), warp_m, WARPS_M};
  const u32 tile = blockIdx.z * gridDim.x + blockIdx.x;
  conv_finish<T, BM, BN, MT, NT, THREADS>(args.out, acc, place, tile, blockIdx.y, row_tile, column0, row_out,
                                          row_residual, min((u32)BM, args.rows - row_tile * BM), smem);
}

#endif
