// out[0] = sum of n numbers in an order that depends on n and the grid alone; the last block to finish adds up the
// blocks' sums and resets the counter. A right kernel and wrong ones.
#include "common.cuh"

struct ReduceArgs {
  u64 x, partials, counter, out;
  u64 n;
};

struct Fault {
  static constexpr u32 none = 0, divergent_barrier = 1, early_return = 2, wrong_lane = 3, own_lane = 4, lost_lane = 5,
                       different_places = 6, different_barriers = 7;
};

// The sum of 256 threads' numbers, in thread 0.
template <u32 FAULT> DEVI float block_sum(float v) {
  __shared__ float sums[8];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (FAULT == Fault::wrong_lane && warp == 1) {
    if (lane < 16) v += __shfl_down_sync(0x0000ffffu, v, 16);
  }
  if (FAULT == Fault::own_lane && warp == 1) v += __shfl_xor_sync(0x0000ffffu, v, 1);
  if (FAULT == Fault::lost_lane && warp == 1) {
    if (lane != 7) v += __shfl_xor_sync(0xffffffffu, v, 1);
  }
  if (FAULT == Fault::different_places && warp == 1) {
    if (lane < 16) {
      v += __shfl_xor_sync(0xffffffffu, v, 1);
    } else {
      v += __shfl_xor_sync(0xffffffffu, v, 1);
    }
  }
  v = warp_sum(v);
  if (lane == 0) sums[warp] = v;
  if (FAULT == Fault::divergent_barrier) {
    if (warp != 3) __syncthreads();
  } else if (FAULT == Fault::different_barriers) {
    if (warp != 3) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else {
    __syncthreads();
  }
  float sum = 0.0f;
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < 8; ++i) sum += sums[i];
  }
  __syncthreads();
  return sum;
}

template <u32 FAULT> DEVI void reduce(const ReduceArgs& args) {
  __shared__ u32 is_last;
  if (FAULT == Fault::early_return && (u64)blockIdx.x * 256 + threadIdx.x >= args.n) return;
  const float* x = reinterpret_cast<const float*>(args.x);
  float* partials = reinterpret_cast<float*>(args.partials);
  u32* counter = reinterpret_cast<u32*>(args.counter);
  float v = 0.0f;
  for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < args.n; i += (u64)gridDim.x * 256) v += x[i];
  v = block_sum<FAULT>(v);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = v;
    __threadfence();
    is_last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  v = 0.0f;
  for (u32 i = threadIdx.x; i < gridDim.x; i += 256) v += __ldcg(partials + i);
  v = block_sum<Fault::none>(v);
  if (threadIdx.x == 0) *reinterpret_cast<float*>(args.out) = v;
}

KERNEL(reduce, ReduceArgs, 256) { reduce<Fault::none>(args); }
KERNEL(reduce_divergent_barrier, ReduceArgs, 256) { reduce<Fault::divergent_barrier>(args); }
KERNEL(reduce_early_return, ReduceArgs, 256) { reduce<Fault::early_return>(args); }
KERNEL(reduce_wrong_lane, ReduceArgs, 256) { reduce<Fault::wrong_lane>(args); }
KERNEL(reduce_own_lane, ReduceArgs, 256) { reduce<Fault::own_lane>(args); }
KERNEL(reduce_lost_lane, ReduceArgs, 256) { reduce<Fault::lost_lane>(args); }
KERNEL(reduce_different_places, ReduceArgs, 256) { reduce<Fault::different_places>(args); }
KERNEL(reduce_different_barriers, ReduceArgs, 256) { reduce<Fault::different_barriers>(args); }
