// Convolution on Hopper's warpgroups: forward at any stride, data gradient at stride 1, any kernel.
//
// forward:        y[m, o] = sum over taps (a, b) and channels c of x[pixel(m) * stride + (a, b) - pad, c] w[a, b, c, o]
// data gradient:  dx[m, c] = sum over taps and channels o of dy[pixel(m) + pad - (a, b), o] w[a, b, c, o]: the same sum
//                 with the kernel turned round and its other side contracted.
//
// A matrix product whose rows the copy engine gathers: a step is one tap and 64 channels, and its rows are a box of the
// map shifted by the tap. Elements outside of the map or of its channels arrive as zeros, so no border is read, and
// no edge or tail is tested. Tiles are TH x TW pixels (a box of a tiled map), or (`run`) BM consecutive pixels of the
// numbering (n, y, x) (im2col mode): small maps then waste no rows, and any stride will do.
//
// Work: 2 * pixels * taps * c_in * c_out FLOP. Bytes: input and output once from memory, if the taps of a tile find it
// in L2; through L2, (BM + BN) * 128 bytes for each step of BM * BN * 64 products: 48 bytes a cycle at full speed for the
// largest tiles. So large tiles, and two blocks on a multiprocessor for the small ones.
//
// Tiling: two groups of four warps compute BM / 2 rows each, as MT products of 64 rows (wgmma, both sides in shared
// memory, sums in registers); a ninth warp issues the copies, STAGES steps ahead. `full` barriers count bytes, `empty`
// ones the eight warps that are done with a stage; a stage is given back when the products of the next one have been
// issued. Both sides lie in shared memory as the copy engine writes them with 128-byte swizzle: pixels [row][64 of k]
// (K-major); weights of the forward pass [64 of k][64 columns] for each 64 columns (MN-major: they lie [k][n] in memory),
// those of the data gradient [column][64 of k] (K-major).
//
// The tile is finished as on other chips (`conv_finish`). That code numbers the rows of a warp's fragments in a row; here
// fragment i of a warp lies 64 rows further than fragment 0, which the tables of rows make good.
#pragma once
#include "conv2d_mma.cuh"
#include "ptx_sm90.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(BOXWRIGHT_EMULATOR)

// 512 bytes, aligned to 128 for the maps.
struct ConvWgmmaArgs {
  TensorMap x;       // (c, x, y, n) without border; box 64 x TW x TH x 1, or 64 channels of BM pixels
  TensorMap weight;  // (c_out, c_in, taps); box 64 x 64, or 64 x BN in the data gradient
  ConvOutput out;
  FastDivisor map_h, map_w;              // of the output
  FastDivisor tiles_y, tiles_x, tile_w;  // tiles of TH x TW pixels
  FastDivisor column_tiles;
  u32 rows;           // pixels of the output
  u32 height, width;  // of the output
  u32 tile_h, stride, run;
  u32 box_bytes;      // of the pixels of a step
  i32 first;          // row and column that tap (0, 0) of pixel (0, 0) reads
  u32 kernel;
  u32 steps, steps_per_split;
  u32 reserved[5];
};

#define CONV_WGMMA_CONSUMERS 256
#define CONV_WGMMA_THREADS 288

// First pixel of a tile.
struct ConvWgmmaTile {
  u32 n, y, x;
};

DEVI ConvWgmmaTile conv_wgmma_tile(const ConvWgmmaArgs& args, u32 tile, u32 rows_per_tile) {
  ConvWgmmaTile t;
  if (args.run) {
    t.n = divide(args.map_h, divide(args.map_w, tile * rows_per_tile, t.x), t.y);
  } else {
    u32 tile_x, tile_y;
    t.n = divide(args.tiles_y, divide(args.tiles_x, tile, tile_x), tile_y);
    t.y = tile_y * args.tile_h, t.x = tile_x * args.tile_w.divisor;
  }
  return t;
}

// Fills the tables: where the rows of the tile go, in the order in which `conv_finish` numbers them.
template <i32 BM, i32 MT>
DEVI void conv_wgmma_rows(const ConvWgmmaArgs& args, const ConvWgmmaTile& t, u32 tile, u32* row_out, u32* row_residual) {
  const ConvOutput& o = args.out;
  for (u32 slot = threadIdx.x; slot < BM; slot += CONV_WGMMA_THREADS) {
    // Slots: group, warp, fragment, row of 16; rows of the product: group, fragment, warp, row of 16.
    const u32 group = slot / (64 * MT), warp = slot / (16 * MT) % 4, fragment = slot / 16 % MT;
    const u32 r = (group * MT + fragment) * 64 + warp * 16 + slot % 16;
    u32 n, y, x;
    bool valid;
    if (args.run) {
      valid = tile * BM + r < args.rows;
      n = divide(args.map_h, divide(args.map_w, valid ? tile * BM + r : 0, x), y);
    } else {
      u32 dx;
      const u32 dy = divide(args.tile_w, r, dx);
      n = t.n, y = t.y + dy, x = t.x + dx;
      valid = dy < args.tile_h && y < args.height && x < args.width;
    }
    row_out[slot] = valid ? n * o.image_pitch + y * o.row_pitch + x * o.pixel_pitch : CONV_NO_ROW;
    row_residual[slot] =
        valid ? n * o.residual_image_pitch + y * o.residual_row_pitch + x * o.residual_pixel_pitch : CONV_NO_ROW;
  }
}

// The ninth warp, one lane of it: copies of all steps.
template <bool BACKWARD, i32 BM, i32 BN, i32 STAGES>
DEVI void conv_wgmma_load(const ConvWgmmaArgs& args, const ConvWgmmaTile& t, u32 column0, u32 first, u32 steps, u8* smem,
                          u64* full, u64* empty) {
  constexpr u32 A_BYTES = BM * 128, STAGE = A_BYTES + BN * 128;
  const u32 taps = args.kernel * args.kernel;
  const i32 x = (i32)(t.x * args.stride) + args.first, y = (i32)(t.y * args.stride) + args.first;
  // Channels outside, taps inside: the nine reads of a pixel follow each other closely.
  i32 channel = (i32)(first / taps * 64);
  u32 tap = first % taps, a = tap / args.kernel, b = tap % args.kernel;
  u32 slot = 0, parity = 1;
  for (u32 step = 0; step < steps; ++step) {
    u8* to = smem + slot * STAGE;
    u64* barrier = full + slot;
    mbarrier_wait(empty + slot, parity);
    mbarrier_arrive_expect(barrier, args.box_bytes + BN * 128);
    if (args.run)
      tensor_load_pixels(to, args.x, barrier, channel, x, y, (i32)t.n, b, a);
    else
      tensor_load_4d(to, args.x, barrier, channel, x + (i32)b, y + (i32)a, (i32)t.n);
    if (BACKWARD) {
      tensor_load_3d(to + A_BYTES, args.weight, barrier, channel, (i32)column0, (i32)(taps - 1 - tap));
    } else {
#pragma unroll
      for (i32 j = 0; j < BN / 64; ++j)
        tensor_load_3d(to + A_BYTES + j * 8192, args.weight, barrier, (i32)column0 + j * 64, channel, (i32)tap);
    }
    ++tap;
    if (++b == args.kernel) b = 0, ++a;
    if (tap == taps) tap = 0, a = 0, channel += 64;
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
}

template <class T, bool BACKWARD, i32 BM, i32 BN, i32 STAGES> DEVI void conv_wgmma(const ConvWgmmaArgs& args) {
  constexpr i32 MT = BM / 128, NT = BN / 8;
  constexpr u32 A_BYTES = BM * 128, STAGE = A_BYTES + BN * 128;
  DYN_SMEM(smem);
  __shared__ u64 full[STAGES], empty[STAGES];
  __shared__ u32 row_out[BM], row_residual[BM];
  const u32 tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  u32 column_tile;
  const u32 tile = divide(args.column_tiles, blockIdx.x, column_tile);
  const u32 column0 = column_tile * BN;
  const ConvWgmmaTile place = conv_wgmma_tile(args, tile, BM);
  const u32 first = min(blockIdx.y * args.steps_per_split, args.steps);
  const u32 steps = min(args.steps - first, args.steps_per_split);
  if (tid == CONV_WGMMA_CONSUMERS) {
    tensor_map_prefetch(args.x);
    tensor_map_prefetch(args.weight);
    for (i32 i = 0; i < STAGES; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, CONV_WGMMA_CONSUMERS / 32);
    }
    mbarrier_init_fence();
  }
  conv_wgmma_rows<BM, MT>(args, place, tile, row_out, row_residual);
  __syncthreads();
  if (tid >= CONV_WGMMA_CONSUMERS) {
    if (lane == 0)
      conv_wgmma_load<BACKWARD, BM, BN, STAGES>(args, place, column0, first, steps, smem, full, empty);
    return;
  }

  float acc[MT][NT][4];
  conv_clear(acc);
  const u32 group = warp / 4, base = shared_address(smem);
  const u64 a_first = wgmma_matrix(base + group * MT * 8192, 16, 1024);
  const u64 b_first = wgmma_matrix(base + A_BYTES, BACKWARD ? 16 : 8192, 1024);
  u32 slot = 0, parity = 0, done_slot = 0;
  for (u32 step = 0; step < steps; ++step) {
    mbarrier_wait(full + slot, parity);
    wgmma_fence();
    // Addresses in descriptors count 16 bytes.
    const u64 a = a_first + slot * (STAGE / 16), b = b_first + slot * (STAGE / 16);
#pragma unroll
    for (u32 k = 0; k < 4; ++k) {
#pragma unroll
      for (i32 i = 0; i < MT; ++i)
        wgmma<BACKWARD ? 0 : 1>(T{}, acc[i], a + k * 2 + i * 512, b + k * (BACKWARD ? 2 : 128), 1);
    }
    wgmma_commit();
    // The products of the step before are done: its stage can be filled again.
    wgmma_wait<1>();
    if (step > 0 && lane == 0) mbarrier_arrive(empty + done_slot);
    done_slot = slot;
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
  wgmma_wait<0>();
  // Both groups are done with the stages: the tile is finished in their place.
  BARRIER_PART(1, CONV_WGMMA_CONSUMERS);
  const ConvPlace fragment{warp * MT * 16 + (lane >> 2), 2 * (lane & 3), warp, CONV_WGMMA_CONSUMERS / 32};
  const u32 valid_rows = args.run ? min((u32)BM, args.rows - tile * BM) : args.tile_h * args.tile_w.divisor;
  conv_finish<T, BM, BN, MT, NT, CONV_WGMMA_CONSUMERS, true>(args.out, acc, fragment, blockIdx.x, blockIdx.y, tile,
                                                             column0, row_out, row_residual, valid_rows, smem);
}

#endif
