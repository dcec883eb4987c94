// What the tensor-core convolutions share: fragments, the finishing of a tile, and the sum of split tiles.
//
// A block computes a tile of BM output pixels ("rows") by BN output channels ("columns") in f32 registers; a warp
// holds MT x NT fragments of 16x8. Fragment numbers [2h], [2h + 1] lie in row `lane / 4 + 8 h`, columns
// `2 (lane % 4)` and the next (PTX, mma.m16n8k16).
//
// The tile is finished by `conv_finish`: sum of split tiles, bias, activation, residual or the old value, rounding,
// statistics of the rounded numbers, and 16-byte stores of whole pixel pieces out of shared memory.
#pragma once
#include "common.cuh"

#if __CUDA_ARCH__ >= 800 || defined(BOXWRIGHT_EMULATOR)

// What to do with a finished tile.
struct ConvKind {
  static constexpr u32 raw = 0, stats = 1, bias = 2, apply = 3;
};

// Where the tile goes. Pitches count groups of 8 numbers. 96 bytes.
struct ConvOutput {
  u64 data;                   // element (0, 0, 0, 0); f32 with a bias, else T
  u64 residual;               // added last, or 0
  u64 first, second;          // partial statistics; bias; scale and shift
  u64 partial_tiles, counters;  // f32 tiles of the splits, one u32 for each tile, zero before and after
  u32 image_pitch, row_pitch, pixel_pitch;
  u32 residual_image_pitch, residual_row_pitch, residual_pixel_pitch;
  u32 columns;                // channels of the output, a multiple of 8
  u32 kind, activation;
  u32 accumulate;             // add to what is there
  u32 splits;
  u32 reserved;
};

// Where the threads that finish a tile meet: all of the block, or (`PART`) its first THREADS.
#define CONV_SYNC()                                    \
  do {                                                 \
    if (PART) {                                        \
      BARRIER_PART(1, THREADS);                        \
    } else {                                           \
      __syncthreads();                                 \
    }                                                  \
  } while (0)

// Marks a row of the tile that is no pixel of the output.
#define CONV_NO_ROW 0xffffffffu

// ---- fragments ----------------------------------------------------------------------------------------------------

// acc += a b for the fragments of one k16 step. `load(j, b)` loads the fragments of columns 16 j .. 16 j + 15; those of
// the next columns are under way while these are used, and no more of them take registers.
template <class T, i32 MT, i32 NT, class Load>
DEVI void conv_mma(float (&acc)[MT][NT][4], const u32 (&a)[MT][4], const Load& load) {
  u32 b[2][4];
  load(0, b[0]);
#pragma unroll
  for (i32 j = 0; j < NT / 2; ++j) {
    if (j + 1 < NT / 2) load(j + 1, b[(j + 1) % 2]);
#pragma unroll
    for (i32 i = 0; i < MT; ++i) {
      mma_16x8x16(T{}, acc[i][2 * j], a[i], b[j % 2][0], b[j % 2][1]);
      mma_16x8x16(T{}, acc[i][2 * j + 1], a[i], b[j % 2][2], b[j % 2][3]);
    }
  }
}

template <i32 MT, i32 NT> DEVI void conv_clear(float (&acc)[MT][NT][4]) {
#pragma unroll
  for (i32 i = 0; i < MT; ++i) {
#pragma unroll
    for (i32 j = 0; j < NT; ++j) {
#pragma unroll
      for (i32 q = 0; q < 4; ++q) acc[i][j][q] = 0.0f;
    }
  }
}

// ---- split tiles ----------------------------------------------------------------------------------------------------

// Leaves this block's part in the workspace; the last block of the tile to arrive sums all parts in the order of
// their index, whoever it is, resets the counter and returns true. The others return false.
template <i32 MT, i32 NT, i32 THREADS, bool PART>
DEVI bool conv_join_splits(const ConvOutput& o, float (&acc)[MT][NT][4], u32 tile, u32 split) {
  __shared__ u32 is_last;
  const u32 tid = threadIdx.x;
  float4* parts = reinterpret_cast<float4*>(o.partial_tiles) + (u64)tile * o.splits * (MT * NT * THREADS) + tid;
  float4* mine = parts + (u64)split * (MT * NT * THREADS);
#pragma unroll
  for (i32 i = 0; i < MT; ++i) {
#pragma unroll
    for (i32 j = 0; j < NT; ++j)
      mine[(i * NT + j) * THREADS] = make_float4(acc[i][j][0], acc[i][j][1], acc[i][j][2], acc[i][j][3]);
  }
  __threadfence();
  CONV_SYNC();
  if (tid == 0) {
    u32* counter = reinterpret_cast<u32*>(o.counters) + tile;
    is_last = atomicAdd(counter, 1u) == o.splits - 1 ? 1u : 0u;
    if (is_last) *counter = 0;
    __threadfence();
  }
  CONV_SYNC();
  if (!is_last) return false;
  conv_clear(acc);
  for (u32 s = 0; s < o.splits; ++s) {
    const float4* part = parts + (u64)s * (MT * NT * THREADS);
#pragma unroll
    for (i32 i = 0; i < MT; ++i) {
#pragma unroll
      for (i32 j = 0; j < NT; ++j) {
        const float4 v = part[(i * NT + j) * THREADS];
        acc[i][j][0] += v.x, acc[i][j][1] += v.y, acc[i][j][2] += v.z, acc[i][j][3] += v.w;
      }
    }
  }
  return true;
}

// ---- finishing ------------------------------------------------------------------------------------------------------

// The place of a thread's fragments in its tile.
struct ConvPlace {
  u32 row;     // of fragment 0, numbers [0] and [1]
  u32 column;  // of fragment 0, number [0]
  u32 warp_row, warp_rows;
};

// Finishes eight numbers of a row and stores them.
template <class T>
DEVI void conv_finish8(const ConvOutput& o, float (&v)[8], u32 column, u32 at, u32 residual_at) {
  if (o.kind == ConvKind::bias) {
    const float* bias = reinterpret_cast<const float*>(o.first) + column;
#pragma unroll
    for (i32 i = 0; i < 8; ++i) v[i] += bias[i];
    store8(reinterpret_cast<float*>(o.data) + (u64)at * 8 + column, v);
    return;
  }
  if (o.kind == ConvKind::apply) {
    const float* scale = reinterpret_cast<const float*>(o.first) + column;
    const float* shift = reinterpret_cast<const float*>(o.second) + column;
#pragma unroll
    for (i32 i = 0; i < 8; ++i) v[i] = activate(o.activation, v[i] * scale[i] + shift[i]);
  }
  T* out = reinterpret_cast<T*>(o.data) + (u64)at * 8 + column;
  float more[8];
  if (o.residual != 0) {
    load8(reinterpret_cast<const T*>(o.residual) + (u64)residual_at * 8 + column, more);
#pragma unroll
    for (i32 i = 0; i < 8; ++i) v[i] += more[i];
  }
  if (o.accumulate != 0) {
    load8(out, more);
#pragma unroll
    for (i32 i = 0; i < 8; ++i) v[i] += more[i];
  }
  store8(out, v);
}

// The tile goes through shared memory in f32, one fragment of rows of each warp at a time: 16-byte accesses to the
// output, to what is added to it and to the parameters of the columns.
template <class T, i32 BN, i32 MT, i32 NT, i32 THREADS, bool PART>
DEVI void conv_store_finished(const ConvOutput& o, const float (&acc)[MT][NT][4], const ConvPlace& p, u32 column0,
                              const u32* row_out, const u32* row_residual, u8* smem) {
  constexpr u32 PITCH = BN + 8, GROUPS = BN / 8;
  float* staged = reinterpret_cast<float*>(smem);
  const u32 lane_row = p.warp_row * 16 + p.row % 16;
#pragma unroll
  for (i32 i = 0; i < MT; ++i) {
    CONV_SYNC();
#pragma unroll
    for (i32 h = 0; h < 2; ++h) {
      float* row = staged + (lane_row + h * 8) * PITCH + p.column;
#pragma unroll
      for (i32 j = 0; j < NT; ++j)
        *reinterpret_cast<float2*>(row + j * 8) = make_float2(acc[i][j][2 * h], acc[i][j][2 * h + 1]);
    }
    CONV_SYNC();
#pragma unroll 1
    for (u32 index = threadIdx.x; index < p.warp_rows * 16 * GROUPS; index += THREADS) {
      const u32 r = index / GROUPS, column = index % GROUPS * 8;
      const u32 row = r / 16 * (MT * 16) + i * 16 + r % 16, at = row_out[row];
      if (at == CONV_NO_ROW || column0 + column >= o.columns) continue;
      float v[8];
      load8(staged + r * PITCH + column, v);
      conv_finish8<T>(o, v, column0 + column, at, row_residual[row]);
    }
  }
}

// Partial statistics of the tile: the sum of each column, and the sum of squared deviations from the tile's own mean.
// Rows of a warp by shuffles, then the warps in order: the same order every time.
template <i32 BN, i32 MT, i32 NT, i32 THREADS, bool PART>
DEVI void conv_stats(const ConvOutput& o, const float (&acc)[MT][NT][4], const ConvPlace& p, u32 column0, u32 row_tile,
                     const u32* row_out, u32 valid_rows, u8* smem) {
  float* sums = reinterpret_cast<float*>(smem);
  float* means = sums + p.warp_rows * BN;
  float* partials = reinterpret_cast<float*>(o.first) + (u64)row_tile * 2 * o.columns + column0;
  const u32 tid = threadIdx.x, lane = tid & 31;
  u32 live = 0;
#pragma unroll
  for (i32 i = 0; i < 2 * MT; ++i) live |= (row_out[p.row + i * 8] != CONV_NO_ROW ? 1u : 0u) << i;
#pragma unroll
  for (i32 pass = 0; pass < 2; ++pass) {
#pragma unroll
    for (i32 j = 0; j < NT; ++j) {
#pragma unroll
      for (i32 e = 0; e < 2; ++e) {
        const u32 column = p.column + j * 8 + e;
        const float mean = pass == 0 ? 0.0f : means[column];
        float sum = 0.0f;
#pragma unroll
        for (i32 i = 0; i < 2 * MT; ++i) {
          const float v = acc[i / 2][j][2 * (i % 2) + e] - mean;
          sum += (live >> i & 1u) ? (pass == 0 ? v : v * v) : 0.0f;
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 4);
        sum += __shfl_xor_sync(0xffffffffu, sum, 8);
        sum += __shfl_xor_sync(0xffffffffu, sum, 16);
        if (lane < 4) sums[p.warp_row * BN + column] = sum;
      }
    }
    CONV_SYNC();
    if (tid < BN) {
      float total = 0.0f;
      for (u32 w = 0; w < p.warp_rows; ++w) total += sums[w * BN + tid];
      if (column0 + tid < o.columns) partials[pass * o.columns + tid] = total;
      if (pass == 0) means[tid] = total / (float)valid_rows;
    }
    CONV_SYNC();
  }
}

// Everything after the products, by the first THREADS threads of the block (all of them unless `PART`). Shared memory is
// free when this is called; `row_out` and `row_residual` give the
// offset of each row in groups of 8 numbers, or CONV_NO_ROW. `tile` numbers the tiles of the launch.
template <class T, i32 BM, i32 BN, i32 MT, i32 NT, i32 THREADS, bool PART = false>
DEVI void conv_finish(const ConvOutput& o, float (&acc)[MT][NT][4], const ConvPlace& p, u32 tile, u32 split,
                      u32 row_tile, u32 column0, const u32* row_out, const u32* row_residual, u32 valid_rows,
                      u8* smem) {
  if (o.splits > 1 && !conv_join_splits<MT, NT, THREADS, PART>(o, acc, tile, split)) return;
  if (o.kind >= ConvKind::bias || o.residual != 0 || o.accumulate != 0) {
    conv_store_finished<T, BN, MT, NT, THREADS, PART>(o, acc, p, column0, row_out, row_residual, smem);
    return;
  }
#pragma unroll
  for (i32 i = 0; i < MT; ++i) {
#pragma unroll
    for (i32 j = 0; j < NT; ++j) {
#pragma unroll
      for (i32 q = 0; q < 4; ++q) acc[i][j][q] = rounded<T>(acc[i][j][q]);
    }
  }
  if (o.kind == ConvKind::stats) conv_stats<BN, MT, NT, THREADS, PART>(o, acc, p, column0, row_tile, row_out, valid_rows, smem);
  // A pitch of an odd number of 16-byte units: neither side of the exchange has bank conflicts.
  constexpr u32 PITCH = BN + 8;
  T* staged = reinterpret_cast<T*>(smem);
#pragma unroll
  for (i32 i = 0; i < MT; ++i) {
#pragma unroll
    for (i32 h = 0; h < 2; ++h) {
      T* row = staged + (p.row + i * 16 + h * 8) * PITCH + p.column;
#pragma unroll
      for (i32 j = 0; j < NT; ++j)
        *reinterpret_cast<u32*>(row + j * 8) = Pair<T>::pack(acc[i][j][2 * h], acc[i][j][2 * h + 1]);
    }
  }
  CONV_SYNC();
  constexpr u32 GROUPS = BN / 8;
  for (u32 i = threadIdx.x; i < BM * GROUPS; i += THREADS) {
    const u32 row = i / GROUPS, group = i % GROUPS;
    const u32 at = row_out[row];
    if (at == CONV_NO_ROW || column0 + group * 8 >= o.columns) continue;
    reinterpret_cast<uint4*>(o.data)[(u64)at + column0 / 8 + group] =
        *reinterpret_cast<const uint4*>(staged + row * PITCH + group * 8);
  }
}

// Bytes of shared memory that finishing a tile takes.
#define CONV_FINISH_BYTES(BM, BN) ((BM) * ((BN) + 8) * 2)

#endif
