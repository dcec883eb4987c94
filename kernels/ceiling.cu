// Ceilings of the chip, for profiles.
//
// ceiling_mma_<type>: every warp multiplies 16x16 by 16x8 fragments that stay in registers, `rounds` times over eight
// independent accumulators: 2 * 16 * 8 * 16 * 8 operations a round and warp, no memory. What `mma.sync` can give.
// ceiling_copy: out[i] = in[i], 16 bytes per access, four accesses in flight per thread: what memory can give.
#include "common.cuh"

struct CeilingArgs {
  u64 from, to;
  u64 count;  // of 16-byte words, or rounds
};

KERNEL(ceiling_copy, CeilingArgs, 256) {
  const uint4* from = reinterpret_cast<const uint4*>(args.from);
  uint4* to = reinterpret_cast<uint4*>(args.to);
  const u64 step = (u64)gridDim.x * 256;
  u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
  for (; i + 3 * step < args.count; i += 4 * step) {
    const uint4 a = from[i], b = from[i + step], c = from[i + 2 * step], d = from[i + 3 * step];
    to[i] = a, to[i + step] = b, to[i + 2 * step] = c, to[i + 3 * step] = d;
  }
  for (; i < args.count; i += step) to[i] = from[i];
}

#if __CUDA_ARCH__ >= 800 || defined(BOXWRIGHT_EMULATOR)
template <class T> DEVI void multiply(const CeilingArgs& args) {
  float d[8][4] = {};
  const u32 lane = threadIdx.x & 31u;
  const u32 a[4] = {lane, lane * 3, lane * 5, lane * 7};
  for (u64 round = 0; round < args.count; ++round) {
#pragma unroll
    for (i32 j = 0; j < 8; ++j) mma_16x8x16(T{}, d[j], a, lane + j, lane ^ j);
  }
  float sum = 0.0f;
#pragma unroll
  for (i32 j = 0; j < 8; ++j) sum += d[j][0] + d[j][1] + d[j][2] + d[j][3];
  reinterpret_cast<float*>(args.to)[(u64)blockIdx.x * 256 + threadIdx.x] = sum;
}
KERNEL(ceiling_mma_bf16, CeilingArgs, 256) { multiply<bf16>(args); }
KERNEL(ceiling_mma_f16, CeilingArgs, 256) { multiply<f16>(args); }
#endif
