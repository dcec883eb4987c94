// The orthogonalised momentum step of MuSGD (Jordan et al., "Muon", 2024) on all matrices of a network at once.
// CPU twin: `engine::optim::muon`: the same rounding steps in bfloat16 with f32 sums.
//
// A weight is stored `rows x cols`; the work is on the matrix with the shorter side first, X = S or its transpose,
// which is never formed: S keeps its layout (bfloat16, rows padded to eight numbers with zeros) and the products read
// their operands along or across rows. With m = min, n = max of the sides, per matrix:
//  * muon_update: momentum, Nesterov update, its rounding into S, partial sums of squares (f64). 12 bytes read or
//    written in f32 and 2 in bfloat16 per number: bound by memory.
//  * muon_normalise: S / norm. Each block sums the same partial sums in the same order.
//  * five times: muon_gram G = X X^T (2 m^2 n FLOP), muon_mix B = b G + c G G (2 m^3), muon_product X = a X + B X
//    (2 m^2 n) into the other copy of S. B and G are symmetric, so G G and S B read them along rows.
//  * muon_apply: values -= scale * S.
// One launch of each serves all matrices through tables of tiles, so that small ones fill the chip together. The
// products: tiles of 64x64 by 32 along k, four warps with 32x32 each, fragments by ldmatrix (transposed where the
// operand lies across), the next slice loaded into registers while one is worked on. Chips without bfloat16 tensor
// cores do the same sums in plain f32. Sums over k have an order fixed by the shape. A step whose gradients are not
// finite moves nothing: every kernel returns at once.
#include "common.cuh"
#include "exact.cuh"

#define PART_NUMBERS 4096u
#define TILE 64u
#define SLICE 32u
#define ALONG_PITCH 40u   // 32 numbers of a row and 8 so that rows fall on different banks
#define ACROSS_PITCH 72u  // 64 and 8

// A matrix; Rust twin in `muon_cuda`. 80 bytes.
struct Matrix {
  FastDivisor columns;
  u64 first;  // place in the flat vectors
  u64 x;      // place in both copies of S, numbers
  u64 gram;   // place in G and B, numbers
  u32 rows, cols, pitch;
  u32 m, gram_pitch;
  u32 is_tall;  // rows > cols: X is the transpose of S
  u32 group;
  float aspect_root;
  u32 first_part, parts;
};

struct MuonArgs {
  u64 values, grads, momentum;  // f32
  u64 table;                    // float [groups][2]: momentum, scale
  u64 result;                   // StepResult of `optim.cu`
  u64 matrices;
  u64 tiles;     // uint2: matrix, index of the tile or part within it
  u64 partials;  // f64 by part
  u64 x, x_next; // bfloat16
  u64 gram, mix; // bfloat16
};

struct StepResult {
  double norm;
  float clip, inverse_scale;
  u32 is_finite, reserved0, reserved1, reserved2;
};

DEVI const StepResult& result_of(const MuonArgs& args) { return *reinterpret_cast<const StepResult*>(args.result); }
DEVI uint2 tile_of(const MuonArgs& args) { return reinterpret_cast<const uint2*>(args.tiles)[blockIdx.x]; }
DEVI const Matrix& matrix_of(const MuonArgs& args, u32 index) {
  return reinterpret_cast<const Matrix*>(args.matrices)[index];
}
DEVI float2 rates(const MuonArgs& args, const Matrix& matrix) {
  return reinterpret_cast<const float2*>(args.table)[matrix.group];
}
// Place of number `i` of the stored matrix in S.
DEVI u64 place(const Matrix& matrix, u32 i) {
  u32 column;
  const u32 row = divide(matrix.columns, i, column);
  return matrix.x + (u64)row * matrix.pitch + column;
}

DEVI double block_sum(double v) {
  __shared__ double shared[8];
  v = warp_sum(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = v;
  __syncthreads();
  double sum = 0.0;
  for (u32 i = 0; i < 8; ++i) sum += shared[i];
  return sum;
}

// ---- one number at a time ------------------------------------------------------------------------------------------

// m += (g - m) (1 - mu); u = g + (m - g) mu
KERNEL(muon_update, MuonArgs, 256) {
  const StepResult& result = result_of(args);
  if (!result.is_finite) return;
  const uint2 tile = tile_of(args);
  const Matrix& matrix = matrix_of(args, tile.x);
  const Exact mu = rates(args, matrix).x;
  const float* grads = reinterpret_cast<const float*>(args.grads) + matrix.first;
  float* momentum = reinterpret_cast<float*>(args.momentum) + matrix.first;
  double sum = 0.0;
  const u32 end = matrix.rows * matrix.cols;
#pragma unroll 4
  for (u32 k = 0; k < PART_NUMBERS; k += 256) {
    const u32 i = tile.y * PART_NUMBERS + k + threadIdx.x;
    if (i >= end) break;
    const Exact g = Exact(grads[i]) * result.inverse_scale * result.clip;
    Exact m = momentum[i];
    m = m + (g - m) * (Exact(1.0f) - mu);
    momentum[i] = m.v;
    const bf16 u = from_f32<bf16>((g + (m - g) * mu).v);
    reinterpret_cast<bf16*>(args.x)[place(matrix, i)] = u;
    sum += (double)to_f32(u) * (double)to_f32(u);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) reinterpret_cast<double*>(args.partials)[matrix.first_part + tile.y] = sum;
}

KERNEL(muon_normalise, MuonArgs, 256) {
  if (!result_of(args).is_finite) return;
  const uint2 tile = tile_of(args);
  const Matrix& matrix = matrix_of(args, tile.x);
  const double* partials = reinterpret_cast<const double*>(args.partials) + matrix.first_part;
  double squares = 0.0;
  for (u32 i = threadIdx.x; i < matrix.parts; i += 256) squares += partials[i];
  squares = block_sum(squares);
  // The norm, too, is a bfloat16 number.
  const float norm = rounded<bf16>((Exact(rounded<bf16>((float)sqrt(squares))) + 1e-7f).v);
  bf16* x = reinterpret_cast<bf16*>(args.x);
  const u32 end = matrix.rows * matrix.cols;
#pragma unroll 4
  for (u32 k = 0; k < PART_NUMBERS; k += 256) {
    const u32 i = tile.y * PART_NUMBERS + k + threadIdx.x;
    if (i >= end) break;
    const u64 at = place(matrix, i);
    x[at] = from_f32<bf16>((Exact(to_f32(x[at])) / norm).v);
  }
}

KERNEL(muon_apply, MuonArgs, 256) {
  if (!result_of(args).is_finite) return;
  const uint2 tile = tile_of(args);
  const Matrix& matrix = matrix_of(args, tile.x);
  const Exact scale = Exact(rates(args, matrix).y) * matrix.aspect_root;
  float* values = reinterpret_cast<float*>(args.values) + matrix.first;
  const bf16* x = reinterpret_cast<const bf16*>(args.x);
  const u32 end = matrix.rows * matrix.cols;
#pragma unroll 4
  for (u32 k = 0; k < PART_NUMBERS; k += 256) {
    const u32 i = tile.y * PART_NUMBERS + k + threadIdx.x;
    if (i >= end) break;
    values[i] = (Exact(values[i]) - scale * to_f32(x[place(matrix, i)])).v;
  }
}

// ---- products: C(i, j) = sum over k of A(i, k) B(j, k) -----------------------------------------------------------------

// An operand: `rows x cols` numbers in memory, `cols` padded with zeros to `pitch`. Along: a memory row is one i and
// k runs along it; across: a memory row is one k and i runs along it.
struct Operand {
  const bf16* data;
  u32 rows, pitch;
};
// Static size of a slice in shared memory, either way: 64 * 40 or 32 * 72 numbers.
#define SLICE_NUMBERS 2560u

// Two 16-byte pieces of the slice that starts at (i0, k0), by each of 128 threads; zeros outside.
template <bool is_across> DEVI void load_slice(const Operand& from, u32 i0, u32 k0, uint4 (&pieces)[2]) {
#pragma unroll
  for (u32 p = 0; p < 2; ++p) {
    const u32 piece = threadIdx.x + p * 128;
    const u32 row = is_across ? k0 + piece / 8 : i0 + piece / 4;
    const u32 column = is_across ? i0 + piece % 8 * 8 : k0 + piece % 4 * 8;
    pieces[p] = make_uint4(0, 0, 0, 0);
    if (row < from.rows && column < from.pitch)
      pieces[p] = *reinterpret_cast<const uint4*>(from.data + (u64)row * from.pitch + column);
  }
}
template <bool is_across> DEVI void store_slice(bf16* shared, const uint4 (&pieces)[2]) {
#pragma unroll
  for (u32 p = 0; p < 2; ++p) {
    const u32 piece = threadIdx.x + p * 128;
    const u32 at = is_across ? piece / 8 * ACROSS_PITCH + piece % 8 * 8 : piece / 4 * ALONG_PITCH + piece % 4 * 8;
    *reinterpret_cast<uint4*>(shared + at) = pieces[p];
  }
}

#if __CUDA_ARCH__ >= 800 || defined(BOXWRIGHT_EMULATOR)

// Fragment of A: rows i.. i + 15 by k .. k + 15.
template <bool is_across> DEVI void fragment_a(u32 (&a)[4], const bf16* shared, u32 i, u32 k) {
  const u32 lane = threadIdx.x & 31, r = lane & 7, low = lane >> 3 & 1, high = lane >> 4;
  if (is_across) {
    ldmatrix_x4_trans(a, shared + (k + high * 8 + r) * ACROSS_PITCH + i + low * 8);
  } else {
    ldmatrix_x4(a, shared + (i + low * 8 + r) * ALONG_PITCH + k + high * 8);
  }
}
// Fragments of B for j .. j + 7 (first two) and j + 8 .. j + 15.
template <bool is_across> DEVI void fragment_b(u32 (&b)[4], const bf16* shared, u32 j, u32 k) {
  const u32 lane = threadIdx.x & 31, r = lane & 7, low = lane >> 3 & 1, high = lane >> 4;
  if (is_across) {
    ldmatrix_x4_trans(b, shared + (k + low * 8 + r) * ACROSS_PITCH + j + high * 8);
  } else {
    ldmatrix_x4(b, shared + (j + high * 8 + r) * ALONG_PITCH + k + low * 8);
  }
}
template <bool a_across, bool b_across>
DEVI void multiply_slice(float (&c)[2][4][4], const bf16* a_shared, const bf16* b_shared, u32 i, u32 j) {
#pragma unroll
  for (u32 k = 0; k < SLICE; k += 16) {
    u32 a[2][4], b[2][4];
#pragma unroll
    for (u32 f = 0; f < 2; ++f) {
      fragment_a<a_across>(a[f], a_shared, i + f * 16, k);
      fragment_b<b_across>(b[f], b_shared, j + f * 16, k);
    }
#pragma unroll
    for (u32 y = 0; y < 2; ++y)
#pragma unroll
      for (u32 x = 0; x < 4; ++x)
        mma_16x8x16(bf16{}, c[y][x], a[y], b[x >> 1][(x & 1) * 2], b[x >> 1][(x & 1) * 2 + 1]);
  }
}

#else

template <bool is_across> DEVI float number(const bf16* shared, u32 i, u32 k) {
  return to_f32(shared[is_across ? k * ACROSS_PITCH + i : i * ALONG_PITCH + k]);
}
// The same numbers in the same registers, one by one.
template <bool a_across, bool b_across>
DEVI void multiply_slice(float (&c)[2][4][4], const bf16* a_shared, const bf16* b_shared, u32 i, u32 j) {
  const u32 lane = threadIdx.x & 31, row = lane / 4, column = lane % 4 * 2;
#pragma unroll 2
  for (u32 k = 0; k < SLICE; ++k) {
    float a[4], b[8];
#pragma unroll
    for (u32 y = 0; y < 4; ++y) a[y] = number<a_across>(a_shared, i + row + y * 8, k);
#pragma unroll
    for (u32 x = 0; x < 8; ++x) b[x] = number<b_across>(b_shared, j + column + (x >> 1) * 8 + (x & 1), k);
#pragma unroll
    for (u32 y = 0; y < 2; ++y)
#pragma unroll
      for (u32 x = 0; x < 4; ++x)
#pragma unroll
        for (u32 e = 0; e < 4; ++e) c[y][x][e] += a[y * 2 + (e >> 1)] * b[x * 2 + (e & 1)];
  }
}

#endif

// The 64x64 tile at (i0, j0) of the product over `depth`; each thread gets c[y][x] for rows 16 y and columns 8 x of
// its warp's 32x32, within them as the accumulator of `mma_16x8x16`.
template <bool a_across, bool b_across>
DEVI void multiply(float (&c)[2][4][4], const Operand& a, const Operand& b, u32 i0, u32 j0, u32 depth) {
  __shared__ __align__(16) bf16 a_shared[SLICE_NUMBERS];
  __shared__ __align__(16) bf16 b_shared[SLICE_NUMBERS];
  const u32 warp = threadIdx.x >> 5, i = (warp & 1) * 32, j = (warp >> 1) * 32;
#pragma unroll
  for (u32 y = 0; y < 2; ++y)
#pragma unroll
    for (u32 x = 0; x < 4; ++x)
#pragma unroll
      for (u32 e = 0; e < 4; ++e) c[y][x][e] = 0.0f;
  uint4 a_next[2], b_next[2];
  load_slice<a_across>(a, i0, 0, a_next);
  load_slice<b_across>(b, j0, 0, b_next);
#pragma unroll 1
  for (u32 k = 0; k < depth; k += SLICE) {
    __syncthreads();
    store_slice<a_across>(a_shared, a_next);
    store_slice<b_across>(b_shared, b_next);
    __syncthreads();
    if (k + SLICE < depth) {
      load_slice<a_across>(a, i0, k + SLICE, a_next);
      load_slice<b_across>(b, j0, k + SLICE, b_next);
    }
    multiply_slice<a_across, b_across>(c, a_shared, b_shared, i, j);
  }
}

// Calls f(row, column, sum) for each number of the tile that this thread holds.
template <class F> DEVI void for_each_sum(const float (&c)[2][4][4], u32 i0, u32 j0, F f) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 i = i0 + (warp & 1) * 32 + lane / 4, j = j0 + (warp >> 1) * 32 + lane % 4 * 2;
#pragma unroll
  for (u32 y = 0; y < 2; ++y)
#pragma unroll
    for (u32 x = 0; x < 4; ++x)
#pragma unroll
      for (u32 e = 0; e < 4; ++e) f(i + y * 16 + (e >> 1) * 8, j + x * 8 + (e & 1), c[y][x][e]);
}

KERNEL(muon_gram, MuonArgs, 128) {
  if (!result_of(args).is_finite) return;
  const uint2 tile = tile_of(args);
  const Matrix& matrix = matrix_of(args, tile.x);
  const u32 across = (matrix.m + TILE - 1) / TILE, i0 = tile.y / across * TILE, j0 = tile.y % across * TILE;
  const Operand s{reinterpret_cast<const bf16*>(args.x) + matrix.x, matrix.rows, matrix.pitch};
  float c[2][4][4];
  if (matrix.is_tall) {
    multiply<true, true>(c, s, s, i0, j0, matrix.rows);
  } else {
    multiply<false, false>(c, s, s, i0, j0, matrix.cols);
  }
  bf16* gram = reinterpret_cast<bf16*>(args.gram) + matrix.gram;
  const u32 m = matrix.m, pitch = matrix.gram_pitch;
  for_each_sum(c, i0, j0, [=](u32 i, u32 j, float sum) {
    if (i < m && j < m) gram[(u64)i * pitch + j] = from_f32<bf16>(sum);
  });
}

KERNEL(muon_mix, MuonArgs, 128) {
  if (!result_of(args).is_finite) return;
  const uint2 tile = tile_of(args);
  const Matrix& matrix = matrix_of(args, tile.x);
  const u32 across = (matrix.m + TILE - 1) / TILE, i0 = tile.y / across * TILE, j0 = tile.y % across * TILE;
  const bf16* gram = reinterpret_cast<const bf16*>(args.gram) + matrix.gram;
  bf16* mix = reinterpret_cast<bf16*>(args.mix) + matrix.gram;
  const u32 m = matrix.m, pitch = matrix.gram_pitch;
  const Operand g{gram, m, pitch};
  float c[2][4][4];
  multiply<false, false>(c, g, g, i0, j0, m);
  for_each_sum(c, i0, j0, [=](u32 i, u32 j, float sum) {
    if (i >= m || j >= m) return;
    const u64 at = (u64)i * pitch + j;
    mix[at] = from_f32<bf16>((Exact(-4.7750f) * to_f32(gram[at]) + Exact(2.0315f) * sum).v);
  });
}

KERNEL(muon_product, MuonArgs, 128) {
  if (!result_of(args).is_finite) return;
  const uint2 tile = tile_of(args);
  const Matrix& matrix = matrix_of(args, tile.x);
  const u32 across = (matrix.cols + TILE - 1) / TILE, i0 = tile.y / across * TILE, j0 = tile.y % across * TILE;
  const bf16* x = reinterpret_cast<const bf16*>(args.x) + matrix.x;
  const Operand s{x, matrix.rows, matrix.pitch};
  const Operand mix{reinterpret_cast<const bf16*>(args.mix) + matrix.gram, matrix.m, matrix.gram_pitch};
  float c[2][4][4];
  if (matrix.is_tall) {
    multiply<false, false>(c, s, mix, i0, j0, matrix.m);
  } else {
    multiply<false, true>(c, mix, s, i0, j0, matrix.m);
  }
  bf16* next = reinterpret_cast<bf16*>(args.x_next) + matrix.x;
  const u32 rows = matrix.rows, cols = matrix.cols, pitch = matrix.pitch;
  for_each_sum(c, i0, j0, [=](u32 i, u32 j, float sum) {
    if (i >= rows || j >= cols) return;
    const u64 at = (u64)i * pitch + j;
    next[at] = from_f32<bf16>((Exact(3.4445f) * to_f32(x[at]) + sum).v);
  });
}
