// out[i] = 2 x[i] with right and wrong tails, conversions of every number, votes, and reads of what nobody wrote.
#include "common.cuh"

struct MapArgs {
  u64 x, out;
  u64 n;
};

KERNEL(twice, MapArgs, 128) {
  const u64 i = (u64)blockIdx.x * 128 + threadIdx.x;
  if (i < args.n) reinterpret_cast<float*>(args.out)[i] = 2.0f * reinterpret_cast<const float*>(args.x)[i];
}
// Reads and writes the rest of its last block too.
KERNEL(twice_tail, MapArgs, 128) {
  const u64 i = (u64)blockIdx.x * 128 + threadIdx.x;
  reinterpret_cast<float*>(args.out)[i] = 2.0f * reinterpret_cast<const float*>(args.x)[i];
}
// Writes one number too many.
KERNEL(twice_one_more, MapArgs, 128) {
  const u64 i = (u64)blockIdx.x * 128 + threadIdx.x;
  if (i <= args.n) reinterpret_cast<float*>(args.out)[i] = 2.0f;
}
// Reads one number too many: no harm that anybody but a sanitizer could see.
KERNEL(twice_read_one_more, MapArgs, 128) {
  const u64 i = (u64)blockIdx.x * 128 + threadIdx.x;
  const float v = i <= args.n ? reinterpret_cast<const float*>(args.x)[i] : 0.0f;
  if (i < args.n) reinterpret_cast<float*>(args.out)[i] = 2.0f * v;
}
// Writes in front of the array.
KERNEL(twice_before, MapArgs, 128) {
  const u64 i = (u64)blockIdx.x * 128 + threadIdx.x;
  if (i < args.n) reinterpret_cast<float*>(args.out)[(i64)i - 1] = 2.0f;
}
// Follows a null pointer.
KERNEL(twice_null, MapArgs, 128) { reinterpret_cast<float*>(0ull * args.n)[threadIdx.x] = 2.0f; }
// Reads four numbers at an address that is aligned for one.
KERNEL(twice_misaligned, MapArgs, 128) {
  const u64 i = ((u64)blockIdx.x * 128 + threadIdx.x) * 4 + 1;
  if (i + 3 >= args.n) return;
  const float4 v = *reinterpret_cast<const float4*>(args.x + i * 4);
  reinterpret_cast<float*>(args.out)[i] = 2.0f * v.x + v.w;
}
// Writes past a fixed array of shared memory.
KERNEL(twice_index, MapArgs, 128) {
  __shared__ float numbers[100];
  numbers[threadIdx.x] = 1.0f;
  __syncthreads();
  if (threadIdx.x < args.n) reinterpret_cast<float*>(args.out)[threadIdx.x] = numbers[threadIdx.x ^ 1];
}
// Reads shared memory that nobody wrote.
KERNEL(unwritten_shared, MapArgs, 128) {
  DYN_SMEM(shared);
  const float* numbers = reinterpret_cast<const float*>(shared);
  if (threadIdx.x < args.n) reinterpret_cast<float*>(args.out)[threadIdx.x] = numbers[threadIdx.x];
}
// Writes dynamic shared memory past what the launch asked for.
KERNEL(past_shared, MapArgs, 128) {
  DYN_SMEM(shared);
  reinterpret_cast<float*>(shared)[threadIdx.x] = 1.0f;
}

// x: f32; out: f16, bf16 and what f16 and bf16 read back as, four words of 4 bytes for each number.
KERNEL(convert, MapArgs, 128) {
  const u64 i = (u64)blockIdx.x * 128 + threadIdx.x;
  if (i >= args.n) return;
  const float v = reinterpret_cast<const float*>(args.x)[i];
  u32* out = reinterpret_cast<u32*>(args.out) + i * 4;
  const u16 half = f32_to_f16(v), brain = f32_to_bf16(v);
  out[0] = half, out[1] = brain;
  out[2] = __float_as_uint(to_f32(f16{half})), out[3] = __float_as_uint(to_f32(bf16{brain}));
}
// out[i] = the number that the 16-bit pattern i means, as f16.
KERNEL(halves, MapArgs, 128) {
  const u64 i = (u64)blockIdx.x * 128 + threadIdx.x;
  if (i < args.n) reinterpret_cast<float*>(args.out)[i] = f16_to_f32((u16)i);
}

// Warp and block collectives; 12 words for each thread of one block of 96.
KERNEL(collectives, MapArgs, 96) {
  const u32 t = threadIdx.x, lane = t & 31;
  u32* out = reinterpret_cast<u32*>(args.out) + t * 12;
  out[0] = __ballot_sync(0xffffffffu, lane % 3 == 0);
  out[1] = __any_sync(0xffffffffu, lane == 40) + 2 * __all_sync(0xffffffffu, lane < 32);
  out[2] = __shfl_sync(0xffffffffu, t, 5);
  out[3] = __shfl_up_sync(0xffffffffu, t, 3);
  out[4] = __shfl_down_sync(0xffffffffu, t, 3);
  out[5] = __shfl_xor_sync(0xffffffffu, t, 1, 8);
  out[6] = (u32)(__shfl_sync(0xffffffffu, (u64)t << 33, 2) >> 33);
  out[7] = (u32)__syncthreads_count(t % 2);
  out[8] = (u32)__syncthreads_or(t == 95) + 2 * (u32)__syncthreads_and(t < 95);
  u32 half = 0;
  if (lane < 16) {
    half = __shfl_xor_sync(0x0000ffffu, t, 15);
  } else {
    half = __ballot_sync(0xffff0000u, lane & 1);
  }
  out[9] = half;
  __syncwarp();
  out[10] = __umulhi(0x80000000u + t, 6u);
  out[11] = (u32)__float2int_rn((float)t * 0.5f);
}
