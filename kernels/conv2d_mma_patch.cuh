// 3x3 convolution whose input patch is read once: forward at any stride, data gradient at stride 1.
//
// forward:        y[n, i, j, o] = sum over a, b, c of x[n, i s + a - pad, j s + b - pad, c] w[a, b, c, o]
// data gradient:  dx[n, i, j, c] = sum over a, b, o of dy[n, i + pad - a, j + pad - b, o] w[a, b, c, o]: the same sum
//                 over a patch of dy with the kernel turned round.
//
// Why: gathered row by row (`conv2d_mma_gather.cuh`), a 3x3 kernel reads every pixel nine times through L2, and with
// few channels that, not memory, is the limit: 16 -> 16 channels need 64 bytes of memory for a pixel, and 320 of L2.
// Here a block loads the patch of pixels under its tile, 16 channels at a time, and the nine taps are nine shifted
// views of it: the rows of an ldmatrix may lie anywhere. A 16x16 tile reads 1.27 pixels for each one it writes.
//
// Work: 2 * 9 * c_in * c_out FLOP a pixel; bytes: input 1.2 to 2.3 times (from L2), output once, weights once a tile.
//
// Tiles are either TH x TW pixels that divide the map exactly or partly, or (`run`) BM consecutive pixels of the
// numbering (n, y, x), whose patch is a run of whole padded rows: small maps then waste no rows. Pixels lie in shared
// memory 48 bytes apart (32 of numbers): an odd pitch of 16-byte units, so eight neighbours have no bank conflict at
// stride 1, and pairs of them one at stride 2. A step is one row of the kernel: three taps of 16 channels, K = 48;
// weights of the steps pass through a ring of STAGES, the patches of 16 channels through one of two. A block of the
// grid's y takes some of the channels when the sum is split (`conv_join_splits`).
#pragma once
#include "conv2d_mma.cuh"

#if __CUDA_ARCH__ >= 800 || defined(BOXWRIGHT_EMULATOR)

// Pitches count groups of 8 numbers; padded rows and columns count from the border's first.
struct ConvPatchArgs {
  ConvOutput out;
  u64 x;       // first pixel of the border of the input (of dy)
  u64 weight;  // [3][3][c_in][c_out]
  FastDivisor map_h, map_w;             // of the output
  FastDivisor tiles_y, tiles_x, tile_w;  // tiles of TH x TW pixels
  FastDivisor patch_w, column_tiles;
  u32 row_pitch, pixel_pitch;           // of the input
  u32 padded_h, padded_w, images;       // of the input
  u32 first;                            // padded row and column that tap (0, 0) of pixel (0, 0) reads
  u32 rows;                             // pixels of the output
  u32 height, width, tile_h, stride, run;
  u32 patch_pixels;
  u32 channel_groups, chunks, chunks_per_split;  // groups of 8 and of 16 channels of the input
};

#define CONV_PATCH_PITCH 48u

// Where a tile lies.
struct ConvPatchTile {
  u32 n, y, x;           // first pixel; n * height + y and x where the tile is a run
  u32 row0, column0;     // first padded row (over all images) and column of the patch
  u32 last_row;          // last padded row that may be read
};

DEVI ConvPatchTile conv_patch_tile(const ConvPatchArgs& args, u32 tile, u32 rows_per_tile) {
  ConvPatchTile t;
  if (args.run) {
    t.y = divide(args.map_w, tile * rows_per_tile, t.x);
    u32 y;
    t.n = divide(args.map_h, t.y, y);
    t.row0 = t.n * args.padded_h + y * args.stride + args.first;
    t.column0 = args.first;
    t.last_row = args.images * args.padded_h - 1;
  } else {
    u32 tile_x, tile_y;
    t.n = divide(args.tiles_y, divide(args.tiles_x, tile, tile_x), tile_y);
    t.y = tile_y * args.tile_h, t.x = tile_x * args.tile_w.divisor;
    t.row0 = t.n * args.padded_h + t.y * args.stride + args.first;
    t.column0 = t.x * args.stride + args.first;
    t.last_row = (t.n + 1) * args.padded_h - 1;
  }
  return t;
}

// Fills the tables: offset in bytes of each row's pixel in the patch, and where it goes.
template <i32 BM, i32 THREADS>
DEVI void conv_patch_rows(const ConvPatchArgs& args, const ConvPatchTile& t, u32 tile, u32* row_in, u32* row_out,
                          u32* row_residual) {
  const ConvOutput& o = args.out;
  for (u32 r = threadIdx.x; r < BM; r += THREADS) {
    u32 n, y, x, in;
    bool valid;
    if (args.run) {
      valid = tile * BM + r < args.rows;
      n = divide(args.map_h, divide(args.map_w, valid ? tile * BM + r : 0, x), y);
      const u32 row = n * args.padded_h + y * args.stride + args.first - t.row0;
      in = row * args.patch_w.divisor + x * args.stride;
    } else {
      u32 dx;
      const u32 dy = divide(args.tile_w, r, dx);
      n = t.n, y = t.y + dy, x = t.x + dx;
      valid = dy < args.tile_h && y < args.height && x < args.width;
      in = dy * args.stride * args.patch_w.divisor + dx * args.stride;
      if (dy >= args.tile_h) in = 0;
    }
    row_in[r] = args.run && !valid ? 0 : in * CONV_PATCH_PITCH;
    row_out[r] = valid ? n * o.image_pitch + y * o.row_pitch + x * o.pixel_pitch : CONV_NO_ROW;
    row_residual[r] =
        valid ? n * o.residual_image_pitch + y * o.residual_row_pitch + x * o.residual_pixel_pitch : CONV_NO_ROW;
  }
}

template <class T, bool BACKWARD, i32 BM, i32 BN, i32 WARPS_M, i32 WARPS_N>
DEVI void conv_patch(const ConvPatchArgs& args) {
  constexpr i32 THREADS = 32 * WARPS_M * WARPS_N, MT = BM / WARPS_M / 16, NT = BN / WARPS_N / 8, STAGES = 3;
  // Weights of a step: forward [48 of k][BN], data gradient [BN][48 of k].
  constexpr u32 B_PITCH = BACKWARD ? 112 : BN * 2 + 16, B_BYTES = (BACKWARD ? BN : 48) * B_PITCH;
  constexpr i32 B_GROUPS = BN / 8;
  constexpr i32 B_COPIES = BN * 6, B_LOADS = (B_COPIES + THREADS - 1) / THREADS;
  DYN_SMEM(smem);
  __shared__ u32 row_in[BM], row_out[BM], row_residual[BM];
  const u32 tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const u32 warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
  u32 column_tile;
  const u32 tile = divide(args.column_tiles, blockIdx.x, column_tile);
  const u32 column0 = column_tile * BN;
  // Where the patch lies, kept in shared memory: registers are scarce.
  __shared__ u32 patch_row0, patch_column0, patch_last_row;
  {
    const ConvPatchTile place = conv_patch_tile(args, tile, BM);
    conv_patch_rows<BM, THREADS>(args, place, tile, row_in, row_out, row_residual);
    if (tid == 0) patch_row0 = place.row0, patch_column0 = place.column0, patch_last_row = place.last_row;
  }
  __syncthreads();

  const u32 first_chunk = blockIdx.y * args.chunks_per_split;
  const u32 chunks = min(args.chunks - min(args.chunks, first_chunk), args.chunks_per_split);
  const u32 steps = chunks * 3;
  const u32 patch_bytes = (args.patch_pixels * CONV_PATCH_PITCH + 127) & ~127u;
  u8* patches = smem + STAGES * B_BYTES;
  const uint4* x = reinterpret_cast<const uint4*>(args.x);
  const uint4* weight = reinterpret_cast<const uint4*>(args.weight);
  const u32 columns = args.out.columns;

  auto load_patch = [&](u32 chunk, u32 slot) {
    u8* to = patches + slot * patch_bytes;
    for (u32 i = tid; i < args.patch_pixels * 2; i += THREADS) {
      const u32 pixel = i >> 1, half = i & 1, group = chunk * 2 + half;
      u32 dx;
      const u32 dy = divide(args.patch_w, pixel, dx);
      // Pixels beyond the border are under rows that are dropped: any number will do.
      const u32 row = min(patch_row0 + dy, patch_last_row);
      const u32 column = min(patch_column0 + dx, args.padded_w - 1);
      const bool valid = group < args.channel_groups;
      const u64 at = (u64)row * args.row_pitch + column * args.pixel_pitch + (valid ? group : 0);
      cp_async16(to + pixel * CONV_PATCH_PITCH + half * 16, x + at, valid);
    }
  };
  auto load_weights = [&](u32 chunk, u32 a, u32 slot) {
    u8* to = smem + slot * B_BYTES;
#pragma unroll
    for (i32 i = 0; i < B_LOADS; ++i) {
      const u32 index = tid + i * THREADS;
      if (B_COPIES % THREADS != 0 && index >= B_COPIES) continue;
      if (BACKWARD) {
        const u32 n = index / 6, b = index % 6 / 2, half = index % 2, group = chunk * 2 + half;
        const bool valid = column0 + n < columns && group < args.channel_groups;
        const u64 at = (u64)((8 - a * 3 - b) * columns + column0 + n) * args.channel_groups + group;
        cp_async16(to + n * B_PITCH + b * 32 + half * 16, weight + (valid ? at : 0), valid);
      } else {
        const u32 k = index / B_GROUPS, n = index % B_GROUPS, channel = chunk * 16 + k % 16;
        const bool valid = channel < args.channel_groups * 8 && column0 + n * 8 < columns;
        const u64 at = (u64)((a * 3 + k / 16) * args.channel_groups * 8 + channel) * (columns / 8) + column0 / 8 + n;
        cp_async16(to + k * B_PITCH + n * 16, weight + (valid ? at : 0), valid);
      }
    }
  };
  // The next step to load: chunk and row of the kernel.
  u32 load_chunk = 0, load_a = 0;
  auto load = [&](u32 slot) {
    if (load_a == 0) load_patch(first_chunk + load_chunk, load_chunk & 1);
    load_weights(first_chunk + load_chunk, load_a, slot);
    if (++load_a == 3) load_a = 0, ++load_chunk;
  };

  float acc[MT][NT][4];
  conv_clear(acc);
#pragma unroll
  for (i32 s = 0; s < STAGES - 1; ++s) {
    if (s < steps) load(s);
    cp_async_commit();
  }
  u32 a_at[MT];
#pragma unroll
  for (i32 i = 0; i < MT; ++i) a_at[i] = row_in[(warp_m * MT + i) * 16 + (lane & 15)] + (lane >> 4) * 16;
  const u32 b_at = BACKWARD ? (warp_n * NT * 8 + (lane & 7) + (lane >> 4) * 8) * B_PITCH + (lane >> 3 & 1) * 16
                            : (lane & 15) * B_PITCH + (warp_n * NT * 8 + (lane >> 4) * 8) * 2;
  u32 slot = 0, next_slot = STAGES - 1, a = 0, chunk = 0;
  for (u32 step = 0; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < steps) load(next_slot);
    cp_async_commit();
    const u8* patch = patches + (chunk & 1) * patch_bytes + a * args.patch_w.divisor * CONV_PATCH_PITCH;
    const u8* weights = smem + slot * B_BYTES;
#pragma unroll
    for (u32 b = 0; b < 3; ++b) {
      u32 fa[MT][4];
#pragma unroll
      for (i32 i = 0; i < MT; ++i) ldmatrix_x4(fa[i], patch + a_at[i] + b * CONV_PATCH_PITCH);
      conv_mma<T, MT, NT>(acc, fa, [&](i32 j, u32(&fb)[4]) {
        if (BACKWARD)
          ldmatrix_x4(fb, weights + b_at + j * 16 * B_PITCH + b * 32);
        else
          ldmatrix_x4_trans(fb, weights + b_at + j * 32 + b * 16 * B_PITCH);
      });
    }
    if (++a == 3) a = 0, ++chunk;
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    next_slot = next_slot + 1 == STAGES ? 0 : next_slot + 1;
  }
  cp_async_wait<0>();
  __syncthreads();
  const ConvPlace fragment{warp_m * MT * 16 + (lane >> 2), warp_n * NT * 8 + 2 * (lane & 3), warp_m, WARPS_M};
  const u32 full = args.tile_h * args.tile_w.divisor;
  const u32 valid_rows = args.run ? min((u32)BM, args.rows - tile * BM) : full;
  conv_finish<T, BM, BN, MT, NT, THREADS>(args.out, acc, fragment, blockIdx.x, blockIdx.y, tile, column0, row_out,
                                          row_residual, valid_rows, smem);
}

#endif
