// c[m][n] = sum over k of a[m][k] b[k][n] in f32 with tiles in static shared memory: a right kernel and wrong ones.
#include "common.cuh"

struct TiledArgs {
  u64 a, b, c;
  u32 m, n, k, reserved;
};

template <bool FIRST_BARRIER, bool SECOND_BARRIER> DEVI void tiled(const TiledArgs& args) {
  __shared__ float as[16][17];
  __shared__ float bs[16][17];
  const float* a = reinterpret_cast<const float*>(args.a);
  const float* b = reinterpret_cast<const float*>(args.b);
  const u32 x = threadIdx.x % 16, y = threadIdx.x / 16;
  const u32 row = blockIdx.y * 16 + y, column = blockIdx.x * 16 + x;
  float sum = 0.0f;
  for (u32 k0 = 0; k0 < args.k; k0 += 16) {
    as[y][x] = row < args.m && k0 + x < args.k ? a[(u64)row * args.k + k0 + x] : 0.0f;
    bs[y][x] = k0 + y < args.k && column < args.n ? b[(u64)(k0 + y) * args.n + column] : 0.0f;
    if (FIRST_BARRIER) __syncthreads();
    for (u32 k = 0; k < 16; ++k) sum += as[y][k] * bs[k][x];
    if (SECOND_BARRIER) __syncthreads();
  }
  if (row < args.m && column < args.n) reinterpret_cast<float*>(args.c)[(u64)row * args.n + column] = sum;
}

KERNEL(tiled, TiledArgs, 256) { tiled<true, true>(args); }
KERNEL(tiled_no_first_barrier, TiledArgs, 256) { tiled<false, true>(args); }
KERNEL(tiled_no_second_barrier, TiledArgs, 256) { tiled<true, false>(args); }
